//! `sdgen upscale`: pictures enlarged in this process, by a network or without one.
//!
//! No checkpoint is loaded. Names, sizes, pictures and the output directory are checked before any work.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;

use super::follow::follow;
use super::output::Output;
use super::serve::{Devices, start_engine};
use super::{Common, Stop, Verbosity, load_config, print, warn_all};
use crate::api::extras::{other_texts, parameters};
use crate::api::options::Options;
use crate::api::resolve::task_id;
use crate::api::upscalers::Upscalers;
use crate::config::Config;
use crate::config::layers::{Kind, Origin, Setting, parse};
use crate::engine::ExtrasJob;
use crate::engine::upscalers::UpscalerCatalog;
use crate::imaging::{self, EncodeOptions, Metadata, SaveRequest};
use crate::pipeline::{Extras, ExtrasRequest, ExtrasSize};
use crate::{shutdown, telemetry};

/// What to enlarge and how.
#[derive(Debug, Args)]
pub struct UpscaleArgs {
    /// Pictures
    #[arg(required = true, value_name = "IN")]
    pub inputs: Vec<PathBuf>,
    /// Upscaler by name or file; `sdgen upscale` knows `Lanczos`, `Nearest`, and the files in models/ESRGAN and models/RealESRGAN
    #[arg(short, long, value_name = "NAME|FILE")]
    pub upscaler: String,
    /// How many times larger [default: 2]
    #[arg(
        long,
        value_name = "F",
        conflicts_with = "to",
        allow_negative_numbers = true
    )]
    pub by: Option<f64>,
    /// Size to cover; what stands out is cut off
    #[arg(long, value_name = "WxH")]
    pub to: Option<String>,
    /// With --to: keep what stands out
    #[arg(long, requires = "to")]
    pub no_crop: bool,
    /// A second upscaler to mix in
    #[arg(long, value_name = "NAME|FILE", requires = "upscaler_2_visibility")]
    pub upscaler_2: Option<String>,
    /// Share of the second upscaler, 0 to 1
    #[arg(long, value_name = "F", requires = "upscaler_2")]
    pub upscaler_2_visibility: Option<f64>,
    /// Side of the pieces that a network works on; 0 = the whole picture
    #[arg(long, value_name = "PX", default_value_t = 192)]
    pub tile: u32,
    /// Pixels that pieces share
    #[arg(long, value_name = "PX", default_value_t = 8)]
    pub tile_overlap: u32,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Where pictures go [default: outputs/extras-images/DATE in the data directory]
    #[arg(short, long, value_name = "FILE|DIR")]
    pub output: Option<PathBuf>,
    /// png, jpeg or webp [default: by the output file's extension, else png]
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// No progress bar, no log lines but errors
    #[arg(long)]
    pub quiet: bool,
}

impl UpscaleArgs {
    fn size(&self) -> Result<ExtrasSize, Stop> {
        let Some(to) = &self.to else {
            let factor = self.by.unwrap_or(2.0);
            if !(factor > 0.0 && factor.is_finite()) {
                return Err(Stop::usage_text(format!(
                    "`--by` must be greater than 0: `{factor}`"
                )));
            }
            return Ok(ExtrasSize::By { factor, longest: 0 });
        };
        let side = |text: &str| text.trim().parse::<u32>().ok().filter(|side| *side > 0);
        let sides = to
            .split_once(['x', 'X'])
            .and_then(|(width, height)| Some((side(width)?, side(height)?)));
        let (width, height) = sides.ok_or_else(|| {
            Stop::usage_text(format!("`--to` must be a size such as 1024x768: `{to}`"))
        })?;
        Ok(ExtrasSize::To {
            width,
            height,
            crop: !self.no_crop,
        })
    }

    fn settings(&self) -> Result<Vec<Setting>, Stop> {
        let Some(device) = &self.device else {
            return Ok(Vec::new());
        };
        let value = parse(Kind::Text, device).map_err(Stop::usage_text)?;
        let key = "device.device";
        let origin = Origin::Flag("--device".into());
        Ok(vec![Setting { key, value, origin }])
    }

    /// The job without its pictures.
    fn request(&self, config: &Config) -> Result<ExtrasRequest, Stop> {
        let mut options = Options::defaults();
        options.set("ESRGAN_tile", self.tile.into());
        options.set("ESRGAN_tile_overlap", self.tile_overlap.into());
        let catalog = UpscalerCatalog::open(config);
        let upscalers = Upscalers::new(&catalog, &options);
        let find = |name: &str| upscalers.picture_or_file(name).map_err(Stop::usage_text);
        let second = match (&self.upscaler_2, self.upscaler_2_visibility) {
            (Some(_), Some(share)) if !(0.0..=1.0).contains(&share) => {
                return Err(Stop::usage_text(format!(
                    "`--upscaler-2-visibility` must be between 0 and 1: `{share}`"
                )));
            }
            (Some(name), Some(share)) => Some((find(name)?, share as f32)),
            _ => None,
        };
        Ok(ExtrasRequest {
            pictures: Arc::default(),
            size: self.size()?,
            upscaler: find(&self.upscaler)?,
            second,
        })
    }
}

