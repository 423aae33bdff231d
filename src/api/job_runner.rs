//! The life of a job that outlives its request: from the history into the queue, through the engine, back into the history.
//!
//! Invariants: a job takes one of the queue's places before its request is read, so that jobs beyond them cost an id each; its files are named
//! after it, so a second run replaces those of a first that a crash cut short; whoever ends a job first in the history has
//! ended it. A job that the server's end cuts short goes back in line.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::error::{ApiError, with_causes};
use super::resolve::{self, Prepared};
use super::{App, blocking, fields, outputs, types, webhook};
use crate::engine::history::{End, History, NewJob, Record};
use crate::engine::status::CancelToken;
use crate::engine::{self, JobHandle, JobState, Outcome};
use crate::imaging::{self, SaveRequest};

/// Share of the latest job in the average that estimates waiting times.
const LATEST: f64 = 0.2;

/// The jobs of this process, and the file of all.
pub struct Jobs {
    history: Arc<History>,
    live: Mutex<HashMap<String, Live>>,
    /// Seconds that jobs take, latest ones counting more; `None` before the first.
    average: Mutex<Option<f64>>,
}

/// A job of this process that has not ended.
#[derive(Clone)]
struct Live {
    /// Takes it out of the line, or interrupts it.
    leave: CancellationToken,
    /// `None` until it has its place.
    progress: watch::Receiver<Option<JobState>>,
}

impl Jobs {
    /// Jobs kept in `history`.
    #[must_use]
    pub fn new(history: History) -> Self {
        Self {
            history: Arc::new(history),
            live: Mutex::default(),
            average: Mutex::default(),
        }
    }

    /// The file.
    #[must_use]
    pub fn history(&self) -> &Arc<History> {
        &self.history
    }

    /// How far a job of this process is; `None` if it waits for its place or is none.
    #[must_use]
    pub fn progress(&self, id: &str) -> Option<JobState> {
        *self.live(id)?.progress.borrow()
    }

