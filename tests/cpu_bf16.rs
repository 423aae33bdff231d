//! The CPU's bf16 against its f32: latents after 20 steps and pictures of the demo model.
//!
//! Latents end 3 to 10 % apart: what weights lose in 8 bits is multiplied by the guidance and carried through 20 steps, while the
//! picture stays the same to the eye. Half of it is the weights' alone: the f32 engine on weights rounded to bf16 ends 1 to 5 % apart.
//! A wrong kernel shows as a difference of about 1.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use sdgen::pipeline::{
    CheckpointIdentity, CheckpointSource, GenerateRequest, GeneratedImage, LoadOptions, Pipeline,
};
use sdgen::rng::NoiseSource;
use sdgen::weights::{Source, demo};

/// The demo model with its weights rounded to bf16.
fn rounded(path: &Path) -> CheckpointSource {
    let file = demo::open().expect("the embedded model");
    let round = |key: &str| {
        let shape = file.shape(key).expect("listed").to_vec();
        let values = file.read(key).expect("finite");
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).expect("of this shape");
        (
            key.to_string(),
            tensor.to_dtype(DType::BF16).expect("rounds"),
        )
    };
    let tensors: HashMap<String, Tensor> = file.keys().into_iter().map(round).collect();
    candle_core::safetensors::save(&tensors, path).expect("a writable folder");
    CheckpointSource::File(path.into())
}

/// A picture after 20 steps.
fn generate(source: &CheckpointSource, dtype: DType, seed: u64) -> GeneratedImage {
    let options = LoadOptions {
        latents_on_device: false,
        device: Device::Cpu,
        dtype,
        vae: None,
    };
    let pipeline = Pipeline::load(source, CheckpointIdentity::default(), &options);
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
    let folder = tempfile::tempdir().expect("a folder");
    let demo = CheckpointSource::Embedded;
    let rounded = rounded(&folder.path().join("rounded.safetensors"));
    let (mut worst, mut all, mut weights_alone) = ((0.0, 0.0), 0.0, 0.0);
    for seed in [1, 2, 3] {
        let wide = generate(&demo, DType::F32, seed);
        let narrow = generate(&demo, DType::BF16, seed);
        let between = generate(&rounded, DType::F32, seed);
        let latents = [&wide, &narrow, &between].map(|made| made.latents.as_deref());
        let [want, got, with_rounded] = latents.map(|latents| latents.expect("kept"));
        let (off, floor) = (relative(got, want), relative(with_rounded, want));
        let pixels = wide.image.as_raw().iter().zip(narrow.image.as_raw());
        let levels: u64 = pixels.map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
        let mean = levels as f64 / wide.image.as_raw().len() as f64;
        eprintln!(
            "seed {seed}: latents off by {off:.4}, {floor:.4} by rounded weights alone, pixels by {mean:.3} of 255"
        );
        worst = (off.max(worst.0), mean.max(worst.1));
        all += off;
        weights_alone += floor;
    }
    assert!(worst.0 < 0.2, "latents off by {}", worst.0);
    assert!(worst.1 < 3.0, "pixels off by {} levels", worst.1);
    // Rounded activations add about as much as rounded weights; a body that loses more would stand out.
    assert!(
        all < 4.0 * weights_alone,
        "latents off by {all} in sum, {weights_alone} by the weights"
    );
}
