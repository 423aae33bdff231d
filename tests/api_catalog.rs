//! Lists, options, flags, health and the manners of every route, on a real server.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/server.rs"]
mod server;

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::{Value, json};
use server::{Server, small, with};

fn keys(value: &Value) -> BTreeSet<&str> {
    value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

/// Title of the embedded model.
fn demo() -> String {
    format!("sdgen-demo [{}]", &sdgen::weights::demo::SHA256[..10])
}

fn set<'a>(names: &[&'a str]) -> BTreeSet<&'a str> {
    names.iter().copied().collect()
}

#[test]
fn lists_have_exactly_a1111s_keys() {
    let server = Server::start(&[]);
    let list = |path: &str| server.get(path).json();

    let samplers = list("/sdapi/v1/samplers");
    let names: Vec<&str> = samplers
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["name"].as_str().unwrap())
        .collect();
    assert!(
        ["Euler", "Euler a", "Heun", "DPM++ 2M", "DPM++ SDE"]
            .iter()
            .all(|name| names.contains(name)),
        "{names:?}"
    );
    for row in samplers.as_array().unwrap() {
        assert_eq!(keys(row), set(&["name", "aliases", "options"]));
        assert!(
            row["options"]
                .as_object()
                .unwrap()
                .values()
                .all(Value::is_string),
            "{row}"
        );
    }
    for row in list("/sdapi/v1/schedulers").as_array().unwrap() {
        assert_eq!(
            keys(row),
            set(&[
                "name",
                "label",
                "aliases",
                "default_rho",
                "need_inner_model"
            ])
        );
    }
    let upscalers = list("/sdapi/v1/upscalers");
    assert_eq!(upscalers[0]["name"], "None");
    for row in upscalers.as_array().unwrap() {
        assert_eq!(
            keys(row),
            set(&["name", "model_name", "model_path", "model_url", "scale"])
        );
    }
    assert_eq!(
        list("/sdapi/v1/latent-upscale-modes")[0],
        json!({ "name": "Latent" })
    );
    let models = list("/sdapi/v1/sd-models");
    assert_eq!(models[0]["title"], demo());
    assert_eq!(
        keys(&models[0]),
        set(&[
            "title",
            "model_name",
            "hash",
            "sha256",
            "filename",
            "config"
        ])
    );
    assert_eq!(list("/sdapi/v1/sd-vae"), json!([]));
    for path in [
        "extensions",
        "hypernetworks",
        "face-restorers",
        "realesrgan-models",
        "prompt-styles",
    ] {
        assert_eq!(list(&format!("/sdapi/v1/{path}")), json!([]), "{path}");
    }
    let memory = list("/sdapi/v1/memory");
    assert_eq!(keys(&memory), set(&["ram", "cuda"]));
    assert!(memory["ram"]["used"].as_f64() > Some(1e6), "{memory}");
}

#[test]
fn an_idle_server_reports_exactly_a1111s_idle_state() {
    let server = Server::start(&[]);
    let list = |path: &str| server.get(path).json();
    assert_eq!(
        server.get("/sdapi/v1/progress").text(),
        r#"{"progress":0.0,"eta_relative":0.0,"state":{"skipped":false,"interrupted":false,"stopping_generation":false,"job":"","job_count":0,"job_timestamp":"0","job_no":0,"sampling_step":0,"sampling_steps":0},"current_image":null,"textinfo":null}"#
    );
    assert_eq!(
        server
            .get("/sdapi/v1/progress?skipCurrentImage=true&skip_current_image=1")
            .status,
        200
    );
    let problem = server.get("/sdapi/v1/progress?skip_current_image=maybe");
    assert_eq!(problem.problems()[0].0, "skip_current_image");
    assert_eq!(
        list("/internal/pending-tasks"),
        json!({ "size": 0, "tasks": [] })
    );
    let unknown = server
        .post("/internal/progress", &json!({ "id_task": "task(none)" }))
        .json();
    assert_eq!(
        keys(&unknown),
        set(&[
            "active",
            "queued",
            "completed",
            "progress",
            "eta",
            "live_preview",
            "id_live_preview",
            "textinfo"
        ])
    );
    assert_eq!(
        (&unknown["active"], &unknown["id_live_preview"]),
        (&json!(false), &json!(-1))
    );
    assert_eq!(
        server.post("/internal/progress", &json!({})).problems()[0].1,
        "field required"
    );
}

