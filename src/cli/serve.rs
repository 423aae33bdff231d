//! `sdgen serve`: settings in, server up, signals out.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use toml::Value;

use super::{Common, Stop, load_config, warn_all};
use crate::api::options::OptionStore;
use crate::api::{self, App};
use crate::config::Config;
use crate::config::layers::{Kind, Origin, Setting, parse};
use crate::engine::backend::PipelineBackend;
use crate::engine::history::History;
use crate::engine::models::Catalog;
use crate::engine::{self, Engine};
use crate::{shutdown, telemetry};

/// Our own flags of `serve`; each is a setting of the same meaning.
#[derive(Debug, Default, Args)]
pub struct ServeArgs {
    /// Address to listen on [default: 127.0.0.1]
    #[arg(long)]
    pub host: Option<String>,
    /// Port to listen on; 0 takes a free one [default: 17860]
    #[arg(long)]
    pub port: Option<String>,
    /// Checkpoint by name or path
    #[arg(long, short = 'm')]
    pub checkpoint: Option<String>,
    /// VAE by name or path, in place of the option `sd_vae`
    #[arg(long)]
    pub vae: Option<String>,
    /// auto, cpu, cuda, cuda:N, several as cuda:0,cuda:1, or all
    #[arg(long)]
    pub device: Option<String>,
    /// auto, f32, bf16, f16 or fp8
    #[arg(long)]
    pub dtype: Option<String>,
    /// Threads that compute [default: as many as the process may use]
    #[arg(long, value_name = "N")]
    pub threads: Option<String>,
    /// Directory of models in place of the data directory's
    #[arg(long, value_name = "DIR")]
    pub models_dir: Option<PathBuf>,
    /// Largest request body, MiB [default: 256]
    #[arg(long, value_name = "MIB")]
    pub body_limit: Option<String>,
    /// Jobs that may wait; further requests wait for a place [default: 256]
    #[arg(long, value_name = "JOBS")]
    pub queue_limit: Option<String>,
    /// Time the running job gets to end after SIGTERM before it is interrupted [default: 30]
    #[arg(long, value_name = "SECONDS")]
    pub shutdown_grace: Option<String>,
    /// Log level or filter [default: info]
    #[arg(long, value_name = "LEVEL")]
    pub log: Option<String>,
    /// text or json
    #[arg(long, value_name = "FORM")]
    pub log_format: Option<String>,
}

impl ServeArgs {
    fn settings(&self) -> Result<Vec<Setting>, Stop> {
        let models_dir = self
            .models_dir
            .as_ref()
            .map(|path| path.display().to_string());
        let rows = [
            ("--host", "server.host", Kind::Text, &self.host),
            ("--port", "server.port", Kind::Int, &self.port),
            (
                "--checkpoint",
                "model.checkpoint",
                Kind::Text,
                &self.checkpoint,
            ),
            ("--vae", "model.vae", Kind::Text, &self.vae),
            ("--device", "device.device", Kind::Text, &self.device),
            ("--dtype", "device.dtype", Kind::Text, &self.dtype),
            ("--threads", "device.threads", Kind::Int, &self.threads),
            ("--models-dir", "paths.models_dir", Kind::Text, &models_dir),
            (
                "--body-limit",
                "server.body_limit_mib",
                Kind::Int,
                &self.body_limit,
            ),
            (
                "--queue-limit",
                "server.queue_limit",
                Kind::Int,
                &self.queue_limit,
            ),
            (
                "--shutdown-grace",
                "server.shutdown_grace_s",
                Kind::Int,
                &self.shutdown_grace,
            ),
            ("--log", "log.level", Kind::Text, &self.log),
            ("--log-format", "log.format", Kind::Text, &self.log_format),
        ];
        let given = rows
            .into_iter()
            .filter_map(|(flag, key, kind, text)| Some((flag, key, kind, text.as_deref()?)));
        given
            .map(|(flag, key, kind, text)| {
                let value: Value = parse(kind, text)
                    .map_err(|message| Stop::usage_text(format!("flag {flag}: {message}")))?;
                Ok(Setting {
                    key,
                    value,
                    origin: Origin::Flag(flag.into()),
                })
            })
            .collect()
    }
}

/// Serves until a signal.
///
/// # Errors
/// Exit 2 for settings, device and options file; exit 1 for the port and the listener.
pub fn run(args: &ServeArgs, common: &Common, words: Vec<String>) -> Result<(), Stop> {
    let loaded = load_config(common, args.settings()?, words)?;
    telemetry::init(&loaded.config.log);
    warn_all(&loaded);
    let runtime = tokio::runtime::Runtime::new().map_err(Stop::failed)?;
    let result = runtime.block_on(serve(loaded.config));
    // A client that never reads must not keep the process.
    runtime.shutdown_background();
    result
}

async fn serve(config: Config) -> Result<(), Stop> {
    let token = shutdown::on_signal().map_err(Stop::failed)?;
    let listener = api::serve::bind(&config.server.host, config.server.port)
        .await
        .map_err(Stop::failed)?;
    let options = OptionStore::open(config.settings_file()).map_err(Stop::usage)?;
    let engine = start_engine(&config, Devices::Each)?;
    // What was typed is looked at before anything is written.
    if let Some(name) = &config.model.checkpoint {
        engine.catalog().find_or_open(name).map_err(Stop::usage)?;
    }
    let history = open_history(&config)?;
    let app = App::new(engine, options, config, history, token);
    app.choose_configured_checkpoint().map_err(Stop::usage)?;
    api::serve::run(listener, app).await.map_err(Stop::failed)
}

/// The file of jobs that outlive their requests.
fn open_history(config: &Config) -> Result<History, Stop> {
    let path = config.data_dir.join("jobs.sqlite");
    std::fs::create_dir_all(&config.data_dir).map_err(Stop::failed)?;
    History::open(&path).map_err(Stop::failed)
}

/// Which of the configured devices a command needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Devices {
    /// All of them.
    Each,
    /// One, for a single job.
    First,
}

/// An engine on the configured devices.
///
/// # Errors
/// Exit 2 if a device cannot be used.
pub fn start_engine(config: &Config, devices: Devices) -> Result<Engine, Stop> {
    let started = PipelineBackend::on_each(&config.device).and_then(|mut makers| {
        if devices == Devices::First {
            makers.truncate(1);
        }
        Engine::start(Catalog::open(config), config.server.queue_limit, makers)
    });
    let engine = started.map_err(|error| match error {
        engine::Error::Device { .. } => Stop::usage(error),
        other => Stop::failed(other),
    })?;
    engine.limit_previews(match config.server.previews_per_s {
        0 => Duration::MAX,
        rate => Duration::from_secs(1) / rate,
    });
    Ok(engine)
}
