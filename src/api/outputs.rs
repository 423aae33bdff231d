//! From finished pictures to the answer: encoding, base64, files, the `info` text.
//!
//! Runs on blocking threads, off the device thread: the next job starts while the last one is encoded. Names and the grid rule
//! follow A1111's `processing.py` and `images.py`; the primitives are those of `imaging`.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::{Rgb, RgbImage};
use serde_json::{Map, Value, json};

use super::error::{ApiError, with_causes};
use super::large_copy;
use super::options::Options;
use super::pictures::parse_color;
use super::resolve::Prepared;
use crate::config::VERSION_TEXT;
use crate::engine::Outcome;
use crate::imaging::infotext::python_float;
use crate::imaging::naming::{NameContext, apply_pattern};
use crate::imaging::{self, EncodeOptions, Encoded, Format, GridShape, Pixels, SaveRequest};
use crate::pipeline::{GeneratedImage, Script};

/// Encodes, saves and describes the pictures of a job: the whole body of the answer.
///
/// # Errors
/// A picture cannot be encoded or a file cannot be written.
pub fn answer(
    prepared: &Prepared,
    mut outcome: Outcome,
    data_dir: &Path,
) -> Result<Value, ApiError> {
    let masks = mask_files(prepared, &mut outcome)?;
    let outcome = &outcome;
    let options = &prepared.options;
    let images = &outcome.generated.images;
    let mut files = Vec::with_capacity(images.len() + 1);
    for image in images {
        files.push(encode(
            options,
            prepared.format,
            &image.image,
            &image.infotext,
        )?);
    }
    if prepared.request.save_images && options.flag("samples_save") {
        save_all(prepared, outcome, &files, &masks, data_dir)?;
    }
    let mut infotexts: Vec<&str> = images.iter().map(|image| image.infotext.as_str()).collect();
    let has_grid = wants_grid(prepared, outcome);
    if has_grid {
        let grid = grid_file(prepared, outcome)?;
        if options.flag("grid_save") && prepared.request.save_images {
            save_grid(prepared, &grid, infotexts[0], data_dir)?;
        }
        infotexts.insert(0, infotexts[0]);
        files.insert(0, grid.1);
    }
    for mask in masks.into_iter().filter(|mask| mask.returned) {
        infotexts.push(&images[mask.index].infotext);
        files.push(mask.file);
    }
    let info = info(prepared, outcome, &infotexts, usize::from(has_grid));
    let send = prepared.request.send_images;
    let images: Vec<String> = files
        .iter()
        .filter(|_| send)
        .map(|file| STANDARD.encode(&file.bytes))
        .collect();
    let parameters = parameters(prepared, &outcome.generated.comments);
    Ok(json!({ "images": images, "parameters": parameters, "info": info.to_string() }))
}

/// The request model, with the job's remarks where A1111's jobs have them: as keys of `comments`. Its `info` has no place for them.
fn parameters(prepared: &Prepared, comments: &[String]) -> Map<String, Value> {
    let mut parameters = prepared.wire.clone();
    let remarks = prepared.remarks.iter().chain(comments);
    let remarks: Map<String, Value> = remarks.map(|text| (text.clone(), json!(1))).collect();
    if !remarks.is_empty() {
        parameters.insert("comments".into(), Value::Object(remarks));
    }
    parameters
}

/// A mask or painted part.
struct MaskFile {
    /// Number of its result.
    index: usize,
    /// End of its file's name, if it is saved.
    saved: Option<&'static str>,
    /// Whether it is in the answer.
    returned: bool,
    file: Encoded,
}

