//! Scripts over the API: one job of several runs, with A1111's order, seeds and infotexts.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/server.rs"]
mod server;

use std::io::Cursor;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::{ImageFormat, RgbImage};
use serde_json::{Value, json};
use server::{Shared, small, until, with};

static SERVER: Shared = Shared::new(&[]);

const TXT2IMG: &str = "/sdapi/v1/txt2img";
const IMG2IMG: &str = "/sdapi/v1/img2img";
const PROMPTS: &str = "Prompts from file or textbox";

fn picture(width: u32, height: u32) -> String {
    let picture = RgbImage::from_fn(width, height, |x, y| {
        image::Rgb([(x * 3) as u8, (y * 2) as u8, 80])
    });
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png).unwrap();
    STANDARD.encode(bytes.into_inner())
}

fn from_image(script: &str, args: impl Into<Value>, changes: Value) -> Value {
    let own = json!({ "init_images": [picture(64, 64)], "denoising_strength": 0.75, "script_name": script, "script_args": args.into() });
    with(with(small(), own), changes)
}

struct Made {
    pictures: Vec<RgbImage>,
    info: Value,
}

#[track_caller]
fn make(path: &str, body: &Value) -> Made {
    let answer = SERVER.hold().post(path, body);
    let files = answer.images();
    let pictures = files
        .iter()
        .map(|file| image::load_from_memory(file).unwrap().to_rgb8());
    let info = answer.json()["info"].as_str().unwrap().to_string();
    Made {
        pictures: pictures.collect(),
        info: serde_json::from_str(&info).unwrap(),
    }
}

#[test]
fn each_line_of_prompts_is_a_request_of_its_own() {
    let _held = SERVER.hold();
    let lines = "a cat\n\n  --prompt \"a dog\" --seed 9 --steps 1 --width 128\n";
    let body = with(
        small(),
        json!({ "prompt": "oil", "script_name": PROMPTS, "script_args": [false, false, "start", lines] }),
    );
    let made = make(TXT2IMG, &body);
    assert_eq!(made.info["all_prompts"], json!(["a cat oil", "a dog oil"]));
    assert_eq!(made.info["all_seeds"], json!([7, 9]));
    assert_eq!(made.info["index_of_first_image"], 0);
    let infotexts = made.info["infotexts"].as_array().unwrap();
    assert!(
        infotexts[1]
            .as_str()
            .unwrap()
            .starts_with("a dog oil\nSteps: 1,"),
        "{infotexts:?}"
    );
    let sizes: Vec<_> = made.pictures.iter().map(RgbImage::dimensions).collect();
    assert_eq!(sizes, [(64, 64), (128, 64)]);
    let alone = make(TXT2IMG, &with(small(), json!({ "prompt": "a cat oil" })));
    assert_eq!(made.pictures[0], alone.pictures[0]);
}

#[test]
fn prompts_iterate_the_seed_or_share_a_random_one() {
    let _held = SERVER.hold();
    let ask = |args: Value, seed: i64| {
        let body = json!({ "prompt": "", "seed": seed, "script_name": PROMPTS, "script_args": args, "n_iter": 2 });
        make(TXT2IMG, &with(small(), body)).info["all_seeds"].clone()
    };
    assert_eq!(
        ask(json!([true, false, "end", "a\nb"]), 5),
        json!([5, 6, 7, 8])
    );
    let shared = ask(json!([false, true, "end", "a\nb"]), -1);
    assert_eq!((&shared[0], &shared[1]), (&shared[2], &shared[3]));
}

#[test]
fn prompts_start_from_a_picture_and_are_saved() {
    let _held = SERVER.hold();
    let args = json!([false, false, "start", "a\nb"]);
    let made = make(
        IMG2IMG,
        &from_image(PROMPTS, args, json!({ "save_images": true })),
    );
    assert_eq!(
        made.pictures.len(),
        2,
        "no grid: `prompts_from_file.py` asks for none"
    );
    assert_eq!(
        SERVER
            .hold()
            .files("outputs/img2img-images")
            .iter()
            .filter(|file| file.extension().is_some_and(|e| e == "png"))
            .count(),
        2
    );
}

