//! The words of the layers below, as the API spells them: samplers, schedulers, noise sources, picture files.
//!
//! The one file of the outer rooms that knows how `sampling`, `prompt`, `rng` and `imaging` name things.

use std::fmt;
use std::path::Path;

use image::ImageEncoder;
use image::RgbImage;
use serde_json::{Map, Value, json};

use super::options::Options;
use super::types::Txt2Img;
use crate::imaging::infotext::Params;
use crate::prompt::Emphasis;
use crate::rng::NoiseSource;
use crate::sampling::{Sampler, SamplerOptions, Scheduler};

const SAMPLERS: &[(Sampler, &str, &[&str])] = &[(Sampler::Euler, "Euler", &["k_euler"])];
const SCHEDULERS: &[(Scheduler, &str, &str)] = &[(Scheduler::Automatic, "automatic", "Automatic")];

/// Finds a sampler by label or alias in any letter case, with the scheduler its name may end in.
#[must_use]
pub fn find_sampler(name: &str) -> Option<(Sampler, Option<Scheduler>)> {
    let matches = |label: &str| label.eq_ignore_ascii_case(name);
    let row = SAMPLERS.iter().find(|(_, label, aliases)| matches(label) || aliases.iter().any(|alias| matches(alias)))?;
    Some((row.0, None))
}

/// Finds a scheduler by name, label or alias in any letter case.
#[must_use]
pub fn find_scheduler(name: &str) -> Option<Scheduler> {
    let row = SCHEDULERS.iter().find(|(_, short, label)| short.eq_ignore_ascii_case(name) || label.eq_ignore_ascii_case(name));
    row.map(|row| row.0)
}

/// A1111's label of a sampler.
#[must_use]
pub fn sampler_label(sampler: Sampler) -> &'static str {
    SAMPLERS.iter().find(|row| row.0 == sampler).map_or("", |row| row.1)
}

/// Labels of all samplers, in A1111's order.
#[must_use]
pub fn sampler_labels() -> Vec<&'static str> {
    SAMPLERS.iter().map(|row| row.1).collect()
}

/// Labels of all schedulers, in A1111's order.
#[must_use]
pub fn scheduler_labels() -> Vec<&'static str> {
    SCHEDULERS.iter().map(|row| row.2).collect()
}

/// `GET /sdapi/v1/samplers`.
#[must_use]
pub fn samplers_json() -> Value {
    SAMPLERS.iter().map(|(_, name, aliases)| json!({ "name": name, "aliases": aliases, "options": {} })).collect()
}

/// `GET /sdapi/v1/schedulers`.
#[must_use]
pub fn schedulers_json() -> Value {
    let row = |(_, name, label): &(Scheduler, &str, &str)| {
        json!({ "name": name, "label": label, "aliases": null, "default_rho": -1.0, "need_inner_model": false })
    };
    SCHEDULERS.iter().map(row).collect()
}

/// The option `randn_source`.
#[must_use]
pub fn find_noise_source(name: &str) -> Option<NoiseSource> {
    match name.to_ascii_lowercase().as_str() {
        "gpu" => Some(NoiseSource::Gpu),
        "cpu" => Some(NoiseSource::Cpu),
        "nv" => Some(NoiseSource::Nv),
        _ => None,
    }
}

/// The option `emphasis`.
#[must_use]
pub fn find_emphasis(name: &str) -> Option<Emphasis> {
    name.eq_ignore_ascii_case("original").then_some(Emphasis::Original)
}

/// The solver's numbers from request and options.
#[must_use]
pub fn sampler_options(_request: &Txt2Img, _options: &Options) -> SamplerOptions {
    SamplerOptions {}
}

/// `extra_generation_params` of the API.
#[must_use]
pub fn params_json(_params: &Params) -> Map<String, Value> {
    Map::new()
}

