//! `sdgen prompt`: one job in this process or on a server, pictures into files.
//!
//! Names and numbers are checked and the output directory tried before anything is loaded.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use indicatif::ProgressBar;

use super::checkpoints::{self, RefinerArgs};
use super::codecs::CodecArgs;
use super::follow::follow;
use super::from_image::{HiresArgs, ImageArgs, Place, Start};
use super::output::{Form, Output, Report, Seconds, write_latents};
use super::serve::{Devices, start_engine};
use super::{Common, Stop, Verbosity, load_config, remote, warn_all};
use crate::api::options::{OptionStore, Options};
use crate::api::{resolve, vocabulary};
use crate::config::layers::{Kind, Origin, Setting, parse};
use crate::config::{Config, VERSION_TEXT};
use crate::engine::checkpoint::{Selection, VaeChoice};
use crate::engine::limits::{Numbers, Violation, check, resolve_seed};
use crate::engine::models::Catalog;
use crate::engine::{Engine, Job, Outcome};
use crate::pipeline::GenerateRequest;
use crate::pipeline::request::InfotextOptions;
use crate::rng::NoiseSource;
use crate::sampling::{Sampler, Scheduler};
use crate::{shutdown, telemetry};

/// What to make and where to put it.
#[derive(Debug, Args)]
pub struct PromptArgs {
    /// What the picture shows, in A1111's prompt language
    pub prompt: String,
    /// What it does not show
    #[arg(short = 'N', long, value_name = "TEXT", default_value = "")]
    pub negative: String,
    /// -1 draws one
    #[arg(long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    pub seed: i64,
    /// Variation seed; -1 draws one
    #[arg(long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    pub subseed: i64,
    /// Share of the variation seed, 0 to 1
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    pub subseed_strength: f64,
    /// Sampler steps
    #[arg(
        long,
        value_name = "N",
        default_value_t = 20,
        allow_negative_numbers = true
    )]
    pub steps: i64,
    /// Sampler, as A1111 names it
    #[arg(long, value_name = "NAME", default_value = "DPM++ 2M")]
    pub sampler: String,
    /// Sigma schedule
    #[arg(long, value_name = "NAME", default_value = "Automatic")]
    pub scheduler: String,
    /// Guidance scale
    #[arg(
        long,
        value_name = "F",
        default_value = "5",
        allow_negative_numbers = true
    )]
    pub cfg_scale: String,
    /// Width in pixels [default: the checkpoint's own, else 1024]
    #[arg(short = 'W', long, value_name = "PX", allow_negative_numbers = true)]
    pub width: Option<i64>,
    /// Height in pixels [default: the checkpoint's own, else 1024]
    #[arg(short = 'H', long, value_name = "PX", allow_negative_numbers = true)]
    pub height: Option<i64>,
    /// Pictures at a time
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        allow_negative_numbers = true
    )]
    pub batch_size: i64,
    /// Batches one after the other
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        allow_negative_numbers = true
    )]
    pub batch_count: i64,
    /// Recorded; without effect on SDXL
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub clip_skip: u8,
    /// Tile without seams
    #[arg(long)]
    pub tiling: bool,
    /// Checkpoint by path or name
    #[arg(short = 'm', long, value_name = "PATH|NAME")]
    pub checkpoint: Option<String>,
    /// VAE by path or name
    #[arg(long, value_name = "PATH|NAME")]
    pub vae: Option<String>,
    /// VAE or TAESD.
    #[command(flatten)]
    pub codecs: CodecArgs,
    /// Where noise comes from: gpu, cpu or nv
    #[arg(long, value_name = "SOURCE", default_value = "gpu")]
    pub noise_source: String,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// auto, f32, bf16, f16 or fp8
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<String>,
    /// Threads that compute [default: as many as the process may use]
    #[arg(long, value_name = "N")]
    pub threads: Option<String>,
    /// Where pictures go [default: outputs/txt2img-images/DATE in the data directory]
    #[arg(short, long, value_name = "FILE|DIR")]
    pub output: Option<PathBuf>,
    /// png, jpeg or webp [default: by the output file's extension, else png]
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Also write the final latents
    #[arg(long, value_name = "FILE.safetensors")]
    pub save_latents: Option<PathBuf>,
    /// Print one JSON object instead of file names
    #[arg(long)]
    pub json: bool,
    /// No progress bar, no log lines but errors
    #[arg(long)]
    pub quiet: bool,
    /// Make the pictures on this server, `http://[user:password@]host:port`
    #[arg(long, value_name = "URL")]
    pub server: Option<String>,
    /// Pictures to start from.
    #[command(flatten)]
    pub image: ImageArgs,
    /// A second pass.
    #[command(flatten)]
    pub hires: HiresArgs,
    /// Another checkpoint that takes over.
    #[command(flatten)]
    pub refiner: RefinerArgs,
}

