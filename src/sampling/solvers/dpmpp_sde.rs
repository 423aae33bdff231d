//! DPM-Solver++ for the stochastic differential equation, with Brownian noise.

use super::{Run, ancestral_step, exponential_step, steps};
use crate::rng::Latents;
use crate::sampling::Denoiser;

/// DPM-Solver++ (stochastic), two network calls per step with the second at the middle of the log interval.
pub(super) fn dpmpp_sde<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    sigmas: &[f32],
) -> Result<Latents, D::Error> {
    for (i, sigma, next) in steps(sigmas) {
        run.begin(i, &x);
        let denoised = run.denoised(&x, sigma)?;
        if next == 0.0 {
            x = exponential_step(&x, &denoised, sigma, next);
            continue;
        }
        // In single precision throughout: the Brownian tree is asked at exactly this sigma.
        let (t, t_next) = (-sigma.ln(), -next.ln());
        let middle = (-(t + (t_next - t) * 0.5)).exp();
        let (down, up) = ancestral_step(sigma, middle, run.eta);
        let mut x_middle = exponential_step(&x, &denoised, sigma, down);
        run.add_brownian(&mut x_middle, sigma, middle, up);
        let denoised = run.denoised(&x_middle, middle)?;
        let (down, up) = ancestral_step(sigma, next, run.eta);
        x = exponential_step(&x, &denoised, sigma, down);
        run.add_brownian(&mut x, sigma, next, up);
    }
    Ok(x)
}
