//! Convolutions: the one place that decides between cuDNN and our kernel.
//!
//! Ours reads two pictures side by side, enlarged or wrapped, and does every epilogue in one launch. The library's graph is convolution,
//! residual or shift, bias, with everything between them in f32; an enlargement before it is a pass of ours. The library's f32
//! convolutions round to TF32, so f32 is ours alone.

use candle_core::{Result, Tensor, bail};

use super::cudnn::{self, Attribute, Descriptor, Place, SINGLE, TensorOf};
use super::elementwise;
use super::engine::{Arg, Engine};
use super::geometry::{Kind, ProductShape, WindowShape, activation_number};
use super::operand::{Operand, Parts, nullable, result};
use super::{Epilogue, Second};
use crate::nn::cpu::rows::Window;
use crate::nn::layers::Then;

/// What a plan is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    kind: Kind,
    shape: ProductShape,
    bias: bool,
    slopes: bool,
    second: Added,
}

/// [`Second`] without its tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Added {
    Nothing,
    Residual,
    /// Values from one image's to the next's.
    Shift(usize),
}

/// The library's way; without a plan ours runs.
pub(super) struct Plan(cudnn::Plan);

/// A layer's operands and result shape.
pub(super) struct Call {
    key: Key,
    window: WindowShape,
    parts: Parts,
    weight: Operand,
    bias: Option<Operand>,
    slopes: Option<Operand>,
    second: Option<Operand>,
    out: [usize; 4],
}

/// Names of the tensors in the library's graph.
const X: i64 = 1;
const WEIGHT: i64 = 2;
const SECOND: i64 = 3;
const BIAS: i64 = 4;
const OUT: i64 = 5;
const BETWEEN: i64 = 10;

impl Call {
    pub(super) fn new(
        kind: Kind,
        parts: &[&Tensor],
        weight: &Tensor,
        epilogue: &Epilogue<'_>,
        window: impl FnOnce([usize; 4]) -> Window,
    ) -> Result<Self> {
        let parts = Parts::new(parts)?;
        let &[batch, height, width] = parts.lead.as_slice() else {
            bail!("conv2d: {:?} is no picture", parts.x.tensor().shape())
        };
        let channels = parts.channels[0] + parts.channels[1];
        let window = WindowShape::from(window([batch, height, width, channels]));
        let Then::Activate(activation) = epilogue.then else {
            bail!("conv2d: a gated convolution")
        };
        let (n, k) = weight.dims2()?;
        let out = [batch, window.out[0], window.out[1], n];
        let mut shape = ProductShape {
            m: batch * window.out[0] * window.out[1],
            n,
            channels: parts.channels,
            window: Some(window),
            rows_per_image: window.out[0] * window.out[1],
            activation: activation_number(activation),
            geglu: false,
            shift_stride: 0,
        };
        if shape.k() != k {
            bail!("conv2d: {channels} channels, weight takes {k} values");
        }
        let x = parts.x.tensor();
        let (added, second) = second(epilogue.second, out, x)?;
        if let Added::Shift(stride) = added {
            shape.shift_stride = stride;
        }
        let like = |tensor: Option<&Tensor>| tensor.map(|t| Operand::like(t, x)).transpose();
        Ok(Self {
            key: Key {
                kind,
                shape,
                bias: epilogue.bias.is_some(),
                slopes: epilogue.slopes.is_some(),
                second: added,
            },
            window,
            weight: Operand::like(weight, x)?,
            bias: like(epilogue.bias)?,
            slopes: like(epilogue.slopes)?,
            second,
            parts,
            out,
        })
    }

    /// Queues the layer by the fastest way known for its shape.
    pub(super) fn run(&self, engine: &mut Engine) -> Result<Tensor> {
        engine.run_planned(
            (self.key.kind, self.key),
            |engine| &mut engine.convolutions,
            |engine| {
                let library = engine.dnn.as_ref().filter(|_| self.key.is_for_library());
                Ok(cudnn::or_none(library, |library| self.plans(library)))
            },
            |engine, plan| self.queue(engine, plan),
        )
    }

    fn queue(&self, engine: &mut Engine, plan: Option<&Plan>) -> Result<Operand> {
        match plan {
            Some(Plan(plan)) => self.by_library(engine, plan),
            None => self.by_ours(engine),
        }
    }

