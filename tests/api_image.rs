//! `img2img`, inpainting and hires fix on a real server and the demo model.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/server.rs"]
mod server;

use std::io::Cursor;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::{DynamicImage, GrayImage, ImageFormat, Luma, Rgb, RgbImage, Rgba, RgbaImage};
use serde_json::{Value, json};
use server::{Answer, Server, small, with};

const IMG2IMG: &str = "/sdapi/v1/img2img";
const TXT2IMG: &str = "/sdapi/v1/txt2img";

fn decode(bytes: &[u8]) -> RgbImage {
    image::load_from_memory(bytes).unwrap().into_rgb8()
}

fn png(picture: impl Into<DynamicImage>) -> String {
    encoded(picture, ImageFormat::Png)
}

fn encoded(picture: impl Into<DynamicImage>, format: ImageFormat) -> String {
    let mut bytes = Cursor::new(Vec::new());
    picture.into().write_to(&mut bytes, format).unwrap();
    STANDARD.encode(bytes.into_inner())
}

/// A picture with something in it everywhere.
fn scene(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        Rgb([
            (x * 255 / width) as u8,
            (y * 255 / height) as u8,
            ((x / 8 + y / 8) % 2 * 200) as u8,
        ])
    })
}

/// White between `from` and `to` on both axes.
fn square(size: (u32, u32), from: u32, to: u32) -> GrayImage {
    let inside = |x: u32, y: u32| (from..to).contains(&x) && (from..to).contains(&y);
    GrayImage::from_fn(size.0, size.1, |x, y| {
        Luma([if inside(x, y) { 255 } else { 0 }])
    })
}

/// A request from [`scene`] of 64 x 64 pixels.
fn from_scene(changes: Value) -> Value {
    let base = with(
        small(),
        json!({ "init_images": [png(scene(64, 64))], "steps": 4 }),
    );
    with(base, changes)
}

/// Mean distance of two pictures, 0 to 255.
fn distance(a: &RgbImage, b: &RgbImage) -> f64 {
    assert_eq!(a.dimensions(), b.dimensions());
    let sum: u64 = a
        .as_raw()
        .iter()
        .zip(b.as_raw())
        .map(|(a, b)| u64::from(a.abs_diff(*b)))
        .sum();
    sum as f64 / a.as_raw().len() as f64
}

fn only(answer: &Answer) -> RgbImage {
    let images = answer.images();
    assert_eq!(images.len(), 1);
    decode(&images[0])
}

#[track_caller]
fn detail(answer: &Answer) -> (u16, String) {
    let answered = answer.json();
    let text = answered["detail"].as_str();
    let text = text.unwrap_or_else(|| panic!("no sentence: {}: {answered}", answer.status));
    (answer.status, text.to_string())
}

#[test]
fn smaller_strengths_change_a_picture_less() {
    let server = Server::start(&[]);
    let at = |strength: f64| {
        let request = from_scene(json!({ "denoising_strength": strength }));
        let answer = server.post(IMG2IMG, &request);
        assert_eq!(answer.info()["denoising_strength"], json!(strength));
        distance(&only(&answer), &scene(64, 64))
    };
    let (none, some, all) = (at(0.0), at(0.5), at(1.0));
    assert!(none < some && some < all, "{none} {some} {all}");
}

#[test]
fn the_answer_has_a1111s_model_and_infotext() {
    let server = Server::start(&[]);
    let answer = server.post(IMG2IMG, &from_scene(json!({ "denoising_strength": 0.5 })));
    let info = answer.info();
    let infotext = info["infotexts"][0].as_str().unwrap();
    let expected = "a red apple\nSteps: 4, Sampler: Euler, Schedule type: Automatic, CFG scale: 7.0, Seed: 7, Size: 64x64, Model hash: ";
    assert!(infotext.starts_with(expected), "{infotext}");
    assert!(
        infotext.ends_with("Model: sdgen-demo, Denoising strength: 0.5, Version: v1.10.1"),
        "{infotext}"
    );
    assert_eq!(
        info["extra_generation_params"]["Denoising strength"],
        json!(0.5)
    );
    let parameters = &answer.json()["parameters"];
    assert_eq!(parameters.as_object().unwrap().len(), 57);
    assert_eq!(
        (&parameters["init_images"], &parameters["mask"]),
        (&Value::Null, &Value::Null)
    );
    assert_eq!(
        (&parameters["mask_blur"], &parameters["inpaint_full_res"]),
        (&Value::Null, &json!(true))
    );

    let again = from_scene(
        json!({ "denoising_strength": 0.5, "include_init_images": true, "save_images": true }),
    );
    let repeated = server.post(IMG2IMG, &again);
    assert_eq!(
        repeated.json()["parameters"]["init_images"],
        again["init_images"]
    );
    assert_eq!(repeated.images(), answer.images(), "same seed, same bytes");
    let files = server.files("outputs/img2img-images");
    assert!(
        files.len() == 1 && files[0].ends_with("00000-7.png"),
        "{files:?}"
    );
    assert_eq!(std::fs::read(&files[0]).unwrap(), answer.images()[0]);
    assert!(server.files("outputs/txt2img-images").is_empty());
}

