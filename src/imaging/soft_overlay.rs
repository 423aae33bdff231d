//! What soft inpainting puts back over a result: the original, more of it the less the result differs from it.
//!
//! Follows `apply_adaptive_masks` of A1111's `soft_inpainting.py` (pipeline specification, 7.6). The opacity comes at the size of
//! the latents and is smoothed on its way to the size of the picture.

use image::{GrayImage, RgbImage, RgbaImage};

use super::Error;
use super::blur::gaussian_blur;
use super::composite::{paste, unpremultiply};
use super::fit::{ResizeMode, fit};
use super::inpaint::{Region, outside};

/// Pixels by which the enlarged opacity is smoothed.
const BLUR: f32 = 4.0;

/// The picture to put back over a result of `size` pixels, which is `region` of `original` or all of it. `painted`, at the size
/// of the latents, is 255 where the result is to be seen.
///
/// # Errors
/// Those of [`fit`].
pub fn soft_overlay(
    original: &RgbImage,
    painted: &GrayImage,
    size: (u32, u32),
    region: Option<Region>,
) -> Result<RgbaImage, Error> {
    let painted = gaussian_blur(&fit(painted, ResizeMode::Fill, size)?, BLUR);
    let painted = match region {
        None => painted,
        Some(region) => {
            let part = fit(&painted, ResizeMode::Crop, (region.width, region.height))?;
            let mut whole = GrayImage::new(original.width(), original.height());
            paste(&mut whole, &part, region.x.into(), region.y.into());
            whole
        }
    };
    let mut overlay = outside(original, &painted);
    unpremultiply(&mut overlay, 4);
    Ok(overlay)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use image::{Luma, Rgb, Rgba};

    #[test]
    fn the_original_covers_what_was_not_painted() {
        let original = RgbImage::from_pixel(64, 32, Rgb([10, 200, 30]));
        let painted = GrayImage::from_fn(8, 4, |x, _| Luma([if x < 4 { 255 } else { 0 }]));
        let overlay = soft_overlay(&original, &painted, (64, 32), None).unwrap();
        assert_eq!(overlay.get_pixel(2, 16), &Rgba([0, 0, 0, 0]));
        assert_eq!(overlay.get_pixel(61, 16), &Rgba([10, 200, 30, 255]));
        let between = overlay.get_pixel(32, 16)[3];
        assert!((100..156).contains(&between), "{between}");
    }

    #[test]
    fn around_a_region_the_original_stays() {
        let original = RgbImage::from_pixel(100, 60, Rgb([50; 3]));
        let painted = GrayImage::from_pixel(8, 8, Luma([255]));
        let region = Region {
            x: 20,
            y: 10,
            width: 32,
            height: 32,
        };
        let overlay = soft_overlay(&original, &painted, (64, 64), Some(region)).unwrap();
        let alpha = |x, y| overlay.get_pixel(x, y)[3];
        assert_eq!(
            (alpha(36, 26), alpha(19, 26), alpha(52, 26), alpha(36, 9)),
            (0, 255, 255, 255)
        );
    }
}
