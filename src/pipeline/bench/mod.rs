//! Times the parts of a job on a checkpoint's real graph (load, text, denoising steps, decode), single operations at SDXL's shapes, and
//! whole jobs.
//!
//! Invariants: the device is at rest when a clock starts and when it stops; on a card, where the first run of a shape chooses plans and the
//! second records, these two are parts of their own and what follows is a median.

mod job;
mod operations;

use std::path::Path;
use std::time::Instant;

use candle_core::Tensor;

use super::merged::MergedNetworks;
use super::networks::NetworkFile;
use super::{CheckpointSource, Error, cuda};
use crate::models::{Conditioning, TextTower, Unet, Vae};
use crate::nn::Placement;
use crate::nn::cpu::operations;
use crate::weights::detect::{self, prefix};
use crate::weights::synthetic::{SyntheticSdxl, write_lora};
use crate::weights::{SafetensorsFile, Source};

pub use job::{JobOptions, measure_jobs};
pub use operations::measure_operations;

/// Which weights are measured.
#[derive(Debug, Clone)]
pub enum BenchModel {
    /// Seeded noise in the shape of SDXL base.
    Synthetic,
    /// A checkpoint.
    Checkpoint(CheckpointSource),
}

/// What to run.
#[derive(Debug, Clone, Copy)]
pub struct BenchOptions {
    /// Picture width in pixels.
    pub width: usize,
    /// Picture height in pixels.
    pub height: usize,
    /// Denoising steps, each a batch of two (conditional and unconditional).
    pub steps: usize,
}

/// One part's time.
#[derive(Debug, Clone, Default)]
pub struct Part {
    /// `load unet`, `text`, `step 1`, …, `decode`, or an operation's name.
    pub name: String,
    /// Wall seconds.
    pub seconds: f64,
    /// Floating-point operations of all products; 0 where nothing is multiplied.
    pub operations: u64,
    /// Bytes of inputs, weights and result, each moved once; 0 = not known.
    pub bytes: u64,
    /// How often a denoising step has it; 0 = not known.
    pub per_step: usize,
    /// Launches of kernels, of a recording.
    pub launches: Option<usize>,
    /// Bytes that may be allocated before, and what lay on the card when it ended.
    pub memory: Option<(u64, cuda::Memory)>,
}

/// Loads the model and runs each part, handing every time to `report` as it is known.
///
/// # Errors
/// When a tensor is missing, does not fit or an operation fails.
pub fn measure(
    model: &BenchModel,
    place: &Placement,
    options: BenchOptions,
    report: &mut dyn FnMut(Part),
) -> Result<(), Error> {
    match model {
        BenchModel::Synthetic => measure_source(&SyntheticSdxl::new(), place, options, report),
        BenchModel::Checkpoint(source) => {
            let file = source.open()?;
            detect::require_sdxl(&file)?;
            measure_source(&file, place, options, report)
        }
    }
}

/// Rank of the synthetic LoRA.
const LORA_RANK: usize = 64;

/// Times putting a LoRA on, changing its multiplier and taking it off. A file that is not there is written first: noise of rank
/// 64 for every layer of UNet and CLIP-L.
///
/// # Errors
/// When a file cannot be read or written, or a tensor does not fit.
pub fn measure_lora_switch(
    model: &BenchModel,
    lora: &Path,
    place: &Placement,
    report: &mut dyn FnMut(Part),
) -> Result<(), Error> {
    let opened;
    let synthetic = SyntheticSdxl::new();
    let source: &dyn Source = match model {
        BenchModel::Synthetic => &synthetic,
        BenchModel::Checkpoint(source) => {
            opened = source.open()?;
            detect::require_sdxl(&opened)?;
            &opened
        }
    };
    if !lora.exists() {
        write_lora(source, LORA_RANK, lora).map_err(|error| write_error(lora, error))?;
    }
    let (mut clip_l, mut big_g, mut unet) = timed(place, "load", report, || {
        Ok((
            TextTower::clip_l(source, place)?,
            TextTower::big_g(source, place)?,
            Unet::new(source, place)?,
        ))
    })?;
    crate::trim_memory();
    let network = |multiplier| NetworkFile {
        name: "bench".into(),
        path: lora.into(),
        te_multiplier: multiplier,
        unet_multiplier: multiplier,
        dyn_dim: None,
        hash: String::new(),
        modified: None,
    };
    let mut networks = MergedNetworks::default();
    for (name, set) in [
        ("LoRA on", vec![network(1.0)]),
        ("another multiplier", vec![network(0.5)]),
        ("LoRA off", Vec::new()),
    ] {
        timed(place, name, report, || {
            let mut layers = clip_l.layers_mut();
            layers.extend(big_g.layers_mut());
            layers.extend(unet.layers_mut());
            networks.switch(&set, source, layers)
        })?;
        if let Some(comment) = networks.comments().first() {
            return Err(Error::Invalid(comment.clone()));
        }
    }
    Ok(())
}