#[test]
fn loopback_feeds_each_result_into_the_next_run() {
    let _held = SERVER.hold();
    let made = make(
        IMG2IMG,
        &from_image("Loopback", json!([3, 0.25, "Linear"]), json!({})),
    );
    // A1111 puts a grid of one row before the results.
    let sizes: Vec<_> = made.pictures.iter().map(RgbImage::dimensions).collect();
    assert_eq!(sizes, [(192, 64), (64, 64), (64, 64), (64, 64)]);
    assert_eq!(made.info["all_seeds"], json!([7, 8, 9]));
    assert_eq!(made.info["index_of_first_image"], 1);
    assert_eq!(
        made.info["extra_generation_params"]["Denoising curve"],
        "Linear"
    );
    let strengths: Vec<bool> = [(1, "0.75"), (2, "0.5"), (3, "0.25")]
        .map(|(index, strength)| {
            let text = made.info["infotexts"][index].as_str().unwrap();
            text.contains(&format!("Denoising strength: {strength},"))
                && text.contains("Final denoising strength: 0.25")
        })
        .to_vec();
    assert_eq!(strengths, [true; 3], "{}", made.info["infotexts"]);
    // By hand: the first result is the second run's picture.
    let first = made.pictures[1].clone();
    let mut file = Cursor::new(Vec::new());
    first.write_to(&mut file, ImageFormat::Png).unwrap();
    let second = json!({ "init_images": [STANDARD.encode(file.into_inner())], "denoising_strength": 0.5, "seed": 8 });
    assert_eq!(
        make(IMG2IMG, &with(small(), second)).pictures[0],
        made.pictures[2]
    );
}

#[test]
fn loopback_of_several_batches_keeps_the_last_of_each() {
    let _held = SERVER.hold();
    let made = make(
        IMG2IMG,
        &from_image("loopback", json!([2]), json!({ "n_iter": 2 })),
    );
    assert_eq!(made.pictures.len(), 3, "a grid and two results");
    assert_eq!(made.info["all_seeds"], json!([8, 10]));
}

#[test]
fn sd_upscale_paints_the_enlarged_picture_in_pieces() {
    let _held = SERVER.hold();
    let args = json!(["", 16, "Lanczos", 2.0]);
    let made = make(
        IMG2IMG,
        &from_image(
            "SD upscale",
            args.clone(),
            json!({ "denoising_strength": 0.2 }),
        ),
    );
    assert_eq!(made.pictures.len(), 1);
    assert_eq!(made.pictures[0].dimensions(), (128, 128));
    assert_eq!(
        made.info["extra_generation_params"]["SD upscale overlap"],
        16
    );
    assert_eq!(
        made.info["extra_generation_params"]["SD upscale upscaler"],
        "Lanczos"
    );
    assert!(
        made.info["infotexts"][0]
            .as_str()
            .unwrap()
            .contains("Size: 64x64"),
        "a piece's size, as in A1111"
    );
    // The upscaler by number, two pieces at a time: the batches' seeds count up one by one, so the pictures differ.
    let by_number = json!(["", 16, 1, 2.0]);
    let batched = make(
        IMG2IMG,
        &from_image(
            "sd upscale",
            by_number.clone(),
            json!({ "denoising_strength": 0.2, "batch_size": 2 }),
        ),
    );
    assert_eq!(batched.pictures[0].dimensions(), (128, 128));
    let two = make(
        IMG2IMG,
        &from_image(
            "sd upscale",
            by_number,
            json!({ "denoising_strength": 0.2, "n_iter": 2 }),
        ),
    );
    assert_eq!(two.info["all_seeds"], json!([7, 8]));
    assert_eq!(
        two.pictures[0], made.pictures[0],
        "the same seed, the same picture"
    );
    assert_ne!(two.pictures[0], two.pictures[1]);
    // `None` leaves the size: one piece, which is plain image to image.
    let none = make(
        IMG2IMG,
        &from_image("SD upscale", json!(["", 0, "None", 2]), json!({})),
    );
    let plain = make(
        IMG2IMG,
        &with(
            small(),
            json!({ "init_images": [picture(64, 64)], "denoising_strength": 0.75 }),
        ),
    );
    assert_eq!(none.pictures[0], plain.pictures[0]);
}

#[test]
fn a_script_is_one_job_for_progress_and_interrupt() {
    let server = SERVER.hold();
    let lines = "a\n".repeat(50);
    let body = with(
        small(),
        json!({ "steps": 200, "script_name": PROMPTS, "script_args": [false, false, "start", lines] }),
    );
    let running = server.post_later(TXT2IMG, body);
    until("the second line to be worked on", || {
        let state = server.progress()["state"].clone();
        (state["job_count"] == 50 && state["job_no"].as_i64() >= Some(1)).then_some(())
    });
    assert_eq!(server.post("/sdapi/v1/interrupt", &json!({})).status, 200);
    let answer = running.join().unwrap();
    let info: Value = serde_json::from_str(answer.json()["info"].as_str().unwrap()).unwrap();
    assert_eq!(info["all_seeds"].as_array().unwrap().len(), 50);
    assert!(answer.images().len() < 50);
    server.assert_works();
}

