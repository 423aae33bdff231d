//! A sampler of your own: a function of (denoiser, latents, noise levels), here the midpoint method in `ln sigma` (DPM-Solver-2,
//! Lu et al. 2022, algorithm 1).
//!
//! `cargo run --release --example write_a_sampler` runs it beside the library's samplers on a denoiser whose exact answer is
//! known, and prints how far each ends from it. Inside the library a solver has the same form: `src/sampling/solvers/`.

use std::convert::Infallible;
use std::io::Write;

use sdgen::rng::{Generator, NoiseSource};
use sdgen::sampling::{
    Denoiser, Latents, PredictedNoise, Sampler, SamplerOptions, Scheduler, SigmaTable, StepNoise,
    lincomb, plan, sample,
};

/// The sampler. Each step looks at the middle of its interval first.
fn midpoint<D: Denoiser>(
    denoiser: &mut D,
    mut x: Latents,
    sigmas: &[f32],
) -> Result<Latents, D::Error> {
    for step in sigmas.windows(2) {
        let (sigma, next) = (step[0], step[1]);
        let middle = (sigma * next).sqrt();
        let ahead = step_to(middle, sigma, &x, &denoiser.denoised(&x, sigma)?);
        if next == 0.0 {
            return Ok(ahead);
        }
        x = step_to(next, sigma, &x, &denoiser.denoised(&ahead, middle)?);
    }
    Ok(x)
}

/// From level `from` to level `to` along the line through `x` and `denoised`.
fn step_to(to: f32, from: f32, x: &Latents, denoised: &Latents) -> Latents {
    lincomb(&[(to / from, x), (1.0 - to / from, denoised)])
}

/// The best denoiser of normally distributed data with this standard deviation, and the number of its calls.
struct Gaussian {
    deviation: f32,
    calls: usize,
}

impl Gaussian {
    /// Where the probability flow takes `x` from level `sigma` down to 0.
    fn exact(&self, x: &Latents, sigma: f32) -> Latents {
        x * (self.deviation / self.deviation.hypot(sigma))
    }
}

impl Denoiser for Gaussian {
    type Error = Infallible;

    fn denoised(&mut self, x: &Latents, sigma: f32) -> Result<Latents, Infallible> {
        self.calls += 1;
        Ok(x * (self.deviation.powi(2) / (self.deviation.powi(2) + sigma.powi(2))))
    }

    fn noise(&mut self, x: &Latents, timestep: f32) -> Result<PredictedNoise, Infallible> {
        let sigma = SigmaTable::default().sigma(timestep);
        let scaled = x * (1.0 + sigma * sigma).sqrt();
        let guided = &(&scaled - &self.denoised(&scaled, sigma)?) * (1.0 / sigma);
        let uncond = guided.clone();
        Ok(PredictedNoise { guided, uncond })
    }
}

/// The samplers compared here add no noise.
struct Silence;

impl StepNoise for Silence {
    fn independent(&mut self) -> Latents {
        Latents::zeros([1, 4, 16, 16])
    }

    fn brownian(&mut self, _sigma: f32, _sigma_next: f32) -> Latents {
        Latents::zeros([1, 4, 16, 16])
    }
}

fn main() -> std::io::Result<()> {
    let noise = Generator::new(NoiseSource::Cpu, 1).normals(4 * 16 * 16);
    let noise = Latents::new(noise, [1, 4, 16, 16]);
    let mut out = std::io::stdout().lock();
    writeln!(out, "{:<10} {:>5} {:>9}", "sampler", "calls", "error")?;
    let rows = [
        ("midpoint", None),
        ("Euler", Some(Sampler::Euler)),
        ("Heun", Some(Sampler::Heun)),
    ];
    for (name, sampler) in rows {
        let (options, table) = (SamplerOptions::default(), SigmaTable::default());
        let plan = plan(
            sampler.unwrap_or(Sampler::Euler),
            Scheduler::Karras,
            20,
            &options,
            &table,
        );
        let x = plan.initial_latents(&noise);
        let mut denoiser = Gaussian {
            deviation: 0.5,
            calls: 0,
        };
        let exact = denoiser.exact(&x, plan.sigmas()[0]);
        let result = match sampler {
            Some(_) => sample(&plan, &mut denoiser, x, &mut Silence, &mut |_, _| {}),
            None => midpoint(&mut denoiser, x, plan.sigmas()),
        };
        let end = match result {
            Ok(end) => end,
            Err(never) => match never {},
        };
        let error = (&end - &exact)
            .data()
            .iter()
            .fold(0.0_f32, |worst, v| worst.max(v.abs()));
        writeln!(out, "{name:<10} {:>5} {error:>9.5}", denoiser.calls)?;
    }
    Ok(())
}
