//! Upscaler networks and A1111's way of running them, against plain torch and Pillow (`tests/golden/upscale`).

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/close.rs"]
mod close;
#[path = "support/tensors.rs"]
mod tensors;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor};
use close::{Tolerance, assert_close};
use image::{Rgb, RgbImage};
use sdgen::models::Esrgan;
use sdgen::nn::Placement;
use sdgen::pipeline::{
    Control, Error, Extras, ExtrasRequest, ExtrasSize, Observer, PictureUpscaler, Progress, Tiling,
    UpscalerFile, UpscalerSlot,
};
use sdgen::weights::{self, Source};
use tensors::Tensors;

fn path(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/upscale")
        .join(file)
}

fn picture(file: &str) -> RgbImage {
    image::open(path(file)).expect(file).to_rgb8()
}

fn open(file: &str) -> Box<dyn Source> {
    let opened = weights::open::WeightFile::open(&path(file));
    Box::new(opened.unwrap_or_else(|error| panic!("{file}: {error}")))
}

/// `[1, 3, h, w]` through a network.
fn forward(file: &str, (shape, values): &(Vec<usize>, Vec<f32>)) -> (usize, Vec<f32>) {
    let network = Esrgan::new(&*open(file), &Placement::cpu()).expect(file);
    let x = Tensor::from_slice(values, shape.as_slice(), &Device::Cpu).unwrap();
    let x = x.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap();
    let y = network.forward(&x).expect(file);
    let y = y.permute((0, 3, 1, 2)).unwrap().flatten_all().unwrap();
    (network.scale(), y.to_vec1().unwrap())
}

/// Never stops; counts pieces.
#[derive(Default)]
struct Counting {
    pieces: AtomicUsize,
    planned: AtomicUsize,
    stop_after: Option<(usize, Control)>,
}

impl Observer for Counting {
    fn control(&self) -> Control {
        match self.stop_after {
            Some((pieces, control)) if self.pieces.load(Ordering::Relaxed) == pieces => control,
            _ => Control::Continue,
        }
    }

    fn progress(&self, progress: Progress) {
        self.pieces.fetch_add(1, Ordering::Relaxed);
        self.planned.store(progress.steps, Ordering::Relaxed);
    }

    fn wants_preview(&self) -> bool {
        false
    }

    fn preview(&self, _: RgbImage) {}
}

fn model(file: &str, tile: usize, overlap: usize) -> PictureUpscaler {
    PictureUpscaler::Model(UpscalerFile {
        name: file.into(),
        path: path(file),
        tiling: Tiling { tile, overlap },
    })
}

const REAL: &str = "animevideov3-x4.safetensors";

fn slot() -> UpscalerSlot {
    UpscalerSlot::new(Device::Cpu, DType::F32, |_| None)
}

fn by(factor: f64) -> ExtrasSize {
    ExtrasSize::By { factor, longest: 0 }
}

fn extras(pictures: Vec<RgbImage>, upscaler: PictureUpscaler, size: ExtrasSize) -> ExtrasRequest {
    ExtrasRequest {
        pictures: Arc::new(pictures),
        size,
        upscaler,
        second: None,
    }
}

fn one(picture: &RgbImage, upscaler: PictureUpscaler, size: ExtrasSize) -> RgbImage {
    let done = extras(vec![picture.clone()], upscaler, size).run(&slot(), &Counting::default());
    done.unwrap().pictures.remove(0).1
}

/// At most one value of a thousand is off, by 1.
#[track_caller]
fn assert_same_picture(name: &str, got: &RgbImage, want: &RgbImage) {
    assert_eq!(got.dimensions(), want.dimensions(), "{name}");
    let off = got.iter().zip(want.iter()).map(|(a, b)| a.abs_diff(*b));
    let (worst, count) = off.fold((0, 0), |(worst, count), d| {
        (worst.max(d), count + usize::from(d > 0))
    });
    let total = got.as_raw().len();
    eprintln!("{name}: {count} of {total} values differ, by at most {worst}");
    assert!(worst <= 1 && count <= total / 1000, "{name}");
}

