//! `GET` and `POST /sdapi/v1/options`, and the checkpoint routes that change what is loaded.
//!
//! `sd_model_checkpoint` always reads as the title that `sd-models` lists, whatever form it was stored in; so a client may post
//! the whole object back and nothing changes. A checkpoint is loaded before the answer; if that fails nothing was changed.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde_json::{Map, Value, json};

use super::body::Body;
use super::error::ApiError;
use super::options::{self, Options};
use super::{App, blocking, fields};
use crate::engine;

/// Every option.
pub async fn get_options(State(app): State<Arc<App>>) -> Json<Value> {
    let options = with_title(&app, app.options.snapshot());
    Json(Value::Object(options.as_map().clone()))
}

/// Changes options, loading a checkpoint if it changes.
///
/// # Errors
/// 422 for a wrong type, 500 in A1111's form for an unknown checkpoint or if settings are frozen.
pub async fn set_options(
    State(app): State<Arc<App>>,
    Body(body, _): Body,
) -> Result<Json<Value>, ApiError> {
    if app.config.server.freeze_settings {
        return Err(ApiError::failure(
            "AssertionError",
            "changing settings is disabled (`--freeze-settings`)",
        ));
    }
    let mut changes = options::check(fields::parse_object(&body)?)?;
    // No name is no choice: the checkpoint stays.
    if changes.get("sd_model_checkpoint").and_then(Value::as_str) == Some("") {
        changes.remove("sd_model_checkpoint");
    }
    let current = with_title(&app, app.options.snapshot());
    if let Some(Value::String(name)) = changes.get("sd_model_checkpoint") {
        let checkpoint = app
            .engine
            .catalog()
            .find(name)
            .map_err(|error| model_not_found(name, error))?;
        changes.insert("sd_model_checkpoint".into(), checkpoint.title().into());
    }
    changes.retain(|key, value| current.as_map().get(key) != Some(value));
    if changes.contains_key("sd_model_checkpoint") || changes.contains_key("sd_vae") {
        load(&app, &current, &mut changes).await?;
    }
    if !changes.is_empty() {
        blocking(move || app.options.save(&changes)).await?;
    }
    Ok(Json(Value::Null))
}

/// `POST /sdapi/v1/unload-checkpoint`, behind the jobs already queued.
///
/// # Errors
/// The server is shutting down.
pub async fn unload_checkpoint(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    app.engine.unload().await?;
    Ok(Json(json!({})))
}

/// `POST /sdapi/v1/reload-checkpoint`: loads what the options name.
///
/// # Errors
/// The checkpoint cannot be loaded.
pub async fn reload_checkpoint(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    app.load(app.options.snapshot()).await?;
    Ok(Json(json!({})))
}

/// Loads what the options would name with `changes`, and adds the title and hash it turned out to have.
async fn load(
    app: &Arc<App>,
    current: &Options,
    changes: &mut Map<String, Value>,
) -> Result<(), ApiError> {
    let mut wanted = current.clone();
    for (key, value) in changes.iter() {
        wanted.set(key, value.clone());
    }
    let loaded = app.load(wanted).await?;
    if changes.contains_key("sd_model_checkpoint") {
        changes.insert("sd_model_checkpoint".into(), loaded.title.into());
        changes.insert("sd_checkpoint_hash".into(), loaded.sha256.into());
    }
    Ok(())
}

/// Options in which `sd_model_checkpoint` is a title of the list, and the hash belongs to it.
fn with_title(app: &App, mut options: Options) -> Options {
    let catalog = app.engine.catalog();
    let checkpoint = match options.text("sd_model_checkpoint") {
        "" => catalog.default_checkpoint(),
        name => catalog
            .find(name)
            .unwrap_or_else(|_| catalog.default_checkpoint()),
    };
    options.set("sd_model_checkpoint", checkpoint.title().into());
    options.set(
        "sd_checkpoint_hash",
        checkpoint.sha256.unwrap_or_default().into(),
    );
    options
}

/// A1111's words, then the names that there are. A client's mistake is 404, where A1111 answers 500.
fn model_not_found(name: &str, error: engine::Error) -> ApiError {
    match error {
        engine::Error::CheckpointNotFound { .. } => ApiError::Http(
            StatusCode::NOT_FOUND,
            format!("model '{name}' not found: {error}"),
        ),
        other => other.into(),
    }
}
