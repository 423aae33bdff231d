//! From finished pictures to the answer: encoding, base64, files, the `info` text.
//!
//! Runs on blocking threads, off the device thread: the next job starts while the last one is encoded. A file is written whole
//! under a number nobody else has, or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::RgbImage;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::grid::{Layout, contact_sheet};
use super::options::Options;
use super::resolve::Prepared;
use super::vocabulary::{self, Format};
use crate::config::VERSION_TEXT;
use crate::engine::Outcome;

/// Encodes, saves and describes the pictures of a job: the whole body of the answer.
///
/// # Errors
/// A picture cannot be encoded or a file cannot be written.
pub fn answer(prepared: &Prepared, outcome: &Outcome, data_dir: &Path) -> Result<Value, ApiError> {
    let options = &prepared.options;
    let mut pictures = encode_all(prepared, outcome)?;
    if prepared.request.save_images && options.flag("samples_save") {
        save(prepared, outcome, &pictures, data_dir)?;
    }
    let mut first = 0;
    if wants_grid(prepared, outcome) {
        let grid = grid_picture(prepared, outcome)?;
        if options.flag("grid_save") {
            save_grid(options, &grid, data_dir)?;
        }
        pictures.insert(0, grid);
        first = 1;
    }
    let infotexts: Vec<&str> = pictures.iter().map(|picture| picture.infotext.as_str()).collect();
    let info = info(prepared, outcome, &infotexts, first);
    let images: Vec<String> = if prepared.request.send_images {
        pictures.iter().map(|picture| STANDARD.encode(&picture.bytes)).collect()
    } else {
        Vec::new()
    };
    Ok(json!({ "images": images, "parameters": prepared.wire, "info": info.to_string() }))
}

/// A picture file in memory.
struct Picture {
    bytes: Vec<u8>,
    infotext: String,
    seed: u64,
}

fn encode_all(prepared: &Prepared, outcome: &Outcome) -> Result<Vec<Picture>, ApiError> {
    let picture = |image: &crate::pipeline::GeneratedImage| {
        let bytes = encode(&prepared.options, prepared.format, &image.image, &image.infotext)?;
        Ok(Picture { bytes, infotext: image.infotext.clone(), seed: image.seed })
    };
    outcome.generated.images.iter().map(picture).collect()
}

fn encode(options: &Options, format: Format, image: &RgbImage, infotext: &str) -> Result<Vec<u8>, ApiError> {
    let text = options.flag("enable_pnginfo").then_some(infotext);
    let quality = options.int("jpeg_quality").clamp(1, 100) as u8;
    vocabulary::encode(image, format, quality, text).map_err(|error| {
        ApiError::failure("ValueError", format!("picture cannot be encoded as `{format}`: {error}"))
    })
}

/// A1111's rule: only for saved jobs of more than one picture.
fn wants_grid(prepared: &Prepared, outcome: &Outcome) -> bool {
    let (options, count) = (&prepared.options, outcome.generated.images.len());
    prepared.request.save_images && options.flag("return_grid") && count > usize::from(options.flag("grid_only_if_multiple"))
}

fn grid_picture(prepared: &Prepared, outcome: &Outcome) -> Result<Picture, ApiError> {
    let options = &prepared.options;
    let images: Vec<&RgbImage> = outcome.generated.images.iter().map(|image| &image.image).collect();
    let layout = Layout {
        rows: options.int("n_rows"),
        prevent_empty_spots: options.flag("grid_prevent_empty_spots"),
        batch_size: prepared.job.request.batch_size,
    };
    let first = outcome.generated.images.first();
    let infotext = first.map(|image| image.infotext.clone()).unwrap_or_default();
    let format = Format::find(options.text("grid_format")).unwrap_or(Format::Png);
    let bytes = encode(options, format, &contact_sheet(&images, layout), &infotext)?;
    Ok(Picture { bytes, infotext, seed: first.map_or(0, |image| image.seed) })
}

fn save(prepared: &Prepared, outcome: &Outcome, pictures: &[Picture], data_dir: &Path) -> Result<(), ApiError> {
    let options = &prepared.options;
    let directory = output_dir(data_dir, options.text("outdir_txt2img_samples"), options.flag("save_to_dirs"));
    // The batch that an interrupt cut short is not kept, unless asked for.
    let complete = if options.flag("save_incomplete_images") {
        pictures.len()
    } else {
        outcome.finished_batches * prepared.job.request.batch_size
    };
    for picture in pictures.iter().take(complete) {
        let path = save_numbered(&directory, &picture.seed.to_string(), prepared.format, &picture.bytes)
            .map_err(|error| not_written(&directory, &error))?;
        if options.flag("save_txt") {
            let text = path.with_extension("txt");
            fs::write(&text, &picture.infotext).map_err(|error| not_written(&text, &error))?;
        }
    }
    Ok(())
}