/// Names looked up and numbers parsed.
#[derive(Debug, Clone, Copy)]
pub struct Choices {
    /// Sampler.
    pub sampler: Sampler,
    /// Scheduler; one in the sampler's name wins.
    pub scheduler: Scheduler,
    /// Noise source.
    pub noise_source: NoiseSource,
    /// Guidance scale.
    pub cfg_scale: f64,
}

impl PromptArgs {
    fn choices(&self) -> Result<Choices, Stop> {
        let (sampler, suffix) =
            vocabulary::find_sampler(&self.sampler).map_err(Stop::usage_text)?;
        let scheduler = vocabulary::find_scheduler(&self.scheduler).map_err(Stop::usage_text)?;
        let noise_source =
            vocabulary::find_noise_source(&self.noise_source).map_err(Stop::usage_text)?;
        let cfg_scale = self.cfg_scale.trim().parse();
        let cfg_scale = cfg_scale.map_err(|_| {
            Stop::usage_text(format!("`--cfg-scale`: not a number: `{}`", self.cfg_scale))
        })?;
        Ok(Choices {
            sampler,
            scheduler: suffix.unwrap_or(scheduler),
            noise_source,
            cfg_scale,
        })
    }

    fn check_numbers(&self, choices: &Choices, start: &Start, config: &Config) -> Result<(), Stop> {
        let numbers = Numbers {
            width: self.width.unwrap_or(1024),
            height: self.height.unwrap_or(1024),
            steps: self.steps,
            cfg_scale: choices.cfg_scale,
            batch_size: self.batch_size,
            batch_count: self.batch_count,
            seed: self.seed,
            subseed: self.subseed,
            subseed_strength: self.subseed_strength,
            prompt: &self.prompt,
            negative_prompt: &self.negative,
        };
        let mut found = check(&numbers, &config.limits);
        let size = self.width.zip(self.height).filter(|_| found.is_empty());
        found.extend(start.check(size, self.batch_size, self.steps, &config.limits));
        refuse(&found)?;
        start.check_batch(self.batch_size)
    }

    fn settings(&self) -> Result<Vec<Setting>, Stop> {
        let rows = [
            ("--device", "device.device", Kind::Text, &self.device),
            ("--dtype", "device.dtype", Kind::Text, &self.dtype),
            ("--threads", "device.threads", Kind::Int, &self.threads),
            (
                "--checkpoint",
                "model.checkpoint",
                Kind::Text,
                &self.checkpoint,
            ),
            ("--vae", "model.vae", Kind::Text, &self.vae),
        ];
        let given = rows
            .into_iter()
            .filter_map(|(flag, key, kind, text)| Some((flag, key, kind, text.as_deref()?)));
        given
            .map(|(flag, key, kind, text)| {
                let value = parse(kind, text)
                    .map_err(|message| Stop::usage_text(format!("flag {flag}: {message}")))?;
                Ok(Setting {
                    key,
                    value,
                    origin: Origin::Flag(flag.into()),
                })
            })
            .collect()
    }

