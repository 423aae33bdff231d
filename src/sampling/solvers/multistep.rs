//! Linear multistep methods: a step is a weighted sum of this and earlier derivatives.
//!
//! They differ in the weights only: exact integrals of the interpolating polynomial in sigma (LMS, iPNDM-v), the constants of
//! equal steps (iPNDM), or the integral in the time of a variance-preserving process (DEIS).

use super::{Run, steps};
use crate::rng::Latents;
use crate::sampling::Denoiser;

const ORDER: usize = 4;

/// Linear multistep of order 4 with the exact coefficients of the given steps (Adams-Bashforth with variable steps).
pub(super) fn lms<D: Denoiser>(
    run: &mut Run<'_, D>,
    x: Latents,
    sigmas: &[f32],
) -> Result<Latents, D::Error> {
    multistep(run, x, sigmas, ORDER, |i, order| {
        lagrange_integrals(sigmas, i, order)
    })
}

/// iPNDM (Zhang and Chen 2022, arXiv 2204.13902): Adams-Bashforth with the coefficients of equal steps.
pub(super) fn ipndm<D: Denoiser>(
    run: &mut Run<'_, D>,
    x: Latents,
    sigmas: &[f32],
) -> Result<Latents, D::Error> {
    multistep(run, x, sigmas, ORDER, |i, order| {
        let h = f64::from(sigmas[i + 1]) - f64::from(sigmas[i]);
        adams_bashforth(order).iter().map(|c| c * h).collect()
    })
}

/// DEIS (Zhang and Chen 2022, tAB variant) of order 3; the first and the last step are Euler's.
pub(super) fn deis<D: Denoiser>(
    run: &mut Run<'_, D>,
    x: Latents,
    sigmas: &[f32],
) -> Result<Latents, D::Error> {
    let time = VpTime::new();
    multistep(run, x, sigmas, 3, |i, order| {
        if order == 1 || sigmas[i + 1] == 0.0 {
            return vec![f64::from(sigmas[i + 1]) - f64::from(sigmas[i])];
        }
        time.integrals(sigmas, i, order)
    })
}

/// The weights of Adams-Bashforth with equal steps, most recent first, for orders 1 to 4.
pub(super) fn adams_bashforth(order: usize) -> &'static [f64] {
    match order {
        0 | 1 => &[1.0],
        2 => &[3.0 / 2.0, -1.0 / 2.0],
        3 => &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
        _ => &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
    }
}

/// Steps by `weights(step, order)`, most recent derivative first; missing weights are 0.
fn multistep<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    sigmas: &[f32],
    max_order: usize,
    weights: impl Fn(usize, usize) -> Vec<f64>,
) -> Result<Latents, D::Error> {
    let mut history: Vec<Latents> = Vec::new();
    for (i, sigma, _) in steps(sigmas) {
        run.begin(i, &x);
        history.insert(0, run.derivative(&x, sigma)?);
        history.truncate(max_order);
        for (weight, d) in weights(i, history.len()).into_iter().zip(&history) {
            x.add_scaled(weight as f32, d);
        }
    }
    Ok(x)
}

/// Integrals over step `i` of the Lagrange polynomials through the last `order` sigmas; exact up to order 4.
fn lagrange_integrals(sigmas: &[f32], i: usize, order: usize) -> Vec<f64> {
    let nodes: Vec<f64> = (0..order).map(|k| f64::from(sigmas[i - k])).collect();
    let (start, end) = (f64::from(sigmas[i]), f64::from(sigmas[i + 1]));
    let (middle, half) = (0.5 * (start + end), 0.5 * (end - start));
    // Two Gauss points integrate a cubic exactly.
    let point = half / 3f64.sqrt();
    let integral =
        |j| half * (lagrange(&nodes, j, middle - point) + lagrange(&nodes, j, middle + point));
    (0..order).map(integral).collect()
}

/// The polynomial that is 1 at node `j` and 0 at the others.
fn lagrange(nodes: &[f64], j: usize, at: f64) -> f64 {
    let others = nodes.iter().enumerate().filter(|&(k, _)| k != j);
    others
        .map(|(_, node)| (at - node) / (nodes[j] - node))
        .product()
}

/// The time of a variance-preserving process with linear beta that has sigma 0.002 at 0.001 and 80 at 1.
struct VpTime {
    beta_min: f64,
    beta_slope: f64,
}

impl VpTime {
    fn new() -> Self {
        let (epsilon, low, high) = (1e-3, 0.002f64, 80f64);
        let (low, high) = ((low * low + 1.0).ln(), (high * high + 1.0).ln());
        let beta_slope = 2.0 * (low / epsilon - high) / (epsilon - 1.0);
        Self {
            beta_min: high - 0.5 * beta_slope,
            beta_slope,
        }
    }

    fn of_sigma(&self, sigma: f64) -> f64 {
        let log = (sigma * sigma + 1.0).ln();
        ((self.beta_min * self.beta_min + 2.0 * self.beta_slope * log).sqrt() - self.beta_min)
            / self.beta_slope
    }

    /// The derivative of sigma at time `t`.
    fn sigma_slope(&self, t: f64) -> f64 {
        let rate = self.beta_slope * t + self.beta_min;
        let alpha = (-(0.5 * self.beta_slope * t + self.beta_min) * t).exp();
        0.5 * rate / (alpha * (1.0 - alpha)).sqrt()
    }

    /// Integrals over step `i` of Lagrange polynomials in time, by the rectangle sum that is the published method.
    fn integrals(&self, sigmas: &[f32], i: usize, order: usize) -> Vec<f64> {
        const POINTS: usize = 10_000;
        let nodes: Vec<f64> = (0..order)
            .map(|k| self.of_sigma(f64::from(sigmas[i - k])))
            .collect();
        let (start, end) = (nodes[0], self.of_sigma(f64::from(sigmas[i + 1])));
        let mut sums = vec![0.0; order];
        for point in 0..POINTS {
            let t = start + (end - start) * point as f64 / (POINTS - 1) as f64;
            let slope = self.sigma_slope(t) * (end - start) / POINTS as f64;
            for (j, sum) in sums.iter_mut().enumerate() {
                *sum += slope * lagrange(&nodes, j, t);
            }
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_integrals_of_equal_steps_are_adams_bashforth() {
        let sigmas = [9.0, 7.0, 5.0, 3.0, 1.0];
        for order in 1..=4 {
            for (exact, constant) in lagrange_integrals(&sigmas, 3, order)
                .iter()
                .zip(adams_bashforth(order))
            {
                assert!(
                    (exact + 2.0 * constant).abs() < 1e-12,
                    "order {order}: {exact} {constant}"
                );
            }
        }
    }

    #[test]
    fn deis_weights_add_up_to_the_step() {
        let (time, sigmas) = (VpTime::new(), [14.6, 9.0, 5.0, 2.0, 0.5]);
        for i in 1..4 {
            let sum: f64 = time.integrals(&sigmas, i, i.min(2) + 1).iter().sum();
            let step = f64::from(sigmas[i + 1] - sigmas[i]);
            assert!((sum / step - 1.0).abs() < 1e-4, "step {i}: {sum} {step}");
        }
        assert!(
            (time.of_sigma(80.0) - 1.0).abs() < 1e-12 && (time.of_sigma(0.002) - 1e-3).abs() < 1e-9
        );
    }
}
