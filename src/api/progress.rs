//! Progress, interrupt and skip: answers that never wait for a job.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, State};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::body::Body;
use super::error::{ApiError, with_causes};
use super::types::{TASK_PROGRESS, text};
use super::{App, blocking, fields};
use crate::engine::status::Status;
use crate::engine::worker::Preview;
use crate::imaging::{self, EncodeOptions, Format};

/// `GET /sdapi/v1/progress`: exactly A1111's five keys; all zeros when idle.
///
/// # Errors
/// A `skip_current_image` that is no boolean.
pub async fn progress(
    State(app): State<Arc<App>>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, ApiError> {
    let skip_image = skip_current_image(query.as_deref().unwrap_or_default())?;
    let status = app.engine.status();
    let mut current_image = Value::Null;
    if !skip_image && status.running.is_some() {
        let format = app
            .options
            .snapshot()
            .text("samples_format")
            .parse()
            .unwrap_or_default();
        current_image = encode_preview(&app, format)
            .await?
            .map_or(Value::Null, |(base64, _)| Value::String(base64));
    }
    Ok(Json(json!({
        "progress": status.fraction(),
        "eta_relative": status.eta_seconds(),
        "state": state(&status),
        "current_image": current_image,
        "textinfo": status.loading.as_ref().map(|title| format!("Loading {title}")),
    })))
}

/// `POST /sdapi/v1/interrupt`.
pub async fn interrupt(State(app): State<Arc<App>>) -> Json<Value> {
    app.engine.interrupt();
    Json(json!({}))
}

/// `POST /sdapi/v1/skip`.
pub async fn skip(State(app): State<Arc<App>>) -> Json<Value> {
    app.engine.skip();
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
    let active = status
        .running
        .as_ref()
        .is_some_and(|running| running.id == id);
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
    let (live_preview, id_live_preview) = if active && wanted.unwrap_or(true) {
        live_preview(&app, seen).await?
    } else {
        (Value::Null, -1)
    };
    Ok(Json(json!({
        "active": active,
        "queued": position.is_some(),
        "completed": completed,
        "progress": active.then(|| status.fraction()),
        "eta": active.then(|| status.eta_seconds()),
        "live_preview": live_preview,
        "id_live_preview": id_live_preview,
        "textinfo": if active { Value::Null } else { Value::String(textinfo) },
    })))
}

/// The preview as a data URL with its number, or nothing if it is the one that was `seen`.
async fn live_preview(app: &Arc<App>, seen: i64) -> Result<(Value, i64), ApiError> {
    let options = app.options.snapshot();
    let format = options.text("live_previews_image_format");
    let format: Format = format.parse().unwrap_or_default();
    Ok(match encode_preview(app, format).await? {
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
fn state(status: &Status) -> Value {
    let running = status.running.as_ref();
    let batches = status.progress.batches;
    let job = match running {
        None => String::new(),
        Some(_) if batches > 1 => format!(
            "Batch {} out of {batches}",
            (status.progress.batch + 1).min(batches)
        ),
        Some(running) if running.kind == "extras" => "extras".into(),
        Some(running) => format!("scripts_{}", running.kind),
    };
    let timestamp = if status.job_timestamp.is_empty() {
        "0"
    } else {
        &status.job_timestamp
    };
    json!({
        "skipped": status.skipped,
        "interrupted": status.interrupted,
        "stopping_generation": false,
        "job": job,
        "job_count": if running.is_some() { batches } else { 0 },
        "job_timestamp": timestamp,
        "job_no": status.progress.batch,
        "sampling_step": status.progress.step,
        "sampling_steps": status.progress.steps,
    })
}

/// The latest preview as base64, with its number.
pub(super) async fn encode_preview(
    app: &Arc<App>,
    format: Format,
) -> Result<Option<(String, i64)>, ApiError> {
    let Some(Preview { id, image }) = app.engine.preview() else {
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
        assert_eq!(state(&Status::default()).to_string(), expected);
    }

    #[test]
    fn the_query_is_read_leniently() {
        assert!(!skip_current_image("").unwrap());
        assert!(skip_current_image("skipCurrentImage=zzz&skip_current_image=1").unwrap());
        assert!(skip_current_image("skip_current_image=maybe").is_err());
    }
}