    fn request(&self, choices: &Choices, native_size: (usize, usize)) -> GenerateRequest {
        let typed_as_int = !self.cfg_scale.contains(['.', 'e', 'E']);
        GenerateRequest {
            prompt: self.prompt.clone(),
            negative_prompt: self.negative.clone(),
            seed: resolve_seed(self.seed),
            subseed: resolve_seed(self.subseed),
            subseed_strength: self.subseed_strength as f32,
            sampler: choices.sampler,
            scheduler: choices.scheduler,
            steps: self.steps as usize,
            cfg_scale: choices.cfg_scale as f32,
            width: self.width.map_or(native_size.0, |width| width as usize),
            height: self.height.map_or(native_size.1, |height| height as usize),
            batch_size: self.batch_size as usize,
            batch_count: self.batch_count as usize,
            clip_skip: usize::from(self.clip_skip.max(1)),
            noise_source: choices.noise_source,
            tiling: self.tiling,
            keep_latents: self.save_latents.is_some(),
            infotext: InfotextOptions {
                version: Some(VERSION_TEXT.to_string()),
                cfg_scale_as_int: typed_as_int,
                ..InfotextOptions::default()
            },
            ..GenerateRequest::default()
        }
    }
}

/// One line for all numbers outside their limits.
fn refuse(found: &[Violation]) -> Result<(), Stop> {
    let option = |field: &str| match field {
        "n_iter" => "--batch-count".to_string(),
        "prompt" => "PROMPT".to_string(),
        "negative_prompt" => "--negative".to_string(),
        "hr_second_pass_steps" => "--hr-steps".to_string(),
        field => format!("--{}", field.replace('_', "-")),
    };
    let lines: Vec<String> = found
        .iter()
        .map(|v| format!("`{}` {}", option(v.field), v.message))
        .collect();
    if lines.is_empty() {
        Ok(())
    } else {
        Err(Stop::usage_text(lines.join("; ")))
    }
}

/// Makes the pictures.
///
/// # Errors
/// Exit 2 for what was typed, 1 for the job and its files, 130 after a signal.
pub fn run(args: &PromptArgs, common: &Common) -> Result<(), Stop> {
    let choices = args.choices()?;
    let loaded = load_config(common, args.settings()?, Vec::new())?;
    let mut log = loaded.config.log.clone();
    if args.quiet {
        log.level = "error".into();
    } else if !loaded.origins.contains_key("log.level") {
        // The engine's errors are this command's own, and are reported once.
        log.level = "warn,sdgen::engine=off".into();
    }
    telemetry::init(&log);
    warn_all(&loaded);
    let place = match args.server {
        Some(_) => Place::Server,
        None => Place::Here,
    };
    let start = Start::choose(&args.image, &args.hires, &loaded.config, place)?;
    args.check_numbers(&choices, &start, &loaded.config)?;
    let output = Output::choose(
        args.output.as_deref(),
        args.format.as_deref(),
        &loaded
            .config
            .data_dir
            .join(format!("outputs/{}-images", start.kind())),
    )?;
    output.check_writable()?;
    let runtime = tokio::runtime::Runtime::new().map_err(Stop::failed)?;
    let result = runtime.block_on(async {
        match args.server.clone() {
            Some(url) => remote::run(args, &choices, &start, &output, &url).await,
            None => local(args, &choices, start, &output, &loaded.config).await,
        }
    });
    // A request that a signal cut off must not keep the process.
    runtime.shutdown_background();
    result
}

async fn local(
    args: &PromptArgs,
    choices: &Choices,
    start: Start,
    output: &Output,
    config: &Config,
) -> Result<(), Stop> {
    let started = Instant::now();
    let stop = shutdown::on_signal().map_err(Stop::failed)?;
    let engine = start_engine(config, Devices::First)?;
    let selection = select(engine.catalog(), config)?;
    let bar = progress_bar(
        Verbosity::from_flag(args.quiet),
        (args.steps * args.batch_count) as u64,
    );
    bar.set_message("loading");
    let load_started = Instant::now();
    let model = tokio::select! {
        loaded = engine.load(selection.clone()) => loaded.map_err(Stop::failed)?,
        () = stop.cancelled() => return Err(Stop::Interrupted("interrupted; no picture was made".into())),
    };
    let load_seconds = load_started.elapsed().as_secs_f64();
    let kind = start.kind();
    let mut request = args.request(choices, model.native_size);
    let size = (request.width as i64, request.height as i64);
    refuse(&start.check(Some(size), args.batch_size, args.steps, &config.limits))?;
    if let Some(remark) = start.apply(&mut request, &config.limits)? {
        tracing::warn!("{remark}");
    }
    let catalog = (&**engine.catalog(), &selection);
    let hires_checkpoint = args.hires.hr_checkpoint_name.as_deref();
    checkpoints::add_others(&args.refiner, hires_checkpoint, catalog, &mut request)?;
    engine.catalog().add_networks(&mut request);
    let files = engine.catalog().approximations();
    tokio::task::block_in_place(|| args.codecs.apply(files, &mut request))?;
    let job = Job {
        id: resolve::task_id(kind),
        client: String::new(),
        kind,
        model: selection,
        request: request.clone(),
        preview_every: 0,
    };
    let mut handle = engine.submit(job).await.map_err(Stop::failed)?;
    let outcome = follow(&mut handle, &bar, &stop)
        .await
        .map_err(Stop::failed)?;
    bar.finish_and_clear();
    let seconds = Seconds {
        load: Some(load_seconds),
        ..Seconds::default()
    };
    finish(args, output, &engine, &outcome, &request, seconds, started)
}

