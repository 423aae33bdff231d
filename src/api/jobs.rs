//! `/v1/jobs`: jobs that outlive their request. Submit, list, look, watch, cancel, forget, and fetch what came of them.
//!
//! A job is answered 202 once it is on disk; from then on it ends exactly once, whatever happens to client and server. Times
//! are milliseconds since 1970.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::body::Body;
use super::client::Client;
use super::error::{ApiError, Problem};
use super::extract::{Path, Query};
use super::job_runner::{self, stored};
use super::{App, blocking, fields, webhook};
use crate::engine::JobState;
use crate::engine::history::{Filter, NewJob, Record, State as Stage};
use crate::engine::status::WorkerStatus;

/// Kinds of jobs there are.
const KINDS: [&str; 2] = ["txt2img", "img2img"];
/// Most jobs of one list.
const LONGEST_LIST: u32 = 500;
/// Bytes of a client's own job name.
const LONGEST_ID: usize = 128;
/// Characters of a prompt that lists show.
const TITLE: usize = 200;

/// The fields of a submission.
#[derive(Debug, Deserialize)]
struct Submission {
    #[serde(rename = "type", default)]
    kind: Option<String>,
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    webhook: Option<String>,
    #[serde(default)]
    request: Option<Map<String, Value>>,
}

/// `POST /v1/jobs`: `{"type": "txt2img", "request": {…}, "webhook": "https://…", "id": "…"}`, where `request` is the body of the
/// A1111 route of that name. A name that is taken gives back the job that has it.
///
/// # Errors
/// 422 for what the route itself would refuse, 429 when too many jobs wait.
pub async fn submit(
    State(app): State<Arc<App>>,
    client: Client,
    Body(body, _): Body,
) -> Result<Response, ApiError> {
    let runtime = tokio::runtime::Handle::current();
    blocking(move || {
        let job = checked(&app, client, &body)?;
        if let Some(record) = app.jobs.history().get(&job.id).map_err(|e| stored(&e))? {
            return Ok((StatusCode::OK, Json(view(&app, &record))).into_response());
        }
        let counts = app.jobs.history().counts().map_err(|e| stored(&e))?;
        let queued = counts.iter().find(|(state, _)| *state == Stage::Queued);
        let waiting = queued.map_or(0, |(_, count)| *count as usize);
        let limit = app.config.server.jobs_limit;
        if waiting >= limit {
            let seconds = waiting as f64 * app.jobs.average_seconds().unwrap_or(1.0);
            return Err(ApiError::TooMany {
                message: format!(
                    "{waiting} jobs wait, as many as may (setting `server.jobs_limit`)"
                ),
                retry_after: (seconds / limit.max(1) as f64).clamp(1.0, 3600.0) as u64,
            });
        }
        job_runner::accept(&app, &job, &runtime)?;
        let record = app.jobs.history().get(&job.id).map_err(|e| stored(&e))?;
        let record = record.ok_or(ApiError::NotFound)?;
        let location = HeaderValue::from_str(&format!("/v1/jobs/{}", job.id));
        let mut answer = (StatusCode::ACCEPTED, Json(view(&app, &record))).into_response();
        if let Ok(location) = location {
            answer.headers_mut().insert(header::LOCATION, location);
        }
        Ok(answer)
    })
    .await
}

