//! The SDXL UNet (Podell et al. 2023), built from whatever blocks the checkpoint's keys show.

use std::sync::atomic::Ordering;

use candle_core::{Result, Tensor};

use super::build::{Bias, Build};
use super::unet_blocks::{Embeddings, ResBlock, SpatialTransformer};
use super::unet_conditioning::Conditioning;
use crate::nn::cuda::{Recording, Replay};
use crate::nn::{
    Activation, Conv2d, GroupNorm, Linear, Placement, Rewrite, Sampling, Then, sinusoidal_embedding,
};
use crate::weights::detect::prefix;
use crate::weights::{Error, Source};

/// The noise predictor.
#[derive(Debug)]
pub struct Unet {
    time_embed: [Linear; 2],
    label_emb: [Linear; 2],
    /// Of all residual blocks, in the order of their building.
    emb_layers: Linear,
    conv_in: Conv2d,
    input_blocks: Vec<Block>,
    middle: Vec<Stage>,
    output_blocks: Vec<Block>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
    /// Channels of the first level, which is also the size of the timestep embedding.
    model_channels: usize,
    in_channels: usize,
    context: usize,
    vector: usize,
    place: Placement,
    replay: Replay,
}

/// Whether a tensor of a checkpoint is the weight of a linear layer over tokens: attention, feed-forward, and the projections around them.
#[must_use]
pub fn is_over_tokens(key: &str) -> bool {
    let layer = key
        .strip_prefix(prefix::UNET)
        .and_then(|key| key.strip_suffix(".weight"));
    layer.is_some_and(|layer| {
        let is_norm = layer.contains(".norm");
        layer.ends_with(".proj_in")
            || layer.ends_with(".proj_out")
            || layer.contains(".transformer_blocks.") && !is_norm
    })
}

/// The stages behind one entry of `input_blocks` or `output_blocks`.
#[derive(Debug)]
struct Block {
    stages: Vec<Stage>,
}

#[derive(Debug)]
enum Stage {
    Res(Box<ResBlock>),
    Transformer(SpatialTransformer),
    Resample(Conv2d),
}

/// What the building of every block needs.
struct Shared {
    context: usize,
    embeddings: Embeddings,
}

impl Unet {
    /// From `model.diffusion_model.*`.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit.
    pub fn new(source: &dyn Source, place: &Placement) -> std::result::Result<Self, Error> {
        let b = Build::new(source, prefix::UNET, place);
        let model_channels = b.width("input_blocks.0.0.weight")?;
        let in_channels = second(&b, "input_blocks.0.0.weight")?;
        let embedding = b.width("time_embed.0.weight")?;
        let out_channels = b.width("out.2.weight")?;
        let vector = second(&b, "label_emb.0.0.weight")?;
        let context = context_width(&b)?;
        let mut shared = Shared {
            context,
            embeddings: Embeddings::default(),
        };

        let mut skips = vec![model_channels];
        let input_blocks = input_blocks(&b, &mut skips, &mut shared)?;
        let mut channels = skips.last().copied().unwrap_or(model_channels);
        let middle = b.sub("middle_block");
        let middle = stages(&middle, &mut channels, &mut shared, Sampling::HALVE)?;
        let output_blocks = output_blocks(&b, &mut channels, skips, &mut shared)?;
        let whole_keys = Build::new(source, "", place);
        Ok(Self {
            time_embed: perceptron(&b.sub("time_embed"), model_channels, embedding)?,
            label_emb: perceptron(&b.sub("label_emb.0"), vector, embedding)?,
            emb_layers: shared.embeddings.build(&whole_keys, embedding)?,
            conv_in: b.conv(
                "input_blocks.0.0",
                [model_channels, in_channels],
                Sampling::SAME,
            )?,
            input_blocks,
            middle,
            output_blocks,
            norm_out: b.group_norm("out.0", channels, 1e-5)?.silu(),
            conv_out: b.conv("out.2", [out_channels, channels], Sampling::SAME)?,
            model_channels,
            in_channels,
            context,
            vector,
            place: place.clone(),
            replay: Replay::default(),
        })
    }

    /// Channels of the input: 4, or 9 for inpainting checkpoints.
    #[must_use]
    pub fn in_channels(&self) -> usize {
        self.in_channels
    }

    /// Width of the context.
    #[must_use]
    pub fn context_width(&self) -> usize {
        self.context
    }

