//! The UNet as the sampling layer's [`Network`]: one batch for all prompts and pictures, layouts changed at the edge.
//!
//! Latents outside are `[batch, 4, h, w]` on the host, or on the UNet's device in its layout; the UNet's are `[rows, h, w,
//! channels]`. Rows are the
//! prompt's pieces, picture by picture, then the negative prompt for each picture. Prompts that still differ in length after
//! [`align`] run apart.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::conditioning::{EncodedText, Prompts};
use super::device_latents::DeviceLatents;
use super::padding::{Aligned, PadConds, align};
use super::refiner::{AESTHETIC_SCORES, Switch};
use super::sizes::Sizes;
use super::{Control, Error, Observer, Pipeline};
use crate::models::{Conditioning, Unet};
use crate::nn::Placement;
use crate::sampling::{InfotextParams, Latents, Network, Prediction, Uncond};
use crate::weights::detect::Kind;

/// Conditionings kept for the next calls: alternating prompts need two, long ones would need too much memory.
const KEPT: usize = 4;

/// A model with the prompts of one run.
pub(super) struct Part<'a> {
    unet: &'a Unet,
    place: &'a Placement,
    prompts: &'a Prompts,
    /// What a refiner is told of prompt and negative prompt; `None` for other models.
    aesthetic_scores: Option<(f32, f32)>,
    /// The model's encoded empty prompt, if padding needs it.
    empty: Option<&'a EncodedText>,
}

impl<'a> Part<'a> {
    pub(super) fn new(model: &'a Pipeline, prompts: &'a Prompts) -> Self {
        let is_refiner = model.kind == Kind::SdxlRefiner;
        Self {
            unet: &model.unet,
            place: &model.place,
            prompts,
            aesthetic_scores: is_refiner.then_some(AESTHETIC_SCORES),
            empty: model.empty_prompt.as_ref(),
        }
    }

    /// With other aesthetic scores, if the model is told any.
    pub(super) fn scored(self, scores: (f32, f32)) -> Self {
        Self {
            aesthetic_scores: self.aesthetic_scores.and(Some(scores)),
            ..self
        }
    }
}

/// The UNet with the prompts of one run.
pub(super) struct GuidedUnet<'a> {
    part: Part<'a>,
    /// Who takes over, and when.
    next: Option<(&'a Switch, Part<'a>)>,
    has_switched: bool,
    sizes: Sizes,
    observer: &'a dyn Observer,
    /// Channels behind the latents of every picture, `[1 or pictures, h, w, extra]`: inpainting checkpoints.
    extra: Option<Tensor>,
    kept: Vec<(Vec<Arc<EncodedText>>, Conditioning)>,
    padding: PadConds,
    /// Texts of late calls, as they are and as they run.
    aligned: Vec<(Vec<Arc<EncodedText>>, Aligned)>,
    /// Whether the last call's texts were padded.
    was_padded: bool,
    /// Why the run was stopped, if it was.
    pub(super) stopped: Option<Control>,
}

/// A row of the batch: which prompt it has.
type Row = (Arc<EncodedText>, RowOf);

#[derive(Clone, Copy, PartialEq, Eq)]
enum RowOf {
    Piece(usize),
    Negative,
}

impl<'a> GuidedUnet<'a> {
    pub(super) fn new(
        part: Part<'a>,
        sizes: Sizes,
        observer: &'a dyn Observer,
        extra: Option<Tensor>,
    ) -> Self {
        Self {
            part,
            next: None,
            has_switched: false,
            sizes,
            observer,
            extra,
            kept: Vec::new(),
            padding: PadConds::Apart,
            aligned: Vec::new(),
            was_padded: false,
            stopped: None,
        }
    }

    /// Brings prompts of different length together.
    pub(super) fn padded(self, padding: PadConds) -> Self {
        Self { padding, ..self }
    }

    /// What infotext says about padding: the last call decides, as in A1111.
    pub(super) fn infotext(&self) -> InfotextParams {
        let key = self.padding.infotext().filter(|_| self.was_padded);
        key.map(|key| (key.to_string(), "True".to_string()))
            .into_iter()
            .collect()
    }

    /// The texts of denoiser call `call`, brought to the lengths they run with.
    fn texts(&mut self, call: usize) -> Aligned {
        let prompts = self.part.prompts;
        let pieces = prompts.positive.iter().map(|(_, prompt)| prompt);
        let texts: Vec<Arc<EncodedText>> = pieces
            .chain([&prompts.negative])
            .map(|prompt| prompt.at(call).clone())
            .collect();
        if let Some((_, hit)) = self.aligned.iter().find(|(key, _)| same(key, &texts)) {
            return hit.clone();
        }
        let mut pieces = texts.clone();
        let negative = pieces.pop();
        let aligned = align(pieces, negative, self.padding, self.part.empty);
        if self.aligned.len() == KEPT {
            self.aligned.remove(0);
        }
        self.aligned.push((texts, aligned.clone()));
        aligned
    }

