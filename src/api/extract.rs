//! Paths and queries of our own routes, refused in our own form.

use axum::extract::FromRequestParts;
use axum::extract::rejection::{PathRejection, QueryRejection};
use serde_json::json;

use super::error::{ApiError, Problem};

/// The parameters of a path.
#[derive(Debug, FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(ApiError))]
pub struct Path<T>(pub T);

/// The parameters of a query.
#[derive(Debug, FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(ApiError))]
pub struct Query<T>(pub T);

impl From<PathRejection> for ApiError {
    fn from(rejection: PathRejection) -> Self {
        refused("path", rejection.body_text())
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> Self {
        refused("query", rejection.body_text())
    }
}

fn refused(place: &str, msg: String) -> ApiError {
    ApiError::Invalid(vec![Problem {
        loc: vec![json!(place)],
        msg,
        kind: "value_error",
    }])
}
