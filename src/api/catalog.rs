//! Lists: samplers, schedulers, checkpoints, VAEs, scripts; and what a picture file says.
//!
//! Items have exactly A1111's keys: strict clients fail on any other. Only what works is listed.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Map, Value, json};

use super::body::Body;
use super::error::{ApiError, Problem};
use super::image_source::ImageSource;
use super::types::{PNG_INFO, text};
use super::{App, blocking, fields, vocabulary};
use crate::engine::checkpoint::Checkpoint;
use crate::imaging;
use crate::imaging::infotext::PNG_KEYWORD;

/// `GET /sdapi/v1/samplers`.
pub async fn samplers() -> Json<Value> {
    Json(vocabulary::samplers_json())
}

/// `GET /sdapi/v1/schedulers`.
pub async fn schedulers() -> Json<Value> {
    Json(vocabulary::schedulers_json())
}

/// `GET /sdapi/v1/latent-upscale-modes`.
pub async fn latent_upscale_modes() -> Json<Value> {
    Json(
        vocabulary::LATENT_UPSCALERS
            .iter()
            .map(|mode| json!({ "name": mode.label() }))
            .collect(),
    )
}

/// `GET /sdapi/v1/sd-models`.
pub async fn sd_models(State(app): State<Arc<App>>) -> Json<Value> {
    let row = |checkpoint: &Checkpoint| {
        json!({
            "title": checkpoint.title(),
            "model_name": checkpoint.model_name(),
            "hash": checkpoint.shorthash(),
            "sha256": checkpoint.sha256,
            "filename": checkpoint.filename(),
            "config": checkpoint.config,
        })
    };
    Json(app.engine.catalog().checkpoints().iter().map(row).collect())
}

/// `GET /sdapi/v1/sd-vae`: files only, without `Automatic` and `None`.
pub async fn sd_vae(State(app): State<Arc<App>>) -> Json<Value> {
    let vaes = app.engine.catalog().vaes();
    Json(
        vaes.iter()
            .map(|vae| json!({ "model_name": vae.name, "filename": vae.path }))
            .collect(),
    )
}

/// Lists of things this server has none of.
pub async fn empty_list() -> Json<Value> {
    Json(json!([]))
}

/// `POST /sdapi/v1/refresh-checkpoints` and `refresh-vae`: looks at the disk again.
///
/// # Errors
/// None of its own.
pub async fn refresh(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    blocking(move || {
        app.engine.catalog().rescan();
        Ok(Json(Value::Null))
    })
    .await
}

/// `POST /sdapi/v1/png-info`: the texts of a picture, and the infotext taken apart.
///
/// # Errors
/// 422 without `image`, 400 for something that is no picture.
pub async fn png_info(
    State(app): State<Arc<App>>,
    Body(body, _): Body,
) -> Result<Json<Value>, ApiError> {
    let model = fields::read(&body, PNG_INFO)?;
    let options = app.options.snapshot();
    let back_compatible = options.flag("auto_backcompat");
    blocking(move || {
        let Some(image) = text(&model, "image") else {
            return Err(vec![Problem::field(
                "image",
                "field required",
                "value_error.missing",
            )]
            .into());
        };
        let mut source = ImageSource::new(&options);
        let bytes = source.file(image)?;
        let metadata =
            imaging::read_metadata(&bytes).map_err(|error| source.unreadable(image, &error))?;
        let info = metadata.infotext.unwrap_or_default();
        let items: Map<String, Value> = metadata
            .texts
            .into_iter()
            .filter(|(keyword, _)| keyword != PNG_KEYWORD)
            .map(|(keyword, text)| (keyword, Value::from(text)))
            .collect();
        let parameters = vocabulary::infotext_fields(&info, back_compatible);
        Ok(Json(
            json!({ "info": info, "items": items, "parameters": parameters }),
        ))
    })
    .await
}
