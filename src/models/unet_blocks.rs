//! The blocks of the SDXL UNet: residual block, spatial transformer (Rombach et al. 2022, figure 3; Podell et al. 2023).

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::build::{Bias, Build};
use crate::nn::{
    Activation, Conv2d, GroupNorm, LayerNorm, Linear, Mask, Rewrite, Sampling, Then,
    concat_channels, cross_attention, self_attention,
};
use crate::weights::Error;

const PLAIN: Then = Then::Activate(Activation::None);

/// The embedding layers of all residual blocks, gathered while the blocks are built: they have one input, so they are one product.
#[derive(Default)]
pub(super) struct Embeddings {
    /// Key and outputs of each.
    layers: Vec<(String, usize)>,
}

impl Embeddings {
    /// Notes a layer; tells its columns.
    fn add(&mut self, key: String, outputs: usize) -> Range<usize> {
        let from: usize = self.layers.iter().map(|(_, outputs)| outputs).sum();
        self.layers.push((key, outputs));
        from..from + outputs
    }

    /// All of them; `b` sees whole keys.
    pub(super) fn build(
        self,
        b: &Build<'_>,
        embedding: usize,
    ) -> std::result::Result<Linear, Error> {
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|(key, n)| (key.as_str(), *n))
            .collect();
        b.stacked(&layers, embedding, Bias::With, PLAIN)
    }
}

/// Two convolutions with the time embedding added between them.
#[derive(Debug)]
pub(super) struct ResBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    /// This block's columns of what [`Embeddings`] makes.
    embedded: Range<usize>,
    norm2: GroupNorm,
    conv2: Conv2d,
    skip: Option<Linear>,
    pub(super) channels: usize,
}

impl ResBlock {
    pub(super) fn new(
        b: &Build<'_>,
        inputs: usize,
        embeddings: &mut Embeddings,
    ) -> std::result::Result<Self, Error> {
        let channels = b.width("in_layers.2.weight")?;
        let skip = if b.has("skip_connection.weight") {
            Some(b.linear("skip_connection", [channels, inputs], Bias::With, PLAIN)?)
        } else if inputs == channels {
            None
        } else {
            return Err(b
                .tensors
                .shape("skip_connection.weight")
                .expect_err("absence was just checked"));
        };
        Ok(Self {
            norm1: b.group_norm("in_layers.0", inputs, 1e-5)?.silu(),
            conv1: b.conv("in_layers.2", [channels, inputs], Sampling::SAME)?,
            embedded: embeddings.add(b.tensors.key("emb_layers.1"), channels),
            norm2: b.group_norm("out_layers.0", channels, 1e-5)?.silu(),
            conv2: b.conv("out_layers.3", [channels, channels], Sampling::SAME)?,
            skip,
            channels,
        })
    }

    pub(super) fn layers_mut<'a>(&'a mut self, into: &mut Vec<&'a mut dyn Rewrite>) {
        into.extend([
            &mut self.norm1 as &mut dyn Rewrite,
            &mut self.conv1,
            &mut self.norm2,
            &mut self.conv2,
        ]);
        into.extend(self.skip.iter_mut().map(|skip| skip as &mut dyn Rewrite));
    }

    /// `parts` `[batch, h, w, c]` with their channels side by side, `emb` `[batch, columns of all blocks]`.
    pub(super) fn forward(&self, parts: &[&Tensor], emb: &Tensor) -> Result<Tensor> {
        let emb = emb.narrow(1, self.embedded.start, self.embedded.len())?;
        let h = self.norm1.forward_parts(parts)?;
        let h = self.conv1.forward_shifted(&h, &emb)?;
        let h = self.norm2.forward(&h)?;
        match (&self.skip, parts) {
            (Some(skip), _) => self.conv2.forward_add(&h, &skip.forward_parts(parts)?),
            (None, [x]) => self.conv2.forward_add(&h, x),
            // A joined input that happens to be as wide as the output.
            (None, [a, b]) => self.conv2.forward_add(&h, &concat_channels(a, b)?),
            (None, _) => candle_core::bail!("a residual block of {} inputs", parts.len()),
        }
    }
}

/// A stack of transformer blocks over the pixels, residual as a whole.
#[derive(Debug)]
pub(super) struct SpatialTransformer {
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<TransformerBlock>,
    proj_out: Linear,
    heads: usize,
}