    /// Width of the vector of pooled text and sizes.
    #[must_use]
    pub fn vector_width(&self) -> usize {
        self.vector
    }

    /// The layers whose weights can be written again.
    pub fn layers_mut(&mut self) -> Vec<&mut dyn Rewrite> {
        let mut layers: Vec<&mut dyn Rewrite> = vec![
            &mut self.emb_layers,
            &mut self.conv_in,
            &mut self.norm_out,
            &mut self.conv_out,
        ];
        let embeddings = self.time_embed.iter_mut().chain(&mut self.label_emb);
        layers.extend(embeddings.map(|layer| layer as &mut dyn Rewrite));
        let blocks = self.input_blocks.iter_mut().chain(&mut self.output_blocks);
        let stages = blocks.flat_map(|block| &mut block.stages);
        for stage in stages.chain(&mut self.middle) {
            match stage {
                Stage::Res(block) => block.layers_mut(&mut layers),
                Stage::Transformer(transformer) => transformer.layers_mut(&mut layers),
                Stage::Resample(conv) => layers.push(conv),
            }
        }
        layers
    }

    /// Does the work that depends on the prompt alone: `context` `[batch, tokens, context width]`, `vector`
    /// `[batch, vector width]`.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn condition(&self, context: &Tensor, vector: &Tensor) -> Result<Conditioning> {
        let (context, vector) = (
            context.to_dtype(self.place.dtype)?,
            vector.to_dtype(self.place.dtype)?,
        );
        let mut projected = Vec::new();
        let blocks = self
            .input_blocks
            .iter()
            .map(|b| &b.stages)
            .chain([&self.middle]);
        for stage in blocks
            .chain(self.output_blocks.iter().map(|b| &b.stages))
            .flatten()
        {
            if let Stage::Transformer(transformer) = stage {
                transformer.project_context(&context, &mut projected)?;
            }
        }
        let label = self.label_emb[1].forward(&self.label_emb[0].forward(&vector)?)?;
        Ok(Conditioning {
            context: projected,
            label,
        })
    }

    /// Predicts noise (or v): `x` `[batch, h, w, in_channels]`, one fractional timestep for each batch entry.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(
        &self,
        x: &Tensor,
        timesteps: &[f32],
        conditioning: &Conditioning,
    ) -> Result<Tensor> {
        let (x, t) = (x.to_dtype(self.place.dtype)?, self.sinusoids(timesteps)?);
        let inputs = [&x, &t, &conditioning.label];
        let inputs: Vec<&Tensor> = inputs.into_iter().chain(&conditioning.context).collect();
        let circular = self.place.circular.load(Ordering::Relaxed);
        self.replay.run(&inputs, u64::from(circular), |inputs| {
            let [x, t, label, context @ ..] = inputs else {
                candle_core::bail!("the UNet has three inputs and the context's")
            };
            self.denoise(x, t, label, context, &mut |_, _| {})
        })
    }

    /// The recording that [`Self::forward`] replays, timed over `runs`; `None` where nothing is recorded.
    ///
    /// # Errors
    /// The driver's.
    pub fn measure_recording(&self, runs: usize) -> Result<Option<Recording>> {
        self.replay.measure(runs)
    }

    /// Gives back what [`Self::forward`] keeps for the next step.
    pub fn release_cached(&self) {
        self.replay.forget();
    }

    /// [`Self::forward`], showing the activation behind each stage (named as its key, `label_emb` and `emb` for the embeddings
    /// before `SiLU`) to `observe`.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward_observed(
        &self,
        x: &Tensor,
        timesteps: &[f32],
        conditioning: &Conditioning,
        observe: &mut dyn FnMut(&str, &Tensor),
    ) -> Result<Tensor> {
        let (x, t) = (x.to_dtype(self.place.dtype)?, self.sinusoids(timesteps)?);
        let Conditioning { label, context } = conditioning;
        self.denoise(&x, &t, label, context, observe)
    }

    /// From tensors alone, of the UNet's type and on its device: `t` holds the sinusoids of the timesteps.
    fn denoise(
        &self,
        x: &Tensor,
        t: &Tensor,
        label: &Tensor,
        context: &[Tensor],
        observe: &mut dyn FnMut(&str, &Tensor),
    ) -> Result<Tensor> {
        observe("label_emb", label);
        let emb = self.embed(t, label)?;
        observe("emb", &emb);
        // Every residual block's embedding layer begins with this SiLU.
        let emb = self.emb_layers.forward(&emb.silu()?)?;
        let mut context = context.iter();
        let mut h = self.conv_in.forward(x)?;
        observe("input_blocks.0.0", &h);
        let mut skips = vec![h.clone()];
        for (i, block) in self.input_blocks.iter().enumerate() {
            h = run(&block.stages, &[&h], &emb, &mut context, &mut |stage, h| {
                observe(&format!("input_blocks.{}.{stage}", i + 1), h);
            })?;
            skips.push(h.clone());
        }
        h = run(&self.middle, &[&h], &emb, &mut context, &mut |stage, h| {
            observe(&format!("middle_block.{stage}"), h);
        })?;
        for (i, block) in self.output_blocks.iter().enumerate() {
            let skip = skips
                .pop()
                .ok_or_else(|| candle_core::Error::msg("more output than input blocks"))?;
            let parts = [&fit(h, &skip)?, &skip];
            h = run(
                &block.stages,
                &parts,
                &emb,
                &mut context,
                &mut |stage, h| observe(&format!("output_blocks.{i}.{stage}"), h),
            )?;
        }
        self.conv_out.forward(&self.norm_out.forward(&h)?)
    }

    /// `[batch, model channels]`. Computed in f32 whatever the weights are: a fractional timestep does not survive f16.
    fn sinusoids(&self, timesteps: &[f32]) -> Result<Tensor> {
        let t = sinusoidal_embedding(timesteps, self.model_channels);
        let shape = (timesteps.len(), self.model_channels);
        Tensor::from_vec(t, shape, &self.place.device)?.to_dtype(self.place.dtype)
    }

    /// `time_embed(t) + label`, `[batch, embedding]`.
    fn embed(&self, t: &Tensor, label: &Tensor) -> Result<Tensor> {
        self.time_embed[1].forward_add(&self.time_embed[0].forward(t)?, label)
    }
}

