//! TAESD, the tiny autoencoder (Ollin Boer Bohan): previews, and a fast stand-in for the VAE.
//!
//! Works on latents as the sampler has them (scaled); pictures are `[batch, height, width, 3]` in [0, 1]. Layers are numbered
//! as in the published sequential modules; the ones without weights follow from their neighbours: a convolution without
//! bias halves the picture in the encoder and doubles it in the decoder.

use candle_core::{Result, Tensor};

use super::build::Build;
use crate::nn::{Activation, Conv2d, Placement, Sampling};
use crate::weights::{Error, Source};

/// Encoder or decoder.
#[derive(Debug)]
pub struct Taesd {
    layers: Vec<Layer>,
    side: Side,
    place: Placement,
}

/// Which half of the autoencoder a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Pictures to latents.
    Encoder,
    /// Latents to pictures.
    Decoder,
}

#[derive(Debug)]
enum Layer {
    Conv(Conv2d),
    Block(Box<[Conv2d; 3]>),
}

impl Taesd {
    /// From keys `N.weight` and `N.conv.M.weight`, with or without `decoder.layers.` / `encoder.layers.` before them.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit.
    pub fn new(
        source: &dyn Source,
        side: Side,
        place: &Placement,
    ) -> std::result::Result<Self, Error> {
        let packed = if side == Side::Encoder {
            "encoder.layers."
        } else {
            "decoder.layers."
        };
        let prefix = if source.keys().iter().any(|k| k.starts_with(packed)) {
            packed
        } else {
            ""
        };
        let b = Build::new(source, prefix, place);
        Ok(Self {
            layers: layers(&b, side)?,
            side,
            place: place.clone(),
        })
    }

    /// Latents to a picture, or a picture to latents.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.to_dtype(self.place.dtype)?;
        let x = match self.side {
            Side::Decoder => ((&x / 3.0)?.tanh()? * 3.0)?,
            Side::Encoder => x,
        };
        self.layers.iter().try_fold(x, |x, layer| match layer {
            Layer::Conv(conv) => conv.forward(&x),
            Layer::Block(block) => {
                let [a, b, c] = &**block;
                c.forward_add(&b.forward(&a.forward(&x)?)?, &x)?.relu()
            }
        })
    }
}

/// The layers of one half, whatever numbers they have.
fn layers(b: &Build<'_>, side: Side) -> std::result::Result<Vec<Layer>, Error> {
    let (first, mut channels, resample) = match side {
        Side::Encoder => (0, 3, Sampling::HALVE),
        Side::Decoder => (1, 4, Sampling::DOUBLE),
    };
    let mut layers = Vec::new();
    // The longest run of layers without weights is two (an upsampling after an activation).
    let mut gap = 0;
    for i in first.. {
        let at = b.sub(i);
        if at.has("conv.0.weight") {
            let conv = |name| at.conv(name, [channels, channels], Sampling::SAME);
            let relu = Activation::Relu;
            layers.push(Layer::Block(Box::new([
                conv("conv.0")?.then(relu),
                conv("conv.2")?.then(relu),
                conv("conv.4")?,
            ])));
        } else if at.has("weight") {
            let outputs = at.width("weight")?;
            let sampling = if at.has("bias") {
                Sampling::SAME
            } else {
                resample
            };
            let conv = b.conv(&i.to_string(), [outputs, channels], sampling)?;
            let opens_decoder = side == Side::Decoder && i == first;
            layers.push(Layer::Conv(if opens_decoder {
                conv.then(Activation::Relu)
            } else {
                conv
            }));
            channels = outputs;
        } else if gap == 2 {
            break;
        } else {
            gap += 1;
            continue;
        }
        gap = 0;
    }
    if layers.is_empty() {
        return Err(b
            .tensors
            .shape(&format!("{first}.weight"))
            .expect_err("no layer was found"));
    }
    Ok(layers)
}
