//! Log lines to stderr, and the names of all metrics.
//!
//! `info` is what an operator wants once a job, `debug` once a stage, `trace` once a layer. Prompts and secrets are never
//! logged above `debug`.

pub mod metrics;

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// Names of metrics; base units, Prometheus suffixes.
pub mod metric {
    /// Jobs ended, by `result` (`done`, `failed`, `interrupted`, `abandoned`).
    pub const JOBS_TOTAL: &str = "sdgen_jobs_total";
    /// Jobs waiting.
    pub const QUEUE_LENGTH: &str = "sdgen_queue_length";
    /// Seconds of one denoising step.
    pub const STEP_SECONDS: &str = "sdgen_step_seconds";
    /// Seconds of one checkpoint load.
    pub const MODEL_LOAD_SECONDS: &str = "sdgen_model_load_seconds";
    /// Bytes in use on the device.
    pub const DEVICE_MEMORY_BYTES: &str = "sdgen_device_memory_bytes";
    /// Bytes that could be allocated on a device when its last job ended, by `device`.
    pub const DEVICE_FREE_MEMORY_BYTES: &str = "sdgen_device_free_memory_bytes";
    /// Jobs that have ended on a device, by `device`.
    pub const DEVICE_JOBS_TOTAL: &str = "sdgen_device_jobs_total";
    /// 1 while a device runs a job, by `device`.
    pub const DEVICE_RUNNING: &str = "sdgen_device_running";
    /// 0 while a device takes no jobs because it keeps failing or its thread has ended, by `device`.
    pub const DEVICE_IN_SERVICE: &str = "sdgen_device_in_service";
    /// Resident bytes of the process.
    pub const MEMORY_BYTES: &str = "sdgen_memory_bytes";
    /// Previews made.
    pub const PREVIEWS_TOTAL: &str = "sdgen_previews_total";
    /// Attempts to deliver a webhook, by `result` (`done`, `failed`).
    pub const WEBHOOKS_TOTAL: &str = "sdgen_webhooks_total";
    /// Requests answered, by `method`, `route` and `status`.
    pub const HTTP_REQUESTS_TOTAL: &str = "sdgen_http_requests_total";
    /// Seconds from a request's head to its answer's, by `method` and `route`.
    pub const HTTP_REQUEST_SECONDS: &str = "sdgen_http_request_seconds";
}

/// Starts logging for this process. A second call changes nothing.
pub fn init(log: &Log) {
    // `Config::validate` has parsed the filter before.
    let filter = EnvFilter::try_new(&log.level).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // A line that cannot be written is lost; reporting that on the same stderr would panic.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    let result = match log.format {
        LogFormat::Text => builder
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false)
            .try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    if result.is_err() {
        tracing::debug!("logging was already started");
    }
}

/// Largest resident size of this process so far, in bytes; `None` where the system does not say.
#[must_use]
pub fn peak_memory_bytes() -> Option<u64> {
    memory_bytes("VmHWM:")
}

/// Resident size of this process, in bytes; `None` where the system does not say.
#[must_use]
pub fn resident_memory_bytes() -> Option<u64> {
    memory_bytes("VmRSS:")
}

fn memory_bytes(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
