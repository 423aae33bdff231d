//! Euler's method, deterministic and ancestral.

use super::{Run, ancestral_step, steps};
use crate::rng::Latents;
use crate::sampling::Denoiser;

/// Algorithm 2 (Euler steps) of Karras et al. (2022), with churn.
pub(super) fn euler<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    sigmas: &[f32],
) -> Result<Latents, D::Error> {
    for (i, sigma, next) in steps(sigmas) {
        let sigma = churn(run, &mut x, sigma, sigmas.len() - 1);
        run.begin(i, &x);
        let d = run.derivative(&x, sigma)?;
        x.add_scaled(next - sigma, &d);
    }
    Ok(x)
}

/// Ancestral sampling with Euler steps: down past the next level, then noise back up to it.
pub(super) fn euler_ancestral<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    sigmas: &[f32],
) -> Result<Latents, D::Error> {
    for (i, sigma, next) in steps(sigmas) {
        run.begin(i, &x);
        let d = run.derivative(&x, sigma)?;
        let (down, up) = ancestral_step(sigma, next, run.eta);
        x.add_scaled(down - sigma, &d);
        if next > 0.0 {
            run.add_noise(&mut x, up);
        }
    }
    Ok(x)
}

/// Raises the noise level before a step (Karras et al. 2022, algorithm 2, lines 4 to 6); returns the raised sigma.
///
/// Noise is drawn whether it is used or not, so that the later draws do not depend on the limits.
pub(super) fn churn<D: Denoiser>(
    run: &mut Run<'_, D>,
    x: &mut Latents,
    sigma: f32,
    steps: usize,
) -> f32 {
    let options = run.options;
    let highest = if options.s_tmax == 0.0 {
        f32::INFINITY
    } else {
        options.s_tmax
    };
    let churned = (options.s_tmin..=highest).contains(&sigma);
    let gamma = if churned {
        (options.s_churn / steps as f32).min(2f32.sqrt() - 1.0)
    } else {
        0.0
    };
    let noise = run.noise.independent();
    let raised = sigma * (gamma + 1.0);
    if gamma > 0.0 {
        x.add_scaled(
            run.s_noise * (raised * raised - sigma * sigma).sqrt(),
            &noise,
        );
    }
    raised
}
