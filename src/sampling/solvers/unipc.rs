//! `UniPC` (Zhao et al. 2023, arXiv 2302.04867): a multistep predictor whose every step is corrected without a further call.
//!
//! Works in continuous time, `t` in (0, 1], on clean predictions `m = (x - sigma eps) / alpha`; `lambda = ln alpha - ln sigma`.

use super::Run;
use crate::rng::{Latents, lincomb};
use crate::sampling::{Denoiser, SigmaTable, UniPcSkip, UniPcVariant};

/// Continuous time of one training step, and where sampling ends.
const TICK: f64 = 1.0 / 1000.0;

/// `UniPC` of the order and variant in the options, `steps` network calls from time `start` on.
pub(super) fn unipc<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    steps: usize,
    start: f64,
    table: &SigmaTable,
) -> Result<Latents, D::Error> {
    if steps == 0 {
        return Ok(x);
    }
    let schedule = Schedule::new(table);
    let points = schedule.points(run.options.uni_pc_skip_type, start, steps);
    let order = run.options.uni_pc_order.clamp(1, steps);
    // Clean predictions and where they were made, most recent first.
    let mut history: Vec<(Point, Latents)> = Vec::new();
    for (k, &point) in points.iter().enumerate() {
        let mut step = None;
        if k > 0 {
            let step_order = match k {
                k if k < order => k,
                k if run.options.uni_pc_lower_order_final => order.min(steps + 1 - k),
                _ => order,
            };
            let prepared = Step::new(
                &x,
                &history[..step_order],
                point,
                run.options.uni_pc_variant,
            );
            x = prepared.predict();
            step = Some(prepared);
        }
        if k == steps {
            break;
        }
        run.begin(k, &x);
        let eps = run
            .denoiser
            .noise(&x, ((point.t - TICK) * 1000.0) as f32)?
            .guided;
        let clean = lincomb(&[
            ((1.0 / point.alpha) as f32, &x),
            ((-point.sigma / point.alpha) as f32, &eps),
        ]);
        if let Some(step) = step {
            x = step.correct(&clean);
        }
        history.insert(0, (point, clean));
        history.truncate(order);
    }
    Ok(x)
}

/// A time with what the schedule says about it.
#[derive(Debug, Clone, Copy)]
struct Point {
    t: f64,
    alpha: f64,
    sigma: f64,
    lambda: f64,
}

/// `ln alpha` over continuous time, linear between training steps.
struct Schedule {
    log_alphas: Vec<f64>,
}

impl Schedule {
    fn new(table: &SigmaTable) -> Self {
        Self {
            log_alphas: table
                .alphas_cumprod()
                .iter()
                .map(|&alpha| 0.5 * f64::from(alpha).ln())
                .collect(),
        }
    }

    /// `steps + 1` points from `start` down to the last training step.
    fn points(&self, skip: UniPcSkip, start: f64, steps: usize) -> Vec<Point> {
        let spread = |from: f64, to: f64| {
            (0..=steps).map(move |i| from + (to - from) * i as f64 / steps as f64)
        };
        let times: Vec<f64> = match skip {
            UniPcSkip::TimeUniform => spread(start, TICK).collect(),
            UniPcSkip::TimeQuadratic => spread(start.sqrt(), TICK.sqrt())
                .map(|root| root * root)
                .collect(),
            UniPcSkip::LogSnr => {
                let (from, to) = (self.at(start).lambda, self.at(TICK).lambda);
                spread(from, to).map(|lambda| self.time(lambda)).collect()
            }
        };
        times.into_iter().map(|t| self.at(t)).collect()
    }

    fn at(&self, t: f64) -> Point {
        let position = t * 1000.0 - 1.0;
        let low = (position.max(0.0) as usize).min(self.log_alphas.len() - 2);
        let (a, b) = (self.log_alphas[low], self.log_alphas[low + 1]);
        let log_alpha = a + (position - low as f64) * (b - a);
        let alpha = log_alpha.exp();
        let sigma = (1.0 - alpha * alpha).sqrt();
        Point {
            t,
            alpha,
            sigma,
            lambda: log_alpha - sigma.ln(),
        }
    }

    /// The time of a half log signal-to-noise ratio.
    fn time(&self, lambda: f64) -> f64 {
        let log_alpha = -0.5 * (-2.0 * lambda).exp().ln_1p();
        let above = self.log_alphas.partition_point(|&level| level >= log_alpha);
        let low = above.saturating_sub(1).min(self.log_alphas.len() - 2);
        let (a, b) = (self.log_alphas[low], self.log_alphas[low + 1]);
        (low as f64 + 1.0 + (log_alpha - a) / (b - a)) * TICK
    }
}

/// A step to `target`: the part that predictor and corrector share.
struct Step {
    /// The exact solution for a constant clean prediction.
    base: Latents,
    /// The latest clean prediction, and the differences of older ones to it over their distance.
    latest: Latents,
    differences: Vec<Latents>,
    predictor: Vec<f64>,
    corrector: Vec<f64>,
    /// `-alpha B(h)`.
    scale: f64,
}

