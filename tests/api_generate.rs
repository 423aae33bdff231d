//! `txt2img` and what watches and stops it, on a real server and the demo model.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/server.rs"]
mod server;

use std::sync::Arc;

use serde_json::{Value, json};
use server::{Server, endless, small, until, with};

fn decode(bytes: &[u8]) -> image::RgbImage {
    image::load_from_memory(bytes).unwrap().into_rgb8()
}

fn png_text(bytes: &[u8]) -> Option<String> {
    sdgen::imaging::read_metadata(bytes).unwrap().infotext
}

#[test]
fn a_picture_comes_with_its_parameters_and_info() {
    let server = Server::start(&[]);
    let request = with(
        small(),
        json!({ "negative_prompt": "blurry", "width": 64, "height": 72, "cfg_scale": 4 }),
    );
    let answer = server.post("/sdapi/v1/txt2img", &request);
    let images = answer.images();
    assert_eq!(images.len(), 1);
    assert_eq!(decode(&images[0]).dimensions(), (64, 72));
    assert!(answer.header("x-process-time").is_some());

    let info = answer.info();
    let keys: Vec<&str> = info
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(
        keys,
        [
            "prompt",
            "all_prompts",
            "negative_prompt",
            "all_negative_prompts",
            "seed",
            "all_seeds",
            "subseed",
            "all_subseeds",
            "subseed_strength",
            "width",
            "height",
            "sampler_name",
            "cfg_scale",
            "steps",
            "batch_size",
            "restore_faces",
            "face_restoration_model",
            "sd_model_name",
            "sd_model_hash",
            "sd_vae_name",
            "sd_vae_hash",
            "seed_resize_from_w",
            "seed_resize_from_h",
            "denoising_strength",
            "extra_generation_params",
            "index_of_first_image",
            "infotexts",
            "styles",
            "job_timestamp",
            "clip_skip",
            "is_using_inpainting_conditioning",
            "version"
        ]
    );
    assert_eq!(
        info["infotexts"][0].as_str().map(str::to_string),
        png_text(&images[0])
    );
    assert_eq!(
        (&info["seed"], &info["all_seeds"], &info["sampler_name"]),
        (&json!(7), &json!([7]), &json!("Euler"))
    );
    assert_eq!(
        (&info["restore_faces"], &info["styles"], &info["version"]),
        (&json!(false), &json!([]), &json!("v1.10.1"))
    );
    assert_eq!(
        (&info["sd_model_name"], info["sd_model_hash"].is_string()),
        (&json!("sdgen-demo"), true)
    );
    assert_eq!(info["job_timestamp"].as_str().unwrap().len(), 14);

    let parameters = &answer.json()["parameters"];
    assert_eq!(parameters.as_object().unwrap().len(), 55);
    assert_eq!(
        (&parameters["steps"], &parameters["cfg_scale"]),
        (&json!(2), &json!(4.0))
    );
    assert_eq!(
        (
            &parameters["sampler_index"],
            &parameters["styles"],
            &parameters["script_args"]
        ),
        (&json!("Euler"), &Value::Null, &json!([]))
    );

    let again = server.post("/sdapi/v1/txt2img", &request);
    assert_eq!(again.images(), images, "same seed, same bytes");
}

#[test]
fn batches_are_consecutive_seeds_and_equal_singles() {
    let server = Server::start(&[]);
    let request = json!({ "prompt": "cat", "seed": 100, "batch_size": 2, "n_iter": 2, "steps": 2, "width": 64, "height": 64,
        "sampler_name": "DPM++ 2M Karras", "unknown": {"a": 1}, "tiling": 0, "restore_faces": null });
    let answer = server.post("/sdapi/v1/txt2img", &request);
    let info = answer.info();
    assert_eq!(
        (&info["all_seeds"], &info["sampler_name"]),
        (&json!([100, 101, 102, 103]), &json!("DPM++ 2M"))
    );
    let images = answer.images();
    assert_eq!(
        (images.len(), info["infotexts"].as_array().unwrap().len()),
        (4, 4)
    );
    for (index, image) in images.iter().enumerate() {
        let single = with(
            request.clone(),
            json!({ "seed": 100 + index, "batch_size": 1, "n_iter": 1 }),
        );
        let single = server.post("/sdapi/v1/txt2img", &single).images();
        assert_eq!(decode(&single[0]), decode(image), "picture {index}");
    }
    let random = server.post(
        "/sdapi/v1/txt2img",
        &with(small(), json!({ "seed": -1, "send_images": false })),
    );
    assert!(random.info()["seed"].as_u64().unwrap() < 4_294_967_294);
    assert_eq!(
        (
            &random.json()["parameters"]["seed"],
            &random.json()["images"]
        ),
        (&json!(-1), &json!([]))
    );
    assert_eq!(random.info()["infotexts"].as_array().unwrap().len(), 1);
}

