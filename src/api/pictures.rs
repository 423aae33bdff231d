//! Pictures that a job starts from: files to pixels within limits, and the fields of img2img to the pipeline's terms.
//!
//! Shared with the command line, which has the same fields. Nothing is decoded before its size is known to be allowed. Follows
//! `StableDiffusionProcessingImg2Img` of A1111 1.10.

use std::sync::Arc;

use image::{DynamicImage, GrayImage, Rgb, RgbImage};

use super::error::with_causes;
use super::options::Options;
use super::types::ImageFields;
use crate::config::Limits;
use crate::engine::limits::ImageNumbers;
use crate::imaging::inpaint::{
    InpaintArea, MaskEdge, MaskMode, MaskOptions, init_image_from, mask_from, prepare_mask,
};
use crate::imaging::{self, Filter, ResizeMode, resize};
use crate::pipeline::{ImageResize, InitImage, InpaintMask, MaskedContent, PictureUpscaler};
use crate::sampling::ExactSteps;

/// A1111's remark on a mask without a masked part.
pub const BLANK_MASK: &str =
    r#"Unable to perform "Inpaint Only mask" because mask is blank, switch to img2img mode."#;

/// Longest side of a picture that is sent, pixels.
const LONGEST_SIDE: u32 = 16_384;

/// Why a picture cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No picture, or a damaged one.
    #[error("{}", with_causes(.0))]
    Unreadable(imaging::Error),
    /// Too many pixels, alone or with those before it.
    #[error(
        "picture of {width}x{height} pixels is too large; a side may have {LONGEST_SIDE} pixels and all pictures of a request {megapixels} megapixels (setting `limits.max_megapixels`)"
    )]
    TooLarge {
        /// Pixels.
        width: u32,
        /// Pixels.
        height: u32,
        /// The setting.
        megapixels: usize,
    },
    /// A setting that is no colour.
    #[error("option `img2img_background_color` is no colour like `#ffffff`: `{0}`")]
    Color(String),
    /// Pictures and fields do not fit together.
    #[error("{0}")]
    Unfit(String),
}

/// The pictures of a request, decoded.
#[derive(Debug, Clone)]
pub struct Sources {
    /// Without transparency.
    pub pictures: Vec<RgbImage>,
    /// White = painted.
    pub mask: Option<GrayImage>,
}

/// Decodes the files of a request; how many pixels are left is known at each.
#[derive(Debug)]
pub struct Reader {
    left: u64,
    megapixels: usize,
    background: Rgb<u8>,
    edge: MaskEdge,
}

impl Reader {
    /// A reader of one request's files.
    ///
    /// # Errors
    /// [`Error::Color`].
    pub fn new(fields: &ImageFields, options: &Options, limits: &Limits) -> Result<Self, Error> {
        let color = options.text("img2img_background_color");
        Ok(Self {
            left: limits.max_megapixels as u64 * 1_000_000,
            megapixels: limits.max_megapixels,
            background: parse_color(color).ok_or_else(|| Error::Color(color.to_string()))?,
            edge: edge(fields),
        })
    }

    /// An init image; transparency shows the background colour.
    ///
    /// # Errors
    /// It cannot be decoded or is too large.
    pub fn picture(&mut self, file: &[u8]) -> Result<RgbImage, Error> {
        let picture = self.decode(file)?;
        Ok(self.flatten(picture))
    }

    /// An init image of a decoded picture.
    #[must_use]
    pub fn flatten(&self, picture: DynamicImage) -> RgbImage {
        init_image_from(picture, self.background)
    }

    /// A mask.
    ///
    /// # Errors
    /// It cannot be decoded or is too large.
    pub fn mask(&mut self, file: &[u8]) -> Result<GrayImage, Error> {
        Ok(mask_from(&self.decode(file)?, self.edge))
    }

    /// A picture as it is.
    ///
    /// # Errors
    /// It cannot be decoded or is too large.
    pub fn decode(&mut self, file: &[u8]) -> Result<DynamicImage, Error> {
        let limits = imaging::Limits {
            side: LONGEST_SIDE,
            pixels: self.left,
        };
        let picture = imaging::decode(file, limits).map_err(|error| match error {
            imaging::Error::TooLarge { width, height, .. } => Error::TooLarge {
                width,
                height,
                megapixels: self.megapixels,
            },
            other => Error::Unreadable(other),
        })?;
        self.left -= u64::from(picture.width()) * u64::from(picture.height());
        Ok(picture)
    }
}

/// The numbers to be checked.
#[must_use]
pub fn numbers(fields: &ImageFields, options: &Options, steps: i64) -> ImageNumbers {
    ImageNumbers {
        denoising_strength: fields.denoising_strength,
        exact_steps: options.flag("img2img_fix_steps").then_some(steps),
        resize_mode: fields.resize_mode,
        mask_blur: blur(fields),
        inpainting_fill: fields.inpainting_fill,
        padding: fields.inpaint_full_res_padding,
        noise_multiplier: noise_multiplier(fields, options),
    }
}

