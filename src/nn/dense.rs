//! What upscalers need of a convolution besides: several inputs side by side without joining them, and `PReLU`.
//!
//! A dense block feeds each layer all layers before it. The CPU kernel walks its taps input by input, so nothing is copied;
//! other devices join the inputs first.

use candle_core::{Result, Tensor};

use super::cuda::Second;
use super::layers::{Conv2d, Placement};
use super::weight::Weight;
use super::{kernels, reference};

impl Conv2d {
    /// Multiplies negative outputs by a factor per channel, after the activation (`PReLU`; He et al. 2015).
    ///
    /// # Errors
    /// When the device refuses the tensor.
    pub fn then_prelu(mut self, place: &Placement, slopes: Vec<f32>) -> Result<Self> {
        let tensor = place.tensor(&slopes, &[slopes.len()])?;
        self.slopes = Some((slopes, tensor));
        Ok(self)
    }

    /// [`Self::forward`] of several `[batch, height, width, c]`, their channels side by side, plus `residual`.
    ///
    /// # Errors
    /// On shapes that do not fit, and without a part.
    pub fn forward_parts(&self, parts: &[&Tensor], residual: Option<&Tensor>) -> Result<Tensor> {
        let Some(first) = parts.first() else {
            candle_core::bail!("conv2d: no input")
        };
        match &self.weight {
            Weight::Packed { weight, bias } => {
                let (batch, height, width, _) = first.dims4()?;
                let mut channels = 0;
                for part in parts {
                    let (b, h, w, c) = part.dims4()?;
                    if (b, h, w) != (batch, height, width) {
                        candle_core::bail!("conv2d: {:?} beside {:?}", part.shape(), first.shape());
                    }
                    channels += c;
                }
                let shape = (batch, height, width, channels);
                self.op(shape, weight, bias.as_deref(), kernels::Second::Residual)?
                    .run_parts(parts, residual)
            }
            Weight::Tensors { .. } | Weight::Scaled(_) => {
                self.run_tensors(parts, residual.map_or(Second::None, Second::Residual))
            }
        }
    }

    /// The composed activations.
    pub(super) fn activated(&self, y: &Tensor) -> Result<Tensor> {
        let y = reference::activate(y, self.activation)?;
        match &self.slopes {
            Some((_, slopes)) => reference::prelu(&y, slopes),
            None => Ok(y),
        }
    }
}