#[test]
fn wrong_scripts_and_arguments_are_named() {
    let server = SERVER.hold();
    let cases = [
        (
            TXT2IMG,
            json!({ "script_name": "SD upscale" }),
            422,
            "Script 'SD upscale' not found",
        ),
        (
            TXT2IMG,
            json!({ "alwayson_scripts": { "Loopback": {} } }),
            422,
            "Cannot have a selectable script in the always on scripts params: `Loopback`",
        ),
        (
            TXT2IMG,
            json!({ "script_name": PROMPTS }),
            422,
            "script `prompts from file or textbox`: argument 3 must have between 1 and 1000 lines (setting `limits.max_batch_count`): 0",
        ),
        (
            TXT2IMG,
            json!({ "script_name": PROMPTS, "script_args": [0, 0, "middle", "a"] }),
            422,
            "script `prompts from file or textbox`: argument 2 must be `start` or `end`: `middle`",
        ),
        (
            IMG2IMG,
            json!({ "script_name": "loopback", "script_args": [0] }),
            422,
            "script `loopback`: argument 0 must be between 1 and 1000: `0`",
        ),
        (
            IMG2IMG,
            json!({ "script_name": "loopback", "script_args": [1, 0.5, "Wild"] }),
            422,
            "script `loopback`: argument 2 must be one of `Aggressive`, `Linear`, `Lazy`: `Wild`",
        ),
        (
            IMG2IMG,
            json!({ "script_name": "loopback", "script_args": [1, 0.5, "Linear", "CLIP"] }),
            501,
            "loopback with interrogated prompts (argument 3) is not supported by this version of sdgen",
        ),
        (
            IMG2IMG,
            json!({ "script_name": "sd upscale", "script_args": [0, 64] }),
            422,
            "tile overlap must be smaller than `width` and `height`: `64` and 64x64",
        ),
        (
            IMG2IMG,
            json!({ "script_name": "sd upscale", "script_args": [0, 8, 99] }),
            422,
            "script `sd upscale`: argument 2 must be below 3, the upscalers there are: `99`",
        ),
        (
            IMG2IMG,
            json!({ "script_name": "sd upscale", "script_args": [0, 63, "Nearest", 64] }),
            422,
            "SD upscale would cut the picture into 16265089 pieces, more than 4096; use a smaller overlap or a larger `width` and `height`",
        ),
        (
            IMG2IMG,
            json!({ "script_name": "sd upscale", "mask": picture(64, 64), "script_args": [0, 8] }),
            400,
            "SD upscale paints the whole picture; send it without `mask`",
        ),
    ];
    for (path, changes, status, message) in cases {
        let body = with(
            with(small(), json!({ "init_images": [picture(64, 64)] })),
            changes,
        );
        let answer = server.post(path, &body);
        let said = answer.json()["detail"].as_str().map(str::to_string);
        assert_eq!((answer.status, said.as_deref()), (status, Some(message)));
    }
    server.assert_works();
}

#[test]
fn what_works_is_listed() {
    let server = SERVER.hold();
    let scripts = server.get("/sdapi/v1/scripts").json();
    assert_eq!(
        scripts,
        json!({
            "txt2img": ["refiner", "sampler", "seed", "prompts from file or textbox"],
            "img2img": ["refiner", "sampler", "seed", "soft inpainting", "prompts from file or textbox", "loopback", "sd upscale"],
        })
    );
    let info = server.get("/sdapi/v1/script-info").json();
    let entries = info.as_array().unwrap();
    assert_eq!(entries.len(), 11);
    let upscale = entries
        .iter()
        .find(|entry| entry["name"] == "sd upscale")
        .unwrap();
    assert_eq!(
        upscale["args"][2]["choices"],
        json!(["None", "Lanczos", "Nearest"])
    );
    // Whatever is listed is accepted.
    for name in scripts["txt2img"].as_array().unwrap().iter().take(3) {
        let body = with(
            small(),
            json!({ "alwayson_scripts": { name.as_str().unwrap(): { "args": [] } } }),
        );
        assert_eq!(server.post(TXT2IMG, &body).status, 200, "{name}");
    }
}