    fn by_ours(&self, engine: &mut Engine) -> Result<Operand> {
        let Key {
            kind,
            shape,
            second,
            ..
        } = self.key;
        let out = result(engine.device(), kind, &self.out)?;
        let (tile, grid) = shape.grid(kind, engine.multiprocessors);
        let address = nullable(self.second.as_ref());
        let (shift, residual) = match second {
            Added::Shift(_) => (address, 0),
            Added::Residual | Added::Nothing => (0, address),
        };
        let args = [
            Arg::Address(self.parts.x.address()),
            Arg::Address(nullable(self.parts.x2.as_ref())),
            Arg::Address(self.weight.address()),
            Arg::Address(nullable(self.bias.as_ref())),
            Arg::Address(shift),
            Arg::Address(nullable(self.slopes.as_ref())),
            Arg::Address(residual),
            Arg::Address(out.address()),
            Arg::Shape(shape.words()),
        ];
        engine.launch(
            &format!("conv_{tile}x{tile}_{}", kind.suffix()),
            grid,
            &args,
        )?;
        Ok(out)
    }

    fn by_library(&self, engine: &mut Engine, plan: &cudnn::Plan) -> Result<Operand> {
        let enlarged;
        let x = if self.window.upsample == 2 {
            enlarged = elementwise::upsample(engine, self.key.kind, &self.parts.x)?;
            &enlarged
        } else {
            &self.parts.x
        };
        let out = result(engine.device(), self.key.kind, &self.out)?;
        let mut at = vec![
            (X, x.address()),
            (WEIGHT, self.weight.address()),
            (OUT, out.address()),
        ];
        at.extend(
            self.second
                .as_ref()
                .map(|second| (SECOND, second.address())),
        );
        at.extend(self.bias.as_ref().map(|bias| (BIAS, bias.address())));
        plan.run(engine, &at)?;
        Ok(out)
    }

    /// The library's graph: `x * weight [+ second] [+ bias]`.
    fn plans(&self, library: &cudnn::Dnn) -> Result<Vec<Plan>> {
        let w = self.window;
        let [batch, height, width, outputs] = self.out.map(|n| n as i64);
        let channels = self.key.shape.channels[0] as i64;
        let [from_height, from_width] = w.size.map(|side| (side * w.upsample) as i64);
        let kernel = w.kernel as i64;
        let image = |id, place, dims: [i64; 4]| tensor(self.key.kind, id, place, dims);
        let x = image(X, Place::Device, [batch, channels, from_height, from_width])?;
        let weight = image(WEIGHT, Place::Device, [outputs, channels, kernel, kernel])?;
        let convolution = self.window_descriptor()?;
        let terms = self.terms()?;
        // The product, then the sum after each term; the last one is the result.
        let sums = (0..=terms.len()).map(|i| {
            let (id, place) = if i == terms.len() {
                (OUT, Place::Device)
            } else {
                (BETWEEN + i as i64, Place::Nowhere)
            };
            image(id, place, [batch, outputs, height, width])
        });
        let sums = sums.collect::<Result<Vec<_>>>()?;
        let mut nodes = vec![product([&x, &weight, &sums[0]], &convolution)?];
        let addition = Descriptor::new(cudnn::Kind::CUDNN_BACKEND_POINTWISE_DESCRIPTOR)?
            .addition(Attribute::CUDNN_ATTR_POINTWISE_MODE)?
            .data_type(Attribute::CUDNN_ATTR_POINTWISE_MATH_PREC, SINGLE)?
            .finalise()?;
        for (i, term) in terms.iter().enumerate() {
            nodes.push(sum(&addition, [&sums[i], term, &sums[i + 1]])?);
        }
        let mut parts = vec![x, weight, convolution, addition];
        parts.extend(terms);
        parts.extend(sums);
        Ok(library.plans(nodes, parts)?.into_iter().map(Plan).collect())
    }