#[test]
fn scalars_are_read_leniently_and_problems_all_at_once() {
    let server = Server::start(&[]);
    let sent = json!({ "prompt": 5, "steps": "2", "width": 64.9, "height": "64", "cfg_scale": "3.5", "seed": 1.0, "tiling": "off",
        "save_images": 0, "send_images": "yes", "styles": null, "batch_size": null, "alwayson_scripts": {"ADetailer": {"args": [false]}},
        "script_name": null, "script_args": null, "scheduler": "automatic", "override_settings": {} });
    let answer = server.post("/sdapi/v1/txt2img", &sent);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let parameters = &answer.json()["parameters"];
    assert_eq!(
        (
            &parameters["prompt"],
            &parameters["width"],
            &parameters["batch_size"]
        ),
        (&json!("5"), &json!(64), &json!(1))
    );
    let untyped = server.send(
        "POST",
        "/sdapi/v1/txt2img",
        &[("content-type", "text/plain")],
        small().to_string().as_bytes(),
    );
    assert_eq!(untyped.status, 200);

    let bad = json!({ "steps": "many", "cfg_scale": {}, "prompt": ["a"], "send_images": 2 });
    let fields: Vec<String> = server
        .post("/sdapi/v1/txt2img", &bad)
        .problems()
        .into_iter()
        .map(|(field, _)| field)
        .collect();
    assert_eq!(fields, ["prompt", "steps", "cfg_scale", "send_images"]);
    let one = server.post("/sdapi/v1/txt2img", &json!({ "steps": "many" }));
    assert_eq!(
        one.text(),
        r#"{"detail":[{"loc":["body","steps"],"msg":"value is not a valid integer","type":"type_error.integer"}]}"#
    );
    server.assert_works();
}

#[test]
fn bad_requests_are_answered_in_words_and_the_next_job_works() {
    let server = Server::start(&[]);
    let problem = |changes: Value| {
        server
            .post("/sdapi/v1/txt2img", &with(small(), changes))
            .problems()
            .remove(0)
    };
    let expect = |changes: Value, field: &str, message: &str| {
        assert_eq!(problem(changes), (field.into(), message.into()));
    };
    for width in [0, 7, 100_000] {
        let message =
            format!("must be between 8 and 4096 pixels (setting `limits.max_side`): `{width}`");
        expect(json!({ "width": width }), "width", &message);
    }
    for steps in [0, 100_000] {
        expect(
            json!({ "steps": steps }),
            "steps",
            &format!("must be between 1 and 1000 (setting `limits.max_steps`): `{steps}`"),
        );
    }
    expect(
        json!({ "cfg_scale": "nan" }),
        "cfg_scale",
        "value must be a finite number",
    );
    expect(
        json!({ "batch_size": 65 }),
        "batch_size",
        "must be between 1 and 64 (setting `limits.max_batch_size`): `65`",
    );
    expect(
        json!({ "seed": -2 }),
        "seed",
        "must be -1 (random) or between 0 and 9223372036854775807: `-2`",
    );
    let megabyte = "x".repeat(1 << 20);
    expect(
        json!({ "prompt": megabyte }),
        "prompt",
        "has 1048576 bytes, more than 65536 (setting `limits.max_prompt_kib`)",
    );

    server.assert_works();
}

