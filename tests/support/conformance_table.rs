//! A1111's endpoint index as a table: a good request with the shape of its answer, and bad ones with their status.
//!
//! Shapes: `str`, `int`, `num`, `bool`, `obj`, `list`, `any`, with `?` for null allowed; a list of one shape is a list of such;
//! an object has exactly these keys in this order, or with a last key `*` any more.

use serde_json::{Value, json};

/// What is sent: method, path with query, body.
pub(crate) type Request = (&'static str, &'static str, Option<String>);

pub(crate) struct Row {
    pub(crate) path: &'static str,
    pub(crate) good: Request,
    pub(crate) status: u16,
    pub(crate) shape: Value,
    pub(crate) bad: Vec<(Request, u16)>,
}

/// The words of a refusal by a handler, and of one by the router.
pub(crate) fn refusals() -> [Value; 3] {
    [
        json!({ "error": "str", "detail": "str", "body": "str", "errors": "str" }),
        json!({ "detail": "str" }),
        json!({ "detail": [{ "loc": "list", "msg": "str", "type": "str" }] }),
    ]
}

fn get(path: &'static str, shape: Value) -> Row {
    let bad = vec![
        (("POST", path, Some("{}".into())), 405),
        (("DELETE", path, None), 405),
    ];
    Row {
        path,
        good: ("GET", path, None),
        status: 200,
        shape,
        bad,
    }
}

fn post(path: &'static str, body: &Value, shape: Value, bad: &[(&str, u16)]) -> Row {
    let bad = bad
        .iter()
        .map(|(body, status)| (("POST", path, Some((*body).to_string())), *status));
    Row {
        path,
        good: ("POST", path, Some(body.to_string())),
        status: 200,
        shape,
        bad: bad.collect(),
    }
}

/// A route that reads no body: nothing sent to it is wrong but the method.
fn act(path: &'static str, shape: Value) -> Row {
    let bad = vec![
        (("GET", path, None), 405),
        (("PUT", path, Some("{}".into())), 405),
    ];
    Row {
        path,
        good: ("POST", path, Some("\"\"".into())),
        status: 200,
        shape,
        bad,
    }
}

fn status(mut row: Row, status: u16) -> Row {
    row.status = status;
    row
}

fn asks(mut row: Row, good: Request, bad: Vec<(Request, u16)>) -> Row {
    row.good = good;
    row.bad.extend(bad);
    row
}

fn state() -> Value {
    json!({ "skipped": "bool", "interrupted": "bool", "stopping_generation": "bool", "job": "str", "job_count": "int",
        "job_timestamp": "str", "job_no": "int", "sampling_step": "int", "sampling_steps": "int" })
}

fn parameters(image: bool) -> Value {
    let mut names: Vec<&str> = "prompt negative_prompt styles seed subseed subseed_strength seed_resize_from_h seed_resize_from_w \
        sampler_name scheduler batch_size n_iter steps cfg_scale width height restore_faces tiling do_not_save_samples \
        do_not_save_grid eta denoising_strength s_min_uncond s_churn s_tmax s_tmin s_noise override_settings \
        override_settings_restore_afterwards refiner_checkpoint refiner_switch_at disable_extra_networks firstpass_image comments"
        .split_whitespace()
        .collect();
    names.extend(if image {
        "init_images resize_mode image_cfg_scale mask mask_blur_x mask_blur_y mask_blur mask_round inpainting_fill \
        inpaint_full_res inpaint_full_res_padding inpainting_mask_invert initial_noise_multiplier latent_mask include_init_images"
            .split_whitespace()
    } else {
        "enable_hr firstphase_width firstphase_height hr_scale hr_upscaler hr_second_pass_steps hr_resize_x hr_resize_y \
        hr_checkpoint_name hr_sampler_name hr_scheduler hr_prompt hr_negative_prompt"
            .split_whitespace()
    });
    names.extend("force_task_id sampler_index script_name script_args send_images save_images alwayson_scripts infotext".split_whitespace());
    names
        .into_iter()
        .map(|name| (name.to_string(), json!("any")))
        .collect()
}

