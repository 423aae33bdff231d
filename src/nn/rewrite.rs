//! Writing the weights of a built layer again, tensor by tensor of the checkpoint it was made from.
//!
//! Invariant: writing a tensor's own values leaves the layer exactly as it was built, bit by bit; so what LoRAs change can be
//! undone by reading the checkpoint again. A layer knows the tensors behind its rows ([`Origin`]); fused layers have several.

use candle_core::Result;

use super::layers::{Conv2d, GroupNorm, LayerNorm, Linear};
#[cfg(test)]
use super::weight::values;
use super::weight::{RowOrder, overwrite};

/// The checkpoint tensor behind some rows of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Key of the weight.
    pub key: String,
    /// First row.
    pub first_row: usize,
    /// Number of rows.
    pub rows: usize,
}

/// A layer that can be written again.
pub trait Rewrite: Send {
    /// The tensors the layer was made from, in the order of its rows; empty for a layer that was not made from any.
    fn origins(&self) -> &[Origin];

    /// Replaces the weight rows from `first_row` (row major, as the checkpoint stores them).
    ///
    /// # Errors
    /// When the values do not fill whole rows of the layer, or the device refuses them.
    fn write_weight(&mut self, first_row: usize, values: &[f32]) -> Result<()>;

    /// Replaces the bias of the rows from `first_row`. A layer without bias gets one of zeros around it.
    ///
    /// # Errors
    /// As for [`Self::write_weight`].
    fn write_bias(&mut self, first_row: usize, values: &[f32]) -> Result<()>;

    /// Takes away a bias that the layer was built without; for layers whose checkpoint tensors have none.
    fn remove_bias(&mut self);

    /// Weight and bias as they are stored.
    #[cfg(test)]
    fn stored(&self) -> Vec<f32>;
}

impl Linear {
    /// Notes the checkpoint tensors behind the rows.
    #[must_use]
    pub fn made_from(mut self, origins: Vec<Origin>) -> Self {
        self.origins = origins;
        self
    }
}

impl Conv2d {
    /// Notes the checkpoint tensor behind the layer.
    #[must_use]
    pub fn made_from(mut self, origins: Vec<Origin>) -> Self {
        self.origins = origins;
        self
    }
}

impl GroupNorm {
    /// Notes the checkpoint tensor behind the layer.
    #[must_use]
    pub fn made_from(mut self, origins: Vec<Origin>) -> Self {
        self.origins = origins;
        self
    }
}

impl LayerNorm {
    /// Notes the checkpoint tensor behind the layer.
    #[must_use]
    pub fn made_from(mut self, origins: Vec<Origin>) -> Self {
        self.origins = origins;
        self
    }
}

impl Rewrite for Linear {
    fn origins(&self) -> &[Origin] {
        &self.origins
    }

    fn write_weight(&mut self, first_row: usize, values: &[f32]) -> Result<()> {
        self.weight.write(first_row, values)
    }

    fn write_bias(&mut self, first_row: usize, values: &[f32]) -> Result<()> {
        self.weight.write_bias(first_row, values)
    }

    fn remove_bias(&mut self) {
        self.weight.remove_bias();
    }

    #[cfg(test)]
    fn stored(&self) -> Vec<f32> {
        self.weight.stored()
    }
}

impl Rewrite for Conv2d {
    fn origins(&self) -> &[Origin] {
        &self.origins
    }

    fn write_weight(&mut self, first_row: usize, values: &[f32]) -> Result<()> {
        self.weight.write(first_row, values)
    }

    fn write_bias(&mut self, first_row: usize, values: &[f32]) -> Result<()> {
        self.weight.write_bias(first_row, values)
    }

    fn remove_bias(&mut self) {
        self.weight.remove_bias();
    }

    #[cfg(test)]
    fn stored(&self) -> Vec<f32> {
        self.weight.stored()
    }
}