/// The masks and painted parts of all results; the results themselves are completed.
fn mask_files(prepared: &Prepared, outcome: &mut Outcome) -> Result<Vec<MaskFile>, ApiError> {
    let job = &prepared.job.request;
    let (Some(wanted), Some(init)) = (prepared.masks, &job.init_image) else {
        return Ok(Vec::new());
    };
    let mut files = Vec::new();
    for (index, image) in outcome.generated.images.iter_mut().enumerate() {
        let masked = wanted
            .complete(init, index % job.batch_size, &image.image)
            .map_err(|error| ApiError::failure("ValueError", with_causes(&error)))?;
        let Some(masked) = masked else { continue };
        image.image = masked.result;
        let (options, format, text) = (&prepared.options, prepared.format, &image.infotext);
        let file = |file, [returned, saved]: [&str; 2], suffix| MaskFile {
            index,
            saved: options.flag(saved).then_some(suffix),
            returned: options.flag(returned),
            file,
        };
        if let Some(mask) = &masked.mask {
            let mask = encode(options, format, mask, text)?;
            files.push(file(mask, ["return_mask", "save_mask"], "-mask"));
        }
        if let Some(composite) = &masked.composite {
            let composite = encode(options, format, composite, text)?;
            let keys = ["return_mask_composite", "save_mask_composite"];
            files.push(file(composite, keys, "-mask-composite"));
        }
    }
    Ok(files)
}

/// Encodes one picture of a job as its answer would have it.
///
/// # Errors
/// It cannot be encoded.
pub fn encode_image(prepared: &Prepared, image: &GeneratedImage) -> Result<Encoded, ApiError> {
    encode(
        &prepared.options,
        prepared.format,
        &image.image,
        &image.infotext,
    )
}

fn encode<'a>(
    options: &Options,
    format: Format,
    image: impl Into<Pixels<'a>>,
    infotext: &str,
) -> Result<Encoded, ApiError> {
    let how = EncodeOptions {
        format,
        jpeg_quality: options.int("jpeg_quality").clamp(1, 100) as u8,
        infotext: options.flag("enable_pnginfo").then_some(infotext),
        ..EncodeOptions::default()
    };
    imaging::encode(image, &how)
        .map_err(|error| ApiError::failure("ValueError", with_causes(&error)))
}

/// A1111's rule: only for saved jobs of more than one picture. Of scripts only loopback has one, saved or not.
fn wants_grid(prepared: &Prepared, outcome: &Outcome) -> bool {
    let (options, count) = (&prepared.options, outcome.generated.images.len());
    let fewest = if options.flag("grid_only_if_multiple") {
        2
    } else {
        1
    };
    let wants = match &prepared.job.request.script {
        None => prepared.request.save_images && count >= fewest,
        Some(Script::Loopback(_)) => count > 1,
        Some(Script::Jobs(_) | Script::SdUpscale(_)) => false,
    };
    wants && options.flag("return_grid")
}

fn grid_file(prepared: &Prepared, outcome: &Outcome) -> Result<(RgbImage, Encoded), ApiError> {
    let options = &prepared.options;
    let shape = match options.int("n_rows") {
        _ if prepared.job.request.script.is_some() => GridShape::Rows(1),
        rows if rows > 0 => GridShape::Rows(rows as usize),
        0 => GridShape::Rows(prepared.job.request.batch_size),
        _ if options.flag("grid_prevent_empty_spots") => GridShape::Full,
        _ => GridShape::Square,
    };
    let pictures: Vec<RgbImage> = outcome
        .generated
        .images
        .iter()
        .map(|image| image.image.clone())
        .collect();
    let background = parse_color(options.text("grid_background_color")).unwrap_or(Rgb([255; 3]));
    let grid = imaging::grid(&pictures, shape, background)
        .map_err(|error| ApiError::failure("ValueError", with_causes(&error)))?;
    let infotext = outcome
        .generated
        .images
        .first()
        .map(|image| image.infotext.as_str())
        .unwrap_or_default();
    let format = options.text("grid_format").parse().unwrap_or_default();
    let file = encode(options, format, &grid, infotext)?;
    Ok((grid, file))
}

