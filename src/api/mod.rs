//! The HTTP API: A1111's routes and the health routes.
//!
//! [`router`] builds everything from an [`App`]; tests call it with `oneshot`, [`serve::run`] puts it on a socket. A route is one
//! line of `routes`; paths and methods are looked up there for redirects, 405 and HEAD. Contract: A1111 1.10's REST API.

pub mod absent;
pub mod auth;
pub mod body;
pub mod catalog;
pub mod checkpoints;
pub mod client;
pub mod codecs;
pub mod connections;
pub mod controlnet;
pub mod docs;
pub mod error;
pub mod extract;
pub mod extras;
pub mod fields;
pub mod generate;
pub mod gradio;
pub mod hires;
pub mod idle;
pub mod image_source;
pub mod infotext;
pub mod init_images;
pub mod internals;
pub mod job_events;
pub mod job_runner;
pub mod jobs;
mod known_names;
pub mod large_copy;
pub mod masks;
pub mod metrics;
pub mod middleware;
pub mod network_pages;
pub mod networks;
pub mod openai;
pub mod openapi;
pub mod option_choices;
pub mod options;
pub mod options_table;
pub mod outbound;
pub mod outputs;
pub mod overrides;
pub mod pictures;
pub mod progress;
pub mod prompts;
pub mod resolve;
pub mod script_list;
pub mod script_runs;
pub mod scripts;
pub mod serve;
pub mod settings;
pub mod styles;
pub mod system;
pub mod throttle;
pub mod types;
pub mod upscalers;
pub mod vocabulary;
pub mod webhook;

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError, RwLock};

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use serde_json::{Map, Value};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::engine::history::History;
use crate::engine::status::LoadedModel;
use crate::engine::{self, Engine};
use error::ApiError;
use options::{OptionStore, Options};

/// What the handlers share.
pub struct App {
    /// Makes the pictures.
    pub engine: Engine,
    /// A1111's settings.
    pub options: OptionStore,
    /// Ours.
    pub config: Config,
    /// Jobs that outlive their requests.
    pub jobs: job_runner::Jobs,
    /// MiB that request bodies may take.
    pub body_memory: Arc<Semaphore>,
    /// Work that must end before the process does, whether its client waits or not.
    pub tasks: TaskTracker,
    /// Cancelled when the process is to end.
    pub shutdown: CancellationToken,
    /// How the first load went.
    pub readiness: RwLock<Readiness>,
}

/// Whether a picture could be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// The first checkpoint is being loaded.
    Loading,
    /// A checkpoint was loaded, or none is to be loaded before the first request.
    Ready,
    /// The last load asked for failed, in words.
    Failed(String),
}

impl App {
    /// State for a router.
    #[must_use]
    pub fn new(
        engine: Engine,
        options: OptionStore,
        config: Config,
        history: History,
        shutdown: CancellationToken,
    ) -> Arc<Self> {
        let readiness = if config.model.load_at_start {
            Readiness::Loading
        } else {
            Readiness::Ready
        };
        let readiness = RwLock::new(readiness);
        let body_memory = Arc::new(Semaphore::new(config.server.body_memory_mib as usize));
        Arc::new(Self {
            engine,
            options,
            config,
            jobs: job_runner::Jobs::new(history),
            body_memory,
            tasks: TaskTracker::new(),
            shutdown,
            readiness,
        })
    }

    /// Loads the checkpoint and VAE that `options` name, behind the jobs already queued.
    ///
    /// # Errors
    /// The checkpoint is unknown or cannot be loaded; the one before stays.
    pub async fn load(self: &Arc<Self>, options: Options) -> Result<LoadedModel, engine::Error> {
        let app = self.clone();
        let selection = tokio::task::spawn_blocking(move || resolve::select(&app, &options)).await;
        let selection =
            selection.unwrap_or_else(|error| Err(engine::Error::Panicked(error.to_string())));
        let result = match selection {
            Ok(selection) => self.engine.load(selection).await,
            Err(error) => Err(error),
        };
        let readiness = match &result {
            Ok(_) => Readiness::Ready,
            Err(error) => Readiness::Failed(error::with_causes(error)),
        };
        *self
            .readiness
            .write()
            .unwrap_or_else(PoisonError::into_inner) = readiness;
        result
    }

