//! DPM-Solver (Lu et al. 2022, arXiv 2206.00927): orders 1 to 3 in `t = -ln sigma`, with a fixed or an adaptive step.
//!
//! Both run between two positive noise levels and end at the smaller one, not at 0, and can add ancestral noise.

use super::{Run, ancestral_step};
use crate::rng::{Latents, lincomb};
use crate::sampling::Denoiser;
use crate::sampling::scheduler::linspace;

/// The noise levels a run goes between.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) sigma_max: f32,
    pub(super) sigma_min: f32,
}

/// DPM-Solver-Fast: `evaluations` network calls spread over steps of order 3 and a remainder.
pub(super) fn dpm_fast<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    limits: Limits,
    evaluations: usize,
) -> Result<Latents, D::Error> {
    let (start, end) = (-limits.sigma_max.ln(), -limits.sigma_min.ln());
    if end <= start {
        return run.denoised(&x, limits.sigma_max);
    }
    let intervals = evaluations / 3 + 1;
    let mut orders = vec![3; intervals - 1];
    if evaluations.is_multiple_of(3) {
        orders.pop();
        orders.extend([2, 1]);
    } else {
        orders.push(evaluations % 3);
    }
    let times = linspace(start, end, intervals + 1);
    for (i, order) in orders.into_iter().enumerate() {
        let (t, next) = (times[i], times[i + 1]);
        let (target, noise) = ancestral_target(t, next, end, run.eta);
        run.begin(i, &x);
        let eps = eps(run, &x, t)?;
        let mut step = Step {
            t,
            next: target,
            x: &x,
            eps,
            first: None,
        };
        x = match order {
            1 => step.order_1(),
            2 => step.order_2(run, 0.5)?,
            _ => step.order_3(run)?,
        };
        run.add_noise(&mut x, noise);
    }
    Ok(x)
}

/// DPM-Solver-23: order 3 with the embedded order 2 as error estimate and an integral step size controller.
///
/// The error is one number for the whole batch, so pictures depend on the batch they are in, as in k-diffusion.
pub(super) fn dpm_adaptive<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    limits: Limits,
) -> Result<Latents, D::Error> {
    const RELATIVE: f32 = 0.05;
    const ABSOLUTE: f32 = 0.0078;
    const ACCEPT: f64 = 0.81;
    let (start, end) = (-limits.sigma_max.ln(), -limits.sigma_min.ln());
    if end <= start {
        return run.denoised(&x, limits.sigma_max);
    }
    let order = if run.eta == 0.0 { 3.0 } else { 1.5 };
    let (mut t, mut h, mut previous, mut attempts) = (start, 0.05, x.clone(), 0);
    while t < end - 1e-5 {
        let next = end.min(t + h as f32);
        let (target, noise) = ancestral_target(t, next, end, run.eta);
        run.begin(attempts, &x);
        attempts += 1;
        let eps = eps(run, &x, t)?;
        let mut step = Step {
            t,
            next: target,
            x: &x,
            eps,
            first: None,
        };
        let low = step.order_2(run, 1.0 / 3.0)?;
        let mut high = step.order_3(run)?;
        let scaled = low.zip(&previous, |low, previous| {
            ABSOLUTE.max(RELATIVE * low.abs().max(previous.abs()))
        });
        let scaled = (&low - &high).zip(&scaled, |difference, allowed| difference / allowed);
        let scaled = scaled.data();
        let squares = scaled.iter().map(|&v| f64::from(v) * f64::from(v));
        let error = (squares.sum::<f64>() / scaled.len() as f64).sqrt();
        let factor = 1.0 + ((1.0 / (error + 1e-8)).powf(1.0 / order) - 1.0).atan();
        if factor >= ACCEPT {
            run.add_noise(&mut high, noise);
            (x, previous, t) = (high, low, next);
        }
        h *= factor;
    }
    Ok(x)
}

fn sigma(t: f32) -> f32 {
    (-t).exp()
}

/// Where an ancestral step from `t` to `next` really goes, not past `end`, and the noise that brings it back.
fn ancestral_target(t: f32, next: f32, end: f32, eta: f32) -> (f32, f32) {
    if eta == 0.0 {
        return (next, 0.0);
    }
    let (down, _) = ancestral_step(sigma(t), sigma(next), eta);
    let target = end.min(-down.ln());
    // Rounding can put the target a hair before `next` when `next` is the end.
    (
        target,
        (sigma(next).powi(2) - sigma(target).powi(2))
            .max(0.0)
            .sqrt(),
    )
}

/// The noise seen in `x` at time `t`.
fn eps<D: Denoiser>(run: &mut Run<'_, D>, x: &Latents, t: f32) -> Result<Latents, D::Error> {
    run.derivative(x, sigma(t))
}

/// One step from `t` to `next`, with the noise predictions made for it so far.
struct Step<'a> {
    t: f32,
    next: f32,
    x: &'a Latents,
    eps: Latents,
    /// Noise predicted at the first intermediate time, shared between orders 2 and 3.
    first: Option<Latents>,
}

impl Step<'_> {
    fn h(&self) -> f32 {
        self.next - self.t
    }

    /// DPM-Solver-1 to the share `r` of the step: `x - sigma expm1(r h) eps`.
    fn euler(&self, r: f32) -> Latents {
        let at = self.t + r * self.h();
        lincomb(&[
            (1.0, self.x),
            (-sigma(at) * (r * self.h()).exp_m1(), &self.eps),
        ])
    }

    fn order_1(&self) -> Latents {
        let h = self.h();
        lincomb(&[(1.0, self.x), (-sigma(self.next) * h.exp_m1(), &self.eps)])
    }

    /// The difference of the noise at the share `r` of the step to the noise at its start.
    fn first_difference<D: Denoiser>(
        &mut self,
        run: &mut Run<'_, D>,
        r: f32,
    ) -> Result<Latents, D::Error> {
        let eps = match self.first.take() {
            Some(eps) => eps,
            None => eps(run, &self.euler(r), self.t + r * self.h())?,
        };
        let difference = &eps - &self.eps;
        self.first = Some(eps);
        Ok(difference)
    }

    /// DPM-Solver-2 with its intermediate time at the share `r` of the step.
    fn order_2<D: Denoiser>(&mut self, run: &mut Run<'_, D>, r: f32) -> Result<Latents, D::Error> {
        let change = self.first_difference(run, r)?;
        let mut x = self.order_1();
        x.add_scaled(-sigma(self.next) / (2.0 * r) * self.h().exp_m1(), &change);
        Ok(x)
    }

    /// DPM-Solver-3 with its intermediate times at one and two thirds of the step.
    fn order_3<D: Denoiser>(&mut self, run: &mut Run<'_, D>) -> Result<Latents, D::Error> {
        const R1: f32 = 1.0 / 3.0;
        const R2: f32 = 2.0 / 3.0;
        let h = self.h();
        let change = self.first_difference(run, R1)?;
        let at = self.t + R2 * h;
        let mut middle = self.euler(R2);
        middle.add_scaled(
            -sigma(at) * (R2 / R1) * ((R2 * h).exp_m1() / (R2 * h) - 1.0),
            &change,
        );
        let change = &eps(run, &middle, at)? - &self.eps;
        let mut x = self.order_1();
        x.add_scaled(-sigma(self.next) / R2 * (h.exp_m1() / h - 1.0), &change);
        Ok(x)
    }
}
