//! The only place where an error becomes a status code and a JSON body, in A1111's three shapes.
//!
//! Application errors: `{error, detail, body, errors}`, with the message in `detail` and in `errors` (A1111 leaves one of
//! them empty, clients read either). Validation: `FastAPI`'s list of `{loc, msg, type}`, status 422. Routing: `{detail}`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::engine;
pub use crate::engine::with_causes;
use crate::pipeline;

/// One entry of a 422 answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// `["body", "steps"]`.
    pub loc: Vec<Value>,
    /// What is wrong.
    pub msg: String,
    /// pydantic's name of the kind of error.
    pub kind: &'static str,
}

impl Problem {
    /// A problem with a field of the body.
    #[must_use]
    pub fn field(name: &str, msg: impl Into<String>, kind: &'static str) -> Self {
        Self {
            loc: vec![json!("body"), json!(name)],
            msg: msg.into(),
            kind,
        }
    }

    /// A value outside its limits.
    #[must_use]
    pub fn limit(name: &str, msg: impl Into<String>) -> Self {
        Self::field(name, msg, "value_error")
    }
}

/// Whatever a handler can fail with.
#[derive(Debug)]
pub enum ApiError {
    /// The request does not fit its schema or the limits.
    Invalid(Vec<Problem>),
    /// A deliberate answer.
    Http(StatusCode, String),
    /// A failure that A1111 reports as a Python exception of this class.
    Failure {
        /// Exception class that clients look for.
        class: &'static str,
        /// What happened and what to do.
        detail: String,
        /// The text A1111 would have in `errors`.
        errors: String,
    },
    /// No or wrong credentials.
    Unauthorized(&'static str),
    /// No such path.
    NotFound,
    /// The path exists, the method does not.
    MethodNotAllowed,
    /// Too much was asked for; seconds after which it may be asked again.
    TooMany {
        /// What, and which limit.
        message: String,
        /// Seconds.
        retry_after: u64,
    },
    /// From the engine.
    Engine(engine::Error),
}

impl ApiError {
    /// 400 with a message.
    #[must_use]
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::Http(StatusCode::BAD_REQUEST, message.into())
    }

    /// 501 for what a later version will do.
    #[must_use]
    pub fn not_supported(what: &str) -> Self {
        Self::Http(
            StatusCode::NOT_IMPLEMENTED,
            format!("{what} is not supported by this version of sdgen"),
        )
    }

    /// 500 with the class of a Python exception.
    #[must_use]
    pub fn failure(class: &'static str, message: impl Into<String>) -> Self {
        let detail = message.into();
        Self::Failure {
            class,
            errors: detail.clone(),
            detail,
        }
    }
}

impl ApiError {
    /// What happened, in one sentence.
    #[must_use]
    pub fn message(&self) -> String {
        match self {
            Self::Invalid(problems) => {
                let each = problems.iter().map(|problem| {
                    let place = problem.loc.last().and_then(Value::as_str);
                    format!("`{}` {}", place.unwrap_or("body"), problem.msg)
                });
                each.collect::<Vec<_>>().join("; ")
            }
            Self::Http(_, message) | Self::TooMany { message, .. } => message.clone(),
            Self::Failure { detail, .. } => detail.clone(),
            Self::Unauthorized(message) => (*message).to_string(),
            Self::NotFound => "not found".into(),
            Self::MethodNotAllowed => "method not allowed".into(),
            Self::Engine(error) => with_causes(error),
        }
    }
}

impl From<engine::Error> for ApiError {
    fn from(error: engine::Error) -> Self {
        Self::Engine(error)
    }
}

