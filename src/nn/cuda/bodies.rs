//! The operations as the layers ask for them: an answer for a tensor on a CUDA device, silence for any other.

use candle_core::{Result, Tensor};

use super::attention::Call as Attention;
use super::convolution::Call as Convolution;
use super::fp8::Call as LinearE4m3;
use super::linear::Call as Linear;
use super::operand::taken;
use super::{Epilogue, elementwise, engine, norm};
use crate::nn::attention::Mask;
use crate::nn::cpu::rows::Window;
use crate::nn::fp8::Codes;
use crate::nn::layers::{GroupNorm, LayerNorm, Then};

type Answer = Option<Result<Tensor>>;

/// `x` `[..., k]`, `weight` `[n, k]`.
pub(in crate::nn) fn linear(x: &Tensor, weight: &Tensor, epilogue: &Epilogue<'_>) -> Answer {
    let (device, kind) = taken(x)?;
    let call = Linear::new(kind, x, weight, epilogue);
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
    Some(call.and_then(|call| engine::with(device, |engine| call.run(engine))))
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
    let call = Attention::to_itself(kind, qkv, heads, mask);
    Some(call.and_then(|call| engine::with(device, |engine| call.run(engine))))
}

pub(in crate::nn) fn cross_attention(q: &Tensor, kv: &Tensor, heads: usize) -> Answer {
    let (device, kind) = taken(q)?;
    let call = Attention::to_context(kind, q, kv, heads);
    Some(call.and_then(|call| engine::with(device, |engine| call.run(engine))))
}
