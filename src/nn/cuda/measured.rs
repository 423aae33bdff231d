//! Group norm of a picture that is seen strip by strip: sums, scales and strips stay on the card, and the host waits for nothing.

use candle_core::{DType, Result, Tensor, bail};

use super::engine::{self, Arg};
use super::geometry::{Grid, GroupGrid, Kind};
use super::operand::{Operand, result, taken, uninitialised};
use crate::nn::group_statistics::DeviceSums;
use crate::nn::layers::GroupNorm;

/// Whether strips like this one are measured on their card.
pub(in crate::nn) fn measures(strip: &Tensor) -> bool {
    taken(strip).is_some()
}

/// The sizes of a strip `[1, height, width, channels]`.
fn shape(strip: &Tensor) -> Result<GroupGrid> {
    let (batch, height, width, channels) = strip.dims4()?;
    Ok(GroupGrid {
        batch,
        pixels: height * width,
        channels,
        groups: 1,
    })
}

/// Adds a strip's sums.
pub(in crate::nn) fn add_sums(strip: &Tensor, seen: &DeviceSums) -> Result<()> {
    let Some((device, kind)) = taken(strip) else {
        bail!("group statistics: a strip on another device than the first")
    };
    let shape = shape(strip)?;
    let (strip, origin) = (Operand::new(strip)?, Operand::new(&seen.origin)?);
    let sums = in_place(&seen.sums)?;
    engine::with(device, |engine| {
        let statistics = shape.statistics(kind, engine.multiprocessors);
        let slices = statistics.blocks[0];
        let partials = uninitialised(device, DType::F32, &[slices, 2, shape.channels])?;
        let args = [
            Arg::Address(strip.address()),
            Arg::Address(origin.address()),
            Arg::Address(partials.address()),
            Arg::Int(shape.pixels),
            Arg::Int(shape.channels),
        ];
        engine.launch(&named("channel_sums", kind), statistics, &args)?;
        let args = [
            Arg::Address(partials.address()),
            Arg::Address(sums.address()),
            Arg::Int(slices),
            Arg::Int(shape.channels),
        ];
        let grid = Grid {
            blocks: [(2 * shape.channels).div_ceil(256), 1, 1],
            threads: 256,
            shared: 0,
        };
        engine.launch("channel_sums_add", grid, &args)
    })
}

/// Means, then scales, per channel, `[2, channels]`, of `pixels` that were seen.
pub(in crate::nn) fn affine(norm: &GroupNorm, seen: &DeviceSums, pixels: usize) -> Result<Tensor> {
    let Some((device, kind)) = taken(&norm.weight) else {
        bail!("group norm: a picture measured on another device")
    };
    let channels = norm.weight.elem_count();
    let (sums, origin) = (in_place(&seen.sums)?, Operand::new(&seen.origin)?);
    let weight = Operand::new(&norm.weight)?;
    let out = uninitialised(device, DType::F32, &[2, channels])?;
    let args = [
        Arg::Address(sums.address()),
        Arg::Address(origin.address()),
        Arg::Address(weight.address()),
        Arg::Address(out.address()),
        Arg::Long(pixels),
        Arg::Int(channels),
        Arg::Int(norm.groups),
        Arg::Float(norm.eps),
    ];
    let grid = Grid {
        blocks: [norm.groups, 1, 1],
        threads: 32,
        shared: 0,
    };
    engine::with(device, |engine| {
        engine.launch(&named("group_affine", kind), grid, &args)
    })?;
    Ok(out.into())
}

/// A strip normalised by [`affine`]'s result and the bias, same shape.
pub(in crate::nn) fn apply_affine(
    strip: &Tensor,
    [affine, bias]: [&Tensor; 2],
    silu: bool,
) -> Result<Tensor> {
    let Some((device, kind)) = taken(strip) else {
        bail!("group norm: a strip on another device than what was measured")
    };
    let shape = shape(strip)?;
    let (bias, affine) = (Operand::like(bias, strip)?, Operand::new(affine)?);
    let strip = Operand::new(strip)?;
    let out = result(device, kind, strip.tensor().dims())?;
    let args = [
        Arg::Address(strip.address()),
        Arg::Address(affine.address()),
        Arg::Address(bias.address()),
        Arg::Address(out.address()),
        Arg::Int(shape.pixels),
        Arg::Int(shape.channels),
        Arg::Flag(silu),
    ];
    engine::with(device, |engine| {
        let grid = Grid {
            shared: 0,
            ..shape.apply(engine.multiprocessors)
        };
        engine.launch(&named("channel_affine", kind), grid, &args)
    })?;
    Ok(out.into())
}

/// A tensor that is written where it lies: a copy of it would take the sums.
fn in_place(tensor: &Tensor) -> Result<Operand> {
    if !tensor.is_contiguous() {
        bail!("sums that are not contiguous: {:?}", tensor.layout());
    }
    Operand::new(tensor)
}

fn named(kernel: &str, kind: Kind) -> String {
    format!("{kernel}_{}", kind.suffix())
}
