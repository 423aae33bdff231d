//! Server-sent events: a job's life, and the whole queue's, as it happens.
//!
//! Invariants: the first event tells the present state, so a client that reconnects has missed nothing; events are at least
//! `PACE` apart and only sent when something has changed; a job's stream closes after its end was told. Following a job
//! holds no lock and no thread.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::Stream;
use futures_util::stream::unfold;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::error::ApiError;
use super::extract::{Path, Query};
use super::jobs::{find, view};
use super::progress::encode_preview;
use super::{App, blocking};
use crate::engine::history::State as Stage;
use crate::engine::status::{Status, WorkerStatus};
use crate::imaging::Format;

/// Least time between two events of a stream.
const PACE: Duration = Duration::from_millis(100);
/// Time after which a stream looks again without being told to.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// The query of a job's stream.
#[derive(Debug, Default, Deserialize)]
pub struct EventsQuery {
    /// `1` or `true`: also send previews.
    #[serde(default)]
    previews: String,
}

/// What a stream has told.
struct Follower {
    app: Arc<App>,
    id: String,
    previews: bool,
    changes: watch::Receiver<Status>,
    told: Value,
    preview: i64,
    /// Events that wait to be sent.
    ready: Vec<Event>,
    is_over: bool,
}

/// `GET /v1/jobs/{id}/events`: events `job` with the job, and with `?previews=1` events `preview` with a data URI; the last is
/// `end`.
///
/// # Errors
/// 404 for an unknown job.
pub async fn follow(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    Query(query): Query<EventsQuery>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    let (known, wanted) = (app.clone(), id.clone());
    blocking(move || find(&known, &wanted).map(drop)).await?;
    let follower = Follower {
        changes: app.engine.watch(),
        app,
        id,
        previews: matches!(query.previews.as_str(), "1" | "true"),
        told: Value::Null,
        preview: -1,
        ready: Vec::new(),
        is_over: false,
    };
    let stream = unfold(follower, |mut follower| async move {
        let event = follower.next().await?;
        Some((Ok(event), follower))
    });
    Ok(Sse::new(stream).keep_alive(KeepAlive::default()))
}

impl Follower {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop() {
                return Some(event);
            }
            if self.is_over || self.app.shutdown.is_cancelled() {
                return None;
            }
            if !self.told.is_null() {
                let _ = tokio::time::timeout(LOOK_AGAIN, self.changes.changed()).await;
                tokio::time::sleep(PACE).await;
            }
            self.look().await;
        }
    }

    /// Puts what has changed into `ready`, the last event first.
    async fn look(&mut self) {
        let (app, id) = (self.app.clone(), self.id.clone());
        let found = blocking(move || {
            let record = find(&app, &id)?;
            Ok((record.state, view(&app, &record)))
        });
        let Ok((state, now)) = found.await else {
            // Forgotten meanwhile.
            self.is_over = true;
            return;
        };
        if state.is_end() {
            self.is_over = true;
            self.ready.push(event("end", &now));
            return;
        }
        if self.previews
            && !now["progress"].is_null()
            && let Some(worker) = self.app.engine.status().of_job(&self.id)
            && let Ok(Some((base64, number))) =
                encode_preview(&self.app, worker.number, Format::Jpeg).await
            && number != self.preview
        {
            self.preview = number;
            let uri = format!("data:{};base64,{base64}", Format::Jpeg.mime());
            self.ready
                .push(event("preview", &json!({ "id": self.id, "image": uri })));
        }
        if now != self.told {
            self.ready.push(event("job", &now));
            self.told = now;
        }
    }
}

/// `GET /v1/events`: events `queue` with the ids of the longest running job and of those that wait, what each device does, and how
/// many jobs are in each state.
pub async fn queue(
    State(app): State<Arc<App>>,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let changes = app.engine.watch();
    let stream = unfold(
        (app, changes, Value::Null),
        |(app, mut changes, told)| async move {
            loop {
                if app.shutdown.is_cancelled() {
                    return None;
                }
                if !told.is_null() {
                    let _ = tokio::time::timeout(LOOK_AGAIN, changes.changed()).await;
                    tokio::time::sleep(PACE).await;
                }
                let now = line(&app).await;
                if now != told {
                    return Some((Ok(event("queue", &now)), (app, changes, now)));
                }
            }
        },
    );
    Sse::new(stream).keep_alive(KeepAlive::default())
}

/// The running jobs and the line behind them.
async fn line(app: &Arc<App>) -> Value {
    let history = app.jobs.history().clone();
    let counts = blocking(move || Ok(history.counts().unwrap_or_default())).await;
    let count = |wanted: Stage| {
        let mut counts = counts.iter().flatten();
        counts
            .find(|(state, _)| *state == wanted)
            .map_or(0, |(_, n)| *n)
    };
    let status = app.engine.status();
    let shown = status.shown("");
    let device = |worker: &WorkerStatus| {
        json!({
            "device": worker.device,
            "activity": worker.activity(),
            "running": worker.running.as_ref().map(|running| &running.id),
            "fraction": worker.fraction(),
            "eta_seconds": worker.eta_seconds(),
            "loading": worker.loading,
            "checkpoint": worker.loaded.as_ref().map(|model| &model.title),
        })
    };
    json!({
        "running": shown.running.as_ref().map(|running| &running.id),
        "fraction": shown.fraction(),
        "eta_seconds": shown.eta_seconds(),
        "loading": shown.loading,
        "devices": status.workers.iter().map(device).collect::<Vec<_>>(),
        "pending": app.engine.pending(),
        "done": count(Stage::Done),
        "failed": count(Stage::Failed),
        "cancelled": count(Stage::Cancelled),
    })
}

fn event(name: &str, data: &Value) -> Event {
    Event::default().event(name).data(data.to_string())
}
