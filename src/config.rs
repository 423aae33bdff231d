//! Every setting of sdgen: its default, its unit, its environment variable.
//!
//! Sources in rising order of strength: built-in default, the TOML file, the environment, the command line.
//! A [`Config`] that exists has passed [`Config::validate`]; secrets never show in `Debug` or in `sdgen config`.
//! A1111's own flags (`--listen`, `--ckpt-dir`, …) are translated in [`a1111`], the sources merged in [`layers`].

pub mod a1111;
mod a1111_flags;
mod device;
pub mod layers;
mod problems;
mod secret;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use device::{CudaKernels, DeviceChoice, DtypeChoice};
pub use secret::Secret;

/// What `Version:` says in the infotext.
pub const VERSION_TEXT: &str = "v1.10.1";

/// Characters a token must have.
const SHORTEST_TOKEN: usize = 8;

/// Environment variables, all of them.
pub mod env {
    /// Directory of models, outputs and settings; see `--data-dir`.
    pub const DATA_DIR: &str = "SDGEN_DATA_DIR";
    /// Settings file in place of `<data-dir>/sdgen.toml`; see `--config`.
    pub const CONFIG: &str = "SDGEN_CONFIG";
    /// Parent of an A1111 tree: `$WORKSPACE/stable-diffusion-webui` is the data directory if it exists.
    pub const WORKSPACE: &str = "WORKSPACE";
    /// A1111's flags as one shell-quoted string; stronger than [`COMMANDLINE_ARGS`].
    pub const A1111_ARGS: &str = "A1111_ARGS";
    /// A1111's flags as one shell-quoted string, under the name A1111 itself reads.
    pub const COMMANDLINE_ARGS: &str = "COMMANDLINE_ARGS";
    /// `server.host`.
    pub const HOST: &str = "SDGEN_HOST";
    /// `server.port`.
    pub const PORT: &str = "SDGEN_PORT";
    /// `server.api_auth`: `user:password`, several separated by commas.
    pub const API_AUTH: &str = "SDGEN_API_AUTH";
    /// `server.api_tokens`, separated by commas.
    pub const API_TOKENS: &str = "SDGEN_API_TOKENS";
    /// `server.body_limit_mib`.
    pub const BODY_LIMIT_MIB: &str = "SDGEN_BODY_LIMIT_MIB";
    /// `server.queue_limit`.
    pub const QUEUE_LIMIT: &str = "SDGEN_QUEUE_LIMIT";
    /// `server.shutdown_grace_s`.
    pub const SHUTDOWN_GRACE: &str = "SDGEN_SHUTDOWN_GRACE";
    /// `paths.models_dir`.
    pub const MODELS_DIR: &str = "SDGEN_MODELS_DIR";
    /// `device.device`.
    pub const DEVICE: &str = "SDGEN_DEVICE";
    /// `device.dtype`.
    pub const DTYPE: &str = "SDGEN_DTYPE";
    /// `device.threads`.
    pub const THREADS: &str = "SDGEN_THREADS";
    /// `device.cpu_isa`.
    pub const CPU_ISA: &str = "SDGEN_CPU_ISA";
    /// `device.cuda_kernels`.
    pub const CUDA_KERNELS: &str = "SDGEN_CUDA_KERNELS";
    /// `model.checkpoint`.
    pub const CHECKPOINT: &str = "SDGEN_CHECKPOINT";
    /// `model.vae`.
    pub const VAE: &str = "SDGEN_VAE";
    /// `log.level`: `error`, `warn`, `info`, `debug`, `trace`, or a filter such as `sdgen=debug,tower_http=info`.
    pub const LOG: &str = "SDGEN_LOG";
    /// `log.format`: `text` or `json`.
    pub const LOG_FORMAT: &str = "SDGEN_LOG_FORMAT";
    /// Token for the Hugging Face hub, read by `sdgen models pull`.
    pub const HF_TOKEN: &str = "HF_TOKEN";
    /// Address of the hub, read by `sdgen models pull`.
    pub const HF_ENDPOINT: &str = "HF_ENDPOINT";
}

/// The merged settings.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Directory laid out as A1111 lays it out. Not a key of the file, which lies inside it.
    #[serde(skip)]
    pub data_dir: PathBuf,
    /// A1111's flags as they were given, by destination name (`ckpt_dir`), for `/sdapi/v1/cmd-flags`.
    #[serde(skip)]
    pub a1111_flags: BTreeMap<String, serde_json::Value>,
    /// The HTTP server.
    pub server: Server,
    /// Directories beside the data directory's own.
    pub paths: Paths,
    /// Where tensors live.
    pub device: DeviceSettings,
    /// What is loaded.
    pub model: Model,
    /// What a request may ask for.
    pub limits: Limits,
    /// What is written to stderr.
    pub log: Log,
}

