//! The operations as the layers ask for them: an answer for a tensor on a CUDA device, silence for any other.

use candle_core::{Result, Tensor};

use super::attention::Call as Attention;
use super::convolution::Call as Convolution;
use super::linear::Call as Linear;
use super::operand::taken;
use super::{Epilogue, elementwise, engine, norm};
use crate::nn::attention::Mask;
use crate::nn::cpu::count_multiply_adds;
use crate::nn::cpu::rows::Window;
use crate::nn::layers::GroupNorm;

type Answer = Option<Result<Tensor>>;

/// `x` `[..., k]`, `weight` `[n, k]`.
pub(in crate::nn) fn linear(x: &Tensor, weight: &Tensor, epilogue: &Epilogue<'_>) -> Answer {
    let (device, kind) = taken(x)?;
    count_multiply_adds(x.elem_count() * weight.dim(0).unwrap_or(0));
    let call = Linear::new(kind, x, weight, epilogue);
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

pub(in crate::nn) fn group_norm(x: &Tensor, norm: &GroupNorm) -> Answer {
    let (device, kind) = taken(x)?;
    Some(engine::with(device, |engine| {
        norm::group(engine, kind, x, norm)
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
