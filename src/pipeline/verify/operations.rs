//! Every operation of `nn` on ragged and on SDXL's shapes: a table of shapes, and how each operation is built from one.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use half::bf16;

use super::{Row, Scope, host, relative_error, tolerance};
use crate::nn::{
    Activation, Conv2d, GroupNorm, GroupStatistics, LayerNorm, Linear, Mask, Placement, Sampling,
    Then, combine, concat_channels, cross_attention, self_attention,
};
use crate::rng::{Generator, NoiseSource};

/// An operation, the shapes it is tried on (the quick ones first), and what `f32` may differ by.
struct Check {
    name: &'static str,
    run: fn(&mut Lab, &[usize]) -> Result<Tensor>,
    shapes: &'static [&'static [usize]],
    in_f32: f64,
}

/// Shapes of a check that count as quick.
const QUICK: usize = 2;

/// Sums of some hundred to some thousand products in another order.
const SUM: f64 = 1e-5;

/// The same behind a mean, a variance or a softmax.
const NORM: f64 = 5e-5;

/// `[rows, inputs, outputs]`
const LINEAR: &[&[usize]] = &[
    &[1, 1, 1],
    &[3, 5, 7],
    &[77, 768, 64],
    &[50, 2500, 40],
    &[130, 33, 100],
    &[154, 640, 320],
    &[2, 2816, 1280],
];

/// `[rows, inputs, values and gates]`
const GEGLU: &[&[usize]] = &[&[5, 9, 2], &[20, 64, 96], &[33, 40, 100], &[130, 640, 640]];

/// `[batch, height, width, inputs, outputs]`
const CONV: &[&[usize]] = &[
    &[1, 1, 1, 4, 8],
    &[2, 7, 5, 3, 33],
    &[1, 8, 8, 40, 20],
    &[1, 16, 12, 64, 64],
    &[2, 9, 13, 48, 4],
    &[2, 16, 16, 160, 320],
];

/// The same for windows that halve, which need two pixels a side.
const HALF: &[&[usize]] = &[
    &[1, 2, 2, 4, 8],
    &[2, 7, 5, 3, 33],
    &[1, 8, 8, 40, 20],
    &[1, 16, 12, 64, 64],
    &[2, 17, 16, 96, 128],
];

/// `[batch, height, width, channels]`, 32 groups.
const NORMED: &[&[usize]] = &[
    &[1, 1, 1, 64],
    &[2, 5, 7, 32],
    &[1, 33, 3, 96],
    &[2, 16, 16, 320],
    &[2, 64, 64, 128],
    &[1, 9, 11, 1920],
];

/// `[batch, tokens, heads, head size]`
const SELF_ATTENTION: &[&[usize]] = &[
    &[1, 1, 1, 64],
    &[2, 33, 2, 40],
    &[1, 77, 12, 64],
    &[2, 200, 3, 64],
    &[1, 65, 2, 80],
    &[1, 96, 2, 128],
    &[2, 50, 2, 160],
    &[1, 120, 1, 512],
    &[1, 1024, 2, 64],
];

/// `[batch, tokens, context tokens, heads, head size]`
const CROSS_ATTENTION: &[&[usize]] = &[
    &[1, 1, 77, 1, 64],
    &[2, 33, 77, 2, 40],
    &[2, 256, 77, 5, 64],
    &[1, 100, 154, 2, 80],
    &[1, 64, 231, 2, 128],
    &[2, 40, 77, 1, 160],
    &[1, 70, 3, 1, 512],
];

/// `[batch, height, width, channels, channels]`
const PAIRS: &[&[usize]] = &[&[1, 1, 1, 3, 5], &[2, 3, 5, 8, 16], &[2, 16, 16, 320, 640]];

/// `[terms, values]`
const SUMS: &[&[usize]] = &[&[1, 1], &[2, 35], &[3, 4096], &[8, 16384]];