    /// Seconds that a job takes, if any has ended yet.
    #[must_use]
    pub fn average_seconds(&self) -> Option<f64> {
        *self.average.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a queued job back and interrupts a running one. Blocks on the disk.
    ///
    /// # Errors
    /// The history cannot be written.
    pub fn cancel(&self, id: &str) -> Result<(), ApiError> {
        let taken_back = self.history.cancel_queued(id).map_err(|e| stored(&e))?;
        let live = self.live(id);
        tracing::debug!(id, taken_back, "job cancelled");
        if let Some(live) = live {
            live.leave.cancel();
        }
        Ok(())
    }

    fn live(&self, id: &str) -> Option<Live> {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        live.get(id).cloned()
    }

    fn enter(&self, id: &str, live: Live) {
        let mut all = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(id.to_string(), live);
    }

    fn leave(&self, id: &str) {
        let mut all = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        all.remove(id);
    }

    fn note_seconds(&self, seconds: f64) {
        let mut average = self.average.lock().unwrap_or_else(PoisonError::into_inner);
        *average = Some(average.map_or(seconds, |before| before + (seconds - before) * LATEST));
    }
}

/// An error of the history as an answer.
#[must_use]
pub fn stored(error: &engine::history::Error) -> ApiError {
    ApiError::failure("OSError", with_causes(error))
}

/// Accepts a job and begins its life. `false` if its name is taken. Blocks on the disk.
///
/// # Errors
/// The history cannot be written: the job is not accepted.
pub fn accept(
    app: &Arc<App>,
    job: &NewJob,
    runtime: &tokio::runtime::Handle,
) -> Result<bool, ApiError> {
    let is_new = app.jobs.history.accept(job).map_err(|e| stored(&e))?;
    if is_new {
        let (id, kind, client) = (job.id.clone(), job.kind.clone(), job.client.clone());
        begin(app, (id, kind, client), runtime);
    }
    Ok(is_new)
}

/// Takes up what the last process left: jobs in line, and ends that were not announced. Blocks on the disk.
///
/// # Errors
/// The history cannot be read.
pub fn resume(app: &Arc<App>, runtime: &tokio::runtime::Handle) -> Result<(), ApiError> {
    let queued = app.jobs.history.recover().map_err(|e| stored(&e))?;
    if !queued.is_empty() {
        tracing::info!(
            jobs = queued.len(),
            "jobs of the last run are in line again"
        );
    }
    for Record {
        id, kind, client, ..
    } in queued
    {
        begin(app, (id, kind, client), runtime);
    }
    let ended = app.jobs.history.unannounced().map_err(|e| stored(&e))?;
    for record in ended {
        runtime.spawn(webhook::announce(app.clone(), record));
    }
    Ok(())
}

/// Id, kind and client of a job.
type Name = (String, String, String);

fn begin(app: &Arc<App>, name: Name, runtime: &tokio::runtime::Handle) {
    let (progress, seen) = watch::channel(None);
    let live = Live {
        leave: CancellationToken::new(),
        progress: seen,
    };
    app.jobs.enter(&name.0, live.clone());
    let app = app.clone();
    let tasks = app.tasks.clone();
    tasks.spawn_on(
        async move {
            let id = name.0.clone();
            let end = live_through(&app, &name, &live.leave, &progress).await;
            app.jobs.leave(&id);
            if let Some(end) = end {
                close(&app, id, end).await;
            }
        },
        runtime,
    );
}

/// From the line to the end; `None` if the end is not this process's to note.
async fn live_through(
    app: &Arc<App>,
    (id, kind, client): &Name,
    leave: &CancellationToken,
    progress: &watch::Sender<Option<JobState>>,
) -> Option<End> {
    let place = tokio::select! {
        place = app.engine.reserve(client, id) => place.ok()?,
        () = leave.cancelled() => return Some(End::Cancelled),
    };
    let mut prepared = match prepare(app.clone(), id.clone(), kind.clone()).await {
        Ok(prepared) => prepared,
        Err(error) => return Some(End::Failed(error.message())),
    };
    prepared.job.id.clone_from(id);
    prepared.job.client.clone_from(client);
    let mut handle = app.engine.submit_in(place, prepared.job.clone()).ok()?;
    tokio::select! {
        () = handle.started() => {}
        () = leave.cancelled() => return Some(End::Cancelled),
    }
    let started = Instant::now();
    let (history, begun) = (app.jobs.history.clone(), id.clone());
    let begun = blocking(move || history.begin(&begun).map_err(|e| stored(&e))).await;
    match begun {
        Ok(true) => {}
        // Taken back at the last moment.
        Ok(false) => handle.cancel.interrupt(),
        Err(error) => tracing::error!(
            id,
            error = error.message(),
            "a job's beginning was not noted"
        ),
    }
    let outcome = watched(&mut handle, leave, progress).await;
    let is_ending = app.shutdown.is_cancelled();
    match outcome {
        _ if leave.is_cancelled() => Some(End::Cancelled),
        Ok(outcome) if !(outcome.generated.interrupted && is_ending) => {
            app.jobs.note_seconds(started.elapsed().as_secs_f64());
            let (app, id) = (app.clone(), id.clone());
            let kept = blocking(move || keep(&app, &id, &prepared, &outcome)).await;
            Some(kept.map_or_else(|error| End::Failed(error.message()), End::Done))
        }
        Ok(_) | Err(engine::Error::ShuttingDown) => {
            let (history, id) = (app.jobs.history.clone(), id.clone());
            let back = blocking(move || history.put_back(&id).map_err(|e| stored(&e))).await;
            if let Err(error) = back {
                tracing::warn!(error = error.message(), "job not put back in line");
            }
            None
        }
        Err(error) => Some(End::Failed(with_causes(&error))),
    }
}

/// Reads a job's request again and resolves it, as its route would.
async fn prepare(app: Arc<App>, id: String, kind: String) -> Result<Prepared, ApiError> {
    blocking(move || {
        let request = app.jobs.history.request(&id).map_err(|e| stored(&e))?;
        let request = request.ok_or(ApiError::NotFound)?;
        resolve_as(&app, &kind, request.as_bytes())
    })
    .await
}

/// Checks and resolves a body as the route of its kind does.
///
/// # Errors
/// Those of the route.
pub fn resolve_as(app: &App, kind: &str, body: &[u8]) -> Result<Prepared, ApiError> {
    match kind {
        "img2img" => resolve::img2img(app, fields::read(body, &types::img2img())?),
        _ => resolve::txt2img(app, fields::read(body, &types::txt2img())?),
    }
}

/// Waits for the pictures, passing progress on and a cancellation in.
async fn watched(
    handle: &mut JobHandle,
    leave: &CancellationToken,
    progress: &watch::Sender<Option<JobState>>,
) -> Result<Outcome, engine::Error> {
    let cancel: Arc<CancelToken> = handle.cancel.clone();
    let mut steps = handle.progress.clone();
    let pass_on = async {
        loop {
            progress.send_replace(Some(*steps.borrow_and_update()));
            if steps.changed().await.is_err() {
                return std::future::pending::<()>().await;
            }
        }
    };
    let interrupt = async {
        leave.cancelled().await;
        cancel.interrupt();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        result = handle.finished() => result,
        () = pass_on => unreachable_end(),
        () = interrupt => unreachable_end(),
    }
}

/// The futures beside the result never end.
fn unreachable_end() -> Result<Outcome, engine::Error> {
    Err(engine::Error::ShuttingDown)
}

/// Encodes and writes the pictures; the job's result.
fn keep(app: &App, id: &str, prepared: &Prepared, outcome: &Outcome) -> Result<Value, ApiError> {
    let directory = app.config.data_dir.join("outputs/jobs");
    let day = outcome.job_timestamp.get(..8).unwrap_or_default();
    let mut images = Vec::new();
    for (index, image) in outcome.generated.images.iter().enumerate() {
        let encoded = outputs::encode_image(prepared, image)?;
        let path = imaging::save(&SaveRequest {
            root: &directory,
            subdirectory: day,
            basename: "",
            stem: &format!("{id}-{index}"),
            numbered: false,
            extension: encoded.format.extension(),
            bytes: &encoded.bytes,
            sidecar: None,
        })
        .map_err(|error| ApiError::failure("OSError", with_causes(&error)))?;
        let (width, height) = image.image.dimensions();
        images.push(json!({
            "path": path.display().to_string(),
            "mime": encoded.format.mime(),
            "width": width,
            "height": height,
            "seed": image.seed,
            "infotext": image.infotext,
        }));
    }
    let generated = &outcome.generated;
    Ok(json!({
        "images": images,
        "checkpoint": outcome.model.title,
        "device": outcome.device,
        "comments": generated.comments,
        "interrupted": generated.interrupted,
        "seconds": {
            "load": outcome.load_seconds,
            "text": generated.timings.text.as_secs_f64(),
            "sample": generated.timings.sample.as_secs_f64(),
            "decode": generated.timings.decode.as_secs_f64(),
        },
    }))
}

/// Notes a job's end, once, and announces it.
async fn close(app: &Arc<App>, id: String, end: End) {
    let keep = app.config.server.jobs_kept;
    let history = app.jobs.history.clone();
    let noted = blocking(move || {
        history.end(&id, &end).map_err(|e| stored(&e))?;
        history.prune(keep).map_err(|e| stored(&e))?;
        history.get(&id).map_err(|e| stored(&e))
    })
    .await;
    match noted {
        Ok(Some(record)) if record.webhook.is_some() => {
            tokio::spawn(webhook::announce(app.clone(), record));
        }
        Ok(_) => {}
        Err(error) => tracing::error!(error = error.message(), "a job's end was not noted"),
    }
}
