//! Where a picture of a request comes from: base64 in the text itself, or an address that it names.
//!
//! Addresses follow A1111's options `api_enable_requests`, `api_forbid_local_requests` and `api_useragent`; what all addresses of
//! a request may take, in bytes and in seconds, is bounded. Messages are A1111's (`decode_base64_to_image`). Blocks.

use std::time::{Duration, Instant};

use super::error::{ApiError, with_causes};
use super::options::Options;
use super::outbound::{self, Reach};
use crate::imaging;

/// For one address.
const TIMEOUT: Duration = Duration::from_secs(30);
/// For all addresses of a request.
const TIMEOUT_ALL: Duration = Duration::from_mins(2);
/// For all addresses of a request.
const MOST_BYTES: u64 = 256 << 20;

/// The pictures of one request.
#[derive(Debug)]
pub struct ImageSource<'a> {
    options: &'a Options,
    until: Instant,
    bytes_left: u64,
}

impl<'a> ImageSource<'a> {
    /// A source that follows `options`.
    #[must_use]
    pub fn new(options: &'a Options) -> Self {
        Self {
            options,
            until: Instant::now() + TIMEOUT_ALL,
            bytes_left: MOST_BYTES,
        }
    }

    /// The bytes of a picture's file.
    ///
    /// # Errors
    /// 400 for text that is neither base64 nor an address, for an address that is not allowed, and for one without a file.
    pub fn file(&mut self, text: &str) -> Result<Vec<u8>, ApiError> {
        if is_address(text) {
            return self.fetch(text.trim());
        }
        imaging::decode_base64(text).map_err(|error| invalid(&error))
    }

    /// What to say of a file that is no picture.
    #[must_use]
    pub fn unreadable(&self, text: &str, error: &dyn std::error::Error) -> ApiError {
        if is_address(text) {
            ApiError::bad_request(format!("Invalid image url: {}", with_causes(error)))
        } else {
            invalid(error)
        }
    }

    fn fetch(&mut self, address: &str) -> Result<Vec<u8>, ApiError> {
        if !self.options.flag("api_enable_requests") {
            return Err(ApiError::bad_request("Requests not allowed"));
        }
        let reach = if self.options.flag("api_forbid_local_requests") {
            Reach::Public
        } else {
            Reach::Anywhere
        };
        let failed = |error: &ureq::Error| {
            tracing::debug!(%error, "picture not fetched");
            if outbound::is_local_refusal(error) {
                return ApiError::bad_request("Request to local resource not allowed");
            }
            let why = match error {
                ureq::Error::StatusCode(status) => format!("the server answered {status}"),
                ureq::Error::Timeout(_) => "the server took too long".into(),
                ureq::Error::BodyExceedsLimit(_) => format!("more than {} MiB", MOST_BYTES >> 20),
                _ => "no answer from the server".into(),
            };
            ApiError::bad_request(format!("Invalid image url: {why}"))
        };
        let left = self.until.saturating_duration_since(Instant::now());
        let timeout = TIMEOUT.min(left).max(Duration::from_millis(1));
        let agent = outbound::agent(reach, timeout, self.options.text("api_useragent"));
        let mut answer = agent.get(address).call().map_err(|error| failed(&error))?;
        let body = answer.body_mut().with_config().limit(self.bytes_left);
        let bytes = body.read_to_vec().map_err(|error| failed(&error))?;
        self.bytes_left -= bytes.len() as u64;
        Ok(bytes)
    }
}

fn is_address(text: &str) -> bool {
    let start: String = text.trim_start().chars().take(8).collect();
    let start = start.to_ascii_lowercase();
    start.starts_with("http://") || start.starts_with("https://")
}

fn invalid(error: &dyn std::error::Error) -> ApiError {
    ApiError::bad_request(format!("Invalid encoded image: {}", with_causes(error)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_refused_as_the_options_say() {
        let mut options = Options::defaults();
        let refused = |options: &Options, text: &str| {
            ImageSource::new(options).file(text).unwrap_err().message()
        };
        for local in ["http://127.0.0.1:1/a.png", " HTTPS://10.0.0.1:1/a.png"] {
            let said = refused(&options, local);
            assert_eq!(said, "Request to local resource not allowed", "{local}");
        }
        assert!(refused(&options, "httpx://a").starts_with("Invalid encoded image"));
        options.set("api_forbid_local_requests", false.into());
        let said = refused(&options, "http://127.0.0.1:1/a.png");
        assert_eq!(said, "Invalid image url: no answer from the server");
        options.set("api_enable_requests", false.into());
        let said = refused(&options, "http://127.0.0.1:1/a.png");
        assert_eq!(said, "Requests not allowed");
    }
}
