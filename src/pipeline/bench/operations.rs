//! Single operations at SDXL's shapes, batch of 2: at 512x512 on the CPU, at 1024x1024 on a card.
//!
//! On the CPU the median of the runs of a second counts, data warm. On a card so many copies of an operation, each with weights and inputs of
//! its own, are recorded in a row that nothing is found in the L2 cache, and the row is timed by the card's own clock: what the host
//! takes to queue a launch is not the operation's. `per_step` is how often SDXL's UNet has the shape in one step.

use std::time::Instant;

use candle_core::{DType, Tensor};

use super::{Error, Part, median};
use crate::nn::cpu::operations;
use crate::nn::cuda::Replay;
use crate::nn::{
    Activation, Conv2d, GroupNorm, LayerNorm, Linear, Mask, Placement, Sampling, Then,
    cross_attention, self_attention,
};
use crate::rng::{Generator, NoiseSource};

/// Seconds each operation is repeated for on the CPU.
const OPERATION_SECONDS: f64 = 1.0;

/// Bytes that the copies of an operation come to: twice the L2 cache of the largest card, which is 60 MB.
const COLD: u64 = 120_000_000;

/// Copies of an operation at most.
const COPIES: u64 = 64;

/// Runs of a recording that are timed.
const RUNS: usize = 10;

/// Which operations, and how often a step has each.
struct Shapes {
    /// `(inputs, outputs, side, per step)`
    convolutions: &'static [(usize, usize, usize, usize)],
    /// `(channels, side, per step)`
    group_norms: &'static [(usize, usize, usize)],
    /// `(tokens, inputs, outputs, what follows, per step)`
    linears: &'static [(usize, usize, usize, Then, usize)],
    /// `(tokens, heads, head size, per step)`
    attentions: &'static [(usize, usize, usize, usize)],
    /// `(tokens, channels, per step)`
    layer_norms: &'static [(usize, usize, usize)],
}

const PLAIN: Then = Then::Activate(Activation::None);

const ON_CPU: Shapes = Shapes {
    convolutions: &[(320, 320, 64, 7), (640, 640, 32, 6), (1280, 1280, 16, 10)],
    group_norms: &[(320, 64, 8), (640, 32, 6), (1280, 16, 10)],
    linears: &[
        (1024, 640, 5120, Then::Geglu, 10),
        (256, 1280, 10240, Then::Geglu, 60),
        (1024, 2560, 640, PLAIN, 10),
        (256, 5120, 1280, PLAIN, 60),
        (256, 1280, 3840, PLAIN, 60),
    ],
    attentions: &[(4096, 10, 64, 0), (1024, 10, 64, 10), (256, 20, 64, 60)],
    layer_norms: &[(256, 1280, 180)],
};

/// Counted in SDXL's UNet: 10 transformer blocks of 640 channels in 5 transformers, 60 of 1280 in 6; 17 residual blocks.
const ON_CARD: Shapes = Shapes {
    convolutions: &[
        (320, 320, 128, 7),
        (640, 320, 128, 2),
        (960, 320, 128, 1),
        (640, 640, 64, 6),
        (1280, 640, 64, 1),
        (1920, 640, 64, 1),
        (1280, 1280, 32, 10),
        (2560, 1280, 32, 2),
    ],
    group_norms: &[(320, 128, 8), (640, 64, 6), (1280, 32, 10)],
    linears: &[
        (4096, 640, 5120, Then::Geglu, 10),
        (1024, 1280, 10240, Then::Geglu, 60),
        (4096, 2560, 640, PLAIN, 10),
        (1024, 5120, 1280, PLAIN, 60),
        (4096, 640, 1920, PLAIN, 10),
        (1024, 1280, 3840, PLAIN, 60),
        (4096, 640, 640, PLAIN, 40),
        (1024, 1280, 1280, PLAIN, 192),
    ],
    attentions: &[(4096, 10, 64, 10), (1024, 20, 64, 60), (16384, 1, 512, 0)],
    layer_norms: &[(4096, 640, 30), (1024, 1280, 180)],
};