impl SpatialTransformer {
    pub(super) fn new(
        b: &Build<'_>,
        channels: usize,
        context: usize,
    ) -> std::result::Result<Self, Error> {
        let blocks = (0..).take_while(|i| b.has(&format!("transformer_blocks.{i}.norm1.weight")));
        let blocks = blocks.map(|i| {
            TransformerBlock::new(&b.sub(format!("transformer_blocks.{i}")), channels, context)
        });
        Ok(Self {
            norm: b.group_norm("norm", channels, 1e-6)?,
            proj_in: b.linear("proj_in", [channels, channels], Bias::With, PLAIN)?,
            blocks: blocks.collect::<std::result::Result<_, _>>()?,
            proj_out: b.linear("proj_out", [channels, channels], Bias::With, PLAIN)?,
            heads: b.heads("proj_in.weight", channels)?,
        })
    }

    pub(super) fn layers_mut<'a>(&'a mut self, into: &mut Vec<&'a mut dyn Rewrite>) {
        into.extend([
            &mut self.norm as &mut dyn Rewrite,
            &mut self.proj_in,
            &mut self.proj_out,
        ]);
        for block in &mut self.blocks {
            into.extend([
                &mut block.norm1 as &mut dyn Rewrite,
                &mut block.qkv,
                &mut block.out1,
                &mut block.norm2,
                &mut block.q,
                &mut block.context_kv,
                &mut block.out2,
                &mut block.norm3,
                &mut block.ff_in,
                &mut block.ff_out,
            ]);
        }
    }

    /// Keys and values of the context for each block: they do not change from step to step.
    pub(super) fn project_context(&self, context: &Tensor, into: &mut Vec<Tensor>) -> Result<()> {
        for block in &self.blocks {
            into.push(block.context_kv.forward(context)?);
        }
        Ok(())
    }

    /// `x` `[batch, h, w, channels]`; takes this transformer's share of `context`.
    pub(super) fn forward<'a>(
        &self,
        x: &Tensor,
        context: &mut impl Iterator<Item = &'a Tensor>,
    ) -> Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        let tokens = x.reshape((batch, height * width, channels))?;
        let mut h = self.proj_in.forward(&self.norm.forward(&tokens)?)?;
        for block in &self.blocks {
            let kv = context
                .next()
                .ok_or_else(|| candle_core::Error::msg("context of another UNet"))?;
            h = block.forward(&h, kv, self.heads)?;
        }
        self.proj_out
            .forward_add(&h, &tokens)?
            .reshape((batch, height, width, channels))
    }
}

/// Self-attention, attention to the text, gated feed-forward; each pre-normed and residual.
#[derive(Debug)]
struct TransformerBlock {
    norm1: LayerNorm,
    qkv: Linear,
    out1: Linear,
    norm2: LayerNorm,
    q: Linear,
    context_kv: Linear,
    out2: Linear,
    norm3: LayerNorm,
    ff_in: Linear,
    ff_out: Linear,
}

impl TransformerBlock {
    fn new(b: &Build<'_>, channels: usize, context: usize) -> std::result::Result<Self, Error> {
        let square = [channels, channels];
        let gated = b.width("ff.net.0.proj.weight")?;
        if !gated.is_multiple_of(2) {
            return Err(b.tensors.unfit(
                "ff.net.0.proj.weight",
                "a gated layer has an even number of rows",
            ));
        }
        Ok(Self {
            norm1: b.layer_norm("norm1", channels)?,
            qkv: b.fused(
                &["attn1.to_q", "attn1.to_k", "attn1.to_v"],
                square,
                Bias::Without,
                PLAIN,
            )?,
            out1: b.linear("attn1.to_out.0", square, Bias::With, PLAIN)?,
            norm2: b.layer_norm("norm2", channels)?,
            q: b.linear("attn2.to_q", square, Bias::Without, PLAIN)?,
            context_kv: b.fused(
                &["attn2.to_k", "attn2.to_v"],
                [channels, context],
                Bias::Without,
                PLAIN,
            )?,
            out2: b.linear("attn2.to_out.0", square, Bias::With, PLAIN)?,
            norm3: b.layer_norm("norm3", channels)?,
            ff_in: b.linear("ff.net.0.proj", [gated, channels], Bias::With, Then::Geglu)?,
            ff_out: b.linear("ff.net.2", [channels, gated / 2], Bias::With, PLAIN)?,
        })
    }

    /// `x` `[batch, tokens, channels]`, `context_kv` `[batch, context tokens, 2 * channels]`.
    fn forward(&self, x: &Tensor, context_kv: &Tensor, heads: usize) -> Result<Tensor> {
        let h = self_attention(&self.qkv.forward_normed(x, &self.norm1)?, heads, Mask::Full)?;
        let x = self.out1.forward_add(&h, x)?;
        let h = cross_attention(&self.q.forward_normed(&x, &self.norm2)?, context_kv, heads)?;
        let x = self.out2.forward_add(&h, &x)?;
        self.ff_out
            .forward_add(&self.ff_in.forward_normed(&x, &self.norm3)?, &x)
    }
}
