//! From a request on the wire to a job: checks, options in force, names looked up, seeds drawn.
//!
//! Everything that can be refused is refused here, before a place in the queue is taken.

use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::App;
use super::error::{ApiError, Problem};
use super::init_images::{self, Encoded};
use super::masks::MaskOutputs;
use super::options::Options;
use super::pictures;
use super::prompts::Additions;
use super::scripts::{self, Page};
use super::types::{Generation, HiresFields, ImageFields, SILENT};
use super::upscalers::Upscalers;
use super::{checkpoints, codecs, hires, overrides, script_runs, vocabulary};
use crate::config::VERSION_TEXT;
use crate::engine::checkpoint::{Checkpoint, Selection, VaeChoice};
use crate::engine::limits::{self, Numbers, Violation, check, resolve_seed};
use crate::engine::residents::ModelLimits;
use crate::engine::{self, Job};
use crate::imaging::{self, Format};
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
    pub request: Generation,
    /// Options in force for this request.
    pub options: Options,
    /// Format of the answer and of files.
    pub format: Format,
    /// What is returned besides the pictures.
    pub masks: Option<MaskOutputs>,
    /// Remarks for the user that were made before the job began.
    pub remarks: Vec<String>,
    /// For the engine.
    pub job: Job,
}

/// Checks a txt2img request and resolves it. Hashes a checkpoint seen for the first time, so it blocks: not for async threads.
///
/// # Errors
/// 422 for fields and limits, 400 for unknown names, 404 for unknown checkpoints, 501 for what is not supported.
pub fn txt2img(app: &App, mut wire: Map<String, Value>) -> Result<Prepared, ApiError> {
    let mut request: Generation = part(&wire)?;
    if scripts::is_list_of_prompts(&request, Page::Txt2img)? {
        return script_runs::prompts(app, wire, &request, txt2img);
    }
    let mut fields: HiresFields = part(&wire)?;
    for (name, ..) in SILENT {
        wire.remove(*name);
    }
    let options = overrides::in_force(app, &request)?;
    hires::apply_first_phase(&mut request, &mut fields);
    hires::apply_old_sizes(&mut request, &mut fields, &options);
    check_numbers(app, &request)?;
    if fields.enable_hr {
        let size = (request.width, request.height);
        let numbers = hires::numbers(&fields, size, request.batch_size, request.steps);
        refuse(limits::check_hires(&numbers, &app.config.limits))?;
    }
    let additions = Additions::of(app, &request, &options);
    let mut generate = resolve(app, &request, (&options, &additions), Page::Txt2img)?;
    if fields.enable_hr {
        let upscalers = Upscalers::new(app.engine.catalog().upscalers(), &options);
        let mut second = hires::build(&fields, &upscalers).map_err(ApiError::bad_request)?;
        if !second.prompt.is_empty() {
            second.prompt = additions.positive(&second.prompt);
        }
        if !second.negative_prompt.is_empty() {
            second.negative_prompt = additions.negative(&second.negative_prompt);
        }
        generate.hires = Some(second);
        checkpoints::add_hires(app, &fields, &options, &mut generate)?;
    }
    finish(app, "txt2img", wire, request, options, generate)
}

/// Checks an img2img request and resolves it, pictures decoded. Blocks as [`txt2img`] does.
///
/// # Errors
/// Those of [`txt2img`]; 404 without a picture, 400 for one that cannot be used.
pub fn img2img(app: &App, mut wire: Map<String, Value>) -> Result<Prepared, ApiError> {
    let mut request: Generation = part(&wire)?;
    if scripts::is_list_of_prompts(&request, Page::Img2img)? {
        return script_runs::prompts(app, wire, &request, img2img);
    }
    let mut fields: ImageFields = part(&wire)?;
    let soft = scripts::soft_inpainting(&request)?;
    fields.mask_round &= soft.is_none();
    let pictures = Encoded::take(&mut wire)?;
    let options = overrides::in_force(app, &request)?;
    check_numbers(app, &request)?;
    let additions = Additions::of(app, &request, &options);
    let mut generate = resolve(app, &request, (&options, &additions), Page::Img2img)?;
    refuse(limits::check_image(&pictures::numbers(
        &fields,
        &options,
        request.steps,
    )))?;
    match_batch(pictures.images.len(), &mut request, &mut generate)?;
    let limits = &app.config.limits;
    let (sources, originals) = pictures.decode(&fields, &options, limits)?;
    generate.infotext.init_image_hash = originals.last().map(|original| original.hash.clone());
    let size = (generate.width as u32, generate.height as u32);
    let shape = (size, generate.batch_size);
    let (mut init, remark) = pictures::build(&fields, sources, shape, &options, limits)
        .map_err(|error| ApiError::bad_request(error.to_string()))?;
    let upscalers = Upscalers::new(app.engine.catalog().upscalers(), &options);
    init.upscaler = upscalers.for_img2img(&options);
    if let Some(mask) = &mut init.mask {
        mask.soft = soft;
    }
    let runs_once = !scripts::is_selected(&request, Page::Img2img)?;
    let masks = runs_once
        .then(|| MaskOutputs::claim(&mut init, &options))
        .flatten();
    generate.init_image = Some(init);
    generate.script = script_runs::of_picture(app, &request, &options, &generate)?;
    let prepared = finish(app, "img2img", wire, request, options, generate)?;
    init_images::save(&originals, &prepared.options, &app.config.data_dir)?;
    let remarks: Vec<String> = remark.into_iter().map(String::from).collect();
    for remark in &remarks {
        tracing::warn!("{remark}");
    }
    Ok(Prepared {
        masks,
        remarks,
        ..prepared
    })
}