/// Brings `h` to the size of `skip` by nearest neighbour: halving and doubling an odd size adds a pixel. A1111 does the same, so
/// that sizes need only be multiples of 8.
fn fit(h: Tensor, skip: &Tensor) -> Result<Tensor> {
    let mut h = h;
    for axis in [1, 2] {
        let (from, to) = (h.dim(axis)?, skip.dim(axis)?);
        if from != to {
            let index: Vec<u32> = (0..to).map(|i| (i * from / to) as u32).collect();
            h = h.index_select(&Tensor::from_vec(index, to, h.device())?, axis)?;
        }
    }
    Ok(h)
}

/// Through the stages of a block; the first takes `parts`, whose channels stand side by side.
fn run<'a>(
    stages: &[Stage],
    parts: &[&Tensor],
    emb: &Tensor,
    context: &mut impl Iterator<Item = &'a Tensor>,
    observe: &mut dyn FnMut(usize, &Tensor),
) -> Result<Tensor> {
    let mut last = None;
    for (i, stage) in stages.iter().enumerate() {
        let first = last.as_ref().map(|x| [x]);
        let parts = first.as_ref().map_or(parts, |x| x);
        let x = match (stage, parts) {
            (Stage::Res(block), _) => block.forward(parts, emb),
            (Stage::Resample(conv), _) => conv.forward_parts(parts, None),
            (Stage::Transformer(transformer), [x]) => transformer.forward(x, context),
            (Stage::Transformer(_), _) => {
                candle_core::bail!("a transformer of {} inputs", parts.len())
            }
        }?;
        observe(i, &x);
        last = Some(x);
    }
    last.ok_or_else(|| candle_core::Error::msg("a block without stages"))
}

/// `input_blocks.1` and on, after the first convolution; `skips` gets the channels behind each.
fn input_blocks(
    b: &Build<'_>,
    skips: &mut Vec<usize>,
    shared: &mut Shared,
) -> std::result::Result<Vec<Block>, Error> {
    let mut blocks = Vec::new();
    let mut channels = skips.last().copied().unwrap_or(0);
    for i in 1.. {
        let at = b.sub(format!("input_blocks.{i}"));
        let stages = stages(&at, &mut channels, shared, Sampling::HALVE)?;
        if stages.is_empty() {
            break;
        }
        skips.push(channels);
        blocks.push(Block { stages });
    }
    Ok(blocks)
}