/// Reads as one line an operation.
#[rustfmt::skip]
const CHECKS: &[Check] = &[
    Check { name: "linear", run: |lab, s| lab.linear(s, Activation::None), shapes: LINEAR, in_f32: SUM },
    Check { name: "linear + SiLU", run: |lab, s| lab.linear(s, Activation::Silu), shapes: LINEAR, in_f32: SUM },
    Check { name: "linear + GELU", run: |lab, s| lab.linear(s, Activation::Gelu), shapes: LINEAR, in_f32: SUM },
    Check { name: "linear + quick GELU", run: |lab, s| lab.linear(s, Activation::QuickGelu), shapes: LINEAR, in_f32: SUM },
    Check { name: "linear + GEGLU", run: Lab::geglu, shapes: GEGLU, in_f32: SUM },
    Check { name: "linear + residual", run: Lab::linear_residual, shapes: LINEAR, in_f32: SUM },
    Check { name: "convolution 1x1", run: |lab, s| lab.conv(s, 1, POINT, Plus::Nothing), shapes: CONV, in_f32: SUM },
    Check { name: "convolution 3x3", run: |lab, s| lab.conv(s, 3, Sampling::SAME, Plus::Nothing), shapes: CONV, in_f32: SUM },
    Check { name: "convolution 3x3 + residual", run: |lab, s| lab.conv(s, 3, Sampling::SAME, Plus::Residual), shapes: CONV, in_f32: SUM },
    Check { name: "convolution 3x3 + shift + SiLU", run: |lab, s| lab.conv(s, 3, Sampling::SAME, Plus::Shift), shapes: CONV, in_f32: SUM },
    Check { name: "convolution 3x3 + leaky ReLU", run: |lab, s| lab.conv(s, 3, Sampling::SAME, Plus::LeakyRelu), shapes: CONV, in_f32: SUM },
    Check { name: "convolution 3x3 + PReLU", run: |lab, s| lab.conv(s, 3, Sampling::SAME, Plus::Prelu), shapes: CONV, in_f32: SUM },
    Check { name: "convolution 3x3 of parts", run: Lab::conv_parts, shapes: CONV, in_f32: SUM },
    Check { name: "convolution 3x3, circular", run: Lab::conv_circular, shapes: CONV, in_f32: SUM },
    Check { name: "convolution 3x3, upsampled", run: |lab, s| lab.conv(s, 3, Sampling::DOUBLE, Plus::Nothing), shapes: CONV, in_f32: SUM },
    Check { name: "convolution 3x3, stride 2", run: |lab, s| lab.conv(s, 3, Sampling::HALVE, Plus::Nothing), shapes: HALF, in_f32: SUM },
    Check { name: "convolution 3x3, stride 2 of the VAE", run: |lab, s| lab.conv(s, 3, Sampling::HALVE_VAE, Plus::Nothing), shapes: HALF, in_f32: SUM },
    Check { name: "group norm", run: |lab, s| Ok(lab.group_norm(s)?.0), shapes: NORMED, in_f32: NORM },
    Check { name: "group norm + SiLU", run: |lab, s| { let (_, x, norm) = lab.group_norm(s)?; norm.silu().forward(&x) }, shapes: NORMED, in_f32: NORM },
    Check { name: "group norm of a measured picture", run: Lab::measured_norm, shapes: NORMED, in_f32: NORM },
    Check { name: "layer norm", run: Lab::layer_norm, shapes: NORMED, in_f32: NORM },
    Check { name: "self-attention", run: |lab, s| lab.self_attention(s, Mask::Full), shapes: SELF_ATTENTION, in_f32: NORM },
    Check { name: "self-attention, causal", run: |lab, s| lab.self_attention(s, Mask::Causal), shapes: SELF_ATTENTION, in_f32: NORM },
    Check { name: "cross-attention", run: Lab::cross_attention, shapes: CROSS_ATTENTION, in_f32: NORM },
    Check { name: "channels joined", run: Lab::concat, shapes: PAIRS, in_f32: 0.0 },
    Check { name: "sum of latents (f32)", run: Lab::combine, shapes: SUMS, in_f32: 1e-6 },
];

/// A window of one pixel.
const POINT: Sampling = Sampling {
    stride: 1,
    pad: 0,
    pad_after: 0,
    upsample: 1,
};

/// Runs every check; a row each.
pub(super) fn verify(place: &Placement, scope: Scope, report: &mut dyn FnMut(Row)) {
    for check in CHECKS {
        let shapes = match scope {
            Scope::Quick => &check.shapes[..QUICK.min(check.shapes.len())],
            Scope::Operations | Scope::All => check.shapes,
        };
        // One sum of latents stays in `f32` whatever the model's type is.
        let dtype = if check.name.ends_with("(f32)") {
            DType::F32
        } else {
            place.dtype
        };
        let mut row = Row {
            check: check.name.to_string(),
            error: 0.0,
            tolerance: tolerance(dtype, check.in_f32),
            note: String::new(),
        };
        for (seed, shape) in shapes.iter().enumerate() {
            match compare(check, place, shape, seed as u64) {
                Ok(error) if error > row.error => {
                    (row.error, row.note) = (error, format!("{shape:?}"));
                }
                Ok(_) => {}
                Err(error) => {
                    let note = format!("{shape:?}: {error}");
                    row = Row::failed(check.name, row.tolerance, &note);
                    break;
                }
            }
        }
        report(row);
    }
}

