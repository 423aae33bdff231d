//! Heun's method: an Euler step, then the same step with the average of both ends' derivatives.

use super::euler::churn;
use super::{Run, steps};
use crate::rng::{Latents, lincomb};
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
    let end = moved(&x, &d, next - sigma);
    if next == 0.0 {
        return Ok(end);
    }
    let d_end = run.derivative(&end, next)?;
    x.add_scaled((next - sigma) / 2.0, &(&d + &d_end));
    Ok(x)
}

/// Heun++ with up to three derivatives per step, weighted by sigmas relative to the first (Forge's `HeunPP2`).
pub(super) fn heunpp2<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    sigmas: &[f32],
) -> Result<Latents, D::Error> {
    for (i, sigma, next) in steps(sigmas) {
        run.begin(i, &x);
        let h = next - sigma;
        let d = run.derivative(&x, sigma)?;
        if i + 2 == sigmas.len() {
            return Ok(moved(&x, &d, h));
        }
        let x2 = moved(&x, &d, h);
        let d2 = run.derivative(&x2, next)?;
        let mean = if i + 3 == sigmas.len() {
            let w2 = next / (2.0 * sigmas[0]);
            lincomb(&[(1.0 - w2, &d), (w2, &d2)])
        } else {
            let after = sigmas[i + 2];
            let d3 = run.derivative(&moved(&x2, &d2, after - next), after)?;
            let (w2, w3) = (next / (3.0 * sigmas[0]), after / (3.0 * sigmas[0]));
            lincomb(&[(1.0 - w2 - w3, &d), (w2, &d2), (w3, &d3)])
        };
        x.add_scaled(h, &mean);
    }
    Ok(x)
}

fn moved(x: &Latents, d: &Latents, h: f32) -> Latents {
    lincomb(&[(1.0, x), (h, d)])
}