#[test]
fn without_a_size_the_result_has_512_pixels() {
    let server = Server::start(&[]);
    let request = json!({ "init_images": [format!("data:image/png;base64,{}", png(scene(24, 40)))], "steps": 1, "denoising_strength": 0.1,
        "sampler_name": "Euler" });
    assert_eq!(
        only(&server.post(IMG2IMG, &request)).dimensions(),
        (512, 512)
    );
}

#[test]
fn every_resize_mode_leads_to_the_size_asked_for() {
    let server = Server::start(&[]);
    let mut results = Vec::new();
    for mode in 0..4 {
        let request = from_scene(
            json!({ "init_images": [png(scene(96, 48))], "resize_mode": mode, "denoising_strength": 0.0 }),
        );
        let result = only(&server.post(IMG2IMG, &request));
        assert_eq!(result.dimensions(), (64, 64), "mode {mode}");
        assert!(!results.contains(&result), "mode {mode} is another's");
        results.push(result);
    }
}

#[test]
fn a_batch_from_pictures_equals_singles() {
    let server = Server::start(&[]);
    let batch = server.post(
        IMG2IMG,
        &from_scene(json!({ "batch_size": 2, "n_iter": 2, "seed": 10 })),
    );
    let images = batch.images();
    assert_eq!(batch.info()["all_seeds"], json!([10, 11, 12, 13]));
    for (index, image) in images.iter().enumerate() {
        let single = server.post(IMG2IMG, &from_scene(json!({ "seed": 10 + index })));
        assert_eq!(decode(image), only(&single), "picture {index}");
    }
    // One picture each: the batch is as large as there are pictures.
    let other = RgbImage::from_pixel(64, 64, Rgb([200, 30, 30]));
    let pictures = json!([png(scene(64, 64)), png(other.clone())]);
    let each = server.post(
        IMG2IMG,
        &from_scene(json!({ "init_images": pictures, "batch_size": 3, "seed": 10 })),
    );
    let images = each.images();
    assert_eq!((&each.info()["batch_size"], images.len()), (&json!(2), 2));
    let second = server.post(
        IMG2IMG,
        &from_scene(json!({ "init_images": [png(other)], "seed": 11 })),
    );
    assert_eq!(decode(&images[1]), only(&second));
}

#[test]
fn inpainting_paints_under_the_mask_only() {
    let server = Server::start(&[]);
    let source = scene(64, 64);
    for (fill, label) in [
        (0, Some("fill")),
        (1, None),
        (2, Some("latent noise")),
        (3, Some("latent nothing")),
    ] {
        let request = from_scene(
            json!({ "mask": png(square((64, 64), 16, 48)), "mask_blur": 0, "inpaint_full_res": false, "inpainting_fill": fill,
            "denoising_strength": 0.9 }),
        );
        let answer = server.post(IMG2IMG, &request);
        let result = only(&answer);
        let (mut kept, mut painted) = (0u64, 0u64);
        for (x, y, pixel) in result.enumerate_pixels() {
            let inside = (16..48).contains(&x) && (16..48).contains(&y);
            let change: u64 = (0..3)
                .map(|c| u64::from(pixel[c].abs_diff(source.get_pixel(x, y)[c])))
                .sum();
            *if inside { &mut painted } else { &mut kept } += change;
        }
        assert_eq!(kept, 0, "fill {fill}: every pixel outside is the source's");
        assert!(painted > 32 * 32 * 3, "fill {fill}: {painted}");
        let extra = &answer.info()["extra_generation_params"];
        assert_eq!(extra["Masked content"].as_str(), label);
        assert!(extra["Inpaint area"].is_null());
    }
}

