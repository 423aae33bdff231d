//! HTTP Basic authentication for everything but health checks.
//!
//! Both sides of a comparison are hashed first, so that neither length nor content shows in its time. Without configured
//! credentials any `Authorization` header is ignored, however malformed: clients send such.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

use super::App;
use super::error::ApiError;
use crate::config::Secret;

/// Paths that answer without credentials.
const OPEN: &[&str] = &["/healthz", "/readyz", "/internal/ping"];

/// Lets a request through if it carries one of the configured pairs.
pub async fn require(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let pairs = &app.config.server.api_auth;
    if pairs.is_empty() || OPEN.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let sent = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok());
    match sent.and_then(basic) {
        None => ApiError::Unauthorized("Not authenticated").into_response(),
        Some(sent) if is_known(&sent, pairs) => next.run(request).await,
        Some(_) => ApiError::Unauthorized("Incorrect username or password").into_response(),
    }
}

/// The `user:password` of a Basic header.
fn basic(header: &str) -> Option<Vec<u8>> {
    let (scheme, value) = header.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("basic")
        .then(|| STANDARD.decode(value.trim()).ok())
        .flatten()
}

/// Compares with every pair, whether or not one has matched.
fn is_known(sent: &[u8], pairs: &[Secret]) -> bool {
    let sent = Sha256::digest(sent);
    let matches = |pair: &Secret| {
        let wanted = Sha256::digest(pair.expose().as_bytes());
        let difference = sent
            .iter()
            .zip(wanted.iter())
            .fold(0u8, |all, (a, b)| all | (a ^ b));
        u8::from(difference == 0)
    };
    pairs.iter().fold(0, |known, pair| known | matches(pair)) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_complete_pairs_are_known() {
        let pairs = [Secret::new("a:b"), Secret::new("user:pass:word")];
        assert!(is_known(b"a:b", &pairs) && is_known(b"user:pass:word", &pairs));
        assert!(!is_known(b"a:", &pairs) && !is_known(b"", &pairs) && !is_known(b"a:b\0", &pairs));
    }

    #[test]
    fn headers_that_are_not_basic_are_none() {
        assert_eq!(basic("Basic YTpi"), Some(b"a:b".to_vec()));
        assert_eq!(basic("basic YTpi"), Some(b"a:b".to_vec()));
        for junk in ["", "Basic", "Basic !!", "Bearer YTpi"] {
            assert_eq!(basic(junk), None, "{junk}");
        }
    }
}
