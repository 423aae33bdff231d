//! Picture files: what Pillow writes is read, what is written is read back, damage and size are errors.
//!
//! `tests/golden/imaging_*.json` come from `tests/golden/make/imaging.py`. Lossless files and 8-bit operations are compared
//! exactly. Lossy files allow what two correct decoders of a smooth 24x16 picture may differ by, stated in each case.

use std::io::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::{DynamicImage, ImageBuffer, RgbImage, RgbaImage};
use sdgen::imaging::{
    EncodeOptions, Error, Format, Limits, decode, decode_base64, encode, read_metadata,
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

fn mode(picture: &DynamicImage) -> &'static str {
    match picture {
        DynamicImage::ImageLuma8(_) => "L",
        DynamicImage::ImageRgb8(_) => "RGB",
        DynamicImage::ImageRgba8(_) => "RGBA",
        _ => "another mode",
    }
}

fn worst(got: &[u8], want: &[u8]) -> u8 {
    assert_eq!(got.len(), want.len());
    got.iter()
        .zip(want)
        .map(|(a, b)| a.abs_diff(*b))
        .max()
        .unwrap_or(0)
}

/// A picture with every kind of detail; the same on every call.
fn sample(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        image::Rgb([(x * 7 + y * 3) as u8, (x * y) as u8, (x ^ y) as u8])
    })
}

#[test]
fn files_by_pillow_are_read_as_pillow_reads_them() {
    for case in golden(include_str!("golden/imaging_files.json")) {
        let name = case["name"].as_str().expect("name");
        let file = bytes(&case["file"]);
        let picture =
            decode(&file, Limits::default()).unwrap_or_else(|error| panic!("{name}: {error:?}"));
        assert_eq!(mode(&picture), case["mode"], "{name}");
        assert_eq!(
            serde_json::json!([picture.width(), picture.height()]),
            case["size"],
            "{name}"
        );
        let worst = worst(picture.as_bytes(), &bytes(&case["pixels"]));
        assert!(
            u64::from(worst) <= case["tolerance"].as_u64().expect("tolerance"),
            "{name}: off by {worst}"
        );
        let metadata = read_metadata(&file).expect("metadata");
        assert_eq!(
            metadata.infotext.as_deref(),
            case["infotext"].as_str(),
            "{name}"
        );
        assert_eq!(
            serde_json::to_value(&metadata.texts).expect("texts"),
            case["texts"],
            "{name}"
        );
    }
}

#[test]
fn every_format_carries_the_infotext() {
    let picture = sample(33, 21);
    for text in [
        "a cat\nSteps: 20, Seed: 1",
        "é only Latin-1",
        "日本, 😀\nNegative prompt: x",
    ] {
        for format in [Format::Png, Format::Jpeg, Format::WebP] {
            let encoded = encode(
                &picture,
                &EncodeOptions {
                    format,
                    infotext: Some(text),
                    ..EncodeOptions::default()
                },
            )
            .expect("encode");
            assert_eq!(
                (encoded.format, Format::sniff(&encoded.bytes)),
                (format, Some(format))
            );
            assert_eq!(
                read_metadata(&encoded.bytes)
                    .expect("metadata")
                    .infotext
                    .as_deref(),
                Some(text),
                "{format}"
            );
            let back = decode(&encoded.bytes, Limits::default())
                .expect("decode")
                .into_rgb8();
            if format == Format::Jpeg {
                assert_eq!(back.dimensions(), picture.dimensions());
            } else {
                assert_eq!(back, picture, "{format}");
            }
        }
    }
}

#[test]
fn latin_1_goes_to_text_and_the_rest_to_itxt() {
    let chunk_of = |text: &str| {
        let file = encode(
            &sample(4, 4),
            &EncodeOptions {
                infotext: Some(text),
                ..EncodeOptions::default()
            },
        )
        .expect("encode")
        .bytes;
        let found = |kind: &[u8]| file.windows(4).any(|window| window == kind);
        (found(b"tEXt"), found(b"iTXt"))
    };
    assert_eq!(
        (chunk_of("é"), chunk_of("日")),
        ((true, false), (false, true))
    );
    let texts = [("postprocessing", "Upscale 2x")];
    let options = EncodeOptions {
        infotext: Some("e"),
        keyword: "extras",
        texts: &texts,
        ..EncodeOptions::default()
    };
    let metadata =
        read_metadata(&encode(&sample(4, 4), &options).expect("encode").bytes).expect("metadata");
    assert_eq!(
        metadata.texts,
        [
            ("extras".to_string(), "e".to_string()),
            ("postprocessing".to_string(), "Upscale 2x".to_string())
        ]
    );
    assert_eq!(metadata.infotext.as_deref(), Some("e"));
}