#[test]
fn the_masked_area_alone_keeps_the_sources_size() {
    let server = Server::start(&[]);
    let source = scene(120, 88);
    let request = from_scene(
        json!({ "init_images": [png(source.clone())], "mask": png(square((120, 88), 24, 56)), "inpaint_full_res_padding": 8, "mask_blur": 2 }),
    );
    let answer = server.post(IMG2IMG, &request);
    let result = only(&answer);
    assert_eq!(result.dimensions(), source.dimensions());
    assert_eq!(result.get_pixel(0, 0), source.get_pixel(0, 0));
    assert_eq!(result.get_pixel(119, 87), source.get_pixel(119, 87));
    assert_ne!(result.get_pixel(40, 40), source.get_pixel(40, 40));
    let infotext = answer.info()["infotexts"][0].as_str().unwrap().to_string();
    assert!(
        infotext.contains("Denoising strength: 0.75, Mask blur: 2, Inpaint area: Only masked, Masked area padding: 8, Masked content: fill, Version"),
        "{infotext}"
    );
    // A mask of another size is brought to the picture's.
    let half = with(
        request.clone(),
        json!({ "mask": png(square((60, 44), 12, 28)) }),
    );
    let other = only(&server.post(IMG2IMG, &half));
    assert_eq!(other.get_pixel(0, 0), source.get_pixel(0, 0));
    assert_ne!(other.get_pixel(40, 40), source.get_pixel(40, 40));
    // An alpha channel says where to paint, `inpainting_mask_invert` where not to.
    let mask = square((120, 88), 24, 56);
    let alpha = RgbaImage::from_fn(120, 88, |x, y| Rgba([0, 0, 0, mask.get_pixel(x, y)[0]]));
    let by_alpha = with(request.clone(), json!({ "mask": png(alpha) }));
    assert_eq!(only(&server.post(IMG2IMG, &by_alpha)), result);
    let mut inverse = mask;
    inverse.iter_mut().for_each(|value| *value = 255 - *value);
    let inverted = server.post(
        IMG2IMG,
        &with(
            request,
            json!({ "mask": png(inverse), "inpainting_mask_invert": true }),
        ),
    );
    assert_eq!(only(&inverted), result);
    assert_eq!(
        inverted.info()["extra_generation_params"]["Mask mode"],
        "Inpaint not masked"
    );
}

#[test]
fn a_blank_mask_is_plain_img2img() {
    let server = Server::start(&[]);
    let plain = server.post(IMG2IMG, &from_scene(json!({})));
    let black = json!({ "mask": png(GrayImage::new(64, 64)) });
    let blank = server.post(IMG2IMG, &from_scene(black.clone()));
    assert_eq!(blank.images(), plain.images());
    assert!(
        server.log().contains(
            r#"Unable to perform "Inpaint Only mask" because mask is blank, switch to img2img mode."#
        ),
        "{}",
        server.log()
    );
    let whole = server.post(
        IMG2IMG,
        &from_scene(with(black, json!({ "inpaint_full_res": 0 }))),
    );
    assert_eq!(only(&whole), scene(64, 64), "nothing is painted");
}

