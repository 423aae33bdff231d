//! What happens around the models, on one core: solvers without a network, prompts, picture files.
//!
//! `cargo bench --bench host`. These must stay small beside a denoising step, which takes seconds on a CPU and tens of
//! milliseconds on a GPU.

use std::convert::Infallible;
use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sdgen::imaging::{EncodeOptions, Format, encode};
use sdgen::prompt::{
    EditRule, Flavour, ScheduleSteps, Tokenizer, extract_extra_networks, parse_attention, schedule,
};
use sdgen::rng::{Generator, NoiseSource};
use sdgen::sampling::{
    Denoiser, Latents, PredictedNoise, Sampler, SamplerOptions, Scheduler, SigmaTable, StepNoise,
    plan, sample,
};

/// Latents of a 1024x1024 picture.
const SHAPE: [usize; 4] = [1, 4, 128, 128];

/// Costs one pass over the latents.
struct Free;

impl Denoiser for Free {
    type Error = Infallible;

    fn denoised(&mut self, x: &Latents, sigma: f32) -> Result<Latents, Infallible> {
        Ok(x * (1.0 / (1.0 + sigma * sigma)))
    }

    fn noise(&mut self, x: &Latents, _timestep: f32) -> Result<PredictedNoise, Infallible> {
        Ok(PredictedNoise {
            guided: x * 0.5,
            uncond: x * 0.5,
        })
    }
}

/// The same noise at every step.
struct Fixed(Latents);

impl StepNoise for Fixed {
    fn independent(&mut self) -> Latents {
        self.0.clone()
    }

    fn brownian(&mut self, _sigma: f32, _sigma_next: f32) -> Latents {
        self.0.clone()
    }
}

fn solvers(c: &mut Criterion) {
    let noise = Generator::new(NoiseSource::Cpu, 1).normals(SHAPE.iter().product());
    let noise = Latents::new(noise, SHAPE);
    let (options, table) = (SamplerOptions::default(), SigmaTable::default());
    let mut group = c.benchmark_group("solver, 20 steps, host f32 [1, 4, 128, 128]");
    for sampler in [
        Sampler::Euler,
        Sampler::EulerA,
        Sampler::Dpmpp2M,
        Sampler::UniPc,
    ] {
        let plan = plan(sampler, Scheduler::Automatic, 20, &options, &table);
        group.bench_function(sampler.info().label, |b| {
            b.iter(|| {
                let x = plan.initial_latents(&noise);
                let mut step_noise = Fixed(noise.clone());
                match sample(&plan, &mut Free, x, &mut step_noise, &mut |_, _| {}) {
                    Ok(x) => black_box(x),
                    Err(never) => match never {},
                }
            });
        });
    }
    group.finish();
    c.bench_function("noise, Philox, host f32 [1, 4, 128, 128]", |b| {
        b.iter(|| Generator::new(NoiseSource::Nv, 1).normals(SHAPE.iter().product()));
    });
}

fn prompts(c: &mut Criterion) {
    let text = "masterpiece, (best quality:1.2), [photo:painting:0.4] of a ((lighthouse)) at [dawn|dusk], \
        <lora:detail:0.6> volumetric light, [blurry] waves AND BREAK, intricate details, (wide shot:0.9)";
    let steps = ScheduleSteps {
        base: 20,
        hires: None,
    };
    c.bench_function("prompt to schedule and weights, 200 characters", |b| {
        b.iter(|| {
            let (plain, networks) = extract_extra_networks(black_box(text));
            let parts = schedule(&plain, steps, EditRule::default());
            let weights: usize = parts
                .iter()
                .map(|(_, text)| parse_attention(text).len())
                .sum();
            (networks.len(), weights)
        });
    });
    let tokenizer = Tokenizer::new();
    c.bench_function("prompt to token ids, 200 characters", |b| {
        b.iter(|| tokenizer.encode(black_box(text), Flavour::ClipL));
    });
}

fn files(c: &mut Criterion) {
    // Smooth with some grain, as a picture is.
    let picture = image::RgbImage::from_fn(1024, 1024, |x, y| {
        let grain = (x.wrapping_mul(2_654_435_761) ^ y.wrapping_mul(40_503)) >> 28;
        image::Rgb([
            (x / 4 + grain) as u8,
            (y / 4 + grain) as u8,
            ((x + y) / 8) as u8,
        ])
    });
    let mut group = c.benchmark_group("encode u8 [1024, 1024, 3]");
    group.sample_size(20);
    group.throughput(Throughput::Bytes(picture.as_raw().len() as u64));
    for format in [Format::Png, Format::Jpeg, Format::WebP] {
        let options = EncodeOptions {
            format,
            infotext: Some("a cat\nSteps: 20, Sampler: Euler, Seed: 1"),
            ..EncodeOptions::default()
        };
        group.bench_function(format.extension(), |b| {
            b.iter(|| encode(black_box(&picture), &options).expect("a picture that fits"));
        });
    }
    group.finish();
}

criterion_group!(host, solvers, prompts, files);
criterion_main!(host);
