//! Announcing a job's end to the address its client gave.
//!
//! At least once: an announcement that a crash cuts short is made again. A client that does not answer with 2xx is asked again
//! at growing intervals, then given up.

use std::sync::Arc;
use std::time::Duration;

use super::error::ApiError;
use super::jobs::view;
use super::outbound::{self, Reach};
use super::{App, blocking};
use crate::engine::history::Record;
use crate::telemetry::metrics::{self, Delivery};

/// Time between attempts; one more attempt than intervals.
const INTERVALS: [Duration; 4] = [
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(30),
    Duration::from_mins(3),
];
/// Time a receiver may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// Where announcements may go.
#[must_use]
pub fn reach(app: &App) -> Reach {
    if app.options.snapshot().flag("api_forbid_local_requests") {
        Reach::Public
    } else {
        Reach::Anywhere
    }
}

/// Whether an address can be announced to, in words if not.
///
/// # Errors
/// The sentence.
pub fn check(address: &str) -> Result<(), String> {
    let uri: ureq::http::Uri = address
        .parse()
        .map_err(|_| "is not an address like `https://example.com/done`".to_string())?;
    match (uri.scheme_str(), uri.host()) {
        (Some("http" | "https"), Some(_)) => Ok(()),
        _ => Err("must begin with `http://` or `https://` and name a host".into()),
    }
}

/// Posts the job to its webhook until that answers 2xx, and notes it.
pub async fn announce(app: Arc<App>, record: Record) {
    let Some(address) = record.webhook.clone() else {
        return;
    };
    let body = view(&app, &record).to_string();
    let id = record.id.clone();
    for attempt in 0..=INTERVALS.len() {
        let (app, address, body) = (app.clone(), address.clone(), body.clone());
        let sent = blocking(move || post(&app, &address, &body)).await;
        match (sent, INTERVALS.get(attempt)) {
            (Ok(()), _) => break,
            (Err(error), Some(interval)) => {
                tracing::debug!(
                    id,
                    error = error.message(),
                    "webhook not answered; it is asked again"
                );
                tokio::time::sleep(*interval).await;
            }
            (Err(error), None) => {
                tracing::warn!(
                    id,
                    error = error.message(),
                    "webhook not answered; given up"
                );
            }
        }
    }
    let history = app.jobs.history().clone();
    let noted = blocking(move || {
        history
            .announced(&id)
            .map_err(|e| super::job_runner::stored(&e))
    });
    if let Err(error) = noted.await {
        tracing::warn!(error = error.message(), "announcement not noted");
    }
}

fn post(app: &App, address: &str, body: &str) -> Result<(), ApiError> {
    let agent = outbound::agent(reach(app), PATIENCE, "sdgen");
    let request = agent.post(address).content_type("application/json");
    let answer = request.send(body);
    metrics::webhook_sent(if answer.is_ok() {
        Delivery::Done
    } else {
        Delivery::Failed
    });
    answer
        .map(drop)
        .map_err(|error| ApiError::bad_request(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_http_addresses_are_taken() {
        assert!(check("https://example.com/done?x=1").is_ok());
        for wrong in [
            "",
            "example.com",
            "file:///etc/passwd",
            "ftp://a/b",
            "http://",
        ] {
            assert!(check(wrong).is_err(), "{wrong}");
        }
    }
}
