//! Group norm, measured norm and layer norm against `GroupNorm`, `GroupStatistics` and `LayerNorm`.

use candle_core::{Device, Tensor};
use sdgen::nn::{GroupNorm, GroupStatistics, LayerNorm, Placement};

use crate::e4m3;
use crate::emulation::{Arg, Grid, Type, compare, compare_within, launch, noise};

const EPS: f32 = 1e-5;

/// A picture under group norm.
#[derive(Clone, Copy)]
struct Case {
    batch: usize,
    pixels: usize,
    /// Of two pictures side by side.
    channels: [usize; 2],
    groups: usize,
    slices: usize,
    /// What is added to noise between -1 and 1.
    mean: f32,
}

fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

fn to_host(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// `[rows][a]` and `[rows][b]` as `[rows][a + b]`.
fn joined(x: &[Vec<f32>; 2], channels: [usize; 2]) -> Vec<f32> {
    let rows = x[0].len() / channels[0];
    (0..rows)
        .flat_map(|r| (0..2).flat_map(move |i| &x[i][r * channels[i]..(r + 1) * channels[i]]))
        .copied()
        .collect()
}

fn sums_bytes(t: Type, channels: usize) -> usize {
    4 * (2 * channels + 512 * t.lane_values())
}

/// Group norm by its formula in `f64`; the public layer has 32 groups always.
fn group_norm(x: &[f32], weight: &[f32], bias: &[f32], case: Case, silu: bool) -> Vec<f32> {
    let c = weight.len();
    let size = c / case.groups;
    let mut out = vec![0f32; x.len()];
    for image in 0..case.batch {
        for group in 0..case.groups {
            let at = move |i: usize| (image * case.pixels + i / size) * c + group * size + i % size;
            let n = case.pixels * size;
            let mean = (0..n).map(|i| f64::from(x[at(i)])).sum::<f64>() / n as f64;
            let variance = (0..n)
                .map(|i| (f64::from(x[at(i)]) - mean).powi(2))
                .sum::<f64>()
                / n as f64;
            for i in (0..n).map(at) {
                let y = (f64::from(x[i]) - mean) / (variance + f64::from(EPS)).sqrt();
                let y = y * f64::from(weight[i % c]) + f64::from(bias[i % c]);
                out[i] = if silu { y / (1.0 + (-y).exp()) } else { y } as f32;
            }
        }
    }
    out
}

fn check_group_norm(t: Type, case: Case, silu: bool) {
    let Case {
        batch,
        pixels,
        channels,
        groups,
        slices,
        mean,
    } = case;
    let c = channels[0] + channels[1];
    let parts = [0, 1].map(|i| {
        let x = noise(i, batch * pixels * channels[i]);
        t.round(&x.iter().map(|x| x + mean).collect::<Vec<_>>())
    });
    let weight = t.round(&noise(2, c));
    let bias = t.round(&noise(3, c));
    let second = (channels[1] > 0).then(|| parts[1].clone());

    let suffix = t.suffix();
    let statistics = launch(
        "norm",
        &format!("group_norm_statistics_{suffix}"),
        Grid::new([slices, batch, 1], 256, sums_bytes(t, c)),
        &[
            Arg::values(t, &parts[0]),
            Arg::optional(t, second.as_ref()),
            Arg::room(batch * slices * groups * 8),
            Arg::Int(pixels),
            Arg::Int(channels[0]),
            Arg::Int(channels[1]),
            Arg::Int(groups),
        ],
    );
    let applied = launch(
        "norm",
        &format!("group_norm_apply_{suffix}"),
        Grid::new([slices + 1, batch, 1], 256, 8 * groups),
        &[
            Arg::values(t, &parts[0]),
            Arg::optional(t, second.as_ref()),
            Arg::Bytes(statistics[2].clone()),
            Arg::values(t, &weight),
            Arg::values(t, &bias),
            Arg::room(batch * pixels * c * t.size()),
            Arg::Int(pixels),
            Arg::Int(channels[0]),
            Arg::Int(channels[1]),
            Arg::Int(groups),
            Arg::Int(slices),
            Arg::Float(EPS),
            Arg::Int(usize::from(silu)),
        ],
    );

    let x = if channels[1] > 0 {
        joined(&parts, channels)
    } else {
        parts[0].clone()
    };
    let want = group_norm(&x, &weight, &bias, case, silu);
    let name = format!("group_norm_{suffix} [{batch}, {pixels}, {c}] / {groups}, mean {mean}");
    // Statistics in f32 of values around `mean` cannot be better than its last place.
    let rounding = f64::from(mean.abs() * f32::EPSILON);
    compare_within(
        &name,
        t.tolerance() + 2.0 * rounding,
        &t.decode(&applied[5]),
        &want,
    );
    if groups == 32 {
        let shape = [batch, pixels, c];
        let layer = GroupNorm::new(&Placement::cpu(), &weight, &bias, EPS).unwrap();
        let layer = if silu { layer.silu() } else { layer };
        let want = to_host(&layer.forward(&tensor(&x, &shape)).unwrap());
        compare_within(
            &format!("{name}, as the CPU's layer"),
            t.tolerance() + 2.0 * rounding,
            &t.decode(&applied[5]),
            &want,
        );
    }
}

#[test]
fn group_norm_is_that_of_the_cpu() {
    let case = |batch, pixels, channels, groups, slices, mean| Case {
        batch,
        pixels,
        channels,
        groups,
        slices,
        mean,
    };
    for t in Type::ALL {
        // SDXL's widths; ten channels a group lie across vectors.
        check_group_norm(t, case(2, 77, [320, 0], 32, 3, 0.5), true);
        check_group_norm(t, case(1, 9, [2560, 0], 32, 2, 0.0), false);
        // A skip connection beside its picture, cut within a group.
        check_group_norm(t, case(2, 35, [640, 320], 32, 2, 0.0), true);
        check_group_norm(t, case(1, 20, [5, 11], 4, 1, 0.0), false);
        // Few or odd channels; one pixel; more slices than pixels.
        check_group_norm(t, case(3, 15, [4, 0], 2, 1, 0.0), true);
        check_group_norm(t, case(1, 49, [321, 0], 3, 4, 0.0), false);
        check_group_norm(t, case(3, 1, [64, 0], 32, 1, 0.0), true);
        check_group_norm(t, case(1, 3, [32, 0], 4, 8, 0.0), false);
    }
    // Far from zero, as late in a VAE.
    check_group_norm(Type::F32, case(1, 1000, [64, 0], 32, 7, 1000.0), false);
    check_group_norm(Type::F16, case(1, 300, [128, 0], 32, 5, 40.0), true);
}

#[test]
fn a_picture_in_strips_is_normalised_as_a_whole() {
    for (t, channels, mean) in [
        (Type::F32, 64, 40.0),
        (Type::F16, 128, 4.0),
        (Type::Bf16, 96, 0.0),
    ] {
        let strips = [5, 1, 9];
        let width = 7;
        let weight = t.round(&noise(1, channels));
        let bias = t.round(&noise(2, channels));
        let mut seen = GroupStatistics::default();
        let (mut sums, mut origin) = (vec![0u8; 2 * channels * 8], Vec::new());
        let mut pictures = Vec::new();
        for (i, rows) in strips.into_iter().enumerate() {
            let x = noise(3 + i, rows * width * channels);
            let x = t.round(&x.iter().map(|x| x + mean).collect::<Vec<_>>());
            if i == 0 {
                origin = x[..channels].to_vec();
            }
            seen.add(&tensor(&x, &[1, rows, width, channels])).unwrap();
            sums = add_strip(t, &x, &origin, sums);
            pictures.push((rows, x));
        }
        let layer = GroupNorm::new(&Placement::cpu(), &weight, &bias, EPS)
            .unwrap()
            .silu();
        let measured = layer.measured(&seen).unwrap();
        let pixels = strips.iter().sum::<usize>() * width;
        let affine = launch(
            "norm",
            &format!("group_affine_{}", t.suffix()),
            Grid::new([32, 1, 1], 32, 0),
            &[
                Arg::Bytes(sums),
                Arg::values(Type::F32, &origin),
                Arg::values(t, &weight),
                Arg::room(2 * channels * 4),
                Arg::Long(pixels),
                Arg::Int(channels),
                Arg::Int(32),
                Arg::Float(EPS),
            ],
        )
        .swap_remove(3);
        for (rows, x) in pictures {
            let out = launch(
                "norm",
                &format!("channel_affine_{}", t.suffix()),
                Grid::new([2, 1, 1], 256, 0),
                &[
                    Arg::values(t, &x),
                    Arg::Bytes(affine.clone()),
                    Arg::values(t, &bias),
                    Arg::Again(0, 0),
                    Arg::Int(rows * width),
                    Arg::Int(channels),
                    Arg::Int(1),
                ],
            );
            let want = measured.forward(&tensor(&x, &[1, rows, width, channels]));
            compare(
                &format!("channel_affine_{} {rows} rows", t.suffix()),
                t,
                &t.decode(&out[0]),
                &to_host(&want.unwrap()),
            );
        }
    }
}

/// `sums` with a strip's added.
fn add_strip(t: Type, x: &[f32], origin: &[f32], sums: Vec<u8>) -> Vec<u8> {
    let channels = origin.len();
    let slices = 3;
    let partials = launch(
        "norm",
        &format!("channel_sums_{}", t.suffix()),
        Grid::new([slices, 1, 1], 256, sums_bytes(t, channels)),
        &[
            Arg::values(t, x),
            Arg::values(Type::F32, origin),
            Arg::room(slices * 2 * channels * 4),
            Arg::Int(x.len() / channels),
            Arg::Int(channels),
        ],
    )
    .swap_remove(2);
    launch(
        "norm",
        "channel_sums_add",
        Grid::new([(2 * channels).div_ceil(256), 1, 1], 256, 0),
        &[
            Arg::Bytes(partials),
            Arg::Bytes(sums),
            Arg::Int(slices),
            Arg::Int(channels),
        ],
    )
    .swap_remove(1)
}

/// Layer norm of rows by its formula in `f64`.
fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let n = weight.len() as f64;
    let row = |row: &[f32]| {
        let mean = row.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
        let squares = row.iter().map(|x| (f64::from(*x) - mean).powi(2));
        let scale = 1.0 / (squares.sum::<f64>() / n + f64::from(EPS)).sqrt();
        let affine = row.iter().zip(weight).zip(bias);
        affine
            .map(|((x, w), b)| {
                ((f64::from(*x) - mean) * scale * f64::from(*w) + f64::from(*b)) as f32
            })
            .collect::<Vec<_>>()
    };
    x.chunks_exact(weight.len()).flat_map(row).collect()
}

