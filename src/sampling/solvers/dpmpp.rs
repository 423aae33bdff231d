//! DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) without Brownian noise.

use super::{Run, ancestral_step, exponential_step, log_middle, steps};
use crate::rng::{Latents, lincomb};
use crate::sampling::Denoiser;

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
