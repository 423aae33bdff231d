//! Seeds of a job's pictures, the generators of a batch, and a batch's latents one by one.
//!
//! Invariant: picture `i` depends on seed `i` alone, whatever batch it is made in. Follows `process_images_inner` of A1111 1.10.

use super::{GenerateRequest, LATENT_PIXEL};
use crate::rng::{ImageRng, ImageRngConfig, Latents};

/// Channels of a latent pixel.
pub(super) const LATENT_CHANNELS: usize = 4;

/// Generators for one batch of pictures of `width` x `height` pixels.
pub(super) fn image_rng(
    request: &GenerateRequest,
    (seeds, subseeds): (&[u64], &[u64]),
    (width, height): (usize, usize),
) -> ImageRng {
    ImageRng::new(ImageRngConfig {
        source: request.noise_source,
        shape: [LATENT_CHANNELS, height / LATENT_PIXEL, width / LATENT_PIXEL],
        seeds: seeds.to_vec(),
        subseeds: subseeds.to_vec(),
        subseed_strength: request.subseed_strength,
        seed_resize_from: request.seed_resize_from,
        eta_noise_seed_delta: request.sampler_options.eta_noise_seed_delta,
    })
}

/// Each picture's latents by itself; none if there are none.
pub(super) fn singles(batch: Option<Latents>) -> impl Iterator<Item = Latents> {
    batch.into_iter().flat_map(|batch| {
        let [_, channels, height, width] = batch.shape;
        let single = |image: Vec<f32>| Latents::new(image, [1, channels, height, width]);
        batch.images().map(single).collect::<Vec<_>>()
    })
}

/// Width and height in pixels of the picture that latents stand for.
pub(super) fn latent_size(latents: &Latents) -> (usize, usize) {
    (
        latents.shape[3] * LATENT_PIXEL,
        latents.shape[2] * LATENT_PIXEL,
    )
}

/// Consecutive seeds, or one for all while a variation seed makes the difference.
pub(super) fn seeds(request: &GenerateRequest, total: usize) -> Vec<u64> {
    let step = u64::from(request.subseed_strength == 0.0);
    (0..total as u64)
        .map(|i| request.seed.wrapping_add(i * step))
        .collect()
}

/// Consecutive variation seeds.
pub(super) fn subseeds(request: &GenerateRequest, total: usize) -> Vec<u64> {
    (0..total as u64)
        .map(|i| request.subseed.wrapping_add(i))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variation_seed_takes_the_counting_over() {
        let request = GenerateRequest {
            seed: u64::MAX,
            subseed: 5,
            ..GenerateRequest::default()
        };
        assert_eq!(seeds(&request, 3), [u64::MAX, 0, 1]);
        assert_eq!(subseeds(&request, 2), [5, 6]);
        let varied = GenerateRequest {
            subseed_strength: 0.5,
            ..request
        };
        assert_eq!(seeds(&varied, 2), [u64::MAX, u64::MAX]);
    }

    #[test]
    fn batches_come_apart_in_order() {
        let batch = Latents::new(vec![1.0, 2.0, 3.0, 4.0], [2, 1, 1, 2]);
        let parts: Vec<Latents> = singles(Some(batch)).collect();
        assert_eq!(parts[1], Latents::new(vec![3.0, 4.0], [1, 1, 1, 2]));
        assert_eq!(latent_size(&parts[0]), (16, 8));
        assert_eq!(singles(None).count(), 0);
    }
}