    /// Lets another model take over.
    pub(super) fn then(self, switch: &'a Switch, part: Part<'a>) -> Self {
        Self {
            next: Some((switch, part)),
            ..self
        }
    }

    /// Whether the other model has taken over.
    pub(super) fn has_switched(&self) -> bool {
        self.has_switched
    }

    fn switch_if_due(&mut self, timestep: f32, call: usize) {
        let due = self
            .next
            .take_if(|(switch, _)| switch.is_due(timestep, call));
        if let Some((_, part)) = due {
            tracing::debug!(call, timestep, "the refiner takes over");
            self.part = part;
            self.has_switched = true;
            self.kept.clear();
            self.aligned.clear();
        }
    }

    /// What a row's picture is told besides its text.
    fn vector(&self, (text, of): &Row) -> Vec<f32> {
        match self.part.aesthetic_scores {
            None => self.sizes.vector(&text.pooled),
            Some((prompt, negative)) => {
                let score = if *of == RowOf::Negative {
                    negative
                } else {
                    prompt
                };
                self.sizes.refiner_vector(&text.pooled, score)
            }
        }
    }

    /// Runs rows of equal length as one batch; returns one latent batch per row.
    fn run(&mut self, rows: &[Row], x: &Latents, timestep: f32) -> Result<Vec<Latents>, Error> {
        let pictures = x.batch();
        let [_, channels, ..] = x.shape;
        let conditioning = self.conditioning(rows, pictures)?;
        let on_device = DeviceLatents::tensor(x).transpose()?;
        let stays = on_device.is_some();
        let input = match on_device {
            Some(input) => input,
            None => self.sent(x)?,
        };
        let mut input = repeat(&input, rows.len())?;
        let takes_extra = self.part.unet.in_channels() > channels;
        if let Some(extra) = self.extra.as_ref().filter(|_| takes_extra) {
            let (batch, h, w, c) = extra.dims4()?;
            let extra = if batch == pictures {
                repeat(extra, rows.len())?
            } else {
                extra
                    .expand((rows.len() * pictures, h, w, c))?
                    .contiguous()?
            };
            input = crate::nn::concat_channels(&input, &extra)?;
        }
        let output = self.part.unet.forward(
            &input,
            &vec![timestep; rows.len() * pictures],
            &conditioning,
        )?;
        let row = |i: usize| output.narrow(0, i * pictures, pictures);
        if stays {
            let rows = (0..rows.len()).map(|i| Ok(DeviceLatents::wrap(&row(i)?)?));
            return rows.collect();
        }
        (0..rows.len()).map(|i| fetched(&row(i)?)).collect()
    }

    /// Latents of the host as the UNet's input.
    fn sent(&self, x: &Latents) -> candle_core::Result<Tensor> {
        let [pictures, channels, height, width] = x.shape;
        let values = channels_last(&x.data(), x.shape);
        let shape = (pictures, height, width, channels);
        Tensor::from_vec(values, shape, &self.part.place.device)
    }

    fn conditioning(&mut self, rows: &[Row], pictures: usize) -> Result<Conditioning, Error> {
        let key: Vec<Arc<EncodedText>> = rows.iter().map(|(text, _)| text.clone()).collect();
        if let Some((_, hit)) = self.kept.iter().find(|(k, _)| same(k, &key)) {
            return Ok(hit.clone());
        }
        let tokens = rows[0].0.tokens;
        let context: Vec<f32> = rows
            .iter()
            .flat_map(|(text, _)| &text.context)
            .copied()
            .collect();
        let vector: Vec<f32> = rows.iter().flat_map(|row| self.vector(row)).collect();
        let context_width = context.len() / rows.len() / tokens;
        let (context_wanted, vector_wanted) = (
            self.part.unet.context_width(),
            self.part.unet.vector_width(),
        );
        if context_width != context_wanted || vector.len() / rows.len() != vector_wanted {
            return Err(Error::Invalid(format!(
                "text encoders and UNet do not fit together: context {context_width} for {context_wanted}, vector {} for {vector_wanted}",
                vector.len() / rows.len()
            )));
        }
        let context = Tensor::from_vec(
            context,
            (rows.len(), tokens, context_width),
            &self.part.place.device,
        )?;
        let vector =
            Tensor::from_vec(vector, (rows.len(), vector_wanted), &self.part.place.device)?;
        let conditioning = self
            .part
            .unet
            .condition(&context, &vector)?
            .repeat_rows(pictures)?;
        if self.kept.len() == KEPT {
            self.kept.remove(0);
        }
        self.kept.push((key, conditioning.clone()));
        Ok(conditioning)
    }
}

