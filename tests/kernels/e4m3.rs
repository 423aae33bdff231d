//! Rows as 8-bit floats and back.

use crate::emulation::{Arg, Grid, Type, compare, launch};
use crate::formulas::{activate, gelu, inputs};

/// The value of an e4m3 code.
pub(crate) fn value(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 0x7f) {
        (_, 0x7f) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (8.0 + mantissa) * (exponent as f32 - 10.0).exp2(),
    };
    if code & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

/// The nearest code of a finite value, the even one of two, by looking at all.
fn nearest(x: f32) -> u8 {
    let best = (0..0x7fu8)
        .min_by(|&a, &b| {
            let error = |code| (f64::from(value(code)) - f64::from(x.abs())).abs();
            error(a).total_cmp(&error(b)).then((a & 1).cmp(&(b & 1)))
        })
        .unwrap_or(0);
    best | u8::from(x.is_sign_negative()) << 7
}

fn quantise(t: Type, x: &[f32], channels: usize) -> (Vec<u8>, Vec<f32>) {
    let rows = x.len() / channels;
    let mut out = launch(
        "fp8",
        &format!("quantise_rows_{}", t.suffix()),
        Grid::new([rows.div_ceil(4), 1, 1], 128, 0),
        &[
            Arg::values(t, x),
            Arg::room(x.len()),
            Arg::room(rows * 4),
            Arg::Int(rows),
            Arg::Int(channels),
        ],
    );
    let scales = Type::F32.decode(&out[2]);
    (out.swap_remove(1), scales)
}

#[test]
fn every_value_and_every_midpoint_round_as_the_format_says() {
    // The largest is 448, so the scale is 1.
    let mut x: Vec<f32> = (0..0x7f).map(value).collect();
    let midpoints: Vec<f32> = x.windows(2).map(|w| f32::midpoint(w[0], w[1])).collect();
    let around = midpoints
        .iter()
        .flat_map(|m| [*m, m.next_down(), m.next_up()]);
    x.extend(around.collect::<Vec<_>>());
    x.extend(x.clone().iter().map(|v| -v));
    let (codes, scales) = quantise(Type::F32, &x, x.len());
    assert_eq!(scales, [1.0]);
    for (x, code) in x.iter().zip(codes) {
        assert_eq!(code, nearest(*x), "{x:e}");
    }
}

#[test]
fn rows_are_scaled_each_by_its_own_largest() {
    for t in Type::ALL {
        for (rows, channels) in [(5, 320), (3, 5), (9, 321), (2, 1280)] {
            let mut x = inputs(t, 1, rows * channels, 3.0);
            // One row of zeros.
            x[channels..2 * channels].fill(0.0);
            let (codes, scales) = quantise(t, &x, channels);
            for (r, row) in x.chunks_exact(channels).enumerate() {
                let largest = row.iter().fold(0f32, |m, v| m.max(v.abs()));
                let scale = if largest > 0.0 { largest / 448.0 } else { 1.0 };
                assert_eq!(scales[r].to_bits(), scale.to_bits(), "{t:?} row {r}");
                for (x, code) in row.iter().zip(&codes[r * channels..]) {
                    assert_eq!(*code, nearest(x / scale), "{t:?} row {r}: {x}");
                }
            }
        }
    }
}

#[test]
fn codes_widen_to_their_values() {
    let codes: Vec<u8> = (0..=u8::MAX).collect();
    let args = [
        Arg::Bytes(codes.clone()),
        Arg::room(codes.len() * 4),
        Arg::Long(codes.len()),
    ];
    let out = launch("fp8", "widen_e4m3", Grid::any(), &args);
    for (code, got) in codes.iter().zip(Type::F32.decode(&out[1])) {
        let want = value(*code);
        let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
        assert!(same, "{code:#x}: {got} for {want}");
    }
}

#[test]
fn scales_come_off_in_the_epilogue() {
    for t in Type::ALL {
        for (rows, columns, geglu) in [(7, 64, false), (3, 13, false), (5, 64, true), (4, 26, true)]
        {
            let outputs = if geglu { columns / 2 } else { columns };
            let sums = inputs(Type::F32, 1, rows * columns, 100.0);
            let row_scales = inputs(Type::F32, 2, rows, 0.1);
            let column_scales = inputs(Type::F32, 3, columns, 0.1);
            let bias = inputs(t, 4, columns, 1.0);
            let residual = inputs(t, 5, rows * outputs, 1.0);
            let args = [
                Arg::values(Type::F32, &sums),
                Arg::values(Type::F32, &row_scales),
                Arg::values(Type::F32, &column_scales),
                Arg::values(t, &bias),
                Arg::values(t, &residual),
                Arg::room(rows * outputs * t.size()),
                Arg::Long(rows),
                Arg::Int(columns),
                Arg::Int(1),
                Arg::Int(usize::from(geglu)),
            ];
            let name = format!("dequantise_{}", t.suffix());
            let out = launch("fp8", &name, Grid::any(), &args);
            let want: Vec<f32> = (0..rows * outputs)
                .map(|i| {
                    let (row, column) = (i / outputs, i % outputs);
                    let sum = |c: usize| {
                        f64::from(sums[row * columns + c])
                            * f64::from(row_scales[row])
                            * f64::from(column_scales[c])
                            + f64::from(bias[c])
                    };
                    let v = if geglu {
                        sum(2 * column) * gelu(sum(2 * column + 1))
                    } else {
                        sum(column)
                    };
                    (activate(1, v) + f64::from(residual[i])) as f32
                })
                .collect();
            compare(
                &format!("{name} [{rows}, {columns}], gated {geglu}"),
                t,
                &t.decode(&out[5]),
                &want,
            );
        }
    }
}
