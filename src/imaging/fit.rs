//! Bringing a picture to the size of the job: stretch, crop or fill.
//!
//! Follows A1111's `images.resize_image`, its integer arithmetic and what Pillow makes of its empty boxes included.

use std::str::FromStr;

use image::{ImageBuffer, Pixel, RgbImage};

use super::Error;
use super::composite::paste;
use super::resize::{Filter, Picture, Span, resize, resize_spans};

/// What happens when the shapes differ (`resize_mode` 0 to 2; 3 resizes latents and leaves pictures alone).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ResizeMode {
    /// Stretch.
    #[default]
    Stretch,
    /// Fill the size and cut off what stands out.
    Crop,
    /// Fit into the size and continue the edges.
    Fill,
}

/// A1111's number of the mode.
impl TryFrom<i64> for ResizeMode {
    type Error = Error;

    fn try_from(number: i64) -> Result<Self, Error> {
        match number {
            0 => Ok(Self::Stretch),
            1 => Ok(Self::Crop),
            2 => Ok(Self::Fill),
            _ => Err(Error::UnknownResizeMode(number.to_string())),
        }
    }
}

/// A1111's number or label.
impl FromStr for ResizeMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text.trim().to_ascii_lowercase().as_str() {
            "0" | "just resize" => Ok(Self::Stretch),
            "1" | "crop and resize" => Ok(Self::Crop),
            "2" | "resize and fill" => Ok(Self::Fill),
            _ => Err(Error::UnknownResizeMode(text.to_string())),
        }
    }
}

/// Where a scaled picture lies on the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// Size of the scaled picture.
    pub size: (u32, u32),
    /// Its corner on the target; negative where it is cut off.
    pub offset: (i64, i64),
}

/// Size and place of a `source`-sized picture on a `target`-sized one.
#[must_use]
pub fn placement(mode: ResizeMode, source: (u32, u32), target: (u32, u32)) -> Placement {
    let ((w, h), (width, height)) = (source, target);
    // Each side as A1111 scales it by the other: whole pixels, rounded down.
    let by_height = || scaled(w, height, h);
    let by_width = || scaled(h, width, w);
    let ratio = f64::from(width) / f64::from(height);
    let source_ratio = f64::from(w) / f64::from(h);
    let size = match mode {
        ResizeMode::Stretch => target,
        ResizeMode::Crop if ratio > source_ratio => (width, by_width()),
        ResizeMode::Crop => (by_height(), height),
        ResizeMode::Fill => (
            if ratio < source_ratio {
                width
            } else {
                by_height()
            },
            if ratio >= source_ratio {
                height
            } else {
                by_width()
            },
        ),
    };
    let offset = |whole: u32, part: u32| i64::from(whole / 2) - i64::from(part / 2);
    Placement {
        size,
        offset: (offset(width, size.0), offset(height, size.1)),
    }
}

fn scaled(side: u32, numerator: u32, denominator: u32) -> u32 {
    let exact = u64::from(side) * u64::from(numerator) / u64::from(denominator.max(1));
    u32::try_from(exact).unwrap_or(u32::MAX)
}

/// Brings a picture to `target`, scaling by Lanczos.
///
/// # Errors
/// [`Error::Empty`] if a side of the scaled picture is empty, [`Error::TooLarge`] for shapes too far apart.
pub fn fit<P>(
    picture: &Picture<P>,
    mode: ResizeMode,
    target: (u32, u32),
) -> Result<Picture<P>, Error>
where
    P: Pixel<Subpixel = u8>,
{
    fit_with(picture, mode, target, |picture, width, height| {
        resize(picture, width, height, Filter::Lanczos)
    })
}

/// Brings a picture to `target`, scaling by a function of the caller's: an upscaler.
///
/// # Errors
/// The scaler's, and those of [`fit`].
pub fn fit_with<P, E>(
    picture: &Picture<P>,
    mode: ResizeMode,
    target: (u32, u32),
    scale: impl FnOnce(&Picture<P>, u32, u32) -> Result<Picture<P>, E>,
) -> Result<Picture<P>, E>
where
    P: Pixel<Subpixel = u8>,
    E: From<Error>,
{
    let place = placement(mode, picture.dimensions(), target);
    let resized = scale(picture, place.size.0, place.size.1)?;
    if mode == ResizeMode::Stretch {
        return Ok(resized);
    }
    let mut fitted = ImageBuffer::new(target.0, target.1);
    paste(&mut fitted, &resized, place.offset.0, place.offset.1);
    if mode == ResizeMode::Fill {
        continue_edges(&mut fitted, &resized, place)?;
    }
    Ok(fitted)
}

