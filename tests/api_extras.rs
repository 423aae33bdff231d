//! The extras routes, the lists of upscalers, networks in hires fix and img2img, and `sdgen upscale`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/server.rs"]
mod server;

use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::RgbImage;
use sdgen::imaging::read_metadata;
use serde_json::{Value, json};
use server::{Answer, Server, sdgen, small, until, with};

const SINGLE: &str = "/sdapi/v1/extra-single-image";
const BATCH: &str = "/sdapi/v1/extra-batch-images";
const REAL: &str = "R-ESRGAN AnimeVideo";

fn golden(file: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/upscale")
        .join(file)
}

/// A data directory with two networks, one under a name of Real-ESRGAN's.
fn data() -> Arc<tempfile::TempDir> {
    let dir = tempfile::tempdir().unwrap();
    for (from, to) in [
        ("compact_x2.pth", "ESRGAN/compact_x2.pth"),
        ("photo.png", "ESRGAN/broken.pth"),
        (
            "animevideov3-x4.safetensors",
            "RealESRGAN/realesr-animevideov3.safetensors",
        ),
    ] {
        let to = dir.path().join("models").join(to);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(golden(from), to).unwrap();
    }
    Arc::new(dir)
}

/// A server that loads no checkpoint before it must.
fn start() -> Server {
    let server = Server::spawn(data(), &["--skip-load-model-at-start"], &[]);
    server.wait_ready();
    server
}

fn photo() -> String {
    STANDARD.encode(std::fs::read(golden("photo.png")).unwrap())
}

#[track_caller]
fn file(answer: &Answer) -> Vec<u8> {
    assert_eq!(answer.status, 200, "{}", answer.text());
    STANDARD
        .decode(answer.json()["image"].as_str().unwrap())
        .unwrap()
}

fn pixels(bytes: &[u8]) -> RgbImage {
    image::load_from_memory(bytes).unwrap().to_rgb8()
}

#[test]
fn lists_have_a1111s_items_and_order() {
    let server = start();
    let list = server.get("/sdapi/v1/upscalers").json();
    let names: Vec<_> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["name"].clone())
        .collect();
    let expected = ["None", "Lanczos", "Nearest", "broken", "compact_x2", REAL];
    assert_eq!(json!(names), json!(expected));
    let models = server.data().join("models");
    let path = models.join("ESRGAN/compact_x2.pth");
    assert_eq!(
        list[4],
        json!({ "name": "compact_x2", "model_name": null, "model_path": path, "model_url": null, "scale": 4 })
    );
    assert_eq!(list[0]["model_path"], Value::Null);
    let path = models.join("RealESRGAN/realesr-animevideov3.safetensors");
    assert_eq!(
        server.get("/sdapi/v1/realesrgan-models").json(),
        json!([{ "name": REAL, "path": path, "scale": 4 }])
    );
}

#[test]
fn single_pictures_are_a1111s_with_their_texts() {
    let server = start();
    // Nothing asked for is nothing done.
    let answer = server.post(SINGLE, &json!({ "image": photo() }));
    assert_eq!(pixels(&file(&answer)).dimensions(), (72, 56));
    let body = answer.json();
    let keys: Vec<_> = body.as_object().unwrap().keys().cloned().collect();
    assert_eq!(
        (keys, &body["html_info"]),
        (vec!["html_info".into(), "image".into()], &json!("<p></p>"))
    );

    let answer = server.post(
        SINGLE,
        &json!({ "image": format!("data:image/png;base64,{}", photo()), "upscaler_1": "Lanczos", "upscaling_resize": 2 }),
    );
    assert_eq!(pixels(&file(&answer)).dimensions(), (144, 112));
    assert_eq!(
        answer.json()["html_info"],
        "<p>Postprocess upscale by: 2.0, Postprocess upscaler: Lanczos</p>"
    );

    // The network in the pieces that the options ask for, against torch.
    let options = json!({ "ESRGAN_tile": 32 });
    assert_eq!(server.post("/sdapi/v1/options", &options).status, 200);
    let asked = json!({ "image": photo(), "upscaler_1": REAL, "upscaling_resize": 4 });
    let bytes = file(&server.post(SINGLE, &asked));
    let (got, want) = (
        pixels(&bytes),
        image::open(golden("photo_tiles.png")).unwrap().to_rgb8(),
    );
    assert_eq!(got.dimensions(), want.dimensions());
    let worst = got
        .iter()
        .zip(want.iter())
        .map(|(a, b)| a.abs_diff(*b))
        .max();
    assert!(worst <= Some(1), "{worst:?}");
    let texts = read_metadata(&bytes).unwrap().texts;
    let text = format!("Postprocess upscale by: 4.0, Postprocess upscaler: {REAL}");
    assert_eq!(texts, [("postprocessing".to_string(), text)]);
    assert!(!server.log().contains("loaded"), "{}", server.log());
}