/// The HTTP server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own")]
pub struct Server {
    /// Address to listen on.
    pub host: String,
    /// Port to listen on; 0 takes a free one.
    pub port: u16,
    /// `user:password` pairs of HTTP Basic authentication; none = open.
    pub api_auth: Vec<Secret>,
    /// Tokens of `Authorization: Bearer`, beside `api_auth`.
    pub api_tokens: Vec<Secret>,
    /// Origins a browser may call from; `*` = any.
    pub cors_allow_origins: Vec<String>,
    /// The same as a regular expression over the whole origin.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cors_allow_origins_regex: Option<String>,
    /// Path prefix under which everything is served as well as at the root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subpath: Option<String>,
    /// Largest request body, MiB.
    pub body_limit_mib: u64,
    /// Memory for request bodies at once, MiB; beyond it large requests wait before they are read.
    pub body_memory_mib: u64,
    /// Seconds a connection may idle, and a request's head may take.
    pub keep_alive_s: u64,
    /// Jobs that may wait; beyond it requests wait for a place.
    pub queue_limit: usize,
    /// Jobs of `/v1/jobs` that may wait; beyond it they are answered 429.
    pub jobs_limit: usize,
    /// Ended jobs of `/v1/jobs` that are remembered.
    pub jobs_kept: u32,
    /// Seconds the running job gets to end after SIGTERM before it is interrupted.
    pub shutdown_grace_s: u64,
    /// Previews of a running job a second, at most; 0 makes none.
    pub previews_per_s: u32,
    /// Log each request.
    pub access_log: bool,
    /// Serve a page at `/`.
    pub root_page: bool,
    /// Serve `/sdapi/v1/server-stop` and its siblings.
    pub server_stop: bool,
    /// Refuse changes of options over the API.
    pub freeze_settings: bool,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".into(),
            port: 17860,
            api_auth: Vec::new(),
            api_tokens: Vec::new(),
            cors_allow_origins: Vec::new(),
            cors_allow_origins_regex: None,
            subpath: None,
            body_limit_mib: 256,
            body_memory_mib: 1024,
            keep_alive_s: 30,
            queue_limit: 256,
            jobs_limit: 1000,
            jobs_kept: 10_000,
            shutdown_grace_s: 30,
            previews_per_s: 4,
            access_log: false,
            root_page: true,
            server_stop: false,
            freeze_settings: false,
        }
    }
}

/// Directories beside the data directory's own. Relative paths are relative to the working directory.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Paths {
    /// In place of `<data-dir>/models`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub models_dir: Option<PathBuf>,
    /// More directories of checkpoints.
    pub checkpoint_dirs: Vec<PathBuf>,
    /// More directories of VAEs.
    pub vae_dirs: Vec<PathBuf>,
    /// More directories of `LoRA`s.
    pub lora_dirs: Vec<PathBuf>,
    /// In place of `<data-dir>/embeddings`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embeddings_dir: Option<PathBuf>,
    /// More directories of upscalers.
    pub esrgan_dirs: Vec<PathBuf>,
    /// In place of `<data-dir>/models/ControlNet`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub controlnet_dir: Option<PathBuf>,
    /// In place of `<data-dir>/styles.csv`.
    pub styles_files: Vec<PathBuf>,
    /// In place of `<data-dir>/config.json`, the options store.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub settings_file: Option<PathBuf>,
}

/// Where tensors live.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DeviceSettings {
    /// `auto`, `cpu`, `cuda`, `cuda:1`, `cuda:0,cuda:1`, `all`.
    pub device: DeviceChoice,
    /// `auto`, `f32`, `bf16` or `f16`; the CPU computes in f32 and bf16.
    pub dtype: DtypeChoice,
    /// Threads that compute; 0 = as many as the process may use (affinity and the container's CPU limit count).
    pub threads: usize,
    /// Instruction set of the CPU: `auto`, `portable`, `avx2`, `avx512`, `avx512bf16` or `neon`.
    pub cpu_isa: String,
    /// Memory that a block of the VAE may take in one piece, MiB; a larger picture is decoded in strips.
    pub vae_memory_mib: usize,
    /// `auto` (whichever is measured to be faster), `own` or `library`: whose kernels run on CUDA where NVIDIA has one too.
    pub cuda_kernels: CudaKernels,
}

impl Default for DeviceSettings {
    fn default() -> Self {
        Self {
            device: DeviceChoice::default(),
            dtype: DtypeChoice::default(),
            threads: 0,
            cpu_isa: "auto".into(),
            vae_memory_mib: 8192,
            cuda_kernels: CudaKernels::default(),
        }
    }
}

