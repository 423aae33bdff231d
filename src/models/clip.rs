//! The two text towers of SDXL: CLIP ViT-L/14 (Radford et al. 2021) and OpenCLIP ViT-bigG/14.
//!
//! Both are pre-norm transformers over 77 tokens with a causal mask. SDXL reads the hidden state before the last layer,
//! without the final norm, from both; and the projected, normed state of the first end-of-text token from bigG.

use candle_core::{Result, Tensor};

use super::build::{Bias, Build};
use crate::nn::{Activation, LayerNorm, Linear, Mask, Placement, Rewrite, Then, self_attention};
use crate::weights::detect::prefix;
use crate::weights::{Error, Source};

/// No text tower has as many layers.
const MAX_LAYERS: usize = 1024;
/// Tokens of one chunk, with begin and end markers.
pub const CHUNK: usize = 77;

/// A text tower.
#[derive(Debug)]
pub struct TextTower {
    /// `[vocabulary, width]`, on the host: a chunk gathers 77 rows of it.
    token_embedding: Vec<f32>,
    /// `[77, width]`.
    position_embedding: Vec<f32>,
    layers: Vec<Layer>,
    width: usize,
    heads: usize,
    pooling: Option<Pooling>,
    place: Placement,
}

#[derive(Debug)]
struct Pooling {
    final_norm: LayerNorm,
    projection: Linear,
}

#[derive(Debug)]
struct Layer {
    norm1: LayerNorm,
    qkv: Linear,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

/// What a tower says about some chunks.
#[derive(Debug)]
pub struct TowerOutput {
    /// Hidden state before the last layer, `[chunks, 77, width]`.
    pub hidden: Tensor,
    /// Projected state of the end-of-text token, `[chunks, projection width]`; bigG only.
    pub pooled: Option<Tensor>,
}

/// Vectors put in place of token embeddings (textual inversion).
#[derive(Debug, Clone, PartialEq)]
pub struct Replacement {
    /// Chunk and position in it (0 is the begin marker).
    pub at: (usize, usize),
    /// `width` values.
    pub vector: Vec<f32>,
}

impl TextTower {
    /// CLIP ViT-L from `conditioner.embedders.0`, Hugging Face naming.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit.
    pub fn clip_l(source: &dyn Source, place: &Placement) -> std::result::Result<Self, Error> {
        let b = Build::new(source, prefix::CLIP_L, place);
        let (token_embedding, width) = embedding(&b, "embeddings.token_embedding.weight")?;
        let position_embedding = b
            .tensors
            .read("embeddings.position_embedding.weight", &[CHUNK, width])?;
        let layers = count(|i| format!("encoder.layers.{i}.mlp.fc1.weight"), &b)?;
        let layers = layers
            .map(|i| Layer::hugging_face(&b.sub(format!("encoder.layers.{i}")), width))
            .collect::<std::result::Result<_, _>>()?;
        let heads = b.heads("embeddings.token_embedding.weight", width)?;
        Ok(Self {
            token_embedding,
            position_embedding,
            layers,
            width,
            heads,
            pooling: None,
            place: place.clone(),
        })
    }

    /// OpenCLIP ViT-bigG from `conditioner.embedders.1`, its own naming.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit.
    pub fn big_g(source: &dyn Source, place: &Placement) -> std::result::Result<Self, Error> {
        Self::open_clip(source, prefix::CLIP_G, place)
    }

    /// OpenCLIP ViT-bigG of a refiner, its only text encoder.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit.
    pub fn refiner_big_g(
        source: &dyn Source,
        place: &Placement,
    ) -> std::result::Result<Self, Error> {
        Self::open_clip(source, prefix::REFINER_CLIP_G, place)
    }

