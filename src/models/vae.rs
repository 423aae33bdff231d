//! AutoencoderKL (Rombach et al. 2022): pictures to latents and back.
//!
//! Pictures are `[batch, height, width, 3]` in [-1, 1], latents `[batch, height / 8, width / 8, 4]` before the scale factor.

pub mod strips;

use candle_core::{D, Result, Tensor};

use super::build::{Bias, Build};
use crate::nn::{
    Activation, Conv2d, GroupNorm, Linear, Mask, Placement, Sampling, Then, self_attention,
};
use crate::weights::{Error, Source};

/// SDXL's latents are the VAE's times this.
pub const SCALE: f32 = 0.13025;

const EPS: f32 = 1e-6;
/// No VAE has as many levels.
const MAX_LEVELS: usize = 64;
const PLAIN: Then = Then::Activate(Activation::None);

/// Encoder and decoder.
#[derive(Debug)]
pub struct Vae {
    encoder: Encoder,
    quant: Linear,
    post_quant: Linear,
    decoder: Decoder,
    place: Placement,
}

#[derive(Debug)]
struct Encoder {
    conv_in: Conv2d,
    levels: Vec<Level>,
    mid: Middle,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

#[derive(Debug)]
struct Decoder {
    conv_in: Conv2d,
    mid: Middle,
    /// From the deepest to the picture's.
    levels: Vec<Level>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

#[derive(Debug)]
struct Level {
    blocks: Vec<ResnetBlock>,
    resample: Option<Conv2d>,
}

#[derive(Debug)]
struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Linear>,
    inputs: usize,
    channels: usize,
}

#[derive(Debug)]
struct Middle {
    block_1: ResnetBlock,
    attention: AttnBlock,
    block_2: ResnetBlock,
}

/// Single-head attention over all pixels, residual.
#[derive(Debug)]
struct AttnBlock {
    norm: GroupNorm,
    qkv: Linear,
    proj_out: Linear,
}

impl Vae {
    /// From the tensors below `prefix` (`first_stage_model.`, or nothing in a VAE file of its own).
    ///
    /// # Errors
    /// When a tensor is missing or does not fit.
    pub fn new(
        source: &dyn Source,
        prefix: &str,
        place: &Placement,
    ) -> std::result::Result<Self, Error> {
        let b = Build::new(source, prefix, place);
        let moments = b.width("quant_conv.weight")?;
        let latent = b.width("post_quant_conv.weight")?;
        Ok(Self {
            encoder: Encoder::new(&b.sub("encoder"), moments)?,
            quant: b.linear("quant_conv", [moments, moments], Bias::With, PLAIN)?,
            post_quant: b.linear("post_quant_conv", [latent, latent], Bias::With, PLAIN)?,
            decoder: Decoder::new(&b.sub("decoder"), latent)?,
            place: place.clone(),
        })
    }

    /// Mean and log variance of the latents, clamped to [-30, 20].
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn encode(&self, picture: &Tensor) -> Result<(Tensor, Tensor)> {
        let moments = self
            .quant
            .forward(&self.encoder.forward(&picture.to_dtype(self.place.dtype)?)?)?;
        let halves = moments.chunk(2, D::Minus1)?;
        Ok((
            halves[0].contiguous()?,
            halves[1].contiguous()?.clamp(-30f32, 20f32)?,
        ))
    }

    /// The picture of `latents` (divided by [`SCALE`] already); not clamped.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        self.decoder.forward(
            &self
                .post_quant
                .forward(&latents.to_dtype(self.place.dtype)?)?,
        )
    }
}

