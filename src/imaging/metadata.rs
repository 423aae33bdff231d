//! The texts inside a picture file: PNG text chunks and the EXIF comment, and which of them is the infotext.
//!
//! Reads without decoding pixels. Follows A1111's `read_info_from_image`: PNG `parameters`, overridden by an EXIF comment, and
//! `NovelAI`'s JSON translated.

use std::io::Cursor;

use image::ImageDecoder;
use serde_json::Value;

use super::{Error, Format, exif, infotext};

/// Most bytes of text chunks that are looked at, and most bytes that packed texts may grow to.
const TEXT_LIMIT: usize = 16 << 20;

/// What a picture file says beside its pixels.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Texts of a PNG, `(keyword, text)`, in order of the file within each kind of chunk.
    pub texts: Vec<(String, String)>,
    /// The infotext, from wherever the format keeps it.
    pub infotext: Option<String>,
}

impl Metadata {
    fn text(&self, keyword: &str) -> Option<&str> {
        self.texts
            .iter()
            .find(|(key, _)| key == keyword)
            .map(|(_, text)| text.as_str())
    }
}

/// Reads the texts of a PNG, JPEG or WebP file. Damaged texts are left out.
///
/// # Errors
/// [`Error::UnknownFormat`] for other bytes, [`Error::Decode`] for a header that cannot be read.
pub fn read_metadata(bytes: &[u8]) -> Result<Metadata, Error> {
    let format = Format::sniff(bytes).ok_or(Error::UnknownFormat)?;
    let mut metadata = Metadata::default();
    if format == Format::Png {
        metadata.texts = png_texts(bytes);
    }
    let mut decoder = super::decode::decoder(bytes)?;
    let comment = decoder
        .exif_metadata()
        .map_err(Error::Decode)?
        .and_then(|block| exif::read_user_comment(&block));
    let own = metadata
        .text(infotext::PNG_KEYWORD)
        .or_else(|| metadata.text("extras"))
        .map(str::to_string);
    metadata.infotext = comment
        .filter(|text| !text.is_empty())
        .or_else(|| novel_ai(&metadata))
        .or(own);
    Ok(metadata)
}

/// The text chunks of a PNG, also those behind the pixels.
///
/// They are gathered into a PNG of one pixel, so that the decoder reads them without inflating the picture.
fn png_texts(bytes: &[u8]) -> Vec<(String, String)> {
    const SIGNATURE: usize = 8;
    const HEADER: [u8; 25] = *b"\0\0\0\x0dIHDR\0\0\0\x01\0\0\0\x01\x08\0\0\0\0\x3a\x7e\x9b\x55";
    const REST: [u8; 34] = *b"\0\0\0\x0aIDAT\x78\x9c\x63\x60\0\0\0\x02\0\x01\x48\xaf\xa4\x71\0\0\0\0IEND\xae\x42\x60\x82";
    let Some(signature) = bytes.get(..SIGNATURE) else {
        return Vec::new();
    };
    let mut gathered = [signature, &HEADER].concat();
    let mut rest = &bytes[SIGNATURE..];
    while let Some((length, _)) = rest.split_first_chunk() {
        let Some((chunk, after)) =
            rest.split_at_checked((u32::from_be_bytes(*length) as usize).saturating_add(12))
        else {
            break;
        };
        if matches!(&chunk[4..8], b"tEXt" | b"zTXt" | b"iTXt")
            && gathered.len() + chunk.len() <= TEXT_LIMIT
        {
            gathered.extend(chunk);
        }
        rest = after;
    }
    gathered.extend(REST);
    let Ok(reader) = png::Decoder::new(Cursor::new(gathered)).read_info() else {
        return Vec::new();
    };
    let info = reader.info();
    let latin = info
        .uncompressed_latin1_text
        .iter()
        .map(|chunk| (chunk.keyword.clone(), chunk.text.clone()));
    let mut texts: Vec<_> = latin.collect();
    let mut left = TEXT_LIMIT;
    for chunk in &info.compressed_latin1_text {
        let mut chunk = chunk.clone();
        if let Ok(text) = chunk
            .decompress_text_with_limit(left)
            .and_then(|()| chunk.get_text())
        {
            left -= text.len().min(left);
            texts.push((chunk.keyword, text));
        }
    }
    for chunk in &info.utf8_text {
        let mut chunk = chunk.clone();
        if let Ok(text) = chunk
            .decompress_text_with_limit(left)
            .and_then(|()| chunk.get_text())
        {
            left -= text.len().min(left);
            texts.push((chunk.keyword, text));
        }
    }
    texts
}

/// The infotext of a picture by `NovelAI`, which stores its settings as JSON.
fn novel_ai(metadata: &Metadata) -> Option<String> {
    if metadata.text("Software") != Some("NovelAI") {
        return None;
    }
    let settings: Value = serde_json::from_str(metadata.text("Comment")?).ok()?;
    let number = |key: &str| {
        settings
            .get(key)
            .filter(|value| value.is_number())
            .map(ToString::to_string)
    };
    let sampler = match settings["sampler"].as_str().unwrap_or_default() {
        "k_euler" => "Euler",
        "k_lms" => "LMS",
        "k_heun" => "Heun",
        "k_dpm_2" => "DPM2",
        "k_dpm_2_ancestral" => "DPM2 a",
        "k_dpmpp_2m" => "DPM++ 2M",
        "k_dpmpp_sde" => "DPM++ SDE",
        "k_dpmpp_2s_ancestral" => "DPM++ 2S a",
        "ddim" => "DDIM",
        "plms" => "PLMS",
        _ => "Euler a",
    };
    Some(format!(
        "{}\nNegative prompt: {}\nSteps: {}, Sampler: {sampler}, CFG scale: {}, Seed: {}, Size: {}x{}, Clip skip: 2, ENSD: 31337",
        metadata.text("Description")?,
        settings["uc"].as_str()?,
        number("steps")?,
        number("scale")?,
        number("seed")?,
        number("width")?,
        number("height")?,
    ))
}
