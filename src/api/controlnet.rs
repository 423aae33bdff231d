//! `ControlNet`'s listing routes: what there is without a `ControlNet`, so that clients which ask for it go on.
//!
//! The lists hold nothing but "none", the preprocessor that changes nothing.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde_json::{Value, json};

use super::App;
use super::body::Body;
use super::error::ApiError;
use super::fields::{self, Default, Field, Kind};

/// Every field of `POST /controlnet/detect` that acts.
pub const DETECT: &[Field] = &[
    ("controlnet_module", Kind::Text, Default::Text("none")),
    ("controlnet_input_images", Kind::List, Default::Texts(&[])),
];

/// `GET /controlnet/version`: the version of the extension's API.
pub async fn version() -> Json<Value> {
    Json(json!({ "version": 3 }))
}

/// `GET /controlnet/model_list`.
pub async fn model_list() -> Json<Value> {
    Json(json!({ "model_list": [] }))
}

/// `GET /controlnet/module_list`.
pub async fn module_list() -> Json<Value> {
    let detail = json!({ "none": { "model_free": false, "sliders": [] } });
    Json(json!({ "module_list": ["none"], "module_detail": detail }))
}

/// `GET /controlnet/control_types`.
pub async fn control_types() -> Json<Value> {
    let all = json!({
        "module_list": ["none"], "model_list": ["None"], "default_option": "none", "default_model": "None",
    });
    Json(json!({ "control_types": { "All": all } }))
}

/// `GET /controlnet/settings`.
pub async fn settings(State(app): State<Arc<App>>) -> Json<Value> {
    let units = app.options.snapshot().int("control_net_unit_count");
    Json(json!({ "control_net_unit_count": units }))
}

/// `POST /controlnet/detect`: "none" gives the pictures back.
///
/// # Errors
/// 422 in the extension's words for another preprocessor, and without a picture.
pub async fn detect(Body(body, _): Body) -> Result<Json<Value>, ApiError> {
    let model = fields::read(&body, DETECT)?;
    let refuse = |why: &str| ApiError::Http(StatusCode::UNPROCESSABLE_ENTITY, why.into());
    if model.get("controlnet_module").and_then(Value::as_str) != Some("none") {
        return Err(refuse("Module not available"));
    }
    match model.get("controlnet_input_images") {
        Some(Value::Array(images)) if !images.is_empty() => {
            Ok(Json(json!({ "images": images, "info": "Success" })))
        }
        _ => Err(refuse("No image selected")),
    }
}
