//! From a request on the wire to a job: checks, options in force, names looked up, seeds drawn.
//!
//! Everything that can be refused is refused here, before a place in the queue is taken.

use serde_json::{Map, Value};

use super::App;
use super::error::{ApiError, Problem};
use super::options::{self, Options};
use super::types::Txt2Img;
use super::{styles, vocabulary};
use crate::config::VERSION_TEXT;
use crate::engine::checkpoint::{Selection, VaeChoice};
use crate::engine::limits::{Numbers, check, resolve_seed};
use crate::engine::{self, Job};
use crate::imaging::Format;
use crate::pipeline::GenerateRequest;
use crate::pipeline::request::InfotextOptions;

/// Bytes of a client's task id; it is kept and listed while the job waits.
const LONGEST_TASK_ID: usize = 256;

/// A checked request and its job.
#[derive(Debug)]
pub struct Prepared {
    /// The complete request model, for the response's `parameters`.
    pub wire: Map<String, Value>,
    /// The part that acts.
    pub request: Txt2Img,
    /// Options in force for this request.
    pub options: Options,
    /// Format of the answer and of files.
    pub format: Format,
    /// For the engine.
    pub job: Job,
}

/// Checks a txt2img request and resolves it. Hashes a checkpoint seen for the first time, so it blocks: not for async threads.
///
/// # Errors
/// 422 for fields and limits, 400 for unknown names, 404 for unknown checkpoints, 501 for what is not supported.
pub fn prepare(app: &App, wire: Map<String, Value>) -> Result<Prepared, ApiError> {
    let request: Txt2Img = serde_json::from_value(Value::Object(wire.clone()))
        .map_err(|error| ApiError::failure("ValueError", error.to_string()))?;
    check_numbers(app, &request)?;
    if request
        .force_task_id
        .as_ref()
        .is_some_and(|id| id.len() > LONGEST_TASK_ID)
    {
        let message = format!("has more than {LONGEST_TASK_ID} bytes");
        return Err(vec![Problem::limit("force_task_id", message)].into());
    }
    refuse_unsupported(&request)?;
    refuse_scripts(&request)?;
    let options = options_in_force(app, &request)?;
    let format: Format = options
        .text("samples_format")
        .parse()
        .map_err(|error: crate::imaging::Error| ApiError::bad_request(error.to_string()))?;
    let (prompt, negative_prompt) = styled(app, &request);
    let generate = build_request(&request, prompt, negative_prompt, &options)?;
    let model = select(app, &options)?;
    let preview_every = if options.flag("live_previews_enable") {
        options.int("show_progress_every_n_steps").max(0) as usize
    } else {
        0
    };
    let id = request
        .force_task_id
        .clone()
        .filter(|id| !id.is_empty())
        .unwrap_or_else(|| task_id("txt2img"));
    let job = Job {
        id,
        kind: "txt2img",
        model,
        request: generate,
        preview_every,
    };
    Ok(Prepared {
        wire,
        request,
        options,
        format,
        job,
    })
}

/// The checkpoint and VAE that the options name. Blocks while a file is hashed.
///
/// # Errors
/// The checkpoint is unknown or unreadable.
pub fn select(app: &App, options: &Options) -> Result<Selection, engine::Error> {
    let catalog = app.engine.catalog();
    let checkpoint = match options.text("sd_model_checkpoint") {
        "" => catalog.default_checkpoint(),
        name => catalog.find(name)?,
    };
    if let Some(fixed) = &app.config.model.vae {
        return catalog.select(checkpoint, &catalog.find_or_open_vae(fixed)?);
    }
    let choice = VaeChoice::from_option(options.text("sd_vae"));
    match catalog.select(checkpoint.clone(), &choice) {
        // As A1111 does: a stale setting must not make every request fail.
        Err(engine::Error::VaeNotFound { name, .. }) => {
            tracing::warn!(vae = name, "VAE not found, the checkpoint's own is used");
            catalog.select(checkpoint, &VaeChoice::Own)
        }
        other => other,
    }
}

/// `task(txt2img-XXXXXXX)` with seven random letters or digits.
#[must_use]
pub fn task_id(kind: &str) -> String {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
    let random: String = (0..7)
        .map(|_| char::from(LETTERS[rand::random_range(0..LETTERS.len())]))
        .collect();
    format!("task({kind}-{random})")
}

fn check_numbers(app: &App, request: &Txt2Img) -> Result<(), ApiError> {
    let numbers = Numbers {
        width: request.width,
        height: request.height,
        steps: request.steps,
        cfg_scale: request.cfg_scale,
        batch_size: request.batch_size,
        batch_count: request.n_iter,
        seed: request.seed,
        subseed: request.subseed,
        subseed_strength: request.subseed_strength,
        prompt: &request.prompt,
        negative_prompt: &request.negative_prompt,
    };
    let found = check(&numbers, &app.config.limits);
    let problems: Vec<Problem> = found
        .into_iter()
        .map(|v| Problem::limit(v.field, v.message))
        .collect();
    if problems.is_empty() {
        Ok(())
    } else {
        Err(problems.into())
    }
}

fn refuse_unsupported(request: &Txt2Img) -> Result<(), ApiError> {
    let set = |text: &Option<String>| {
        text.as_deref()
            .is_some_and(|text| !matches!(text, "" | "None"))
    };
    if request.enable_hr || request.firstphase_width != 0 || request.firstphase_height != 0 {
        return Err(ApiError::not_supported("hires fix (`enable_hr`)"));
    }
    if set(&request.refiner_checkpoint) {
        return Err(ApiError::not_supported(
            "the refiner (`refiner_checkpoint`)",
        ));
    }
    if set(&request.infotext) {
        return Err(ApiError::not_supported("`infotext` in a request"));
    }
    Ok(())
}