/// Where a job of `size` pixels in batches of `batch_size` starts, from fields whose numbers were checked; and a remark for the user.
///
/// # Errors
/// [`Error::Unfit`], and [`Error::Unreadable`] for masks of absurd shapes.
pub fn build(
    fields: &ImageFields,
    sources: Sources,
    (size, batch_size): ((u32, u32), usize),
    options: &Options,
    limits: &Limits,
) -> Result<(InitImage, Option<&'static str>), Error> {
    let (mask, remark) = match sources.mask {
        Some(mask) => inpaint_mask(fields, &sources.pictures, mask, size, options)?,
        None => (None, None),
    };
    let resize = match (ResizeMode::try_from(fields.resize_mode), &mask) {
        (Ok(mode), _) => ImageResize::Pixels(mode),
        (Err(_), Some(_)) => ImageResize::Pixels(ResizeMode::Stretch),
        (Err(_), None) => ImageResize::Latents,
    };
    check_areas(&sources.pictures, resize, mask.as_ref(), batch_size, limits)?;
    let init = InitImage {
        pictures: Arc::new(sources.pictures),
        resize,
        upscaler: PictureUpscaler::None,
        strength: fields.denoising_strength as f32,
        exact_steps: if options.flag("img2img_fix_steps") {
            ExactSteps::Yes
        } else {
            ExactSteps::No
        },
        noise_multiplier: noise_multiplier(fields, options) as f32,
        extra_noise: options.float("img2img_extra_noise").clamp(0.0, 100.0) as f32,
        color_correction: options.flag("img2img_color_correction"),
        color_source: None,
        mask,
    };
    Ok((init, remark))
}