/// Times single operations.
///
/// # Errors
/// When an operation fails.
pub fn measure_operations(place: &Placement, report: &mut dyn FnMut(Part)) -> Result<(), Error> {
    let shapes = if place.device.is_cuda() {
        ON_CARD
    } else {
        ON_CPU
    };
    let mut bench = Bench {
        place,
        noise: Generator::new(NoiseSource::Gpu, 1),
        report,
    };
    for &(inputs, outputs, side, per_step) in shapes.convolutions {
        bench.convolution([inputs, outputs], side, per_step)?;
    }
    for &(channels, side, per_step) in shapes.group_norms {
        bench.group_norm(channels, side, per_step)?;
    }
    for &(tokens, inputs, outputs, then, per_step) in shapes.linears {
        bench.linear([tokens, inputs, outputs], then, per_step)?;
    }
    for &(tokens, heads, head, per_step) in shapes.attentions {
        bench.attention([tokens, heads, head], per_step)?;
    }
    for &(tokens, channels, per_step) in shapes.layer_norms {
        bench.layer_norm(tokens, channels, per_step)?;
    }
    Ok(())
}

/// What an operation is called, moves and counts.
struct Subject {
    name: String,
    /// Values of inputs, weights and result.
    values: usize,
    per_step: usize,
}

struct Bench<'a> {
    place: &'a Placement,
    noise: Generator,
    report: &'a mut dyn FnMut(Part),
}

impl Bench<'_> {
    fn values(&mut self, count: usize, scale: f32) -> Vec<f32> {
        let normals = self.noise.normals(count).into_iter();
        normals.map(|x| x * scale).collect()
    }

    fn tensor(&mut self, shape: &[usize]) -> candle_core::Result<Tensor> {
        let values = self.values(shape.iter().product(), 1.0);
        Tensor::from_vec(values, shape, &self.place.device)?.to_dtype(self.place.dtype)
    }

    fn convolution(
        &mut self,
        [inputs, outputs]: [usize; 2],
        side: usize,
        per_step: usize,
    ) -> Result<(), Error> {
        let weight = self.values(outputs * inputs * 9, 0.02);
        let x = self.tensor(&[2, side, side, inputs])?;
        let channels = if inputs == outputs {
            format!("{inputs}")
        } else {
            format!("{inputs} to {outputs}")
        };
        let subject = Subject {
            name: format!("convolution 3x3 {channels} channels {side}x{side}"),
            values: weight.len() + 2 * side * side * (inputs + outputs),
            per_step,
        };
        let place = self.place;
        let sizes = [outputs, inputs, 3];
        self.run(
            &subject,
            || Conv2d::new(place, &weight, sizes, None, Sampling::SAME),
            &[x],
            |layer, x| layer.forward(&x[0]),
        )
    }

    fn group_norm(&mut self, channels: usize, side: usize, per_step: usize) -> Result<(), Error> {
        let (weight, bias) = (self.values(channels, 0.02), self.values(channels, 0.02));
        let x = self.tensor(&[2, side, side, channels])?;
        let subject = Subject {
            name: format!("group norm + SiLU {channels} channels {side}x{side}"),
            values: 2 * x.elem_count(),
            per_step,
        };
        let place = self.place;
        self.run(
            &subject,
            || Ok(GroupNorm::new(place, &weight, &bias, 1e-5)?.silu()),
            &[x],
            |layer, x| layer.forward(&x[0]),
        )
    }

    fn linear(&mut self, sizes: [usize; 3], then: Then, per_step: usize) -> Result<(), Error> {
        let [tokens, inputs, outputs] = sizes;
        let weight = self.values(inputs * outputs, 0.02);
        let x = self.tensor(&[2, tokens, inputs])?;
        let (gate, written) = match then {
            Then::Geglu => (" + GEGLU", outputs / 2),
            Then::Activate(_) => ("", outputs),
        };
        let subject = Subject {
            name: format!("linear {tokens}x{inputs}x{outputs}{gate}"),
            values: weight.len() + 2 * tokens * (inputs + written),
            per_step,
        };
        let place = self.place;
        self.run(
            &subject,
            || Linear::new(place, &weight, outputs, None, then),
            &[x],
            |layer, x| layer.forward(&x[0]),
        )
    }

    /// To itself and, in the UNet, to a text of 77 tokens.
    fn attention(&mut self, sizes: [usize; 3], per_step: usize) -> Result<(), Error> {
        let [tokens, heads, head] = sizes;
        let width = heads * head;
        let of_unet = head == 64;
        let batch = if of_unet { 2 } else { 1 };
        let named = if of_unet {
            format!("{tokens} tokens, {heads} heads")
        } else {
            format!("{tokens} tokens, {heads} head of {head}")
        };
        let qkv = self.tensor(&[batch, tokens, 3 * width])?;
        let subject = Subject {
            name: format!("self-attention {named}"),
            values: batch * tokens * 4 * width,
            per_step,
        };
        let run = |(): &(), x: &[Tensor]| self_attention(&x[0], heads, Mask::Full);
        self.run(&subject, || Ok(()), &[qkv], run)?;
        if !of_unet {
            return Ok(());
        }
        let inputs = [
            self.tensor(&[2, tokens, width])?,
            self.tensor(&[2, 77, 2 * width])?,
        ];
        let subject = Subject {
            name: format!("cross-attention {named}"),
            values: 2 * (2 * tokens + 2 * 77) * width,
            per_step,
        };
        let run = |(): &(), x: &[Tensor]| cross_attention(&x[0], &x[1], heads);
        self.run(&subject, || Ok(()), &inputs, run)
    }

    fn layer_norm(&mut self, tokens: usize, channels: usize, per_step: usize) -> Result<(), Error> {
        let (weight, bias) = (self.values(channels, 0.02), self.values(channels, 0.02));
        let x = self.tensor(&[2, tokens, channels])?;
        let subject = Subject {
            name: format!("layer norm {}x{channels}", 2 * tokens),
            values: 2 * x.elem_count(),
            per_step,
        };
        let place = self.place;
        self.run(
            &subject,
            || LayerNorm::new(place, &weight, &bias),
            &[x],
            |layer, x| layer.forward(&x[0]),
        )
    }

    /// Times one operation: `layer` makes its weights, `run` runs it.
    fn run<L>(
        &mut self,
        subject: &Subject,
        layer: impl Fn() -> candle_core::Result<L>,
        inputs: &[Tensor],
        run: impl Fn(&L, &[Tensor]) -> candle_core::Result<Tensor>,
    ) -> Result<(), Error> {
        let bytes = (subject.values * self.place.dtype.size_in_bytes()) as u64;
        let measured = if self.place.device.is_cuda() {
            let copies = (COLD / bytes.max(1) + 1).clamp(2, COPIES);
            let mut subjects = Vec::new();
            for copy in 0..copies {
                // No two copies alike, and none is all zeros.
                let factor = 1.0 + copy as f64 / 128.0;
                let own = inputs.iter().map(|x| x.affine(factor, 0.0));
                subjects.push((layer()?, own.collect::<candle_core::Result<Vec<_>>>()?));
            }
            recorded(self.place, &subjects, &run)?
        } else {
            repeated(&layer()?, inputs, &run)?
        };
        let (seconds, operations) = measured;
        (self.report)(Part {
            name: subject.name.clone(),
            seconds,
            operations,
            bytes: if self.place.device.is_cuda() {
                bytes
            } else {
                0
            },
            per_step: subject.per_step,
            ..Part::default()
        });
        Ok(())
    }
}

