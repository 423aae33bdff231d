//! `/docs` and `/redoc`: one page of ours that reads `/openapi.json`, lists the routes and lets one try them.
//!
//! Works offline and under a policy that allows nothing from elsewhere and nothing inline. Addresses are relative, so that the
//! page works below a path prefix.

use axum::extract::Path;
use axum::http::{HeaderName, header};
use axum::response::{IntoResponse, Response};

use super::error::ApiError;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const PAGE: &str = include_str!("docs/page.html");
const SCRIPT: &str = include_str!("docs/docs.js");
const STYLE: &str = include_str!("docs/docs.css");

/// `GET /docs` and `GET /redoc`.
pub async fn page() -> Response {
    answer("text/html; charset=utf-8", PAGE)
}

/// `GET /docs/{name}`.
///
/// # Errors
/// 404 for anything but the page's own two files.
pub async fn asset(Path(name): Path<String>) -> Result<Response, ApiError> {
    match name.as_str() {
        "docs.js" => Ok(answer("text/javascript; charset=utf-8", SCRIPT)),
        "docs.css" => Ok(answer("text/css; charset=utf-8", STYLE)),
        _ => Err(ApiError::NotFound),
    }
}

fn answer(mime: &'static str, text: &'static str) -> Response {
    let headers: [(HeaderName, &str); 5] = [
        (header::CONTENT_TYPE, mime),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, text).into_response()
}
