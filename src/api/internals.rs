//! What A1111's own page asks about the server: system information, the names of all settings, how long the start took.
//!
//! Invariant: no credential leaves through them, whichever way it was given (`cmd-flags` keeps to the same list).

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::App;
use super::system::ram;
use crate::config::{VERSION_TEXT, env};

/// Shown in place of a credential.
const HIDDEN: &str = "<hidden>";
/// A flag or variable with one of these in its name holds a credential.
const SECRET: [&str; 6] = ["auth", "token", "password", "secret", "key", "ngrok"];

/// How long the parts of the start took.
static STARTUP: OnceLock<Vec<(&str, Duration)>> = OnceLock::new();

/// Notes when the server has begun to listen; `begun` is when its start began.
pub fn note_start(begun: Instant) {
    let _ = STARTUP.set(vec![("listen and resume jobs", begun.elapsed())]);
}

/// `GET /internal/profile-startup`: seconds by step.
pub async fn profile_startup() -> Json<Value> {
    Json(startup())
}

fn startup() -> Value {
    let steps = STARTUP.get().map(Vec::as_slice).unwrap_or_default();
    let seconds = |duration: &Duration| (duration.as_secs_f64() * 1e4).round() / 1e4;
    let records: Map<String, Value> = steps
        .iter()
        .map(|(step, took)| ((*step).to_string(), json!(seconds(took))))
        .collect();
    let total: Duration = steps.iter().map(|(_, took)| *took).sum();
    json!({ "total": seconds(&total), "records": records })
}

/// `GET /internal/quicksettings-hint`: every option, with its name as words.
pub async fn quicksettings_hint(State(app): State<Arc<App>>) -> Json<Value> {
    let options = app.options.snapshot();
    let row = |name: &String| json!({ "name": name, "label": name.replace('_', " ") });
    Json(options.as_map().keys().map(row).collect())
}

/// `GET /internal/sysinfo`: JSON as text.
pub async fn sysinfo(State(app): State<Arc<App>>) -> Response {
    (
        [(header::CONTENT_TYPE, "text/plain; charset=utf-8")],
        report(&app),
    )
        .into_response()
}

/// `GET /internal/sysinfo-download`: the same as a file.
pub async fn sysinfo_download(State(app): State<Arc<App>>) -> Response {
    let time = chrono::Local::now().format("%Y-%m-%d-%H-%M");
    let name = format!("attachment; filename=\"sysinfo-{time}.json\"");
    let headers = [
        (
            header::CONTENT_TYPE,
            "text/plain; charset=utf-8".to_string(),
        ),
        (header::CONTENT_DISPOSITION, name),
    ];
    (headers, report(&app)).into_response()
}

fn report(app: &App) -> String {
    let gib = |bytes: f64| format!("{:.1}GB", bytes / f64::from(1 << 30));
    let memory = ram().map(|(total, used)| json!({ "total": gib(total), "used": gib(used) }));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let devices = app.engine.devices().iter();
    let devices: Vec<Value> = devices
        .map(|device| json!({ "name": device.device, "dtype": device.dtype }))
        .collect();
    let report = json!({
        "Platform": format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH),
        "Version": VERSION_TEXT,
        "Commit": format!("sdgen {}", env!("CARGO_PKG_VERSION")),
        "Data path": app.config.data_dir,
        "Commandline": without_secrets(std::env::args()),
        "Device": devices[0],
        "Devices": devices,
        "Exceptions": [],
        "CPU": { "model": std::env::consts::ARCH, "count logical": cores },
        "RAM": memory,
        "Extensions": [],
        "Inactive extensions": [],
        "Environment": environment(),
        "Config": app.options.snapshot().as_map(),
        "Startup": startup(),
    });
    serde_json::to_string_pretty(&report).unwrap_or_default()
}

/// Those variables that change what the server does.
fn environment() -> Map<String, Value> {
    let lists = [env::A1111_ARGS, env::COMMANDLINE_ARGS];
    let shown = |name: &str, value: String| {
        if is_secret(name) {
            HIDDEN.into()
        } else if lists.contains(&name) {
            let words = shlex::split(&value).unwrap_or_default();
            without_secrets(words.into_iter()).join(" ")
        } else {
            value
        }
    };
    let ours = std::env::vars().filter(|(name, _)| {
        name.starts_with("SDGEN_") || lists.contains(&name.as_str()) || name == env::WORKSPACE
    });
    ours.map(|(name, value)| {
        let value = shown(&name, value);
        (name, Value::from(value))
    })
    .collect()
}

/// A command line whose credentials are hidden.
fn without_secrets(words: impl Iterator<Item = String>) -> Vec<String> {
    let mut hides = false;
    let mut shown = Vec::new();
    for word in words {
        let flag = word.strip_prefix("--");
        if hides && flag.is_none() {
            shown.push(HIDDEN.to_string());
            continue;
        }
        hides = false;
        let Some(flag) = flag else {
            shown.push(word);
            continue;
        };
        let name = flag.split('=').next().unwrap_or(flag);
        if !is_secret(name) {
            shown.push(word);
        } else if flag.contains('=') {
            shown.push(format!("--{name}={HIDDEN}"));
        } else {
            hides = true;
            shown.push(word);
        }
    }
    shown
}

/// Whether a flag or variable of this name holds a credential.
fn is_secret(name: &str) -> bool {
    let name = name.to_lowercase();
    SECRET.iter().any(|part| name.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_hidden_in_both_spellings() {
        let words =
            "sdgen serve --api-auth a:b,c:d --port 1 --gradio-auth=e:f --api-token x y --listen";
        let shown = without_secrets(words.split(' ').map(String::from)).join(" ");
        assert_eq!(
            shown,
            "sdgen serve --api-auth <hidden> --port 1 --gradio-auth=<hidden> --api-token <hidden> <hidden> --listen"
        );
    }
}