#[test]
fn routes_have_fastapis_manners() {
    let server = Server::start(&[
        "--cors-allow-origins",
        "http://good.example",
        "--body-limit",
        "1",
    ]);
    let not_found = server.get("/sdapi/v1/nope");
    assert_eq!(
        (not_found.status, not_found.text().as_str()),
        (404, r#"{"detail":"Not Found"}"#)
    );
    assert!(
        not_found
            .header("x-process-time")
            .unwrap()
            .parse::<f64>()
            .is_ok()
    );
    let wrong_method = server.get("/sdapi/v1/txt2img");
    assert_eq!(
        (wrong_method.status, wrong_method.text().as_str()),
        (405, r#"{"detail":"Method Not Allowed"}"#)
    );
    assert_eq!(wrong_method.header("allow"), Some("POST"));
    assert_eq!(server.post("/sdapi/v1/samplers", &json!({})).status, 405);
    assert_eq!(server.send("HEAD", "/", &[], b"").status, 200);
    assert_eq!(
        server.send("HEAD", "/sdapi/v1/samplers", &[], b"").status,
        405
    );
    assert_eq!(server.get("/").status, 200);

    let redirect = server.get("/sdapi/v1/options/?a=1");
    assert_eq!(
        (redirect.status, redirect.header("location")),
        (307, Some("/sdapi/v1/options?a=1"))
    );
    assert_eq!(server.get("/nope/").status, 404);

    let preflight = |origin: &str| {
        let headers = [
            ("origin", origin),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "x-a"),
        ];
        server.send("OPTIONS", "/sdapi/v1/txt2img", &headers, b"")
    };
    let allowed = preflight("http://good.example");
    assert_eq!(
        allowed.header("access-control-allow-origin"),
        Some("http://good.example")
    );
    assert_eq!(
        allowed.header("access-control-allow-credentials"),
        Some("true")
    );
    assert_eq!(
        preflight("http://evil.example").header("access-control-allow-origin"),
        None
    );
}

#[test]
fn bodies_are_compressed_limited_or_ignored_as_clients_expect() {
    let server = Server::start(&["--body-limit", "1"]);
    let gzip = server.send(
        "GET",
        "/sdapi/v1/options",
        &[("accept-encoding", "gzip")],
        b"",
    );
    assert_eq!(gzip.header("content-encoding"), Some("gzip"));
    assert_eq!(&gzip.body[..2], [0x1f, 0x8b]);
    let short = server.send("GET", "/internal/ping", &[("accept-encoding", "gzip")], b"");
    assert_eq!(
        (short.header("content-encoding"), short.text().as_str()),
        (None, "{}")
    );

    let large = server.post(
        "/sdapi/v1/png-info",
        &json!({ "image": "A".repeat(2 << 20) }),
    );
    assert_eq!(large.status, 413);
    assert_eq!(
        large.json()["detail"],
        "request body is larger than 1 MiB (setting `server.body_limit_mib`)"
    );
    assert_eq!(
        server
            .send(
                "GET",
                "/sdapi/v1/samplers",
                &[("authorization", "Basic !!")],
                b""
            )
            .status,
        200
    );
    assert_eq!(
        server
            .send("POST", "/sdapi/v1/unload-checkpoint", &[], b"\"\"")
            .json(),
        json!({})
    );
    assert_eq!(
        server
            .send("POST", "/sdapi/v1/reload-checkpoint", &[], b"")
            .json(),
        json!({})
    );
    assert_eq!(
        server.send("POST", "/sdapi/v1/interrupt", &[], b"").json(),
        json!({})
    );
    assert_eq!(
        server.send("POST", "/sdapi/v1/skip", &[], b"").json(),
        Value::Null
    );
    for path in ["refresh-checkpoints", "refresh-vae"] {
        assert_eq!(
            server
                .send("POST", &format!("/sdapi/v1/{path}"), &[], b"")
                .json(),
            Value::Null
        );
    }
    assert_eq!(
        server
            .send("POST", "/sdapi/v1/server-stop", &[], b"")
            .status,
        404
    );
    server.assert_works();
}

#[test]
fn credentials_guard_everything_but_health() {
    let server = Server::start(&["--api-auth", "user:pass,second:pa:ss"]);
    let refused = server.get("/sdapi/v1/options");
    assert_eq!(
        (refused.status, refused.header("www-authenticate")),
        (401, Some("Basic realm=\"sdgen\""))
    );
    assert_eq!(
        refused.text(),
        r#"{"error":"HTTPException","detail":"Not authenticated","body":"","errors":""}"#
    );
    for path in ["/", "/internal/pending-tasks", "/nope"] {
        assert_eq!(server.get(path).status, 401, "{path}");
    }
    for path in ["/healthz", "/readyz", "/internal/ping"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    let server = server.with_credentials("user:wrong");
    assert_eq!(
        server.get("/sdapi/v1/options").json()["detail"],
        "Incorrect username or password"
    );
    let server = server.with_credentials("second:pa:ss");
    let flags = server.get("/sdapi/v1/cmd-flags").json();
    assert_eq!(flags["api_auth"], "<hidden>");
    assert!(!server.log().contains("pa:ss"), "{}", server.log());
    server.assert_works();
}

#[test]
fn options_round_trip_change_and_persist() {
    let server = Server::start(&[]);
    let options = server.get("/sdapi/v1/options").json();
    assert_eq!(options["sd_model_checkpoint"], demo());
    assert!(options.get("forge_preset").is_none());
    assert_eq!(server.post("/sdapi/v1/options", &options).text(), "null");
    assert_eq!(server.get("/sdapi/v1/options").json(), options);

    let changes = json!({ "samples_format": "jpg", "jpeg_quality": 55.0, "tiling": null, "unknown_key": 1, "api_useragent": "x" });
    assert_eq!(server.post("/sdapi/v1/options", &changes).status, 200);
    let changed = server.get("/sdapi/v1/options").json();
    assert_eq!(
        (&changed["samples_format"], &changed["jpeg_quality"]),
        (&json!("jpg"), &json!(55))
    );
    assert_eq!(
        (&changed["api_useragent"], changed.get("unknown_key")),
        (&json!(""), None)
    );

    let wrong = server.post(
        "/sdapi/v1/options",
        &json!({ "jpeg_quality": "high", "eta_ddim": [] }),
    );
    assert_eq!(wrong.problems().len(), 2);
    let unknown = server.post(
        "/sdapi/v1/options",
        &json!({ "sd_model_checkpoint": "nope", "jpeg_quality": 1 }),
    );
    assert_eq!(unknown.status, 404);
    assert!(unknown.text().contains("model 'nope' not found"));
    assert_eq!(
        server.get("/sdapi/v1/options").json(),
        changed,
        "nothing of a refused body is applied"
    );

    let dir = server.dir.clone();
    drop(server);
    let again = Server::spawn(dir, &[], &[]);
    assert_eq!(
        again.get("/sdapi/v1/options").json()["samples_format"],
        "jpg"
    );
}

#[test]
fn frozen_settings_are_refused_and_stop_routes_stop() {
    let mut server = Server::start(&["--freeze-settings", "--api-server-stop", "--nowebui"]);
    let frozen = server.post("/sdapi/v1/options", &json!({ "tiling": true }));
    assert_eq!(
        (frozen.status, frozen.json()["error"].as_str()),
        (500, Some("AssertionError"))
    );
    assert_eq!(server.get("/").status, 404);
    assert_eq!(
        server
            .send("POST", "/sdapi/v1/server-restart", &[], b"")
            .status,
        501
    );
    assert_eq!(
        server
            .send("POST", "/sdapi/v1/server-stop", &[], b"")
            .text(),
        "Stopping."
    );
    assert!(server.wait_exit().success());
}

#[test]
fn a_damaged_checkpoint_is_listed_refused_and_leaves_the_loaded_one() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let models = dir.path().join("models/Stable-diffusion/xl");
    std::fs::create_dir_all(&models).unwrap();
    std::fs::write(models.join("bad.safetensors"), b"\x10\0\0\0\0\0\0\0{}").unwrap();
    std::fs::write(models.join("old.ckpt"), b"\x80\x02}q\0.").unwrap();
    let server = Server::spawn(dir, &["--checkpoint", "sdgen-demo"], &[]);
    server.wait_ready();
    let titles: Vec<String> = server
        .get("/sdapi/v1/sd-models")
        .json()
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["title"].as_str().unwrap().to_string())
        .collect();
    assert_eq!(
        titles,
        ["xl/bad.safetensors".into(), "xl/old.ckpt".into(), demo()]
    );

    for name in ["xl/bad.safetensors", "bad", "xl_bad"] {
        let refused = server.post("/sdapi/v1/options", &json!({ "sd_model_checkpoint": name }));
        assert_eq!(refused.status, 500, "{name}: {}", refused.text());
        assert_eq!(refused.json()["error"], "RuntimeError");
        assert_eq!(
            server.get("/sdapi/v1/options").json()["sd_model_checkpoint"],
            demo()
        );
    }
    let job = with(
        small(),
        json!({ "override_settings": { "sd_model_checkpoint": "bad" } }),
    );
    assert_eq!(server.post("/sdapi/v1/txt2img", &job).status, 500);
    let pickle = server.post(
        "/sdapi/v1/options",
        &json!({ "sd_model_checkpoint": "old" }),
    );
    assert_eq!(pickle.status, 500);
    let detail = pickle.json()["detail"].as_str().unwrap().to_string();
    assert!(
        detail.contains("old.ckpt") && detail.contains("before version 1.6"),
        "{detail}"
    );
    let traversal = server.post(
        "/sdapi/v1/options",
        &json!({ "sd_model_checkpoint": "../../../../etc/passwd" }),
    );
    let said = "model '../../../../etc/passwd' not found";
    assert!(traversal.text().contains(said));
    assert_eq!(server.get("/readyz").status, 200);
    server.assert_works();
}

