//! Several inputs side by side without joining them, as dense blocks and skip connections have them; and `PReLU`.
//!
//! The bodies walk input by input, so nothing is copied: the CPU's any number, the GPU's two. What is composed of candle's
//! operations joins the inputs first.

use candle_core::{D, Result, Tensor};

use super::cpu::math::Activation;
use super::cuda::{self, Epilogue, Second};
use super::layers::{Conv2d, GroupNorm, Linear, Placement, Then};
use super::weight::Weight;
use super::window::Sampling;
use super::{kernels, reference};

/// The parts in one tensor.
pub(super) fn joined(parts: &[&Tensor]) -> Result<Tensor> {
    match parts {
        [x] => Ok((*x).clone()),
        parts => Tensor::cat(parts, D::Minus1)?.contiguous(),
    }
}

impl Linear {
    /// [`Self::forward`] of pictures `[batch, height, width, c]` with their channels side by side: a 1x1 convolution. Not for gated
    /// layers.
    ///
    /// # Errors
    /// On shapes that do not fit, and without a part.
    pub fn forward_parts(&self, parts: &[&Tensor]) -> Result<Tensor> {
        let Then::Activate(activation) = self.then else {
            candle_core::bail!("linear: a gated layer of several parts")
        };
        match (parts, &self.weight) {
            ([x], _) => self.forward(x),
            // A row has one scale, whatever parts it comes in.
            (_, Weight::Scaled(_)) => self.forward(&joined(parts)?),
            (_, Weight::Packed { weight, bias }) => {
                let shape = shape_of(parts)?;
                if shape[3] != weight.inputs() {
                    candle_core::bail!("linear: {shape:?}, weight takes {}", weight.inputs());
                }
                let op = kernels::Conv2d {
                    weight,
                    bias: bias.as_deref(),
                    window: Sampling::POINT.window(shape, 1, false),
                    activation,
                    slopes: None,
                    second: kernels::Second::Residual,
                };
                op.run_parts(parts, None)
            }
            (_, Weight::Tensors { weight, bias, .. }) => {
                let epilogue = Epilogue {
                    bias: bias.as_ref(),
                    then: self.then,
                    slopes: None,
                    second: Second::None,
                };
                match cuda::linear(parts, weight, &epilogue) {
                    Some(y) => y,
                    None => self.composed(&joined(parts)?, weight, bias.as_ref(), None),
                }
            }
        }
    }
}

impl GroupNorm {
    /// [`Self::forward`] of tensors of one shape but for their channels, which stand side by side. A group may reach from one
    /// into the next.
    ///
    /// # Errors
    /// On shapes that do not fit, and without a part.
    pub fn forward_parts(&self, parts: &[&Tensor]) -> Result<Tensor> {
        let Some(first) = parts.first() else {
            candle_core::bail!("group norm: no input")
        };
        if kernels::fuses_on(first) {
            let op = kernels::GroupNorm {
                groups: self.groups,
                eps: self.eps,
                silu: self.silu,
            };
            return op.run(parts, &self.weight, &self.bias);
        }
        if let Some(y) = cuda::group_norm(parts, self) {
            return y;
        }
        let (x, eps) = (joined(parts)?, f64::from(self.eps));
        let y = reference::group_norm(&x, &self.weight, &self.bias, self.groups, eps)?;
        let activation = if self.silu {
            Activation::Silu
        } else {
            Activation::None
        };
        reference::activate(&y, activation)
    }
}

