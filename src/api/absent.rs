//! Routes of A1111's for what this server cannot do: they exist, check their request, and say so.

use axum::http::StatusCode;

use super::body::Body;
use super::error::ApiError;
use super::fields::{self, Default, Field, Kind};
use super::types::text;

const INTERROGATE: &[Field] = &[
    ("image", Kind::Text, Default::Text("")),
    ("model", Kind::Text, Default::Text("clip")),
];

/// `POST /sdapi/v1/interrogate`: there is no model that describes pictures.
///
/// # Errors
/// Always: 404 without a picture or for an unknown model, else 501.
pub async fn interrogate(Body(body, _): Body) -> Result<(), ApiError> {
    let model = fields::read(&body, INTERROGATE)?;
    let not_found = |what: &str| Err(ApiError::Http(StatusCode::NOT_FOUND, what.into()));
    if text(&model, "image").is_none_or(str::is_empty) {
        return not_found("Image not found");
    }
    match text(&model, "model") {
        Some("clip" | "deepdanbooru") => Err(ApiError::not_supported("interrogating a picture")),
        _ => not_found("Model not found"),
    }
}

/// `POST /sdapi/v1/create/*` and `/sdapi/v1/train/*`.
///
/// # Errors
/// Always: 501.
pub async fn training(Body(body, _): Body) -> Result<(), ApiError> {
    fields::parse_object(&body)?;
    Err(ApiError::not_supported("training"))
}
