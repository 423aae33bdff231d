//! Times the parts of a job on a checkpoint's real graph: load, text, denoising steps, decode.

use std::time::Instant;

use candle_core::Tensor;

use super::Error;
use crate::models::{TextTower, Unet, Vae};
use crate::nn::Placement;
use crate::nn::cpu::operations;
use crate::weights::Source;
use crate::weights::detect::prefix;

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
    /// `load`, `text`, `step 1`, …, `decode`.
    pub name: String,
    /// Wall seconds.
    pub seconds: f64,
    /// Floating-point operations of all products; 0 where nothing is computed.
    pub operations: u64,
}

/// Loads the model and runs each part once per step, handing every time to `report` as it is known.
///
/// # Errors
/// When a tensor is missing, does not fit or an operation fails.
pub fn measure(
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

    // A prompt and an empty prompt: begin marker, a few words, end markers.
    let chunk = |words: usize| {
        std::array::from_fn(|i| {
            if i == 0 {
                49406
            } else if i <= words {
                300 + i as u32
            } else {
                49407
            }
        })
    };
    let chunks = [chunk(12), chunk(0)];
    let (context, pooled) = timed("text", report, || {
        let (l, g) = (clip_l.encode(&chunks, &[])?, big_g.encode(&chunks, &[])?);
        let context = Tensor::cat(&[l.hidden, g.hidden], 2)?;
        Ok((
            context,
            g.pooled
                .ok_or_else(|| candle_core::Error::msg("no pooled state"))?,
        ))
    })?;
    let sizes = Tensor::zeros(
        (2, unet.vector_width() - pooled.dim(1)?),
        place.dtype,
        &place.device,
    )?;
    let vector = Tensor::cat(&[pooled, sizes], 1)?;
    let conditioning = timed("condition", report, || {
        Ok(unet.condition(&context, &vector)?)
    })?;

    let (h, w) = (options.height / 8, options.width / 8);
    let wave: Vec<f32> = (0..2 * h * w * unet.in_channels())
        .map(|i| (i as f32 * 0.7).sin())
        .collect();
    let mut x = Tensor::from_vec(wave, (2, h, w, unet.in_channels()), &place.device)?;
    for step in 1..=options.steps {
        let t = 999.0 * (1.0 - step as f32 / (options.steps + 1) as f32);
        let eps = timed(&format!("step {step}"), report, || {
            Ok(unet.forward(&x, &[t, t], &conditioning)?)
        })?;
        x = (x - (eps * 0.1)?)?;
    }
    let latents = x.narrow(0, 0, 1)?.narrow(3, 0, 4)?.contiguous()?;
    let picture = timed("decode", report, || Ok(vae.decode(&latents)?))?;
    let finite = picture
        .sum_all()?
        .to_dtype(candle_core::DType::F32)?
        .to_scalar::<f32>()?
        .is_finite();
    if finite {
        Ok(())
    } else {
        Err(Error::NotANumber { stage: "VAE" })
    }
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
