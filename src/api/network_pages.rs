//! `/sd_extra_networks/*`: preview pictures and metadata of model files, as A1111's page shows them.
//!
//! Invariant: a file is sent only if it is a picture and lies, links followed, in a folder that models are looked for in.
//! Whatever is not sent is "not found", so that nothing is learnt about other files. Follows `ui_extra_networks.py` of A1111 1.10.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use super::error::{ApiError, Problem};
use super::extras::html;
use super::{App, blocking};
use crate::engine::networks::LoraEntry;
use crate::imaging::Format;

/// Endings of preview pictures, with their types.
const PICTURES: [(&str, &str); 5] = [
    ("png", "image/png"),
    ("jpg", "image/jpeg"),
    ("jpeg", "image/jpeg"),
    ("webp", "image/webp"),
    ("gif", "image/gif"),
];

/// Largest picture that is sent, bytes.
const MOST_BYTES: u64 = 64 << 20;

/// `GET /sd_extra_networks/thumb?filename=`.
///
/// # Errors
/// 404 for anything but a picture in a folder of models.
pub async fn thumb(
    State(app): State<Arc<App>>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let name = value(query.as_deref(), "filename").unwrap_or_default();
    blocking(move || {
        let config = &app.config;
        let mut folders = config.checkpoint_dirs();
        folders.extend(config.lora_dirs());
        folders.extend(config.vae_dirs());
        folders.extend(config.upscaler_dirs());
        folders.push(config.embeddings_dir());
        picture(Path::new(&name), &folders)
    })
    .await
}

/// A picture file that lies in one of the folders.
///
/// # Errors
/// 404 for any other.
pub fn picture(path: &Path, folders: &[PathBuf]) -> Result<Response, ApiError> {
    let ending = path.extension().and_then(|ending| ending.to_str());
    let ending = ending.map(str::to_ascii_lowercase).unwrap_or_default();
    let kind = PICTURES.iter().find(|(known, _)| *known == ending);
    let Some((_, mime)) = kind.filter(|_| path.is_absolute()) else {
        return Err(not_found());
    };
    let file = path.canonicalize().map_err(|_| not_found())?;
    let is_inside = folders
        .iter()
        .filter_map(|folder| folder.canonicalize().ok())
        .any(|folder| file.starts_with(folder));
    let is_sent = |meta: std::fs::Metadata| meta.is_file() && meta.len() <= MOST_BYTES;
    if !is_inside || !std::fs::metadata(&file).is_ok_and(is_sent) {
        return Err(not_found());
    }
    let bytes = std::fs::read(&file).map_err(|_| not_found())?;
    Ok(([(header::CONTENT_TYPE, *mime)], bytes).into_response())
}

/// `GET /sd_extra_networks/metadata?page=&item=`: `{}` for what has none.
pub async fn metadata(State(app): State<Arc<App>>, RawQuery(query): RawQuery) -> Json<Value> {
    let Some(lora) = lora(&app, query.as_deref(), "item") else {
        return Json(json!({}));
    };
    let texts = lora.metadata.iter();
    let shown: Map<String, Value> = texts
        .filter(|(key, _)| *key != "ssmd_cover_images")
        .map(|(key, text)| (key.clone(), json!(text)))
        .collect();
    if shown.is_empty() {
        return Json(json!({}));
    }
    let text = serde_json::to_string_pretty(&shown).unwrap_or_default();
    Json(json!({ "metadata": text }))
}

