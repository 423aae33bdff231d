//! Linear layers whose weight is e4m3: activations are rounded per token on the way in, in the pass of the norm before where there is
//! one, then cublasLt multiplies.
//!
//! Two ways of the library contend: it applies the scales of rows and columns itself (Hopper), or leaves f32 sums to a kernel of ours
//! that applies them with everything that follows. Ours, the measure of both, widens the codes and multiplies in f32: right, and slow.

use candle_core::{DType, Result, Tensor, bail};

use super::elementwise;
use super::engine::{Arg, Engine};
use super::geometry::{Grid, Kind, ProductShape, activation_number};
use super::lt::{Addresses, Algorithm, Factors, Matmul};
use super::operand::{Operand, nullable, result, uninitialised};
use crate::nn::fp8::Codes;
use crate::nn::layers::{LayerNorm, Then};

/// What a plan is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    kind: Kind,
    shape: ProductShape,
    residual: bool,
}

/// The library's way.
pub(super) enum Plan {
    /// It applies scales and bias.
    Scaled(Algorithm),
    /// It stores f32 sums.
    Sums(Algorithm),
}

/// Rows in e4m3.
struct Rounded {
    codes: Operand,
    scales: Operand,
}

/// A layer's operands and result shape.
pub(super) struct Call<'a> {
    key: Key,
    x: Operand,
    norm: Option<&'a LayerNorm>,
    weight: Rounded,
    bias: Option<Operand>,
    residual: Option<Operand>,
    out: Vec<usize>,
}

impl<'a> Call<'a> {
    /// `x` `[..., k]`.
    pub(super) fn new(
        kind: Kind,
        x: &Tensor,
        norm: Option<&'a LayerNorm>,
        codes: &Codes,
        then: Then,
        residual: Option<&Tensor>,
    ) -> Result<Self> {
        let (n, k) = codes.weight.dims2()?;
        let mut out = x.dims().to_vec();
        if out.pop() != Some(k) {
            bail!("linear: {:?} by a weight of {k} inputs", x.shape());
        }
        if norm.is_some_and(|norm| norm.weight.elem_count() != k) {
            bail!("layer norm: {:?} is not what its weight takes", x.shape());
        }
        let (activation, geglu) = match then {
            Then::Activate(activation) => (activation_number(activation), false),
            Then::Geglu => (0, true),
        };
        let shape = ProductShape {
            m: x.elem_count() / k.max(1),
            n,
            channels: [k, 0],
            window: None,
            rows_per_image: 0,
            activation,
            geglu,
            shift_stride: 0,
        };
        out.push(shape.outputs());
        if residual.is_some_and(|residual| residual.dims() != out.as_slice()) {
            bail!("linear: a residual that is not {out:?}");
        }
        let like = |tensor: Option<&Tensor>| tensor.map(|t| Operand::like(t, x)).transpose();
        Ok(Self {
            key: Key {
                kind,
                shape,
                residual: residual.is_some(),
            },
            x: Operand::new(x)?,
            norm,
            weight: Rounded {
                codes: Operand::new(&codes.weight)?,
                scales: Operand::new(&codes.scales)?,
            },
            bias: like(codes.bias.as_ref())?,
            residual: like(residual)?,
            out,
        })
    }

    /// Queues the layer by the fastest way known for its shape.
    pub(super) fn run(&self, engine: &mut Engine) -> Result<Tensor> {
        let x = self.rounded(engine)?;
        engine.run_planned(
            (self.key.kind, self.key),
            |engine| &mut engine.fp8,
            |engine| self.plans(engine, &x),
            |engine, plan| match plan {
                Some(Plan::Scaled(algorithm)) => self.scaled(engine, algorithm, &x),
                Some(Plan::Sums(algorithm)) => {
                    let Key { shape, .. } = self.key;
                    let sums = uninitialised(engine.device(), DType::F32, &[shape.m, shape.n])?;
                    let none = self.addresses(&x, &sums);
                    algorithm.run(engine, Addresses { bias: 0, ..none })?;
                    self.finish(engine, &x, &sums)
                }
                None => self.by_ours(engine, &x),
            },
        )
    }

    /// The activations, after the norm if there is one.
    fn rounded(&self, engine: &mut Engine) -> Result<Rounded> {
        let Key { kind, shape, .. } = self.key;
        let (rows, channels) = (shape.m, shape.k());
        let rounded = Rounded {
            codes: uninitialised(engine.device(), DType::U8, &[rows, channels])?,
            scales: uninitialised(engine.device(), DType::F32, &[rows])?,
        };
        let result = [
            Arg::Address(rounded.codes.address()),
            Arg::Address(rounded.scales.address()),
            Arg::Int(rows),
            Arg::Int(channels),
        ];
        let grid = Grid::rows(rows);
        match self.norm {
            None => {
                let args = [&[Arg::Address(self.x.address())], result.as_slice()].concat();
                engine.launch(&format!("quantise_rows_{}", kind.suffix()), grid, &args)?;
            }
            Some(norm) => {
                let of_norm = |tensor| Operand::like(tensor, self.x.tensor());
                let (weight, bias) = (of_norm(&norm.weight)?, of_norm(&norm.bias)?);
                let from = [self.x.address(), weight.address(), bias.address()];
                let eps = [Arg::Float(LayerNorm::EPS)];
                let args = [from.map(Arg::Address).as_slice(), &result, &eps].concat();
                engine.launch(&format!("layer_norm_fp8_{}", kind.suffix()), grid, &args)?;
            }
        }
        Ok(rounded)
    }

