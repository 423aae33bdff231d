//! `POST /sdapi/v1/txt2img` and `img2img`.
//!
//! The request blocks until its pictures are made, as in A1111. A client that leaves while queued takes its job with it; once
//! the job runs it goes on without the client, and its files are still written.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value};

use super::body::Body;
use super::client::Client;
use super::error::ApiError;
use super::infotext::{self, Tab};
use super::middleware::Incompressible;
use super::resolve::{self, Prepared};
use super::{App, blocking, fields, outputs};
use crate::engine::{self, JobHandle};

/// Makes pictures from a prompt.
///
/// # Errors
/// Whatever the request or the job fails with.
pub async fn txt2img(
    State(app): State<Arc<App>>,
    client: Client,
    Body(body, _): Body,
) -> Result<Response, ApiError> {
    run(app, (client, body), Tab::Txt2img, resolve::txt2img).await
}

/// Makes pictures from pictures.
///
/// # Errors
/// Whatever the request or the job fails with.
pub async fn img2img(
    State(app): State<Arc<App>>,
    client: Client,
    Body(body, _): Body,
) -> Result<Response, ApiError> {
    run(app, (client, body), Tab::Img2img, resolve::img2img).await
}

async fn run(
    app: Arc<App>,
    (client, body): (Client, Bytes),
    tab: Tab,
    prepare: fn(&App, Map<String, Value>) -> Result<Prepared, ApiError>,
) -> Result<Response, ApiError> {
    let for_check = app.clone();
    let mut prepared = blocking(move || {
        let mut sent = fields::parse_object(&body)?;
        drop(body);
        infotext::fill(&for_check, &mut sent, tab);
        let wire = fields::complete(sent, &tab.fields())?;
        prepare(&for_check, wire)
    })
    .await?;
    prepared.job.client = client.0;
    let mut handle = app.engine.submit(prepared.job.clone()).await?;
    handle.started().await;
    let task = app.tasks.spawn(finish(app.clone(), handle, prepared));
    let answer = task
        .await
        .map_err(|error| ApiError::failure("RuntimeError", error.to_string()))??;
    let mut response = Json(answer).into_response();
    response.extensions_mut().insert(Incompressible);
    Ok(response)
}

async fn finish(
    app: Arc<App>,
    mut handle: JobHandle,
    prepared: Prepared,
) -> Result<Value, ApiError> {
    let outcome = handle.finished().await?;
    let nothing_made = outcome.generated.images.is_empty() && outcome.generated.interrupted;
    if nothing_made && app.shutdown.is_cancelled() {
        return Err(engine::Error::ShuttingDown.into());
    }
    blocking(move || outputs::answer(&prepared, outcome, &app.config.data_dir)).await
}