/// A1111 answers 422 to unknown scripts. Entries whose every argument is off are harmless, and clients send them.
fn refuse_scripts(request: &Txt2Img) -> Result<(), ApiError> {
    let unknown = |name: &str| {
        ApiError::Http(
            axum::http::StatusCode::UNPROCESSABLE_ENTITY,
            format!("Script '{name}' not found"),
        )
    };
    if let Some(name) = request
        .script_name
        .as_deref()
        .filter(|name| !matches!(*name, "" | "None"))
    {
        return Err(unknown(name));
    }
    let is_off = |script: &Value| match script.get("args") {
        None | Some(Value::Null) => true,
        Some(Value::Array(items)) => items.iter().all(is_falsy),
        Some(Value::Object(items)) => items.values().all(is_falsy),
        Some(_) => false,
    };
    match request
        .alwayson_scripts
        .iter()
        .find(|(_, script)| !is_off(script))
    {
        Some((name, _)) => Err(unknown(name)),
        None => Ok(()),
    }
}

fn is_falsy(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.iter().all(is_falsy),
        Value::Object(items) => items.is_empty(),
    }
}

/// The stored options with the request's overrides; the overrides stay in memory if the request says so.
fn options_in_force(app: &App, request: &Txt2Img) -> Result<Options, ApiError> {
    let mut in_force = app.options.snapshot();
    let Some(sent) = request.override_settings.clone() else {
        return Ok(in_force);
    };
    let mut overrides = options::check(sent)?;
    if let Some(name) = overrides.get("sd_model_checkpoint").and_then(Value::as_str) {
        match app.engine.catalog().find(name) {
            Ok(checkpoint) => {
                drop(overrides.insert("sd_model_checkpoint".into(), checkpoint.title().into()));
            }
            Err(engine::Error::CheckpointNotFound { name, .. }) => {
                // A1111's contract: the override is dropped and the request goes on with the current model.
                tracing::warn!(
                    checkpoint = name,
                    "override of `sd_model_checkpoint` names no checkpoint and is dropped"
                );
                overrides.remove("sd_model_checkpoint");
            }
            Err(error) => return Err(error.into()),
        }
    }
    for (key, value) in &overrides {
        if !value.is_null() {
            in_force.set(key, value.clone());
        }
    }
    if !request.override_settings_restore_afterwards {
        app.options.apply(&overrides);
    }
    Ok(in_force)
}

/// Prompts with the request's styles; unknown names are ignored, as in A1111.
fn styled(app: &App, request: &Txt2Img) -> (String, String) {
    let wanted = request.styles.as_deref().unwrap_or_default();
    let known = if wanted.is_empty() {
        Vec::new()
    } else {
        styles::load(&app.config)
    };
    let chosen: Vec<_> = wanted
        .iter()
        .filter_map(|name| known.iter().find(|style| style.name == *name))
        .collect();
    let texts = |pick: fn(&crate::prompt::styles::Style) -> &str| {
        chosen.iter().map(|style| pick(style)).collect::<Vec<_>>()
    };
    let prompt = crate::prompt::apply_styles(&request.prompt, &texts(|style| &style.prompt));
    let negative_prompt = crate::prompt::apply_styles(
        &request.negative_prompt,
        &texts(|style| &style.negative_prompt),
    );
    (prompt, negative_prompt)
}

fn build_request(
    request: &Txt2Img,
    prompt: String,
    negative_prompt: String,
    options: &Options,
) -> Result<GenerateRequest, ApiError> {
    let wanted = request
        .sampler_name
        .as_deref()
        .filter(|name| !name.is_empty())
        .unwrap_or(&request.sampler_index);
    let (sampler, suffix) = vocabulary::find_sampler(wanted).map_err(ApiError::bad_request)?;
    let scheduler = match (
        suffix,
        request.scheduler.as_deref().filter(|name| !name.is_empty()),
    ) {
        (Some(scheduler), _) => scheduler,
        (None, None) => crate::sampling::Scheduler::Automatic,
        (None, Some(name)) => vocabulary::find_scheduler(name).map_err(ApiError::bad_request)?,
    };
    let resize = (request.seed_resize_from_w, request.seed_resize_from_h);
    Ok(GenerateRequest {
        prompt,
        negative_prompt,
        seed: resolve_seed(request.seed),
        subseed: resolve_seed(request.subseed),
        subseed_strength: request.subseed_strength as f32,
        seed_resize_from: (resize.0 > 0 && resize.1 > 0)
            .then_some((resize.0 as usize, resize.1 as usize)),
        sampler,
        scheduler,
        sampler_options: vocabulary::sampler_options(request, options),
        steps: request.steps as usize,
        cfg_scale: request.cfg_scale as f32,
        width: request.width as usize,
        height: request.height as usize,
        batch_size: request.batch_size as usize,
        batch_count: request.n_iter as usize,
        clip_skip: options.int("CLIP_stop_at_last_layers").clamp(1, 12) as usize,
        noise_source: vocabulary::find_noise_source(options.text("randn_source"))
            .map_err(ApiError::bad_request)?,
        emphasis: vocabulary::find_emphasis(options.text("emphasis"))
            .map_err(ApiError::bad_request)?,
        tiling: request.tiling.unwrap_or_else(|| options.flag("tiling")),
        init_image: None,
        hires: None,
        keep_latents: false,
        infotext: InfotextOptions {
            model_hash: options.flag("add_model_hash_to_info"),
            model_name: options.flag("add_model_name_to_info"),
            version: options
                .flag("add_version_to_infotext")
                .then(|| VERSION_TEXT.to_string()),
            cfg_scale_as_int: false,
        },
    })
}
