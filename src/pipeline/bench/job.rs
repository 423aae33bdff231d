//! Whole jobs, from the prompt to the bytes of a PNG, through the [`Pipeline`] that the server runs.

use std::time::Instant;

use super::{Part, REPLAYS, median, timed};
use crate::imaging::{EncodeOptions, encode};
use crate::nn::Placement;
use crate::pipeline::{
    CheckpointIdentity, CheckpointSource, Error, GenerateRequest, LoadOptions, Pipeline,
};
use crate::sampling::Sampler;

/// Which jobs.
#[derive(Debug, Clone)]
pub struct JobOptions {
    /// Picture width in pixels.
    pub width: usize,
    /// Picture height in pixels.
    pub height: usize,
    /// A job for each number of steps.
    pub steps: Vec<usize>,
    /// Bytes that a block of the VAE may hold.
    pub vae_memory: usize,
}

/// Jobs of a kind on a card, behind the one that warms up; the median counts.
const RUNS: usize = 3;

/// Times loading and, for each number of steps, a job of one picture with guidance: from prompt to the bytes of a PNG.
///
/// # Errors
/// When the checkpoint cannot be loaded or a stage fails.
pub fn measure_jobs(
    source: &CheckpointSource,
    place: &Placement,
    options: &JobOptions,
    report: &mut dyn FnMut(Part),
) -> Result<(), Error> {
    let load = LoadOptions {
        device: place.device.clone(),
        dtype: place.dtype,
        vae: None,
        latents_on_device: false,
    };
    let mut pipeline = timed(place, "load", report, || {
        Pipeline::load(source, CheckpointIdentity::default(), &load)
    })?;
    pipeline.set_vae_memory(options.vae_memory);
    let on_card = place.device.is_cuda();
    for &steps in &options.steps {
        if on_card {
            let name = format!("first job, {steps} steps");
            timed(place, &name, report, || job(&mut pipeline, options, steps))?;
        }
        let runs = if on_card { RUNS } else { 1 };
        measure_job(&mut pipeline, place, options, (steps, runs), report)?;
    }
    Ok(())
}

/// The median of some jobs and of each of their stages.
fn measure_job(
    pipeline: &mut Pipeline,
    place: &Placement,
    options: &JobOptions,
    (steps, runs): (usize, usize),
    report: &mut dyn FnMut(Part),
) -> Result<(), Error> {
    let (mut whole, mut stages) = (Part::default(), Vec::new());
    let mut seconds = Vec::new();
    for _ in 0..runs {
        let mut keep = |part| whole = part;
        let name = format!("job, {steps} steps");
        stages.push(timed(place, &name, &mut keep, || {
            job(pipeline, options, steps)
        })?);
        seconds.push(whole.seconds);
    }
    let stage = |name: &str, of: fn(&Stages) -> f64| Part {
        name: format!("  {name} of {steps} steps"),
        seconds: median(&mut stages.iter().map(of).collect::<Vec<_>>()),
        ..Part::default()
    };
    let sampling = stage("sampling", |stages| stages.sampling);
    let recording = pipeline.unet.measure_recording(REPLAYS)?;
    report(Part {
        seconds: median(&mut seconds),
        launches: recording.map(|recording| recording.kernels),
        ..whole
    });
    report(stage("text", |stages| stages.text));
    let waiting = recording.map(|recording| {
        let busy = recording.seconds * steps as f64;
        (sampling.seconds - busy).max(0.0)
    });
    report(sampling);
    if let Some(seconds) = waiting {
        report(Part {
            name: format!("  sampling of {steps} steps outside the recording"),
            seconds,
            ..Part::default()
        });
    }
    report(stage("decoding", |stages| stages.decoding));
    report(stage("PNG", |stages| stages.png));
    Ok(())
}

/// Seconds of a job's stages.
struct Stages {
    text: f64,
    sampling: f64,
    decoding: f64,
    png: f64,
}

fn job(pipeline: &mut Pipeline, options: &JobOptions, steps: usize) -> Result<Stages, Error> {
    let request = GenerateRequest {
        prompt: "a lighthouse on a cliff at dawn, volumetric light, detailed".into(),
        negative_prompt: "blurry, text".into(),
        seed: 1,
        sampler: Sampler::Euler,
        steps,
        width: options.width,
        height: options.height,
        ..GenerateRequest::default()
    };
    let made = pipeline.generate(&request, &())?;
    let clock = Instant::now();
    for picture in &made.images {
        let options = EncodeOptions {
            infotext: Some(&picture.infotext),
            ..EncodeOptions::default()
        };
        encode(&picture.image, &options)?;
    }
    Ok(Stages {
        text: made.timings.text.as_secs_f64(),
        sampling: made.timings.sample.as_secs_f64(),
        decoding: made.timings.decode.as_secs_f64(),
        png: clock.elapsed().as_secs_f64(),
    })
}
