//! Prompts to what the UNet is told: text context, pooled vector and sizes, one for each stretch of the denoising loop.
//!
//! Order of operations and padding as A1111 has them (pipeline specification, chapter 2). Encoded texts are plain `f32` on the
//! host: they are small, and weighting them needs sums over whole chunks.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::Error;
use super::vocabulary::Vocabulary;
use crate::models::TextTower;
use crate::models::clip::{Replacement, TowerOutput};
use crate::nn::{Placement, Rewrite, sinusoidal_embedding};
use crate::prompt::{
    CHUNK_LENGTH, Chunk, ChunkOptions, EditRule, Emphasis, ScheduleSteps, Tokenizer, Tower,
    build_chunks, equalize_chunks, schedule, split_and,
};
use crate::weights::detect::Kind;
use crate::weights::embedding::Embedding;
use crate::weights::{self, Source};

/// Width of the embedding of one size value.
const SIZE_EMBEDDING: usize = 256;
/// Encoded prompts kept for the next job.
const CACHED_PROMPTS: usize = 8;

/// The text encoders with their tokenizer.
#[derive(Debug)]
pub struct TextEncoder {
    tokenizer: Arc<Tokenizer>,
    /// `None` in a refiner.
    clip_l: Option<TextTower>,
    big_g: TextTower,
    vocabulary: Vocabulary,
    cache: Vec<(CacheKey, Arc<EditedPrompt>)>,
}

/// What an encoded prompt depends on.
#[derive(Debug, Clone, PartialEq)]
struct CacheKey {
    text: String,
    steps: ScheduleSteps,
    emphasis: Emphasis,
}

/// One text as the UNet sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct EncodedText {
    /// `[tokens, context width]`, row major.
    pub context: Vec<f32>,
    /// Number of tokens: 77 per chunk.
    pub tokens: usize,
    /// bigG's pooled state of the first chunk.
    pub pooled: Vec<f32>,
}

/// A prompt with editing: one text for each stretch of the denoising loop.
#[derive(Debug, Clone, PartialEq)]
pub struct EditedPrompt {
    /// Texts but the last, each with the denoiser call it holds up to.
    stretches: Vec<(usize, Arc<EncodedText>)>,
    last: Arc<EncodedText>,
    /// The textual inversions it names.
    embeddings: Vec<Arc<Embedding>>,
}

impl EditedPrompt {
    /// The text of denoiser call `call` (from 0), as A1111 counts: the first stretch whose end is not before it.
    #[must_use]
    pub fn at(&self, call: usize) -> &Arc<EncodedText> {
        let stretch = self.stretches.iter().find(|(end, _)| call <= *end);
        stretch.map_or(&self.last, |(_, text)| text)
    }
}

/// Everything the denoising loop of a job is told.
#[derive(Debug, Clone)]
pub struct Prompts {
    /// The pieces joined by `AND`, with their weights.
    pub positive: Vec<(f32, Arc<EditedPrompt>)>,
    /// The negative prompt.
    pub negative: Arc<EditedPrompt>,
}

impl Prompts {
    /// `NAME: HASH` of each textual inversion that has one.
    pub fn embedding_hashes(&self) -> impl Iterator<Item = String> {
        let positive = self.positive.iter().map(|(_, prompt)| prompt);
        let embeddings = positive
            .chain([&self.negative])
            .flat_map(|prompt| &prompt.embeddings);
        embeddings.filter(|e| !e.shorthash.is_empty()).map(|e| {
            let name = e.name.replace([':', ','], "");
            format!("{name}: {}", e.shorthash)
        })
    }
}