/// Enlarges the pictures.
///
/// # Errors
/// Exit 2 for what was typed, 1 for files and the job, 130 after a signal.
pub fn run(args: &UpscaleArgs, common: &Common) -> Result<(), Stop> {
    let loaded = load_config(common, args.settings()?, Vec::new())?;
    let config = &loaded.config;
    let mut log = config.log.clone();
    if args.quiet {
        log.level = "error".into();
    } else if !loaded.origins.contains_key("log.level") {
        // The engine's errors are this command's own, and are reported once.
        log.level = "warn,sdgen::engine=off".into();
    }
    telemetry::init(&log);
    warn_all(&loaded);
    let mut request = args.request(config)?;
    let (pictures, texts) = read(args, request.size, config)?;
    let output = Output::choose(
        args.output.as_deref(),
        args.format.as_deref(),
        &config.data_dir.join("outputs/extras-images"),
    )?;
    output.check_writable()?;
    request.pictures = Arc::new(pictures);
    let runtime = tokio::runtime::Runtime::new().map_err(Stop::failed)?;
    let extras = runtime.block_on(upscale(args, request, config))?;
    write(args, &output, &extras, &texts)?;
    if extras.interrupted {
        return Err(Stop::Interrupted(format!(
            "interrupted; {} of {} pictures written",
            extras.pictures.len(),
            args.inputs.len()
        )));
    }
    Ok(())
}

/// Decodes the inputs, and refuses results that are too large.
fn read(
    args: &UpscaleArgs,
    size: ExtrasSize,
    config: &Config,
) -> Result<(Vec<image::RgbImage>, Vec<Metadata>), Stop> {
    let most = config.limits.max_megapixels as u64 * 1_000_000;
    let (mut pictures, mut texts, mut pixels) = (Vec::new(), Vec::new(), 0);
    for path in &args.inputs {
        let unusable = |error: imaging::Error| {
            Stop::Failed(anyhow::Error::new(error).context(path.display().to_string()))
        };
        let bytes = std::fs::read(path)
            .with_context(|| format!("cannot read `{}`", path.display()))
            .map_err(Stop::Failed)?;
        let limits = imaging::Limits {
            pixels: most,
            ..imaging::Limits::default()
        };
        let picture = imaging::decode(&bytes, limits).map_err(unusable)?.to_rgb8();
        let result = size.result(picture.dimensions());
        pixels += u64::from(result.0) * u64::from(result.1);
        if pixels > most {
            return Err(Stop::usage_text(format!(
                "the results have more than {} megapixels (setting `limits.max_megapixels`): `{}` becomes {}x{}",
                config.limits.max_megapixels,
                path.display(),
                result.0,
                result.1
            )));
        }
        pictures.push(picture);
        texts.push(imaging::read_metadata(&bytes).map_err(unusable)?);
    }
    Ok((pictures, texts))
}

async fn upscale(
    args: &UpscaleArgs,
    request: ExtrasRequest,
    config: &Config,
) -> Result<Extras, Stop> {
    let stop = shutdown::on_signal().map_err(Stop::failed)?;
    let engine = start_engine(config, Devices::First)?;
    let bar = Verbosity::from_flag(args.quiet).bar(
        Some(request.pictures.len() as u64),
        "upscaling {bar:30} {pos}/{len} {elapsed} (eta {eta})",
    );
    let job = ExtrasJob {
        id: task_id("extras"),
        client: String::new(),
        request,
    };
    let mut handle = engine.submit_extras(job).await.map_err(Stop::failed)?;
    let result = follow(&mut handle, &bar, &stop).await;
    bar.finish_and_clear();
    result.map_err(Stop::failed)
}

/// Writes the files and prints their names. In a directory they are numbered and keep their inputs' names.
fn write(
    args: &UpscaleArgs,
    output: &Output,
    extras: &Extras,
    texts: &[Metadata],
) -> Result<(), Stop> {
    let mut names = String::new();
    for (index, picture) in &extras.pictures {
        let metadata = &texts[*index];
        let mut other = other_texts(metadata);
        other.push(("postprocessing", &extras.infotext));
        other.push(("extras", &extras.infotext));
        let options = EncodeOptions {
            format: output.format,
            infotext: parameters(metadata),
            texts: &other,
            ..EncodeOptions::default()
        };
        let file = imaging::encode(picture, &options).map_err(Stop::failed)?;
        let path = match output.directory() {
            Some(root) => {
                let stem = args.inputs[*index].file_stem().unwrap_or_default();
                let request = SaveRequest {
                    root,
                    subdirectory: "",
                    basename: "",
                    stem: &stem.to_string_lossy(),
                    numbered: true,
                    extension: file.format.extension(),
                    bytes: &file.bytes,
                    sidecar: None,
                };
                imaging::save(&request).map_err(Stop::failed)?
            }
            None => output.write_bytes(&file.bytes, file.format, 0, *index, args.inputs.len())?,
        };
        names = names + &path.display().to_string() + "\n";
    }
    print(&names)
}