/// Writes the synthetic model as a single file (f16, 6.9 GB) and checks that it opens as an SDXL checkpoint.
///
/// # Errors
/// When the file cannot be written.
pub fn write_synthetic(path: &Path) -> Result<(), Error> {
    let model = SyntheticSdxl::new();
    model
        .write(path)
        .map_err(|error| write_error(path, error))?;
    detect::require_sdxl(&SafetensorsFile::open(path)?)?;
    Ok(())
}

fn write_error(path: &Path, error: safetensors::SafeTensorError) -> Error {
    let source = std::io::Error::other(error);
    let path = path.into();
    crate::weights::Error::Write { path, source }.into()
}

fn measure_source(
    source: &dyn Source,
    place: &Placement,
    options: BenchOptions,
    report: &mut dyn FnMut(Part),
) -> Result<(), Error> {
    let (clip_l, big_g) = timed(place, "load text encoders", report, || {
        Ok((
            TextTower::clip_l(source, place)?,
            TextTower::big_g(source, place)?,
        ))
    })?;
    let unet = timed(place, "load unet", report, || Ok(Unet::new(source, place)?))?;
    let vae = timed(place, "load vae", report, || {
        Ok(Vae::new(source, prefix::VAE, place)?)
    })?;
    crate::trim_memory();

    // A prompt of twelve words and an empty one: begin marker, words, end markers.
    let chunk = |words: usize| {
        std::array::from_fn(|i| match i {
            0 => 49406,
            i if i <= words => 300 + i as u32,
            _ => 49407,
        })
    };
    let chunks = [chunk(12), chunk(0)];
    let (context, pooled) = settled(place, "text", report, || {
        let (l, g) = (clip_l.encode(&chunks, &[])?, big_g.encode(&chunks, &[])?);
        let context = Tensor::cat(&[l.hidden, g.hidden], 2)?;
        let pooled = g
            .pooled
            .ok_or_else(|| candle_core::Error::msg("no pooled state"))?;
        Ok((context, pooled))
    })?;
    let sizes = unet.vector_width().saturating_sub(pooled.dim(1)?);
    let sizes = Tensor::zeros((2, sizes), place.dtype, &place.device)?;
    let vector = Tensor::cat(&[pooled, sizes], 1)?;
    let conditioning = settled(place, "context keys and values", report, || {
        Ok(unet.condition(&context, &vector)?)
    })?;

    let x = measure_steps(&unet, &conditioning, place, options, report)?;
    let latents = x.narrow(0, 0, 1)?.narrow(3, 0, 4)?.contiguous()?;
    crate::trim_memory();
    let picture = settled(place, "decode", report, || Ok(vae.decode(&latents)?))?;
    let sum = picture.sum_all()?.to_dtype(candle_core::DType::F32)?;
    if sum.to_scalar::<f32>()?.is_finite() {
        Ok(())
    } else {
        Err(Error::NotANumber { stage: "VAE" })
    }
}

/// Runs of a part on a card, of which the median counts.
const RUNS: usize = 5;

