//! Lists of LoRAs and textual inversions.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::{App, blocking};
use crate::engine::networks::LoraEntry;

/// Metadata that A1111 lists first, in its order.
const FIRST_KEYS: [&str; 5] = [
    "ss_sd_model_name",
    "ss_resolution",
    "ss_clip_skip",
    "ss_num_train_images",
    "ss_tag_frequency",
];

/// `GET /sdapi/v1/loras`.
pub async fn loras(State(app): State<Arc<App>>) -> Json<Value> {
    let row = |lora: &LoraEntry| {
        json!({
            "name": lora.name,
            "alias": lora.alias,
            "path": lora.path,
            "metadata": metadata(lora),
        })
    };
    let loras = app.engine.catalog().networks().loras();
    Json(loras.iter().map(row).collect())
}

/// Metadata with its JSON objects taken apart; pictures are left out, as in A1111.
fn metadata(lora: &LoraEntry) -> Map<String, Value> {
    let value = |text: &String| match text.strip_prefix('{') {
        Some(_) => serde_json::from_str(text).unwrap_or_else(|_| text.as_str().into()),
        None => Value::from(text.as_str()),
    };
    let first = FIRST_KEYS
        .iter()
        .filter_map(|key| lora.metadata.get_key_value(*key));
    let rest = lora
        .metadata
        .iter()
        .filter(|(key, _)| !FIRST_KEYS.contains(&key.as_str()));
    first
        .chain(rest)
        .filter(|(key, _)| *key != "ssmd_cover_images")
        .map(|(key, text)| (key.clone(), value(text)))
        .collect()
}

/// `POST /sdapi/v1/refresh-loras`: looks at the disk again.
///
/// # Errors
/// None of its own.
pub async fn refresh_loras(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    blocking(move || {
        app.engine.catalog().networks().rescan_loras();
        Ok(Json(Value::Null))
    })
    .await
}

/// `GET /sdapi/v1/embeddings`: those of two text encoders as loaded, all others as skipped.
///
/// # Errors
/// None of its own.
pub async fn embeddings(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    blocking(move || {
        let library = app.engine.catalog().embeddings();
        let row = |shape: Option<usize>, vectors: Option<usize>| {
            json!({
                "step": null,
                "sd_checkpoint": null,
                "sd_checkpoint_name": null,
                "shape": shape,
                "vectors": vectors,
            })
        };
        let loaded: Map<String, Value> = library
            .loaded
            .iter()
            .map(|e| {
                (
                    e.name.clone(),
                    row(Some(e.width_l() + e.width_g()), Some(e.vectors)),
                )
            })
            .collect();
        let skipped: Map<String, Value> = library
            .skipped
            .iter()
            .map(|(path, _)| {
                let name = path.file_stem().unwrap_or_default().to_string_lossy();
                (name.into_owned(), row(None, None))
            })
            .collect();
        Ok(Json(json!({ "loaded": loaded, "skipped": skipped })))
    })
    .await
}

/// `POST /sdapi/v1/refresh-embeddings`: reads the folder again.
///
/// # Errors
/// None of its own.
pub async fn refresh_embeddings(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    blocking(move || {
        app.engine.catalog().networks().forget_embeddings();
        Ok(Json(Value::Null))
    })
    .await
}
