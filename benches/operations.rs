//! Operations of the models at SDXL's shapes, batch of 2 (both halves of the guidance), on the CPU in f32 and bf16.
//!
//! `cargo bench --bench operations`. A name says operation, device, type and shape; elements per second are floating-point
//! operations, so `Gelem/s` reads as GFLOP/s. `sdgen bench --operations` times more shapes with less statistics.

use std::hint::black_box;

use candle_core::{DType, Device, Result, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sdgen::nn::{
    Activation, Conv2d, GroupNorm, Linear, Mask, Placement, Sampling, Then, cross_attention,
    self_attention,
};

/// Values without pattern and without a random generator.
fn wave(n: usize, scale: f32) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 1.7).sin() * scale).collect()
}

fn tensor(dtype: DType, shape: &[usize]) -> Tensor {
    let values = wave(shape.iter().product(), 1.0);
    Tensor::from_vec(values, shape, &Device::Cpu)
        .and_then(|values| values.to_dtype(dtype))
        .expect("values of this shape")
}

fn place(dtype: DType) -> Placement {
    Placement {
        dtype,
        ..Placement::cpu()
    }
}

/// Times `run`, which makes `flop` floating-point operations.
fn time(
    c: &mut Criterion,
    dtype: DType,
    name: &str,
    flop: usize,
    run: impl Fn() -> Result<Tensor>,
) {
    let mut group = c.benchmark_group(format!("cpu {}", dtype.as_str()));
    group.sample_size(10);
    if flop > 0 {
        group.throughput(Throughput::Elements(flop as u64));
    }
    group.bench_function(name, |b| {
        b.iter(|| {
            let out = run().expect("shapes that fit");
            out.device().synchronize().expect("a device that answers");
            black_box(out)
        });
    });
    group.finish();
}

fn attention(c: &mut Criterion, dtype: DType) {
    for (tokens, heads) in [(1024, 10), (256, 20)] {
        let channels = heads * 64;
        let qkv = tensor(dtype, &[2, tokens, 3 * channels]);
        time(
            c,
            dtype,
            &format!("self-attention [2, {tokens}, {channels}]"),
            2 * 4 * tokens * tokens * channels,
            || self_attention(&qkv, heads, Mask::Full),
        );
        let (q, kv) = (
            tensor(dtype, &[2, tokens, channels]),
            tensor(dtype, &[2, 77, 2 * channels]),
        );
        time(
            c,
            dtype,
            &format!("cross-attention [2, {tokens}, {channels}] to 77"),
            2 * 4 * tokens * 77 * channels,
            || cross_attention(&q, &kv, heads),
        );
    }
}

/// The two halves of a residual block without its time embedding: norm, activation, convolution, twice, and the sum.
fn residual_block(c: &mut Criterion, dtype: DType) {
    let place = place(dtype);
    for (channels, side) in [(320, 64), (640, 32), (1280, 16)] {
        let weight = wave(channels * channels * 9, 0.02);
        let conv = || {
            Conv2d::new(
                &place,
                &weight,
                [channels, channels, 3],
                Some(&weight[..channels]),
                Sampling::SAME,
            )
            .expect("a weight of this shape")
        };
        let norm = || {
            GroupNorm::new(&place, &weight[..channels], &weight[..channels], 1e-5)
                .expect("a weight of this shape")
                .silu()
        };
        let (first, second, before, between) = (conv(), conv(), norm(), norm());
        let x = tensor(dtype, &[2, side, side, channels]);
        time(
            c,
            dtype,
            &format!("residual block [2, {side}, {side}, {channels}]"),
            2 * 2 * 2 * side * side * channels * channels * 9,
            || {
                let h = first.forward(&before.forward(&x)?)?;
                second.forward_add(&between.forward(&h)?, &x)
            },
        );
    }
}

/// The feed-forward part of a transformer block.
fn feed_forward(c: &mut Criterion, dtype: DType) {
    let place = place(dtype);
    for (tokens, channels) in [(1024, 640), (256, 1280)] {
        let inner = 4 * channels;
        let up = wave(2 * inner * channels, 0.02);
        let up = Linear::new(&place, &up, 2 * inner, None, Then::Geglu);
        let down = wave(inner * channels, 0.02);
        let plain = Then::Activate(Activation::None);
        let down = Linear::new(&place, &down, channels, None, plain);
        let (up, down) = (
            up.expect("a weight of this shape"),
            down.expect("a weight of this shape"),
        );
        let x = tensor(dtype, &[2, tokens, channels]);
        time(
            c,
            dtype,
            &format!("GEGLU feed-forward [2, {tokens}, {channels}]"),
            2 * 2 * tokens * 3 * inner * channels,
            || down.forward_add(&up.forward(&x)?, &x),
        );
    }
}

fn group_norm(c: &mut Criterion, dtype: DType) {
    let place = place(dtype);
    for (channels, side) in [(320, 64), (1280, 16)] {
        let weight = wave(channels, 1.0);
        let norm = GroupNorm::new(&place, &weight, &weight, 1e-5)
            .expect("a weight of this shape")
            .silu();
        let x = tensor(dtype, &[2, side, side, channels]);
        time(
            c,
            dtype,
            &format!("group norm and SiLU [2, {side}, {side}, {channels}]"),
            0,
            || norm.forward(&x),
        );
    }
}

fn operations(c: &mut Criterion) {
    for dtype in [DType::F32, DType::BF16] {
        attention(c, dtype);
        residual_block(c, dtype);
        feed_forward(c, dtype);
        group_norm(c, dtype);
    }
}

criterion_group!(all, operations);
criterion_main!(all);