/// A row of residual stream: wide, and off centre.
fn stream(t: Type, count: usize) -> Vec<f32> {
    let x = noise(1, count);
    t.round(&x.iter().map(|x| 3.0 * x + 5.0).collect::<Vec<_>>())
}

#[test]
fn layer_norm_is_that_of_the_cpu() {
    for t in Type::ALL {
        for (rows, channels) in [(77, 320), (3, 1280), (5, 2048), (1, 4), (9, 5), (2, 321)] {
            let x = stream(t, rows * channels);
            let weight = t.round(&noise(2, channels));
            let bias = t.round(&noise(3, channels));
            let out = launch(
                "norm",
                &format!("layer_norm_{}", t.suffix()),
                Grid::new([rows.div_ceil(4), 1, 1], 128, 0),
                &[
                    Arg::values(t, &x),
                    Arg::values(t, &weight),
                    Arg::values(t, &bias),
                    Arg::room(x.len() * t.size()),
                    Arg::Int(rows),
                    Arg::Int(channels),
                    Arg::Float(EPS),
                ],
            );
            let name = format!("layer_norm_{} [{rows}, {channels}]", t.suffix());
            let got = t.decode(&out[3]);
            compare(&name, t, &got, &layer_norm(&x, &weight, &bias));
            // The CPU's takes its padding out of the variance again, which costs short rows far from zero their last digits.
            if channels % 16 == 0 {
                let layer = LayerNorm::new(&Placement::cpu(), &weight, &bias).unwrap();
                let want = to_host(&layer.forward(&tensor(&x, &[rows, channels])).unwrap());
                compare(&format!("{name}, as the CPU's layer"), t, &got, &want);
            }
        }
    }
}