#[test]
fn small_networks_equal_torch_in_every_naming_container_and_type() {
    let golden = Tensors::open("upscale/small.safetensors");
    let input = golden.get("input");
    for (file, scale) in [
        ("body_x4.pth", 4),
        ("body_x4.safetensors", 4),
        ("body_x2.pth", 2),
        ("body_x1.safetensors", 1),
        ("trunk_x2.pth", 2),
        ("sequence_x8.pth", 8),
        ("plus_x4.pth", 4),
        ("compact_x2.pth", 2),
    ] {
        let (found, got) = forward(file, &input);
        assert_eq!(found, scale, "{file}");
        let case = file.split('.').next().unwrap();
        let tolerance = Tolerance {
            abs: 0.0,
            rel_of_max: 1e-5,
        };
        assert_close(file, &got, &golden.values(case), tolerance);
    }
}

#[test]
fn a_photograph_by_the_real_weights_equals_torch() {
    let photo = picture("photo.png");
    let whole = one(&photo, model(REAL, 0, 0), by(4.0));
    assert_same_picture("whole", &whole, &picture("photo_whole.png"));
    let tiles = one(&photo, model(REAL, 32, 8), by(4.0));
    assert_same_picture("tiles", &tiles, &picture("photo_tiles.png"));
    let corner = image::imageops::crop_imm(&photo, 0, 0, 40, 30).to_image();
    // A1111 cuts 160x120, both multiples of 8.
    let padded = one(&corner, model(REAL, 48, 8), by(4.0));
    assert_same_picture("padded", &padded, &picture("photo_padded.png"));
}

#[test]
fn pieces_leave_no_seam() {
    let photo = picture("photo.png");
    let whole = one(&photo, model(REAL, 0, 0), by(4.0));
    let tiles = one(&photo, model(REAL, 48, 24), by(4.0));
    // The network sees 17 pixels around each; what a piece lacks of them at its edge is blended away over 24.
    let mean = |a: &RgbImage, b: &RgbImage| {
        let sum: u64 = a
            .iter()
            .zip(b.iter())
            .map(|(a, b)| u64::from(a.abs_diff(*b)))
            .sum();
        sum as f64 / a.as_raw().len() as f64
    };
    let off = mean(&whole, &tiles);
    eprintln!("mean difference {off}");
    assert!(off < 0.25, "{off}");
}

#[test]
fn a_torch_file_and_a_safetensors_file_of_a_network_give_the_same_bytes() {
    let photo = picture("photo.png");
    let files = ["body_x4.pth", "body_x4.safetensors"];
    let [a, b] = files.map(|file| one(&photo, model(file, 192, 8), by(2.0)));
    assert!(a == b && a.dimensions() == (144, 112));
}

#[test]
fn sizes_passes_and_mixtures_are_a1111s() {
    let photo = picture("photo.png");
    let size = |upscaler: &PictureUpscaler, size| one(&photo, upscaler.clone(), size).dimensions();
    for upscaler in [
        PictureUpscaler::Lanczos,
        PictureUpscaler::Nearest,
        model("compact_x2.pth", 192, 8),
    ] {
        assert_eq!(size(&upscaler, by(1.5)), (104, 80), "{upscaler:?}");
        assert_eq!(size(&upscaler, by(0.5)), (32, 24), "{upscaler:?}");
        let to = |crop| ExtrasSize::To {
            width: 100,
            height: 100,
            crop,
        };
        assert_eq!(size(&upscaler, to(true)), (100, 100), "{upscaler:?}");
        assert_eq!(size(&upscaler, to(false)), (128, 96), "{upscaler:?}");
    }
    assert_eq!(size(&PictureUpscaler::None, by(3.0)), (72, 56));

    // Factor 8 takes three passes of a network that doubles; factor 1 takes one.
    for (factor, planned) in [(8.0, 3), (1.0, 1), (0.5, 0)] {
        let seen = Counting::default();
        let job = extras(
            vec![photo.clone()],
            model("compact_x2.pth", 0, 0),
            by(factor),
        );
        job.run(&slot(), &seen).unwrap();
        assert_eq!(seen.pieces.load(Ordering::Relaxed), planned, "{factor}");
        assert_eq!(seen.planned.load(Ordering::Relaxed), planned, "{factor}");
    }

    let mut job = extras(vec![photo.clone()], PictureUpscaler::Lanczos, by(2.0));
    job.second = Some((PictureUpscaler::Nearest, 0.25));
    let done = job.run(&slot(), &Counting::default()).unwrap();
    let first = one(&photo, PictureUpscaler::Lanczos, by(2.0));
    let second = one(&photo, PictureUpscaler::Nearest, by(2.0));
    let mixed = |a: u8, b: u8| (f32::from(a) + 0.25 * (f32::from(b) - f32::from(a))) as u8;
    let right = done.pictures[0]
        .1
        .iter()
        .zip(first.iter().zip(second.iter()));
    assert!(right.into_iter().all(|(got, (a, b))| *got == mixed(*a, *b)));
    assert_eq!(
        done.infotext,
        "Postprocess upscale by: 2.0, Postprocess upscaler: Lanczos, Postprocess upscaler 2: Nearest"
    );
}

