//! Brownian-tree noise: a Brownian motion over sigma whose increments depend on the seed and the two ends only.
//!
//! The motion is refined by halving an interval whose middle gets the value a Brownian bridge would have; every node has its
//! own seed, so any increment is a weighted sum of node noises whatever was asked before. The weights are plain numbers here
//! (`f64`), and only the nodes on the way to a point are drawn. Ends are rounded to 6 decimals before anything else.
//! Source: torchsde's `BrownianInterval` (Li et al. 2020) as `BrownianTreeNoiseSampler` of k-diffusion drives it.

use rayon::prelude::*;

use super::{Generator, NoiseSource, SeedSequence};

/// Values at points that were asked for, most recent last; a step asks for one end again.
const REMEMBERED: usize = 3;

/// A Brownian motion on `[low, high]` for one picture.
#[derive(Debug, Clone)]
pub struct BrownianTree {
    source: NoiseSource,
    seed: u64,
    /// Elements of one noise tensor.
    len: usize,
    low: f64,
    high: f64,
    /// `high - low` before rounding: the variance of the whole increment.
    span: f64,
    recent: Vec<(f64, Vec<f64>)>,
}

impl BrownianTree {
    /// A motion of `len` independent elements between the smallest positive and the largest sigma of a schedule.
    #[must_use]
    pub fn new(source: NoiseSource, seed: u64, len: usize, sigma_min: f32, sigma_max: f32) -> Self {
        let (low, high) = (f64::from(sigma_min), f64::from(sigma_max));
        let span = (high - low).max(0.0);
        Self {
            source,
            seed,
            len,
            low: round6(low),
            high: round6(high),
            span,
            recent: Vec::new(),
        }
    }

    /// Standard normal noise for a step from `sigma` down to `sigma_next`: the negated increment over its standard deviation.
    pub fn noise(&mut self, sigma: f32, sigma_next: f32) -> Vec<f32> {
        let width = f64::from((sigma - sigma_next).abs().sqrt());
        let increment = self.increment(f64::from(sigma_next), f64::from(sigma));
        increment.into_iter().map(|w| (-w / width) as f32).collect()
    }

    /// `W(to) - W(from)`.
    pub fn increment(&mut self, from: f64, to: f64) -> Vec<f64> {
        let start = self.at(from);
        let end = self.at(to);
        end.into_iter().zip(start).map(|(b, a)| b - a).collect()
    }

    /// `W(t) - W(low)`, remembered for the next call.
    fn at(&mut self, t: f64) -> Vec<f64> {
        let t = round6(t).clamp(self.low, self.high);
        if let Some((_, value)) = self
            .recent
            .iter()
            .find(|(known, _)| known.to_bits() == t.to_bits())
        {
            return value.clone();
        }
        let value = self.evaluate(&self.path(t));
        if self.recent.len() == REMEMBERED {
            self.recent.remove(0);
        }
        self.recent.push((t, value.clone()));
        value
    }

    /// The weight of every node noise in `W(t) - W(low)`, root first.
    fn path(&self, t: f64) -> Vec<Node> {
        let root_seed = SeedSequence::new(self.seed, &[]).generate_state(1)[0];
        // `value` = W(t) - W(low) of the interval's left end; `width` = its increment; both as weights of the nodes so far.
        let mut nodes = vec![Node {
            seed: root_seed,
            left: 0.0,
            whole: self.span.sqrt(),
        }];
        let (mut a, mut b, mut key, mut depth) = (self.low, self.high, 0u64, 0u64);
        let is = |x: f64, y: f64| x.to_bits() == y.to_bits();
        while !is(t, a) && !is(t, b) {
            let mid = round6(0.5 * (a + b));
            let share = (mid - a) / (b - a);
            let deviation = ((mid - a) * (b - mid) / (b - a)).sqrt();
            let seed = SeedSequence::new(self.seed, &[key, depth]).generate_state(1)[0];
            nodes.push(Node {
                seed,
                left: 0.0,
                whole: 0.0,
            });
            let last = nodes.len() - 1;
            for (i, node) in nodes.iter_mut().enumerate() {
                let half = node.whole * share + if i == last { deviation } else { 0.0 };
                if t <= mid {
                    node.whole = half;
                } else {
                    node.left += half;
                    node.whole -= half;
                }
            }
            (a, b) = if t <= mid { (a, mid) } else { (mid, b) };
            key = 2 * key + u64::from(t > mid);
            depth += 1;
        }
        if is(t, b) && !is(a, b) {
            for node in &mut nodes {
                node.left += node.whole;
            }
        }
        nodes
    }

    /// Draws the nodes (in parallel) and adds them up (in order, so that the result is always the same).
    fn evaluate(&self, nodes: &[Node]) -> Vec<f64> {
        let draw =
            |node: &Node| Generator::new(self.source, u64::from(node.seed)).normals(self.len);
        let noises: Vec<Vec<f32>> = nodes
            .par_iter()
            .filter(|node| node.left != 0.0)
            .map(draw)
            .collect();
        let mut sum = vec![0.0; self.len];
        for (node, noise) in nodes.iter().filter(|node| node.left != 0.0).zip(&noises) {
            for (total, &value) in sum.iter_mut().zip(noise) {
                *total += node.left * f64::from(value);
            }
        }
        sum
    }
}

/// One node's noise and its weights while descending.
#[derive(Debug)]
struct Node {
    seed: u32,
    /// Weight in the motion up to the left end of the current interval.
    left: f64,
    /// Weight in the increment over the current interval.
    whole: f64,
}

/// Rounds the decimal value of the double to 6 places, half to even, as Python's `round(x, 6)` does.
fn round6(x: f64) -> f64 {
    format!("{x:.6}")
        .parse()
        .expect("a formatted number parses")
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "rounding has one right answer")]
mod tests {
    use super::*;

    #[test]
    fn increments_add_up() {
        let mut tree = BrownianTree::new(NoiseSource::Nv, 42, 8, 0.0291675, 14.614642);
        let whole = tree.increment(0.1, 9.0);
        let (low, high) = (tree.increment(0.1, 1.3), tree.increment(1.3, 9.0));
        for ((a, b), c) in low.iter().zip(&high).zip(&whole) {
            assert!((a + b - c).abs() < 1e-12, "{a} + {b} != {c}");
        }
    }

    #[test]
    fn noise_does_not_depend_on_what_was_asked_before() {
        let tree = || BrownianTree::new(NoiseSource::Cpu, 7, 20, 0.03, 14.6);
        let mut asked = tree();
        for sigma in [12.0, 5.0, 1.0, 0.5] {
            asked.noise(sigma, sigma / 2.0);
        }
        assert_eq!(asked.noise(3.3, 2.2), tree().noise(3.3, 2.2));
    }

    #[test]
    fn rounding_follows_the_decimal_value() {
        // Python's round(x, 6); these look like ties and are stored to one side of them.
        assert_eq!(round6(0.0000005), 0.0);
        assert_eq!(round6(0.0000015), 2e-6);
        assert_eq!(round6(1.2345675), 1.234568);
        assert_eq!(round6(2.0000005), 2.000001);
        assert_eq!(round6(14.614641666412354), 14.614642);
    }
}