#[test]
fn greyscale_and_transparency_survive() {
    let rgba = RgbaImage::from_fn(9, 5, |x, y| {
        image::Rgba([x as u8, y as u8, 7, (x * 20) as u8])
    });
    let grey = ImageBuffer::from_fn(9, 5, |x, y| image::Luma([(x * y) as u8]));
    for format in [Format::Png, Format::WebP] {
        let options = EncodeOptions {
            format,
            ..EncodeOptions::default()
        };
        let back = decode(
            &encode(&rgba, &options).expect("encode").bytes,
            Limits::default(),
        )
        .expect("decode");
        assert_eq!(back.as_rgba8(), Some(&rgba), "{format}");
        let back = decode(
            &encode(&grey, &options).expect("encode").bytes,
            Limits::default(),
        )
        .expect("decode");
        assert_eq!(back.into_luma8(), grey, "{format}");
    }
    let jpeg = encode(
        &rgba,
        &EncodeOptions {
            format: Format::Jpeg,
            ..EncodeOptions::default()
        },
    )
    .expect("encode");
    assert_eq!(
        mode(&decode(&jpeg.bytes, Limits::default()).expect("decode")),
        "RGB"
    );
}

#[test]
fn pictures_too_large_for_a_format_become_png() {
    let wide = RgbImage::new(16384, 1);
    let encoded = encode(
        &wide,
        &EncodeOptions {
            format: Format::WebP,
            ..EncodeOptions::default()
        },
    )
    .expect("encode");
    assert_eq!(encoded.format, Format::Png);
    let jpeg = EncodeOptions {
        format: Format::Jpeg,
        infotext: Some(&"日".repeat(40_000)),
        ..EncodeOptions::default()
    };
    assert!(matches!(
        encode(&sample(4, 4), &jpeg),
        Err(Error::TextTooLong { limit: 65527, .. })
    ));
    assert!(matches!(
        encode(&RgbImage::new(0, 5), &EncodeOptions::default()),
        Err(Error::Empty { .. })
    ));
}

#[test]
fn limits_are_checked_before_anything_is_allocated() {
    // A PNG whose header claims 2^31 - 1 pixels a side.
    let mut file = encode(&sample(4, 4), &EncodeOptions::default())
        .expect("encode")
        .bytes;
    file[16..24].copy_from_slice(&[0x7f, 0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff]);
    let crc = crc32(&file[12..29]).to_be_bytes();
    file[29..33].copy_from_slice(&crc);
    assert!(decode(&file, Limits::default()).is_err());
    let small = encode(&sample(40, 30), &EncodeOptions::default())
        .expect("encode")
        .bytes;
    assert!(matches!(
        decode(
            &small,
            Limits {
                side: 32,
                pixels: u64::MAX
            }
        ),
        Err(Error::TooLarge {
            width: 40,
            height: 30,
            ..
        })
    ));
    assert!(matches!(
        decode(
            &small,
            Limits {
                side: 64,
                pixels: 1000
            }
        ),
        Err(Error::TooLarge { .. })
    ));
    assert!(
        decode(
            &small,
            Limits {
                side: 40,
                pixels: 1200
            }
        )
        .is_ok()
    );
}

/// CRC of a PNG chunk.
fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & 0u32.wrapping_sub(crc & 1))
        })
    })
}

#[test]
fn damaged_files_are_errors() {
    assert!(matches!(
        decode(b"GIF89a", Limits::default()),
        Err(Error::UnknownFormat)
    ));
    assert!(matches!(
        decode(b"", Limits::default()),
        Err(Error::UnknownFormat)
    ));
    assert!(matches!(read_metadata(b"BM"), Err(Error::UnknownFormat)));
    for case in golden(include_str!("golden/imaging_files.json")) {
        let file = bytes(&case["file"]);
        for length in (0..file.len()).step_by(7) {
            // Cut short: whatever it is, it is no panic.
            let _ = decode(&file[..length], Limits::default());
            let _ = read_metadata(&file[..length]);
        }
        for at in (0..file.len()).step_by(5) {
            let mut damaged = file.clone();
            damaged[at] ^= 0x55;
            let _ = decode(&damaged, Limits::default());
            let _ = read_metadata(&damaged);
        }
    }
}

#[test]
fn a_packed_text_bomb_is_left_out() {
    // 64 MiB of blanks in a compressed text chunk; at most 16 MiB are unpacked.
    let mut packed = Vec::new();
    let mut encoder = png::Encoder::new(&mut packed, 1, 1);
    encoder.set_color(png::ColorType::Grayscale);
    encoder
        .add_ztxt_chunk("parameters".into(), " ".repeat(64 << 20))
        .expect("text");
    let mut writer = encoder.write_header().expect("header");
    writer.write_image_data(&[0]).expect("pixels");
    writer.finish().expect("end");
    packed.flush().expect("a vector");
    let metadata = read_metadata(&packed).expect("metadata");
    assert_eq!(metadata.texts, []);
}

#[test]
fn data_urls_are_decoded() {
    let file = encode(&sample(5, 5), &EncodeOptions::default())
        .expect("encode")
        .bytes;
    let text = STANDARD.encode(&file);
    assert_eq!(decode_base64(&text).expect("bare"), file);
    assert_eq!(
        decode_base64(&format!("data:image/png;base64,{text}")).expect("url"),
        file
    );
}
