//! `SRVGGNetCompact`: convolutions with `PReLU` in a row, a pixel-shuffle, and the enlarged input added (Real-ESRGAN's small
//! networks for video and general pictures).
//!
//! Keys: `body.0` is a convolution, `body.1` its slopes, and so on; the last one is a convolution of `3 scale²` channels.

use candle_core::{Result, Tensor};

use super::RGB;
use crate::models::build::Build;
use crate::nn::{Conv2d, Placement, Sampling};
use crate::weights::{Error, Source};

/// The network.
#[derive(Debug)]
pub(super) struct Compact {
    layers: Vec<Conv2d>,
    last: Conv2d,
    scale: usize,
    features: u64,
}

impl Compact {
    /// The network, and how many times larger its output is.
    pub(super) fn new(
        source: &dyn Source,
        prefix: &str,
        place: &Placement,
    ) -> std::result::Result<(Self, usize), Error> {
        let b = Build::new(source, prefix, place).sub("body");
        let mut layers = Vec::new();
        let mut inputs = RGB;
        let mut index = 0;
        while b.has(&format!("{}.weight", index + 1)) {
            let outputs = b.width(&format!("{index}.weight"))?;
            let conv = b.conv(&index.to_string(), [outputs, inputs], Sampling::SAME)?;
            let slopes = b
                .tensors
                .read(&format!("{}.weight", index + 1), &[outputs])?;
            layers.push(conv.then_prelu(place, slopes)?);
            inputs = outputs;
            index += 2;
        }
        let key = format!("{index}.weight");
        let outputs = b.width(&key)?;
        let scale = (outputs / RGB).isqrt();
        if scale == 0 || RGB * scale * scale != outputs {
            let reason = format!("{outputs} channels are not 3 times a square");
            return Err(b.tensors.unfit(&key, reason));
        }
        let last = b.conv(&index.to_string(), [outputs, inputs], Sampling::SAME)?;
        let features = inputs as u64;
        let network = Self {
            layers,
            last,
            scale,
            features,
        };
        Ok((network, scale))
    }

    /// Values alive at a time for a picture of `pixels` pixels.
    pub(super) fn work_values(&self, pixels: u64) -> u64 {
        let outside = pixels * (self.scale * self.scale * RGB) as u64;
        pixels * 2 * self.features + 3 * outside
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let mut y = x.clone();
        for layer in &self.layers {
            y = layer.forward(&y)?;
        }
        // The input enlarged by nearest neighbour is, before the shuffle, each value added to all its square.
        let squares = self.scale * self.scale;
        let y = self.last.forward(&y)?.reshape((b, h, w, c, squares))?;
        let y = y.broadcast_add(&x.unsqueeze(4)?)?;
        super::pixel_shuffle(&y.reshape((b, h, w, c * squares))?, self.scale)
    }
}
