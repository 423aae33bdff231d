//! DPM-Solver-2 (Lu et al. 2022, arXiv 2206.00927) in the exponent of sigma: the middle of a step in its logarithm decides.

use super::euler::churn;
use super::{Run, ancestral_step, log_middle, steps};
use crate::rng::Latents;
use crate::sampling::Denoiser;

/// Second-order steps inspired by DPM-Solver-2 and algorithm 2 of Karras et al. (2022), with churn.
pub(super) fn dpm_2<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    sigmas: &[f32],
) -> Result<Latents, D::Error> {
    for (i, sigma, next) in steps(sigmas) {
        let sigma = churn(run, &mut x, sigma, sigmas.len() - 1);
        run.begin(i, &x);
        x = midpoint_step(run, x, sigma, next)?;
    }
    Ok(x)
}

/// Ancestral sampling with DPM-Solver-2 steps; a step down to 0 adds no noise.
pub(super) fn dpm_2_ancestral<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    sigmas: &[f32],
) -> Result<Latents, D::Error> {
    for (i, sigma, next) in steps(sigmas) {
        run.begin(i, &x);
        let (down, up) = ancestral_step(sigma, next, run.eta);
        x = midpoint_step(run, x, sigma, down)?;
        if down > 0.0 {
            run.add_noise(&mut x, up);
        }
    }
    Ok(x)
}

/// One step from `sigma` to `next` along the derivative of its middle; Euler's where `next` is 0.
fn midpoint_step<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    sigma: f32,
    next: f32,
) -> Result<Latents, D::Error> {
    let mut d = run.derivative(&x, sigma)?;
    if next > 0.0 {
        let middle = log_middle(sigma, next);
        let mut x_middle = x.clone();
        x_middle.add_scaled(middle - sigma, &d);
        d = run.derivative(&x_middle, middle)?;
    }
    x.add_scaled(next - sigma, &d);
    Ok(x)
}
