//! A1111's settings through the server: each changes what it should and nothing after its request; the list in `docs/options.md`
//! is the program's.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/server.rs"]
mod server;

use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sdgen::api::options_table::OPTIONS;
use sdgen::imaging::{EncodeOptions, encode, md5};
use serde_json::{Value, json};
use server::{Server, Shared, files_below, small, with};

static SERVER: Shared = Shared::new(&[]);

/// The first picture as base64, and its infotext.
fn made(path: &str, body: &Value) -> (String, String) {
    let answer = SERVER.hold().post(path, body);
    assert_eq!(answer.status, 200, "{}\n{body}", answer.text());
    let answer = answer.json();
    let info: Value = serde_json::from_str(answer["info"].as_str().unwrap()).unwrap();
    // Compared without its infotext.
    let picture = STANDARD
        .decode(answer["images"][0].as_str().unwrap())
        .unwrap();
    let pixels = image::load_from_memory(&picture).unwrap().into_rgb8();
    (
        md5::hex(pixels.as_raw()),
        info["infotexts"][0].as_str().unwrap().to_string(),
    )
}

/// The option changes the picture, and infotext says so (or says nothing for "").
fn assert_acts(path: &str, body: &Value, overrides: &Value, says: &str) {
    let before = made(path, body);
    let after = made(
        path,
        &with(body.clone(), json!({ "override_settings": overrides })),
    );
    assert_ne!(before.0, after.0, "{overrides} changes nothing");
    if says.is_empty() {
        assert_eq!(before.1, after.1, "{overrides}");
    } else {
        assert!(
            after.1.contains(says) && !before.1.contains(says),
            "{overrides}: {}",
            after.1
        );
    }
    assert_eq!(before, made(path, body), "{overrides} stays");
}

#[test]
fn conditioning_options_act() {
    let _held = SERVER.hold();
    let body = with(small(), json!({ "negative_prompt": "blue" }));
    let acts = |changes: Value, overrides: Value, says: &str| {
        assert_acts(
            "/sdapi/v1/txt2img",
            &with(body.clone(), changes),
            &overrides,
            says,
        );
    };
    acts(json!({}), json!({ "sdxl_crop_top": 300 }), "");
    acts(json!({}), json!({ "sdxl_crop_left": 300 }), "");
    acts(json!({}), json!({ "sdxl_clip_l_skip": true }), "");
    let words = "apple ".repeat(70);
    acts(
        json!({ "prompt": format!("{words}, red green blue black white grey pink") }),
        json!({ "comma_padding_backtrack": 0 }),
        "",
    );
    acts(
        json!({ "prompt": "apple # pear" }),
        json!({ "enable_prompt_comments": false }),
        "apple # pear",
    );
    acts(
        json!({ "prompt": "[apple:pear:1.0]", "steps": 4 }),
        json!({ "use_old_scheduling": true }),
        "Old prompt editing timelines: True",
    );
    let long = json!({ "prompt": "apple ".repeat(80) });
    acts(
        long.clone(),
        json!({ "pad_cond_uncond": true }),
        "Pad conds: True",
    );
    acts(
        long,
        json!({ "pad_cond_uncond_v0": true }),
        "Pad conds v0: True",
    );
}

#[test]
fn clip_skip_two_is_what_sdxl_was_trained_with() {
    let _held = SERVER.hold();
    let skip = json!({ "CLIP_stop_at_last_layers": 2, "sdxl_clip_l_skip": true });
    let plain = made("/sdapi/v1/txt2img", &small());
    let skipped = made(
        "/sdapi/v1/txt2img",
        &with(small(), json!({ "override_settings": skip })),
    );
    assert_eq!(plain.0, skipped.0);
    assert!(skipped.1.contains("Clip skip: 2"), "{}", skipped.1);
}