#[test]
fn options_act_on_pictures() {
    let server = Server::start(&[]);
    let base = json!({ "mask": png(square((64, 64), 16, 48)), "inpaint_full_res": false, "mask_blur": 0, "denoising_strength": 0.5 });
    let by = |settings: Value| {
        let request = with(base.clone(), json!({ "override_settings": settings }));
        server.post(IMG2IMG, &from_scene(request))
    };
    let plain = by(json!({}));
    let noisy = by(json!({ "initial_noise_multiplier": 1.2, "img2img_extra_noise": 0.1 }));
    assert_ne!(noisy.images(), plain.images());
    let extra = &noisy.info()["extra_generation_params"];
    assert_eq!(
        (&extra["Noise multiplier"], &extra["Extra noise"]),
        (&json!(1.2), &json!(0.1))
    );
    assert_ne!(
        by(json!({ "img2img_fix_steps": true })).images(),
        plain.images()
    );
    assert_ne!(
        by(json!({ "img2img_color_correction": true })).images(),
        plain.images()
    );
    assert_ne!(only(&by(json!({ "overlay_inpaint": false }))), only(&plain));

    let masks = by(json!({ "return_mask": true, "return_mask_composite": true }));
    let images = masks.images();
    assert_eq!(images.len(), 3);
    assert_eq!(decode(&images[0]), only(&plain));
    let mask = DynamicImage::from(square((64, 64), 16, 48)).into_rgb8();
    assert_eq!(decode(&images[1]), mask);
    let composite = image::load_from_memory(&images[2]).unwrap().into_rgba8();
    assert_eq!(composite.get_pixel(0, 0)[3], 0);
    let inside = composite.get_pixel(30, 30);
    assert_eq!(inside[3], 255);
    assert_eq!(
        inside.0[..3],
        only(&plain).get_pixel(30, 30).0,
        "painted pixels are the result's"
    );
    assert_eq!(masks.info()["infotexts"].as_array().unwrap().len(), 3);

    // A transparent picture shows the background colour.
    let clear = png(RgbaImage::from_pixel(64, 64, Rgba([9, 9, 9, 0])));
    let red = png(RgbImage::from_pixel(64, 64, Rgb([255, 0, 0])));
    let on_red = from_scene(
        json!({ "init_images": [clear], "override_settings": { "img2img_background_color": "#ff0000" } }),
    );
    assert_eq!(
        server.post(IMG2IMG, &on_red).images(),
        server
            .post(IMG2IMG, &from_scene(json!({ "init_images": [red] })))
            .images()
    );
}

#[test]
fn hires_fix_enlarges_and_says_so_in_a1111s_order() {
    let server = Server::start(&[]);
    let request = with(
        small(),
        json!({ "enable_hr": true, "hr_scale": 2, "hr_upscaler": "Latent (nearest-exact)", "hr_second_pass_steps": 3, "hr_sampler_name": "DPM++ 2M",
            "hr_scheduler": "Karras", "hr_prompt": "a green apple", "hr_negative_prompt": "blue", "hr_cfg": 3, "denoising_strength": 0.6 }),
    );
    let answer = server.post(TXT2IMG, &request);
    assert_eq!(only(&answer).dimensions(), (128, 128));
    let info = answer.info();
    assert_eq!((&info["width"], &info["height"]), (&json!(64), &json!(64)));
    let infotext = info["infotexts"][0].as_str().unwrap();
    let expected = "Denoising strength: 0.6, Hires sampler: DPM++ 2M, Hires prompt: a green apple, Hires negative prompt: blue, \
        Hires schedule type: Karras, Hires upscale: 2.0, Hires steps: 3, Hires upscaler: Latent (nearest-exact), Hires CFG Scale: 3.0";
    assert!(infotext.contains(expected), "{infotext}");
    assert_eq!(
        answer.json()["parameters"].as_object().unwrap().len(),
        55,
        "exactly A1111's model"
    );
    assert_eq!(
        server.post(TXT2IMG, &request).images(),
        answer.images(),
        "same seed, same bytes"
    );
}