#[test]
fn how_a_picture_was_generated_stays_with_it() {
    let server = start();
    let made = server.post("/sdapi/v1/txt2img", &small());
    let before = made.images().remove(0);
    let asked = json!({ "image": STANDARD.encode(&before), "upscaler_1": "compact_x2" });
    let after = file(&server.post(SINGLE, &asked));
    assert_eq!(pixels(&after).dimensions(), (128, 128));
    let (before, after) = (
        read_metadata(&before).unwrap(),
        read_metadata(&after).unwrap(),
    );
    assert!(before.infotext.is_some() && before.infotext == after.infotext);
    // Enlarged once more, the last text stands.
    let png_info = |bytes: &[u8]| {
        let asked = json!({ "image": STANDARD.encode(bytes) });
        server.post("/sdapi/v1/png-info", &asked).json()
    };
    let asked = json!({ "image": made.json()["images"][0], "upscaler_1": "Nearest", "upscaling_resize": 3 });
    let info = png_info(&file(&server.post(SINGLE, &asked)));
    assert_eq!(info["info"], json!(before.infotext));
    assert_eq!(
        info["items"],
        json!({ "postprocessing": "Postprocess upscale by: 3.0, Postprocess upscaler: Nearest" })
    );
}

#[test]
fn batches_sizes_and_second_upscalers() {
    let server = start();
    let asked = json!({
        "imageList": [{ "data": photo(), "name": "a.png" }, { "data": photo(), "name": "b" }],
        "resize_mode": 1, "upscaling_resize_w": 100, "upscaling_resize_h": 90,
        "upscaler_1": "Lanczos", "upscaler_2": "Nearest", "extras_upscaler_2_visibility": 0.5,
    });
    let answer = server.post(BATCH, &asked);
    let sizes: Vec<_> = answer
        .images()
        .iter()
        .map(|bytes| pixels(bytes).dimensions())
        .collect();
    assert_eq!(sizes, [(100, 90), (100, 90)]);
    assert_eq!(
        answer.json()["html_info"],
        "<p>Postprocess upscale to: 100x90, Postprocess crop to: 100x90, Postprocess upscaler: Lanczos, \
         Postprocess upscaler 2: Nearest</p>"
    );
    let whole = with(asked, json!({ "upscaling_crop": false }));
    let answer = server.post(BATCH, &whole);
    // Covers 100x90: 72 * 90 / 56 = 115.7 by 90, cut to multiples of 8.
    assert_eq!(pixels(&answer.images()[0]).dimensions(), (112, 88));
}