#[test]
fn sampling_options_act() {
    let _held = SERVER.hold();
    let acts = |changes: Value, overrides: Value, says: &str| {
        assert_acts(
            "/sdapi/v1/txt2img",
            &with(small(), changes),
            &overrides,
            says,
        );
    };
    let karras = json!({ "scheduler": "Karras", "steps": 3 });
    acts(karras.clone(), json!({ "enable_quantization": true }), "");
    acts(
        karras.clone(),
        json!({ "use_old_karras_scheduler_sigmas": true }),
        "",
    );
    acts(
        karras.clone(),
        json!({ "use_downcasted_alpha_bar": true }),
        "Downcast alphas_cumprod: True",
    );
    acts(
        karras,
        json!({ "sd_noise_schedule": "Zero Terminal SNR" }),
        "Noise Schedule: Zero Terminal SNR",
    );
    acts(
        json!({ "sampler_name": "DPM++ SDE" }),
        json!({ "no_dpmpp_sde_batch_determinism": true }),
        "",
    );
    let hires = json!({ "enable_hr": true, "hr_scale": 1.5, "denoising_strength": 0.5 });
    acts(
        hires,
        json!({ "img2img_extra_noise": 0.25 }),
        "Extra noise: 0.25",
    );
}

fn picture(alpha: u8) -> String {
    let picture = image::RgbaImage::from_fn(64, 64, |x, y| {
        image::Rgba([
            x as u8 * 3,
            y as u8 * 3,
            90,
            if x < 32 { alpha } else { 255 },
        ])
    });
    STANDARD.encode(encode(&picture, &EncodeOptions::default()).unwrap().bytes)
}

#[test]
fn img2img_options_act() {
    let _held = SERVER.hold();
    let body = with(
        small(),
        json!({ "steps": 4, "denoising_strength": 0.6, "init_images": [picture(0)] }),
    );
    let acts = |overrides: Value, says: &str| {
        assert_acts("/sdapi/v1/img2img", &body, &overrides, says);
    };
    acts(
        json!({ "initial_noise_multiplier": 0.5 }),
        "Noise multiplier: 0.5",
    );
    acts(json!({ "img2img_extra_noise": 0.25 }), "Extra noise: 0.25");
    acts(json!({ "img2img_fix_steps": true }), "");
    acts(json!({ "img2img_background_color": "#000000" }), "");
    acts(json!({ "img2img_color_correction": true }), "");
}

#[test]
fn init_images_and_masks_are_kept_on_request() {
    let server = SERVER.hold();
    let mask =
        image::GrayImage::from_fn(64, 64, |x, _| image::Luma([if x < 32 { 255 } else { 0 }]));
    let mask = STANDARD.encode(encode(&mask, &EncodeOptions::default()).unwrap().bytes);
    let body = with(
        small(),
        json!({ "init_images": [picture(255)], "mask": mask, "inpaint_full_res": false, "save_images": true,
            "override_settings": { "save_init_img": true, "outdir_init_images": "kept", "save_mask": true,
                "save_mask_composite": true, "outdir_img2img_samples": "made", "save_to_dirs": false,
                "samples_filename_pattern": "x" } }),
    );
    let (_, infotext) = made("/sdapi/v1/img2img", &body);
    let names = |below: &str| -> Vec<String> {
        let files = files_below(&server.data().join(below));
        let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
        files.iter().map(|path| name(path)).collect()
    };
    let pixels = STANDARD.decode(picture(255)).unwrap();
    let pixels = image::load_from_memory(&pixels).unwrap();
    let hash = md5::hex(pixels.as_bytes());
    assert!(
        infotext.contains(&format!("Init image hash: {hash}")),
        "{infotext}"
    );
    assert_eq!(names("kept"), [format!("{hash}.png")]);
    assert_eq!(
        names("made"),
        [
            "00000-x.png",
            "00001-x-mask.png",
            "00002-x-mask-composite.png"
        ]
    );
}