impl TextEncoder {
    /// Loads both towers of a checkpoint, or the one of a refiner.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit.
    pub fn load(
        source: &dyn Source,
        kind: Kind,
        tokenizer: Arc<Tokenizer>,
        place: &Placement,
    ) -> Result<Self, weights::Error> {
        let (clip_l, big_g) = if kind == Kind::SdxlRefiner {
            (None, TextTower::refiner_big_g(source, place)?)
        } else {
            let clip_l = TextTower::clip_l(source, place)?;
            (Some(clip_l), TextTower::big_g(source, place)?)
        };
        Ok(Self {
            tokenizer,
            clip_l,
            big_g,
            vocabulary: Vocabulary::default(),
            cache: Vec::new(),
        })
    }

    /// The layers whose weights can be written again. What was encoded before is forgotten.
    pub fn layers_mut(&mut self) -> Vec<&mut dyn Rewrite> {
        self.cache.clear();
        self.towers_mut().flat_map(TextTower::layers_mut).collect()
    }

    fn towers_mut(&mut self) -> impl Iterator<Item = &mut TextTower> {
        self.clip_l.iter_mut().chain([&mut self.big_g])
    }

    /// The towers in the order of their parts of the context.
    fn towers(&self) -> impl Iterator<Item = (Tower, &TextTower)> {
        let clip_l = self.clip_l.iter().map(|tower| (Tower::ClipL, tower));
        clip_l.chain([(Tower::OpenClipG, &self.big_g)])
    }

    /// Width of the context.
    fn width(&self) -> usize {
        self.towers().map(|(_, tower)| tower.width()).sum()
    }

    /// Sets the textual inversions that prompts may name; of two with one name the first counts.
    pub fn set_embeddings(&mut self, embeddings: Vec<Arc<Embedding>>) {
        if self.vocabulary.given() != embeddings {
            self.cache.clear();
            let clip_l = self.clip_l.as_ref().map(TextTower::width);
            let widths = (clip_l, self.big_g.width());
            self.vocabulary = Vocabulary::new(embeddings, &self.tokenizer, widths);
        }
    }

    /// Encodes both prompts of a pass whose denoiser will be called as often as `steps` says.
    ///
    /// # Errors
    /// When an encoder fails or produces NaN.
    pub fn prompts(
        &mut self,
        positive: &str,
        negative: &str,
        steps: ScheduleSteps,
        emphasis: Emphasis,
    ) -> Result<Prompts, Error> {
        let mut pieces = Vec::new();
        for piece in split_and(positive) {
            pieces.push((piece.weight, self.edited(&piece.text, steps, emphasis)?));
        }
        let negative = if negative.is_empty() {
            self.zeros(steps)?
        } else {
            self.edited(negative, steps, emphasis)?
        };
        Ok(Prompts {
            positive: pieces,
            negative,
        })
    }

    /// The empty negative prompt: A1111 zeroes text and pooled vector on SDXL instead of encoding it.
    fn zeros(&mut self, steps: ScheduleSteps) -> Result<Arc<EditedPrompt>, Error> {
        let pooled = self
            .edited("", steps, Emphasis::Original)?
            .at(0)
            .pooled
            .len();
        let width = self.width();
        let text = EncodedText {
            context: vec![0.0; CHUNK_LENGTH * width],
            tokens: CHUNK_LENGTH,
            pooled: vec![0.0; pooled],
        };
        Ok(Arc::new(EditedPrompt {
            stretches: Vec::new(),
            last: Arc::new(text),
            embeddings: Vec::new(),
        }))
    }

    fn edited(
        &mut self,
        text: &str,
        steps: ScheduleSteps,
        emphasis: Emphasis,
    ) -> Result<Arc<EditedPrompt>, Error> {
        let key = CacheKey {
            text: text.to_string(),
            steps,
            emphasis,
        };
        if let Some((_, hit)) = self.cache.iter().find(|(k, _)| *k == key) {
            return Ok(hit.clone());
        }
        let stretches = schedule(text, steps, EditRule::Current);
        let (ends, texts): (Vec<usize>, Vec<String>) = stretches.into_iter().unzip();
        let (encoded, embeddings) = self.encode_noting(&texts, emphasis)?;
        let mut encoded = encoded.into_iter().map(Arc::new);
        let last = encoded
            .next_back()
            .ok_or_else(|| Error::Invalid("a prompt without any stretch".into()))?;
        let stretches = ends.into_iter().zip(encoded).collect();
        let edited = Arc::new(EditedPrompt {
            stretches,
            last,
            embeddings,
        });
        if self.cache.len() == CACHED_PROMPTS {
            self.cache.remove(0);
        }
        self.cache.push((key, edited.clone()));
        Ok(edited)
    }