#[test]
fn stopping_takes_effect_between_pieces_and_keeps_what_is_finished() {
    let photo = picture("photo.png");
    let run = |stop_after| -> Extras {
        let seen = Counting {
            stop_after,
            ..Counting::default()
        };
        let job = extras(
            vec![photo.clone(); 3],
            model("compact_x2.pth", 40, 8),
            by(2.0),
        );
        job.run(&slot(), &seen).unwrap()
    };
    // A picture has 2 x 2 pieces.
    let done = run(Some((6, Control::Interrupt)));
    assert!(done.interrupted && done.pictures.len() == 1);
    let done = run(None);
    assert!(!done.interrupted && done.pictures.len() == 3);
    let seen = Counting {
        stop_after: Some((0, Control::Skip)),
        ..Counting::default()
    };
    let job = extras(vec![photo.clone()], model("compact_x2.pth", 40, 8), by(2.0));
    let done = job.run(&slot(), &seen).unwrap();
    assert!(!done.interrupted && done.pictures.is_empty());
}

#[test]
fn what_does_not_fit_into_memory_is_refused_before_it_is_allocated() {
    let slot = UpscalerSlot::new(Device::Cpu, DType::F32, |_| Some(1 << 20));
    let large = RgbImage::from_pixel(512, 512, Rgb([9; 3]));
    let job = extras(vec![large.clone()], model(REAL, 0, 0), by(4.0));
    let error = job
        .run(&slot, &Counting::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("MiB are free") && error.contains("ESRGAN_tile"),
        "{error}"
    );
    let huge = RgbImage::new(8000, 8000);
    let job = extras(vec![huge], model(REAL, 192, 8), by(4.0));
    let error = job
        .run(&slot, &Counting::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("32000x32000"), "{error}");
    let job = extras(vec![large], model(REAL, 16, 16), by(4.0));
    assert!(matches!(
        job.run(&slot, &Counting::default()),
        Err(Error::Invalid(_))
    ));
}

#[test]
fn files_that_are_no_upscaler_are_named() {
    let text = |file: &str| {
        let job = extras(vec![RgbImage::new(8, 8)], model(file, 192, 8), by(2.0));
        job.run(&slot(), &Counting::default())
            .unwrap_err()
            .to_string()
    };
    assert!(text("small.safetensors").contains("no upscaler that sdgen knows"));
    assert!(text("photo.png").contains("photo.png"));
    assert!(text("nothing.pth").contains("cannot read"));
}

#[test]
fn the_kept_upscaler_is_dropped_on_demand_and_loaded_again() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.pth");
    std::fs::copy(path("compact_x2.pth"), &file).unwrap();
    let slot = slot();
    let photo = picture("photo.png");
    let upscaler = PictureUpscaler::Model(UpscalerFile {
        name: "a".into(),
        path: file.clone(),
        tiling: Tiling::default(),
    });
    let job = extras(vec![photo], upscaler, by(2.0));
    let run = || {
        job.run(&slot, &Counting::default())
            .map(|done| done.pictures[0].1.clone())
    };
    let first = run().unwrap();
    slot.unload();
    assert!(run().unwrap() == first);
    std::fs::remove_file(&file).unwrap();
    assert!(matches!(run(), Err(Error::Weights(_))));
}
