//! Group norm in two passes over the tensor, layer norm in one.

use candle_core::{DType, Result, Tensor, bail};

use super::engine::{Arg, Engine};
use super::geometry::{Grid, GroupGrid, Kind};
use super::operand::{Operand, Parts, nullable, result, uninitialised};
use crate::nn::layers::GroupNorm;

/// `[batch, ..., c]` with their channels side by side, joined in the result.
pub(super) fn group(
    engine: &mut Engine,
    kind: Kind,
    parts: &[&Tensor],
    norm: &GroupNorm,
) -> Result<Tensor> {
    let parts = Parts::new(parts)?;
    let channels = norm.weight.elem_count();
    let mut dims = parts.lead.clone();
    dims.push(channels);
    if parts.channels.iter().sum::<usize>() != channels || dims.len() < 2 {
        bail!("group norm: {dims:?} of {:?}", parts.channels);
    }
    let shape = GroupGrid {
        batch: dims[0],
        pixels: dims[1..dims.len() - 1].iter().product(),
        channels,
        groups: norm.groups,
    };
    let (weight, bias) = (
        Operand::like(&norm.weight, parts.x.tensor())?,
        Operand::like(&norm.bias, parts.x.tensor())?,
    );
    let slices = shape.slices(engine.multiprocessors);
    let partials = statistics(engine, kind, &parts, shape)?;
    let out = result(engine.device(), kind, &dims)?;
    let apply = [
        Arg::Address(parts.x.address()),
        Arg::Address(nullable(parts.x2.as_ref())),
        Arg::Address(partials.address()),
        Arg::Address(weight.address()),
        Arg::Address(bias.address()),
        Arg::Address(out.address()),
        Arg::Int(shape.pixels),
        Arg::Int(parts.channels[0]),
        Arg::Int(parts.channels[1]),
        Arg::Int(norm.groups),
        Arg::Int(slices),
        Arg::Float(norm.eps),
        Arg::Flag(norm.silu),
    ];
    let grid = shape.apply(engine.multiprocessors);
    engine.launch(&format!("group_norm_apply_{}", kind.suffix()), grid, &apply)?;
    Ok(out.into())
}

/// Mean and squared deviations of each group, `[batch, slices, groups, 2]`.
fn statistics(engine: &mut Engine, kind: Kind, parts: &Parts, shape: GroupGrid) -> Result<Operand> {
    let slices = shape.slices(engine.multiprocessors);
    let partials = uninitialised(
        engine.device(),
        DType::F32,
        &[shape.batch, slices, shape.groups, 2],
    )?;
    let statistics = [
        Arg::Address(parts.x.address()),
        Arg::Address(nullable(parts.x2.as_ref())),
        Arg::Address(partials.address()),
        Arg::Int(shape.pixels),
        Arg::Int(parts.channels[0]),
        Arg::Int(parts.channels[1]),
        Arg::Int(shape.groups),
    ];
    let grid = shape.statistics(kind, engine.multiprocessors);
    engine.launch(
        &format!("group_norm_statistics_{}", kind.suffix()),
        grid,
        &statistics,
    )?;
    Ok(partials)
}

/// Over the last axis, same shape out.
pub(super) fn layer(
    engine: &mut Engine,
    kind: Kind,
    x: &Tensor,
    [weight, bias]: [&Tensor; 2],
    eps: f32,
) -> Result<Tensor> {
    let channels = weight.elem_count();
    if x.dims().last() != Some(&channels) {
        bail!("layer norm: {:?}, weight takes {channels}", x.shape());
    }
    let rows = x.elem_count() / channels;
    let (x, weight, bias) = (
        Operand::new(x)?,
        Operand::like(weight, x)?,
        Operand::like(bias, x)?,
    );
    let out = result(engine.device(), kind, x.tensor().dims())?;
    let args = [
        Arg::Address(x.address()),
        Arg::Address(weight.address()),
        Arg::Address(bias.address()),
        Arg::Address(out.address()),
        Arg::Int(rows),
        Arg::Int(channels),
        Arg::Float(eps),
    ];
    engine.launch(
        &format!("layer_norm_{}", kind.suffix()),
        Grid::rows(rows),
        &args,
    )?;
    Ok(out.into())
}