/// What is loaded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// Checkpoint by name or path; none = what the options say, else the first one found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<String>,
    /// VAE by name or path that overrides the option `sd_vae`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae: Option<String>,
    /// Load before the first request.
    pub load_at_start: bool,
    /// Weights that may stay in the memory of each device, MiB; 0 = what it has. How many checkpoints is the option
    /// `sd_checkpoints_limit`.
    pub memory_mib: u64,
    /// Compute SHA-256 of checkpoints; without it titles carry no `[hash]`.
    pub hashing: bool,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            checkpoint: None,
            vae: None,
            load_at_start: true,
            memory_mib: 0,
            hashing: true,
        }
    }
}

/// What a request may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Largest width and height, pixels.
    pub max_side: usize,
    /// Largest `batch_size * width * height`, megapixels.
    pub max_megapixels: usize,
    /// Largest number of steps.
    pub max_steps: usize,
    /// Largest batch size.
    pub max_batch_size: usize,
    /// Largest number of batches.
    pub max_batch_count: usize,
    /// Largest prompt, KiB of UTF-8; the negative prompt has the same limit.
    pub max_prompt_kib: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_side: 4096,
            max_megapixels: 64,
            max_steps: 1000,
            max_batch_size: 64,
            max_batch_count: 1000,
            max_prompt_kib: 64,
        }
    }
}

/// What is written to stderr.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// A level or a filter of `target=level` pairs.
    pub level: String,
    /// Form of a line.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".into(),
            format: LogFormat::Text,
        }
    }
}

/// Form of a log line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// One thing wrong with the settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Dotted key, `server.port`.
    pub key: String,
    /// What is wrong and what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {}", self.key, self.message)
    }
}

impl Config {
    /// All problems, not only the first; empty = good.
    #[must_use]
    pub fn validate(&self) -> Vec<Problem> {
        let mut problems = self.server.problems();
        problems.extend(self.limits.problems());
        problems.extend(problems::must(
            tracing_subscriber::EnvFilter::try_new(&self.log.level).is_ok(),
            "log.level",
            || format!("not a level or filter: `{}`", self.log.level),
        ));
        problems
    }

    /// Root of the model directories.
    #[must_use]
    pub fn models_dir(&self) -> PathBuf {
        self.paths
            .models_dir
            .clone()
            .unwrap_or_else(|| self.data_dir.join("models"))
    }

    /// Directories searched for checkpoints, strongest first.
    #[must_use]
    pub fn checkpoint_dirs(&self) -> Vec<PathBuf> {
        with_default(
            &self.models_dir().join("Stable-diffusion"),
            &self.paths.checkpoint_dirs,
        )
    }

    /// Directories searched for VAEs.
    #[must_use]
    pub fn vae_dirs(&self) -> Vec<PathBuf> {
        with_default(&self.models_dir().join("VAE"), &self.paths.vae_dirs)
    }

    /// Directories searched for `LoRA`s.
    #[must_use]
    pub fn lora_dirs(&self) -> Vec<PathBuf> {
        let mut dirs = with_default(&self.models_dir().join("Lora"), &self.paths.lora_dirs);
        dirs.push(self.models_dir().join("LyCORIS"));
        dirs
    }

    /// Directory of textual inversions.
    #[must_use]
    pub fn embeddings_dir(&self) -> PathBuf {
        let dir = self.paths.embeddings_dir.clone();
        dir.unwrap_or_else(|| self.data_dir.join("embeddings"))
    }

    /// Directories searched for upscalers.
    #[must_use]
    pub fn upscaler_dirs(&self) -> Vec<PathBuf> {
        let mut dirs = with_default(&self.models_dir().join("ESRGAN"), &self.paths.esrgan_dirs);
        dirs.push(self.models_dir().join("RealESRGAN"));
        dirs
    }

    /// The options store, A1111's `config.json`.
    #[must_use]
    pub fn settings_file(&self) -> PathBuf {
        self.paths
            .settings_file
            .clone()
            .unwrap_or_else(|| self.data_dir.join("config.json"))
    }

    /// The hash cache, A1111's `cache.json`.
    #[must_use]
    pub fn hash_cache_file(&self) -> PathBuf {
        self.data_dir.join("cache.json")
    }
}

fn with_default(first: &Path, more: &[PathBuf]) -> Vec<PathBuf> {
    std::iter::once(first.to_path_buf())
        .chain(more.iter().cloned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        assert_eq!(Config::default().validate(), []);
    }

    #[test]
    fn validation_reports_every_problem() {
        let mut config = Config::default();
        config.server.api_auth = vec![Secret::new("no-colon")];
        config.limits.max_steps = 0;
        config.log.level = "sdgen=loud".into();
        let keys: Vec<String> = config.validate().into_iter().map(|p| p.key).collect();
        assert_eq!(keys, ["server.api_auth", "limits.max_steps", "log.level"]);
    }

    #[test]
    fn secrets_do_not_show() {
        let secret = Secret::new("user:hunter2");
        assert_eq!(format!("{secret:?}"), "***");
        assert_eq!(serde_json::to_string(&secret).unwrap(), "\"***\"");
    }
}
