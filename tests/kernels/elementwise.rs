//! Element by element against formulas in `f64`.

use crate::emulation::{Arg, Grid, Type, compare, launch};
use crate::formulas::{ACTIVATIONS, activate, gelu, inputs};

/// Counts that are and are not whole vectors.
const COUNTS: [usize; 4] = [1, 7, 1000, 4096];

fn run(t: Type, kernel: &str, args: &[Arg], out: usize) -> Vec<f32> {
    let name = format!("{kernel}_{}", t.suffix());
    t.decode(&launch("elementwise", &name, Grid::any(), args)[out])
}

#[test]
fn activations_are_their_formulas() {
    for t in Type::ALL {
        for activation in 0..ACTIVATIONS {
            let x = inputs(t, activation, 1003, 12.0);
            let args = [
                Arg::values(t, &x),
                Arg::Again(0, 0),
                Arg::Long(x.len()),
                Arg::Int(activation),
            ];
            let want: Vec<f32> = x
                .iter()
                .map(|x| activate(activation, f64::from(*x)) as f32)
                .collect();
            compare(
                &format!("activate_{} {activation}", t.suffix()),
                t,
                &run(t, "activate", &args, 0),
                &want,
            );
        }
    }
}

#[test]
fn sums_casts_and_joined_channels_are_exact() {
    for t in Type::ALL {
        for count in COUNTS {
            let (a, b) = (inputs(t, 1, count, 2.0), inputs(t, 2, count, 2.0));
            let args = [
                Arg::values(t, &a),
                Arg::values(t, &b),
                Arg::room(count * t.size()),
                Arg::Long(count),
            ];
            let want: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
            assert_eq!(run(t, "add", &args, 2), t.round(&want), "add {t:?} {count}");
            for to in Type::ALL.into_iter().filter(|to| *to != t) {
                let args = [
                    Arg::values(t, &a),
                    Arg::room(count * to.size()),
                    Arg::Long(count),
                ];
                let name = format!("cast_{}_{}", t.suffix(), to.suffix());
                let out = launch("elementwise", &name, Grid::any(), &args);
                assert_eq!(to.decode(&out[1]), to.round(&a), "{name} {count}");
            }
        }
        for (pixels, a, b) in [(35, 320, 8), (9, 5, 4), (1, 1, 1), (77, 64, 32)] {
            let (x, y) = (inputs(t, 1, pixels * a, 1.0), inputs(t, 2, pixels * b, 1.0));
            let args = [
                Arg::values(t, &x),
                Arg::values(t, &y),
                Arg::room(pixels * (a + b) * t.size()),
                Arg::Long(pixels),
                Arg::Int(a),
                Arg::Int(b),
            ];
            let want: Vec<f32> = (0..pixels)
                .flat_map(|p| {
                    x[p * a..(p + 1) * a]
                        .iter()
                        .chain(&y[p * b..(p + 1) * b])
                        .copied()
                })
                .collect();
            let got = run(t, "concat_channels", &args, 2);
            assert_eq!(got, want, "concat {t:?} {pixels} {a} {b}");
        }
    }
}

#[test]
fn values_outside_a_narrow_type_become_its_infinity_and_zero() {
    let x = [
        65_519.9,
        65_520.0,
        -1e6,
        6e-8,
        2e-8,
        2.98e-8,
        1.000_488_3,
        f32::NAN,
    ];
    let args = [Arg::values(Type::F32, &x), Arg::room(16), Arg::Long(8)];
    let out = launch("elementwise", "cast_f32_f16", Grid::any(), &args);
    let (got, want) = (Type::F16.decode(&out[1]), Type::F16.round(&x));
    assert_eq!(got[..7], want[..7]);
    assert!(got[7].is_nan());
}

