//! Linear layers: the one place that decides between cublasLt and our kernel, and what the epilogue costs with either.
//!
//! Ours does everything in one launch. The library adds bias and residual; what it cannot (an exact GELU, gating, a residual after an
//! activation) is one more pass by a kernel of ours.

use candle_core::{Result, Tensor, bail};

use super::elementwise;
use super::engine::{Arg, Engine};
use super::geometry::{Kind, ProductShape, activation_number};
use super::lt::{Addresses, Algorithm, Factors, Lt, Matmul};
use super::operand::{Operand, Parts, nullable, result};
use super::{Epilogue, Second};
use crate::nn::layers::Then;

/// What a plan is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    kind: Kind,
    shape: ProductShape,
    bias: bool,
    residual: bool,
}

/// The library's way, a product for each part; without a plan ours runs.
pub(super) struct Plan(Vec<Algorithm>);

/// A layer's operands and result shape.
pub(super) struct Call {
    key: Key,
    parts: Parts,
    weight: Operand,
    bias: Option<Operand>,
    residual: Option<Operand>,
    out: Vec<usize>,
}

impl Call {
    /// Rows `[..., c]` side by side, `weight` `[n, sum of c]`.
    pub(super) fn new(
        kind: Kind,
        parts: &[&Tensor],
        weight: &Tensor,
        epilogue: &Epilogue<'_>,
    ) -> Result<Self> {
        let (n, k) = weight.dims2()?;
        let parts = Parts::new(parts)?;
        let mut out = parts.lead.clone();
        if parts.channels.iter().sum::<usize>() != k {
            bail!(
                "linear: {out:?} x {:?} by a weight of {k} inputs",
                parts.channels
            );
        }
        let residual = match epilogue.second {
            Second::None => None,
            Second::Residual(tensor) => Some(tensor),
            Second::PerImage(_) => bail!("linear: a shift per image"),
        };
        let (activation, geglu) = match epilogue.then {
            Then::Activate(activation) => (activation_number(activation), false),
            Then::Geglu => (0, true),
        };
        let shape = ProductShape {
            m: out.iter().product(),
            n,
            channels: parts.channels,
            window: None,
            rows_per_image: 0,
            activation,
            geglu,
            shift_stride: 0,
        };
        out.push(shape.outputs());
        if residual.is_some_and(|residual| residual.dims() != out.as_slice()) {
            bail!(
                "linear: a residual {:?} for {out:?}",
                residual.map(Tensor::shape)
            );
        }
        let x = parts.x.tensor();
        let like = |tensor: Option<&Tensor>| tensor.map(|t| Operand::like(t, x)).transpose();
        Ok(Self {
            key: Key {
                kind,
                shape,
                bias: epilogue.bias.is_some(),
                residual: residual.is_some(),
            },
            weight: Operand::like(weight, x)?,
            bias: like(epilogue.bias)?,
            residual: like(residual)?,
            parts,
            out,
        })
    }

    /// Queues the layer by the fastest way known for its shape.
    pub(super) fn run(&self, engine: &mut Engine) -> Result<Tensor> {
        engine.run_planned(
            (self.key.kind, self.key),
            |engine| &mut engine.linear,
            |engine| match &engine.lt {
                Some(library) => self.key.plans(library),
                None => Ok(Vec::new()),
            },
            |engine, plan| self.queue(engine, plan),
        )
    }

    fn queue(&self, engine: &mut Engine, plan: Option<&Plan>) -> Result<Operand> {
        match plan {
            Some(Plan(algorithms)) => self.by_library(engine, algorithms),
            None => self.by_ours(engine),
        }
    }

    fn by_ours(&self, engine: &mut Engine) -> Result<Operand> {
        let Key { kind, shape, .. } = self.key;
        let out = result(engine.device(), kind, &self.out)?;
        let (tile, grid) = shape.grid(kind, engine.multiprocessors);
        let args = [
            Arg::Address(self.parts.x.address()),
            Arg::Address(nullable(self.parts.x2.as_ref())),
            Arg::Address(self.weight.address()),
            Arg::Address(nullable(self.bias.as_ref())),
            Arg::Address(0),
            Arg::Address(0),
            Arg::Address(nullable(self.residual.as_ref())),
            Arg::Address(out.address()),
            Arg::Shape(shape.words()),
        ];
        engine.launch(
            &format!("linear_{tile}x{tile}_{}", kind.suffix()),
            grid,
            &args,
        )?;
        Ok(out)
    }

    fn by_library(&self, engine: &mut Engine, algorithms: &[Algorithm]) -> Result<Operand> {
        let Key { kind, shape, .. } = self.key;
        let product = result(engine.device(), kind, &[shape.m, shape.n])?;
        let mut at = Addresses {
            x: self.parts.x.address(),
            weight: self.weight.address(),
            scales: [0, 0],
            bias: nullable(self.bias.as_ref()),
            residual: nullable(self.residual.as_ref()),
            out: product.address(),
        };
        for algorithm in algorithms {
            algorithm.run(engine, at)?;
            // The next part adds to it.
            at = Addresses {
                x: nullable(self.parts.x2.as_ref()),
                weight: at.weight + (shape.channels[0] * kind.bytes()) as u64,
                residual: at.out,
                ..at
            };
        }
        let late = self
            .residual
            .as_ref()
            .filter(|_| !self.key.matmul().residual);
        elementwise::after_product(engine, kind, &shape, product, late, &self.out)
    }
}

impl Key {
    /// The library's ways: one product, or of two parts a second one that adds to the first.
    fn plans(&self, library: &Lt) -> Result<Vec<Plan>> {
        let first = self.matmul();
        let suggestions = library.suggestions(first)?.into_iter();
        let [_, beside] = self.shape.channels;
        if beside == 0 {
            return Ok(suggestions.map(|first| Plan(vec![first])).collect());
        }
        let second = Matmul {
            k: beside,
            bias: false,
            residual: true,
            ..first
        };
        let pairs = suggestions.zip(library.suggestions(second)?);
        Ok(pairs
            .map(|(first, second)| Plan(vec![first, second]))
            .collect())
    }

    /// The part that the library does, with the first input.
    fn matmul(&self) -> Matmul {
        Matmul {
            kind: self.kind,
            factors: Factors::OfKind,
            m: self.shape.m,
            n: self.shape.n,
            k: self.shape.channels[0],
            weight_stride: self.shape.k(),
            bias: self.bias,
            // Added before an activation it would be another number.
            residual: self.residual && self.shape.activation == 0 && !self.shape.geglu,
        }
    }
}
