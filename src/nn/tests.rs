//! The fused bodies against the operations composed from candle's own, on every instruction set of the machine and on
//! shapes with ragged edges.
//!
//! Tolerance: both sum the same products in f32 in another order, so errors grow like sqrt(k) ulp of the largest partial
//! sum; 2e-6 of the largest output per sqrt(k / 64) is four times what is seen.

use std::sync::atomic::Ordering;

use candle_core::{Device, Tensor};

use super::cpu::attention::{Heads, Shape};
use super::cpu::gemm::{Epilogue, gemm};
use super::cpu::norm::Groups;
use super::cpu::packed::{Columns, Layout, Packed, Precision};
use super::cpu::rows::{Rows, Window};
use super::cpu::{Isa, attention, norm};
use super::{Activation, Conv2d, Linear, Placement, Sampling, Then, reference};

/// Uniform in [-1, 1), from a 64-bit LCG.
fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn layout(columns: Columns, run: usize) -> Layout {
    Layout {
        precision: Precision::F32,
        columns,
        run,
    }
}

fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).expect("shape fits")
}

fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all()
        .and_then(|t| t.to_vec1())
        .expect("f32 tensor")
}

#[track_caller]
fn close(what: &str, got: &[f32], want: &[f32], k: usize) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let scale = want.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
    let worst = got
        .iter()
        .zip(want)
        .map(|(g, w)| (g - w).abs())
        .fold(0.0, f32::max);
    let tolerance = 2e-6 * scale * (k as f32 / 64.0).sqrt().max(1.0);
    assert!(
        worst <= tolerance && got.iter().all(|g| g.is_finite()),
        "{what}: off by {worst:e}, allowed {tolerance:e}"
    );
}

#[test]
fn linear_equals_the_composed_product_on_every_isa() {
    for isa in Isa::available() {
        for (m, k, n) in [
            (1, 1, 1),
            (3, 5, 7),
            (8, 16, 32),
            (25, 70, 33),
            (77, 64, 192),
            (50, 2500, 40),
            (130, 33, 100),
        ] {
            let (x, w, b, r) = (
                random(m * k, 1),
                random(n * k, 2),
                random(n, 3),
                random(m * n, 4),
            );
            let packed = Packed::new(isa, &w, n, layout(Columns::Plain, k), |k| k);
            let mut got = vec![f32::NAN; m * n];
            let epilogue = Epilogue {
                bias: Some(&b),
                activation: Activation::Gelu,
                residual: Some(&r),
                ..Epilogue::default()
            };
            gemm(Rows::Matrix(&x), &packed, epilogue, &mut got);
            let y = reference::linear(
                &tensor(&x, &[m, k]),
                &tensor(&w, &[n, k]),
                Some(&tensor(&b, &[n])),
            )
            .expect("composed");
            let want = (reference::activate(&y, Activation::Gelu).expect("gelu")
                + tensor(&r, &[m, n]))
            .expect("sum");
            close(
                &format!("{isa:?} linear {m}x{k}x{n}"),
                &got,
                &flat(&want),
                k,
            );
        }
    }
}

#[test]
fn geglu_epilogue_equals_the_composed_halves() {
    for isa in Isa::available() {
        for (m, k, n) in [(5, 9, 2), (20, 64, 96), (33, 40, 100)] {
            let (x, w, b) = (random(m * k, 5), random(n * k, 6), random(n, 7));
            let packed = Packed::new(isa, &w, n, layout(Columns::Geglu, k), |k| k);
            let mut got = vec![f32::NAN; m * n / 2];
            gemm(
                Rows::Matrix(&x),
                &packed,
                Epilogue {
                    bias: Some(&b),
                    ..Epilogue::default()
                },
                &mut got,
            );
            let y = reference::linear(
                &tensor(&x, &[m, k]),
                &tensor(&w, &[n, k]),
                Some(&tensor(&b, &[n])),
            )
            .expect("composed");
            close(
                &format!("{isa:?} geglu {m}x{k}x{n}"),
                &got,
                &flat(&reference::geglu(&y).expect("halves")),
                k,
            );
        }
    }
}