#[test]
fn values_are_gated() {
    for t in Type::ALL {
        for (rows, channels) in [(17, 64), (5, 5), (3, 321)] {
            let x = inputs(t, 1, rows * 2 * channels, 4.0);
            let args = [
                Arg::values(t, &x),
                Arg::room(rows * channels * t.size()),
                Arg::Long(rows),
                Arg::Int(channels),
            ];
            let want: Vec<f32> = (0..rows * channels)
                .map(|i| {
                    let at = i / channels * 2 * channels + i % channels;
                    (f64::from(x[at]) * gelu(f64::from(x[at + channels]))) as f32
                })
                .collect();
            compare(
                &format!("geglu_{} [{rows}, {channels}]", t.suffix()),
                t,
                &run(t, "geglu", &args, 1),
                &want,
            );
        }
    }
}

#[test]
fn alternating_values_are_gated() {
    for t in Type::ALL {
        for count in COUNTS {
            let x = inputs(t, 1, 2 * count, 4.0);
            let args = [
                Arg::values(t, &x),
                Arg::room(count * t.size()),
                Arg::Long(count),
            ];
            let want: Vec<f32> = x
                .chunks_exact(2)
                .map(|pair| (f64::from(pair[0]) * gelu(f64::from(pair[1]))) as f32)
                .collect();
            compare(
                &format!("geglu_pairs_{} {count}", t.suffix()),
                t,
                &run(t, "geglu_pairs", &args, 1),
                &want,
            );
        }
    }
}

#[test]
fn an_epilogue_goes_in_its_order() {
    for t in Type::ALL {
        for (images, rows, channels) in [(2, 9, 64), (3, 5, 13)] {
            let count = images * rows * channels;
            let x = inputs(t, 1, count, 2.0);
            let bias = inputs(t, 2, channels, 1.0);
            let shift = inputs(t, 3, images * channels, 1.0);
            let slopes = inputs(t, 4, channels, 1.0);
            let residual = inputs(t, 5, count, 1.0);
            let args = |all: bool| {
                let second = |v: &Vec<f32>| Arg::optional(t, Some(v).filter(|_| all));
                [
                    Arg::values(t, &x),
                    Arg::values(t, &bias),
                    second(&shift),
                    second(&slopes),
                    second(&residual),
                    Arg::Again(0, 0),
                    Arg::Long(images * rows),
                    Arg::Int(channels),
                    Arg::Int(rows),
                    Arg::Int(1),
                ]
            };
            for all in [false, true] {
                let want: Vec<f32> = (0..count)
                    .map(|i| {
                        let (c, image) = (i % channels, i / channels / rows);
                        let mut v = f64::from(x[i]) + f64::from(bias[c]);
                        if !all {
                            return activate(1, v) as f32;
                        }
                        v = activate(1, v + f64::from(shift[image * channels + c]));
                        v = v.max(0.0) + f64::from(slopes[c]) * v.min(0.0);
                        (v + f64::from(residual[i])) as f32
                    })
                    .collect();
                compare(
                    &format!("finish_{} {channels} channels", t.suffix()),
                    t,
                    &run(t, "finish", &args(all), 0),
                    &want,
                );
            }
        }
    }
}

#[test]
fn a_picture_is_doubled_pixel_by_pixel() {
    for t in Type::ALL {
        for (batch, height, width, channels) in [(2, 3, 5, 16), (1, 1, 1, 3), (1, 4, 2, 321)] {
            let x = inputs(t, 1, batch * height * width * channels, 1.0);
            let args = [
                Arg::values(t, &x),
                Arg::room(4 * x.len() * t.size()),
                Arg::Int(batch),
                Arg::Int(height),
                Arg::Int(width),
                Arg::Int(channels),
            ];
            let want: Vec<f32> = (0..4 * x.len())
                .map(|i| {
                    let (c, pixel) = (i % channels, i / channels);
                    let (column, line) = (pixel % (2 * width), pixel / (2 * width));
                    let (row, image) = (line % (2 * height), line / (2 * height));
                    x[((image * height + row / 2) * width + column / 2) * channels + c]
                })
                .collect();
            let got = run(t, "upsample_nearest", &args, 1);
            assert_eq!(got, want, "upsample {t:?} {channels}");
        }
    }
}
