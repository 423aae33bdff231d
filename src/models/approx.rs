//! A1111's approximation of the VAE for previews ("Approx NN"): eight convolutions from latents to a small picture.
//!
//! Latents as the sampler has them; pictures `[batch, 2 height, 2 width, 3]` in [-1, 1]. The latents are doubled (nearest) and
//! padded by 11 zeros, which the eight convolutions without padding of their own use up again. Keys `conv1` to `conv8`.

use candle_core::{Result, Tensor};

use super::build::Build;
use crate::nn::{Conv2d, Placement, Sampling};
use crate::weights::{Error, Source};

/// Kernel and output channels of each convolution.
const LAYERS: [(usize, usize); 8] = [
    (7, 8),
    (5, 16),
    (3, 32),
    (3, 64),
    (3, 32),
    (3, 16),
    (3, 8),
    (3, 3),
];
/// Slope of the activation below zero.
const LEAK: f64 = 0.1;

/// The approximation network.
#[derive(Debug)]
pub struct VaeApprox {
    layers: Vec<Conv2d>,
    place: Placement,
}

impl VaeApprox {
    /// From keys `convN.weight` and `convN.bias`.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit.
    pub fn new(source: &dyn Source, place: &Placement) -> std::result::Result<Self, Error> {
        let b = Build::new(source, "", place);
        let mut inputs = 4;
        let mut layers = Vec::with_capacity(LAYERS.len());
        for (i, (kernel, outputs)) in LAYERS.into_iter().enumerate() {
            // The first reads the padded, doubled latents.
            let pad = if i == 0 { 11 } else { 0 };
            let sampling = Sampling {
                stride: 1,
                pad,
                pad_after: pad,
                upsample: if i == 0 { 2 } else { 1 },
            };
            let name = format!("conv{}", i + 1);
            layers.push(b.convolution(&name, [outputs, inputs, kernel], sampling)?);
            inputs = outputs;
        }
        Ok(Self {
            layers,
            place: place.clone(),
        })
    }

    /// Latents `[batch, height, width, 4]` to a picture.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        let x = latents.to_dtype(self.place.dtype)?;
        self.layers.iter().try_fold(x, |x, conv| {
            let y = conv.forward(&x)?;
            y.maximum(&(&y * LEAK)?)
        })
    }
}
