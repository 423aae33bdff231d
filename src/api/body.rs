//! The body of a request: bytes up to the configured limit, whatever the content type says.
//!
//! Invariant: no more than the limit is ever held, and a client that stops sending is not waited for.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use futures_util::StreamExt;

use super::App;
use super::error::ApiError;

/// How long a client may send nothing in the middle of a body.
const PART_TIME: Duration = Duration::from_mins(1);
/// What is set aside for a body before any of it has come, at most: its announced length is only a claim.
const FIRST_BYTES: u64 = 1 << 20;

/// A request's body. Clients send JSON under any content type or none, so the type is not looked at.
#[derive(Debug)]
pub struct Body(pub Bytes);

impl FromRequest<Arc<App>> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let limit = app.config.server.body_limit_mib.saturating_mul(1 << 20);
        let too_large = || {
            let mib = app.config.server.body_limit_mib;
            let message =
                format!("request body is larger than {mib} MiB (setting `server.body_limit_mib`)");
            ApiError::Http(StatusCode::PAYLOAD_TOO_LARGE, message)
        };
        let announced = request
            .headers()
            .get(header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|length| length > limit) {
            return Err(too_large());
        }
        let mut bytes = Vec::with_capacity(announced.unwrap_or(0).min(FIRST_BYTES) as usize);
        let mut parts = request.into_body().into_data_stream();
        loop {
            let part = match tokio::time::timeout(PART_TIME, parts.next()).await {
                Ok(None) => return Ok(Self(bytes.into())),
                Ok(Some(Ok(part))) => part,
                Ok(Some(Err(error))) => {
                    let message = format!("request body was not received: {error}");
                    return Err(ApiError::bad_request(message));
                }
                Err(_) => {
                    let seconds = PART_TIME.as_secs();
                    let message = format!("request body stopped for {seconds} seconds");
                    return Err(ApiError::Http(StatusCode::REQUEST_TIMEOUT, message));
                }
            };
            if (bytes.len() + part.len()) as u64 > limit {
                return Err(too_large());
            }
            bytes.extend_from_slice(&part);
        }
    }
}