#[test]
fn a_server_without_a_loadable_checkpoint_says_why_it_is_not_ready() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let models = dir.path().join("models/Stable-diffusion");
    std::fs::create_dir_all(&models).unwrap();
    std::fs::write(models.join("bad.safetensors"), b"no").unwrap();
    let server = Server::spawn(dir, &[], &[]);
    let reason = server::until("the load to fail", || {
        let answer = server.get("/readyz");
        assert_eq!(answer.status, 503);
        Some(answer.json()["reason"].as_str().unwrap().to_string())
            .filter(|reason| reason.starts_with("checkpoint not loaded"))
    });
    assert!(reason.contains("bad.safetensors"), "{reason}");
    assert_eq!(server.get("/healthz").status, 200);
    assert_eq!(
        server
            .post(
                "/sdapi/v1/options",
                &json!({ "sd_model_checkpoint": "sdgen-demo" })
            )
            .status,
        200
    );
    assert_eq!(server.get("/readyz").status, 200);
    server.assert_works();
}

#[test]
fn flags_come_from_line_and_environment_and_unknown_ones_warn_once() {
    let env = [
        (
            "COMMANDLINE_ARGS",
            "--xformers --frobnicate --frobnicate --subpath /sd",
        ),
        ("A1111_ARGS", "--lora-dir '/a b'"),
    ];
    let server = Server::spawn(
        Arc::new(tempfile::tempdir().unwrap()),
        &["--no-hashing"],
        &env,
    );
    let flags = server.get("/sd/sdapi/v1/cmd-flags").json();
    assert_eq!(
        (&flags["xformers"], &flags["lora_dir"]),
        (&json!(true), &json!("/a b"))
    );
    assert_eq!(
        (
            &flags["medvram"],
            &flags["no_hashing"],
            &flags["tls_keyfile"]
        ),
        (&json!(false), &json!(true), &Value::Null)
    );
    assert_eq!(flags["data_dir"], json!(server.data()));
    assert_eq!(
        server
            .log()
            .matches("unknown flag ignored: `--frobnicate`")
            .count(),
        1,
        "{}",
        server.log()
    );
    assert_eq!(server.get("/sdapi/v1/cmd-flags").json(), flags);
    let redirect = server.get("/sd/sdapi/v1/options/");
    assert_eq!(
        (redirect.status, redirect.header("location")),
        (307, Some("/sd/sdapi/v1/options"))
    );
}

