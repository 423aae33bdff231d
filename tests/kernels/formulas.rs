//! Activations in `f64`, by their definitions.

use crate::emulation::Type;

/// As kernels number them.
pub(crate) const ACTIVATIONS: usize = 6;

/// The error function by its Maclaurin series, which converges well within `f64` below 6 and is 1 beyond.
fn erf(x: f64) -> f64 {
    if x.abs() > 5.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

pub(crate) fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2))
}

pub(crate) fn activate(activation: usize, x: f64) -> f64 {
    match activation {
        1 => x / (1.0 + (-x).exp()),
        2 => gelu(x),
        3 => x / (1.0 + (-1.702 * x).exp()),
        4 => x.max(0.0),
        5 => x.max(0.2 * x),
        _ => x,
    }
}

/// Rounded noise, as `f64` too.
pub(crate) fn inputs(t: Type, seed: usize, count: usize, reach: f32) -> Vec<f32> {
    let noise = crate::emulation::noise(seed, count);
    t.round(&noise.iter().map(|x| x * reach).collect::<Vec<_>>())
}