const BAD_IMAGE: &str = r#"{"image": "%%%"}"#;

/// Every route of A1111's; `png` is a picture in base64.
#[allow(clippy::too_many_lines, reason = "a table")]
pub(crate) fn rows(png: &str) -> Vec<Row> {
    let small = json!({ "prompt": "a cube", "steps": 1, "width": 64, "height": 64, "seed": 3, "sampler_name": "Euler" });
    let mut from_image = small.clone();
    from_image["init_images"] = json!([png]);
    let made = |image| json!({ "images": ["str"], "parameters": parameters(image), "info": "str" });
    let mut rows = vec![
        post(
            "/sdapi/v1/txt2img",
            &small,
            made(false),
            &[
                (r#"{"prompt":"x","steps":"many"}"#, 422),
                (r#"{"prompt": "#, 422),
                ("", 422),
                ("[]", 422),
                (r#"{"prompt":["x"]}"#, 422),
                (r#"{"sampler_name":"nope"}"#, 400),
                (r#"{"script_name":"nope"}"#, 422),
            ],
        ),
        post(
            "/sdapi/v1/img2img",
            &from_image,
            made(true),
            &[
                ("{}", 404),
                (r#"{"init_images":[]}"#, 404),
                (r#"{"init_images":["%%%"]}"#, 400),
                (r#"{"init_images":7}"#, 422),
            ],
        ),
        post(
            "/sdapi/v1/extra-single-image",
            &json!({ "image": png, "upscaler_1": "Lanczos", "upscaling_resize": 2 }),
            json!({ "html_info": "str", "image": "str" }),
            &[
                (BAD_IMAGE, 400),
                (r#"{"resize_mode": 2}"#, 422),
                (r#"{"upscaler_1": "nope"}"#, 400),
            ],
        ),
        post(
            "/sdapi/v1/extra-batch-images",
            &json!({ "imageList": [{ "data": png, "name": "a" }], "upscaler_1": "Nearest" }),
            json!({ "html_info": "str", "images": ["str"] }),
            &[
                ("{}", 422),
                (r#"{"imageList": [{"name": "a"}]}"#, 422),
                (r#"{"imageList": "x"}"#, 422),
            ],
        ),
        post(
            "/sdapi/v1/png-info",
            &json!({ "image": png }),
            json!({ "info": "str", "items": "obj", "parameters": "obj" }),
            &[("{}", 422), (BAD_IMAGE, 400), (r#"{"image": 1.5e}"#, 422)],
        ),
        status(
            post(
                "/sdapi/v1/interrogate",
                &json!({ "image": png, "model": "clip" }),
                refusals()[0].clone(),
                &[
                    (r#"{"image": "a", "model": "nope"}"#, 404),
                    ("{}", 404),
                    ("{", 422),
                ],
            ),
            501,
        ),
        get(
            "/sdapi/v1/progress",
            json!({ "progress": "num", "eta_relative": "num", "state": state(), "current_image": "str?", "textinfo": "str?" }),
        ),
        act("/sdapi/v1/interrupt", json!({})),
        act("/sdapi/v1/skip", json!("null")),
        get("/sdapi/v1/cmd-flags", json!({ "*": "any" })),
        get(
            "/sdapi/v1/samplers",
            json!([{ "name": "str", "aliases": ["str"], "options": "obj" }]),
        ),
        get(
            "/sdapi/v1/schedulers",
            json!([{ "name": "str", "label": "str", "aliases": "list?", "default_rho": "num", "need_inner_model": "bool" }]),
        ),
        get(
            "/sdapi/v1/upscalers",
            json!([{ "name": "str", "model_name": "str?", "model_path": "str?", "model_url": "str?", "scale": "num" }]),
        ),
        get("/sdapi/v1/latent-upscale-modes", json!([{ "name": "str" }])),
        get(
            "/sdapi/v1/sd-models",
            json!([{ "title": "str", "model_name": "str", "hash": "str?", "sha256": "str?", "filename": "str", "config": "str?" }]),
        ),
        get(
            "/sdapi/v1/sd-vae",
            json!([{ "model_name": "str", "filename": "str" }]),
        ),
        get(
            "/sdapi/v1/loras",
            json!([{ "name": "str", "alias": "str", "path": "str", "metadata": "obj" }]),
        ),
        get(
            "/sdapi/v1/embeddings",
            json!({ "loaded": "obj", "skipped": "obj" }),
        ),
        get(
            "/sdapi/v1/prompt-styles",
            json!([{ "name": "str", "prompt": "str?", "negative_prompt": "str?" }]),
        ),
        get(
            "/sdapi/v1/scripts",
            json!({ "txt2img": ["str"], "img2img": ["str"] }),
        ),
        get(
            "/sdapi/v1/script-info",
            json!([{ "name": "str", "is_alwayson": "bool", "is_img2img": "bool",
            "args": [{ "label": "str", "value": "any", "minimum": "num?", "maximum": "num?", "step": "num?", "choices": "list?" }] }]),
        ),
        get("/sdapi/v1/extensions", json!(["any"])),
        get(
            "/sdapi/v1/hypernetworks",
            json!([{ "name": "str", "path": "str" }]),
        ),
        get(
            "/sdapi/v1/face-restorers",
            json!([{ "name": "str", "cmd_dir": "str?" }]),
        ),
        get(
            "/sdapi/v1/realesrgan-models",
            json!([{ "name": "str", "path": "str", "scale": "int" }]),
        ),
        get(
            "/sdapi/v1/memory",
            json!({ "ram": { "free": "num", "used": "num", "total": "num" }, "cuda": "obj" }),
        ),
        act("/sdapi/v1/refresh-loras", json!("null")),
        act("/sdapi/v1/refresh-embeddings", json!("null")),
        act("/sdapi/v1/refresh-checkpoints", json!("null")),
        act("/sdapi/v1/refresh-vae", json!("null")),
        act("/sdapi/v1/unload-checkpoint", json!({})),
        act("/sdapi/v1/reload-checkpoint", json!({})),
        get("/internal/ping", json!({})),
        get(
            "/internal/pending-tasks",
            json!({ "size": "int", "tasks": ["str"] }),
        ),
        post(
            "/internal/progress",
            &json!({ "id_task": "task(txt2img-AAAAAAA)" }),
            json!({ "active": "bool", "queued": "bool", "completed": "bool", "progress": "num?", "eta": "num?", "live_preview": "str?",
                "id_live_preview": "int", "textinfo": "str?" }),
            &[
                ("{}", 422),
                (r#"{"id_task": "a", "id_live_preview": "x"}"#, 422),
            ],
        ),
        get(
            "/internal/sysinfo",
            json!({ "Platform": "str", "Version": "str", "Commit": "str", "Data path": "str", "Commandline": ["str"], "*": "any" }),
        ),
        get("/internal/sysinfo-download", json!({ "*": "any" })),
        get(
            "/internal/quicksettings-hint",
            json!([{ "name": "str", "label": "str" }]),
        ),
        get(
            "/internal/profile-startup",
            json!({ "total": "num", "records": "obj" }),
        ),
        get(
            "/config",
            json!({ "version": "str", "mode": "str", "dev_mode": "bool", "components": [{ "id": "int", "type": "str", "props": "obj" }], "dependencies": "list" }),
        ),
        act("/login", json!({ "success": "bool" })),
        get("/login_check", json!("null")),
        get("/controlnet/version", json!({ "version": "int" })),
        get("/controlnet/model_list", json!({ "model_list": ["str"] })),
        get(
            "/controlnet/module_list",
            json!({ "module_list": ["str"], "module_detail": "obj" }),
        ),
        get(
            "/controlnet/control_types",
            json!({ "control_types": "obj" }),
        ),
        get(
            "/controlnet/settings",
            json!({ "control_net_unit_count": "int" }),
        ),
        post(
            "/controlnet/detect",
            &json!({ "controlnet_module": "none", "controlnet_input_images": [png] }),
            json!({ "images": ["str"], "info": "str" }),
            &[
                (r#"{"controlnet_module":"canny"}"#, 422),
                (r#"{"controlnet_module":"none"}"#, 422),
                ("[1]", 422),
            ],
        ),
    ];
    let options = "/sdapi/v1/options";
    let set = |body: &str| ("POST", options, Some(body.to_string()));
    rows.push(Row {
        path: options,
        good: ("GET", options, None),
        status: 200,
        shape: json!({ "*": "any" }),
        bad: vec![
            (("PUT", options, None), 405),
            (set("[1]"), 422),
            (set(r#"{"jpeg_quality": "x"}"#), 422),
            (set(r#"{"sd_model_checkpoint": "nope"}"#), 404),
        ],
    });
    rows.push(post(
        options,
        &json!({ "send_seed": true, "no_such_key": [1] }),
        json!("null"),
        &[("", 422), ("{", 422)],
    ));
    for path in [
        "/sdapi/v1/create/embedding",
        "/sdapi/v1/create/hypernetwork",
        "/sdapi/v1/train/embedding",
        "/sdapi/v1/train/hypernetwork",
    ] {
        rows.push(status(
            post(
                path,
                &json!({ "name": "a" }),
                refusals()[0].clone(),
                &[("", 422), ("7", 422)],
            ),
            501,
        ));
    }
    let thumb = "/sd_extra_networks/thumb";
    rows.push(status(
        asks(
            get(thumb, refusals()[0].clone()),
            ("GET", "/sd_extra_networks/thumb?filename=/etc/passwd", None),
            vec![
                (("GET", thumb, None), 404),
                (
                    (
                        "GET",
                        "/sd_extra_networks/thumb?filename=..%2f..%2fa.png",
                        None,
                    ),
                    404,
                ),
            ],
        ),
        404,
    ));
    rows.push(asks(
        get("/sd_extra_networks/metadata", json!({})),
        (
            "GET",
            "/sd_extra_networks/metadata?page=lora&item=nope",
            None,
        ),
        Vec::new(),
    ));
    rows.push(status(
        asks(
            get("/sd_extra_networks/cover-images", refusals()[0].clone()),
            (
                "GET",
                "/sd_extra_networks/cover-images?page=lora&item=a",
                None,
            ),
            vec![(
                (
                    "GET",
                    "/sd_extra_networks/cover-images?page=lora&item=a&index=x",
                    None,
                ),
                422,
            )],
        ),
        404,
    ));
    rows.push(status(
        asks(
            get("/sd_extra_networks/get-single-card", refusals()[0].clone()),
            (
                "GET",
                "/sd_extra_networks/get-single-card?page=lora&name=a",
                None,
            ),
            Vec::new(),
        ),
        404,
    ));
    rows
}

/// Paths that A1111 or its extensions have and that are to be unknown here.
pub(crate) const UNKNOWN: &[&str] = &[
    "/sdapi/v1/artists",
    "/sdapi/v1/artist-categories",
    "/sdapi/v1/server-stop",
    "/sdapi/v1/server-restart",
    "/sdapi/v1/server-kill",
    "/controlnet/txt2img",
    "/info",
    "/app_id",
    "/queue/join",
    "/run/predict",
    "/api/predict",
    "/agent-scheduler/v1/history",
    "/adetailer/v1/version",
    "/sdapi/v1/sd-modules",
    "/sdapi/v1/nope",
    "/file=/etc/passwd",
];