fn save_all(
    prepared: &Prepared,
    outcome: &Outcome,
    files: &[Encoded],
    masks: &[MaskFile],
    data_dir: &Path,
) -> Result<(), ApiError> {
    let options = &prepared.options;
    let batch_size = prepared.job.request.batch_size;
    // The batch that an interrupt cut short is not kept, unless asked for.
    let complete = if options.flag("save_incomplete_images") || !outcome.generated.interrupted {
        files.len()
    } else {
        outcome.finished_batches * batch_size
    };
    let by_date = options.flag("save_to_dirs");
    let pattern = match (options.text("samples_filename_pattern"), by_date) {
        ("", true) => "[seed]",
        ("", false) => "[seed]-[prompt_spaces]",
        (pattern, _) => pattern,
    };
    for (index, (file, image)) in files
        .iter()
        .zip(&outcome.generated.images)
        .take(complete)
        .enumerate()
    {
        let cfg_scale = python_float(prepared.request.cfg_scale);
        let job = prepared.job.request.of_image(index);
        let denoises = job.init_image.is_some() || job.hires.is_some();
        let denoising = denoises.then(|| python_float(prepared.request.denoising_strength));
        let context = NameContext {
            denoising: denoising.as_deref(),
            ..name_context(prepared, outcome, image, index, &cfg_scale)
        };
        let root = data_dir.join(options.text(&format!("outdir_{}_samples", prepared.job.kind)));
        let subdirectory = directory(options, by_date, &context);
        let stem = apply_pattern(pattern, &context);
        let request = SaveRequest {
            root: &root,
            subdirectory: &subdirectory,
            basename: "",
            stem: &stem,
            numbered: options.flag("save_images_add_number"),
            extension: file.format.extension(),
            bytes: &file.bytes,
            sidecar: options.flag("save_txt").then_some(&image.infotext),
        };
        save_with_copy(&request, &image.image, &image.infotext, options)?;
        for mask in masks.iter().filter(|mask| mask.index == index) {
            let Some(suffix) = mask.saved else { continue };
            save_file(&SaveRequest {
                stem: &format!("{stem}{suffix}"),
                extension: mask.file.format.extension(),
                bytes: &mask.file.bytes,
                ..request
            })?;
        }
    }
    Ok(())
}

fn save_grid(
    prepared: &Prepared,
    (picture, grid): &(RgbImage, Encoded),
    infotext: &str,
    data_dir: &Path,
) -> Result<(), ApiError> {
    let options = &prepared.options;
    let context = NameContext {
        time: chrono::Local::now().fixed_offset(),
        ..NameContext::default()
    };
    let request = SaveRequest {
        root: &data_dir.join(options.text(&format!("outdir_{}_grids", prepared.job.kind))),
        subdirectory: &directory(options, options.flag("grid_save_to_dirs"), &context),
        basename: "grid",
        stem: "",
        numbered: true,
        extension: grid.format.extension(),
        bytes: &grid.bytes,
        sidecar: options.flag("save_txt").then_some(infotext),
    };
    save_with_copy(&request, picture, infotext, options)
}

fn save_file(request: &SaveRequest<'_>) -> Result<PathBuf, ApiError> {
    imaging::save(request).map_err(|error| ApiError::failure("OSError", with_causes(&error)))
}

/// Saves a file, and a JPEG beside it if it is large.
fn save_with_copy(
    request: &SaveRequest<'_>,
    picture: &RgbImage,
    infotext: &str,
    options: &Options,
) -> Result<(), ApiError> {
    let path = save_file(request)?;
    if let Some(copy) = large_copy::of(picture, request.bytes.len(), infotext, options)
        && let Err(error) = imaging::save_beside(&path, "jpg", &copy.bytes)
    {
        tracing::warn!(error = with_causes(&error), "no JPEG copy was saved");
    }
    Ok(())
}