#[test]
fn hires_sizes_and_upscalers_are_a1111s() {
    let server = Server::start(&[]);
    let by = |changes: Value| {
        let request = with(with(small(), json!({ "enable_hr": true })), changes);
        server.post(TXT2IMG, &request)
    };
    for (changes, size, said) in [
        (json!({ "hr_scale": 1.5 }), (96, 96), "Hires upscale: 1.5"),
        (
            json!({ "hr_resize_x": 96, "hr_resize_y": 128 }),
            (96, 128),
            "Hires resize: 96x128",
        ),
        (json!({ "hr_resize_y": 80 }), (80, 80), "Hires resize: 0x80"),
        (
            json!({ "width": 128, "height": 96, "firstphase_width": 64, "firstphase_height": 48 }),
            (128, 96),
            "Size: 64x48",
        ),
        (
            json!({ "denoising_strength": 0, "hr_upscaler": "Lanczos" }),
            (128, 128),
            "Denoising strength: 0.0",
        ),
        (
            json!({ "hr_checkpoint_name": "Use same checkpoint", "hr_sampler_name": "DDIM", "denoising_strength": 0.01 }),
            (128, 128),
            "Hires sampler: DDIM",
        ),
    ] {
        let answer = by(changes.clone());
        assert_eq!(only(&answer).dimensions(), size, "{changes}");
        let infotext = answer.info()["infotexts"][0].as_str().unwrap().to_string();
        assert!(infotext.contains(said), "{changes}: {infotext}");
    }
    let names = |path: &str| -> Vec<String> {
        let list = server.get(path).json();
        let rows = list.as_array().unwrap().iter();
        rows.map(|row| row["name"].as_str().unwrap().to_string())
            .collect()
    };
    let listed = [
        names("/sdapi/v1/latent-upscale-modes"),
        names("/sdapi/v1/upscalers"),
    ]
    .concat();
    assert_eq!(listed.len(), 9);
    for name in &listed {
        let answer = by(json!({ "hr_upscaler": name, "hr_scale": 1.25, "steps": 1 }));
        assert_eq!(only(&answer).dimensions(), (80, 80), "{name}");
    }
    let batch = by(json!({ "batch_size": 2, "seed": 20 })).images();
    let second = by(json!({ "seed": 21 }));
    assert_eq!(decode(&batch[1]), only(&second), "a batch equals singles");
    let many = by(json!({ "n_iter": 2 }));
    assert_eq!(many.images().len(), 2);
}

#[test]
fn hires_fix_refuses_in_words() {
    let server = Server::start(&[]);
    let by = |changes: Value| {
        let request = with(with(small(), json!({ "enable_hr": true })), changes);
        server.post(TXT2IMG, &request)
    };
    let side = "a side must be between 8 and 4096 pixels (setting `limits.max_side`)";
    for (changes, field, message) in [
        (json!({ "hr_scale": 1e9 }), "hr_scale", format!("of `1000000000` makes a side of 64000000000 pixels; {side}")),
        (json!({ "hr_scale": 0 }), "hr_scale", format!("of `0` makes a side of 0 pixels; {side}")),
        (json!({ "hr_resize_x": -1 }), "hr_resize_x", "must be 0 or between 8 and 4096 pixels (setting `limits.max_side`): `-1`".into()),
        (json!({ "hr_resize_x": 4096, "hr_resize_y": 8, "height": 128 }), "hr_resize_x", format!("of `4096x8` makes 4096x8192 pixels; {side}")),
        (json!({ "firstphase_width": 64 }), "height", "must be between 8 and 4096 pixels (setting `limits.max_side`): `0`".into()),
        (json!({ "denoising_strength": 1.5 }), "denoising_strength", "must be between 0 and 1: `1.5`".into()),
        (json!({ "denoising_strength": 1e-7 }), "denoising_strength",
            "of `0.0000001` makes a schedule of 20000000 steps, more than 100000; 0 leaves the picture as it is".into()),
        (json!({ "hr_second_pass_steps": -1 }), "hr_second_pass_steps", "must be between 0 and 1000 (setting `limits.max_steps`): `-1`".into()),
        (json!({ "hr_cfg": 1e9 }), "hr_cfg", "must be a finite number of at most 10000: `1000000000`".into()),
    ] {
        let problems = by(changes.clone()).problems();
        assert_eq!(problems, [(field.to_string(), message)], "{changes}");
    }
    let upscaler = "could not find upscaler named 4x-UltraSharp; valid: `Latent`, `Latent (antialiased)`, `Latent (bicubic)`, \
        `Latent (bicubic antialiased)`, `Latent (nearest)`, `Latent (nearest-exact)`, `None`, `Lanczos`, `Nearest`";
    for (changes, status, message) in [
        (json!({ "hr_upscaler": "4x-UltraSharp" }), 400, upscaler),
        (
            json!({ "hr_sampler_name": "Eulerr" }),
            400,
            "unknown sampler: `Eulerr`; valid: ",
        ),
        (
            json!({ "hr_scheduler": "fast" }),
            400,
            "unknown scheduler: `fast`; valid: ",
        ),
        (
            json!({ "hr_checkpoint_name": "other" }),
            404,
            "checkpoint not found: `other`; known: ",
        ),
    ] {
        let (found, said) = detail(&by(changes.clone()));
        assert_eq!(found, status, "{changes}");
        assert!(said.starts_with(message), "{changes}: {said}");
    }
    server.assert_works();
}