    fn open_clip(
        source: &dyn Source,
        prefix: &str,
        place: &Placement,
    ) -> std::result::Result<Self, Error> {
        let b = Build::new(source, prefix, place);
        let (token_embedding, width) = embedding(&b, "token_embedding.weight")?;
        let position_embedding = b.tensors.read("positional_embedding", &[CHUNK, width])?;
        let layers = count(|i| format!("transformer.resblocks.{i}.mlp.c_fc.weight"), &b)?;
        let layers = layers
            .map(|i| Layer::open_clip(&b.sub(format!("transformer.resblocks.{i}")), width))
            .collect::<std::result::Result<_, _>>()?;
        let heads = b.heads("token_embedding.weight", width)?;
        // Stored for `x @ P`; a linear layer holds the transpose.
        let projected = b
            .tensors
            .shape("text_projection")?
            .get(1)
            .copied()
            .unwrap_or(0);
        let stored = b.tensors.read("text_projection", &[width, projected])?;
        let transposed: Vec<f32> = (0..projected * width)
            .map(|i| stored[i % width * projected + i / width])
            .collect();
        let pooling = Pooling {
            final_norm: b.layer_norm("ln_final", width)?,
            projection: Linear::new(
                place,
                &transposed,
                projected,
                None,
                Then::Activate(Activation::None),
            )?,
        };
        Ok(Self {
            token_embedding,
            position_embedding,
            layers,
            width,
            heads,
            pooling: Some(pooling),
            place: place.clone(),
        })
    }

    /// Width of the hidden state.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// The layers whose weights can be written again.
    pub fn layers_mut(&mut self) -> Vec<&mut dyn Rewrite> {
        let pooling = self.pooling.iter_mut();
        let mut layers: Vec<&mut dyn Rewrite> = pooling
            .flat_map(|p| [&mut p.final_norm as &mut dyn Rewrite, &mut p.projection])
            .collect();
        for layer in &mut self.layers {
            layers.extend([
                &mut layer.norm1 as &mut dyn Rewrite,
                &mut layer.qkv,
                &mut layer.out,
                &mut layer.norm2,
                &mut layer.fc1,
                &mut layer.fc2,
            ]);
        }
        layers
    }

    /// Encodes chunks of 77 token ids, each on its own.
    ///
    /// # Errors
    /// When a tensor operation fails. Ids past the vocabulary are an error, not a panic.
    pub fn encode(
        &self,
        chunks: &[[u32; CHUNK]],
        replacements: &[Replacement],
    ) -> Result<TowerOutput> {
        let x = self.run(self.layers.len().saturating_sub(1), chunks, replacements)?;
        let last = self
            .layers
            .last()
            .ok_or_else(|| candle_core::Error::msg("text tower without layers"))?;
        let pooled = match &self.pooling {
            Some(pooling) => {
                let ends: Vec<u32> = chunks
                    .iter()
                    .enumerate()
                    .map(|(i, c)| (i * CHUNK + end_of_text(c)) as u32)
                    .collect();
                let ends = Tensor::from_vec(ends, chunks.len(), &self.place.device)?;
                let rows = last
                    .forward(&x, self.heads)?
                    .reshape(((), self.width))?
                    .index_select(&ends, 0)?;
                Some(
                    pooling
                        .projection
                        .forward(&pooling.final_norm.forward(&rows)?)?,
                )
            }
            None => None,
        };
        Ok(TowerOutput { hidden: x, pooled })
    }

    /// The hidden state that A1111's clip skip `skip` names, `[chunks, 77, width]`, without the final norm: 1 is the last
    /// layer's, 2 the one before. A number beyond the first layer means the embeddings.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn hidden_state(
        &self,
        skip: usize,
        chunks: &[[u32; CHUNK]],
        replacements: &[Replacement],
    ) -> Result<Tensor> {
        let layers = self.layers.len().saturating_sub(skip.saturating_sub(1));
        self.run(layers, chunks, replacements)
    }

    /// The state after the first `layers` layers.
    fn run(
        &self,
        layers: usize,
        chunks: &[[u32; CHUNK]],
        replacements: &[Replacement],
    ) -> Result<Tensor> {
        let mut x = self.embed(chunks, replacements)?;
        for layer in &self.layers[..layers] {
            x = layer.forward(&x, self.heads)?;
        }
        Ok(x)
    }