impl Step {
    /// `history` holds as many predictions as the order, most recent first.
    fn new(
        x: &Latents,
        history: &[(Point, Latents)],
        target: Point,
        variant: UniPcVariant,
    ) -> Self {
        let order = history.len();
        let (from, latest) = &history[0];
        let h = target.lambda - from.lambda;
        let mut ratios: Vec<f64> = history[1..]
            .iter()
            .map(|(point, _)| (point.lambda - from.lambda) / h)
            .collect();
        let older = history[1..].iter().zip(&ratios);
        let differences = older
            .map(|((_, m), r)| &(m - latest) * (1.0 / r) as f32)
            .collect();
        ratios.push(1.0);
        let phi = (-h).exp_m1();
        let b_h = match variant {
            UniPcVariant::Bh1 => -h,
            UniPcVariant::Bh2 => phi,
        };
        let (rows, right) = system(&ratios, -h, b_h);
        let predictor = match order {
            1 => Vec::new(),
            2 => vec![0.5],
            _ => {
                let smaller = rows[..order - 1]
                    .iter()
                    .map(|row| row[..order - 1].to_vec())
                    .collect();
                solve(smaller, right[..order - 1].to_vec())
            }
        };
        let corrector = if order == 1 {
            vec![0.5]
        } else {
            solve(rows, right)
        };
        let keep = target.sigma / from.sigma;
        let base = lincomb(&[(keep as f32, x), ((-target.alpha * phi) as f32, latest)]);
        Self {
            base,
            latest: latest.clone(),
            differences,
            predictor,
            corrector,
            scale: -target.alpha * b_h,
        }
    }

    fn predict(&self) -> Latents {
        self.with(&self.predictor)
    }

    /// The same step once the clean prediction at its end is known.
    fn correct(self, clean: &Latents) -> Latents {
        let mut x = self.with(&self.corrector);
        let last = self.corrector[self.differences.len()];
        x.add_scaled((self.scale * last) as f32, &(clean - &self.latest));
        x
    }

    fn with(&self, weights: &[f64]) -> Latents {
        let mut x = self.base.clone();
        for (weight, difference) in weights.iter().zip(&self.differences) {
            x.add_scaled((self.scale * weight) as f32, difference);
        }
        x
    }
}

/// The order conditions: powers of the ratios, and the integrals they have to match (equation 8 of the paper).
fn system(ratios: &[f64], hh: f64, b_h: f64) -> (Vec<Vec<f64>>, Vec<f64>) {
    let (mut integral, mut factorial) = (hh.exp_m1() / hh - 1.0, 1.0);
    let (mut rows, mut right) = (Vec::new(), Vec::new());
    for i in 1..=ratios.len() {
        rows.push(ratios.iter().map(|r| r.powi(i as i32 - 1)).collect());
        right.push(integral * factorial / b_h);
        factorial *= (i + 1) as f64;
        integral = integral / hh - 1.0 / factorial;
    }
    (rows, right)
}

/// Solves a small dense system by elimination with row exchange.
fn solve(mut rows: Vec<Vec<f64>>, mut right: Vec<f64>) -> Vec<f64> {
    let n = right.len();
    for column in 0..n {
        let size = |&row: &usize| rows[row][column].abs();
        let pivot = (column..n)
            .max_by(|a, b| size(a).total_cmp(&size(b)))
            .unwrap_or(column);
        rows.swap(column, pivot);
        right.swap(column, pivot);
        let (upper, lower) = rows.split_at_mut(column + 1);
        for (offset, row) in lower.iter_mut().enumerate() {
            let factor = row[column] / upper[column][column];
            row.iter_mut()
                .zip(&upper[column])
                .for_each(|(value, above)| *value -= factor * above);
            right[column + 1 + offset] -= factor * right[column];
        }
    }
    for row in (0..n).rev() {
        let known: f64 = (row + 1..n)
            .map(|column| rows[row][column] * right[column])
            .sum();
        right[row] = (right[row] - known) / rows[row][row];
    }
    right
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elimination_exchanges_rows() {
        let solution = solve(vec![vec![0.0, 2.0], vec![4.0, 1.0]], vec![6.0, 11.0]);
        assert!((solution[0] - 2.0).abs() < 1e-12 && (solution[1] - 3.0).abs() < 1e-12);
    }

    #[test]
    fn log_snr_points_are_equally_spaced_and_share_their_ends() {
        let schedule = Schedule::new(&SigmaTable::default());
        let points = schedule.points(UniPcSkip::LogSnr, 1.0, 7);
        assert!((points[0].t - 1.0).abs() < 1e-9 && (points[7].t - TICK).abs() < 1e-9);
        let h = points[1].lambda - points[0].lambda;
        for pair in points.windows(2) {
            assert!(
                (pair[1].lambda - pair[0].lambda - h).abs() < 1e-3,
                "{} {h}",
                pair[1].lambda - pair[0].lambda
            );
        }
    }
}