#[test]
fn what_cannot_be_done_is_named() {
    let server = start();
    let post = |changes: Value| server.post(SINGLE, &with(json!({ "image": photo() }), changes));
    let error = |answer: Answer, status: u16, part: &str| {
        let body = answer.json();
        assert_eq!(answer.status, status, "{body}");
        let detail = body["detail"].as_str().unwrap_or_else(|| panic!("{body}"));
        assert!(detail.contains(part), "{detail}");
    };
    error(
        post(json!({ "upscaler_1": "SwinIR_4x" })),
        400,
        "could not find upscaler named SwinIR_4x; valid: `None`, `Lanczos`, `Nearest`, `broken`",
    );
    error(
        post(json!({ "upscaler_1": "Lanczos", "upscaler_2": "x" })),
        400,
        "named x;",
    );
    error(
        post(json!({ "gfpgan_visibility": 0.5 })),
        400,
        "restoring faces (`gfpgan_visibility`)",
    );
    error(
        post(json!({ "codeformer_visibility": 1 })),
        400,
        "restoring faces",
    );
    error(post(json!({ "image": "" })), 400, "Invalid encoded image");
    error(
        post(json!({ "image": "http://127.0.0.1/a.png" })),
        400,
        "Request to local resource not allowed",
    );
    error(post(json!({ "upscaler_1": "broken" })), 500, "broken.pth");
    let problems = post(json!({
        "resize_mode": 2, "upscaling_resize": 0, "upscaling_resize_w": 0, "extras_upscaler_2_visibility": 1.5
    }));
    let fields: Vec<_> = problems
        .problems()
        .into_iter()
        .map(|(field, _)| field)
        .collect();
    assert_eq!(
        fields,
        [
            "resize_mode",
            "extras_upscaler_2_visibility",
            "upscaling_resize",
            "upscaling_resize_w"
        ]
    );
    let large = post(json!({ "upscaler_1": "Lanczos", "upscaling_resize": 200 })).problems();
    assert!(
        large[0].0 == "upscaling_resize" && large[0].1.contains("limits.max_megapixels"),
        "{large:?}"
    );
    let missing = server.post(BATCH, &json!({})).problems();
    assert_eq!(
        missing,
        [("imageList".to_string(), "field required".to_string())]
    );
    let missing = server
        .post(BATCH, &json!({ "imageList": [{ "name": "a" }] }))
        .problems();
    assert_eq!(missing[0].0, "data");
    assert_eq!(server.get(SINGLE).status, 405);
    server.assert_works();
}

#[test]
fn an_interrupt_ends_a_long_upscaling() {
    let server = Arc::new(start());
    // 100 pieces of one pass, and 16 times as many of the next.
    let asked = json!({
        "image": photo(), "upscaler_1": REAL, "upscaling_resize": 60,
        "upscaling_resize_w": 1, "upscaling_resize_h": 1,
    });
    let waiting = server.post_later(SINGLE, asked);
    let state = until("the job to run", || {
        let state = server.progress()["state"].clone();
        (state["job_count"] == 1 && state["sampling_step"].as_i64() > Some(0)).then_some(state)
    });
    assert_eq!(state["job"], "extras");
    server.post("/sdapi/v1/interrupt", &json!({}));
    let answer = waiting.join().unwrap();
    assert_eq!(answer.status, 500, "{}", answer.text());
    assert!(answer.text().contains("interrupted"), "{}", answer.text());
    server.assert_works();
}

#[test]
fn hires_fix_and_image_to_image_enlarge_by_networks() {
    let server = start();
    let asked = json!({ "enable_hr": true, "hr_scale": 2, "hr_upscaler": "COMPACT_X2", "denoising_strength": 0.5 });
    let answer = server.post("/sdapi/v1/txt2img", &with(small(), asked.clone()));
    assert_eq!(pixels(&answer.images()[0]).dimensions(), (128, 128));
    let infotext = answer.info()["infotexts"][0].to_string();
    assert!(
        infotext.contains("Hires upscaler: compact_x2"),
        "{infotext}"
    );
    let lanczos = server.post(
        "/sdapi/v1/txt2img",
        &with(small(), with(asked, json!({ "hr_upscaler": "Lanczos" }))),
    );
    assert!(pixels(&answer.images()[0]) != pixels(&lanczos.images()[0]));

    let from_image = |upscaler: Value| {
        let asked = json!({
            "init_images": [photo()], "width": 144, "height": 112, "denoising_strength": 0.1,
            "override_settings": { "upscaler_for_img2img": upscaler },
        });
        let answer = server.post("/sdapi/v1/img2img", &with(small(), asked));
        pixels(&answer.images()[0])
    };
    let plain = from_image(Value::Null);
    assert!(plain == from_image(json!("None")) && plain == from_image(json!("gone")));
    assert!(plain != from_image(json!("compact_x2")));
}

