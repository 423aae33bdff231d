//! The JPEG beside a saved picture that is too large for some sites (`export_for_4chan`).
//!
//! Follows `images.save_image` of A1111 1.10: made where the file has more than `img_downscale_threshold` MiB or the picture a
//! side of more than `target_side_length` pixels; only then it is also made smaller.

use image::RgbImage;

use super::error::with_causes;
use super::options::Options;
use crate::imaging::{self, EncodeOptions, Encoded, Filter, Format, resize};

/// The copy of a picture whose file has `bytes` bytes, if there is to be one. A copy that cannot be made is logged.
#[must_use]
pub fn of(picture: &RgbImage, bytes: usize, infotext: &str, options: &Options) -> Option<Encoded> {
    if !options.flag("export_for_4chan") {
        return None;
    }
    let longest = options.float("target_side_length").max(1.0);
    let smaller = target(picture.dimensions(), longest);
    let threshold = options.float("img_downscale_threshold") * 1024.0 * 1024.0;
    if smaller.is_none() && bytes as f64 <= threshold {
        return None;
    }
    let how = EncodeOptions {
        format: Format::Jpeg,
        jpeg_quality: options.int("jpeg_quality").clamp(1, 100) as u8,
        infotext: options.flag("enable_pnginfo").then_some(infotext),
        ..EncodeOptions::default()
    };
    let copy = match smaller {
        Some((width, height)) => resize(picture, width, height, Filter::Lanczos)
            .and_then(|smaller| imaging::encode(&smaller, &how)),
        None => imaging::encode(picture, &how),
    };
    copy.inspect_err(|error| tracing::warn!(error = with_causes(error), "no JPEG copy was made"))
        .ok()
}

/// The size with no side above `longest`; `None` if that is the case already.
fn target((width, height): (u32, u32), longest: f64) -> Option<(u32, u32)> {
    let (w, h) = (f64::from(width), f64::from(height));
    if w <= longest && h <= longest {
        return None;
    }
    let side = |length: f64| length.round_ties_even().max(1.0) as u32;
    Some(if w > h {
        (side(longest), side(h * longest / w))
    } else {
        (side(w * longest / h), side(longest))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_large_pictures_have_a_copy() {
        let (picture, options) = (RgbImage::new(8, 8), Options::defaults());
        assert!(of(&picture, 100, "", &options).is_none());
        let copy = of(&picture, 5 << 20, "a", &options).map(|copy| copy.format);
        assert_eq!(copy, Some(Format::Jpeg));
        let mut off = options;
        off.set("export_for_4chan", false.into());
        assert!(of(&picture, 5 << 20, "a", &off).is_none());
    }

    #[test]
    fn the_longer_side_is_brought_to_the_limit() {
        assert_eq!(target((4000, 4000), 4000.0), None);
        assert_eq!(target((4096, 2048), 4000.0), Some((4000, 2000)));
        assert_eq!(target((2048, 4096), 4000.0), Some((2000, 4000)));
        assert_eq!(target((5000, 5000), 4000.0), Some((4000, 4000)));
    }
}
