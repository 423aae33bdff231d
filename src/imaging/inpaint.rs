//! Masks and pictures of an inpainting job: which part is painted, what the model sees there, what is put back over it.
//!
//! In a mask 255 means painted. Follows A1111's `processing.StableDiffusionProcessingImg2Img.init` and `masking.py`.

use image::{DynamicImage, GrayImage, Luma, Rgb, RgbImage, Rgba, RgbaImage, imageops};

use super::Error;
use super::blur::{Direction, blur_mask, gaussian_blur};
use super::composite::{
    alpha_composite, flatten, invert, paste, paste_masked, premultiply, to_grey, to_rgb, to_rgba,
    unpremultiply,
};
use super::fit::{ResizeMode, fit};
use super::resize::{Filter, resize};

/// Alpha above which a mask with transparency counts as painted.
const ALPHA_THRESHOLD: u8 = 128;

/// A rectangle of pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Left edge.
    pub x: u32,
    /// Upper edge.
    pub y: u32,
    /// Width.
    pub width: u32,
    /// Height.
    pub height: u32,
}

impl Region {
    fn cut<P: image::Pixel<Subpixel = u8> + 'static>(
        self,
        picture: &super::resize::Picture<P>,
    ) -> super::resize::Picture<P> {
        imageops::crop_imm(picture, self.x, self.y, self.width, self.height).to_image()
    }
}

/// How the edge of a mask with transparency is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaskEdge {
    /// Painted or not, nothing between.
    Hard,
    /// As it is (soft inpainting).
    Soft,
}

/// The mask in a picture: its alpha channel if anything in it is transparent, else its grey value.
#[must_use]
pub fn mask_from(picture: &DynamicImage, edge: MaskEdge) -> GrayImage {
    match picture {
        DynamicImage::ImageRgba8(rgba) if rgba.pixels().any(|pixel| pixel[3] < 255) => {
            GrayImage::from_fn(rgba.width(), rgba.height(), |x, y| {
                let alpha = rgba.get_pixel(x, y)[3];
                Luma([match edge {
                    MaskEdge::Soft => alpha,
                    MaskEdge::Hard if alpha > ALPHA_THRESHOLD => 255,
                    MaskEdge::Hard => 0,
                }])
            })
        }
        DynamicImage::ImageLuma8(grey) => grey.clone(),
        DynamicImage::ImageRgba8(rgba) => to_grey(&to_rgb(rgba)),
        other => to_grey(&other.to_rgb8()),
    }
}

/// The colours of an init image: transparency shows `background` (`img2img_background_color`).
#[must_use]
pub fn init_image_from(picture: DynamicImage, background: Rgb<u8>) -> RgbImage {
    match picture {
        DynamicImage::ImageRgba8(rgba) => flatten(&rgba, background),
        other => other.into_rgb8(),
    }
}

/// Which part of the picture the job sees (`inpaint_full_res`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InpaintArea {
    /// All of it.
    WholePicture,
    /// The mask's surroundings, enlarged to the job's size.
    OnlyMasked {
        /// Pixels around the mask (`inpaint_full_res_padding`).
        padding: u32,
    },
}

/// Which side of the mask is painted (`inpainting_mask_invert`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MaskMode {
    /// Paint where the mask is white.
    #[default]
    Masked,
    /// Paint where it is black.
    NotMasked,
}

/// How a mask is prepared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaskOptions {
    /// Which side is painted.
    pub mode: MaskMode,
    /// Blur along the rows and along the columns, in pixels.
    pub blur: (u32, u32),
    /// Which part of the picture the job sees.
    pub area: InpaintArea,
    /// How shapes are brought together.
    pub resize_mode: ResizeMode,
    /// Size of the job.
    pub size: (u32, u32),
}

/// A mask ready for a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreparedMask {
    /// The mask at the job's size.
    pub mask: GrayImage,
    /// What the overlay leaves out: twice the mask, or with a region the whole blurred mask.
    pub overlay: GrayImage,
    /// The part of the source that the job sees, when it is not all of it.
    pub region: Option<Region>,
}

/// Prepares a mask; `None` if only the masked part was asked for and nothing is masked: then the job is plain img2img.
///
/// # Errors
/// [`Error::Empty`] for an empty mask or size.
pub fn prepare_mask(
    mask: &GrayImage,
    options: &MaskOptions,
) -> Result<Option<PreparedMask>, Error> {
    let mask = match options.mode {
        MaskMode::Masked => mask.clone(),
        MaskMode::NotMasked => invert(mask),
    };
    let blurred = blur_mask(&mask, options.blur.0, Direction::Across);
    let blurred = blur_mask(&blurred, options.blur.1, Direction::Down);
    match options.area {
        InpaintArea::WholePicture => {
            let mask = fit(&blurred, options.resize_mode, options.size)?;
            let mut overlay = mask.clone();
            overlay
                .iter_mut()
                .for_each(|value| *value = value.saturating_mul(2));
            Ok(Some(PreparedMask {
                mask,
                overlay,
                region: None,
            }))
        }
        InpaintArea::OnlyMasked { padding } => {
            let Some(masked) = masked_region(&blurred, padding) else {
                return Ok(None);
            };
            let region = expand_region(masked, options.size, blurred.dimensions());
            let mask = fit(&region.cut(&blurred), ResizeMode::Fill, options.size)?;
            Ok(Some(PreparedMask {
                mask,
                overlay: blurred,
                region: Some(region),
            }))
        }
    }
}

