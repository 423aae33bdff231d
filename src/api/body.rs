//! The body of a request: bytes up to the configured limit, whatever the content type says.
//!
//! Invariants: no more than the limit is ever held of one body, nor more than `server.body_memory_mib` of all large ones: a body
//! is read once there is memory for the whole of it. A client that stops sending, or sends too slowly, is not waited for.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use futures_util::StreamExt;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout, timeout_at};

use super::App;
use super::error::ApiError;

/// How long a client may send nothing in the middle of a body.
const PART_TIME: Duration = Duration::from_mins(1);
/// Bytes a second that a client must send on the whole, after the first `PART_TIME`.
const LEAST_SPEED: u64 = 256 << 10;
/// Bodies up to this many bytes are held without asking for memory.
const SMALL: u64 = 1 << 20;

/// A request's body, and its share of the memory for bodies for as long as it is held. Clients send JSON under any content type
/// or none, so the type is not looked at.
#[derive(Debug)]
pub struct Body(pub Bytes, pub Option<OwnedSemaphorePermit>);

impl FromRequest<Arc<App>> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let limit_mib = app.config.server.body_limit_mib;
        let limit = limit_mib.saturating_mul(1 << 20);
        let announced = request
            .headers()
            .get(header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|length| length > limit) {
            return Err(too_large(limit_mib));
        }
        let memory = match announced {
            Some(length) if length <= SMALL => None,
            // A body in chunks may become as large as allowed.
            length => Some(reserve(app, length.unwrap_or(limit)).await),
        };
        // Room for all of it only where it was reserved: an announced length is but a claim.
        let room = announced.filter(|_| memory.is_some()).unwrap_or(SMALL);
        let bytes = read(request, room, announced.unwrap_or(limit), limit_mib).await?;
        Ok(Self(bytes.into(), memory.flatten()))
    }
}

/// Waits for memory for `bytes`; `None` only if the server is ending.
async fn reserve(app: &Arc<App>, bytes: u64) -> Option<OwnedSemaphorePermit> {
    let mib = bytes.div_ceil(1 << 20);
    let permits = u32::try_from(mib).unwrap_or(u32::MAX);
    app.body_memory
        .clone()
        .acquire_many_owned(permits)
        .await
        .ok()
}

async fn read(
    request: Request,
    room: u64,
    expected: u64,
    limit_mib: u64,
) -> Result<Vec<u8>, ApiError> {
    let limit = limit_mib.saturating_mul(1 << 20);
    let longest = PART_TIME + Duration::from_secs(expected / LEAST_SPEED);
    let end = Instant::now() + longest;
    let mut bytes = Vec::with_capacity(room as usize);
    let mut parts = request.into_body().into_data_stream();
    loop {
        let next = timeout_at(end, timeout(PART_TIME, parts.next())).await;
        let part = match next {
            Ok(Ok(None)) => return Ok(bytes),
            Ok(Ok(Some(Ok(part)))) => part,
            Ok(Ok(Some(Err(error)))) => {
                let message = format!("request body was not received: {error}");
                return Err(ApiError::bad_request(message));
            }
            Ok(Err(_)) => {
                let seconds = PART_TIME.as_secs();
                let message = format!("request body stopped for {seconds} seconds");
                return Err(ApiError::Http(StatusCode::REQUEST_TIMEOUT, message));
            }
            Err(_) => {
                let seconds = longest.as_secs();
                let message = format!("request body took longer than {seconds} seconds");
                return Err(ApiError::Http(StatusCode::REQUEST_TIMEOUT, message));
            }
        };
        if (bytes.len() + part.len()) as u64 > limit {
            return Err(too_large(limit_mib));
        }
        bytes.extend_from_slice(&part);
    }
}

fn too_large(limit_mib: u64) -> ApiError {
    let message =
        format!("request body is larger than {limit_mib} MiB (setting `server.body_limit_mib`)");
    ApiError::Http(StatusCode::PAYLOAD_TOO_LARGE, message)
}
