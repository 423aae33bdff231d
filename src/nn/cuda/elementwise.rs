//! Passes over a tensor without products: joining, gating, what a library's product leaves undone.

use candle_core::{Result, Tensor, bail};

use super::engine::{Arg, Engine};
use super::geometry::{Grid, Kind, ProductShape};
use super::operand::{Operand, nullable, result};
use crate::nn::combine::MOST_TERMS;

/// `[..., a]` and `[..., b]` to `[..., a + b]`.
pub(super) fn concat(engine: &mut Engine, kind: Kind, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (mut shape, other) = (a.dims().to_vec(), b.dims());
    let (Some(channels_a), Some(&channels_b)) = (shape.pop(), other.last()) else {
        bail!("concat: scalar input")
    };
    if shape != other[..other.len() - 1] {
        bail!("concat: {:?} and {:?}", a.shape(), b.shape());
    }
    shape.push(channels_a + channels_b);
    let (a, b) = (Operand::new(a)?, Operand::like(b, a)?);
    let out = result(engine.device(), kind, &shape)?;
    let pixels = out.tensor().elem_count() / (channels_a + channels_b);
    let args = [
        Arg::Address(a.address()),
        Arg::Address(b.address()),
        Arg::Address(out.address()),
        Arg::Long(pixels),
        Arg::Int(channels_a),
        Arg::Int(channels_b),
    ];
    let grid = Grid::strided(out.tensor().elem_count(), engine.multiprocessors);
    engine.launch(&format!("concat_channels_{}", kind.suffix()), grid, &args)?;
    Ok(out.into())
}

/// `out [rows, channels] = value * gelu(gate)` of `x [rows, channels, 2]`.
pub(super) fn geglu_pairs(
    engine: &mut Engine,
    kind: Kind,
    x: &Operand,
    out: &Operand,
    [rows, channels]: [usize; 2],
) -> Result<()> {
    let args = [
        Arg::Address(x.address()),
        Arg::Address(out.address()),
        Arg::Long(rows * channels),
    ];
    let grid = Grid::strided(rows * channels / 4, engine.multiprocessors);
    engine.launch(&format!("geglu_pairs_{}", kind.suffix()), grid, &args)
}

/// `x += other`.
pub(super) fn add(engine: &mut Engine, kind: Kind, x: &Operand, other: &Operand) -> Result<()> {
    let count = x.tensor().elem_count();
    let args = [
        Arg::Address(x.address()),
        Arg::Address(other.address()),
        Arg::Address(x.address()),
        Arg::Long(count),
    ];
    let grid = Grid::strided(count, engine.multiprocessors);
    engine.launch(&format!("add_{}", kind.suffix()), grid, &args)
}

/// `sum of c * x` over up to eight tensors of `f32` of one shape.
pub(super) fn combine(engine: &mut Engine, terms: &[(f32, &Tensor)]) -> Result<Tensor> {
    let operands = terms.iter().map(|(_, x)| Operand::new(x));
    let operands = operands.collect::<Result<Vec<_>>>()?;
    let shape = terms[0].1.dims();
    let out = result(engine.device(), Kind::F32, shape)?;
    let count = out.tensor().elem_count();
    let mut args = vec![Arg::Address(out.address())];
    args.extend((0..MOST_TERMS).map(|i| Arg::Address(nullable(operands.get(i)))));
    let factor = |i| terms.get(i).map_or(0.0, |(c, _)| *c);
    args.extend((0..MOST_TERMS).map(|i| Arg::Float(factor(i))));
    args.extend([Arg::Int(terms.len()), Arg::Long(count)]);
    let grid = Grid::strided(count, engine.multiprocessors);
    engine.launch("combine_latents", grid, &args)?;
    Ok(out.into())
}

/// `x = activation(x) [+ residual]`, in place.
pub(super) fn finish(
    engine: &mut Engine,
    kind: Kind,
    x: &Operand,
    residual: Option<&Operand>,
    [rows, channels]: [usize; 2],
    activation: i32,
) -> Result<()> {
    let args = [
        Arg::Address(x.address()),
        Arg::Address(0),
        Arg::Address(0),
        Arg::Address(0),
        Arg::Address(nullable(residual)),
        Arg::Address(x.address()),
        Arg::Long(rows),
        Arg::Int(channels),
        Arg::Int(rows),
        Arg::Int(activation as usize),
    ];
    let grid = Grid::strided(rows * channels, engine.multiprocessors);
    engine.launch(&format!("finish_{}", kind.suffix()), grid, &args)
}

/// What a library left undone after a product `[m, n]` with bias: gating or activation, then `late` (a residual that the library has
/// not added). The result has the dimensions `out`.
pub(super) fn after_product(
    engine: &mut Engine,
    kind: Kind,
    shape: &ProductShape,
    product: Operand,
    late: Option<&Operand>,
    out: &[usize],
) -> Result<Operand> {
    if shape.geglu {
        let out = result(engine.device(), kind, out)?;
        geglu_pairs(engine, kind, &product, &out, [shape.m, shape.outputs()])?;
        if let Some(residual) = late {
            add(engine, kind, &out, residual)?;
        }
        return Ok(out);
    }
    if shape.activation != 0 || late.is_some() {
        let size = [shape.m, shape.n];
        finish(engine, kind, &product, late, size, shape.activation)?;
    }
    Operand::new(&Tensor::from(product).reshape(out)?)
}

/// A picture `[batch, height, width, channels]` twice as high and wide.
pub(super) fn upsample(engine: &mut Engine, kind: Kind, x: &Operand) -> Result<Operand> {
    let (batch, height, width, channels) = x.tensor().dims4()?;
    let out = result(
        engine.device(),
        kind,
        &[batch, 2 * height, 2 * width, channels],
    )?;
    let args = [
        Arg::Address(x.address()),
        Arg::Address(out.address()),
        Arg::Int(batch),
        Arg::Int(height),
        Arg::Int(width),
        Arg::Int(channels),
    ];
    let grid = Grid::strided(out.tensor().elem_count(), engine.multiprocessors);
    engine.launch(&format!("upsample_nearest_{}", kind.suffix()), grid, &args)?;
    Ok(out)
}
