//! Picture operations against Pillow's and `OpenCV`'s results.
//!
//! `tests/golden/imaging_*.json` come from `tests/golden/make/imaging.py` and hold a CRC of the reference's pixels, the pixels
//! themselves where they are few: all but the colour correction are compared exactly.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::{ImageBuffer, Pixel, RgbaImage};
use sdgen::imaging::inpaint::{
    InpaintArea, MaskEdge, MaskMode, MaskOptions, apply_overlay, fill_masked, latent_mask,
    mask_composite, prepare_image, prepare_mask,
};
use sdgen::imaging::{
    ColorReference, Direction, Filter, ResizeMode, alpha_composite, blend, blur_mask, fit, flatten,
    gaussian_blur, paste_masked, resize, to_grey,
};
use serde_json::Value;

fn golden(text: &str) -> Vec<Value> {
    serde_json::from_str(text).expect("golden file")
}

fn bytes(value: &Value) -> Vec<u8> {
    STANDARD
        .decode(value.as_str().expect("base64 text"))
        .expect("base64")
}

/// CRC of a PNG chunk, which zlib's `crc32` is too.
fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & 0u32.wrapping_sub(crc & 1))
        })
    })
}

/// Pixels of the generator in `imaging.py`.
fn noise<P: Pixel<Subpixel = u8>>(size: (u32, u32), mut seed: u32) -> ImageBuffer<P, Vec<u8>> {
    let count = size.0 as usize * size.1 as usize * usize::from(P::CHANNEL_COUNT);
    let next = |_| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 24) as u8
    };
    ImageBuffer::from_raw(size.0, size.1, (0..count).map(next).collect()).expect("size")
}

fn size(value: &Value) -> (u32, u32) {
    serde_json::from_value(value.clone()).expect("size")
}

fn number<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).expect("number")
}

/// Compares a picture with the CRC, and where it is short with the pixels, of the reference.
#[track_caller]
fn assert_picture<P: Pixel<Subpixel = u8>>(
    got: &ImageBuffer<P, Vec<u8>>,
    want: &Value,
    case: &Value,
) {
    assert_eq!(got.dimensions(), size(&want["size"]), "{case}");
    if want["pixels"].is_string() {
        assert_eq!(got.as_raw(), &bytes(&want["pixels"]), "{case}");
    }
    assert_eq!(crc32(got.as_raw()), number::<u32>(&want["crc"]), "{case}");
}

/// One operation on pictures of one kind of pixel.
fn check_operation<P: Pixel<Subpixel = u8>>(case: &Value) {
    let (source, seed) = (size(&case["source"]), number(&case["seed"]));
    let mut picture = noise::<P>(source, seed);
    match case["op"].as_str().expect("op") {
        "resize" => {
            let filter = match case["filter"].as_str().expect("filter") {
                "Nearest" => Filter::Nearest,
                "Box" => Filter::Box,
                "Bilinear" => Filter::Bilinear,
                "Bicubic" => Filter::Bicubic,
                _ => Filter::Lanczos,
            };
            let (width, height) = size(&case["target"]);
            picture = resize(&picture, width, height, filter).expect("resize");
        }
        "gaussian" => picture = gaussian_blur(&picture, number(&case["radius"])),
        "paste" => paste_masked(
            &mut picture,
            &noise(source, seed + 1),
            &noise(source, seed + 2),
        ),
        "blend" => picture = blend(&picture, &noise(source, seed + 1), number(&case["amount"])),
        op => panic!("unknown operation {op}"),
    }
    assert_picture(&picture, &case["want"], case);
}

#[test]
fn operations_equal_pillow_and_opencv() {
    for case in golden(include_str!("golden/imaging_operations.json")) {
        let (source, seed) = (size(&case["source"]), number(&case["seed"]));
        let want = &case["want"];
        match case["op"].as_str().expect("op") {
            "blur" => {
                let direction = if case["axis"] == "Across" {
                    Direction::Across
                } else {
                    Direction::Down
                };
                assert_picture(
                    &blur_mask(&noise(source, seed), number(&case["sigma"]), direction),
                    want,
                    &case,
                );
            }
            "alpha_composite" => {
                let mut under = noise(source, seed);
                alpha_composite(&mut under, &noise(source, seed + 1));
                assert_picture(&under, want, &case);
            }
            "grey" => assert_picture(&to_grey(&noise(source, seed)), want, &case),
            "flatten" => assert_picture(
                &flatten(&noise(source, seed), image::Rgb([255, 128, 7])),
                want,
                &case,
            ),
            "premultiply" => {
                // Doubling every row and taking the mean of each pair changes nothing but by the conversion in between.
                let picture: RgbaImage = noise(source, seed);
                let taller =
                    resize(&picture, source.0, source.1 * 2, Filter::Nearest).expect("resize");
                assert_picture(
                    &resize(&taller, source.0, source.1, Filter::Box).expect("resize"),
                    want,
                    &case,
                );
            }
            _ => match case["mode"].as_str().unwrap_or("RGB") {
                "L" => check_operation::<image::Luma<u8>>(&case),
                "RGBA" => check_operation::<image::Rgba<u8>>(&case),
                _ => check_operation::<image::Rgb<u8>>(&case),
            },
        }
    }
}