impl From<Vec<Problem>> for ApiError {
    fn from(problems: Vec<Problem>) -> Self {
        Self::Invalid(problems)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        match self {
            Self::Invalid(problems) => {
                let entry = |p: &Problem| json!({ "loc": p.loc, "msg": p.msg, "type": p.kind });
                let detail: Vec<Value> = problems.iter().map(entry).collect();
                (
                    StatusCode::UNPROCESSABLE_ENTITY,
                    Json(json!({ "detail": detail })),
                )
                    .into_response()
            }
            Self::Http(status, message) => shape(status, "HTTPException", &message, &message),
            Self::Failure {
                class,
                detail,
                errors,
            } => shape(StatusCode::INTERNAL_SERVER_ERROR, class, &detail, &errors),
            Self::Unauthorized(message) => {
                let mut response = shape(StatusCode::UNAUTHORIZED, "HTTPException", message, "");
                response
                    .headers_mut()
                    .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Basic"));
                response
            }
            Self::NotFound => (
                StatusCode::NOT_FOUND,
                Json(json!({ "detail": "Not Found" })),
            )
                .into_response(),
            Self::MethodNotAllowed => (
                StatusCode::METHOD_NOT_ALLOWED,
                Json(json!({ "detail": "Method Not Allowed" })),
            )
                .into_response(),
            Self::TooMany {
                message,
                retry_after,
            } => {
                let status = StatusCode::TOO_MANY_REQUESTS;
                let mut answer = shape(status, "HTTPException", &message, &message);
                answer
                    .headers_mut()
                    .insert(header::RETRY_AFTER, HeaderValue::from(retry_after));
                answer
            }
            Self::Engine(error) => engine_answer(&error),
        }
    }
}

fn engine_answer(error: &engine::Error) -> Response {
    let message = with_causes(error);
    let (status, class) = match error {
        engine::Error::ShuttingDown | engine::Error::QueueFull { .. } => {
            let mut response = shape(
                StatusCode::SERVICE_UNAVAILABLE,
                "HTTPException",
                &message,
                &message,
            );
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from_static("10"));
            return response;
        }
        engine::Error::CheckpointNotFound { .. } | engine::Error::VaeNotFound { .. } => {
            (StatusCode::NOT_FOUND, "HTTPException")
        }
        engine::Error::Pipeline(pipeline::Error::Invalid(_) | pipeline::Error::Picture(_)) => {
            (StatusCode::BAD_REQUEST, "HTTPException")
        }
        engine::Error::Io { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "OSError"),
        engine::Error::Pipeline(
            pipeline::Error::NotANumber { .. } | pipeline::Error::VaeNotANumber { .. },
        ) => (StatusCode::INTERNAL_SERVER_ERROR, "NansException"),
        engine::Error::Pipeline(pipeline::Error::Tensor(cause)) if is_out_of_memory(cause) => {
            let message = "CUDA out of memory: use a smaller size or batch size";
            return shape(
                StatusCode::INTERNAL_SERVER_ERROR,
                "OutOfMemoryError",
                message,
                message,
            );
        }
        engine::Error::Pipeline(pipeline::Error::OutOfMemory { .. }) => {
            (StatusCode::INTERNAL_SERVER_ERROR, "OutOfMemoryError")
        }
        engine::Error::Device { .. }
        | engine::Error::NotDownloaded { .. }
        | engine::Error::Weights(_)
        | engine::Error::Pipeline(
            pipeline::Error::Weights(_)
            | pipeline::Error::Tensor(_)
            | pipeline::Error::Interrupted
            | pipeline::Error::Skipped,
        )
        | engine::Error::Panicked(_) => (StatusCode::INTERNAL_SERVER_ERROR, "RuntimeError"),
    };
    shape(status, class, &message, &message)
}

fn is_out_of_memory(error: &candle_core::Error) -> bool {
    let text = error.to_string().to_lowercase();
    text.contains("out of memory") || text.contains("out_of_memory")
}

fn shape(status: StatusCode, class: &str, detail: &str, errors: &str) -> Response {
    let body = json!({ "error": class, "detail": detail, "body": "", "errors": errors });
    (status, Json(body)).into_response()
}