/// The smallest rectangle around all pixels that are not 0, with `padding` pixels around it as far as there are any.
#[must_use]
pub fn masked_region(mask: &GrayImage, padding: u32) -> Option<Region> {
    let (width, height) = mask.dimensions();
    let rows = || mask.rows().map(|mut row| row.any(|pixel| pixel[0] > 0));
    let (top, bottom) = (
        rows().position(|masked| masked)? as u32,
        rows().rposition(|masked| masked)? as u32,
    );
    let column = |x: u32| (top..=bottom).any(|y| mask.get_pixel(x, y)[0] > 0);
    let left = (0..width).find(|&x| column(x))?;
    let right = (left..width).rev().find(|&x| column(x))?;
    let (x, y) = (left.saturating_sub(padding), top.saturating_sub(padding));
    let end_x = right.saturating_add(1).saturating_add(padding).min(width);
    let end_y = bottom.saturating_add(1).saturating_add(padding).min(height);
    Some(Region {
        x,
        y,
        width: end_x - x,
        height: end_y - y,
    })
}

/// Widens a region until it has the shape of the job, as far as the picture reaches.
#[must_use]
pub fn expand_region(region: Region, size: (u32, u32), picture: (u32, u32)) -> Region {
    let ratio = f64::from(size.0) / f64::from(size.1);
    let (width, height) = (f64::from(region.width), f64::from(region.height));
    if width / height > ratio {
        let (y, height) = widen(
            region.y,
            region.height,
            (width / ratio - height) as i64,
            picture.1,
        );
        Region {
            y,
            height,
            ..region
        }
    } else {
        let (x, width) = widen(
            region.x,
            region.width,
            (height * ratio - width) as i64,
            picture.0,
        );
        Region { x, width, ..region }
    }
}

/// Adds `more` pixels around a stretch: half to each side, what has no room to the other side, what has no room there not at all.
fn widen(start: u32, length: u32, more: i64, limit: u32) -> (u32, u32) {
    let limit = i64::from(limit);
    let mut start = i64::from(start) - more / 2;
    let mut end = start + i64::from(length) + more;
    if end >= limit {
        start -= end - limit;
        end = limit;
    }
    if start < 0 {
        end -= start;
        start = 0;
    }
    (start as u32, (end.min(limit) - start) as u32)
}

/// A picture and its mask, ready for the job.
#[derive(Debug, Clone)]
pub struct PreparedImage {
    /// What the model sees, at the job's size (before any fill).
    pub image: RgbImage,
    /// What is put back over the result.
    pub overlay: RgbaImage,
}

/// Prepares an init image for a masked job. `scale` brings an RGB picture to a size: [`fit`] or an upscaler.
///
/// # Errors
/// Those of [`fit`].
pub fn prepare_image(
    source: &RgbImage,
    mask: &PreparedMask,
    options: &MaskOptions,
) -> Result<PreparedImage, Error> {
    let whole = match mask.region {
        None => fit(source, options.resize_mode, options.size)?,
        Some(_) => source.clone(),
    };
    let fitted_overlay;
    let overlay_mask = if mask.overlay.dimensions() == whole.dimensions() {
        &mask.overlay
    } else {
        fitted_overlay = fit(&mask.overlay, options.resize_mode, whole.dimensions())?;
        &fitted_overlay
    };
    let mut overlay = outside(&whole, overlay_mask);
    unpremultiply(&mut overlay, 4);
    let image = match mask.region {
        None => whole,
        Some(region) => fit(&region.cut(&whole), ResizeMode::Fill, options.size)?,
    };
    Ok(PreparedImage { image, overlay })
}

/// The picture where the mask is not, premultiplied.
pub(super) fn outside(picture: &RgbImage, mask: &GrayImage) -> RgbaImage {
    let mut opaque = to_rgba(picture);
    premultiply(&mut opaque, 4);
    let mut masked = RgbaImage::new(picture.width(), picture.height());
    paste_masked(&mut masked, &opaque, &invert(mask));
    masked
}

/// Fills the masked part with the colours around it, ever less blurred towards its edge (`inpainting_fill` 0, 2 and 3).
#[must_use]
pub fn fill_masked(picture: &RgbImage, mask: &GrayImage) -> RgbImage {
    const LAYERS: [(f32, usize); 6] = [
        (256.0, 1),
        (64.0, 1),
        (16.0, 2),
        (4.0, 4),
        (2.0, 2),
        (0.0, 1),
    ];
    let masked = outside(picture, mask);
    let mut filled = RgbaImage::from_pixel(picture.width(), picture.height(), Rgba([0; 4]));
    for (radius, repeats) in LAYERS {
        let mut blurred = gaussian_blur(&masked, radius);
        unpremultiply(&mut blurred, 4);
        for _ in 0..repeats {
            alpha_composite(&mut filled, &blurred);
        }
    }
    to_rgb(&filled)
}