/// The shape of pictures with their channels side by side.
fn shape_of(parts: &[&Tensor]) -> Result<[usize; 4]> {
    let Some(first) = parts.first() else {
        candle_core::bail!("no input")
    };
    let (batch, height, width, _) = first.dims4()?;
    let mut channels = 0;
    for part in parts {
        let (b, h, w, c) = part.dims4()?;
        if (b, h, w) != (batch, height, width) {
            candle_core::bail!("{:?} beside {:?}", part.shape(), first.shape());
        }
        channels += c;
    }
    Ok([batch, height, width, channels])
}

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
        let shape = shape_of(parts)?;
        match &self.weight {
            Weight::Packed { weight, bias } => self
                .op(shape, weight, bias.as_deref(), kernels::Second::Residual)?
                .run_parts(parts, residual),
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

#[cfg(test)]
mod tests {
    use std::error::Error;

    use candle_core::{DType, Device};

    use super::*;

    type Outcome = std::result::Result<(), Box<dyn Error>>;

    /// `[batch, height, width, channels]` of values around a mean of 2.
    fn picture(place: &Placement, channels: usize, seed: usize) -> Result<Tensor> {
        let value = |i: usize| 2.0 + ((i * 7919 + seed * 104_729) % 1009) as f32 / 500.0;
        let shape = (2, 5, 3, channels);
        Tensor::from_vec((0..30 * channels).map(value).collect(), shape, &Device::Cpu)?
            .to_dtype(place.dtype)
    }

    fn ramp(len: usize) -> Vec<f32> {
        (0..len)
            .map(|i| (i * 31 % 17) as f32 / 16.0 - 0.5)
            .collect()
    }

    /// On the packed path in both types, and on candle's tensors.
    fn places() -> [Placement; 3] {
        [DType::F32, DType::BF16, DType::F16].map(|dtype| Placement {
            dtype,
            ..Placement::cpu()
        })
    }

    fn difference(a: &Tensor, b: &Tensor) -> Result<f32> {
        let wide = |x: &Tensor| x.to_dtype(DType::F32)?.flatten_all();
        (wide(a)? - wide(b)?)?.abs()?.max(0)?.to_scalar()
    }

    #[test]
    fn parts_give_what_their_join_gives() -> Outcome {
        for place in places() {
            // Groups of 6: the border at 128 lies within one, as 1280 of 1920 channels in 32 groups do.
            let (a, b) = (picture(&place, 128, 1)?, picture(&place, 64, 2)?);
            let whole = Tensor::cat(&[&a, &b], 3)?;
            let norm = GroupNorm::new(&place, &ramp(192), &ramp(192), 1e-5)?.silu();
            let parts = norm.forward_parts(&[&a, &b])?;
            assert_eq!(parts.dims(), whole.dims());
            // The sums of a channel are the same numbers in the same order.
            assert!(
                difference(&parts, &norm.forward(&whole)?)? <= 0.0,
                "bit by bit"
            );

            let none = Then::Activate(Activation::None);
            let layer = Linear::new(&place, &ramp(192 * 40), 40, Some(&ramp(40)), none)?;
            let parts = layer.forward_parts(&[&a, &b])?;
            assert_eq!(parts.dims(), [2, 5, 3, 40]);
            // f32 sums of 192 products in another order, of values below 100; rounded at most once otherwise.
            let most = if place.dtype == DType::F32 { 1e-4 } else { 0.5 };
            let found = difference(&parts, &layer.forward(&whole)?)?;
            assert!(found <= most, "{:?}: {found}", place.dtype);
            assert!(layer.forward_parts(&[&a]).is_err(), "half the inputs");
            assert!(norm.forward_parts(&[]).is_err(), "no input");
        }
        Ok(())
    }

    #[test]
    fn a_shift_may_be_columns_of_a_wider_tensor() -> Outcome {
        for place in places() {
            let x = picture(&place, 8, 3)?;
            let conv = Conv2d::new(&place, &ramp(6 * 72), [6, 8, 3], None, Sampling::SAME)?;
            let wide = Tensor::from_vec(ramp(2 * 20), (2, 20), &Device::Cpu)?;
            let columns = wide.to_dtype(place.dtype)?.narrow(1, 9, 6)?;
            let got = conv.forward_shifted(&x, &columns)?;
            let want = conv.forward_shifted(&x, &columns.contiguous()?)?;
            assert!(difference(&got, &want)? <= 0.0, "{:?}", place.dtype);
            assert!(difference(&got, &conv.forward(&x)?)? > 0.01, "it is added");
        }
        Ok(())
    }
}
