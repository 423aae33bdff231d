//! The server itself: health, flags, memory, the page at `/`, and ending it from outside.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{Html, IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::{App, Readiness};
use crate::config::{Config, a1111};

const PAGE: &str = "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>sdgen</title>\n<h1>sdgen</h1>\n\
<p>Stable Diffusion XL with A1111's REST API under <code>/sdapi/v1</code>.</p>\n</html>\n";

/// `GET /`.
pub async fn root() -> Html<&'static str> {
    Html(PAGE)
}

/// `GET /internal/ping`.
pub async fn ping() -> Json<Value> {
    Json(json!({}))
}

/// `GET /healthz`: the process answers.
pub async fn healthz() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

/// `GET /readyz`: 200 once a picture could be made, else 503 with the reason.
pub async fn readyz(State(app): State<Arc<App>>) -> Response {
    let readiness = app
        .readiness
        .read()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let is_loaded = app.engine.status().is_loaded();
    let reason = match readiness {
        _ if app.shutdown.is_cancelled() => "shutting down".to_string(),
        Readiness::Failed(reason) if !is_loaded => format!("checkpoint not loaded: {reason}"),
        Readiness::Loading if !is_loaded => "loading the checkpoint".to_string(),
        Readiness::Loading | Readiness::Ready | Readiness::Failed(_) => {
            return Json(json!({ "status": "ready" })).into_response();
        }
    };
    (
        StatusCode::SERVICE_UNAVAILABLE,
        Json(json!({ "status": "not ready", "reason": reason })),
    )
        .into_response()
}

/// Flags whose value is a secret, or where one lies.
const SECRETS: [&str; 5] = [
    "api_auth",
    "gradio_auth",
    "gradio_auth_path",
    "ngrok",
    "ngrok_options",
];

/// `GET /sdapi/v1/cmd-flags`: every flag by destination name; secrets hidden, directories absolute.
pub async fn cmd_flags(State(app): State<Arc<App>>) -> Json<Value> {
    let absent = |takes_value: bool| (!takes_value).then_some(false);
    let mut flags: Map<String, Value> = a1111::flag_names()
        .map(|(name, takes_value)| (name.replace('-', "_"), json!(absent(takes_value))))
        .collect();
    flags.extend(app.config.a1111_flags.clone());
    for name in SECRETS {
        let given = flags.get(name).is_some_and(|value| !value.is_null());
        let shown = given.then_some("<hidden>");
        flags.insert(name.into(), json!(shown));
    }
    let settings = settings_in_force(&app.config);
    flags.extend(settings.map(|(name, value)| (name.to_string(), value)));
    Json(Value::Object(flags))
}

/// What the settings say, wherever they come from, under the names of A1111's flags.
fn settings_in_force(config: &Config) -> impl Iterator<Item = (&'static str, Value)> {
    let (server, paths, models) = (&config.server, &config.paths, config.models_dir());
    let first = |dirs: &[PathBuf], default: &str| {
        let dir = dirs.first().cloned();
        json!(dir.unwrap_or_else(|| models.join(default)))
    };
    let styles = match &paths.styles_files[..] {
        [] => &[config.data_dir.join("styles.csv")],
        styles => styles,
    };
    [
        ("api", json!(true)),
        ("port", json!(server.port)),
        ("listen", json!(server.host == "0.0.0.0")),
        ("nowebui", json!(!server.root_page)),
        ("api_log", json!(server.access_log)),
        ("subpath", json!(server.subpath)),
        ("data_dir", json!(config.data_dir)),
        ("models_dir", json!(models)),
        ("ckpt", json!(config.model.checkpoint)),
        (
            "ckpt_dir",
            first(&paths.checkpoint_dirs, "Stable-diffusion"),
        ),
        ("vae_dir", first(&paths.vae_dirs, "VAE")),
        ("vae_path", json!(config.model.vae)),
        ("lora_dir", first(&paths.lora_dirs, "Lora")),
        ("esrgan_models_path", first(&paths.esrgan_dirs, "ESRGAN")),
        ("realesrgan_models_path", first(&[], "RealESRGAN")),
        (
            "controlnet_dir",
            first(paths.controlnet_dir.as_slice(), "ControlNet"),
        ),
        ("embeddings_dir", json!(config.embeddings_dir())),
        ("ui_settings_file", json!(config.settings_file())),
        ("no_hashing", json!(!config.model.hashing)),
        ("styles_file", json!(styles)),
    ]
    .into_iter()
}

/// `GET /sdapi/v1/memory`: the machine's, and under `cuda` the first card's, beside `devices` with every card's.
pub async fn memory(State(app): State<Arc<App>>) -> Json<Value> {
    let unavailable = || json!({ "error": "unavailable" });
    let ram = ram().map_or_else(
        unavailable,
        |(total, used)| json!({ "free": total - used, "used": used, "total": total }),
    );
    let status = app.engine.status();
    let free = status.workers.iter().map(|worker| worker.free_memory);
    let cards = app.engine.devices().iter().zip(free);
    let cuda =
        of_cards(cards.filter_map(|(info, free)| Some((&*info.device, info.memory?, free?))));
    Json(json!({ "ram": ram, "cuda": cuda.unwrap_or_else(unavailable) }))
}

/// A1111's form of name, total and free bytes of cards; `None` without a card.
fn of_cards<'a>(cards: impl Iterator<Item = (&'a str, u64, u64)>) -> Option<Value> {
    let devices: Vec<Value> = cards
        .map(|(device, total, free)| {
            let used = total.saturating_sub(free);
            json!({ "device": device, "free": free, "used": used, "total": total })
        })
        .collect();
    let first = devices.first()?;
    let system = json!({ "free": first["free"], "used": first["used"], "total": first["total"] });
    Some(json!({ "system": system, "devices": devices }))
}

/// Total memory of the machine and resident memory of this process, bytes.
pub(super) fn ram() -> Option<(f64, f64)> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let total_kib: f64 = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()?;
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let used_kib: f64 = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()?;
    Some((total_kib * 1024.0, used_kib * 1024.0))
}

/// `POST /sdapi/v1/server-stop`: ends the server as SIGTERM does.
pub async fn server_stop(State(app): State<Arc<App>>) -> &'static str {
    app.shutdown.cancel();
    "Stopping."
}

/// `POST /sdapi/v1/server-kill`: ends the process at once; the client sees a dropped connection.
pub async fn server_kill() -> StatusCode {
    tracing::warn!("killed over the API");
    std::process::exit(1)
}

/// `POST /sdapi/v1/server-restart`: a supervisor's business.
pub async fn server_restart() -> StatusCode {
    StatusCode::NOT_IMPLEMENTED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_cards_begins_with_the_first() {
        assert_eq!(of_cards(std::iter::empty()), None);
        let cards = [("cuda:0", 10, 4), ("cuda:1", 10, 11)];
        let expected = json!({
            "system": { "free": 4, "used": 6, "total": 10 },
            "devices": [
                { "device": "cuda:0", "free": 4, "used": 6, "total": 10 },
                { "device": "cuda:1", "free": 11, "used": 0, "total": 10 },
            ],
        });
        assert_eq!(of_cards(cards.into_iter()), Some(expected));
    }
}