fn compare(check: &Check, place: &Placement, shape: &[usize], seed: u64) -> Result<f64> {
    let got = (check.run)(&mut Lab::new(place, seed), shape)?;
    let want = (check.run)(&mut Lab::new(&Placement::cpu(), seed), shape)?;
    if got.dims() != want.dims() {
        candle_core::bail!("{:?} instead of {:?}", got.dims(), want.dims());
    }
    Ok(relative_error(&host(&got)?, &host(&want)?))
}

/// What a convolution adds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Plus {
    Nothing,
    Residual,
    Shift,
    LeakyRelu,
    Prelu,
}

/// A placement and the values of one check, the same on every placement.
struct Lab {
    place: Placement,
    noise: Generator,
}

impl Lab {
    fn new(place: &Placement, seed: u64) -> Self {
        Self {
            place: place.clone(),
            noise: Generator::new(NoiseSource::Cpu, seed),
        }
    }

    /// Normal values times `scale`, rounded to `bf16`, which `f32` holds and, but for the tiniest, `f16` too.
    fn values(&mut self, count: usize, scale: f32) -> Vec<f32> {
        let rounded = |x: f32| bf16::from_f32(x * scale).to_f32();
        self.noise.normals(count).into_iter().map(rounded).collect()
    }

    fn tensor(&mut self, shape: &[usize]) -> Result<Tensor> {
        let values = self.values(shape.iter().product(), 1.0);
        Tensor::from_vec(values, shape, &self.place.device)?.to_dtype(self.place.dtype)
    }

    /// Of variance 1/inputs, so that sums are about 1.
    fn weight(&mut self, outputs: usize, inputs: usize) -> Vec<f32> {
        self.values(outputs * inputs, (inputs as f32).powf(-0.5))
    }

    fn linear(&mut self, shape: &[usize], activation: Activation) -> Result<Tensor> {
        let (x, layer) = self.linear_layer(shape, Then::Activate(activation))?;
        layer.forward(&x)
    }

    fn geglu(&mut self, shape: &[usize]) -> Result<Tensor> {
        let (x, layer) = self.linear_layer(shape, Then::Geglu)?;
        layer.forward(&x)
    }

    fn linear_residual(&mut self, shape: &[usize]) -> Result<Tensor> {
        let (x, layer) = self.linear_layer(shape, Then::Activate(Activation::None))?;
        let residual = self.tensor(&[1, shape[0], shape[2]])?;
        layer.forward_add(&x, &residual)
    }

    fn linear_layer(&mut self, shape: &[usize], then: Then) -> Result<(Tensor, Linear)> {
        let [rows, inputs, outputs] = sizes(shape)?;
        let (weight, bias) = (self.weight(outputs, inputs), self.values(outputs, 1.0));
        let layer = Linear::new(&self.place, &weight, outputs, Some(&bias), then)?;
        Ok((self.tensor(&[1, rows, inputs])?, layer))
    }

    fn conv(
        &mut self,
        shape: &[usize],
        kernel: usize,
        window: Sampling,
        plus: Plus,
    ) -> Result<Tensor> {
        let [batch, height, width, inputs, outputs] = sizes(shape)?;
        let mut layer = self.conv_layer([outputs, inputs, kernel], window)?;
        let x = self.tensor(&[batch, height, width, inputs])?;
        match plus {
            Plus::Nothing => layer.forward(&x),
            Plus::Residual => {
                let residual = self.tensor(&[batch, height, width, outputs])?;
                layer.forward_add(&x, &residual)
            }
            Plus::Shift => {
                let shift = self.tensor(&[batch, outputs])?;
                layer.then(Activation::Silu).forward_shifted(&x, &shift)
            }
            Plus::LeakyRelu => layer.then(Activation::LeakyRelu).forward(&x),
            Plus::Prelu => {
                let slopes = self.values(outputs, 0.5);
                layer = layer.then_prelu(&self.place, slopes)?;
                layer.forward(&x)
            }
        }
    }