    fn embed(&self, chunks: &[[u32; CHUNK]], replacements: &[Replacement]) -> Result<Tensor> {
        let mut values = Vec::with_capacity(chunks.len() * CHUNK * self.width);
        for chunk in chunks {
            for (id, position) in chunk
                .iter()
                .zip(self.position_embedding.chunks_exact(self.width))
            {
                let Some(row) = self
                    .token_embedding
                    .chunks_exact(self.width)
                    .nth(*id as usize)
                else {
                    candle_core::bail!("token id {id} is past the text tower's vocabulary");
                };
                values.extend(row.iter().zip(position).map(|(t, p)| t + p));
            }
        }
        for Replacement {
            at: (chunk, token),
            vector,
        } in replacements
        {
            let position = &self.position_embedding[token * self.width..][..self.width];
            let row = &mut values[(chunk * CHUNK + token) * self.width..][..self.width];
            row.iter_mut()
                .zip(vector)
                .zip(position)
                .for_each(|((x, v), p)| *x = v + p);
        }
        Tensor::from_vec(
            values,
            (chunks.len(), CHUNK, self.width),
            &self.place.device,
        )?
        .to_dtype(self.place.dtype)
    }
}

/// Position of the first end-of-text token: the vocabulary's largest id, so the first maximum.
fn end_of_text(chunk: &[u32; CHUNK]) -> usize {
    let largest = chunk.iter().max().copied().unwrap_or(0);
    chunk.iter().position(|&id| id == largest).unwrap_or(0)
}

fn embedding(b: &Build<'_>, name: &str) -> std::result::Result<(Vec<f32>, usize), Error> {
    match b.tensors.shape(name)? {
        &[rows, width] if rows > 0 && width > 0 => {
            Ok((b.tensors.read(name, &[rows, width])?, width))
        }
        _ => Err(b.tensors.unfit(name, "it is not a table of vectors")),
    }
}

/// The layers there are; at least two, since the state before the last is what counts.
fn count(
    key: impl Fn(usize) -> String,
    b: &Build<'_>,
) -> std::result::Result<std::ops::Range<usize>, Error> {
    let layers = (0..MAX_LAYERS).take_while(|&i| b.has(&key(i))).count();
    if layers < 2 {
        return Err(b
            .tensors
            .shape(&key(layers))
            .expect_err("the first key not found is missing"));
    }
    Ok(0..layers)
}

const PLAIN: Then = Then::Activate(Activation::None);

impl Layer {
    fn hugging_face(b: &Build<'_>, width: usize) -> std::result::Result<Self, Error> {
        let inner = b.width("mlp.fc1.weight")?;
        let qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
        Ok(Self {
            norm1: b.layer_norm("layer_norm1", width)?,
            qkv: b.fused(&qkv, [width, width], Bias::With, PLAIN)?,
            out: b.linear("self_attn.out_proj", [width, width], Bias::With, PLAIN)?,
            norm2: b.layer_norm("layer_norm2", width)?,
            fc1: b.linear(
                "mlp.fc1",
                [inner, width],
                Bias::With,
                Then::Activate(Activation::QuickGelu),
            )?,
            fc2: b.linear("mlp.fc2", [width, inner], Bias::With, PLAIN)?,
        })
    }

    fn open_clip(b: &Build<'_>, width: usize) -> std::result::Result<Self, Error> {
        let inner = b.width("mlp.c_fc.weight")?;
        let weight = b.tensors.hold("attn.in_proj_weight", &[3 * width, width])?;
        let bias = b.tensors.read("attn.in_proj_bias", &[3 * width])?;
        Ok(Self {
            norm1: b.layer_norm("ln_1", width)?,
            qkv: Linear::stacked(b.place, &[weight.values()], 3 * width, Some(&bias), PLAIN)?
                .made_from(b.origin("attn.in_proj_weight", 0, 3 * width)),
            out: b.linear("attn.out_proj", [width, width], Bias::With, PLAIN)?,
            norm2: b.layer_norm("ln_2", width)?,
            fc1: b.linear(
                "mlp.c_fc",
                [inner, width],
                Bias::With,
                Then::Activate(Activation::Gelu),
            )?,
            fc2: b.linear("mlp.c_proj", [width, inner], Bias::With, PLAIN)?,
        })
    }

    fn forward(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        let h = self_attention(
            &self.qkv.forward(&self.norm1.forward(x)?)?,
            heads,
            Mask::Causal,
        )?;
        let x = self.out.forward_add(&h, x)?;
        let h = self.fc1.forward(&self.norm2.forward(&x)?)?;
        self.fc2.forward_add(&h, &x)
    }
}
