//! What users send by mistake or on purpose: the answer names it, and the next job works.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/server.rs"]
mod server;

use std::io::Cursor;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::{DynamicImage, GrayImage, ImageFormat, RgbImage};
use serde_json::{Value, json};
use server::{Shared, small, with};

static SERVER: Shared = Shared::new(&[]);

fn file(picture: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn png(picture: impl Into<DynamicImage>) -> String {
    STANDARD.encode(file(&picture.into(), ImageFormat::Png))
}

fn init() -> String {
    png(RgbImage::from_fn(64, 64, |x, y| {
        image::Rgb([x as u8 * 4, y as u8 * 4, 80])
    }))
}

/// A request from a picture.
fn from_image(changes: Value) -> Value {
    with(with(small(), json!({ "init_images": [init()] })), changes)
}

/// The words of a refusal: `detail`, or each problem's field and message.
fn words(answer: &Value) -> String {
    match &answer["detail"] {
        Value::Array(problems) => problems
            .iter()
            .map(|problem| {
                let field = problem["loc"][1].as_str().unwrap_or_default();
                format!("{field}: {}", problem["msg"].as_str().unwrap())
            })
            .collect::<Vec<_>>()
            .join("; "),
        detail => detail.as_str().unwrap_or_default().to_string(),
    }
}

#[track_caller]
fn refused(path: &str, body: &Value, status: u16, message: &str) {
    let answer = SERVER.hold().post(path, body);
    let text = answer.text();
    assert_eq!(
        (answer.status, words(&answer.json()).as_str()),
        (status, message),
        "{text}"
    );
    SERVER.hold().assert_works();
}

#[track_caller]
fn works(path: &str, body: &Value) -> Value {
    let answer = SERVER.hold().post(path, body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

const TXT2IMG: &str = "/sdapi/v1/txt2img";
const IMG2IMG: &str = "/sdapi/v1/img2img";

#[test]
fn brackets_never_matter() {
    let _held = SERVER.hold();
    let deep =
        |open: &str, close: &str| format!("{}a{}", open.repeat(10_000), close.repeat(10_000));
    for prompt in [
        "((a [b (c:1.2",
        ")]:1.5)",
        "[a:b:",
        "a AND b :",
        "<lora:",
        &deep("[", "]"),
        &deep("[a|", "]"),
    ] {
        let body = with(
            small(),
            json!({ "prompt": prompt, "negative_prompt": prompt, "steps": 1 }),
        );
        let made = works(TXT2IMG, &body);
        assert_eq!(made["images"].as_array().unwrap().len(), 1);
    }
    let heavy = with(small(), json!({ "prompt": deep("(", ")") }));
    refused(
        TXT2IMG,
        &heavy,
        400,
        "attention weights of a prompt are too large: its brackets multiply them beyond any number; use fewer",
    );
}

#[test]
fn prompts_have_a_limit() {
    let _held = SERVER.hold();
    let body = with(small(), json!({ "prompt": "a".repeat(10 << 20) }));
    refused(
        TXT2IMG,
        &body,
        422,
        "prompt: has 10485760 bytes, more than 65536 (setting `limits.max_prompt_kib`)",
    );
}

#[test]
fn sizes_are_refused_before_anything_is_made() {
    let _held = SERVER.hold();
    let sized = |changes: Value| with(small(), changes);
    refused(
        TXT2IMG,
        &sized(json!({ "width": 0 })),
        422,
        "width: must be between 8 and 4096 pixels (setting `limits.max_side`): `0`",
    );
    refused(
        TXT2IMG,
        &sized(json!({ "width": 100_000, "height": 100_000 })),
        422,
        "width: must be between 8 and 4096 pixels (setting `limits.max_side`): `100000`; height: must be between 8 and 4096 pixels (setting `limits.max_side`): `100000`",
    );
    refused(
        TXT2IMG,
        &sized(json!({ "width": 4096, "height": 4096, "batch_size": 8 })),
        422,
        "batch_size: `batch_size * width * height` is 134.2 megapixels, more than 64 (setting `limits.max_megapixels`)",
    );
    let hires = |changes: Value| sized(with(json!({ "enable_hr": true }), changes));
    refused(
        TXT2IMG,
        &hires(json!({ "hr_scale": 1e9 })),
        422,
        "hr_scale: of `1000000000` makes a side of 64000000000 pixels; a side must be between 8 and 4096 pixels (setting `limits.max_side`)",
    );
    refused(
        TXT2IMG,
        &hires(json!({ "hr_resize_x": 1_000_000 })),
        422,
        "hr_resize_x: must be 0 or between 8 and 4096 pixels (setting `limits.max_side`): `1000000`",
    );
    refused(
        TXT2IMG,
        &hires(json!({ "denoising_strength": 1.5 })),
        422,
        "denoising_strength: must be between 0 and 1: `1.5`",
    );
}

#[test]
fn denoising_strengths_are_shares() {
    let _held = SERVER.hold();
    for strength in [-0.1, 1.5] {
        let message = format!("denoising_strength: must be between 0 and 1: `{strength}`");
        refused(
            IMG2IMG,
            &from_image(json!({ "denoising_strength": strength })),
            422,
            &message,
        );
    }
    drop(works(
        IMG2IMG,
        &from_image(json!({ "denoising_strength": 0, "steps": 2 })),
    ));
}

#[test]
fn masks_of_any_size_and_none() {
    let _held = SERVER.hold();
    let mask = |picture: GrayImage| from_image(json!({ "mask": png(picture) }));
    let white = |width, height| GrayImage::from_pixel(width, height, image::Luma([255]));
    drop(works(IMG2IMG, &mask(white(64, 64))));
    drop(works(IMG2IMG, &mask(white(31, 77))));
    drop(works(IMG2IMG, &mask(white(1, 1))));
    let black = works(IMG2IMG, &mask(GrayImage::new(64, 64)));
    let remark =
        r#"Unable to perform "Inpaint Only mask" because mask is blank, switch to img2img mode."#;
    assert_eq!(black["parameters"]["comments"], json!({ remark: 1 }));
    let whole = with(
        mask(GrayImage::new(64, 64)),
        json!({ "inpaint_full_res": false }),
    );
    drop(works(IMG2IMG, &whole));
    // A PNG whose header says 0x0 pixels.
    let mut empty = STANDARD.decode(init()).unwrap();
    empty[16..24].fill(0);
    let crc = crc32(&empty[12..29]);
    empty[29..33].copy_from_slice(&crc.to_be_bytes());
    let zero = STANDARD.encode(empty);
    refused(
        IMG2IMG,
        &from_image(json!({ "mask": zero })),
        400,
        "Invalid encoded image: picture cannot be read: Format error decoding Png: Invalid image dimensions",
    );
    refused(
        IMG2IMG,
        &from_image(json!({ "init_images": [zero] })),
        400,
        "Invalid encoded image: picture cannot be read: Format error decoding Png: Invalid image dimensions",
    );
}

#[test]
fn pictures_of_odd_kinds_are_read_or_named() {
    let _held = SERVER.hold();
    let with_picture =
        |bytes: &[u8]| from_image(json!({ "init_images": [STANDARD.encode(bytes)] }));
    let rgb = DynamicImage::from(RgbImage::from_pixel(64, 64, image::Rgb([200, 90, 10])));
    drop(works(
        IMG2IMG,
        &from_image(json!({ "init_images": [png(RgbImage::new(1, 1))] })),
    ));
    drop(works(
        IMG2IMG,
        &with_picture(&file(&rgb.to_rgb16().into(), ImageFormat::Png)),
    ));
    drop(works(
        IMG2IMG,
        &with_picture(&file(&rgb.to_luma16().into(), ImageFormat::Png)),
    ));
    drop(works(
        IMG2IMG,
        &with_picture(&file(&rgb, ImageFormat::Jpeg)),
    ));
    let webp = file(&rgb, ImageFormat::WebP);
    drop(works(IMG2IMG, &with_picture(&webp)));
    let good = file(&rgb, ImageFormat::Png);
    refused(
        IMG2IMG,
        &with_picture(&good[..good.len() / 2]),
        400,
        "Invalid encoded image: picture cannot be read: unexpected end of file",
    );
    refused(
        IMG2IMG,
        &with_picture(&webp[..webp.len() / 2]),
        400,
        "Invalid encoded image: picture cannot be read: Format error decoding WebP: Corrupt bitstream",
    );
    refused(
        IMG2IMG,
        &with_picture(b"GIF89a not one of ours"),
        400,
        "Invalid encoded image: unknown picture format; use PNG, JPEG or WebP",
    );
    refused(
        IMG2IMG,
        &with_picture(b"BM bitmap"),
        400,
        "Invalid encoded image: unknown picture format; use PNG, JPEG or WebP",
    );
    refused(
        IMG2IMG,
        &from_image(json!({ "init_images": ["%%%"] })),
        400,
        "Invalid encoded image: invalid base64 picture: a character or length that base64 does not have: Invalid symbol 37, offset 0.",
    );
    refused(
        IMG2IMG,
        &from_image(json!({ "init_images": [""] })),
        400,
        "Invalid encoded image: invalid base64 picture: it is empty",
    );
    refused(
        IMG2IMG,
        &from_image(json!({ "init_images": [] })),
        404,
        "Init image not found",
    );
}

#[test]
fn cmyk_and_animated_files_are_read() {
    let _held = SERVER.hold();
    let picture = |bytes: &[u8]| from_image(json!({ "init_images": [STANDARD.encode(bytes)] }));
    drop(works(
        IMG2IMG,
        &picture(include_bytes!("golden/pictures/cmyk.jpg")),
    ));
    drop(works(
        IMG2IMG,
        &picture(include_bytes!("golden/pictures/animated.webp")),
    ));
    drop(works(
        IMG2IMG,
        &picture(include_bytes!("golden/pictures/animated.png")),
    ));
}

#[test]
fn pictures_of_sixteen_thousand_pixels_are_refused_by_their_header() {
    let _held = SERVER.hold();
    let mut huge = STANDARD.decode(init()).unwrap();
    for (at, side) in [(16, 16_384_u32), (20, 16_384)] {
        huge[at..at + 4].copy_from_slice(&side.to_be_bytes());
    }
    let crc = crc32(&huge[12..29]);
    huge[29..33].copy_from_slice(&crc.to_be_bytes());
    let body = from_image(json!({ "init_images": [STANDARD.encode(huge)] }));
    refused(
        IMG2IMG,
        &body,
        400,
        "Invalid encoded image: picture of 16384x16384 pixels is too large; a side may have 16384 pixels and all pictures of a request 64 megapixels (setting `limits.max_megapixels`)",
    );
}

#[test]
fn loras_of_another_architecture_are_named() {
    let server = SERVER.hold();
    let dir = server.data().join("models/Lora");
    std::fs::create_dir_all(&dir).unwrap();
    let shape = |name: &str, rows: usize, columns: usize| (name.to_string(), rows, columns);
    write_safetensors(
        &dir.join("other.safetensors"),
        &[
            shape(
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
                4,
                320,
            ),
            shape(
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight",
                320,
                4,
            ),
        ],
    );
    std::fs::write(
        dir.join("broken.safetensors"),
        b"\xff\xff\xff\xff\xff\xff\xff\xff{}",
    )
    .unwrap();
    for (name, comment) in [
        (
            "other",
            "LoRA `other` has no effect: none of its 1 modules is part of this checkpoint",
        ),
        ("broken", "Lora not found: broken"),
    ] {
        let body = with(
            small(),
            json!({ "prompt": format!("apple <lora:{name}:1>") }),
        );
        let made = works(TXT2IMG, &body);
        assert_eq!(
            made["parameters"]["comments"],
            json!({ comment: 1 }),
            "{name}"
        );
        server.assert_works();
    }
    let body = with(small(), json!({ "prompt": "apple <lora:other:much>" }));
    refused(
        TXT2IMG,
        &body,
        400,
        "`<lora:other:…>`: multiplier `much` is not a number",
    );
}

#[test]
fn names_and_settings_are_checked() {
    let _held = SERVER.hold();
    let body = |changes: Value| with(small(), changes);
    refused(
        TXT2IMG,
        &body(json!({ "override_settings": { "sdxl_crop_top": "x" } })),
        422,
        "sdxl_crop_top: value is not a valid integer",
    );
    refused(
        TXT2IMG,
        &json!({ "infotext": "a\nSteps: many, Sampler: Euler, Seed: 1" }),
        422,
        "steps: value is not a valid integer",
    );
    refused(
        TXT2IMG,
        &body(json!({ "override_settings": { "samples_format": "exe" } })),
        422,
        r#"samples_format: unknown value: "exe"; one of: png, jpg, jpeg, webp"#,
    );
    let color = from_image(json!({ "override_settings": { "img2img_background_color": "blue" } }));
    refused(
        IMG2IMG,
        &color,
        422,
        r#"img2img_background_color: no colour like `#ffffff`: "blue""#,
    );
}

/// CRC-32 as PNG chunks have it.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 {
                crc >> 1 ^ 0xedb8_8320
            } else {
                crc >> 1
            }
        })
    })
}

/// A file of `f32` zeros: name, rows, columns of each tensor.
fn write_safetensors(path: &std::path::Path, tensors: &[(String, usize, usize)]) {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, rows, columns) in tensors {
        let start = end;
        end += rows * columns * 4;
        header.insert(
            name.clone(),
            json!({ "dtype": "F32", "shape": [rows, columns], "data_offsets": [start, end] }),
        );
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + end, 0);
    std::fs::write(path, bytes).unwrap();
}