fn directory(options: &Options, by_date: bool, context: &NameContext<'_>) -> String {
    if by_date {
        apply_pattern(options.text("directories_filename_pattern"), context)
    } else {
        String::new()
    }
}

fn name_context<'a>(
    prepared: &'a Prepared,
    outcome: &'a Outcome,
    image: &'a GeneratedImage,
    index: usize,
    cfg_scale: &'a str,
) -> NameContext<'a> {
    let job = prepared.job.request.of_image(index);
    NameContext {
        seed: image.seed,
        all_seeds: &outcome.generated.seeds,
        steps: job.steps,
        cfg_scale,
        size: image.image.dimensions(),
        sampler: job.sampler.label(),
        scheduler: job.scheduler.label(),
        model_hash: outcome.model.shorthash(),
        model_name: &outcome.model.name,
        vae_filename: outcome.model.vae_name.as_deref().unwrap_or_default(),
        time: chrono::Local::now().fixed_offset(),
        job_timestamp: &outcome.job_timestamp,
        prompt: &job.prompt,
        prompt_no_styles: &prepared.request.prompt,
        negative_prompt: &job.negative_prompt,
        pixels: image.image.as_raw(),
        batch_index: index % job.batch_size,
        batch_size: job.batch_size,
        iteration: index / job.batch_size,
        batch_count: job.batch_count,
        clip_skip: job.clip_skip,
        ..NameContext::default()
    }
}

/// The `info` object, exactly A1111 1.10's keys in its order.
fn info(
    prepared: &Prepared,
    outcome: &Outcome,
    infotexts: &[&str],
    index_of_first_image: usize,
) -> Value {
    let (request, wire, job) = (&prepared.request, &prepared.wire, &prepared.job.request);
    let generated = &outcome.generated;
    let each: Vec<_> = (0..generated.seeds.len())
        .map(|i| job.of_image(i))
        .collect();
    let mut info = Map::new();
    let mut put = |key: &str, value: Value| drop(info.insert(key.to_string(), value));
    put("prompt", json!(job.prompt));
    put("all_prompts", each.iter().map(|job| &*job.prompt).collect());
    put("negative_prompt", json!(job.negative_prompt));
    put(
        "all_negative_prompts",
        each.iter().map(|job| &*job.negative_prompt).collect(),
    );
    put("seed", json!(job.seed));
    put("all_seeds", json!(generated.seeds));
    put("subseed", json!(job.subseed));
    put("all_subseeds", json!(generated.subseeds));
    put("subseed_strength", json!(request.subseed_strength));
    put("width", json!(request.width));
    put("height", json!(request.height));
    put("sampler_name", json!(job.sampler.label()));
    put("cfg_scale", json!(request.cfg_scale));
    put("steps", json!(request.steps));
    put("batch_size", json!(request.batch_size));
    put("restore_faces", json!(false));
    put("face_restoration_model", Value::Null);
    put("sd_model_name", json!(outcome.model.name));
    put("sd_model_hash", json!(outcome.model.shorthash()));
    put("sd_vae_name", json!(outcome.model.vae_name));
    put("sd_vae_hash", json!(outcome.model.vae_hash));
    put(
        "seed_resize_from_w",
        wire.get("seed_resize_from_w").cloned().unwrap_or_default(),
    );
    put(
        "seed_resize_from_h",
        wire.get("seed_resize_from_h").cloned().unwrap_or_default(),
    );
    put("denoising_strength", json!(request.denoising_strength));
    put("extra_generation_params", json!(generated.extra_params));
    put("index_of_first_image", json!(index_of_first_image));
    put("infotexts", json!(infotexts));
    put("styles", json!(request.styles.clone().unwrap_or_default()));
    put("job_timestamp", json!(outcome.job_timestamp));
    put("clip_skip", json!(job.clip_skip));
    put(
        "is_using_inpainting_conditioning",
        json!(generated.inpainting_conditioning),
    );
    put("version", json!(VERSION_TEXT));
    Value::Object(info)
}
