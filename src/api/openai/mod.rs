//! `OpenAI`'s images API on the same queue: `/v1/images/*` and `/v1/models`.
//!
//! Every refusal of these routes has `OpenAI`'s form, `{"error": {message, type, param, code}}`. A model is a checkpoint under
//! any of its names; the names of `OpenAI`'s own image models mean the checkpoint of the options. Shapes: the API reference of
//! `OpenAI` and the `openai` package for Python, 3.57.

pub mod form;
pub mod images;
pub mod links;
pub mod models;
pub mod request;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::error::ApiError;
use crate::engine;

/// Whether a path's clients read errors of this form.
#[must_use]
pub fn is_route(path: &str) -> bool {
    path.starts_with("/v1/images/") || path == "/v1/models" || path.starts_with("/v1/models/")
}

/// Whether a path is that of a stored picture: its unguessable name is the permission to read it.
#[must_use]
pub fn is_picture_link(path: &str) -> bool {
    let name = path.strip_prefix(links::PATH);
    name.is_some_and(links::is_name)
}

/// A refusal in `OpenAI`'s form.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    status: StatusCode,
    message: String,
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
    retry_after: Option<u64>,
}

impl Failure {
    /// 400 about a parameter.
    #[must_use]
    pub fn parameter(name: &str, message: impl Into<String>) -> Self {
        Self {
            param: Some(name.to_string()),
            code: Some("invalid_value"),
            ..Self::of(StatusCode::BAD_REQUEST, message.into())
        }
    }

    /// 404 for a model that there is not.
    #[must_use]
    pub fn no_model(name: &str, known: &str) -> Self {
        Self {
            param: Some("model".into()),
            code: Some("model_not_found"),
            ..Self::of(
                StatusCode::NOT_FOUND,
                format!("the model `{name}` does not exist; {known}"),
            )
        }
    }

    /// 429 for a full queue.
    #[must_use]
    pub fn busy(message: String, seconds: u64) -> Self {
        Self {
            retry_after: Some(seconds),
            ..Self::of(StatusCode::TOO_MANY_REQUESTS, message)
        }
    }

    fn of(status: StatusCode, message: String) -> Self {
        let (kind, code) = match status {
            StatusCode::UNAUTHORIZED => ("invalid_request_error", Some("invalid_api_key")),
            StatusCode::TOO_MANY_REQUESTS => ("requests", Some("rate_limit_exceeded")),
            status if status.is_server_error() => ("server_error", None),
            _ => ("invalid_request_error", None),
        };
        Self {
            status,
            message,
            kind,
            param: None,
            code,
            retry_after: None,
        }
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        let message = error.message();
        match error {
            ApiError::Invalid(problems) => {
                let field = problems.first().and_then(|problem| problem.loc.get(1));
                let param = field.and_then(|field| field.as_str()).map(parameter_of);
                let code = param.is_some().then_some("invalid_value");
                Self {
                    param: param.map(str::to_string),
                    code,
                    ..Self::of(StatusCode::BAD_REQUEST, message)
                }
            }
            ApiError::TooMany { retry_after, .. } => Self::busy(message, retry_after),
            ApiError::Engine(engine::Error::QueueFull { .. }) => Self::busy(message, 10),
            ApiError::Engine(engine::Error::CheckpointNotFound { .. }) => Self {
                param: Some("model".into()),
                code: Some("model_not_found"),
                ..Self::of(StatusCode::NOT_FOUND, message)
            },
            other => Self::of(other.into_response().status(), message),
        }
    }
}

/// A1111's fields under the names that the client has sent.
fn parameter_of(field: &str) -> &str {
    match field {
        "width" | "height" => "size",
        "n_iter" | "batch_size" => "n",
        "steps" => "quality",
        other => other,
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let body = json!({ "error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        } });
        let mut response = (self.status, Json(body)).into_response();
        if let Some(seconds) = self.retry_after {
            let headers = response.headers_mut();
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::super::error::Problem;
    use super::*;

    #[test]
    fn limits_are_told_under_the_clients_names() {
        let failure = Failure::from(ApiError::from(vec![Problem::limit("n_iter", "too many")]));
        assert_eq!(failure.status, StatusCode::BAD_REQUEST);
        assert_eq!(failure.param.as_deref(), Some("n"));
    }

    #[test]
    fn a_full_queue_is_429_with_a_time() {
        let failure = Failure::from(ApiError::from(engine::Error::QueueFull { limit: 1 }));
        let answer = failure.into_response();
        assert_eq!(answer.status(), StatusCode::TOO_MANY_REQUESTS);
        assert!(answer.headers().contains_key(header::RETRY_AFTER));
    }

    #[test]
    fn only_whole_names_are_links() {
        let name = "0123456789abcdef0123456789abcdef.png";
        assert!(is_picture_link(&format!("/v1/images/files/{name}")));
        for wrong in [
            "/v1/images/files/",
            "/v1/images/files/../x.png",
            "/v1/images/edits",
        ] {
            assert!(!is_picture_link(wrong), "{wrong}");
        }
        assert!(is_route("/v1/models") && !is_route("/v1/modelsx") && !is_route("/v1/jobs"));
    }
}