/// A submission whose request its route would take.
fn checked(app: &App, client: Client, body: &[u8]) -> Result<NewJob, ApiError> {
    let object = fields::parse_object(body)?;
    let submission: Submission = serde_json::from_value(Value::Object(object))
        .map_err(|error| vec![Problem::limit("job", error.to_string())])?;
    let kind = submission.kind.unwrap_or_else(|| KINDS[0].to_string());
    let mut problems = Vec::new();
    if !KINDS.contains(&kind.as_str()) {
        let message = format!("must be one of `{}`: `{kind}`", KINDS.join("`, `"));
        problems.push(Problem::limit("type", message));
    }
    let id = submission.id.unwrap_or_else(new_id);
    let is_name = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    if id.is_empty() || id.len() > LONGEST_ID || !id.bytes().all(is_name) || id.starts_with('.') {
        let message = format!("must have 1 to {LONGEST_ID} letters, digits, `-`, `_` or `.`");
        problems.push(Problem::limit("id", message));
    }
    if let Some(Err(message)) = submission.webhook.as_deref().map(webhook::check) {
        problems.push(Problem::limit("webhook", message));
    }
    let Some(request) = submission.request else {
        problems.push(Problem::field(
            "request",
            "field required",
            "value_error.missing",
        ));
        return Err(problems.into());
    };
    if !problems.is_empty() {
        return Err(problems.into());
    }
    let request = Value::Object(request).to_string();
    let prepared = job_runner::resolve_as(app, &kind, request.as_bytes())?;
    Ok(NewJob {
        id,
        kind,
        client: client.0,
        title: prepared.job.request.prompt.chars().take(TITLE).collect(),
        request,
        webhook: submission.webhook,
    })
}

fn new_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// The query of a list.
#[derive(Debug, Default, Deserialize)]
pub struct ListQuery {
    state: Option<Stage>,
    client: Option<String>,
    search: Option<String>,
    before: Option<String>,
    limit: Option<u32>,
}

/// `GET /v1/jobs?state=&client=&search=&before=&limit=`: newest first; `before` is the last id of the page before.
///
/// # Errors
/// The history cannot be read.
pub async fn list(
    State(app): State<Arc<App>>,
    Query(query): Query<ListQuery>,
) -> Result<Json<Value>, ApiError> {
    blocking(move || {
        let filter = Filter {
            state: query.state,
            client: query.client,
            search: query.search,
            before: query.before,
            limit: query.limit.unwrap_or(50).clamp(1, LONGEST_LIST),
        };
        let history = app.jobs.history();
        let records = history.list(&filter).map_err(|e| stored(&e))?;
        let counts = history.counts().map_err(|e| stored(&e))?;
        let counts: Map<String, Value> = counts
            .into_iter()
            .map(|(state, count)| (state.name().to_string(), json!(count)))
            .collect();
        let jobs: Vec<Value> = records.iter().map(|record| view(&app, record)).collect();
        Ok(Json(json!({ "jobs": jobs, "counts": counts })))
    })
    .await
}

/// `GET /v1/jobs/{id}`.
///
/// # Errors
/// 404 for an unknown job.
pub async fn get(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    blocking(move || Ok(Json(view(&app, &find(&app, &id)?)))).await
}

/// `POST /v1/jobs/{id}/cancel`: takes a queued job back, interrupts a running one; one that has ended stays as it is.
///
/// # Errors
/// 404 for an unknown job.
pub async fn cancel(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    blocking(move || {
        find(&app, &id)?;
        app.jobs.cancel(&id)?;
        Ok(Json(view(&app, &find(&app, &id)?)))
    })
    .await
}

/// `DELETE /v1/jobs/{id}`: forgets a job that has ended, with its files.
///
/// # Errors
/// 404 for an unknown job, 409 for one that has not ended.
pub async fn forget(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    blocking(move || {
        find(&app, &id)?;
        let forgotten = app.jobs.history().forget(&id).map_err(|e| stored(&e))?;
        let Some(record) = forgotten else {
            let message = "the job has not ended; cancel it first".to_string();
            return Err(ApiError::Http(StatusCode::CONFLICT, message));
        };
        for path in files(&record) {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::debug!(path, %error, "file of a forgotten job not removed");
            }
        }
        Ok(Json(json!({ "id": record.id, "forgotten": true })))
    })
    .await
}