/// Median seconds of a run and its operations, host and data warm.
fn repeated<L>(
    layer: &L,
    inputs: &[Tensor],
    run: &impl Fn(&L, &[Tensor]) -> candle_core::Result<Tensor>,
) -> Result<(f64, u64), Error> {
    run(layer, inputs)?;
    let (begin, before) = (Instant::now(), operations());
    let mut seconds = Vec::new();
    while begin.elapsed().as_secs_f64() < OPERATION_SECONDS || seconds.len() < 5 {
        let start = Instant::now();
        run(layer, inputs)?.device().synchronize()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    let operations = (operations() - before) / seconds.len() as u64;
    Ok((median(&mut seconds), operations))
}

/// Seconds and operations of one of the subjects, which run in a row as one recording.
fn recorded<L>(
    place: &Placement,
    subjects: &[(L, Vec<Tensor>)],
    run: &impl Fn(&L, &[Tensor]) -> candle_core::Result<Tensor>,
) -> Result<(f64, u64), Error> {
    let replay = Replay::default();
    // What tells the recording its device; the subjects lie there already.
    let anchor = Tensor::zeros(1, DType::F32, &place.device)?;
    let all = |_: &[Tensor]| {
        let mut results = subjects.iter().map(|(layer, inputs)| run(layer, inputs));
        let first = results
            .next()
            .unwrap_or_else(|| candle_core::bail!("no subject"))?;
        results.try_fold(first, |_, result| result)
    };
    let before = operations();
    // The first run chooses plans, the second records.
    replay.run(&[&anchor], 0, all)?;
    let operations = (operations() - before) / subjects.len() as u64;
    replay.run(&[&anchor], 0, all)?;
    let Some(recording) = replay.measure(RUNS)? else {
        return Err(Error::Invalid(
            "the device records no launches, by which operations are timed".into(),
        ));
    };
    let seconds = recording.seconds / subjects.len() as f64;
    Ok((seconds, operations))
}