/// Makes the batch as large as the number of its pictures, unless one is for all.
fn match_batch(
    pictures: usize,
    request: &mut Generation,
    generate: &mut GenerateRequest,
) -> Result<(), ApiError> {
    let most = generate.batch_size;
    match pictures {
        0 => Err(ApiError::Http(
            StatusCode::NOT_FOUND,
            "Init image not found".into(),
        )),
        1 => Ok(()),
        several if several > most => Err(ApiError::bad_request(format!(
            "bad number of images passed: {several}; expecting {most} or less"
        ))),
        several => {
            request.batch_size = several as i64;
            generate.batch_size = several;
            Ok(())
        }
    }
}

/// A part of a request model.
fn part<'a, T: Deserialize<'a>>(
    model: impl serde::Deserializer<'a, Error = serde_json::Error>,
) -> Result<T, ApiError> {
    T::deserialize(model).map_err(|error| ApiError::failure("ValueError", error.to_string()))
}

/// What both requests have in common: checks, and a job without pictures or second pass.
fn resolve(
    app: &App,
    request: &Generation,
    (options, additions): (&Options, &Additions),
    page: Page,
) -> Result<GenerateRequest, ApiError> {
    if request
        .force_task_id
        .as_ref()
        .is_some_and(|id| id.len() > LONGEST_TASK_ID)
    {
        let message = format!("has more than {LONGEST_TASK_ID} bytes");
        return Err(vec![Problem::limit("force_task_id", message)].into());
    }
    scripts::check(request, page)?;
    let prompt = additions.positive(&request.prompt);
    let negative_prompt = additions.negative(&request.negative_prompt);
    let mut generate = build_request(request, prompt, negative_prompt, options)?;
    checkpoints::add_refiner(app, request, options, &mut generate)?;
    Ok(generate)
}

fn finish(
    app: &App,
    kind: &'static str,
    wire: Map<String, Value>,
    request: Generation,
    options: Options,
    mut generate: GenerateRequest,
) -> Result<Prepared, ApiError> {
    let format: Format = options
        .text("samples_format")
        .parse()
        .map_err(|error: imaging::Error| ApiError::bad_request(error.to_string()))?;
    app.engine.catalog().add_networks(&mut generate);
    if request.disable_extra_networks {
        generate.loras = None;
    }
    let checked = generate.check_networks();
    checked.map_err(|error| ApiError::bad_request(error.to_string()))?;
    let model = select(app, &options)?;
    overrides::keep(app, &request, &options);
    codecs::apply(app, &options, &mut generate)?;
    let preview_every = codecs::preview_every(&options);
    let id = request
        .force_task_id
        .clone()
        .filter(|id| !id.is_empty())
        .unwrap_or_else(|| task_id(kind));
    let job = Job {
        id,
        client: String::new(),
        kind,
        model,
        request: generate,
        preview_every,
    };
    Ok(Prepared {
        wire,
        request,
        options,
        format,
        masks: None,
        remarks: Vec::new(),
        job,
    })
}

/// The checkpoint and VAE that the options name. Blocks while a file is hashed.
///
/// # Errors
/// The checkpoint is unknown or unreadable.
pub fn select(app: &App, options: &Options) -> Result<Selection, engine::Error> {
    let catalog = app.engine.catalog();
    let memory = app.config.model.memory_mib;
    app.engine.keep_models(ModelLimits {
        count: options.int("sd_checkpoints_limit").clamp(1, 100) as usize,
        bytes: (memory > 0).then_some(memory << 20),
    });
    let checkpoint = match options.text("sd_model_checkpoint") {
        "" => catalog.default_checkpoint(),
        name => catalog.find(name)?,
    };
    select_for(app, checkpoint, options)
}

/// A checkpoint with the VAE that the options name. Blocks while a file is hashed.
///
/// # Errors
/// A file is unreadable.
pub fn select_for(
    app: &App,
    checkpoint: Checkpoint,
    options: &Options,
) -> Result<Selection, engine::Error> {
    let catalog = app.engine.catalog();
    if let Some(fixed) = &app.config.model.vae {
        return catalog.select(checkpoint, &catalog.find_or_open_vae(fixed)?);
    }
    let overrides = options.flag("sd_vae_overrides_per_model_preferences");
    let choice = VaeChoice::from_options(options.text("sd_vae"), overrides);
    catalog.select_or_own(checkpoint, &choice)
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

fn check_numbers(app: &App, request: &Generation) -> Result<(), ApiError> {
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
    refuse(check(&numbers, &app.config.limits))
}

fn refuse(found: Vec<Violation>) -> Result<(), ApiError> {
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

fn build_request(
    request: &Generation,
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
        infotext: InfotextOptions {
            model_hash: options.flag("add_model_hash_to_info"),
            model_name: options.flag("add_model_name_to_info"),
            vae_hash: options.flag("add_vae_hash_to_info"),
            vae_name: options.flag("add_vae_name_to_info"),
            lora_hashes: options.flag("lora_add_hashes_to_infotext"),
            embedding_hashes: options.flag("textual_inversion_add_hashes_to_infotext"),
            version: options
                .flag("add_version_to_infotext")
                .then(|| VERSION_TEXT.to_string()),
            ..InfotextOptions::default()
        },
        settings: overrides::settings(options),
        ..GenerateRequest::default()
    })
}
