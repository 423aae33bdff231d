//! Progress, interrupt and skip: answers that never wait for a job.
//!
//! A1111 knows one running job, sdgen has one for each device. Who names no job is shown, and stops, the one of its own that has
//! run longest, else the one of anybody's: what a client sees is what it stops. [`crate::engine::status::Status::shown`] chooses.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, State};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::body::Body;
use super::client::Client;
use super::error::{ApiError, with_causes};
use super::types::{TASK_PROGRESS, text};
use super::{App, blocking, fields};
use crate::engine::previews::Preview;
use crate::engine::status::WorkerStatus;
use crate::imaging::{self, EncodeOptions, Format};

/// `GET /sdapi/v1/progress`: exactly A1111's five keys; all zeros when idle.
///
/// # Errors
/// A `skip_current_image` that is no boolean.
pub async fn progress(
    State(app): State<Arc<App>>,
    client: Client,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, ApiError> {
    let skip_image = skip_current_image(query.as_deref().unwrap_or_default())?;
    let status = app.engine.status();
    let worker = status.shown(&client.0);
    let mut current_image = Value::Null;
    if !skip_image && worker.running.is_some() {
        let format = app
            .options
            .snapshot()
            .text("samples_format")
            .parse()
            .unwrap_or_default();
        current_image = encode_preview(&app, worker.number, format)
            .await?
            .map_or(Value::Null, |(base64, _)| Value::String(base64));
    }
    Ok(Json(json!({
        "progress": worker.fraction(),
        "eta_relative": worker.eta_seconds(),
        "state": state(worker),
        "current_image": current_image,
        "textinfo": worker.loading.as_ref().map(|title| format!("Loading {title}")),
    })))
}

/// `POST /sdapi/v1/interrupt`.
pub async fn interrupt(State(app): State<Arc<App>>, client: Client) -> Json<Value> {
    app.engine.interrupt(&client.0);
    Json(json!({}))
}

/// `POST /sdapi/v1/skip`.
pub async fn skip(State(app): State<Arc<App>>, client: Client) -> Json<Value> {
    app.engine.skip(&client.0);
    Json(Value::Null)
}

/// `POST /internal/progress`: one task's progress, by its id.
///
/// # Errors
/// A field of a wrong type, or no `id_task`.
pub async fn task_progress(
    State(app): State<Arc<App>>,
    Body(body, _): Body,
) -> Result<Json<Value>, ApiError> {
    let model = fields::read(&body, TASK_PROGRESS)?;
    let Some(id) = text(&model, "id_task") else {
        return Err(vec![super::error::Problem::field(
            "id_task",
            "field required",
            "value_error.missing",
        )]
        .into());
    };
    let status = app.engine.status();
    let pending = app.engine.pending();
    let worker = status.of_job(id);
    let position = pending.iter().position(|waiting| waiting == id);
    let completed = status.finished.iter().any(|finished| finished == id);
    let textinfo = match position {
        Some(position) => format!("In queue: {}/{}", position + 1, pending.len()),
        None => "Waiting...".to_string(),
    };
    let seen = model
        .get("id_live_preview")
        .and_then(Value::as_i64)
        .unwrap_or(-1);
    let wanted = model.get("live_preview").and_then(Value::as_bool);
    let (live_preview, id_live_preview) = match worker {
        Some(worker) if wanted.unwrap_or(true) => live_preview(&app, worker.number, seen).await?,
        _ => (Value::Null, -1),
    };
    Ok(Json(json!({
        "active": worker.is_some(),
        "queued": position.is_some(),
        "completed": completed,
        "progress": worker.map(WorkerStatus::fraction),
        "eta": worker.map(WorkerStatus::eta_seconds),
        "live_preview": live_preview,
        "id_live_preview": id_live_preview,
        "textinfo": worker.is_none().then_some(textinfo),
    })))
}

/// The preview as a data URL with its number, or nothing if it is the one that was `seen`.
async fn live_preview(app: &Arc<App>, worker: usize, seen: i64) -> Result<(Value, i64), ApiError> {
    let options = app.options.snapshot();
    let format = options.text("live_previews_image_format");
    let format: Format = format.parse().unwrap_or_default();
    Ok(match encode_preview(app, worker, format).await? {
        Some((base64, number)) if number != seen => {
            let url = format!("data:{};base64,{base64}", format.mime());
            (Value::String(url), number)
        }
        _ => (Value::Null, seen),
    })
}

/// `GET /internal/pending-tasks`.
pub async fn pending_tasks(State(app): State<Arc<App>>) -> Json<Value> {
    let tasks = app.engine.pending();
    Json(json!({ "size": tasks.len(), "tasks": tasks }))
}

/// A1111's nine keys of `state`.
fn state(worker: &WorkerStatus) -> Value {
    let running = worker.running.as_ref();
    let batches = worker.progress.batches;
    let job = match running {
        None => String::new(),
        Some(_) if batches > 1 => format!(
            "Batch {} out of {batches}",
            (worker.progress.batch + 1).min(batches)
        ),
        Some(running) if running.kind == "extras" => "extras".into(),
        Some(running) => format!("scripts_{}", running.kind),
    };
    let timestamp = if worker.job_timestamp.is_empty() {
        "0"
    } else {
        &worker.job_timestamp
    };
    json!({
        "skipped": worker.skipped,
        "interrupted": worker.interrupted,
        "stopping_generation": false,
        "job": job,
        "job_count": if running.is_some() { batches } else { 0 },
        "job_timestamp": timestamp,
        "job_no": worker.progress.batch,
        "sampling_step": worker.progress.step,
        "sampling_steps": worker.progress.steps,
    })
}

/// The latest preview of a worker's job as base64, with its number.
pub(super) async fn encode_preview(
    app: &Arc<App>,
    worker: usize,
    format: Format,
) -> Result<Option<(String, i64)>, ApiError> {
    let Some(Preview { id, image }) = app.engine.preview(worker) else {
        return Ok(None);
    };
    let encode = move || {
        let encoded = imaging::encode(
            &*image,
            &EncodeOptions {
                format,
                ..EncodeOptions::default()
            },
        )
        .map_err(|error| ApiError::failure("ValueError", with_causes(&error)))?;
        Ok(Some((STANDARD.encode(encoded.bytes), id as i64)))
    };
    blocking(encode).await
}

/// Unknown query names are ignored; of a repeated one the last counts.
fn skip_current_image(query: &str) -> Result<bool, ApiError> {
    let mut values = query
        .split('&')
        .filter_map(|pair| pair.strip_prefix("skip_current_image="));
    let Some(value) = values.next_back() else {
        return Ok(false);
    };
    match fields::coerce("skip_current_image", fields::Kind::Bool, Value::from(value)) {
        Ok(flag) => Ok(flag == Value::Bool(true)),
        Err(mut problems) => {
            for problem in &mut problems {
                problem.loc = vec![json!("query"), json!("skip_current_image")];
            }
            Err(problems.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_idle_state_is_exactly_a1111s() {
        let expected = r#"{"skipped":false,"interrupted":false,"stopping_generation":false,"job":"","job_count":0,"job_timestamp":"0","job_no":0,"sampling_step":0,"sampling_steps":0}"#;
        assert_eq!(state(&WorkerStatus::default()).to_string(), expected);
    }

    #[test]
    fn the_query_is_read_leniently() {
        assert!(!skip_current_image("").unwrap());
        assert!(skip_current_image("skipCurrentImage=zzz&skip_current_image=1").unwrap());
        assert!(skip_current_image("skip_current_image=maybe").is_err());
    }
}