#[test]
fn convolution_equals_the_composed_one_for_every_window() {
    let samplings = [
        Sampling::SAME,
        Sampling::HALVE,
        Sampling::HALVE_VAE,
        Sampling::DOUBLE,
    ];
    for isa in Isa::available() {
        for (i, sampling) in samplings.into_iter().enumerate() {
            for (circular, (b, h, w, cin, cout)) in [
                (false, (2, 7, 5, 3, 33)),
                (false, (1, 8, 8, 40, 20)),
                (true, (1, 6, 4, 5, 4)),
            ] {
                let (x, k) = (random(b * h * w * cin, 8), random(cout * cin * 9, 9));
                let (bias, shift) = (random(cout, 10), random(b * cout, 11));
                let reach = |len: usize| {
                    (len * sampling.upsample + sampling.pad + sampling.pad_after - 3)
                        / sampling.stride
                        + 1
                };
                let window = Window {
                    batch: b,
                    height: h,
                    width: w,
                    channels: cin,
                    out_height: reach(h),
                    out_width: reach(w),
                    kernel: 3,
                    stride: sampling.stride,
                    pad: sampling.pad,
                    upsample: sampling.upsample,
                    circular,
                };
                let packed = Packed::new(isa, &k, cout, layout(Columns::Plain, cin), |i| {
                    i % cin * 9 + i / cin
                });
                let pixels = reach(h) * reach(w);
                let mut got = vec![f32::NAN; b * pixels * cout];
                let epilogue = Epilogue {
                    bias: Some(&bias),
                    row_bias: Some(&shift),
                    rows_per_batch: pixels,
                    ..Epilogue::default()
                };
                gemm(Rows::Picture(&x, window), &packed, epilogue, &mut got);
                let y = reference::conv2d(
                    &tensor(&x, &[b, h, w, cin]),
                    &tensor(&k, &[cout, cin, 3, 3]),
                    Some(&tensor(&bias, &[cout])),
                    sampling,
                    circular,
                );
                let want = y
                    .and_then(|y| y.broadcast_add(&tensor(&shift, &[b, 1, 1, cout])))
                    .expect("composed");
                close(
                    &format!("{isa:?} window {i} circular {circular}"),
                    &got,
                    &flat(&want),
                    cin * 9,
                );
            }
        }
    }
}

#[test]
fn norms_equal_the_composed_ones_even_with_a_large_mean() {
    for isa in Isa::available() {
        for (b, pixels, c) in [(1, 1, 32), (2, 70, 64), (1, 2100, 96), (3, 5, 160)] {
            let x: Vec<f32> = random(b * pixels * c, 12).iter().map(|x| x + 3.0).collect();
            let (w, bias) = (random(c, 13), random(c, 14));
            let (tw, tb) = (tensor(&w, &[c]), tensor(&bias, &[c]));
            let mut got = vec![f32::NAN; x.len()];
            let groups = Groups {
                batch: b,
                pixels,
                channels: c,
                count: 32,
                eps: 1e-5,
                silu: true,
            };
            norm::group_norm(isa, &x, &w, &bias, groups, &mut got);
            let want = reference::group_norm(&tensor(&x, &[b, pixels, c]), &tw, &tb, 32, 1e-5)
                .expect("composed");
            let want = reference::activate(&want, Activation::Silu).expect("silu");
            close(
                &format!("{isa:?} group norm {b}x{pixels}x{c}"),
                &got,
                &flat(&want),
                pixels * 40,
            );
            norm::layer_norm(isa, &x, &w, &bias, 1e-5, &mut got);
            // candle's own layer norm takes E[x²] - E[x]², which loses digits at this mean: the oracle is f64.
            let want: Vec<f32> = x
                .chunks(c)
                .flat_map(|row| layer_norm_f64(row, &w, &bias))
                .collect();
            close(
                &format!("{isa:?} layer norm {b}x{pixels}x{c}"),
                &got,
                &want,
                64,
            );
        }
    }
}

