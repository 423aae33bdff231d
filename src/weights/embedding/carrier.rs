//! A textual inversion in a picture, as A1111 shares them (`textual_inversion/image_embedding.py`): JSON as text of a PNG, or
//! zlib-packed in the low four bits of the pixels left and right of the picture, each behind a black column.
//!
//! A picture may be a mere preview of another file: then it carries nothing, which is no error.

use std::collections::BTreeMap;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::RgbImage;
use serde_json::{Map, Value};

use crate::weights::{Error, Source};

/// Keyword of the text chunk.
const KEYWORD: &str = "sd-ti-embedding";
/// Largest picture file, and most bytes of JSON, that are looked at.
const LIMIT: u64 = 64 << 20;
/// First byte of what zlib packs.
const ZLIB: u8 = 0x78;

/// What a picture carries.
#[derive(Debug)]
pub(super) struct Carried {
    path: PathBuf,
    /// The word, as it was trained.
    pub(super) name: Option<String>,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

/// Whether a file is a picture that may carry something.
pub(super) fn is_picture(path: &Path) -> bool {
    let ends = |extension: &std::ffi::OsStr| {
        ["png", "webp"]
            .iter()
            .any(|known| extension.eq_ignore_ascii_case(known))
    };
    path.extension().is_some_and(ends)
}

/// What the picture carries, if anything.
///
/// # Errors
/// [`Error::Open`], and [`Error::Embedding`] for what is damaged.
pub(super) fn read(path: &Path) -> Result<Option<Carried>, Error> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    if stem.to_lowercase().ends_with(".preview") {
        return Ok(None);
    }
    let refuse = |reason: &str| Error::Embedding {
        path: path.into(),
        reason: reason.into(),
    };
    let open = |source| Error::Open {
        path: path.into(),
        source,
    };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(open)?;
    file.take(LIMIT + 1).read_to_end(&mut bytes).map_err(open)?;
    if bytes.len() as u64 > LIMIT {
        return Err(refuse("the picture has more than 64 MiB"));
    }
    let json = match text(&bytes) {
        Some(text) => STANDARD
            .decode(text.trim())
            .map_err(|_| refuse("its text is not base64"))?,
        None => match packed(&bytes) {
            Some(packed) => unpack(&packed).ok_or_else(|| refuse("its pixels are damaged"))?,
            None => return Ok(None),
        },
    };
    let json: Map<String, Value> =
        serde_json::from_slice(&json).map_err(|_| refuse("what it carries is not JSON"))?;
    let params = match json.get("string_to_param") {
        Some(Value::Object(params)) => params,
        _ => &json,
    };
    let mut tensors = BTreeMap::new();
    for (key, value) in params {
        if let Some(rows) = value.get("TORCHTENSOR") {
            let tensor = tensor(rows).ok_or_else(|| refuse("a tensor in it is no table"))?;
            tensors.insert(key.clone(), tensor);
        }
    }
    let name = json.get("name").and_then(Value::as_str);
    Ok(Some(Carried {
        path: path.into(),
        name: name.filter(|name| !name.is_empty()).map(str::to_string),
        tensors,
    }))
}

/// The PNG's text of that keyword.
fn text(bytes: &[u8]) -> Option<String> {
    let reader = png::Decoder::new(Cursor::new(bytes)).read_info().ok()?;
    let texts = &reader.info().uncompressed_latin1_text;
    let found = texts.iter().find(|text| text.keyword == KEYWORD)?;
    Some(found.text.clone())
}

/// The packed bytes in the pixels, if the picture has black columns and what zlib writes beside them.
fn packed(bytes: &[u8]) -> Option<Vec<u8>> {
    let picture = image::load_from_memory(bytes).ok()?.into_rgb8();
    let (left, right) = borders(&picture)?;
    let bytes = |((low, high), random): ((u8, u8), u8)| (high ^ random) << 4 | (low ^ random);
    let packed: Vec<u8> = left
        .into_iter()
        .zip(right)
        .zip(random())
        .map(bytes)
        .collect();
    (packed.first() == Some(&ZLIB)).then_some(packed)
}

/// Low four bits of what lies left of the first and right of the last black column, row by row, black edges cut off.
fn borders(picture: &RgbImage) -> Option<(Vec<u8>, Vec<u8>)> {
    let (width, height) = picture.dimensions();
    let lit = |x: u32, y: u32| picture.get_pixel(x, y).0.iter().all(|value| *value > 0);
    let lit_column = |x: &u32| (0..height).any(|y| lit(*x, y));
    let lit_row = |y: &u32| (0..width).any(|x| lit(x, *y));
    let columns = (0..width).find(lit_column)?..(0..width).rfind(lit_column)? + 1;
    let rows = (0..height).find(lit_row)?..(0..height).rfind(lit_row)? + 1;
    let black = |x: &u32| {
        let mut values = rows.clone().flat_map(|y| picture.get_pixel(*x, y).0);
        values.all(|value| value.is_multiple_of(16))
    };
    let first = columns.clone().find(black)?;
    let last = columns.clone().rfind(black)?;
    if first == last || first - columns.start != columns.end - last - 1 {
        return None;
    }
    let part = |columns: std::ops::Range<u32>| -> Vec<u8> {
        let pixels = rows
            .clone()
            .flat_map(|y| columns.clone().map(move |x| (x, y)));
        pixels
            .flat_map(|(x, y)| picture.get_pixel(x, y).0.map(|value| value & 15))
            .collect()
    };
    Some((part(columns.start..first), part(last + 1..columns.end)))
}

/// The low bits of a linear congruential generator, which hides patterns.
fn random() -> impl Iterator<Item = u8> {
    let next = |seed: &u32| Some(seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    std::iter::successors(next(&0), next).map(|seed| (seed % 255) as u8 & 15)
}

/// What zlib packed; what follows it is padding.
fn unpack(packed: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut reader = flate2::read::ZlibDecoder::new(packed).take(LIMIT + 1);
    reader.read_to_end(&mut out).ok()?;
    (out.len() as u64 <= LIMIT).then_some(out)
}

/// Shape and values of nested lists.
fn tensor(value: &Value) -> Option<(Vec<usize>, Vec<f32>)> {
    let numbers = |row: &Value| -> Option<Vec<f32>> {
        let single = |value: &Value| Some(value.as_f64()? as f32);
        row.as_array()?.iter().map(single).collect()
    };
    let rows = value.as_array()?;
    if let Some(flat) = numbers(value) {
        return Some((vec![flat.len()], flat));
    }
    let table: Vec<Vec<f32>> = rows.iter().map(numbers).collect::<Option<_>>()?;
    let width = table.first()?.len();
    let even = table.iter().all(|row| row.len() == width);
    even.then(|| (vec![table.len(), width], table.concat()))
}

impl Source for Carried {
    fn path(&self) -> &Path {
        &self.path
    }

    fn keys(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn shape(&self, key: &str) -> Option<&[usize]> {
        self.tensors.get(key).map(|(shape, _)| shape.as_slice())
    }

    fn metadata(&self, _: &str) -> Option<&str> {
        None
    }

    fn read(&self, key: &str) -> Result<Vec<f32>, Error> {
        let (path, key) = (self.path.clone(), key.to_string());
        match self.tensors.get(&key) {
            Some((_, values)) if values.iter().all(|value| value.is_finite()) => Ok(values.clone()),
            Some(_) => Err(Error::NotFinite { path, key }),
            None => Err(Error::Missing { path, key }),
        }
    }
}
