//! The body of a request: bytes up to the configured limit, whatever the content type says.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};

use super::App;
use super::error::ApiError;

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
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        axum::body::to_bytes(request.into_body(), limit)
            .await
            .map(Self)
            .map_err(|error| {
                let over_limit = std::error::Error::source(&error)
                    .is_some_and(|source| source.to_string().contains("length limit"));
                if over_limit {
                    too_large()
                } else {
                    ApiError::bad_request(format!("request body was not received: {error}"))
                }
            })
    }
}