#[test]
fn layer_norm_keeps_its_digits_where_ragged_rows_lie_far_from_zero() {
    // 37 channels end within a vector of every set. At 100 the mean itself is rounded by 8e-6 of rows that vary by 0.6.
    let c = 37;
    let x: Vec<f32> = (0..5 * c).map(|i| 100.0 + (i as f32 * 1.7).sin()).collect();
    let (w, bias) = (vec![1.0; c], vec![0.0; c]);
    for isa in Isa::available() {
        let mut got = vec![0.0; x.len()];
        norm::layer_norm(isa, &x, &w, &bias, 1e-5, &mut got);
        for (got, row) in got.chunks(c).zip(x.chunks(c)) {
            for (got, want) in got.iter().zip(layer_norm_f64(row, &w, &bias)) {
                assert!((got - want).abs() < 5e-5, "{isa:?}: {got} for {want}");
            }
        }
    }
}

fn layer_norm_f64(row: &[f32], w: &[f32], b: &[f32]) -> Vec<f32> {
    let n = row.len() as f64;
    let mean = row.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
    let variance = row
        .iter()
        .map(|x| (f64::from(*x) - mean).powi(2))
        .sum::<f64>()
        / n;
    let normal = |x: &f32| (f64::from(*x) - mean) / (variance + 1e-5).sqrt();
    row.iter()
        .zip(w)
        .zip(b)
        .map(|((x, w), b)| (normal(x) * f64::from(*w) + f64::from(*b)) as f32)
        .collect()
}

#[test]
fn attention_equals_the_composed_softmax_with_and_without_mask() {
    for isa in Isa::available() {
        for (b, tokens, keys, heads, d, causal) in [
            (1, 1, 1, 1, 8, false),
            (2, 77, 77, 4, 16, true),
            (1, 130, 77, 2, 64, false),
            (1, 300, 600, 1, 72, false),
            (1, 290, 290, 2, 40, true),
        ] {
            let c = heads * d;
            let (q, k, v) = (
                random(b * tokens * c, 15),
                random(b * keys * c, 16),
                random(b * keys * c, 17),
            );
            let q: Vec<f32> = q.iter().map(|x| x * 4.0).collect();
            let view = |data, tokens| Heads {
                data,
                tokens,
                stride: c,
                offset: 0,
            };
            let mut got = vec![f32::NAN; b * tokens * c];
            let shape = Shape {
                batch: b,
                heads,
                head_dim: d,
                causal,
            };
            attention::attention(
                isa,
                view(&q, tokens),
                view(&k, keys),
                view(&v, keys),
                shape,
                &mut got,
            );
            let (tq, tk, tv) = (
                tensor(&q, &[b, tokens, c]),
                tensor(&k, &[b, keys, c]),
                tensor(&v, &[b, keys, c]),
            );
            let want = reference::attention(&tq, &tk, &tv, heads, causal).expect("composed");
            close(
                &format!("{isa:?} attention {tokens}x{keys} d{d} causal {causal}"),
                &got,
                &flat(&want),
                keys,
            );
        }
    }
}

