//! DPM-Solver++ for the stochastic differential equation (Lu et al. 2022, section 5), with Brownian noise.

use super::{Run, ancestral_step, exponential_step, log_middle, steps};
use crate::rng::{Latents, lincomb};
use crate::sampling::Denoiser;

/// How the two-step solver uses the previous denoised latents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Correction {
    /// Half of the first-order coefficient.
    Midpoint,
    /// The exact integral of a linear extrapolation.
    Heun,
}

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
            x = denoised;
            continue;
        }
        let middle = log_middle(sigma, next);
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

/// DPM-Solver++(2M) SDE: second order from the previous step's denoised latents.
pub(super) fn dpmpp_2m_sde<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    sigmas: &[f32],
    correction: Correction,
) -> Result<Latents, D::Error> {
    let mut previous: Option<(Latents, f32)> = None;
    for (i, sigma, next) in steps(sigmas) {
        run.begin(i, &x);
        let denoised = run.denoised(&x, sigma)?;
        if next == 0.0 {
            return Ok(denoised);
        }
        let h = sigma.ln() - next.ln();
        let eta_h = run.eta * h;
        let gain = -(-h - eta_h).exp_m1();
        x = lincomb(&[(next / sigma * (-eta_h).exp(), &x), (gain, &denoised)]);
        if let Some((previous, h_previous)) = &previous {
            let slope = match correction {
                Correction::Midpoint => 0.5 * gain,
                Correction::Heun => gain / (-h - eta_h) + 1.0,
            };
            x.add_scaled(slope * h / h_previous, &(&denoised - previous));
        }
        if run.eta > 0.0 {
            run.add_brownian(
                &mut x,
                sigma,
                next,
                next * (-(-2.0 * eta_h).exp_m1()).sqrt(),
            );
        }
        previous = Some((denoised, h));
    }
    Ok(x)
}

/// DPM-Solver++(3M) SDE: third order from the two previous steps' denoised latents.
pub(super) fn dpmpp_3m_sde<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    sigmas: &[f32],
) -> Result<Latents, D::Error> {
    // Most recent first: denoised latents and the log length of the step they began.
    let mut history: Vec<(Latents, f32)> = Vec::new();
    for (i, sigma, next) in steps(sigmas) {
        run.begin(i, &x);
        let denoised = run.denoised(&x, sigma)?;
        if next == 0.0 {
            return Ok(denoised);
        }
        let h = sigma.ln() - next.ln();
        let h_eta = h * (run.eta + 1.0);
        x = lincomb(&[((-h_eta).exp(), &x), (-(-h_eta).exp_m1(), &denoised)]);
        let phi_2 = (-h_eta).exp_m1() / h_eta + 1.0;
        let phi_3 = phi_2 / h_eta - 0.5;
        match history.as_slice() {
            [(d1, h1), (d2, h2), ..] => {
                let (r0, r1) = (h1 / h, h2 / h);
                let near = &(&denoised - d1) * (1.0 / r0);
                let bend = &near - &(&(d1 - d2) * (1.0 / r1));
                x.add_scaled(phi_2, &near);
                x.add_scaled((phi_2 * r0 - phi_3) / (r0 + r1), &bend);
            }
            [(d1, h1)] => x.add_scaled(phi_2 * h / h1, &(&denoised - d1)),
            [] => {}
        }
        if run.eta > 0.0 {
            run.add_brownian(
                &mut x,
                sigma,
                next,
                next * (-(-2.0 * h * run.eta).exp_m1()).sqrt(),
            );
        }
        history.insert(0, (denoised, h));
        history.truncate(2);
    }
    Ok(x)
}