/// The norms hold one tensor each for weight and bias.
macro_rules! rewrite_norm {
    ($norm:ty) => {
        impl Rewrite for $norm {
            fn origins(&self) -> &[Origin] {
                &self.origins
            }

            fn write_weight(&mut self, first_row: usize, values: &[f32]) -> Result<()> {
                overwrite(&self.weight, RowOrder::Plain, first_row, values)
            }

            fn write_bias(&mut self, first_row: usize, values: &[f32]) -> Result<()> {
                overwrite(&self.bias, RowOrder::Plain, first_row, values)
            }

            /// Norms always have a bias.
            fn remove_bias(&mut self) {}

            #[cfg(test)]
            fn stored(&self) -> Vec<f32> {
                [values(&self.weight), values(&self.bias)].concat()
            }
        }
    };
}

rewrite_norm!(GroupNorm);
rewrite_norm!(LayerNorm);

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::nn::{Activation, Placement, Sampling, Then};

    fn ramp(len: usize, start: f32) -> Vec<f32> {
        (0..len).map(|i| start + i as f32 / 8.0).collect()
    }

    /// On the packed CPU path in both types, and on candle tensors.
    fn places() -> [Placement; 3] {
        [DType::F32, DType::BF16, DType::F16].map(|dtype| Placement {
            dtype,
            ..Placement::cpu()
        })
    }

    /// Rows of 9 values written over rows 25..45 of 70, and back.
    fn rewritten(build: &dyn Fn(&[f32]) -> Linear) {
        let (rows, inputs) = (70, 9);
        let before = ramp(rows * inputs, 0.0);
        let mut after = before.clone();
        let part = ramp(20 * inputs, -50.0);
        after[25 * inputs..45 * inputs].copy_from_slice(&part);
        let mut layer = build(&before);
        layer.write_weight(25, &part).unwrap();
        assert_eq!(layer.stored(), build(&after).stored());
        layer
            .write_weight(25, &before[25 * inputs..45 * inputs])
            .unwrap();
        assert_eq!(layer.stored(), build(&before).stored());
        assert!(layer.write_weight(60, &part).is_err(), "past the end");
        assert!(layer.write_weight(0, &part[1..]).is_err(), "not whole rows");
    }

    #[test]
    fn rewritten_rows_equal_a_layer_built_that_way() {
        let bias = ramp(70, 3.0);
        for place in places() {
            for then in [Then::Activate(Activation::None), Then::Geglu] {
                rewritten(&|w| Linear::new(&place, w, 70, Some(&bias), then).unwrap());
                rewritten(&|w| Linear::e4m3(&place, &[w.into()], 70, Some(&bias), then).unwrap());
            }
        }
    }

    #[test]
    fn a_bias_comes_and_goes_beside_e4m3() {
        for place in places() {
            let then = Then::Activate(Activation::None);
            let mut layer =
                Linear::e4m3(&place, &[ramp(5 * 9, 0.0).as_slice().into()], 5, None, then).unwrap();
            let built = layer.stored();
            layer.write_bias(1, &[2.0; 3]).unwrap();
            assert_ne!(layer.stored(), built);
            layer.remove_bias();
            assert_eq!(layer.stored(), built);
        }
    }

    #[test]
    fn convolutions_and_norms_are_rewritten_in_their_own_layout() {
        for place in places() {
            let build =
                |w: &[f32]| Conv2d::new(&place, w, [5, 3, 3], None, Sampling::SAME).unwrap();
            let (before, after) = (ramp(5 * 27, 0.0), ramp(5 * 27, 9.0));
            let mut conv = build(&before);
            conv.write_weight(0, &after).unwrap();
            assert_eq!(conv.stored(), build(&after).stored());
            let built = conv.stored().len();
            conv.write_bias(0, &[1.0; 5]).unwrap();
            assert_eq!(conv.stored().len(), built + 5);
            conv.remove_bias();
            assert_eq!(conv.stored(), build(&after).stored());

            let mut norm = LayerNorm::new(&place, &ramp(4, 0.0), &ramp(4, 1.0)).unwrap();
            norm.write_weight(0, &ramp(4, 2.0)).unwrap();
            norm.write_bias(0, &ramp(4, 5.0)).unwrap();
            let want = LayerNorm::new(&place, &ramp(4, 2.0), &ramp(4, 5.0)).unwrap();
            assert_eq!(norm.stored(), want.stored());
        }
    }
}
