//! Where a solver's noise comes from.
//!
//! Invariant: [`NoiseStreams`] draws what A1111 would have drawn: `ImageRng` for independent noise, one Brownian tree per
//! picture, seeded by the picture's own seed, over the whole schedule even if a run starts in its middle.

use super::plan::Plan;
use crate::rng::{BrownianTree, ImageRng, Latents};

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
        let tree = |&seed: &u64| BrownianTree::new(config.source, seed, len, sigma_min, sigma_max);
        let trees = config.seeds.iter().map(tree).collect();
        Self { images, trees }
    }
}

impl StepNoise for NoiseStreams {
    fn independent(&mut self) -> Latents {
        self.images.next_noise()
    }

    fn brownian(&mut self, sigma: f32, sigma_next: f32) -> Latents {
        let [channels, height, width] = self.images.config().shape;
        let shape = [self.trees.len(), channels, height, width];
        let data = self
            .trees
            .iter_mut()
            .flat_map(|tree| tree.noise(sigma, sigma_next))
            .collect();
        Latents::new(data, shape)
    }
}