    /// Encodes the texts of one schedule together: their chunk counts are made equal, and the mean that emphasis restores is
    /// taken over all of them.
    ///
    /// # Errors
    /// When an encoder fails or produces NaN.
    pub fn encode(&self, texts: &[String], emphasis: Emphasis) -> Result<Vec<EncodedText>, Error> {
        Ok(self.encode_noting(texts, emphasis)?.0)
    }

    /// [`Self::encode`], and the textual inversions found on the way.
    fn encode_noting(
        &self,
        texts: &[String],
        emphasis: Emphasis,
    ) -> Result<(Vec<EncodedText>, Vec<Arc<Embedding>>), Error> {
        let chunks_of = |text: &String, tower| {
            let options = ChunkOptions {
                embeddings: &self.vocabulary,
                ..ChunkOptions::new(tower)
            };
            build_chunks(&emphasis.fragments(text), &self.tokenizer, &options)
        };
        let mut all: Vec<(Tower, Vec<Chunk>)> = self
            .towers()
            .flat_map(|(tower, _)| texts.iter().map(move |text| (tower, text)))
            .map(|(tower, text)| (tower, chunks_of(text, tower)))
            .collect();
        equalize_chunks(&mut all);
        let count = all[0].1.len();
        let empty = EncodedText {
            context: Vec::with_capacity(count * CHUNK_LENGTH * self.width()),
            tokens: count * CHUNK_LENGTH,
            pooled: Vec::new(),
        };
        let mut out = vec![empty; texts.len()];
        for index in 0..count {
            let mut hidden = Vec::new();
            for ((_, tower), chunks) in self.towers().zip(all.chunks_exact(texts.len())) {
                let (states, pooled) = self.weighted(tower, chunks, index, emphasis)?;
                hidden.push((states, tower.width()));
                if index == 0 && !pooled.is_empty() {
                    let pooled = pooled.chunks_exact(pooled.len() / texts.len());
                    for (text, pooled) in out.iter_mut().zip(pooled) {
                        text.pooled = pooled.to_vec();
                    }
                }
            }
            for (i, text) in out.iter_mut().enumerate() {
                for row in i * CHUNK_LENGTH..(i + 1) * CHUNK_LENGTH {
                    for (states, width) in &hidden {
                        let row = &states[row * width..(row + 1) * width];
                        text.context.extend_from_slice(row);
                    }
                }
            }
        }
        let chunks = all.iter().flat_map(|(_, chunks)| chunks);
        Ok((out, self.vocabulary.used(chunks)))
    }

    /// Chunk `index` of every text through one tower, weighted; and the pooled states, which never are.
    fn weighted(
        &self,
        tower: &TextTower,
        texts: &[(Tower, Vec<Chunk>)],
        index: usize,
        emphasis: Emphasis,
    ) -> Result<(Vec<f32>, Vec<f32>), Error> {
        let tokens: Vec<[u32; CHUNK_LENGTH]> = texts
            .iter()
            .map(|(_, chunks)| chunks[index].tokens)
            .collect();
        let multipliers: Vec<f32> = texts
            .iter()
            .flat_map(|(_, chunks)| chunks[index].weights)
            .collect();
        let TowerOutput { hidden, pooled } =
            tower.encode(&tokens, &self.replacements(texts, index))?;
        let mut z = to_host(&hidden)?;
        if z.iter().any(|v| !v.is_finite()) {
            return Err(Error::NotANumber {
                stage: "text encoder",
            });
        }
        emphasis
            .apply(&mut z, &multipliers)
            .map_err(|e| Error::Invalid(e.to_string()))?;
        let pooled = pooled.map(|p| to_host(&p)).transpose()?.unwrap_or_default();
        Ok((z, pooled))
    }