    /// The library's suggestions of either way.
    fn plans(&self, engine: &Engine, x: &Rounded) -> Result<Vec<Plan>> {
        let Some(library) = &engine.lt else {
            return Ok(Vec::new());
        };
        let scales = [self.weight.scales.address(), x.scales.address()];
        let mut plans = Vec::new();
        let scaled = library.scaled_suggestions(self.matmul(Factors::E4m3Scaled), scales)?;
        plans.extend(scaled.into_iter().map(Plan::Scaled));
        let sums = library.suggestions(self.matmul(Factors::E4m3))?;
        plans.extend(sums.into_iter().map(Plan::Sums));
        Ok(plans)
    }

    /// The part that the library does.
    fn matmul(&self, factors: Factors) -> Matmul {
        let Key {
            kind,
            shape,
            residual,
        } = self.key;
        let scaled = factors == Factors::E4m3Scaled;
        Matmul {
            kind,
            factors,
            m: shape.m,
            n: shape.n,
            k: shape.k(),
            weight_stride: shape.k(),
            bias: scaled && self.bias.is_some(),
            residual: scaled && residual && shape.activation == 0 && !shape.geglu,
        }
    }

    fn addresses(&self, x: &Rounded, out: &Operand) -> Addresses {
        Addresses {
            x: x.codes.address(),
            weight: self.weight.codes.address(),
            scales: [self.weight.scales.address(), x.scales.address()],
            bias: nullable(self.bias.as_ref()),
            residual: nullable(self.residual.as_ref()),
            out: out.address(),
        }
    }

    fn scaled(&self, engine: &mut Engine, algorithm: &Algorithm, x: &Rounded) -> Result<Operand> {
        let Key { kind, shape, .. } = self.key;
        let product = result(engine.device(), kind, &[shape.m, shape.n])?;
        algorithm.run(engine, self.addresses(x, &product))?;
        let late = self.residual.as_ref();
        let late = late.filter(|_| !self.matmul(Factors::E4m3Scaled).residual);
        elementwise::after_product(engine, kind, &shape, product, late, &self.out)
    }

    /// Scales, bias and what follows, on sums `[m, n]` in f32.
    fn finish(&self, engine: &mut Engine, x: &Rounded, sums: &Operand) -> Result<Operand> {
        let Key { kind, shape, .. } = self.key;
        let out = result(engine.device(), kind, &self.out)?;
        let args = [
            Arg::Address(sums.address()),
            Arg::Address(x.scales.address()),
            Arg::Address(self.weight.scales.address()),
            Arg::Address(nullable(self.bias.as_ref())),
            Arg::Address(nullable(self.residual.as_ref())),
            Arg::Address(out.address()),
            Arg::Long(shape.m),
            Arg::Int(shape.n),
            Arg::Int(shape.activation as usize),
            Arg::Flag(shape.geglu),
        ];
        let grid = Grid::strided(shape.m * shape.n / 8, engine.multiprocessors);
        engine.launch(&format!("dequantise_{}", kind.suffix()), grid, &args)?;
        Ok(out)
    }

    fn by_ours(&self, engine: &mut Engine, x: &Rounded) -> Result<Operand> {
        let shape = ProductShape {
            activation: 0,
            geglu: false,
            ..self.key.shape
        };
        let (wide, weight) = (widen(engine, &x.codes)?, widen(engine, &self.weight.codes)?);
        let sums = uninitialised(engine.device(), DType::F32, &[shape.m, shape.n])?;
        let (tile, grid) = shape.grid(Kind::F32, engine.multiprocessors);
        let operands = [
            wide.address(),
            0,
            weight.address(),
            0,
            0,
            0,
            0,
            sums.address(),
        ];
        let mut args = operands.map(Arg::Address).to_vec();
        args.push(Arg::Shape(shape.words()));
        engine.launch(&format!("linear_{tile}x{tile}_f32"), grid, &args)?;
        self.finish(engine, x, &sums)
    }
}

/// Codes as f32.
fn widen(engine: &mut Engine, codes: &Operand) -> Result<Operand> {
    let out = uninitialised(engine.device(), DType::F32, codes.tensor().dims())?;
    let count = codes.tensor().elem_count();
    let args = [
        Arg::Address(codes.address()),
        Arg::Address(out.address()),
        Arg::Long(count),
    ];
    let grid = Grid::strided(count, engine.multiprocessors);
    engine.launch("widen_e4m3", grid, &args)?;
    Ok(out)
}