/// A picture file format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Lossless, infotext in a text chunk.
    Png,
    /// Lossy, infotext in EXIF.
    Jpeg,
    /// Lossless, infotext in EXIF.
    Webp,
}

impl Format {
    /// From a file extension or the option `samples_format`.
    #[must_use]
    pub fn find(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "png" => Some(Self::Png),
            "jpg" | "jpeg" => Some(Self::Jpeg),
            "webp" => Some(Self::Webp),
            _ => None,
        }
    }

    /// File extension.
    #[must_use]
    pub fn extension(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg => "jpg",
            Self::Webp => "webp",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.extension())
    }
}

/// Encodes a picture, with its infotext if there is one. `quality` is JPEG's, 1 to 100.
///
/// # Errors
/// The picture does not fit the format.
pub fn encode(image: &RgbImage, format: Format, quality: u8, infotext: Option<&str>) -> Result<Vec<u8>, String> {
    let (width, height) = image.dimensions();
    let mut bytes = Vec::new();
    match format {
        Format::Png => {
            let mut encoder = png::Encoder::new(&mut bytes, width, height);
            encoder.set_color(png::ColorType::Rgb);
            encoder.set_depth(png::BitDepth::Eight);
            if let Some(text) = infotext {
                let latin1 = text.chars().all(|c| u32::from(c) < 256);
                let added = if latin1 {
                    encoder.add_text_chunk("parameters".into(), text.into())
                } else {
                    encoder.add_itxt_chunk("parameters".into(), text.into())
                };
                added.map_err(|error| error.to_string())?;
            }
            let mut writer = encoder.write_header().map_err(|error| error.to_string())?;
            writer.write_image_data(image.as_raw()).map_err(|error| error.to_string())?;
            writer.finish().map_err(|error| error.to_string())?;
        }
        Format::Jpeg => image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, quality.clamp(1, 100))
            .write_image(image.as_raw(), width, height, image::ExtendedColorType::Rgb8)
            .map_err(|error| error.to_string())?,
        Format::Webp => image::codecs::webp::WebPEncoder::new_lossless(&mut bytes)
            .write_image(image.as_raw(), width, height, image::ExtendedColorType::Rgb8)
            .map_err(|error| error.to_string())?,
    }
    Ok(bytes)
}

/// Texts found in a picture file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PictureInfo {
    /// The infotext; empty if there is none.
    pub infotext: String,
    /// Other text entries.
    pub items: Map<String, Value>,
    /// The infotext, parsed, with A1111's defaults.
    pub parameters: Map<String, Value>,
}

/// Reads the texts of a picture file.
///
/// # Errors
/// The bytes are not a picture.
pub fn read_info(bytes: &[u8]) -> Result<PictureInfo, String> {
    image::guess_format(bytes).map_err(|error| error.to_string())?;
    let mut info = PictureInfo::default();
    if let Ok(reader) = png::Decoder::new(std::io::Cursor::new(bytes)).read_info() {
        let texts = &reader.info();
        let latin1 = texts.uncompressed_latin1_text.iter().map(|chunk| (chunk.keyword.clone(), chunk.text.clone()));
        let utf8 = texts.utf8_text.iter().filter_map(|chunk| Some((chunk.keyword.clone(), chunk.get_text().ok()?)));
        for (keyword, text) in latin1.chain(utf8) {
            if keyword == "parameters" {
                info.infotext = text;
            } else {
                info.items.insert(keyword, Value::String(text));
            }
        }
    }
    Ok(info)
}

/// The number of the next file in a directory: one above the highest leading number there.
#[must_use]
pub fn next_number(directory: &Path) -> u32 {
    let Ok(entries) = std::fs::read_dir(directory) else { return 0 };
    let leading = |name: String| name.split(['-', '.']).next().and_then(|digits| digits.parse::<u32>().ok());
    let highest = entries.flatten().filter_map(|entry| leading(entry.file_name().to_string_lossy().into_owned())).max();
    highest.map_or(0, |number| number.saturating_add(1))
}