/// Times a part that can be run again: once on the CPU; on a card the run that chooses plans, then the median of some.
fn settled<T>(
    place: &Placement,
    name: &str,
    report: &mut dyn FnMut(Part),
    work: impl Fn() -> Result<T, Error>,
) -> Result<T, Error> {
    if !place.device.is_cuda() {
        return timed(place, name, report, work);
    }
    let (_, first) = clocked(place, &format!("first {name}"), &work)?;
    let operations = first.operations;
    report(first);
    let mut times = Vec::with_capacity(RUNS);
    loop {
        let (value, part) = clocked(place, name, &work)?;
        times.push(part.seconds);
        if times.len() == RUNS {
            report(Part {
                seconds: median(&mut times),
                operations,
                ..part
            });
            return Ok(value);
        }
    }
}

/// Times denoising steps of a batch of two; what they end in, channels last.
fn measure_steps(
    unet: &Unet,
    conditioning: &Conditioning,
    place: &Placement,
    options: BenchOptions,
    report: &mut dyn FnMut(Part),
) -> Result<Tensor, Error> {
    let (h, w, channels) = (options.height / 8, options.width / 8, unet.in_channels());
    let wave: Vec<f32> = (0..2 * h * w * channels)
        .map(|i| (i as f32 * 0.7).sin())
        .collect();
    let mut x =
        Tensor::from_vec(wave, (2, h, w, channels), &place.device)?.to_dtype(place.dtype)?;
    // The first run of a shape on a card chooses plans, the second records.
    let warm_up = if place.device.is_cuda() { 2 } else { 0 };
    let (mut operations, mut later) = (0, Vec::new());
    for step in 1..=warm_up + options.steps {
        let t = 999.0 * (1.0 - step as f32 / (warm_up + options.steps + 1) as f32);
        let name = format!("step {step} (batch of 2)");
        let (eps, part) = clocked(place, &name, || {
            Ok(unet.forward(&x, &[t, t], conditioning)?)
        })?;
        operations = operations.max(part.operations);
        if step <= warm_up || warm_up == 0 {
            report(part);
        } else {
            later.push(part);
        }
        // An inpainting checkpoint's further channels stay as they are.
        let eps = match channels {
            4 => eps,
            more => {
                let still = Tensor::zeros((2, h, w, more - 4), eps.dtype(), &place.device)?;
                crate::nn::concat_channels(&eps, &still)?
            }
        };
        x = (x - (eps * 0.1)?)?;
    }
    report_steps(unet, operations, later, report)?;
    Ok(x)
}

/// Runs of a recording that are timed.
const REPLAYS: usize = 10;

/// The median of replayed steps, and what the card alone takes for one. `operations`: of a step, since what is replayed counts none.
fn report_steps(
    unet: &Unet,
    operations: u64,
    mut steps: Vec<Part>,
    report: &mut dyn FnMut(Part),
) -> Result<(), Error> {
    let mut times: Vec<f64> = steps.iter().map(|part| part.seconds).collect();
    let Some(last) = steps.pop() else {
        return Ok(());
    };
    let recording = unet.measure_recording(REPLAYS)?;
    report(Part {
        name: format!("step, median of {} (batch of 2)", times.len()),
        seconds: median(&mut times),
        operations,
        launches: recording.map(|recording| recording.kernels),
        ..last
    });
    if let Some(recording) = recording {
        report(Part {
            name: "step, the card alone (batch of 2)".into(),
            seconds: recording.seconds,
            operations,
            launches: Some(recording.kernels),
            ..Part::default()
        });
    }
    Ok(())
}

/// Runs a part between two rests of the device.
fn timed<T>(
    place: &Placement,
    name: &str,
    report: &mut dyn FnMut(Part),
    work: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    let (value, part) = clocked(place, name, work)?;
    report(part);
    Ok(value)
}

fn clocked<T>(
    place: &Placement,
    name: &str,
    work: impl FnOnce() -> Result<T, Error>,
) -> Result<(T, Part), Error> {
    let device = &place.device;
    device.synchronize()?;
    let free = cuda::free_memory(device);
    cuda::watch_memory(device);
    let (start, before) = (Instant::now(), operations());
    let value = work()?;
    device.synchronize()?;
    let part = Part {
        name: name.to_string(),
        seconds: start.elapsed().as_secs_f64(),
        operations: operations() - before,
        memory: free.zip(cuda::memory(device)),
        ..Part::default()
    };
    Ok((value, part))
}

/// The median of some times, seconds.
fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}