/// Scales by an upscaler where the picture must grow, and by Lanczos the rest of the way (A1111's `resize` with a named
/// upscaler). `upscale` gets the factor.
///
/// # Errors
/// The upscaler's, and those of [`resize`].
pub fn upscale_to<E: From<Error>>(
    picture: &RgbImage,
    (width, height): (u32, u32),
    upscale: impl FnOnce(&RgbImage, f64) -> Result<RgbImage, E>,
) -> Result<RgbImage, E> {
    let factor = (f64::from(width) / f64::from(picture.width()))
        .max(f64::from(height) / f64::from(picture.height()));
    let larger;
    let picture = if factor > 1.0 {
        larger = upscale(picture, factor)?;
        &larger
    } else {
        picture
    };
    Ok(resize(picture, width, height, Filter::Lanczos)?)
}

/// Fills the bands beside a picture that is narrower or lower than the target.
///
/// A1111 stretches an empty box at each edge. The bicubic filter then takes the last two lines, 1.125 and -0.125 of them. A line that
/// integer division leaves over at the far side stays black.
fn continue_edges<P: Pixel<Subpixel = u8>>(
    fitted: &mut Picture<P>,
    resized: &Picture<P>,
    place: Placement,
) -> Result<(), Error> {
    let point = |at: u32| Span {
        start: f64::from(at),
        end: f64::from(at),
    };
    let whole = |length: u32| Span {
        start: 0.0,
        end: f64::from(length),
    };
    let (width, height) = resized.dimensions();
    if let (0, band @ 1..) = (place.offset.0, place.offset.1 as u32) {
        let strip = |edge| {
            resize_spans(
                resized,
                (width, whole(width)),
                (band, point(edge)),
                Filter::Bicubic,
            )
        };
        paste(fitted, &strip(0)?, 0, 0);
        paste(fitted, &strip(height)?, 0, i64::from(band + height));
    } else if let (band @ 1.., 0) = (place.offset.0 as u32, place.offset.1) {
        let strip = |edge| {
            resize_spans(
                resized,
                (band, point(edge)),
                (height, whole(height)),
                Filter::Bicubic,
            )
        };
        paste(fitted, &strip(0)?, 0, 0);
        paste(fitted, &strip(width)?, i64::from(band + width), 0);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placements_are_a1111s() {
        for (source, target, mode, size, offset) in [
            (
                (800, 600),
                (1024, 1024),
                ResizeMode::Crop,
                (1365, 1024),
                (-170, 0),
            ),
            (
                (800, 600),
                (1024, 1024),
                ResizeMode::Fill,
                (1024, 768),
                (0, 128),
            ),
            (
                (600, 801),
                (1024, 768),
                ResizeMode::Crop,
                (1024, 1367),
                (0, -299),
            ),
            (
                (600, 801),
                (1024, 768),
                ResizeMode::Fill,
                (575, 768),
                (225, 0),
            ),
            (
                (600, 801),
                (1024, 768),
                ResizeMode::Stretch,
                (1024, 768),
                (0, 0),
            ),
        ] {
            assert_eq!(
                placement(mode, source, target),
                Placement { size, offset },
                "{mode:?} {source:?}"
            );
        }
    }

    #[test]
    fn shapes_too_far_apart_are_errors() {
        let thread = RgbImage::new(1, 20_000);
        assert!(matches!(
            fit(&thread, ResizeMode::Crop, (1024, 1024)),
            Err(Error::TooLarge { .. })
        ));
        assert!(matches!(
            fit(&thread, ResizeMode::Fill, (64, 64)),
            Err(Error::Empty { .. })
        ));
    }

    #[test]
    fn an_upscaler_is_asked_only_to_enlarge() {
        let picture = RgbImage::new(10, 20);
        let same = |picture: &RgbImage, factor: f64| {
            assert!((factor - 1.5).abs() < 1e-12, "{factor}");
            Ok::<_, Error>(picture.clone())
        };
        assert_eq!(
            upscale_to(&picture, (15, 25), same)
                .map(|picture| picture.dimensions())
                .ok(),
            Some((15, 25))
        );
        let never = |_: &RgbImage, _| Err(Error::UnknownFormat);
        assert_eq!(
            upscale_to(&picture, (10, 5), never)
                .map(|picture| picture.dimensions())
                .ok(),
            Some((10, 5))
        );
    }
}