#[test]
fn bad_bodies_and_names_are_answered_in_words_and_the_next_job_works() {
    let server = Server::start(&[]);
    let raw = |body: &[u8]| {
        server.send(
            "POST",
            "/sdapi/v1/txt2img",
            &[("content-type", "application/json")],
            body,
        )
    };
    assert_eq!(
        raw(b"").problems(),
        [("body".into(), "field required".into())]
    );
    assert_eq!(raw(b"[1]").problems()[0].1, "value is not a valid dict");
    assert_eq!(
        raw(b"{\"cfg_scale\": NaN}").problems()[0].1,
        "not valid JSON: expected value at line 1 column 15"
    );
    assert_eq!(
        raw(b"{\"prompt\": \"\xff\"}").problems(),
        [("12".into(), "body is not valid UTF-8 at byte 12".into())]
    );

    let sampler = server.post(
        "/sdapi/v1/txt2img",
        &with(small(), json!({ "sampler_name": "Eulerr" })),
    );
    assert_eq!(sampler.status, 400);
    let message = sampler.json()["detail"].as_str().unwrap().to_string();
    assert!(
        message.starts_with("unknown sampler: `Eulerr`; valid: `DPM++ 2M`, "),
        "{message}"
    );
    assert_eq!(sampler.json()["error"], "HTTPException");
    let scheduler = server.post(
        "/sdapi/v1/txt2img",
        &with(small(), json!({ "scheduler": "fast" })),
    );
    assert!(
        scheduler.json()["detail"]
            .as_str()
            .unwrap()
            .starts_with("unknown scheduler: `fast`; valid: "),
        "{}",
        scheduler.text()
    );
    assert_eq!(scheduler.status, 400);
    let lenient = with(
        small(),
        json!({ "sampler_name": "k_euler", "scheduler": "KARRAS" }),
    );
    assert_eq!(
        server.post("/sdapi/v1/txt2img", &lenient).info()["sampler_name"],
        "Euler"
    );

    let script = server.post(
        "/sdapi/v1/txt2img",
        &with(small(), json!({ "script_name": "x/y/z plot" })),
    );
    assert_eq!(
        (script.status, script.json()["detail"].as_str()),
        (422, Some("Script 'x/y/z plot' not found"))
    );
    let always = with(
        small(),
        json!({ "alwayson_scripts": { "ControlNet": { "args": [{ "enabled": true }] } } }),
    );
    assert_eq!(
        server.post("/sdapi/v1/txt2img", &always).json()["detail"],
        "Script 'ControlNet' not found"
    );
    server.assert_works();
}

#[test]
fn overrides_hold_for_one_request_unless_told_otherwise() {
    let server = Server::start(&[]);
    let jpeg = with(
        small(),
        json!({ "override_settings": { "samples_format": "jpg", "CLIP_stop_at_last_layers": 2, "forge_x": 1 } }),
    );
    let answer = server.post("/sdapi/v1/txt2img", &jpeg);
    assert_eq!(&answer.images()[0][..2], [0xff, 0xd8]);
    assert_eq!(answer.info()["clip_skip"], 2);
    assert_eq!(
        png_text(&answer.images()[0]),
        answer.info()["infotexts"][0].as_str().map(str::to_string)
    );
    assert_eq!(
        server.get("/sdapi/v1/options").json()["samples_format"],
        "png"
    );

    let kept = with(
        small(),
        json!({ "override_settings": { "samples_format": "webp", "enable_pnginfo": false }, "override_settings_restore_afterwards": false }),
    );
    let answer = server.post("/sdapi/v1/txt2img", &kept);
    assert_eq!(&answer.images()[0][..4], b"RIFF");
    assert_eq!(png_text(&answer.images()[0]), None);
    assert_eq!(
        server.get("/sdapi/v1/options").json()["samples_format"],
        "webp"
    );
    let wrong = with(
        small(),
        json!({ "override_settings": { "samples_format": "bmp" } }),
    );
    assert_eq!(
        server.post("/sdapi/v1/txt2img", &wrong).problems()[0],
        (
            "samples_format".to_string(),
            r#"unknown value: "bmp"; one of: png, jpg, jpeg, webp"#.to_string()
        )
    );
    let wrong = with(
        small(),
        json!({ "override_settings": { "jpeg_quality": "high" } }),
    );
    assert_eq!(
        server.post("/sdapi/v1/txt2img", &wrong).problems()[0].0,
        "jpeg_quality"
    );
    let dropped = with(
        small(),
        json!({ "override_settings": { "sd_model_checkpoint": "nope" } }),
    );
    assert_eq!(
        server.post("/sdapi/v1/txt2img", &dropped).info()["sd_model_name"],
        "sdgen-demo"
    );
}

