//! The pictures of an img2img request as they were sent: base64 to pixels, and the copies that option `save_init_img` keeps.
//!
//! A kept picture is named by the MD5 of its pixels as they were decoded, before transparency is flattened, which is also the
//! infotext's `Init image hash`. Follows `StableDiffusionProcessingImg2Img.init` of A1111 1.10.

use std::path::Path;

use image::DynamicImage;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::{ApiError, with_causes};
use super::image_source::ImageSource;
use super::options::Options;
use super::pictures::{Reader, Sources};
use super::types::ImageFields;
use crate::config::Limits;
use crate::imaging::{self, EncodeOptions, SaveRequest, md5};

/// The pictures of a request as text.
pub struct Encoded {
    /// Init images.
    pub images: Vec<String>,
    mask: Option<String>,
}

/// A picture to be kept.
pub struct Original {
    picture: DynamicImage,
    /// MD5 of its pixels, hex.
    pub hash: String,
}

impl Encoded {
    /// Takes the pictures out of the model, unless the answer is to repeat them.
    ///
    /// # Errors
    /// They are no text.
    pub fn take(wire: &mut Map<String, Value>) -> Result<Self, ApiError> {
        let keep = wire.get("include_init_images") == Some(&Value::Bool(true));
        let mut pick = |name: &str| match wire.get_mut(name) {
            Some(value) if keep => value.clone(),
            Some(value) => value.take(),
            None => Value::Null,
        };
        let read = |error: serde_json::Error| ApiError::failure("ValueError", error.to_string());
        let images = Option::<Vec<String>>::deserialize(pick("init_images")).map_err(read)?;
        let mask = Option::<String>::deserialize(pick("mask")).map_err(read)?;
        Ok(Self {
            images: images.unwrap_or_default(),
            mask: mask.filter(|mask| !mask.is_empty()),
        })
    }

    /// Decodes the pictures within the limits; the second part is what `save_init_img` keeps.
    ///
    /// # Errors
    /// 400 for a picture that cannot be read or is too large.
    pub fn decode(
        self,
        fields: &ImageFields,
        options: &Options,
        limits: &Limits,
    ) -> Result<(Sources, Vec<Original>), ApiError> {
        let mut source = ImageSource::new(options);
        let mut reader = Reader::new(fields, options, limits)
            .map_err(|error| ApiError::bad_request(error.to_string()))?;
        let mut pictures = Vec::with_capacity(self.images.len());
        let mut originals = Vec::new();
        for text in &self.images {
            let picture = reader
                .decode(&source.file(text)?)
                .map_err(|error| source.unreadable(text, &error))?;
            if options.flag("save_init_img") {
                originals.push(Original {
                    hash: md5::hex(picture.as_bytes()),
                    picture: picture.clone(),
                });
            }
            pictures.push(reader.flatten(picture));
        }
        let mask = match &self.mask {
            Some(text) => {
                let mask = reader.mask(&source.file(text)?);
                Some(mask.map_err(|error| source.unreadable(text, &error))?)
            }
            None => None,
        };
        Ok((Sources { pictures, mask }, originals))
    }
}

/// Writes the pictures that are to be kept into the directory of option `outdir_init_images`.
///
/// # Errors
/// 500 if a file cannot be written.
pub fn save(originals: &[Original], options: &Options, data_dir: &Path) -> Result<(), ApiError> {
    for original in originals {
        let failed = |error: imaging::Error| ApiError::failure("OSError", with_causes(&error));
        let picture = original.picture.to_rgba8();
        let file = if original.picture.color().has_alpha() {
            imaging::encode(&picture, &EncodeOptions::default())
        } else {
            imaging::encode(&original.picture.to_rgb8(), &EncodeOptions::default())
        };
        imaging::save(&SaveRequest {
            root: &data_dir.join(options.text("outdir_init_images")),
            subdirectory: "",
            basename: "",
            stem: &original.hash,
            numbered: false,
            extension: "png",
            bytes: &file.map_err(failed)?.bytes,
            sidecar: None,
        })
        .map_err(failed)?;
    }
    Ok(())
}