/// The checkpoint of the command line or the settings, else of A1111's options, else the first one.
fn select(catalog: &Catalog, config: &Config) -> Result<Selection, Stop> {
    let options = OptionStore::open(config.settings_file())
        .map_or_else(|_| Options::defaults(), |store| store.snapshot());
    let checkpoint = match &config.model.checkpoint {
        Some(name) => catalog.find_or_open(name).map_err(Stop::usage)?,
        None => catalog
            .find(options.text("sd_model_checkpoint"))
            .unwrap_or_else(|_| catalog.default_checkpoint()),
    };
    let vae = match &config.model.vae {
        Some(name) => catalog.find_or_open_vae(name).map_err(Stop::usage)?,
        None => VaeChoice::from_options(
            options.text("sd_vae"),
            options.flag("sd_vae_overrides_per_model_preferences"),
        ),
    };
    catalog
        .select_or_own(checkpoint, &vae)
        .map_err(Stop::failed)
}

/// Writes files and report. Of an interrupted job only finished batches are kept.
fn finish(
    args: &PromptArgs,
    output: &Output,
    engine: &Engine,
    outcome: &Outcome,
    request: &GenerateRequest,
    mut seconds: Seconds,
    started: Instant,
) -> Result<(), Stop> {
    let generated = &outcome.generated;
    let complete = (outcome.finished_batches * request.batch_size).min(generated.images.len());
    let images = &generated.images[..complete];
    let save_started = Instant::now();
    let files = output.write(images)?;
    if let (Some(path), false) = (&args.save_latents, images.is_empty()) {
        // A job that worked on a part of its picture has latents of its own size.
        let size = request.init_image.as_ref().map_or_else(
            || images[0].image.dimensions(),
            |_| (request.width as u32, request.height as u32),
        );
        write_latents(path, images, size)?;
    }
    for comment in &generated.comments {
        tracing::warn!("{comment}");
    }
    let timings = &generated.timings;
    let sample = timings.sample.as_secs_f64();
    seconds.text = Some(timings.text.as_secs_f64());
    seconds.sample = Some(sample);
    seconds.decode = Some(timings.decode.as_secs_f64());
    seconds.steps_per_s = (sample > 0.0).then(|| timings.steps as f64 / sample);
    seconds.save = save_started.elapsed().as_secs_f64();
    seconds.total = started.elapsed().as_secs_f64();
    let device = &engine.devices()[0];
    let report = Report {
        files,
        seeds: images.iter().map(|image| image.seed).collect(),
        infotexts: images.iter().map(|image| image.infotext.clone()).collect(),
        seconds,
        device: Some(device.device.clone()),
        dtype: Some(device.dtype.to_string()),
        checkpoint: outcome.model.title.clone(),
    };
    report.print(Form::from_flag(args.json))?;
    if generated.interrupted {
        let planned = request.batch_size * request.batch_count;
        return Err(Stop::Interrupted(format!(
            "interrupted; {complete} of {planned} pictures written"
        )));
    }
    Ok(())
}

/// A bar over denoising steps.
#[must_use]
pub fn progress_bar(verbosity: Verbosity, steps: u64) -> ProgressBar {
    verbosity.bar(
        Some(steps),
        "{msg:9} {bar:30} {pos}/{len} {elapsed} (eta {eta})",
    )
}
