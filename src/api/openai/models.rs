//! `GET /v1/models`: the checkpoints, as `OpenAI` lists its models.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::Failure;
use crate::api::App;
use crate::api::extract::Path;
use crate::engine;
use crate::engine::checkpoint::Checkpoint;
use crate::pipeline::CheckpointSource;

/// What the names of `OpenAI`'s image models begin with.
const THEIRS: [&str; 3] = ["dall-e", "gpt-image", "chatgpt-image"];

/// Whether a name means the checkpoint of the options.
#[must_use]
pub fn is_default(name: &str) -> bool {
    name.is_empty() || THEIRS.iter().any(|theirs| name.starts_with(theirs))
}

/// The checkpoint behind a name; `None` for that of the options.
///
/// # Errors
/// 404 for a name that there is not.
pub fn find(app: &App, name: &str) -> Result<Option<Checkpoint>, Failure> {
    if is_default(name) {
        return Ok(None);
    }
    match app.engine.catalog().find(name) {
        Ok(checkpoint) => Ok(Some(checkpoint)),
        Err(engine::Error::CheckpointNotFound { .. } | engine::Error::Weights(_)) => {
            let known = app.engine.catalog().checkpoints();
            let known: Vec<String> = known.iter().map(Checkpoint::model_name).collect();
            let known = format!("`GET /v1/models` lists {} models", known.len());
            let shown: String = name.chars().take(100).collect();
            Err(Failure::no_model(&shown, &known))
        }
        Err(other) => Err(crate::api::error::ApiError::from(other).into()),
    }
}

/// The checkpoint of the options, as far as it exists.
#[must_use]
pub fn selected(app: &App) -> Checkpoint {
    let (catalog, options) = (app.engine.catalog(), app.options.snapshot());
    match options.text("sd_model_checkpoint") {
        "" => catalog.default_checkpoint(),
        name => catalog
            .find(name)
            .unwrap_or_else(|_| catalog.default_checkpoint()),
    }
}

/// `GET /v1/models`.
pub async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let checkpoints = app.engine.catalog().checkpoints();
    let models: Vec<Value> = checkpoints
        .iter()
        .map(|checkpoint| view(checkpoint, &checkpoint.model_name()))
        .collect();
    Json(json!({ "object": "list", "data": models }))
}

/// `GET /v1/models/{id}`: under any name of a checkpoint.
///
/// # Errors
/// 404 for a name that there is not.
pub async fn get(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, Failure> {
    let checkpoint = find(&app, &id)?;
    Ok(Json(match checkpoint {
        Some(checkpoint) => view(&checkpoint, &checkpoint.model_name()),
        None => view(&selected(&app), &id),
    }))
}

fn view(checkpoint: &Checkpoint, id: &str) -> Value {
    let modified = match &checkpoint.source {
        CheckpointSource::Embedded => None,
        CheckpointSource::File(path) => std::fs::metadata(path)
            .and_then(|data| data.modified())
            .ok(),
    };
    let age = modified.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    let created = age.map_or(0, |age| age.as_secs());
    json!({ "id": id, "object": "model", "created": created, "owned_by": "sdgen" })
}
