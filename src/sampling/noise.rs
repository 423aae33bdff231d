//! Where a solver's noise comes from.
//!
//! Invariant: [`NoiseStreams`] draws what A1111 would have drawn: `ImageRng` for independent noise, one Brownian tree per
//! picture, seeded by the picture's own seed, over the whole schedule even if a run starts in its middle. Where a setting asks for
//! noise that depends on the batch, one tree serves all its pictures.

use super::plan::Plan;
use crate::rng::{BrownianTree, ImageRng, Latents, Mt19937};

/// Noise for the steps of a run.
pub trait StepNoise {
    /// Independent standard normal noise.
    fn independent(&mut self) -> Latents;

    /// Standard normal noise of a step from `sigma` down to `sigma_next`, consistent between overlapping steps.
    fn brownian(&mut self, sigma: f32, sigma_next: f32) -> Latents;
}

/// The noise of one batch: initial noise first, then whatever the solver asks for.
#[derive(Debug, Clone)]
pub struct NoiseStreams {
    images: ImageRng,
    trees: Vec<BrownianTree>,
}

impl NoiseStreams {
    /// Noise for a run of `plan`; `images` may already have given the initial noise.
    #[must_use]
    pub fn new(images: ImageRng, plan: &Plan) -> Self {
        let config = images.config();
        let (sigma_min, sigma_max) = plan.brownian_range();
        let len = config.shape.iter().product();
        let tree =
            |seed: u64, len| BrownianTree::new(config.source, seed, len, sigma_min, sigma_max);
        let trees = match config.seeds.last() {
            Some(last) if plan.options.no_dpmpp_sde_batch_determinism => {
                vec![tree(batch_seed(*last), len * config.seeds.len())]
            }
            _ => config.seeds.iter().map(|seed| tree(*seed, len)).collect(),
        };
        Self { images, trees }
    }
}

/// The seed of a tree that is given none: torch's `randint(0, 2**63 - 1)` after its generator was seeded for the last picture.
fn batch_seed(last: u64) -> u64 {
    let mut generator = Mt19937::new(last as u32);
    let (high, low) = (generator.next_word(), generator.next_word());
    (u64::from(high) << 32 | u64::from(low)) % (i64::MAX as u64)
}

impl StepNoise for NoiseStreams {
    fn independent(&mut self) -> Latents {
        self.images.next_noise()
    }

    fn brownian(&mut self, sigma: f32, sigma_next: f32) -> Latents {
        let [channels, height, width] = self.images.config().shape;
        let shape = [self.images.config().seeds.len(), channels, height, width];
        let data = self
            .trees
            .iter_mut()
            .flat_map(|tree| tree.noise(sigma, sigma_next))
            .collect();
        Latents::new(data, shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_seed_is_what_torch_draws() {
        // The reference Mersenne twister seeded with 8: two words, high first, modulo 2^63 - 1.
        assert_eq!(batch_seed(8), 6_888_556_634_303_915_349);
        assert_eq!(batch_seed(8 + (1 << 32)), batch_seed(8));
    }
}
