//! Pictures of a small checkpoint: the same bytes twice, and close to those of `f32` on the CPU.

use candle_core::DType;
use image::RgbImage;

use super::Row;
use crate::nn::Placement;
use crate::pipeline::{
    CheckpointIdentity, CheckpointSource, Error, GenerateRequest, LoadOptions, Pipeline,
};
use crate::rng::NoiseSource;

/// Mean difference of a value allowed, of 255 levels: in `f32` sums differ in order only, and truncation to 8 bits may turn that into
/// a level; in 16 bits the guidance multiplies what the weights lose.
fn levels(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1.0,
        _ => 3.0,
    }
}

/// Makes a picture twice on `place` and once on the CPU in `f32`.
pub(super) fn verify(
    place: &Placement,
    checkpoint: &CheckpointSource,
    report: &mut dyn FnMut(Row),
) {
    const TWICE: &str = "pictures: same seed twice, values that differ";
    const CLOSE: &str = "pictures: mean difference to the CPU's f32, of 255";
    let allowed = levels(place.dtype);
    let pictures = || -> Result<[RgbImage; 3], Error> {
        let mut model = load(place, checkpoint)?;
        let first = picture(&mut model)?;
        let second = picture(&mut model)?;
        Ok([
            first,
            second,
            picture(&mut load(&Placement::cpu(), checkpoint)?)?,
        ])
    };
    match pictures() {
        Ok([first, second, on_cpu]) => {
            let differing = first.iter().zip(second.iter()).filter(|(a, b)| a != b);
            let differing = differing.count() as f64;
            report(row(TWICE, differing, 0.0));
            report(row(CLOSE, mean_difference(&first, &on_cpu), allowed));
        }
        Err(error) => {
            report(Row::failed(TWICE, 0.0, &error));
            report(Row::failed(CLOSE, allowed, &error));
        }
    }
}

fn row(check: &str, error: f64, tolerance: f64) -> Row {
    Row {
        check: check.to_string(),
        error,
        tolerance,
        note: String::new(),
    }
}

fn load(place: &Placement, checkpoint: &CheckpointSource) -> Result<Pipeline, Error> {
    let options = LoadOptions {
        device: place.device.clone(),
        dtype: place.dtype,
        vae: None,
        latents_on_device: false,
    };
    Pipeline::load(checkpoint, CheckpointIdentity::default(), &options)
}

/// A picture of eight steps; a device that records steps does so at the second.
fn picture(model: &mut Pipeline) -> Result<RgbImage, Error> {
    let request = GenerateRequest {
        prompt: "a lighthouse at dawn, volumetric light".into(),
        negative_prompt: "blurry".into(),
        seed: 1,
        steps: 8,
        width: 128,
        height: 128,
        noise_source: NoiseSource::Cpu,
        ..GenerateRequest::default()
    };
    let mut made = model.generate(&request, &())?;
    let picture = made.images.pop().map(|made| made.image);
    picture.ok_or_else(|| Error::Invalid("the job made no picture".into()))
}

/// Mean absolute difference of the values, of 255.
fn mean_difference(a: &RgbImage, b: &RgbImage) -> f64 {
    let values = a.iter().zip(b.iter());
    let sum: u64 = values.map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
    sum as f64 / a.len().max(1) as f64
}