#[test]
fn large_pictures_are_copied_as_jpeg() {
    let server = SERVER.hold();
    let body = with(
        small(),
        json!({ "save_images": true, "override_settings": { "target_side_length": 48, "outdir_txt2img_samples": "large",
            "save_to_dirs": false } }),
    );
    drop(made("/sdapi/v1/txt2img", &body));
    let files = files_below(&server.data().join("large"));
    let sizes: Vec<_> = files
        .iter()
        .map(|path| {
            let picture = image::ImageReader::open(path).unwrap();
            let picture = picture.with_guessed_format().unwrap();
            (
                picture.format().unwrap(),
                picture.into_dimensions().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        sizes,
        [
            (image::ImageFormat::Jpeg, (48, 48)),
            (image::ImageFormat::Png, (64, 64))
        ]
    );
}

#[test]
fn overrides_stay_if_they_are_asked_to() {
    let _held = SERVER.hold();
    let server = Server::start(&[]);
    let body = with(
        small(),
        json!({ "override_settings": { "sdxl_crop_top": 5, "nonsense": 1, "api_useragent": "x" } }),
    );
    assert_eq!(server.post("/sdapi/v1/txt2img", &body).status, 200);
    let crop = || server.get("/sdapi/v1/options").json()["sdxl_crop_top"].clone();
    assert_eq!(crop(), 0);
    let keep = with(
        body,
        json!({ "override_settings_restore_afterwards": false }),
    );
    let refused = with(keep.clone(), json!({ "sampler_name": "nobody's" }));
    assert_eq!(server.post("/sdapi/v1/txt2img", &refused).status, 400);
    assert_eq!(crop(), 0, "a refused request changes nothing");
    assert_eq!(server.post("/sdapi/v1/txt2img", &keep).status, 200);
    assert_eq!(crop(), 5);
    assert_eq!(server.get("/sdapi/v1/options").json()["api_useragent"], "");
    assert!(!server.data().join("config.json").exists());
}

#[test]
fn an_infotext_makes_its_picture_again() {
    let _held = SERVER.hold();
    let server = Server::start(&[]);
    std::fs::write(
        server.data().join("styles.csv"),
        "name,prompt,negative_prompt\nInk,\"{prompt}, ink\",blurry\n",
    )
    .unwrap();
    let body = json!({
        "prompt": "a (red:1.2) apple, [green|blue]", "negative_prompt": "ugly", "styles": ["Ink"], "seed": 77, "subseed": 3,
        "subseed_strength": 0.25, "steps": 3, "width": 64, "height": 72, "cfg_scale": 4.5, "sampler_name": "DPM++ 2M SDE",
        "scheduler": "Karras", "enable_hr": true, "hr_scale": 1.5, "hr_second_pass_steps": 2, "denoising_strength": 0.5,
        "hr_upscaler": "Lanczos", "hr_prompt": "a pear, \"ripe\"",
        "override_settings": { "randn_source": "NV", "CLIP_stop_at_last_layers": 2, "emphasis": "No norm",
            "sd_noise_schedule": "Zero Terminal SNR", "always_discard_next_to_last_sigma": true, "eta_ancestral": 0.7 },
    });
    let first = server.post("/sdapi/v1/txt2img", &body).json();
    let text = |answer: &Value| {
        let info: Value = serde_json::from_str(answer["info"].as_str().unwrap()).unwrap();
        info["infotexts"][0].as_str().unwrap().to_string()
    };
    let again = server.post("/sdapi/v1/txt2img", &json!({ "infotext": text(&first) }));
    assert_eq!(again.status, 200, "{}", again.text());
    let again = again.json();
    assert_eq!(text(&first), text(&again));
    assert_eq!(first["images"], again["images"]);
    assert_eq!(again["parameters"]["styles"], json!(["Ink"]));
    assert_eq!(again["parameters"]["steps"], 3);
    let other = json!({ "infotext": text(&first), "seed": 78 });
    assert_ne!(
        server.post("/sdapi/v1/txt2img", &other).json()["images"],
        first["images"]
    );
}

#[test]
fn remarks_are_in_the_answer_and_in_the_log() {
    let server = SERVER.hold();
    let body = with(small(), json!({ "prompt": "apple <lora:nobody:1>" }));
    let answer = server.post("/sdapi/v1/txt2img", &body).json();
    let comments = answer["parameters"]["comments"].as_object().unwrap();
    let comment = comments.keys().next().unwrap();
    assert!(comment.contains("nobody"), "{comment}");
    assert!(server.log().contains("nobody"), "{}", server.log());
    assert!(server.post("/sdapi/v1/txt2img", &small()).json()["parameters"]["comments"].is_null());
}

#[test]
fn words_that_an_option_does_not_know_are_refused_when_it_is_set() {
    let server = SERVER.hold();
    for (option, wrong, right) in [
        ("randn_source", "a\0b", "nv"),
        ("emphasis", "", "No norm"),
        ("samples_format", "bmp", "webp"),
        ("hires_fix_refiner_pass", "third pass", "first pass"),
    ] {
        let before = server.get("/sdapi/v1/options").json()[option].clone();
        for (path, body) in [
            ("/sdapi/v1/options", json!({ option: wrong })),
            (
                "/sdapi/v1/txt2img",
                with(small(), json!({ "override_settings": { option: wrong } })),
            ),
        ] {
            let answer = server.post(path, &body);
            assert_eq!(answer.status, 422, "{option}: {}", answer.text());
            assert!(answer.text().contains("one of: "), "{}", answer.text());
        }
        assert_eq!(server.get("/sdapi/v1/options").json()[option], before);
        let overrides = json!({ "override_settings": { option: right } });
        let answer = server.post("/sdapi/v1/txt2img", &with(small(), overrides));
        assert_eq!(answer.status, 200, "{option}: {}", answer.text());
    }
}

/// Key to default and effect, as the document lists them.
fn documented() -> BTreeMap<&'static str, (&'static str, &'static str)> {
    let rows = include_str!("../docs/options.md").lines();
    let rows = rows.filter(|line| line.starts_with("| `"));
    rows.map(|row| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let bare = |cell: &'static str| cell.trim_matches('`');
        (bare(cells[1]), (bare(cells[2]), cells[3]))
    })
    .collect()
}

#[test]
fn the_document_has_every_option_with_its_default() {
    let _held = SERVER.hold();
    let documented = documented();
    for (key, _, default) in OPTIONS {
        let (text, _) = documented
            .get(key)
            .unwrap_or_else(|| panic!("{key} is missing"));
        let default = default.to_json();
        let same = serde_json::from_str::<Value>(text).is_ok_and(|value| value == default);
        assert!(same, "{key}: {text} is not {default}");
    }
    assert_eq!(documented.len(), OPTIONS.len());
}

#[test]
fn the_document_says_which_options_are_read() {
    let _held = SERVER.hold();
    let mut source = String::new();
    for file in files_below(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")) {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        if file.extension().is_some_and(|extension| extension == "rs") && name != "options_table.rs"
        {
            let text = std::fs::read_to_string(&file).unwrap();
            source.push_str(text.split("#[cfg(test)]").next().unwrap_or_default());
        }
    }
    let reads = [
        "flag", "int", "float", "text", "texts", "pixels", "number", "score",
    ];
    for (key, (_, effect)) in documented() {
        let pattern = key.replace("txt2img", "{}").replace("img2img", "{}");
        let by_kind = source.contains(&format!("format!(\"{pattern}\""));
        let churn = source.contains(&format!("churn(\"{key}\""));
        let listed =
            source.contains(&format!("[\"{key}\"")) || source.contains(&format!("\"{key}\"]"));
        let handled = source.contains(&format!("insert(\"{key}\""))
            || source.contains(&format!("set(\n        \"{key}\""));
        let read = by_kind
            || churn
            || listed
            || handled
            || reads
                .iter()
                .any(|read| source.contains(&format!("{read}(\"{key}\")")));
        assert_eq!(read, effect == "acts", "{key}: {effect}");
    }
}