/// A PNG that says it is of this size and holds nothing.
fn hollow_png(width: u32, height: u32) -> String {
    let mut bytes = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut chunk = |kind: &[u8; 4], data: &[u8]| {
        bytes.extend((data.len() as u32).to_be_bytes());
        let body = [kind, data].concat();
        bytes.extend(&body);
        bytes.extend(crc32(&body).to_be_bytes());
    };
    let header = [
        &width.to_be_bytes()[..],
        &height.to_be_bytes(),
        &[8, 2, 0, 0, 0],
    ]
    .concat();
    chunk(b"IHDR", &header);
    chunk(b"IDAT", &[0x78, 0x9c, 0x03, 0, 0, 0, 0, 1]);
    chunk(b"IEND", &[]);
    STANDARD.encode(bytes)
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (!(crc & 1)).wrapping_add(1))
        })
    })
}

#[test]
fn pictures_that_cannot_be_used_are_answered_in_words() {
    let server = Server::start(&[]);
    let by = |changes: Value| server.post(IMG2IMG, &from_scene(changes));
    let cut = {
        let whole = STANDARD.decode(png(scene(64, 64))).unwrap();
        STANDARD.encode(&whole[..whole.len() / 2])
    };
    let gif = STANDARD.encode(b"GIF89a\x01\x00\x01\x00\x80\x00\x00");
    let sized = |width, height| {
        format!(
            "Invalid encoded image: picture of {width}x{height} pixels is too large; a side may have 16384 pixels and all pictures of a \
             request 64 megapixels (setting `limits.max_megapixels`)"
        )
    };
    let (not_found, url) = (
        "Init image not found",
        "Request to local resource not allowed",
    );
    let unknown = "Invalid encoded image: unknown picture format; use PNG, JPEG or WebP";
    for (changes, status, message) in [
        (json!({ "init_images": null }), 404, not_found.to_string()),
        (json!({ "init_images": [] }), 404, not_found.into()),
        (json!({ "init_images": [""] }), 400, "Invalid encoded image: invalid base64 picture: it is empty".into()),
        (json!({ "init_images": ["####"] }), 400, "Invalid encoded image: invalid base64 picture: a character".into()),
        (json!({ "init_images": ["aGVsbG8gd29ybGQ="] }), 400, unknown.into()),
        (json!({ "init_images": [gif] }), 400, unknown.into()),
        (json!({ "init_images": [cut] }), 400, "Invalid encoded image: picture cannot be read: ".into()),
        (json!({ "init_images": ["http://127.0.0.1/a.png"] }), 400, url.into()),
        (json!({ "init_images": ["HTTPS://127.0.0.1/a.png"] }), 400, url.into()),
        (json!({ "mask": "https://10.0.0.1/a.png" }), 400, url.into()),
        (json!({ "init_images": [png(scene(8, 8)), png(scene(8, 8))] }), 400,
            "bad number of images passed: 2; expecting 1 or less".into()),
        (json!({ "init_images": [hollow_png(16_384, 16_384)] }), 400, sized(16_384, 16_384)),
        (json!({ "init_images": [hollow_png(100_000, 1)] }), 400, sized(100_000, 1)),
        (json!({ "init_images": [hollow_png(0, 0)] }), 400, "Invalid encoded image: picture cannot be read: ".into()),
        (json!({ "mask": hollow_png(0, 0) }), 400, "Invalid encoded image: picture cannot be read: ".into()),
        (json!({ "mask": hollow_png(9000, 9000) }), 400, sized(9000, 9000)),
        (json!({ "mask": "x" }), 400, "Invalid encoded image: invalid base64 picture: ".into()),
        (json!({ "init_images": [png(RgbImage::new(4, 4))], "resize_mode": 3 }), 400,
            "init image of 4x4 pixels: with `resize_mode` 3 a side must be between 8 and 4096 pixels (setting `limits.max_side`)".into()),
        (json!({ "init_images": [png(RgbImage::new(1, 5000))], "resize_mode": 2 }), 400, "picture of 0x64 pixels is empty".into()),
        (json!({ "alwayson_scripts": { "soft painting": { "args": [true] } } }), 422, "Script 'soft painting' not found".into()),
        (json!({ "alwayson_scripts": { "soft inpainting": { "args": [true, "x"] } } }), 422, "`Soft Inpainting`: argument 1 is not a number".into()),
    ] {
        let shown: String = changes.to_string().chars().take(120).collect();
        let answer = by(changes);
        assert_ne!(answer.status, 200, "{shown}");
        let (found, said) = detail(&answer);
        assert_eq!(found, status, "{shown}: {said}");
        assert!(said.starts_with(&message), "{shown}: {said}");
    }
    server.assert_works();
}