#[test]
fn layer_norm_to_e4m3_is_layer_norm_rounded() {
    for t in Type::ALL {
        for (rows, channels) in [(6, 320), (3, 2048), (9, 5), (2, 321)] {
            let x = stream(t, rows * channels);
            let weight = t.round(&noise(2, channels));
            let bias = t.round(&noise(3, channels));
            let out = launch(
                "norm",
                &format!("layer_norm_fp8_{}", t.suffix()),
                Grid::new([rows.div_ceil(4), 1, 1], 128, 0),
                &[
                    Arg::values(t, &x),
                    Arg::values(t, &weight),
                    Arg::values(t, &bias),
                    Arg::room(rows * channels),
                    Arg::room(rows * 4),
                    Arg::Int(rows),
                    Arg::Int(channels),
                    Arg::Float(EPS),
                ],
            );
            let want = layer_norm(&x, &weight, &bias);
            let name = format!("layer_norm_fp8_{} [{rows}, {channels}]", t.suffix());
            let scales = Type::F32.decode(&out[4]);
            let largest = |row: &[f32]| row.iter().fold(0f32, |m, v| m.max(v.abs()));
            let wanted: Vec<f32> = want
                .chunks_exact(channels)
                .map(|row| largest(row) / 448.0)
                .collect();
            compare_within(&format!("{name} scales"), 1e-5, &scales, &wanted);
            for (i, (code, want)) in out[3].iter().zip(&want).enumerate() {
                let scale = scales[i / channels];
                let got = e4m3::value(*code) * scale;
                // Half a step: a sixteenth of the value, or 2^-10 where steps no longer shrink; and the norm's own rounding.
                let allowed = want.abs() / 16.0 + scale / 1024.0 + 1e-5;
                assert!(
                    (got - want).abs() <= allowed,
                    "{name} at [{i}]: {got} for {want}"
                );
            }
        }
    }
}