    fn conv_layer(&mut self, sizes: [usize; 3], window: Sampling) -> Result<Conv2d> {
        let [outputs, inputs, kernel] = sizes;
        let weight = self.weight(outputs, inputs * kernel * kernel);
        let bias = self.values(outputs, 1.0);
        Conv2d::new(&self.place, &weight, sizes, Some(&bias), window)
    }

    /// Two pictures side by side, the second of three channels.
    fn conv_parts(&mut self, shape: &[usize]) -> Result<Tensor> {
        let [batch, height, width, inputs, outputs] = sizes(shape)?;
        let layer = self.conv_layer([outputs, inputs + 3, 3], Sampling::SAME)?;
        let (a, b) = (
            self.tensor(&[batch, height, width, inputs])?,
            self.tensor(&[batch, height, width, 3])?,
        );
        let residual = self.tensor(&[batch, height, width, outputs])?;
        layer.forward_parts(&[&a, &b], Some(&residual))
    }

    fn conv_circular(&mut self, shape: &[usize]) -> Result<Tensor> {
        self.place.circular = Arc::new(true.into());
        self.conv(shape, 3, Sampling::SAME, Plus::Nothing)
    }

    /// The result without `SiLU`, the input and the layer.
    fn group_norm(&mut self, shape: &[usize]) -> Result<(Tensor, Tensor, GroupNorm)> {
        let [_, _, _, channels] = sizes(shape)?;
        let (weight, bias) = (self.values(channels, 1.0), self.values(channels, 1.0));
        let norm = GroupNorm::new(&self.place, &weight, &bias, 1e-5)?;
        let x = self.tensor(shape)?;
        Ok((norm.forward(&x)?, x, norm))
    }

    /// The first picture, seen in two strips where it has two rows.
    fn measured_norm(&mut self, shape: &[usize]) -> Result<Tensor> {
        let (_, x, norm) = self.group_norm(shape)?;
        let (picture, mut seen) = (x.narrow(0, 0, 1)?, GroupStatistics::default());
        let cut = picture.dim(1)? / 2;
        for (start, rows) in [(0, cut), (cut, picture.dim(1)? - cut)] {
            if rows > 0 {
                seen.add(&picture.narrow(1, start, rows)?.contiguous()?)?;
            }
        }
        norm.silu().measured(&seen)?.forward(&picture.contiguous()?)
    }

    fn layer_norm(&mut self, shape: &[usize]) -> Result<Tensor> {
        let [_, _, _, channels] = sizes(shape)?;
        let (weight, bias) = (self.values(channels, 1.0), self.values(channels, 1.0));
        let norm = LayerNorm::new(&self.place, &weight, &bias)?;
        norm.forward(&self.tensor(shape)?)
    }

    fn self_attention(&mut self, shape: &[usize], mask: Mask) -> Result<Tensor> {
        let [batch, tokens, heads, head] = sizes(shape)?;
        let qkv = self.tensor(&[batch, tokens, 3 * heads * head])?;
        self_attention(&qkv, heads, mask)
    }

    fn cross_attention(&mut self, shape: &[usize]) -> Result<Tensor> {
        let [batch, tokens, context, heads, head] = sizes(shape)?;
        let q = self.tensor(&[batch, tokens, heads * head])?;
        let kv = self.tensor(&[batch, context, 2 * heads * head])?;
        cross_attention(&q, &kv, heads)
    }

    fn concat(&mut self, shape: &[usize]) -> Result<Tensor> {
        let [batch, height, width, a, b] = sizes(shape)?;
        let (a, b) = (
            self.tensor(&[batch, height, width, a])?,
            self.tensor(&[batch, height, width, b])?,
        );
        concat_channels(&a, &b)
    }

    fn combine(&mut self, shape: &[usize]) -> Result<Tensor> {
        let [terms, count] = sizes(shape)?;
        let mut tensors = Vec::with_capacity(terms);
        for factor in self.values(terms, 1.0) {
            let values = self.values(count, 1.0);
            tensors.push((factor, Tensor::from_vec(values, count, &self.place.device)?));
        }
        combine(&tensors.iter().map(|(c, x)| (*c, x)).collect::<Vec<_>>())
    }
}

/// The numbers of a shape.
fn sizes<const N: usize>(shape: &[usize]) -> Result<[usize; N]> {
    shape
        .try_into()
        .map_err(|_| candle_core::Error::msg(format!("{shape:?} has not {N} sizes")))
}
