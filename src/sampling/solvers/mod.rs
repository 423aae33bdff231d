//! Solvers: one function per sampler, each of (run, latents, noise levels), in the form of k-diffusion's `sampling.py`.
//!
//! Notation as in the papers: `sigma` and `next` are the ends of a step, `d = (x - denoised) / sigma` its derivative, `t = -ln
//! sigma`. Shared algebra has names here. A step begins (for progress) with the latents that its first network call sees.

mod consistency;
mod ddim;
mod dpm2;
mod dpm_solver;
mod dpmpp;
mod dpmpp_sde;
mod euler;
mod heun;
mod multistep;
mod restart;
mod table;
mod unipc;

use super::plan::{Plan, Start};
use super::{Denoiser, Flag, Latents, SamplerOptions, StepNoise, lincomb};
pub(super) use consistency::consistency_scalings;
use dpm_solver::Limits;
pub use table::Sampler;

/// What every solver works with.
struct Run<'a, D> {
    denoiser: &'a mut D,
    noise: &'a mut dyn StepNoise,
    on_step: &'a mut dyn FnMut(usize, &Latents),
    options: &'a SamplerOptions,
    eta: f32,
    s_noise: f32,
}

/// Carries out a plan from its initial latents.
///
/// `on_step` is called when a step begins, with the number of finished steps and the latents entering it.
///
/// # Errors
/// The denoiser's, which ends the run.
pub fn sample<D: Denoiser>(
    plan: &Plan,
    denoiser: &mut D,
    x: Latents,
    noise: &mut dyn StepNoise,
    on_step: &mut dyn FnMut(usize, &Latents),
) -> Result<Latents, D::Error> {
    let options = &plan.options;
    let s_noise = if plan.sampler.has(Flag::Noise) {
        options.s_noise
    } else {
        1.0
    };
    let run = &mut Run {
        denoiser,
        noise,
        on_step,
        options,
        eta: plan.sampler.eta(options),
        s_noise,
    };
    table::solve(run, x, plan)
}

/// DPM-Solver runs over the model's whole range, or over that of a partial schedule.
fn limits(plan: &Plan) -> Limits {
    match (plan.start, plan.sigmas()) {
        (Start::Image { .. }, [sigma_max, .., sigma_min, _]) => Limits {
            sigma_max: *sigma_max,
            sigma_min: *sigma_min,
        },
        (Start::Image { .. }, [sigma, ..]) => Limits {
            sigma_max: *sigma,
            sigma_min: *sigma,
        },
        _ => Limits {
            sigma_max: plan.table().sigma_max(),
            sigma_min: plan.table().sigma_min(),
        },
    }
}

/// Network calls of DPM-Solver-Fast: the steps asked for, or the intervals of a partial schedule.
fn evaluations(plan: &Plan) -> usize {
    match plan.start {
        Start::Noise => plan.steps,
        Start::Image { .. } => plan.sigmas().len().saturating_sub(1),
    }
}

/// Continuous time at which `UniPC` starts; for a picture slightly off its noise level, as in A1111.
fn unipc_start(plan: &Plan) -> f64 {
    match (plan.start, plan.timesteps()) {
        (Start::Image { .. }, [.., last]) => (*last as f64 + 1.0) / 1000.0,
        _ => 1.0,
    }
}

impl<D: Denoiser> Run<'_, D> {
    fn begin(&mut self, step: usize, x: &Latents) {
        (self.on_step)(step, x);
    }

    fn denoised(&mut self, x: &Latents, sigma: f32) -> Result<Latents, D::Error> {
        self.denoiser.denoised(x, sigma)
    }

    /// The derivative of the probability flow, `(x - denoised) / sigma`.
    fn derivative(&mut self, x: &Latents, sigma: f32) -> Result<Latents, D::Error> {
        let denoised = self.denoised(x, sigma)?;
        Ok(to_d(x, sigma, &denoised))
    }

    /// Adds independent noise of standard deviation `s_noise * amount`.
    fn add_noise(&mut self, x: &mut Latents, amount: f32) {
        x.add_scaled(self.s_noise * amount, &self.noise.independent());
    }

    /// Adds Brownian noise of a step, of standard deviation `s_noise * amount`.
    fn add_brownian(&mut self, x: &mut Latents, sigma: f32, next: f32, amount: f32) {
        x.add_scaled(self.s_noise * amount, &self.noise.brownian(sigma, next));
    }
}

/// The steps of a schedule: `(index, sigma, next sigma)`.
fn steps(sigmas: &[f32]) -> impl Iterator<Item = (usize, f32, f32)> {
    sigmas
        .windows(2)
        .enumerate()
        .map(|(i, pair)| (i, pair[0], pair[1]))
}

fn to_d(x: &Latents, sigma: f32, denoised: &Latents) -> Latents {
    x.zip(denoised, |x, denoised| (x - denoised) / sigma)
}

/// The deterministic target and the noise to add for an ancestral step, `(down, up)` with `down^2 + up^2 = to^2`.
fn ancestral_step(from: f32, to: f32, eta: f32) -> (f32, f32) {
    if eta == 0.0 {
        return (to, 0.0);
    }
    let up = to.min(eta * (to * to * (from * from - to * to) / (from * from)).sqrt());
    ((to * to - up * up).sqrt(), up)
}

/// The middle of a step in the logarithm, in single precision throughout: Brownian trees are asked at exactly this sigma.
fn log_middle(sigma: f32, next: f32) -> f32 {
    let (t, t_next) = (-sigma.ln(), -next.ln());
    (-(t + (t_next - t) * 0.5)).exp()
}

/// An exact step of `x' = (x - denoised) / sigma` with `denoised` held, in the form of DPM-Solver++.
fn exponential_step(x: &Latents, denoised: &Latents, sigma: f32, next: f32) -> Latents {
    let h = sigma.ln() - next.ln();
    lincomb(&[(next / sigma, x), (-(-h).exp_m1(), denoised)])
}