fn mask_of(case: &Value) -> image::GrayImage {
    let (width, height) = size(&case["source"]);
    ImageBuffer::from_raw(width, height, bytes(&case["mask_pixels"])).expect("mask")
}

fn resize_mode(case: &Value) -> ResizeMode {
    ResizeMode::try_from(number::<i64>(&case["mode"])).expect("mode")
}

fn check_whole_picture(case: &Value) {
    let (source, target, seed) = (
        size(&case["source"]),
        size(&case["target"]),
        number::<u32>(&case["seed"]),
    );
    let sigma = number(&case["sigma"]);
    let options = MaskOptions {
        mode: MaskMode::Masked,
        blur: (sigma, sigma),
        area: InpaintArea::WholePicture,
        resize_mode: resize_mode(case),
        size: target,
    };
    let mask = prepare_mask(&mask_of(case), &options)
        .expect("mask")
        .expect("not blank");
    assert_picture(&mask.mask, &case["mask"], case);
    assert_picture(&mask.overlay, &case["overlay_mask"], case);
    let prepared = prepare_image(&noise(source, seed), &mask, &options).expect("image");
    assert_picture(&prepared.image, &case["image"], case);
    assert_picture(&prepared.overlay, &case["overlay"], case);
    assert_picture(
        &fill_masked(&prepared.image, &mask.mask),
        &case["fill"],
        case,
    );
    let done =
        apply_overlay(&noise(target, seed + 100), &prepared.overlay, mask.region).expect("overlay");
    assert_picture(&done, &case["done"], case);
    let latent =
        latent_mask(&mask.mask, (target.0 / 8, target.1 / 8), MaskEdge::Hard).expect("latent");
    assert_eq!(latent, number::<Vec<f32>>(&case["latent"]));
    let soft =
        latent_mask(&mask.mask, (target.0 / 8, target.1 / 8), MaskEdge::Soft).expect("latent");
    let soft: Vec<u8> = soft
        .iter()
        .map(|value| (value * 255.0).round() as u8)
        .collect();
    assert_eq!(crc32(&soft), number::<u32>(&case["soft"]["crc"]));
}

fn check_only_masked(case: &Value) {
    let (source, target, seed) = (
        size(&case["source"]),
        size(&case["target"]),
        number::<u32>(&case["seed"]),
    );
    let sigma = number(&case["sigma"]);
    let area = InpaintArea::OnlyMasked {
        padding: number(&case["padding"]),
    };
    let options = MaskOptions {
        mode: MaskMode::Masked,
        blur: (sigma, sigma),
        area,
        resize_mode: ResizeMode::Stretch,
        size: target,
    };
    let mask = prepare_mask(&mask_of(case), &options)
        .expect("mask")
        .expect("not blank");
    let region = mask.region.expect("region");
    assert_eq!(
        [region.x, region.y, region.width, region.height],
        number::<[u32; 4]>(&case["region"])
    );
    assert_picture(&mask.mask, &case["mask"], case);
    let prepared = prepare_image(&noise(source, seed), &mask, &options).expect("image");
    assert_picture(&prepared.image, &case["image"], case);
    assert_picture(&prepared.overlay, &case["overlay"], case);
    let painted = noise(target, seed + 100);
    assert_picture(
        &apply_overlay(&painted, &prepared.overlay, mask.region).expect("overlay"),
        &case["done"],
        case,
    );
    assert_picture(
        &mask_composite(&painted, &prepared.overlay, &mask).expect("composite"),
        &case["composite"],
        case,
    );
}

#[test]
fn init_images_and_masks_are_prepared_as_in_a1111() {
    for case in golden(include_str!("golden/imaging_preparation.json")) {
        match case["op"].as_str().expect("op") {
            "whole" => check_whole_picture(&case),
            "masked" => check_only_masked(&case),
            _ => {
                let (source, target, seed) = (
                    size(&case["source"]),
                    size(&case["target"]),
                    number(&case["seed"]),
                );
                if case["kind"] == "L" {
                    assert_picture(
                        &fit::<image::Luma<u8>>(&noise(source, seed), resize_mode(&case), target)
                            .expect("fit"),
                        &case["want"],
                        &case,
                    );
                } else {
                    assert_picture(
                        &fit::<image::Rgb<u8>>(&noise(source, seed), resize_mode(&case), target)
                            .expect("fit"),
                        &case["want"],
                        &case,
                    );
                }
            }
        }
    }
}

#[test]
fn colours_are_corrected_as_in_a1111() {
    for case in golden(include_str!("golden/imaging_color.json")) {
        let (width, height) = size(&case["size"]);
        let picture =
            |key: &str| ImageBuffer::from_raw(width, height, bytes(&case[key])).expect("picture");
        let got = ColorReference::new(&picture("reference")).apply(&picture("picture"));
        let want = bytes(&case["want"]);
        let differences: Vec<u8> = got
            .iter()
            .zip(&want)
            .map(|(got, want)| got.abs_diff(*want))
            .collect();
        let mean = differences
            .iter()
            .map(|&difference| f64::from(difference))
            .sum::<f64>()
            / differences.len() as f64;
        // OpenCV's CIELAB is in fixed point and may round to a neighbour, which is up to 4 in RGB.
        assert!(
            mean < 0.5 && differences.iter().all(|&difference| difference <= 4),
            "mean {mean}, worst {:?}",
            differences.iter().max()
        );
    }
}
