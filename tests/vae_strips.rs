//! The VAE strip by strip against the VAE in one piece, on the demo model's trained weights.
//!
//! Tolerance 2e-5 on pictures in [-1, 1] (a 400th of 1/255): the same f32 sums, but for the statistics of the group norms, whose
//! partial sums are cut elsewhere. Strips differ from one piece as two orders of summation do.

use std::cell::Cell;
use std::sync::atomic::Ordering;

use candle_core::{DType, Device, Tensor};
use sdgen::models::Vae;
use sdgen::models::vae::strips::{Bounds, whole_bytes};
use sdgen::nn::Placement;
use sdgen::weights::demo;

const TOLERANCE: f32 = 2e-5;

fn vae() -> (Vae, Placement) {
    let place = Placement::cpu();
    let file = demo::open().expect("embedded");
    let vae = Vae::new(&file, "first_stage_model.", &place).expect("loads");
    (vae, place)
}

/// Smooth values with some detail, as latents and pictures have.
fn wave(height: usize, width: usize, channels: usize, amplitude: f32) -> Tensor {
    let value = |i: usize| {
        let (c, x, y) = (i % channels, i / channels % width, i / channels / width);
        let phase = c as f32 + 1.0;
        ((x as f32 * 0.31 * phase).sin() + (y as f32 * 0.17 * phase).cos()) * amplitude
    };
    let values: Vec<f32> = (0..height * width * channels).map(value).collect();
    Tensor::from_vec(values, (1, height, width, channels), &Device::Cpu).expect("shape fits")
}

fn worst(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let difference = (a - b).and_then(|d| d.abs()?.flatten_all()?.max(0));
    difference
        .and_then(|d| d.to_scalar())
        .expect("two pictures")
}

fn bounds(bytes: usize) -> Bounds<'static> {
    Bounds {
        bytes,
        ..Bounds::NONE
    }
}

#[test]
fn a_decode_in_strips_is_the_decode_in_one_piece() {
    let (vae, place) = vae();
    // 24 latent rows are 192 rows of pixels: twelve strips of 16 at the picture's size, and no even number of others.
    let z = wave(24, 17, 4, 2.0);
    for circular in [false, true] {
        place.circular.store(circular, Ordering::Relaxed);
        let whole = vae.decode(&z).expect("runs");
        let peak = whole_bytes(&vae, 17 * 8, 24 * 8);
        for bytes in [0, peak / 4, peak / 2, peak - 1] {
            let strips = vae.decode_within(&z, bounds(bytes)).expect("runs");
            let worst = worst(&strips.expect("not stopped"), &whole);
            eprintln!("decode, circular {circular}, {bytes} of {peak} bytes: {worst:e}");
            assert!(worst < TOLERANCE, "{worst:e}");
        }
        let plain = vae.decode_within(&z, bounds(peak)).expect("runs");
        let plain = plain.expect("not stopped");
        assert!(
            worst(&plain, &whole) == 0.0,
            "what fits the budget runs as it always did"
        );
    }
}

#[test]
fn an_encode_in_strips_is_the_encode_in_one_piece() {
    let (vae, place) = vae();
    let picture = wave(200, 136, 3, 0.5);
    for circular in [false, true] {
        place.circular.store(circular, Ordering::Relaxed);
        let (mean, logvar) = vae.encode(&picture).expect("runs");
        for bytes in [0, whole_bytes(&vae, 136, 200) / 2] {
            let strips = vae.encode_within(&picture, bounds(bytes)).expect("runs");
            let (strip_mean, strip_logvar) = strips.expect("not stopped");
            let (a, b) = (worst(&strip_mean, &mean), worst(&strip_logvar, &logvar));
            eprintln!("encode, circular {circular}, {bytes} bytes: mean {a:e}, log variance {b:e}");
            // Latents and log variances reach tens.
            assert!(a < 10.0 * TOLERANCE && b < 10.0 * TOLERANCE, "{a:e} {b:e}");
        }
    }
}

#[test]
fn a_narrow_type_runs_in_strips_too() {
    let place = Placement {
        dtype: DType::F16,
        ..Placement::cpu()
    };
    let file = demo::open().expect("embedded");
    let narrow = Vae::new(&file, "first_stage_model.", &place).expect("loads");
    let z = wave(6, 4, 4, 1.0);
    let strips = narrow.decode_within(&z, bounds(0)).expect("runs");
    let strips = strips.expect("not stopped").to_dtype(DType::F32);
    let wide = vae().0.decode(&z).expect("runs");
    let worst = worst(&strips.expect("converts"), &wide);
    eprintln!("decode in f16 strips against f32: {worst:e}");
    // f16 rounds to a thousandth, some thirty layers deep.
    assert!(worst < 0.05, "{worst}");
}

#[test]
fn a_stop_ends_the_work_between_strips() {
    let (vae, _) = vae();
    let (z, asked) = (wave(16, 16, 4, 1.0), Cell::new(0));
    let stop = || {
        asked.set(asked.get() + 1);
        asked.get() == 5
    };
    let stopping = Bounds {
        bytes: 0,
        stop: &stop,
    };
    assert!(vae.decode_within(&z, stopping).expect("runs").is_none());
    assert_eq!(asked.get(), 5);
    asked.set(0);
    let picture = wave(128, 128, 3, 0.5);
    let stopped = vae.encode_within(&picture, stopping).expect("runs");
    assert!(stopped.is_none());
}