    /// Selects the checkpoint of the settings, if one is named there; else lets go of one that the options name and that no
    /// longer exists. Changes the options in memory only.
    ///
    /// # Errors
    /// The configured checkpoint or VAE does not exist.
    pub fn choose_configured_checkpoint(&self) -> Result<(), engine::Error> {
        let catalog = self.engine.catalog();
        let stored = self.options.snapshot();
        let name = match (
            &self.config.model.checkpoint,
            stored.text("sd_model_checkpoint"),
        ) {
            (Some(name), _) => catalog.find_or_open(name)?.title().into(),
            (None, "") => Value::Null,
            (None, name) => match catalog.find(name) {
                Ok(checkpoint) => checkpoint.title().into(),
                Err(error) => {
                    tracing::warn!(%error, "the checkpoint of the options is not there; the default is used");
                    Value::Null
                }
            },
        };
        if let Some(vae) = &self.config.model.vae {
            catalog.find_or_open_vae(vae)?;
        }
        self.options
            .apply(&Map::from_iter([("sd_model_checkpoint".to_string(), name)]));
        Ok(())
    }
}

/// The whole server as a service.
pub fn router(app: &Arc<App>) -> Router {
    let known: Arc<BTreeSet<&'static str>> =
        Arc::new(routes(app).into_iter().map(|(path, _)| path).collect());
    let mut plain = Router::new();
    for (path, methods) in routes(app) {
        plain = plain.route(path, methods);
    }
    let plain = plain.method_not_allowed_fallback(method_not_allowed);
    let prefix = app
        .config
        .server
        .subpath
        .as_deref()
        .map(|path| path.trim_matches('/'))
        .filter(|path| !path.is_empty());
    let routed = match prefix {
        Some(prefix) => Router::new()
            .nest(&format!("/{prefix}"), plain.clone())
            .merge(plain),
        None => plain,
    };
    let strip = prefix.map(|prefix| format!("/{prefix}"));
    let files = app.clone();
    let fallback = async move |request: Request| {
        let path = request.uri().path();
        let inner = strip
            .as_deref()
            .and_then(|prefix| path.strip_prefix(prefix));
        match inner.unwrap_or(path).strip_prefix("/file=") {
            Some(file) if request.method() == Method::GET => {
                gradio::file(files, file.to_string()).await
            }
            Some(_) => ApiError::MethodNotAllowed.into_response(),
            None => no_such_path(&request, &known, strip.as_deref()),
        }
    };
    let routed = routed.fallback(fallback);
    middleware::wrap(routed.with_state(app.clone()), app)
}