/// Exit code, stdout and stderr of `sdgen upscale`.
fn upscale(data: &Path, words: &[&str]) -> (Option<i32>, String, String) {
    let mut command = sdgen();
    let done = command
        .args(["upscale", "--data-dir"])
        .arg(data)
        .args(words)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (done.status.code(), text(done.stdout), text(done.stderr))
}

#[test]
fn the_command_line_enlarges_files() {
    let dir = data();
    let out = dir.path().join("out");
    let run = |words: &[&str]| upscale(dir.path(), words);
    let photo = golden("photo.png");
    let photo = photo.to_str().unwrap();
    let target = out.join("large.png");
    let (code, stdout, stderr) = run(&[
        photo,
        "-u",
        REAL,
        "--by",
        "4",
        "--tile",
        "32",
        "-o",
        target.to_str().unwrap(),
    ]);
    assert_eq!(
        (code, stdout.trim()),
        (Some(0), target.to_str().unwrap()),
        "{stderr}"
    );
    let bytes = std::fs::read(&target).unwrap();
    let keywords: Vec<_> = read_metadata(&bytes)
        .unwrap()
        .texts
        .into_iter()
        .map(|(keyword, _)| keyword)
        .collect();
    assert_eq!(keywords, ["postprocessing", "extras"]);
    let want = image::open(golden("photo_tiles.png")).unwrap().to_rgb8();
    let worst = pixels(&bytes)
        .iter()
        .zip(want.iter())
        .map(|(a, b)| a.abs_diff(*b))
        .max();
    assert!(worst <= Some(1), "{worst:?}");

    let network = golden("body_x4.pth");
    let words = [
        photo,
        photo,
        "-u",
        network.to_str().unwrap(),
        "--to",
        "100x90",
        "--format",
        "jpeg",
        "-o",
    ];
    let (code, stdout, stderr) = run(&[&words[..], &[out.to_str().unwrap()]].concat());
    assert_eq!(code, Some(0), "{stderr}");
    let names: Vec<_> = stdout
        .lines()
        .map(|line| line.rsplit('/').next().unwrap())
        .collect();
    assert_eq!(names, ["00000-photo.jpg", "00001-photo.jpg"]);
    assert_eq!(
        image::open(out.join(names[0]))
            .unwrap()
            .to_rgb8()
            .dimensions(),
        (100, 90)
    );
}

#[test]
fn the_command_line_says_what_it_cannot_do() {
    let dir = data();
    let run = |words: &[&str]| upscale(dir.path(), words);
    let photo = golden("photo.png");
    let photo = photo.to_str().unwrap();
    for (words, part) in [
        (
            &[photo, "-u", "nothing"][..],
            "could not find upscaler named nothing; valid: `None`",
        ),
        (
            &[photo, "-u", "Lanczos", "--by", "0"],
            "`--by` must be greater than 0",
        ),
        (&[photo, "-u", "Lanczos", "--to", "9"], "such as 1024x768"),
        (
            &[photo, "-u", "Lanczos", "--by", "300"],
            "limits.max_megapixels",
        ),
        (&["-u", "Lanczos"], "<IN>"),
    ] {
        let (code, _, stderr) = run(words);
        assert_eq!(code, Some(2), "{stderr}");
        assert!(stderr.contains(part), "{stderr}");
    }
    let (code, _, stderr) = run(&["nothing.png", "-u", "Lanczos"]);
    assert!(
        code == Some(1) && stderr.contains("nothing.png"),
        "{stderr}"
    );
}

#[test]
fn the_command_line_uses_networks_in_hires_fix() {
    let dir = data();
    let mut command = sdgen();
    command
        .args(["prompt", "a red apple", "--data-dir"])
        .arg(dir.path());
    let hires = [
        "-W",
        "64",
        "-H",
        "64",
        "--steps",
        "2",
        "--hr-upscaler",
        "compact_x2",
        "-o",
    ];
    let picture = dir.path().join("hires.png");
    let done = command.args(hires).arg(&picture).output().unwrap();
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let bytes = std::fs::read(picture).unwrap();
    assert!(
        read_metadata(&bytes)
            .unwrap()
            .infotext
            .unwrap()
            .contains("Hires upscaler: compact_x2")
    );
}