#[test]
fn numbers_of_img2img_have_limits() {
    let server = Server::start(&[]);
    for (changes, field, message) in [
        (
            json!({ "denoising_strength": -0.1 }),
            "denoising_strength",
            "must be between 0 and 1: `-0.1`",
        ),
        (
            json!({ "denoising_strength": 2 }),
            "denoising_strength",
            "must be between 0 and 1: `2`",
        ),
        (
            json!({ "denoising_strength": "much" }),
            "denoising_strength",
            "value is not a valid float",
        ),
        (
            json!({ "denoising_strength": 1e-9, "override_settings": { "img2img_fix_steps": true } }),
            "denoising_strength",
            "of `0.000000001` makes a schedule of 4000000000 steps, more than 100000; 0 leaves the picture as it is",
        ),
        (
            json!({ "resize_mode": 4 }),
            "resize_mode",
            "must be 0 (stretch), 1 (crop), 2 (fill) or 3 (stretch latents): `4`",
        ),
        (
            json!({ "inpainting_fill": 9 }),
            "inpainting_fill",
            "must be 0 (fill), 1 (original), 2 (latent noise) or 3 (latent nothing): `9`",
        ),
        (
            json!({ "mask_blur": 1_000_000 }),
            "mask_blur",
            "must be at most 256 pixels: `1000000`",
        ),
        (
            json!({ "inpaint_full_res_padding": -1 }),
            "inpaint_full_res_padding",
            "must be between 0 and 16384 pixels: `-1`",
        ),
        (
            json!({ "initial_noise_multiplier": 1e9 }),
            "initial_noise_multiplier",
            "must be between 0 and 100: `1000000000`",
        ),
        (json!({ "init_images": [{}] }), "0", "str type expected"),
        (
            json!({ "init_images": "x" }),
            "init_images",
            "value is not a valid list",
        ),
    ] {
        let problems = server
            .post(IMG2IMG, &from_scene(changes.clone()))
            .problems();
        assert_eq!(
            problems,
            [(field.to_string(), message.to_string())],
            "{changes}"
        );
    }
    server.assert_works();
}

#[test]
fn strange_pictures_are_read() {
    let server = Server::start(&[]);
    let grey16 = DynamicImage::from(scene(32, 32)).into_luma16();
    let rgb16 = DynamicImage::from(scene(32, 32)).into_rgb16();
    for (what, picture) in [
        ("one pixel", png(RgbImage::new(1, 1))),
        ("grey", png(DynamicImage::from(scene(32, 32)).into_luma8())),
        ("16 bit grey", png(grey16)),
        ("16 bit", png(rgb16)),
        ("JPEG", encoded(scene(32, 32), ImageFormat::Jpeg)),
        ("WebP", encoded(scene(32, 32), ImageFormat::WebP)),
        ("a strip", png(scene(500, 10))),
        (
            "CMYK JPEG",
            STANDARD.encode(include_bytes!("golden/pictures/cmyk.jpg")),
        ),
        (
            "animated PNG",
            STANDARD.encode(include_bytes!("golden/pictures/animated.png")),
        ),
        (
            "animated WebP",
            STANDARD.encode(include_bytes!("golden/pictures/animated.webp")),
        ),
    ] {
        let plain = server.post(
            IMG2IMG,
            &from_scene(json!({ "init_images": [picture], "steps": 1 })),
        );
        assert_eq!(plain.status, 200, "{what}: {}", plain.text());
        let masked = json!({ "init_images": [picture], "mask": png(square((1, 1), 0, 1)), "steps": 1, "mask_blur": 64 });
        let masked = server.post(IMG2IMG, &from_scene(masked));
        assert_eq!(masked.status, 200, "{what}, masked: {}", masked.text());
    }
}
