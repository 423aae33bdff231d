//! DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) without Brownian noise.

use super::{Run, ancestral_step, exponential_step, log_middle, steps};
use crate::rng::{Latents, lincomb};
use crate::sampling::Denoiser;

/// Refined exponential solver as a two-step method (Zhang et al. 2023, arXiv 2308.02157): the order conditions of exponential
/// integrators are met exactly, with the previous step's denoised latents in place of an inner stage.
pub(super) fn res_multistep<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    sigmas: &[f32],
) -> Result<Latents, D::Error> {
    let mut previous: Option<Latents> = None;
    for (i, sigma, next) in steps(sigmas) {
        run.begin(i, &x);
        let denoised = run.denoised(&x, sigma)?;
        x = match &previous {
            Some(previous) if next > 0.0 => {
                let log = |sigma: f32| f64::from(sigma).ln();
                let h = log(sigma) - log(next);
                // The previous level in units of this step, before its beginning.
                let c2 = (log(sigma) - log(sigmas[i - 1])) / h;
                let phi_1 = (-h).exp_m1() / -h;
                let phi_2 = (phi_1 - 1.0) / -h;
                lincomb(&[
                    (next / sigma, &x),
                    ((h * (phi_1 - phi_2 / c2)) as f32, &denoised),
                    ((h * phi_2 / c2) as f32, previous),
                ])
            }
            _ => exponential_step(&x, &denoised, sigma, next),
        };
        previous = Some(denoised);
    }
    Ok(x)
}

/// DPM-Solver++(2M), algorithm 2: second order from the previous step's denoised latents.
pub(super) fn dpmpp_2m<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    sigmas: &[f32],
) -> Result<Latents, D::Error> {
    let mut previous: Option<Latents> = None;
    for (i, sigma, next) in steps(sigmas) {
        run.begin(i, &x);
        let denoised = run.denoised(&x, sigma)?;
        let extrapolated = match &previous {
            Some(previous) if next > 0.0 => {
                let r = (sigmas[i - 1].ln() - sigma.ln()) / (sigma.ln() - next.ln());
                let weight = 1.0 / (2.0 * r);
                lincomb(&[(1.0 + weight, &denoised), (-weight, previous)])
            }
            _ => denoised.clone(),
        };
        x = exponential_step(&x, &extrapolated, sigma, next);
        previous = Some(denoised);
    }
    Ok(x)
}

/// Ancestral sampling with DPM-Solver++(2S) steps, algorithm 1: second order from the middle of the step.
pub(super) fn dpmpp_2s_ancestral<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    sigmas: &[f32],
) -> Result<Latents, D::Error> {
    for (i, sigma, next) in steps(sigmas) {
        run.begin(i, &x);
        let mut denoised = run.denoised(&x, sigma)?;
        let (down, up) = ancestral_step(sigma, next, run.eta);
        if down > 0.0 {
            let middle = log_middle(sigma, down);
            let x_middle = exponential_step(&x, &denoised, sigma, middle);
            denoised = run.denoised(&x_middle, middle)?;
        }
        x = exponential_step(&x, &denoised, sigma, down);
        if next > 0.0 {
            run.add_noise(&mut x, up);
        }
    }
    Ok(x)
}
