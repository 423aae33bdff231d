//! Times the parts of a job on a checkpoint's real graph (load, text, denoising steps, decode), and single operations at
//! SDXL's shapes.

use std::path::Path;
use std::time::Instant;

use candle_core::Tensor;

use super::merged::MergedNetworks;
use super::networks::NetworkFile;
use super::{CheckpointSource, Error};
use crate::models::{Conditioning, TextTower, Unet, Vae};
use crate::nn::cpu::operations;
use crate::nn::{
    Activation, Conv2d, GroupNorm, LayerNorm, Linear, Mask, Placement, Sampling, Then,
    cross_attention, self_attention,
};
use crate::weights::detect::{self, prefix};
use crate::weights::synthetic::{SyntheticSdxl, write_lora};
use crate::weights::{SafetensorsFile, Source};

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
#[derive(Debug, Clone)]
pub struct Part {
    /// `load unet`, `text`, `step 1`, …, `decode`, or an operation's name.
    pub name: String,
    /// Wall seconds.
    pub seconds: f64,
    /// Floating-point operations of all products; 0 where nothing is multiplied.
    pub operations: u64,
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
    let (mut clip_l, mut big_g, mut unet) = timed("load", report, || {
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
        timed(name, report, || {
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
    let (clip_l, big_g) = timed("load text encoders", report, || {
        Ok((
            TextTower::clip_l(source, place)?,
            TextTower::big_g(source, place)?,
        ))
    })?;
    let unet = timed("load unet", report, || Ok(Unet::new(source, place)?))?;
    let vae = timed("load vae", report, || {
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
    let (context, pooled) = timed("text", report, || {
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
    let conditioning = timed("context keys and values", report, || {
        Ok(unet.condition(&context, &vector)?)
    })?;

    let x = measure_steps(&unet, &conditioning, place, options, report)?;
    let latents = x.narrow(0, 0, 1)?.narrow(3, 0, 4)?.contiguous()?;
    crate::trim_memory();
    let picture = timed("decode", report, || Ok(vae.decode(&latents)?))?;
    let sum = picture.sum_all()?.to_dtype(candle_core::DType::F32)?;
    if sum.to_scalar::<f32>()?.is_finite() {
        Ok(())
    } else {
        Err(Error::NotANumber { stage: "VAE" })
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
    for step in 1..=options.steps {
        let t = 999.0 * (1.0 - step as f32 / (options.steps + 1) as f32);
        let name = format!("step {step} (batch of 2)");
        let eps = timed(&name, report, || {
            Ok(unet.forward(&x, &[t, t], conditioning)?)
        })?;
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
    Ok(x)
}

fn timed<T>(
    name: &str,
    report: &mut dyn FnMut(Part),
    work: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    let (start, before) = (Instant::now(), operations());
    let value = work()?;
    report(Part {
        name: name.to_string(),
        seconds: start.elapsed().as_secs_f64(),
        operations: operations() - before,
    });
    Ok(value)
}

/// Seconds each operation is repeated for.
const OPERATION_SECONDS: f64 = 1.0;

/// Times single operations at the shapes of SDXL at 512x512, batch of 2: the median of the runs of a second.
///
/// # Errors
/// When an operation fails.
pub fn measure_operations(place: &Placement, report: &mut dyn FnMut(Part)) -> Result<(), Error> {
    let wave = |shape: &[usize], scale: f32| -> candle_core::Result<Tensor> {
        let n: usize = shape.iter().product();
        let values = (0..n).map(|i| (i as f32 * 0.37).sin() * scale).collect();
        Tensor::from_vec(values, shape, &place.device)?.to_dtype(place.dtype)
    };
    let noise = |n: usize| -> Vec<f32> { (0..n).map(|i| (i as f32 * 1.7).sin() * 0.02).collect() };
    for (c, side) in [(320, 64), (640, 32), (1280, 16)] {
        let conv = Conv2d::new(place, &noise(c * c * 9), [c, c, 3], None, Sampling::SAME)?;
        let x = wave(&[2, side, side, c], 1.0)?;
        repeat(
            &format!("convolution 3x3 {c} channels {side}x{side}"),
            report,
            || conv.forward(&x),
        )?;
        let norm = GroupNorm::new(place, &noise(c), &noise(c), 1e-5)?.silu();
        repeat(
            &format!("group norm + SiLU {c} channels {side}x{side}"),
            report,
            || norm.forward(&x),
        )?;
    }
    let plain = Then::Activate(Activation::None);
    for (tokens, inputs, outputs, then) in [
        (1024, 640, 5120, Then::Geglu),
        (256, 1280, 10240, Then::Geglu),
        (1024, 2560, 640, plain),
        (256, 5120, 1280, plain),
        (256, 1280, 3840, plain),
    ] {
        let linear = Linear::new(place, &noise(inputs * outputs), outputs, None, then)?;
        let x = wave(&[2, tokens, inputs], 1.0)?;
        let gate = if then == Then::Geglu { " + GEGLU" } else { "" };
        repeat(
            &format!("linear {tokens}x{inputs}x{outputs}{gate}"),
            report,
            || linear.forward(&x),
        )?;
    }
    for (tokens, heads) in [(4096, 10), (1024, 10), (256, 20)] {
        let qkv = wave(&[2, tokens, 3 * 64 * heads], 1.0)?;
        repeat(
            &format!("self-attention {tokens} tokens, {heads} heads"),
            report,
            || self_attention(&qkv, heads, Mask::Full),
        )?;
        let (q, kv) = (
            wave(&[2, tokens, 64 * heads], 1.0)?,
            wave(&[2, 77, 2 * 64 * heads], 1.0)?,
        );
        repeat(
            &format!("cross-attention {tokens} tokens, {heads} heads"),
            report,
            || cross_attention(&q, &kv, heads),
        )?;
    }
    let norm = LayerNorm::new(place, &noise(1280), &noise(1280))?;
    let x = wave(&[2, 256, 1280], 1.0)?;
    repeat("layer norm 512x1280", report, || norm.forward(&x))
}

fn repeat(
    name: &str,
    report: &mut dyn FnMut(Part),
    run: impl Fn() -> candle_core::Result<Tensor>,
) -> Result<(), Error> {
    run()?;
    let (begin, before) = (Instant::now(), operations());
    let mut seconds = Vec::new();
    while begin.elapsed().as_secs_f64() < OPERATION_SECONDS || seconds.len() < 5 {
        let start = Instant::now();
        run()?.device().synchronize()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    let operations = (operations() - before) / seconds.len() as u64;
    seconds.sort_by(f64::total_cmp);
    report(Part {
        name: name.to_string(),
        seconds: seconds[seconds.len() / 2],
        operations,
    });
    Ok(())
}