#[test]
fn layers_of_the_device_path_and_the_fused_path_agree() {
    let place = Placement::cpu();
    let (w, b) = (random(24 * 10, 18), random(24, 19));
    let linear = Linear::new(
        &place,
        &w,
        24,
        Some(&b),
        Then::Activate(Activation::QuickGelu),
    )
    .expect("layer");
    let x = tensor(&random(2 * 6 * 10, 20), &[2, 6, 10]);
    let y = linear.forward(&x).expect("forward");
    assert_eq!(y.dims(), [2, 6, 24]);
    let want =
        reference::linear(&x, &tensor(&w, &[24, 10]), Some(&tensor(&b, &[24]))).expect("composed");
    close(
        "quick gelu",
        &flat(&y),
        &flat(&reference::activate(&want, Activation::QuickGelu).expect("gelu")),
        64,
    );

    let w = random(6 * 4 * 9, 21);
    let conv = Conv2d::new(&place, &w, [6, 4, 3], None, Sampling::HALVE).expect("layer");
    let x = tensor(&random(8 * 8 * 4, 22), &[1, 8, 8, 4]);
    let plain = flat(&conv.forward(&x).expect("forward"));
    place.circular.store(true, Ordering::Relaxed);
    let wrapped = flat(&conv.forward(&x).expect("forward"));
    assert_ne!(
        plain, wrapped,
        "tiling acts on layers built before it was switched on"
    );
    assert!(
        linear.forward(&tensor(&[0.0; 9], &[1, 9])).is_err(),
        "a wrong width is an error, not a panic"
    );
}

#[test]
fn a_convolution_of_parts_equals_one_of_the_joined_picture_on_every_isa() {
    for isa in Isa::available() {
        // The last one is cut into blocks of k in the middle of a part.
        for (widths, n) in [
            (&[3][..], 5),
            (&[16, 7, 1], 33),
            (&[64, 32, 32], 32),
            (&[200, 100], 20),
        ] {
            let (h, w, c) = (5, 7, widths.iter().sum::<usize>());
            let parts: Vec<Vec<f32>> = widths
                .iter()
                .map(|c| random(h * w * c, *c as u64))
                .collect();
            let slices: Vec<_> = parts
                .iter()
                .map(Vec::as_slice)
                .zip(widths.iter().copied())
                .collect();
            let (weight, bias) = (random(n * c * 9, 2), random(n, 3));
            let (slopes, residual) = (random(n, 4), random(h * w * n, 5));
            let index = Conv2d::tap_major(c, 9);
            let packed = Packed::new(isa, &weight, n, layout(Columns::Plain, c), index);
            let window = Window {
                batch: 1,
                height: h,
                width: w,
                channels: c,
                out_height: h,
                out_width: w,
                kernel: 3,
                stride: 1,
                pad: 1,
                upsample: 1,
                circular: false,
            };
            let epilogue = Epilogue {
                bias: Some(&bias),
                slopes: Some(&slopes),
                residual: Some(&residual),
                ..Epilogue::default()
            };
            let mut got = vec![f32::NAN; h * w * n];
            gemm(Rows::Pictures(&slices, window), &packed, epilogue, &mut got);
            let tensors: Vec<Tensor> = parts
                .iter()
                .zip(widths)
                .map(|(values, c)| tensor(values, &[1, h, w, *c]))
                .collect();
            let joined = Tensor::cat(&tensors, 3).expect("joined");
            let (weight, bias) = (tensor(&weight, &[n, c, 3, 3]), tensor(&bias, &[n]));
            let y = reference::conv2d(&joined, &weight, Some(&bias), Sampling::SAME, false);
            let y = reference::prelu(&y.expect("composed"), &tensor(&slopes, &[n])).expect("prelu");
            let want = (y + tensor(&residual, &[1, h, w, n])).expect("sum");
            let what = format!("{isa:?} parts {widths:?} to {n}");
            close(&what, &got, &flat(&want), c * 9);
        }
    }
}

#[test]
fn leaky_relu_is_a_fifth_below_zero() {
    let place = Placement::cpu();
    let weight = [1.0, 0.0, 0.0, 1.0];
    let then = Then::Activate(Activation::LeakyRelu);
    let layer = Linear::new(&place, &weight, 2, None, then).expect("layer");
    let y = layer.forward(&tensor(&[-1.0, 2.0], &[1, 2])).expect("y");
    assert_eq!(flat(&y), [-0.2, 2.0]);
    let composed = reference::activate(&tensor(&[-1.0, 2.0], &[2]), Activation::LeakyRelu);
    assert_eq!(flat(&composed.expect("composed")), [-0.2, 2.0]);
}