#[test]
fn png_info_reads_what_was_written() {
    let server = Server::start(&[]);
    let made = server.post(
        "/sdapi/v1/txt2img",
        &with(small(), json!({ "prompt": "a (red:1.2) apple" })),
    );
    let image = made.json()["images"][0].as_str().unwrap().to_string();
    for form in [image.clone(), format!("data:image/png;base64,{image}")] {
        let read = server
            .post("/sdapi/v1/png-info", &json!({ "image": form }))
            .json();
        assert_eq!(keys(&read), set(&["info", "items", "parameters"]));
        assert_eq!(read["info"], made.info()["infotexts"][0]);
        assert_eq!(
            (&read["parameters"]["Steps"], &read["parameters"]["Size-1"]),
            (&json!("2"), &json!("64"))
        );
        assert_eq!(
            (
                &read["parameters"]["Clip skip"],
                &read["parameters"]["Emphasis"]
            ),
            (&json!("1"), &json!("Original"))
        );
    }
    for bad in ["", "%%%", "aGVsbG8="] {
        let refused = server.post("/sdapi/v1/png-info", &json!({ "image": bad }));
        assert_eq!(refused.status, 400, "{bad}");
        assert!(
            refused.json()["detail"]
                .as_str()
                .unwrap()
                .starts_with("Invalid encoded image: "),
            "{}",
            refused.text()
        );
    }
    assert_eq!(
        server.post("/sdapi/v1/png-info", &json!({})).problems()[0].0,
        "image"
    );
}
