//! The operations as the layers ask for them: an answer for a tensor on a CUDA device, silence for any other.

use candle_core::{Device, Result, Tensor};

use super::attention::Call as Attention;
use super::convolution::Call as Convolution;
use super::fp8::Call as LinearE4m3;
use super::geometry::Kind;
use super::linear::Call as Linear;
use super::operand::taken;
use super::{Epilogue, elementwise, engine, norm, staging};
use crate::nn::attention::Mask;
use crate::nn::cpu::count_multiply_adds;
use crate::nn::cpu::rows::Window;
use crate::nn::fp8::Codes;
use crate::nn::layers::{GroupNorm, LayerNorm, Placement, Then};
use crate::nn::stored::Piece;

type Answer = Option<Result<Tensor>>;

/// Rows `[..., c]` side by side, `weight` `[n, sum of c]`.
pub(in crate::nn) fn linear(parts: &[&Tensor], weight: &Tensor, epilogue: &Epilogue<'_>) -> Answer {
    let (device, kind) = taken(parts.first()?)?;
    count_multiply_adds(
        parts.iter().map(|x| x.elem_count()).sum::<usize>() * weight.dim(0).unwrap_or(0),
    );
    let call = Linear::new(kind, parts, weight, epilogue);
    Some(call.and_then(|call| engine::with(device, |engine| call.run(engine))))
}

/// `norm` (if any) of `x` `[..., k]`, by a weight `[n, k]` in e4m3; `then`, plus `residual`.
pub(in crate::nn) fn linear_e4m3(
    x: &Tensor,
    norm: Option<&LayerNorm>,
    weight: &Codes,
    then: Then,
    residual: Option<&Tensor>,
) -> Answer {
    let (device, kind) = taken(x)?;
    let call = LinearE4m3::new(kind, x, norm, weight, then, residual);
    Some(call.and_then(|call| engine::with(device, |engine| call.run(engine))))
}

/// Pictures with their channels side by side, `weight` `[outputs, kernel * kernel * channels]`; `window` tells the sizes of a convolution
/// over a shape.
pub(in crate::nn) fn conv2d(
    parts: &[&Tensor],
    weight: &Tensor,
    epilogue: &Epilogue<'_>,
    window: impl FnOnce([usize; 4]) -> Window,
) -> Answer {
    let (device, kind) = taken(parts.first()?)?;
    let call = Convolution::new(kind, parts, weight, epilogue, window);
    let y = call.and_then(|call| engine::with(device, |engine| call.run(engine)));
    if let Ok(y) = &y {
        count_multiply_adds(y.elem_count() * weight.dim(1).unwrap_or(0));
    }
    Some(y)
}

pub(in crate::nn) fn group_norm(parts: &[&Tensor], norm: &GroupNorm) -> Answer {
    let (device, kind) = taken(parts.first()?)?;
    Some(engine::with(device, |engine| {
        norm::group(engine, kind, parts, norm)
    }))
}

pub(in crate::nn) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Answer {
    let (device, kind) = taken(x)?;
    Some(engine::with(device, |engine| {
        norm::layer(engine, kind, x, [weight, bias], eps)
    }))
}

pub(in crate::nn) fn concat_channels(a: &Tensor, b: &Tensor) -> Answer {
    let (device, kind) = taken(a)?;
    Some(engine::with(device, |engine| {
        elementwise::concat(engine, kind, a, b)
    }))
}

/// A tensor `shape`, written piece by piece: the function gets the number of a first row and the rows from there on.
pub(in crate::nn) fn upload(
    place: &Placement,
    shape: [usize; 2],
    fill: &dyn Fn(usize, Piece<'_>),
) -> Answer {
    let (Device::Cuda(device), Some(kind)) = (&place.device, Kind::of(place.dtype)) else {
        return None;
    };
    if shape.contains(&0) || shape[1] * kind.bytes() > staging::PIECE {
        return None;
    }
    Some(engine::with(device, |engine| {
        staging::tensor(engine, kind, shape, fill)
    }))
}

pub(in crate::nn) fn combine(terms: &[(f32, &Tensor)]) -> Answer {
    let (device, _) = taken(terms.first()?.1)?;
    Some(engine::with(device, |engine| {
        elementwise::combine(engine, terms)
    }))
}

pub(in crate::nn) fn self_attention(qkv: &Tensor, heads: usize, mask: Mask) -> Answer {
    let (device, kind) = taken(qkv)?;
    count_multiply_adds(2 * (qkv.elem_count() / 3) * qkv.dim(1).unwrap_or(0));
    let call = Attention::to_itself(kind, qkv, heads, mask);
    Some(call.and_then(|call| engine::with(device, |engine| call.run(engine))))
}

pub(in crate::nn) fn cross_attention(q: &Tensor, kv: &Tensor, heads: usize) -> Answer {
    let (device, kind) = taken(q)?;
    count_multiply_adds(2 * q.elem_count() * kv.dim(1).unwrap_or(0));
    let call = Attention::to_context(kind, q, kv, heads);
    Some(call.and_then(|call| engine::with(device, |engine| call.run(engine))))
}