/// As many output blocks as there are skips, each of which adds its channels to what comes in.
fn output_blocks(
    b: &Build<'_>,
    channels: &mut usize,
    skips: Vec<usize>,
    shared: &mut Shared,
) -> std::result::Result<Vec<Block>, Error> {
    let mut blocks = Vec::new();
    for (i, skip) in skips.into_iter().rev().enumerate() {
        let at = b.sub(format!("output_blocks.{i}"));
        *channels += skip;
        let stages = stages(&at, channels, shared, Sampling::DOUBLE)?;
        if !matches!(stages.first(), Some(Stage::Res(_))) {
            return Err(at
                .tensors
                .shape("0.in_layers.2.weight")
                .expect_err("no residual block was found"));
        }
        blocks.push(Block { stages });
    }
    Ok(blocks)
}

/// The layers `0` and `2` of an embedding, `SiLU` between them.
fn perceptron(
    b: &Build<'_>,
    inputs: usize,
    outputs: usize,
) -> std::result::Result<[Linear; 2], Error> {
    let layer = |name, inputs, activation| {
        let then = Then::Activate(activation);
        b.linear(name, [outputs, inputs], Bias::With, then)
    };
    Ok([
        layer("0", inputs, Activation::Silu)?,
        layer("2", outputs, Activation::None)?,
    ])
}

/// The stages `0`, `1`, … below `b`, whatever each is; `channels` goes from input to output.
fn stages(
    b: &Build<'_>,
    channels: &mut usize,
    shared: &mut Shared,
    resample: Sampling,
) -> std::result::Result<Vec<Stage>, Error> {
    let mut stages = Vec::new();
    for i in 0.. {
        let at = b.sub(i);
        stages.push(if at.has("in_layers.2.weight") {
            let block = ResBlock::new(&at, *channels, &mut shared.embeddings)?;
            *channels = block.channels;
            Stage::Res(Box::new(block))
        } else if at.has("proj_in.weight") {
            let at = at.over_tokens();
            Stage::Transformer(SpatialTransformer::new(&at, *channels, shared.context)?)
        } else if let Some(name) = ["op", "conv"]
            .into_iter()
            .find(|name| at.has(&format!("{name}.weight")))
        {
            Stage::Resample(at.conv(name, [*channels, *channels], resample)?)
        } else {
            break;
        });
    }
    Ok(stages)
}

fn second(b: &Build<'_>, name: &str) -> std::result::Result<usize, Error> {
    match b.tensors.shape(name)?.get(1) {
        Some(&n) if n > 0 => Ok(n),
        _ => Err(b.tensors.unfit(name, "it has no second dimension")),
    }
}

/// Width of the text context, from the first cross-attention there is.
fn context_width(b: &Build<'_>) -> std::result::Result<usize, Error> {
    let keys = ["middle_block.1".to_string()]
        .into_iter()
        .chain((1..64).map(|i| format!("input_blocks.{i}.1")));
    let mut keys = keys.map(|at| format!("{at}.transformer_blocks.0.attn2.to_k.weight"));
    let first = "middle_block.1.transformer_blocks.0.attn2.to_k.weight";
    second(
        b,
        &keys.find(|key| b.has(key)).unwrap_or_else(|| first.into()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::synthetic::SyntheticSdxl;

    /// SDXL's UNet has 2 567 463 684 values; its transformers are of widths 640 (10 blocks) and 1280 (60).
    #[test]
    fn six_of_seven_values_of_sdxl_are_over_tokens() {
        let sdxl = SyntheticSdxl::new();
        let keys = sdxl.keys().into_iter().filter(|key| is_over_tokens(key));
        let values = keys.map(|key| {
            sdxl.shape(key)
                .unwrap_or_default()
                .iter()
                .product::<usize>()
        });
        let block = |c: usize| 18 * c * c + 2 * 2048 * c;
        let around = |c: usize| 2 * c * c;
        let expected = 10 * block(640) + 5 * around(640) + 60 * block(1280) + 6 * around(1280);
        assert_eq!(values.sum::<usize>(), expected);
        assert_eq!(expected, 2_207_744_000);
        assert!(!is_over_tokens(
            "first_stage_model.decoder.mid.attn_1.proj_out.weight"
        ));
    }
}