/// `GET /v1/jobs/{id}/result`: the pictures as base64, beside what is known of them.
///
/// # Errors
/// 404 for an unknown job, 409 for one without pictures, 410 for files that are gone.
pub async fn result(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    blocking(move || {
        let record = ended(&app, &id)?;
        let mut images = Vec::new();
        for path in files(&record) {
            images.push(STANDARD.encode(read(path)?));
        }
        Ok(Json(
            json!({ "id": record.id, "images": images, "info": record.result }),
        ))
    })
    .await
}

/// `GET /v1/jobs/{id}/images/{n}`: picture `n`, from 0, as a file.
///
/// # Errors
/// Those of [`result`]; 404 for a picture that there is not.
pub async fn image(
    State(app): State<Arc<App>>,
    Path((id, number)): Path<(String, usize)>,
) -> Result<Response, ApiError> {
    blocking(move || {
        let record = ended(&app, &id)?;
        let path = files(&record).nth(number).ok_or(ApiError::NotFound)?;
        let mime = record.result.as_ref().and_then(|result| {
            result["images"][number]["mime"]
                .as_str()
                .map(str::to_string)
        });
        let mime = mime.unwrap_or_else(|| "application/octet-stream".into());
        Ok(([(header::CONTENT_TYPE, mime)], read(path)?).into_response())
    })
    .await
}

pub(super) fn find(app: &App, id: &str) -> Result<Record, ApiError> {
    let found = app.jobs.history().get(id).map_err(|e| stored(&e))?;
    found.ok_or(ApiError::NotFound)
}

fn ended(app: &App, id: &str) -> Result<Record, ApiError> {
    let record = find(app, id)?;
    match record.state {
        Stage::Done => Ok(record),
        state => Err(ApiError::Http(
            StatusCode::CONFLICT,
            format!("the job has no pictures: it is {}", state.name()),
        )),
    }
}

/// Paths of a job's pictures.
fn files(record: &Record) -> impl Iterator<Item = &str> {
    let images = record
        .result
        .as_ref()
        .and_then(|result| result["images"].as_array());
    images
        .into_iter()
        .flatten()
        .filter_map(|image| image["path"].as_str())
}

fn read(path: &str) -> Result<Vec<u8>, ApiError> {
    std::fs::read(path).map_err(|error| {
        tracing::warn!(path, %error, "picture of a job cannot be read");
        ApiError::Http(StatusCode::GONE, "the picture's file is gone".into())
    })
}

/// A job as clients see it.
#[must_use]
pub fn view(app: &App, record: &Record) -> Value {
    let mut progress = Value::Null;
    let (mut position, mut eta, mut device) = (Value::Null, Value::Null, Value::Null);
    let status = app.engine.status();
    match (record.state, app.jobs.progress(&record.id)) {
        (Stage::Queued | Stage::Running, Some(JobState::Running(at))) => {
            let worker = status.of_job(&record.id);
            progress = json!({
                "step": at.step, "steps": at.steps, "batch": at.batch, "batches": at.batches,
                "fraction": worker.map_or(0.0, WorkerStatus::fraction),
            });
            eta = json!(worker.map_or(0.0, WorkerStatus::eta_seconds));
            device = json!(worker.map(|worker| &worker.device));
        }
        (Stage::Queued, _) => {
            let pending = app.engine.pending();
            if let Some(before) = pending.iter().position(|id| *id == record.id) {
                position = json!(before + 1);
                let seconds = app.jobs.average_seconds();
                eta = json!(seconds.map(|one| status.wait_seconds(before, one) + one));
            }
        }
        _ => {}
    }
    let base = format!("/v1/jobs/{}", record.id);
    json!({
        "id": record.id,
        "type": record.kind,
        "client": record.client,
        "state": record.state,
        "title": record.title,
        "position": position,
        "progress": progress,
        "eta_seconds": eta,
        "device": device,
        "attempts": record.attempts,
        "created": record.created,
        "started": record.started,
        "finished": record.finished,
        "result": record.result,
        "error": record.error,
        "links": { "self": base, "events": format!("{base}/events"), "result": format!("{base}/result"), "cancel": format!("{base}/cancel") },
    })
}
