//! The operations composed from candle's own, for devices without a fused body, and the oracle the fused bodies are
//! tested against. Same channels-last shapes.

use candle_core::{D, Result, Tensor};

use super::cpu::math::Activation;
use super::window::Sampling;

/// `x wᵀ + b`, `w` being `[out, in]`.
pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.broadcast_matmul(&weight.t()?)?;
    bias.map_or(Ok(y.clone()), |b| y.broadcast_add(b))
}

/// `value * gelu(gate)` of the halves of the last axis, as checkpoints have them.
#[cfg(test)]
pub(super) fn geglu(x: &Tensor) -> Result<Tensor> {
    let halves = x.chunk(2, D::Minus1)?;
    &halves[0] * halves[1].gelu_erf()?
}

/// `value * gelu(gate)` of values and gates in turn.
pub(super) fn geglu_pairs(x: &Tensor) -> Result<Tensor> {
    let mut shape = x.dims().to_vec();
    let pairs = shape.pop().unwrap_or(0) / 2;
    shape.extend([pairs, 2]);
    let pairs = x.reshape(shape)?;
    let part = |i: usize| pairs.narrow(D::Minus1, i, 1)?.squeeze(D::Minus1);
    part(0)? * part(1)?.contiguous()?.gelu_erf()?
}

/// Applies an activation.
pub(super) fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::None => Ok(x.clone()),
        Activation::Silu => candle_nn::ops::silu(x),
        Activation::Gelu => x.gelu_erf(),
        Activation::QuickGelu => x * candle_nn::ops::sigmoid(&(x * 1.702)?)?,
        Activation::Relu => x.relu(),
        Activation::LeakyRelu => x.maximum(&(x * 0.2)?),
    }
}

/// `max(x, 0) + slopes * min(x, 0)`, `slopes` being `[channels]` of the last axis.
pub(super) fn prelu(x: &Tensor, slopes: &Tensor) -> Result<Tensor> {
    x.relu()? - x.neg()?.relu()?.broadcast_mul(slopes)?
}

/// Convolution of `[batch, height, width, in]` with `[out, in, kernel, kernel]`.
pub(super) fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    sampling: Sampling,
    circular: bool,
) -> Result<Tensor> {
    let mut x = x.permute((0, 3, 1, 2))?.contiguous()?;
    if sampling.upsample > 1 {
        let (_, _, h, w) = x.dims4()?;
        x = x.upsample_nearest2d(h * sampling.upsample, w * sampling.upsample)?;
    }
    let after = sampling.pad_after;
    for axis in [2, 3] {
        x = if circular {
            wrap(&x, axis, sampling.pad, after)?
        } else {
            x.pad_with_zeros(axis, sampling.pad, after)?
        };
    }
    let y = x
        .conv2d(weight, 0, sampling.stride, 1, 1)?
        .permute((0, 2, 3, 1))?
        .contiguous()?;
    bias.map_or(Ok(y.clone()), |b| y.broadcast_add(b))
}

fn wrap(x: &Tensor, axis: usize, before: usize, after: usize) -> Result<Tensor> {
    let len = x.dim(axis)?;
    let head = x.narrow(axis, len - before, before)?;
    let tail = x.narrow(axis, 0, after)?;
    Tensor::cat(&[&head, x, &tail], axis)?.contiguous()
}

/// Group norm over `[batch, ..., channels]`.
pub(super) fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f64,
) -> Result<Tensor> {
    let shape = x.shape().clone();
    let (batch, channels) = (x.dim(0)?, x.dim(D::Minus1)?);
    let x = x.reshape((batch, (), groups, channels / groups))?;
    let mean = x.mean_keepdim((1, 3))?;
    let x = x.broadcast_sub(&mean)?;
    let variance = x.sqr()?.mean_keepdim((1, 3))?;
    let x = x
        .broadcast_div(&(variance + eps)?.sqrt()?)?
        .reshape(shape)?;
    x.broadcast_mul(weight)?.broadcast_add(bias)
}

/// `softmax(q kᵀ / sqrt(d)) v` with heads side by side on the last axis.
pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    causal: bool,
) -> Result<Tensor> {
    let split = |x: &Tensor| {
        let (b, t, c) = x.dims3()?;
        x.reshape((b, t, heads, c / heads))?
            .transpose(1, 2)?
            .contiguous()
    };
    let (b, tokens, channels) = q.dims3()?;
    let (q, k, v) = (split(q)?, split(k)?, split(v)?);
    let mut scores = (q.matmul(&k.t()?)? / ((channels / heads) as f64).sqrt())?;
    if causal {
        let mask = (0..tokens * tokens).map(|i| {
            if i % tokens > i / tokens {
                f32::NEG_INFINITY
            } else {
                0.0
            }
        });
        let mask = Tensor::from_iter(mask, scores.device())?
            .reshape((1, 1, tokens, tokens))?
            .to_dtype(scores.dtype())?;
        scores = scores.broadcast_add(&mask)?;
    }
    let y = candle_nn::ops::softmax_last_dim(&scores)?.matmul(&v)?;
    y.transpose(1, 2)?.reshape((b, tokens, channels))
}
