//! The UNet as the sampling layer's [`Network`]: one batch for all prompts and pictures, layouts changed at the edge.
//!
//! Latents outside are `[batch, 4, h, w]` on the host; the UNet's are `[rows, h, w, channels]` on its device. Rows are the
//! prompt's pieces, picture by picture, then the negative prompt for each picture. Prompts of different length run apart,
//! since padding would change the attention.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::conditioning::{EncodedText, Prompts, Sizes};
use super::refiner::{AESTHETIC_SCORES, Switch};
use super::{Control, Error, Observer, Pipeline};
use crate::models::{Conditioning, Unet};
use crate::nn::Placement;
use crate::sampling::{Latents, Network, Prediction, Uncond};
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
}

impl<'a> Part<'a> {
    pub(super) fn new(model: &'a Pipeline, prompts: &'a Prompts) -> Self {
        let is_refiner = model.kind == Kind::SdxlRefiner;
        Self {
            unet: &model.unet,
            place: &model.place,
            prompts,
            aesthetic_scores: is_refiner.then_some(AESTHETIC_SCORES),
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
    kept: Vec<(Vec<*const EncodedText>, Conditioning)>,
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
            stopped: None,
        }
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
        let [_, channels, height, width] = x.shape;
        let conditioning = self.conditioning(rows, pictures)?;
        let input = channels_last(x);
        let input = Tensor::from_slice(
            &input,
            (pictures, height, width, channels),
            &self.part.place.device,
        )?;
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
        let values: Vec<f32> = output.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        if values.iter().any(|v| !v.is_finite()) {
            return Err(Error::NotANumber { stage: "Unet" });
        }
        let size = values.len() / rows.len();
        Ok(values
            .chunks_exact(size)
            .map(|row| {
                channels_first(
                    row,
                    [pictures, size / pictures / height / width, height, width],
                )
            })
            .collect())
    }

    fn conditioning(&mut self, rows: &[Row], pictures: usize) -> Result<Conditioning, Error> {
        // The prompts outlive this run, so an address stands for a text.
        let key: Vec<*const EncodedText> = rows.iter().map(|(text, _)| Arc::as_ptr(text)).collect();
        if let Some((_, hit)) = self.kept.iter().find(|(k, _)| *k == key) {
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
        let pieces = self
            .part
            .prompts
            .positive
            .iter()
            .enumerate()
            .map(|(i, (_, p))| (p.at(call).clone(), RowOf::Piece(i)));
        let negative = (uncond == Uncond::Needed)
            .then(|| (self.part.prompts.negative.at(call).clone(), RowOf::Negative));
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

/// The batch `n` times over.
fn repeat(x: &Tensor, n: usize) -> candle_core::Result<Tensor> {
    if n == 1 {
        Ok(x.clone())
    } else {
        Tensor::cat(&vec![x; n], 0)
    }
}

/// `[batch, channels, h, w]` to `[batch, h, w, channels]`.
pub(super) fn channels_last(x: &Latents) -> Vec<f32> {
    let [_, channels, height, width] = x.shape;
    let area = height * width;
    x.images()
        .flat_map(|image| {
            (0..area * channels).map(move |i| image[i % channels * area + i / channels])
        })
        .collect()
}

/// `[batch, h, w, channels]` to `shape`, which is `[batch, channels, h, w]`.
pub(super) fn channels_first(values: &[f32], shape: [usize; 4]) -> Latents {
    let [_, channels, height, width] = shape;
    let area = height * width;
    let image = |image: &[f32]| {
        (0..area * channels)
            .map(|i| image[i % area * channels + i / area])
            .collect::<Vec<f32>>()
    };
    Latents::new(
        values
            .chunks_exact(area * channels)
            .flat_map(image)
            .collect(),
        shape,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_change_back_and_forth() {
        let x = Latents::new((0..2 * 4 * 6).map(|i| i as f32).collect(), [2, 4, 2, 3]);
        let last = channels_last(&x);
        assert_eq!(
            &last[..5],
            &[0.0, 6.0, 12.0, 18.0, 1.0],
            "channels of the first pixel, then the second pixel"
        );
        assert_eq!(channels_first(&last, x.shape), x);
    }
}