    /// How the window moves.
    fn window_descriptor(&self) -> Result<Descriptor> {
        let w = self.window;
        let [_, height, width, _] = self.out.map(|n| n as i64);
        let [from_height, from_width] = w.size.map(|side| (side * w.upsample) as i64);
        let (kernel, stride, pad) = (w.kernel as i64, w.stride as i64, w.pad as i64);
        let after = |out: i64, from: i64| (out - 1) * stride + kernel - from - pad;
        Descriptor::new(cudnn::Kind::CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR)?
            .data_type(Attribute::CUDNN_ATTR_CONVOLUTION_COMP_TYPE, SINGLE)?
            .cross_correlation(Attribute::CUDNN_ATTR_CONVOLUTION_CONV_MODE)?
            .integers(Attribute::CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, &[2])?
            .integers(Attribute::CUDNN_ATTR_CONVOLUTION_DILATIONS, &[1, 1])?
            .integers(
                Attribute::CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES,
                &[stride, stride],
            )?
            .integers(Attribute::CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, &[pad, pad])?
            .integers(
                Attribute::CUDNN_ATTR_CONVOLUTION_POST_PADDINGS,
                &[after(height, from_height), after(width, from_width)],
            )?
            .finalise()
    }

    /// What is added to the product, in order.
    fn terms(&self) -> Result<Vec<Descriptor>> {
        let [batch, height, width, outputs] = self.out.map(|n| n as i64);
        let image = |id, dims: [i64; 4]| tensor(self.key.kind, id, Place::Device, dims);
        let mut terms = Vec::new();
        match self.key.second {
            Added::Nothing => {}
            Added::Residual => terms.push(image(SECOND, [batch, outputs, height, width])?),
            Added::Shift(stride) => terms.push(
                TensorOf {
                    id: SECOND,
                    kind: self.key.kind,
                    dims: &[batch, outputs, 1, 1],
                    strides: &[stride as i64, 1, outputs, outputs],
                    place: Place::Device,
                }
                .build()?,
            ),
        }
        if self.key.bias {
            terms.push(image(BIAS, [1, outputs, 1, 1])?);
        }
        Ok(terms)
    }
}

/// The node of `y = x * weight`.
fn product([x, weight, y]: [&Descriptor; 3], convolution: &Descriptor) -> Result<Descriptor> {
    Descriptor::new(cudnn::Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR)?
        .descriptors(Attribute::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X, &[x])?
        .descriptors(
            Attribute::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W,
            &[weight],
        )?
        .descriptors(Attribute::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y, &[y])?
        .descriptors(
            Attribute::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC,
            &[convolution],
        )?
        .float(
            Attribute::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA,
            1.0,
        )?
        .float(
            Attribute::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA,
            0.0,
        )?
        .finalise()
}

/// What is added to a result of shape `out` `[batch, height, width, outputs]` and of `x`'s type.
fn second(second: Second<'_>, out: [usize; 4], x: &Tensor) -> Result<(Added, Option<Operand>)> {
    let [batch, .., outputs] = out;
    match second {
        Second::None => Ok((Added::Nothing, None)),
        Second::Residual(tensor) if tensor.dims() == out => {
            Ok((Added::Residual, Some(Operand::like(tensor, x)?)))
        }
        Second::PerImage(tensor) if tensor.dims() == [batch, outputs] => {
            let (rows, stride) = Operand::rows_like(tensor, x)?;
            Ok((Added::Shift(stride), Some(rows)))
        }
        Second::Residual(tensor) | Second::PerImage(tensor) => {
            bail!("conv2d: {:?} added to {out:?}", tensor.shape())
        }
    }
}

impl Key {
    fn is_for_library(&self) -> bool {
        let plain = self
            .shape
            .window
            .is_some_and(|w| !w.circular && w.upsample <= 2);
        self.kind != Kind::F32
            && plain
            && self.shape.channels[1] == 0
            && self.shape.activation == 0
            && !self.slopes
    }
}

/// `a + b = out`.
fn sum(addition: &Descriptor, [a, b, out]: [&Descriptor; 3]) -> Result<Descriptor> {
    Descriptor::new(cudnn::Kind::CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR)?
        .descriptors(
            Attribute::CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR,
            &[addition],
        )?
        .descriptors(Attribute::CUDNN_ATTR_OPERATION_POINTWISE_XDESC, &[a])?
        .descriptors(Attribute::CUDNN_ATTR_OPERATION_POINTWISE_BDESC, &[b])?
        .descriptors(Attribute::CUDNN_ATTR_OPERATION_POINTWISE_YDESC, &[out])?
        .finalise()
}

/// `[batch, channels, height, width]` by name, channels last in memory.
fn tensor(kind: Kind, id: i64, place: Place, dims: [i64; 4]) -> Result<Descriptor> {
    let [_, channels, height, width] = dims;
    TensorOf {
        id,
        kind,
        dims: &dims,
        strides: &[height * width * channels, 1, width * channels, channels],
        place,
    }
    .build()
}