impl Network for GuidedUnet<'_> {
    type Error = Error;

    fn predict(
        &mut self,
        x: &Latents,
        timestep: f32,
        call: usize,
        uncond: Uncond,
    ) -> Result<Prediction, Error> {
        let control = self.observer.control();
        if control != Control::Continue {
            self.stopped = Some(control);
            return Err(Error::Interrupted);
        }
        self.switch_if_due(timestep, call);
        let texts = self.texts(call);
        self.was_padded = texts.padded;
        let pieces = texts.pieces.into_iter().enumerate();
        let pieces = pieces.map(|(i, text)| (text, RowOf::Piece(i)));
        let negative = texts.negative.map(|text| (text, RowOf::Negative));
        let negative = negative.filter(|_| uncond == Uncond::Needed);
        let mut waiting: Vec<Row> = pieces.chain(negative).collect();
        let mut answers: Vec<(RowOf, Latents)> = Vec::with_capacity(waiting.len());
        while let Some(tokens) = waiting.first().map(|(text, _)| text.tokens) {
            let (rows, others): (Vec<Row>, Vec<Row>) = waiting
                .into_iter()
                .partition(|(text, _)| text.tokens == tokens);
            let outputs = self.run(&rows, x, timestep)?;
            answers.extend(rows.iter().map(|row| row.1).zip(outputs));
            waiting = others;
        }
        let mut take = |of: RowOf| {
            answers
                .iter()
                .position(|(row, _)| *row == of)
                .map(|i| answers.swap_remove(i).1)
        };
        let weights = self.part.prompts.positive.iter().enumerate();
        let cond = weights
            .filter_map(|(i, (weight, _))| Some((*weight, take(RowOf::Piece(i))?)))
            .collect();
        Ok(Prediction {
            cond,
            uncond: take(RowOf::Negative),
        })
    }

    fn is_composed(&self) -> bool {
        !matches!(self.part.prompts.positive.as_slice(), [(weight, _)] if weight.to_bits() == 1f32.to_bits())
    }
}

/// A network's output for one row, `[pictures, h, w, channels]`, on the host.
fn fetched(output: &Tensor) -> Result<Latents, Error> {
    let (pictures, height, width, channels) = output.dims4()?;
    let values: Vec<f32> = output.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    if values.iter().any(|v| !v.is_finite()) {
        return Err(Error::NotANumber { stage: "Unet" });
    }
    let shape = [pictures, channels, height, width];
    Ok(Latents::new(channels_first(&values, shape), shape))
}

/// Whether both are the very same texts.
fn same(a: &[Arc<EncodedText>], b: &[Arc<EncodedText>]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b))
}

/// The batch `n` times over.
fn repeat(x: &Tensor, n: usize) -> candle_core::Result<Tensor> {
    if n == 1 {
        Ok(x.clone())
    } else {
        Tensor::cat(&vec![x; n], 0)
    }
}

/// `[batch, channels, h, w]` to `[batch, h, w, channels]`.
pub(super) fn channels_last(values: &[f32], [_, channels, height, width]: [usize; 4]) -> Vec<f32> {
    let area = height * width;
    values
        .chunks_exact((area * channels).max(1))
        .flat_map(|image| {
            (0..area * channels).map(move |i| image[i % channels * area + i / channels])
        })
        .collect()
}

/// `[batch, h, w, channels]` to `shape`, which is `[batch, channels, h, w]`.
pub(super) fn channels_first(values: &[f32], [_, channels, height, width]: [usize; 4]) -> Vec<f32> {
    let area = height * width;
    values
        .chunks_exact((area * channels).max(1))
        .flat_map(|image| (0..area * channels).map(move |i| image[i % area * channels + i / area]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_change_back_and_forth() {
        let x = Latents::new((0..2 * 4 * 6).map(|i| i as f32).collect(), [2, 4, 2, 3]);
        let last = channels_last(&x.data(), x.shape);
        assert_eq!(
            &last[..5],
            &[0.0, 6.0, 12.0, 18.0, 1.0],
            "channels of the first pixel, then the second pixel"
        );
        assert_eq!(channels_first(&last, x.shape), x.into_data());
    }
}