fn save_grid(options: &Options, grid: &Picture, data_dir: &Path) -> Result<(), ApiError> {
    let directory = output_dir(data_dir, options.text("outdir_txt2img_grids"), options.flag("grid_save_to_dirs"));
    let format = Format::find(options.text("grid_format")).unwrap_or(Format::Png);
    let write = || {
        fs::create_dir_all(&directory)?;
        let taken = fs::read_dir(&directory)?.flatten().filter_map(|entry| {
            entry.file_name().to_str()?.strip_prefix("grid-")?.split(['.', '-']).next()?.parse::<u32>().ok()
        });
        let first = taken.max().map_or(0, |number| number + 1);
        claim(first, |number| directory.join(format!("grid-{number:04}.{format}")), &grid.bytes)
    };
    write().map(drop).map_err(|error| not_written(&directory, &error))
}

fn output_dir(data_dir: &Path, option: &str, by_date: bool) -> PathBuf {
    let directory = data_dir.join(option);
    if by_date { directory.join(chrono::Local::now().format("%Y-%m-%d").to_string()) } else { directory }
}

/// Writes `<NNNNN>-<name>.<ext>` under the next free number, creating the directory.
///
/// # Errors
/// The directory or file cannot be written; nothing is left behind.
pub fn save_numbered(directory: &Path, name: &str, format: Format, bytes: &[u8]) -> io::Result<PathBuf> {
    fs::create_dir_all(directory)?;
    let first = vocabulary::next_number(directory);
    claim(first, |number| directory.join(format!("{number:05}-{name}.{format}")), bytes)
}

/// Writes to the first path that nobody has, counting up from `first`.
fn claim(first: u32, path: impl Fn(u32) -> PathBuf, bytes: &[u8]) -> io::Result<PathBuf> {
    let mut number = first;
    loop {
        let path = path(number);
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return fill(file, &path, bytes).map(|()| path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < u32::MAX => number += 1,
            Err(error) => return Err(error),
        }
    }
}

fn fill(mut file: File, path: &Path, bytes: &[u8]) -> io::Result<()> {
    file.write_all(bytes).inspect_err(|_| {
        // The write error is the one to report, whatever becomes of the torn file.
        let _ = fs::remove_file(path);
    })
}

fn not_written(path: &Path, error: &io::Error) -> ApiError {
    ApiError::failure("OSError", format!("cannot write to `{}`: {error}", path.display()))
}

/// The `info` object, exactly A1111 1.10's keys in its order.
fn info(prepared: &Prepared, outcome: &Outcome, infotexts: &[&str], index_of_first_image: usize) -> Value {
    let (request, wire, job) = (&prepared.request, &prepared.wire, &prepared.job.request);
    let count = job.batch_size * job.batch_count;
    let generated = &outcome.generated;
    let mut info = Map::new();
    let mut put = |key: &str, value: Value| drop(info.insert(key.to_string(), value));
    put("prompt", json!(job.prompt));
    put("all_prompts", json!(vec![&job.prompt; count]));
    put("negative_prompt", json!(job.negative_prompt));
    put("all_negative_prompts", json!(vec![&job.negative_prompt; count]));
    put("seed", json!(job.seed));
    put("all_seeds", json!(generated.seeds));
    put("subseed", json!(job.subseed));
    put("all_subseeds", json!(generated.subseeds));
    put("subseed_strength", json!(request.subseed_strength));
    put("width", json!(request.width));
    put("height", json!(request.height));
    put("sampler_name", json!(vocabulary::sampler_label(job.sampler)));
    put("cfg_scale", json!(request.cfg_scale));
    put("steps", json!(request.steps));
    put("batch_size", json!(request.batch_size));
    put("restore_faces", json!(false));
    put("face_restoration_model", Value::Null);
    put("sd_model_name", json!(outcome.model.name));
    put("sd_model_hash", json!(outcome.model.shorthash()));
    put("sd_vae_name", json!(outcome.model.vae_name));
    put("sd_vae_hash", json!(outcome.model.vae_hash));
    put("seed_resize_from_w", wire.get("seed_resize_from_w").cloned().unwrap_or_default());
    put("seed_resize_from_h", wire.get("seed_resize_from_h").cloned().unwrap_or_default());
    put("denoising_strength", json!(request.denoising_strength));
    put("extra_generation_params", Value::Object(vocabulary::params_json(&generated.extra_params)));
    put("index_of_first_image", json!(index_of_first_image));
    put("infotexts", json!(infotexts));
    put("styles", json!(request.styles.clone().unwrap_or_default()));
    put("job_timestamp", json!(outcome.job_timestamp));
    put("clip_skip", json!(job.clip_skip));
    put("is_using_inpainting_conditioning", json!(false));
    put("version", json!(VERSION_TEXT));
    Value::Object(info)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_count_up_from_the_highest_and_never_overwrite() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("00041-7.png"), b"old").unwrap();
        let path = save_numbered(dir.path(), "9", Format::Png, b"new").unwrap();
        assert_eq!(path.file_name().unwrap(), "00042-9.png");
        let again = claim(42, |n| dir.path().join(format!("{n:05}-9.png")), b"third").unwrap();
        assert_eq!(again.file_name().unwrap(), "00043-9.png");
        assert_eq!(fs::read(path).unwrap(), b"new");
    }
}