type MaskAndRemark = (Option<InpaintMask>, Option<&'static str>);

fn inpaint_mask(
    fields: &ImageFields,
    pictures: &[RgbImage],
    mask: GrayImage,
    size: (u32, u32),
    options: &Options,
) -> Result<MaskAndRemark, Error> {
    let area = if fields.inpaint_full_res {
        InpaintArea::OnlyMasked {
            padding: fields.inpaint_full_res_padding as u32,
        }
    } else {
        InpaintArea::WholePicture
    };
    let mask = match area {
        InpaintArea::OnlyMasked { .. } => on_pictures(mask, pictures)?,
        InpaintArea::WholePicture => mask,
    };
    let (blur_x, blur_y) = blur(fields);
    let mask_options = MaskOptions {
        mode: if fields.inpainting_mask_invert == 0 {
            MaskMode::Masked
        } else {
            MaskMode::NotMasked
        },
        blur: (blur_x as u32, blur_y as u32),
        area,
        // A mask has no latents to stretch: mode 3 is mode 0 for it and its picture.
        resize_mode: ResizeMode::try_from(fields.resize_mode).unwrap_or_default(),
        size,
    };
    if prepare_mask(&mask, &mask_options)
        .map_err(Error::Unreadable)?
        .is_none()
    {
        return Ok((None, Some(BLANK_MASK)));
    }
    let mask = InpaintMask {
        mask,
        options: mask_options,
        content: match fields.inpainting_fill {
            0 => MaskedContent::Fill,
            2 => MaskedContent::LatentNoise,
            3 => MaskedContent::LatentNothing,
            _ => MaskedContent::Original,
        },
        edge: edge(fields),
        soft: None,
        overlay: options.flag("overlay_inpaint"),
        condition_weight: options.float("inpainting_mask_weight").clamp(0.0, 1.0) as f32,
    };
    Ok((Some(mask), None))
}

/// The mask at the pictures' size: a region of it is cut out of both.
fn on_pictures(mask: GrayImage, pictures: &[RgbImage]) -> Result<GrayImage, Error> {
    let sizes = || pictures.iter().map(RgbImage::dimensions);
    let Some((width, height)) = sizes().next() else {
        return Ok(mask);
    };
    if let Some(other) = sizes().find(|size| *size != (width, height)) {
        return Err(Error::Unfit(format!(
            "init images of {width}x{height} and {}x{} pixels cannot share a masked area; send one size or `inpaint_full_res: false`",
            other.0, other.1
        )));
    }
    if mask.dimensions() == (width, height) {
        return Ok(mask);
    }
    resize(&mask, width, height, Filter::Bicubic).map_err(Error::Unreadable)
}

/// Pictures that keep their own size must have one that a job may have.
fn check_areas(
    pictures: &[RgbImage],
    resize: ImageResize,
    mask: Option<&InpaintMask>,
    batch_size: usize,
    limits: &Limits,
) -> Result<(), Error> {
    let only_masked =
        mask.is_some_and(|mask| matches!(mask.options.area, InpaintArea::OnlyMasked { .. }));
    for (width, height) in pictures.iter().map(RgbImage::dimensions) {
        let shape = format!("init image of {width}x{height} pixels");
        let most = limits.max_side as u32;
        if resize == ImageResize::Latents && (width.min(height) < 8 || width.max(height) > most) {
            return Err(Error::Unfit(format!(
                "{shape}: with `resize_mode` 3 a side must be between 8 and {most} pixels (setting `limits.max_side`)"
            )));
        }
        let pixels = u64::from(width) * u64::from(height) * batch_size as u64;
        if only_masked && pixels > limits.max_megapixels as u64 * 1_000_000 {
            return Err(Error::Unfit(format!(
                "{shape}: {batch_size} pictures of its size have {:.1} megapixels, more than {} (setting `limits.max_megapixels`)",
                pixels as f64 / 1e6,
                limits.max_megapixels
            )));
        }
    }
    Ok(())
}

fn edge(fields: &ImageFields) -> MaskEdge {
    if fields.mask_round {
        MaskEdge::Hard
    } else {
        MaskEdge::Soft
    }
}

/// `mask_blur` stands for both axes; what is negative is none.
fn blur(fields: &ImageFields) -> (i64, i64) {
    let (x, y) = match fields.mask_blur {
        Some(both) => (both, both),
        None => (fields.mask_blur_x, fields.mask_blur_y),
    };
    (x.max(0), y.max(0))
}

fn noise_multiplier(fields: &ImageFields, options: &Options) -> f64 {
    fields
        .initial_noise_multiplier
        .unwrap_or_else(|| options.float("initial_noise_multiplier"))
}

/// `#rgb` or `#rrggbb`.
#[must_use]
pub fn parse_color(text: &str) -> Option<Rgb<u8>> {
    let digits = text.trim().strip_prefix('#')?;
    let number = u32::from_str_radix(digits, 16).ok()?;
    match digits.len() {
        3 => Some(Rgb([8, 4, 0].map(|shift| (number >> shift & 15) as u8 * 17))),
        6 => Some(Rgb([16, 8, 0].map(|shift| (number >> shift & 255) as u8))),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    fn fields(changes: &serde_json::Value) -> ImageFields {
        let body = changes.to_string();
        let model = crate::api::fields::read(body.as_bytes(), &crate::api::types::img2img());
        ImageFields::deserialize(&model.unwrap()).unwrap()
    }

    fn built(
        changes: &serde_json::Value,
        pictures: &[(u32, u32)],
        mask: Option<GrayImage>,
    ) -> Result<(InitImage, Option<&'static str>), String> {
        let pictures = pictures
            .iter()
            .map(|(width, height)| RgbImage::new(*width, *height))
            .collect();
        build(
            &fields(changes),
            Sources { pictures, mask },
            ((64, 64), 2),
            &Options::defaults(),
            &Limits::default(),
        )
        .map_err(|error| error.to_string())
    }

    #[test]
    fn colors_have_three_or_six_digits() {
        assert_eq!(parse_color(" #fff "), Some(Rgb([255; 3])));
        assert_eq!(parse_color("#102a0F"), Some(Rgb([16, 42, 15])));
        assert_eq!(parse_color("white"), None);
        assert_eq!(parse_color("#12345"), None);
    }

    #[test]
    fn a_mask_is_prepared_by_a1111s_defaults() {
        let mask = GrayImage::from_pixel(32, 32, image::Luma([255]));
        let (init, remark) = built(&json!({}), &[(48, 40)], Some(mask)).unwrap();
        let mask = init.mask.unwrap();
        assert_eq!((mask.mask.dimensions(), remark), ((48, 40), None));
        assert_eq!(mask.options.blur, (4, 4));
        assert_eq!(mask.options.area, InpaintArea::OnlyMasked { padding: 0 });
        assert_eq!((mask.content, mask.overlay), (MaskedContent::Fill, true));
        assert_eq!(
            (mask.edge, init.resize),
            (MaskEdge::Hard, ImageResize::Pixels(ResizeMode::Stretch))
        );
    }

    #[test]
    fn a_blank_mask_with_only_masked_is_plain_img2img() {
        let blank = || Some(GrayImage::new(8, 8));
        let (init, remark) = built(&json!({}), &[(8, 8)], blank()).unwrap();
        assert!(init.mask.is_none());
        assert_eq!(remark, Some(BLANK_MASK));
        let whole = json!({ "inpaint_full_res": 0 });
        assert!(built(&whole, &[(8, 8)], blank()).unwrap().0.mask.is_some());
    }

    #[test]
    fn pictures_that_keep_their_size_have_limits() {
        let latents = json!({ "resize_mode": 3 });
        assert_eq!(
            built(&latents, &[(8, 5000)], None).unwrap_err(),
            "init image of 8x5000 pixels: with `resize_mode` 3 a side must be between 8 and 4096 pixels (setting `limits.max_side`)"
        );
        let white = || Some(GrayImage::from_pixel(8, 8, image::Luma([255])));
        assert_eq!(
            built(&json!({}), &[(8, 8), (8, 9)], white()).unwrap_err(),
            "init images of 8x8 and 8x9 pixels cannot share a masked area; send one size or `inpaint_full_res: false`"
        );
        assert_eq!(
            built(&json!({ "mask_blur": 0 }), &[(8000, 5000)], white()).unwrap_err(),
            "init image of 8000x5000 pixels: 2 pictures of its size have 80.0 megapixels, more than 64 (setting `limits.max_megapixels`)"
        );
    }
}
