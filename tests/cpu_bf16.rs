//! The CPU's bf16 against its f32: latents after 20 steps and pictures of the demo model.
//!
//! Latents end 3 to 10 % apart: what weights lose in 8 bits is multiplied by the guidance and carried through 20 steps, while the
//! picture stays the same to the eye. A wrong kernel shows as a difference of about 1.

use candle_core::{DType, Device};
use sdgen::pipeline::{
    CheckpointIdentity, CheckpointSource, GenerateRequest, GeneratedImage, LoadOptions, Pipeline,
};
use sdgen::rng::NoiseSource;

/// A picture of the demo model after 20 steps.
fn generate(dtype: DType, seed: u64) -> GeneratedImage {
    let options = LoadOptions {
        latents_on_device: false,
        device: Device::Cpu,
        dtype,
        vae: None,
    };
    let source = CheckpointSource::Embedded;
    let pipeline = Pipeline::load(&source, CheckpointIdentity::default(), &options);
    let request = GenerateRequest {
        prompt: "a lighthouse at dawn, volumetric light".into(),
        negative_prompt: "blurry".into(),
        seed,
        steps: 20,
        width: 128,
        height: 128,
        noise_source: NoiseSource::Cpu,
        keep_latents: true,
        ..GenerateRequest::default()
    };
    let made = pipeline.expect("loads").generate(&request, &());
    made.expect("a picture").images.remove(0)
}

/// Root of the mean square of the difference, relative to that of `want`.
fn relative(got: &[f32], want: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let off: f64 = got.iter().zip(want).map(|(g, w)| square(g - w)).sum();
    (off / want.iter().map(|w| square(*w)).sum::<f64>()).sqrt()
}

#[test]
fn bf16_makes_the_pictures_of_f32_within_3_levels() {
    let mut worst = (0.0, 0.0);
    for seed in [1, 2, 3] {
        let (wide, narrow) = (generate(DType::F32, seed), generate(DType::BF16, seed));
        let [want, got] = [&wide, &narrow].map(|made| made.latents.as_deref().expect("kept"));
        let off = relative(got, want);
        let pixels = wide.image.as_raw().iter().zip(narrow.image.as_raw());
        let levels: u64 = pixels.map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
        let mean = levels as f64 / wide.image.as_raw().len() as f64;
        eprintln!("seed {seed}: latents off by {off:.4}, pixels by {mean:.3} of 255");
        worst = (off.max(worst.0), mean.max(worst.1));
    }
    assert!(worst.0 < 0.2, "latents off by {}", worst.0);
    assert!(worst.1 < 3.0, "pixels off by {} levels", worst.1);
}
