//! `GET /metrics`: Prometheus text.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::App;
use crate::engine::status::Service;
use crate::telemetry;
use crate::telemetry::metrics::{DeviceGauges, Gauges, render};

/// Every metric of this process.
pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    let status = app.engine.status();
    let devices: Vec<DeviceGauges> = status
        .workers
        .into_iter()
        .map(|worker| DeviceGauges {
            is_running: worker.running.is_some(),
            is_in_service: worker.service == Service::Open,
            ended: worker.ended,
            free_memory_bytes: worker.free_memory,
            device: worker.device,
        })
        .collect();
    // A device that is the host uses the host's memory.
    let is_host = devices.iter().any(|one| one.device == "cpu");
    let text = render(&Gauges {
        queue_length: app.engine.pending().len(),
        device_memory_bytes: telemetry::resident_memory_bytes().filter(|_| is_host),
        devices,
    });
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}