/// Puts the unmasked part of the source back over a result.
///
/// # Errors
/// Those of [`fit`].
pub fn apply_overlay(
    result: &RgbImage,
    overlay: &RgbaImage,
    region: Option<Region>,
) -> Result<RgbImage, Error> {
    let mut canvas = match region {
        None => to_rgba(result),
        Some(region) => uncrop(result, overlay.dimensions(), region)?,
    };
    alpha_composite(&mut canvas, overlay);
    Ok(to_rgb(&canvas))
}

/// The result at its place on a transparent picture of the source's size.
fn uncrop(result: &RgbImage, size: (u32, u32), region: Region) -> Result<RgbaImage, Error> {
    let part = fit(result, ResizeMode::Crop, (region.width, region.height))?;
    let mut canvas = RgbaImage::new(size.0, size.1);
    paste(
        &mut canvas,
        &to_rgba(&part),
        region.x.into(),
        region.y.into(),
    );
    Ok(canvas)
}

/// The painted part of a result alone, transparent elsewhere (`return_mask_composite`).
///
/// # Errors
/// Those of [`fit`].
pub fn mask_composite(
    result: &RgbImage,
    overlay: &RgbaImage,
    mask: &PreparedMask,
) -> Result<RgbaImage, Error> {
    let mut painted = match mask.region {
        None => to_rgba(result),
        Some(region) => uncrop(result, overlay.dimensions(), region)?,
    };
    premultiply(&mut painted, 4);
    let (width, height) = painted.dimensions();
    let mut composite = RgbaImage::new(width, height);
    paste_masked(
        &mut composite,
        &painted,
        &fit(&mask.overlay, ResizeMode::Fill, (width, height))?,
    );
    unpremultiply(&mut composite, 4);
    Ok(composite)
}

/// The mask over latent pixels, `[height, width]` row by row, 1 where painted.
///
/// # Errors
/// Those of [`resize`].
pub fn latent_mask(
    mask: &GrayImage,
    (width, height): (u32, u32),
    edge: MaskEdge,
) -> Result<Vec<f32>, Error> {
    let small = resize(mask, width, height, Filter::Bicubic)?;
    let value = |&value: &u8| f32::from(value) / 255.0;
    Ok(match edge {
        MaskEdge::Soft => small.iter().map(value).collect(),
        MaskEdge::Hard => small.iter().map(value).map(f32::round_ties_even).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(x1: u32, y1: u32, x2: u32, y2: u32) -> Region {
        Region {
            x: x1,
            y: y1,
            width: x2 - x1,
            height: y2 - y1,
        }
    }

    #[test]
    fn regions_expand_as_in_a1111() {
        for (before, size, picture, after) in [
            (
                region(100, 100, 228, 132),
                (512, 512),
                (512, 512),
                region(100, 52, 228, 180),
            ),
            (
                region(0, 0, 100, 300),
                (1024, 1024),
                (1024, 1024),
                region(0, 0, 300, 300),
            ),
            (
                region(900, 10, 1000, 400),
                (1024, 1024),
                (1024, 768),
                region(634, 10, 1024, 400),
            ),
            (
                region(10, 700, 500, 760),
                (832, 1216),
                (1024, 768),
                region(10, 52, 500, 768),
            ),
            (
                region(0, 0, 1024, 100),
                (512, 1024),
                (1024, 768),
                region(0, 0, 1024, 768),
            ),
        ] {
            assert_eq!(expand_region(before, size, picture), after);
        }
    }

    #[test]
    fn the_region_is_the_masks_with_padding() {
        let mut mask = GrayImage::new(20, 10);
        assert_eq!(masked_region(&mask, 5), None);
        mask.put_pixel(3, 2, Luma([1]));
        mask.put_pixel(17, 8, Luma([255]));
        assert_eq!(masked_region(&mask, 0), Some(region(3, 2, 18, 9)));
        assert_eq!(masked_region(&mask, 4), Some(region(0, 0, 20, 10)));
    }

    #[test]
    fn a_blank_mask_has_no_masked_part() {
        let options = MaskOptions {
            mode: MaskMode::Masked,
            blur: (4, 4),
            area: InpaintArea::OnlyMasked { padding: 8 },
            resize_mode: ResizeMode::Stretch,
            size: (64, 64),
        };
        assert!(matches!(
            prepare_mask(&GrayImage::new(32, 32), &options),
            Ok(None)
        ));
        let inverted = MaskOptions {
            mode: MaskMode::NotMasked,
            ..options
        };
        assert!(matches!(
            prepare_mask(&GrayImage::new(32, 32), &inverted),
            Ok(Some(_))
        ));
    }
}