impl Encoder {
    fn new(b: &Build<'_>, moments: usize) -> std::result::Result<Self, Error> {
        let mut channels = b.width("conv_in.weight")?;
        let conv_in = b.conv("conv_in", [channels, 3], Sampling::SAME)?;
        let mut levels = Vec::new();
        for i in (0..).take_while(|i| b.has(&format!("down.{i}.block.0.conv1.weight"))) {
            levels.push(Level::new(
                &b.sub(format!("down.{i}")),
                "downsample.conv",
                Sampling::HALVE_VAE,
                &mut channels,
            )?);
        }
        let mid = Middle::new(&b.sub("mid"), channels)?;
        let norm_out = b.group_norm("norm_out", channels, EPS)?.silu();
        Ok(Self {
            conv_in,
            levels,
            mid,
            norm_out,
            conv_out: b.conv("conv_out", [moments, channels], Sampling::SAME)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self
            .levels
            .iter()
            .try_fold(self.conv_in.forward(x)?, |h, level| level.forward(h))?;
        self.conv_out
            .forward(&self.norm_out.forward(&self.mid.forward(&h)?)?)
    }
}

impl Decoder {
    fn new(b: &Build<'_>, latent: usize) -> std::result::Result<Self, Error> {
        let mut channels = b.width("conv_in.weight")?;
        let conv_in = b.conv("conv_in", [channels, latent], Sampling::SAME)?;
        let mid = Middle::new(&b.sub("mid"), channels)?;
        let count = (0..MAX_LEVELS)
            .take_while(|i| b.has(&format!("up.{i}.block.0.conv1.weight")))
            .count();
        let mut levels = Vec::new();
        for i in (0..count).rev() {
            levels.push(Level::new(
                &b.sub(format!("up.{i}")),
                "upsample.conv",
                Sampling::DOUBLE,
                &mut channels,
            )?);
        }
        let norm_out = b.group_norm("norm_out", channels, EPS)?.silu();
        Ok(Self {
            conv_in,
            mid,
            levels,
            norm_out,
            conv_out: b.conv("conv_out", [3, channels], Sampling::SAME)?,
        })
    }

    fn forward(&self, z: &Tensor) -> Result<Tensor> {
        let h = self.mid.forward(&self.conv_in.forward(z)?)?;
        let h = self
            .levels
            .iter()
            .try_fold(h, |h, level| level.forward(h))?;
        self.conv_out.forward(&self.norm_out.forward(&h)?)
    }
}

impl Level {
    fn new(
        b: &Build<'_>,
        resample: &str,
        sampling: Sampling,
        channels: &mut usize,
    ) -> std::result::Result<Self, Error> {
        let mut blocks = Vec::new();
        for i in (0..).take_while(|i| b.has(&format!("block.{i}.conv1.weight"))) {
            let block = ResnetBlock::new(&b.sub(format!("block.{i}")), *channels)?;
            *channels = block.channels;
            blocks.push(block);
        }
        let resample = if b.has(&format!("{resample}.weight")) {
            Some(b.conv(resample, [*channels, *channels], sampling)?)
        } else {
            None
        };
        Ok(Self { blocks, resample })
    }

    fn forward(&self, x: Tensor) -> Result<Tensor> {
        let h = self
            .blocks
            .iter()
            .try_fold(x, |x, block| block.forward(&x))?;
        self.resample
            .as_ref()
            .map_or(Ok(h.clone()), |conv| conv.forward(&h))
    }
}

impl ResnetBlock {
    fn new(b: &Build<'_>, inputs: usize) -> std::result::Result<Self, Error> {
        let channels = b.width("conv1.weight")?;
        let shortcut = if inputs == channels {
            None
        } else {
            Some(b.linear("nin_shortcut", [channels, inputs], Bias::With, PLAIN)?)
        };
        Ok(Self {
            norm1: b.group_norm("norm1", inputs, EPS)?.silu(),
            conv1: b.conv("conv1", [channels, inputs], Sampling::SAME)?,
            norm2: b.group_norm("norm2", channels, EPS)?.silu(),
            conv2: b.conv("conv2", [channels, channels], Sampling::SAME)?,
            shortcut,
            inputs,
            channels,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self
            .norm2
            .forward(&self.conv1.forward(&self.norm1.forward(x)?)?)?;
        match &self.shortcut {
            Some(shortcut) => self.conv2.forward_add(&h, &shortcut.forward(x)?),
            None => self.conv2.forward_add(&h, x),
        }
    }
}

impl Middle {
    fn new(b: &Build<'_>, channels: usize) -> std::result::Result<Self, Error> {
        let a = b.sub("attn_1");
        let square = [channels, channels];
        Ok(Self {
            block_1: ResnetBlock::new(&b.sub("block_1"), channels)?,
            attention: AttnBlock {
                norm: a.group_norm("norm", channels, EPS)?,
                qkv: a.fused(&["q", "k", "v"], square, Bias::With, PLAIN)?,
                proj_out: a.linear("proj_out", square, Bias::With, PLAIN)?,
            },
            block_2: ResnetBlock::new(&b.sub("block_2"), channels)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.block_2
            .forward(&self.attention.forward(&self.block_1.forward(x)?)?)
    }
}

impl AttnBlock {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        let tokens = x.reshape((batch, height * width, channels))?;
        let h = self_attention(
            &self.qkv.forward(&self.norm.forward(&tokens)?)?,
            1,
            Mask::Full,
        )?;
        self.proj_out
            .forward_add(&h, &tokens)?
            .reshape((batch, height, width, channels))
    }
}
