//! Makes a picture from Rust, without a server: load, describe the job, generate, write a PNG.
//!
//! `cargo run --release --example generate` writes `generated.png`, or the file named as the first argument.

use std::error::Error;

use sdgen::imaging::{EncodeOptions, encode};
use sdgen::pipeline::{
    CheckpointIdentity, CheckpointSource, GenerateRequest, LoadOptions, Observer, Pipeline,
    Progress,
};
use sdgen::sampling::Sampler;

/// Told about every step; could also stop the job.
struct Dots;

impl Observer for Dots {
    fn progress(&self, progress: Progress) {
        eprintln!("step {} of {}", progress.step, progress.steps);
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1);
    let path = path.unwrap_or_else(|| "generated.png".into());

    // `CheckpointSource::File(path)` loads an SDXL checkpoint of yours.
    let options = LoadOptions {
        latents_on_device: false,
        device: candle_core::Device::Cpu,
        dtype: candle_core::DType::F32,
        vae: None,
    };
    let identity = CheckpointIdentity {
        name: "sdgen-demo".into(),
        shorthash: String::new(),
    };
    let mut pipeline = Pipeline::load(&CheckpointSource::Embedded, identity, &options)?;
    let (width, height) = pipeline.native_size();

    let request = GenerateRequest {
        prompt: "a (red:1.2) apple, painted style".into(),
        seed: 7,
        sampler: Sampler::Dpmpp2M,
        steps: 20,
        cfg_scale: 4.0,
        width,
        height,
        ..GenerateRequest::default()
    };
    let generated = pipeline.generate(&request, &Dots)?;

    let picture = &generated.images[0];
    let options = EncodeOptions {
        infotext: Some(&picture.infotext),
        ..EncodeOptions::default()
    };
    std::fs::write(&path, encode(&picture.image, &options)?.bytes)?;
    eprintln!("{path}: {}", picture.infotext);
    Ok(())
}