/// `GET /sd_extra_networks/cover-images?page=&item=&index=`: a picture that a LoRA carries in its metadata.
///
/// # Errors
/// 404 if there is none, 422 for an index that is no number.
pub async fn cover_images(
    State(app): State<Arc<App>>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let query = query.as_deref();
    let index = value(query, "index").unwrap_or_else(|| "0".into());
    let index: usize = index.parse().map_err(|_| {
        let mut problem = Problem::field(
            "index",
            "value is not a valid integer",
            "type_error.integer",
        );
        problem.loc = vec![json!("query"), json!("index")];
        vec![problem]
    })?;
    let lora = lora(&app, query, "item").ok_or_else(not_found)?;
    let list = lora
        .metadata
        .get("ssmd_cover_images")
        .ok_or_else(not_found)?;
    let list: Vec<Value> = serde_json::from_str(list).map_err(|_| not_found())?;
    let cover = list.get(index).and_then(Value::as_str);
    let bytes = cover.and_then(|text| STANDARD.decode(text).ok());
    let bytes = bytes.ok_or_else(not_found)?;
    let mime = Format::sniff(&bytes).ok_or_else(not_found)?.mime();
    Ok(([(header::CONTENT_TYPE, mime)], bytes).into_response())
}

/// `GET /sd_extra_networks/get-single-card?page=&tabname=&name=`: a small card.
///
/// # Errors
/// 404 for an unknown page or name.
pub async fn single_card(
    State(app): State<Arc<App>>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, ApiError> {
    let lora = lora(&app, query.as_deref(), "name").ok_or_else(not_found)?;
    let name = html(&lora.name);
    let card = format!(
        "<div class=\"card\" data-name=\"{name}\"><div class=\"actions\"><span class=\"name\">{name}</span></div></div>"
    );
    Ok(Json(json!({ "html": card })))
}

/// The LoRA that a query names; other pages have no metadata.
fn lora(app: &App, query: Option<&str>, field: &str) -> Option<LoraEntry> {
    let page = value(query, "page")?;
    let name = value(query, field)?;
    let loras = app.engine.catalog().networks().loras();
    loras
        .into_iter()
        .find(|lora| page.eq_ignore_ascii_case("lora") && lora.name == name)
}

fn not_found() -> ApiError {
    ApiError::Http(StatusCode::NOT_FOUND, "File not found".into())
}

/// The last value of a name in a query, decoded.
fn value(query: Option<&str>, name: &str) -> Option<String> {
    let mut pairs = query.unwrap_or_default().split('&').rev();
    let found = pairs.find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == name));
    found.map(|(_, value)| decoded(&value.replace('+', " ")))
}

/// Percent-encoded text as it was meant; bytes that are no UTF-8 become replacement characters.
#[must_use]
pub fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        let byte = digits.and_then(|two| u8::from_str_radix(two, 16).ok());
        if let Some(byte) = byte.filter(|_| *first == b'%') {
            bytes.push(byte);
            rest = &tail[2..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded() {
        let query = Some("a=1&filename=%2Fm%20x%2fa+b%.png&filename=%c3%A4");
        assert_eq!(value(query, "filename").unwrap(), "ä");
        assert_eq!(
            value(Some("filename=%2Fm%20x+y%.png"), "filename").unwrap(),
            "/m x y%.png"
        );
        assert_eq!(value(query, "b"), None);
    }

    #[test]
    fn only_pictures_inside_the_folders_are_sent() {
        let dir = tempfile::tempdir().unwrap();
        let models = dir.path().join("models");
        std::fs::create_dir(&models).unwrap();
        for file in ["models/a.png", "models/a.safetensors", "secret.png"] {
            std::fs::write(dir.path().join(file), b"x").unwrap();
        }
        std::os::unix::fs::symlink(dir.path().join("secret.png"), models.join("link.png")).unwrap();
        let sent =
            |path: &str| picture(&dir.path().join(path), std::slice::from_ref(&models)).is_ok();
        assert!(sent("models/a.png"));
        for refused in [
            "models/a.safetensors",
            "secret.png",
            "models/../secret.png",
            "models/link.png",
            "models/none.png",
        ] {
            assert!(!sent(refused), "{refused}");
        }
        assert!(
            picture(Path::new("models/a.png"), &[models]).is_err(),
            "relative"
        );
    }
}
