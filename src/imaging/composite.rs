//! Pixel arithmetic of 8-bit pictures, equal to Pillow's to the bit: alpha, masks, grey.

use image::{GrayImage, Luma, Pixel, Rgb, RgbImage, Rgba, RgbaImage};

use super::resize::Picture;

/// `value / 255`, rounded to nearest, for `value` up to 65535.
const fn div255(value: u32) -> u32 {
    let value = value + 128;
    ((value >> 8) + value) >> 8
}

/// `from` where `mask` is 0, `to` where it is 255.
fn mix(from: u8, to: u8, mask: u8) -> u8 {
    div255(u32::from(from) * (255 - u32::from(mask)) + u32::from(to) * u32::from(mask)) as u8
}

/// Multiplies the colours of `data` by the alpha in the last of their `channels`.
pub(super) fn premultiply(data: &mut [u8], channels: usize) {
    for pixel in data.chunks_exact_mut(channels) {
        let alpha = u32::from(pixel[channels - 1]);
        for value in &mut pixel[..channels - 1] {
            *value = div255(u32::from(*value) * alpha) as u8;
        }
    }
}

/// Undoes [`premultiply`] as far as 8 bits allow.
pub(super) fn unpremultiply(data: &mut [u8], channels: usize) {
    for pixel in data.chunks_exact_mut(channels) {
        let alpha = u32::from(pixel[channels - 1]);
        if !matches!(alpha, 0 | 255) {
            for value in &mut pixel[..channels - 1] {
                *value = (255 * u32::from(*value) / alpha).min(255) as u8;
            }
        }
    }
}

/// Pastes `source` on `target` with its corner at `(x, y)`; what lies outside is cut off.
pub fn paste<P: Pixel<Subpixel = u8>>(
    target: &mut Picture<P>,
    source: &Picture<P>,
    x: i64,
    y: i64,
) {
    image::imageops::replace(target, source, x, y);
}

/// Mixes `source` into `target`, every channel alike: where `mask` is 255 the source replaces the target.
///
/// All three have the same size; pixels beyond the smallest are left alone.
pub fn paste_masked<P: Pixel<Subpixel = u8>>(
    target: &mut Picture<P>,
    source: &Picture<P>,
    mask: &GrayImage,
) {
    for (x, y, pixel) in target.enumerate_pixels_mut() {
        if let (Some(source), Some(&Luma([mask]))) =
            (source.get_pixel_checked(x, y), mask.get_pixel_checked(x, y))
        {
            for (value, &source) in pixel.channels_mut().iter_mut().zip(source.channels()) {
                *value = mix(*value, source, mask);
            }
        }
    }
}

/// Lays `over` on `target`, both with straight alpha and of the same size.
pub fn alpha_composite(target: &mut RgbaImage, over: &RgbaImage) {
    for (below, above) in target.pixels_mut().zip(over.pixels()) {
        *below = composite_pixel(*below, *above);
    }
}

fn composite_pixel(Rgba(below): Rgba<u8>, Rgba(above): Rgba<u8>) -> Rgba<u8> {
    // Seven more bits than the result has keep the rounding of the two steps apart.
    const BITS: u32 = 7;
    const fn shift255(value: u32) -> u32 {
        ((value >> 8) + value) >> 8
    }
    let (above_alpha, below_alpha) = (u32::from(above[3]), u32::from(below[3]));
    if above_alpha == 0 {
        return Rgba(below);
    }
    let blend = below_alpha * (255 - above_alpha);
    let alpha = above_alpha * 255 + blend;
    let above_share = above_alpha * 255 * 255 * (1 << BITS) / alpha;
    let below_share = 255 * (1 << BITS) - above_share;
    let channel = |index: usize| {
        let sum = u32::from(above[index]) * above_share + u32::from(below[index]) * below_share;
        (shift255(sum + (0x80 << BITS)) >> BITS) as u8
    };
    Rgba([
        channel(0),
        channel(1),
        channel(2),
        shift255(alpha + 0x80) as u8,
    ])
}

/// Puts a picture with alpha on a plain background.
#[must_use]
pub fn flatten(picture: &RgbaImage, background: Rgb<u8>) -> RgbImage {
    let mut flat = RgbImage::from_pixel(picture.width(), picture.height(), background);
    for (below, above) in flat.pixels_mut().zip(picture.pixels()) {
        for channel in 0..3 {
            below.0[channel] = mix(below.0[channel], above.0[channel], above.0[3]);
        }
    }
    flat
}

/// Grey value by the luma weights of ITU-R 601.
#[must_use]
pub fn to_grey(picture: &RgbImage) -> GrayImage {
    let luma = |Rgb([r, g, b]): Rgb<u8>| {
        (u32::from(r) * 19595 + u32::from(g) * 38470 + u32::from(b) * 7471 + 0x8000) >> 16
    };
    GrayImage::from_fn(picture.width(), picture.height(), |x, y| {
        Luma([luma(*picture.get_pixel(x, y)) as u8])
    })
}

/// The opaque picture of the same colours.
#[must_use]
pub fn to_rgba(picture: &RgbImage) -> RgbaImage {
    RgbaImage::from_fn(picture.width(), picture.height(), |x, y| {
        let Rgb([r, g, b]) = *picture.get_pixel(x, y);
        Rgba([r, g, b, 255])
    })
}

/// The colours of a picture; alpha is dropped, not applied.
#[must_use]
pub fn to_rgb(picture: &RgbaImage) -> RgbImage {
    RgbImage::from_fn(picture.width(), picture.height(), |x, y| {
        let Rgba([r, g, b, _]) = *picture.get_pixel(x, y);
        Rgb([r, g, b])
    })
}

/// `first` at 0, `second` at 1; fractions are truncated, values outside 0 to 255 clipped. The pictures have the same size.
#[must_use]
pub fn blend<P: Pixel<Subpixel = u8>>(
    first: &Picture<P>,
    second: &Picture<P>,
    amount: f32,
) -> Picture<P> {
    let mut out = first.clone();
    for (value, &second) in out.iter_mut().zip(second.iter()) {
        let first = f32::from(*value);
        *value = (first + amount * (f32::from(second) - first)) as u8;
    }
    out
}

/// Every channel as 255 minus itself.
#[must_use]
pub fn invert(mask: &GrayImage) -> GrayImage {
    let mut out = mask.clone();
    out.iter_mut().for_each(|value| *value = 255 - *value);
    out
}