#[test]
fn saved_pictures_have_a1111s_names_and_a_grid_in_the_answer() {
    let server = Server::start(&[]);
    std::fs::write(
        server.data().join("styles.csv"),
        "name,prompt,negative_prompt\nink,{prompt} in ink,colour\n",
    )
    .unwrap();
    let request = with(
        small(),
        json!({ "save_images": true, "n_iter": 2, "styles": ["ink", "unknown"] }),
    );
    let answer = server.post("/sdapi/v1/txt2img", &request);
    let info = answer.info();
    assert_eq!(
        (&info["prompt"], &info["negative_prompt"]),
        (&json!("a red apple in ink"), &json!("colour"))
    );
    assert_eq!(
        (answer.images().len(), &info["index_of_first_image"]),
        (3, &json!(1))
    );
    assert_eq!(decode(&answer.images()[0]).dimensions(), (128, 64));
    let names = |below: &str| -> Vec<String> {
        server
            .files(below)
            .iter()
            .map(|path| path.file_name().unwrap().to_str().unwrap().to_string())
            .collect()
    };
    assert_eq!(
        names("outputs/txt2img-images"),
        ["00000-7.png", "00001-8.png"]
    );
    assert_eq!(names("outputs/txt2img-grids"), ["grid-0000.png"]);
    let saved = std::fs::read(&server.files("outputs/txt2img-images")[1]).unwrap();
    assert_eq!(saved, answer.images()[2]);
    let single = server.post(
        "/sdapi/v1/txt2img",
        &with(small(), json!({ "save_images": true })),
    );
    assert_eq!(
        (
            single.images().len(),
            &single.info()["index_of_first_image"]
        ),
        (1, &json!(0))
    );
    assert_eq!(names("outputs/txt2img-images").len(), 3);
    assert_eq!(
        server.get("/sdapi/v1/prompt-styles").json()[0]["name"],
        "ink"
    );
}

#[test]
fn progress_rises_and_interrupt_and_skip_end_a_job_early() {
    let server = Arc::new(Server::start(&[]));
    let job = server.post_later(
        "/sdapi/v1/txt2img",
        with(endless(), json!({ "force_task_id": "task(mine)" })),
    );
    let first = server.wait_for_step();
    assert!(
        first["progress"].as_f64() > Some(0.0) && first["eta_relative"].as_f64() > Some(0.0),
        "{first}"
    );
    assert_eq!(
        (&first["state"]["job"], &first["state"]["sampling_steps"]),
        (&json!("Batch 1 out of 100"), &json!(1000))
    );
    let step = |progress: &Value| progress["state"]["sampling_step"].as_i64().unwrap();
    until("progress to rise", || {
        (step(&server.progress()) > step(&first)).then_some(())
    });
    let task = server
        .post("/internal/progress", &json!({ "id_task": "task(mine)" }))
        .json();
    assert_eq!(
        (&task["active"], task["progress"].is_f64()),
        (&json!(true), true)
    );

    let queued = server.post_later(
        "/sdapi/v1/txt2img",
        with(small(), json!({ "force_task_id": "task(next)" })),
    );
    until("the second job to wait", || {
        let pending = server.get("/internal/pending-tasks").json();
        (pending == json!({ "size": 1, "tasks": ["task(next)"] })).then_some(())
    });
    let waiting = server
        .post("/internal/progress", &json!({ "id_task": "task(next)" }))
        .json();
    assert_eq!(
        (&waiting["queued"], &waiting["textinfo"]),
        (&json!(true), &json!("In queue: 1/1"))
    );

    assert_eq!(
        server.send("POST", "/sdapi/v1/skip", &[], b"").json(),
        Value::Null
    );
    until("the second batch", || {
        (server.progress()["state"]["job_no"] == 1).then_some(())
    });
    assert_eq!(server.progress()["state"]["skipped"], true);
    assert_eq!(
        server.post("/sdapi/v1/interrupt", &json!({})).json(),
        json!({})
    );
    let ended = job.join().unwrap();
    let info = ended.info();
    assert_eq!(info["all_seeds"].as_array().unwrap().len(), 100);
    assert!(ended.images().len() <= 2, "{}", ended.images().len());
    assert_eq!(
        queued.join().unwrap().images().len(),
        1,
        "an interrupt concerns the running job only"
    );
    server.wait_idle();
    let idle = server.progress();
    assert_eq!(
        (&idle["progress"], &idle["state"]["job"]),
        (&json!(0.0), &json!(""))
    );
    let done = server
        .post("/internal/progress", &json!({ "id_task": "task(mine)" }))
        .json();
    assert_eq!(
        (&done["completed"], &done["active"]),
        (&json!(true), &json!(false))
    );
    server.post("/sdapi/v1/interrupt", &json!({}));
    assert_eq!(
        server.post("/sdapi/v1/txt2img", &small()).images().len(),
        1,
        "an interrupt while idle is harmless"
    );
}

#[test]
fn fifty_requests_at_once_are_all_served() {
    let server = Arc::new(Server::start(&["--queue-limit", "8"]));
    let jobs: Vec<_> = (0..50)
        .map(|seed| {
            (
                seed,
                server.post_later(
                    "/sdapi/v1/txt2img",
                    with(small(), json!({ "seed": seed, "steps": 1 })),
                ),
            )
        })
        .collect();
    for (seed, job) in jobs {
        assert_eq!(job.join().unwrap().info()["all_seeds"], json!([seed]));
    }
    assert_eq!(server.get("/internal/pending-tasks").json()["size"], 0);
}
