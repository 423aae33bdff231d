//! Heun's method: an Euler step, then the same step with the average of both ends' derivatives.

use super::euler::churn;
use super::{Run, steps};
use crate::rng::Latents;
use crate::sampling::Denoiser;

/// Algorithm 2 of Karras et al. (2022), with churn; the last step is Euler's.
pub(super) fn heun<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    sigmas: &[f32],
) -> Result<Latents, D::Error> {
    for (i, sigma, next) in steps(sigmas) {
        let sigma = churn(run, &mut x, sigma, sigmas.len() - 1);
        run.begin(i, &x);
        x = heun_step(run, x, sigma, next)?;
    }
    Ok(x)
}

/// One step from `sigma` to `next`; Euler's where `next` is 0.
pub(super) fn heun_step<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    sigma: f32,
    next: f32,
) -> Result<Latents, D::Error> {
    let d = run.derivative(&x, sigma)?;
    let mut end = x.clone();
    end.add_scaled(next - sigma, &d);
    if next == 0.0 {
        return Ok(end);
    }
    let d_end = run.derivative(&end, next)?;
    x.add_scaled((next - sigma) / 2.0, &(&d + &d_end));
    Ok(x)
}