type Routes = Vec<(&'static str, MethodRouter<Arc<App>>)>;

#[rustfmt::skip]
fn routes(app: &App) -> Routes {
    let mut routes: Routes = vec![
        ("/sdapi/v1/txt2img", post(generate::txt2img)),
        ("/sdapi/v1/img2img", post(generate::img2img)),
        ("/sdapi/v1/extra-single-image", post(extras::single)),
        ("/sdapi/v1/extra-batch-images", post(extras::batch)),
        ("/sdapi/v1/progress", get(progress::progress)),
        ("/sdapi/v1/interrupt", post(progress::interrupt)),
        ("/sdapi/v1/skip", post(progress::skip)),
        ("/sdapi/v1/options", get(settings::get_options).post(settings::set_options)),
        ("/sdapi/v1/cmd-flags", get(system::cmd_flags)),
        ("/sdapi/v1/samplers", get(catalog::samplers)),
        ("/sdapi/v1/schedulers", get(catalog::schedulers)),
        ("/sdapi/v1/upscalers", get(upscalers::upscalers)),
        ("/sdapi/v1/latent-upscale-modes", get(catalog::latent_upscale_modes)),
        ("/sdapi/v1/sd-models", get(catalog::sd_models)),
        ("/sdapi/v1/sd-vae", get(catalog::sd_vae)),
        ("/sdapi/v1/loras", get(networks::loras)),
        ("/sdapi/v1/refresh-loras", post(networks::refresh_loras)),
        ("/sdapi/v1/embeddings", get(networks::embeddings)),
        ("/sdapi/v1/refresh-embeddings", post(networks::refresh_embeddings)),
        ("/sdapi/v1/prompt-styles", get(styles::prompt_styles)),
        ("/sdapi/v1/scripts", get(script_list::scripts)),
        ("/sdapi/v1/script-info", get(script_list::script_info)),
        ("/sdapi/v1/extensions", get(catalog::empty_list)),
        ("/sdapi/v1/hypernetworks", get(catalog::empty_list)),
        ("/sdapi/v1/face-restorers", get(catalog::empty_list)),
        ("/sdapi/v1/realesrgan-models", get(upscalers::realesrgan_models)),
        ("/sdapi/v1/refresh-checkpoints", post(catalog::refresh)),
        ("/sdapi/v1/refresh-vae", post(catalog::refresh)),
        ("/sdapi/v1/unload-checkpoint", post(settings::unload_checkpoint)),
        ("/sdapi/v1/reload-checkpoint", post(settings::reload_checkpoint)),
        ("/sdapi/v1/memory", get(system::memory)),
        ("/sdapi/v1/png-info", post(catalog::png_info)),
        ("/sdapi/v1/interrogate", post(absent::interrogate)),
        ("/sdapi/v1/create/embedding", post(absent::training)),
        ("/sdapi/v1/create/hypernetwork", post(absent::training)),
        ("/sdapi/v1/train/embedding", post(absent::training)),
        ("/sdapi/v1/train/hypernetwork", post(absent::training)),
    ];
    routes.extend(page_routes());
    routes.extend(own_routes());
    if app.config.server.root_page {
        routes.push(("/", get(system::root)));
    }
    if app.config.server.server_stop {
        routes.push(("/sdapi/v1/server-stop", post(system::server_stop)));
        routes.push(("/sdapi/v1/server-kill", post(system::server_kill)));
        routes.push(("/sdapi/v1/server-restart", post(system::server_restart)));
    }
    routes
}

/// What A1111's page asks for, and clients that were made for the page.
#[rustfmt::skip]
fn page_routes() -> Routes {
    vec![
        ("/internal/ping", get(system::ping)),
        ("/internal/sysinfo", get(internals::sysinfo)),
        ("/internal/sysinfo-download", get(internals::sysinfo_download)),
        ("/internal/quicksettings-hint", get(internals::quicksettings_hint)),
        ("/internal/profile-startup", get(internals::profile_startup)),
        ("/sd_extra_networks/thumb", get(network_pages::thumb)),
        ("/sd_extra_networks/metadata", get(network_pages::metadata)),
        ("/sd_extra_networks/cover-images", get(network_pages::cover_images)),
        ("/sd_extra_networks/get-single-card", get(network_pages::single_card)),
        ("/config", get(gradio::config)),
        ("/login", post(gradio::login)),
        ("/login_check", get(gradio::login_check)),
        ("/controlnet/version", get(controlnet::version)),
        ("/controlnet/model_list", get(controlnet::model_list)),
        ("/controlnet/module_list", get(controlnet::module_list)),
        ("/controlnet/control_types", get(controlnet::control_types)),
        ("/controlnet/settings", get(controlnet::settings)),
        ("/controlnet/detect", post(controlnet::detect)),
        ("/internal/progress", post(progress::task_progress)),
        ("/internal/pending-tasks", get(progress::pending_tasks)),
    ]
}

/// Ours.
#[rustfmt::skip]
fn own_routes() -> Routes {
    vec![
        ("/v1/jobs", get(jobs::list).post(jobs::submit)),
        ("/v1/jobs/{id}", get(jobs::get).delete(jobs::forget)),
        ("/v1/jobs/{id}/cancel", post(jobs::cancel)),
        ("/v1/jobs/{id}/events", get(job_events::follow)),
        ("/v1/jobs/{id}/result", get(jobs::result)),
        ("/v1/jobs/{id}/images/{number}", get(jobs::image)),
        ("/v1/events", get(job_events::queue)),
        ("/v1/images/generations", post(openai::images::generations)),
        ("/v1/images/edits", post(openai::images::edits)),
        ("/v1/images/variations", post(openai::images::variations)),
        ("/v1/images/files/{name}", get(openai::links::picture)),
        ("/v1/models", get(openai::models::list)),
        ("/v1/models/{id}", get(openai::models::get)),
        ("/openapi.json", get(openapi::openapi)),
        ("/docs", get(docs::page)),
        ("/redoc", get(docs::page)),
        ("/docs/{name}", get(docs::asset)),
        ("/metrics", get(metrics::metrics)),
        ("/healthz", get(system::healthz)),
        ("/readyz", get(system::readyz)),
    ]
}

/// Runs blocking work off the async threads.
///
/// # Errors
/// The work's own error, or a 500 if it panicked.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let task = tokio::task::spawn_blocking(work);
    task.await.unwrap_or_else(|error| {
        Err(ApiError::failure(
            "RuntimeError",
            format!("the request crashed: {error}"),
        ))
    })
}

async fn method_not_allowed() -> ApiError {
    ApiError::MethodNotAllowed
}

/// 404, or a redirect to the path without its trailing slash if that one exists.
fn no_such_path(
    request: &Request,
    known: &BTreeSet<&'static str>,
    prefix: Option<&str>,
) -> Response {
    let uri = request.uri();
    let path = uri.path();
    let Some(slashless) = path.strip_suffix('/') else {
        return ApiError::NotFound.into_response();
    };
    let inner = prefix
        .and_then(|prefix| slashless.strip_prefix(prefix))
        .unwrap_or(slashless);
    if !known.contains(inner) {
        return ApiError::NotFound.into_response();
    }
    let query = uri
        .query()
        .map(|query| format!("?{query}"))
        .unwrap_or_default();
    match HeaderValue::from_str(&format!("{slashless}{query}")) {
        Ok(location) => (
            StatusCode::TEMPORARY_REDIRECT,
            [(header::LOCATION, location)],
        )
            .into_response(),
        Err(_) => ApiError::NotFound.into_response(),
    }
}
