//! Bytes or base64 text to pixels, within limits that are checked before anything is allocated.
//!
//! EXIF orientation is applied; deeper samples become 8 bits, palettes colours. What Pillow opens as greyscale stays greyscale and what
//! has an alpha channel keeps it, because masks depend on it.

use std::io::Cursor;

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use image::{ColorType, DynamicImage, ImageDecoder, ImageReader};

use super::{Error, Format};

/// How large a picture may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest side in pixels.
    pub side: u32,
    /// Most pixels.
    pub pixels: u64,
}

/// 16384 pixels a side and 128 million pixels: larger than any picture the models make, small enough to decode.
impl Default for Limits {
    fn default() -> Self {
        Self {
            side: 16384,
            pixels: 128 << 20,
        }
    }
}

impl Limits {
    fn check(self, width: u32, height: u32) -> Result<(), Error> {
        let limit = if width.max(height) > self.side {
            format!("{} pixels a side", self.side)
        } else if u64::from(width) * u64::from(height) > self.pixels {
            format!("{} pixels", self.pixels)
        } else {
            return Ok(());
        };
        Err(Error::TooLarge {
            width,
            height,
            limit,
        })
    }
}

/// Decodes a PNG, JPEG or WebP file to 8-bit grey, RGB or RGBA, turned upright.
///
/// # Errors
/// [`Error::UnknownFormat`], [`Error::TooLarge`] before decoding, [`Error::Decode`] for damage.
pub fn decode(bytes: &[u8], limits: Limits) -> Result<DynamicImage, Error> {
    let mut decoder = decoder(bytes)?;
    let (width, height) = decoder.dimensions();
    limits.check(width, height)?;
    let orientation = decoder.orientation().map_err(Error::Decode)?;
    let picture = DynamicImage::from_decoder(decoder).map_err(Error::Decode)?;
    let mut picture = match picture.color() {
        ColorType::L8 | ColorType::Rgb8 | ColorType::Rgba8 => picture,
        ColorType::L16 => picture.into_luma8().into(),
        color if color.has_alpha() => picture.into_rgba8().into(),
        _ => picture.into_rgb8().into(),
    };
    picture.apply_orientation(orientation);
    Ok(picture)
}

/// A decoder that has read the header.
pub(super) fn decoder(bytes: &[u8]) -> Result<impl ImageDecoder + '_, Error> {
    let format = match Format::sniff(bytes).ok_or(Error::UnknownFormat)? {
        Format::Png => image::ImageFormat::Png,
        Format::Jpeg => image::ImageFormat::Jpeg,
        Format::WebP => image::ImageFormat::WebP,
    };
    ImageReader::with_format(Cursor::new(bytes), format)
        .into_decoder()
        .map_err(Error::Decode)
}

/// Decodes the base64 text of a picture: bare, or a `data:image/…;base64,` URL. Padding and white space do not matter.
///
/// # Errors
/// [`Error::Base64`].
pub fn decode_base64(text: &str) -> Result<Vec<u8>, Error> {
    const ENGINE: GeneralPurpose = GeneralPurpose::new(
        &alphabet::STANDARD,
        GeneralPurposeConfig::new()
            .with_decode_padding_mode(DecodePaddingMode::Indifferent)
            .with_decode_allow_trailing_bits(true),
    );
    let problem = |problem| Error::Base64 {
        problem,
        source: None,
    };
    let text = text.trim();
    let body = match text.strip_prefix("data:") {
        Some(url) => {
            let (media, body) = url
                .split_once(',')
                .ok_or_else(|| problem("a data URL without a comma"))?;
            if !media.starts_with("image/") || !media.ends_with(";base64") {
                return Err(problem("a data URL that is no `image/…;base64`"));
            }
            body
        }
        None => text,
    };
    if body.is_empty() {
        return Err(problem("it is empty"));
    }
    let compact: String;
    let body = if body.contains(|c: char| c.is_ascii_whitespace()) {
        compact = body.split_ascii_whitespace().collect();
        compact.as_str()
    } else {
        body
    };
    ENGINE.decode(body).map_err(|source| Error::Base64 {
        problem: "a character or length that base64 does not have",
        source: Some(source),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn base64_comes_bare_or_as_a_url() {
        for text in [
            "iVBORw0K",
            " aVZCT1J3MEs=\n",
            "aVZCT1J3MEs",
            "data:image/png;base64,aVZCT1J3MEs=",
            "aVZC\r\nT1J3\nMEs=",
        ] {
            assert!(decode_base64(text).is_ok(), "{text}");
        }
        assert_eq!(
            decode_base64("data:image/png;base64,aVZCT1J3MEs=").unwrap(),
            b"iVBORw0K"
        );
        for text in [
            "",
            "data:image/png;base64",
            "data:image/png,abc",
            "data:text/plain;base64,YQ==",
            "data:image/png;base64,",
            "####",
            "a",
        ] {
            assert!(
                matches!(decode_base64(text), Err(Error::Base64 { .. })),
                "{text}"
            );
        }
    }
}
