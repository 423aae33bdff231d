//! What happens between two calls of the network, against formulas in `f64`.

use crate::emulation::{Arg, Grid, Type, compare, compare_within, launch, noise};
use crate::formulas::inputs;

/// A table of three steps, eleven coefficients each; kernels read step 1 from column 2 on.
const WIDTH: usize = 11;
const COLUMN: usize = 2;

fn table() -> (Vec<f32>, [Arg; 4]) {
    let table = noise(9, 3 * WIDTH);
    let args = [
        Arg::values(Type::F32, &table),
        Arg::Bytes(1i32.to_le_bytes().to_vec()),
        Arg::Int(WIDTH),
        Arg::Int(COLUMN),
    ];
    (table[WIDTH + COLUMN..2 * WIDTH].to_vec(), args)
}

const BATCH: usize = 2;
const CHANNELS: usize = 4;
const PIXELS: usize = 63;
const COUNT: usize = BATCH * CHANNELS * PIXELS;

/// Where value `i` of planar latents lies in copy `copy` of a channels-last tensor.
fn channels_last(copy: usize, i: usize) -> usize {
    let (pixel, plane) = (i % PIXELS, i / PIXELS);
    ((copy * BATCH + plane / CHANNELS) * PIXELS + pixel) * CHANNELS + plane % CHANNELS
}

fn sizes(copies: usize) -> [Arg; 4] {
    [BATCH, CHANNELS, PIXELS, copies].map(Arg::Int)
}

#[test]
fn the_networks_input_is_scaled_and_repeated() {
    let latents = noise(1, COUNT);
    for t in Type::ALL {
        let (coefficients, table) = table();
        let mut args = vec![
            Arg::values(Type::F32, &latents),
            Arg::room(2 * COUNT * t.size()),
        ];
        args.extend(table);
        args.extend(sizes(2));
        let name = format!("scale_input_{}", t.suffix());
        let out = t.decode(&launch("sampler", &name, Grid::any(), &args)[1]);
        for copy in 0..2 {
            let got: Vec<f32> = (0..COUNT).map(|i| out[channels_last(copy, i)]).collect();
            let want: Vec<f32> = latents.iter().map(|x| x * coefficients[0]).collect();
            assert_eq!(got, t.round(&want), "{name} copy {copy}");
        }
    }
}

#[test]
fn predictions_are_guided_and_denoised() {
    let latents = noise(1, COUNT);
    for t in Type::ALL {
        for copies in 1..=3 {
            let predictions = inputs(t, 2, copies * COUNT, 1.0);
            let (c, table) = table();
            let mut args = vec![
                Arg::values(t, &predictions),
                Arg::values(Type::F32, &latents),
                Arg::room(COUNT * 4),
            ];
            args.extend(table);
            args.extend(sizes(copies));
            let name = format!("guide_{}", t.suffix());
            let out = Type::F32.decode(&launch("sampler", &name, Grid::any(), &args)[2]);
            let want: Vec<f32> = (0..COUNT)
                .map(|i| {
                    let p = |copy| f64::from(predictions[channels_last(copy, i)]);
                    let guided = p(0)
                        + (1..copies)
                            .map(|k| f64::from(c[1 + k]) * (p(k) - p(0)))
                            .sum::<f64>();
                    (f64::from(c[0]) * f64::from(latents[i]) + f64::from(c[1]) * guided) as f32
                })
                .collect();
            // The sums are f32 whatever the prediction's type.
            compare(&format!("{name} of {copies}"), Type::F32, &out, &want);
        }
    }
}

#[test]
fn latents_are_combined() {
    for count in 1..=8 {
        let inputs: Vec<Vec<f32>> = (0..8).map(|i| noise(20 + i, 300)).collect();
        let (c, table) = table();
        // In place: the result is the first input.
        let mut args = vec![Arg::values(Type::F32, &inputs[0]), Arg::Again(0, 0)];
        args.extend((1..8).map(|i| Arg::optional(Type::F32, inputs.get(i).filter(|_| i < count))));
        args.extend(table);
        args.extend([Arg::Int(count), Arg::Long(300)]);
        let out = Type::F32.decode(&launch("sampler", "combine_latents", Grid::any(), &args)[0]);
        let want: Vec<f32> = (0..300)
            .map(|i| {
                (0..count)
                    .map(|j| f64::from(c[j]) * f64::from(inputs[j][i]))
                    .sum::<f64>() as f32
            })
            .collect();
        compare_within(&format!("combine_latents of {count}"), 1e-6, &out, &want);
    }
}

#[test]
fn without_a_step_the_first_row_counts() {
    let (table, x) = (noise(1, 8), noise(2, 10));
    let mut args = vec![Arg::room(40), Arg::values(Type::F32, &x)];
    args.extend((1..8).map(|_| Arg::Null));
    args.extend([
        Arg::values(Type::F32, &table),
        Arg::Null,
        Arg::Int(4),
        Arg::Int(3),
        Arg::Int(1),
        Arg::Long(10),
    ]);
    let out = Type::F32.decode(&launch("sampler", "combine_latents", Grid::any(), &args)[0]);
    let want: Vec<f32> = x.iter().map(|x| x * table[3]).collect();
    assert_eq!(out, want);
}

#[test]
fn the_kept_part_is_blended_in() {
    let (x, init) = (noise(1, 500), noise(2, 500));
    let paint: Vec<f32> = noise(3, 500).iter().map(|v| v.abs()).collect();
    let args = [
        Arg::values(Type::F32, &x),
        Arg::values(Type::F32, &init),
        Arg::values(Type::F32, &paint),
        Arg::Long(500),
    ];
    let out = Type::F32.decode(&launch("sampler", "mask_blend", Grid::any(), &args)[0]);
    let want: Vec<f32> = (0..500)
        .map(|i| init[i] + paint[i] * (x[i] - init[i]))
        .collect();
    compare_within("mask_blend", 1e-6, &out, &want);
}

#[test]
fn a_step_is_counted() {
    let args = [Arg::Bytes(41i32.to_le_bytes().to_vec())];
    let out = launch("sampler", "advance_step", Grid::new([1, 1, 1], 1, 0), &args);
    assert_eq!(out[0], 42i32.to_le_bytes());
}

#[test]
fn what_is_not_a_number_is_noticed_wherever_it_stands() {
    for t in Type::ALL {
        let check = |x: &[f32]| {
            let args = [
                Arg::values(t, x),
                Arg::Long(x.len()),
                Arg::Bytes(vec![0; 4]),
            ];
            let name = format!("check_finite_{}", t.suffix());
            launch("sampler", &name, Grid::any(), &args)[2][0]
        };
        let clean = inputs(t, 1, 1003, 60_000.0);
        assert_eq!(check(&clean), 0, "{t:?}");
        for at in [0, 517, 1002] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = clean.clone();
                x[at] = bad;
                assert_eq!(check(&x), 1, "{t:?} {bad} at {at}");
            }
        }
    }
}