    /// The vectors of textual inversions in chunk `index` of every text.
    fn replacements(&self, texts: &[(Tower, Vec<Chunk>)], index: usize) -> Vec<Replacement> {
        let chunks = texts.iter().enumerate();
        let each = chunks.flat_map(|(i, (tower, chunks))| {
            let placed = self.vocabulary.vectors(&chunks[index], *tower);
            placed.map(move |(token, vector)| Replacement {
                at: (i, token),
                vector: vector.to_vec(),
            })
        });
        each.collect()
    }
}

fn to_host(t: &Tensor) -> candle_core::Result<Vec<f32>> {
    t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// The sizes SDXL is told (Podell et al. 2023, section 2.2), each as height before width, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Size of the training picture this one should look like.
    pub original: (usize, usize),
    /// Top and left of the crop.
    pub crop: (usize, usize),
    /// Size of the picture.
    pub target: (usize, usize),
}

impl Sizes {
    /// Original and target size are the picture's, nothing is cropped.
    #[must_use]
    pub fn of_picture(width: usize, height: usize) -> Self {
        Self {
            original: (height, width),
            crop: (0, 0),
            target: (height, width),
        }
    }

    /// The UNet's vector: pooled text, then the embedding of each value.
    #[must_use]
    pub fn vector(self, pooled: &[f32]) -> Vec<f32> {
        let values = [
            self.original.0,
            self.original.1,
            self.crop.0,
            self.crop.1,
            self.target.0,
            self.target.1,
        ];
        let values = values.map(half_precision);
        with_embedded(pooled, &values)
    }

    /// The refiner's vector: pooled text, then the embedding of size, crop and aesthetic score.
    #[must_use]
    pub fn refiner_vector(self, pooled: &[f32], aesthetic_score: f32) -> Vec<f32> {
        let sizes = [self.original.0, self.original.1, self.crop.0, self.crop.1];
        let [h, w, top, left] = sizes.map(half_precision);
        let score = half::f16::from_f32(aesthetic_score).to_f32();
        with_embedded(pooled, &[h, w, top, left, score])
    }
}

/// A1111 holds the sizes in half precision: exact up to 2048, even numbers beyond.
fn half_precision(size: usize) -> f32 {
    half::f16::from_f32(size as f32).to_f32()
}

/// Pooled text, then the embedding of each value.
fn with_embedded(pooled: &[f32], values: &[f32]) -> Vec<f32> {
    let mut vector = pooled.to_vec();
    vector.extend(sinusoidal_embedding(values, SIZE_EMBEDDING));
    vector
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(value: f32) -> Arc<EncodedText> {
        Arc::new(EncodedText {
            context: vec![value],
            tokens: 1,
            pooled: vec![],
        })
    }

    #[test]
    fn the_first_stretch_serves_one_call_more_than_its_length() {
        let prompt = EditedPrompt {
            stretches: vec![(2, text(1.0))],
            last: text(2.0),
            embeddings: Vec::new(),
        };
        let seen: Vec<f32> = (0..7).map(|call| prompt.at(call).context[0]).collect();
        assert_eq!(seen, [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]);
    }

    #[test]
    fn height_comes_before_width_and_large_sizes_are_half_precision() {
        let vector = Sizes::of_picture(832, 2049).vector(&[7.0]);
        assert_eq!(vector.len(), 1 + 6 * SIZE_EMBEDDING);
        assert_eq!(
            (vector[0], vector[1]),
            (7.0, 2048f32.cos()),
            "2049 rounds to 2048"
        );
        assert_eq!(&vector[1 + SIZE_EMBEDDING..][..1], [832f32.cos()]);
    }
}
