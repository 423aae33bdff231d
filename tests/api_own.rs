//! Our own side of the API: tokens and failure limits, metrics, and `OpenAI`'s images routes over plain HTTP.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/server.rs"]
mod server;

use std::collections::BTreeMap;

use serde_json::json;
use server::{Server, small};

const TOKEN: (&str, &str) = ("authorization", "Bearer t0ken-of-ann");

fn guarded() -> Server {
    let directory = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let env = [("SDGEN_API_TOKENS", "t0ken-of-ann,t0ken-of-bob")];
    let server = Server::spawn(directory, &["--api-auth", "ann:secret"], &env);
    server.wait_ready();
    server
}

#[test]
fn tokens_and_pairs_open_everything_and_failures_are_limited() {
    let server = guarded();
    let bare = server.get("/metrics");
    assert_eq!(bare.status, 401);
    let ways: Vec<&str> = bare
        .headers
        .iter()
        .filter(|(name, _)| name == "www-authenticate")
        .map(|(_, value)| value.as_str())
        .collect();
    assert_eq!(ways, ["Basic realm=\"sdgen\"", "Bearer realm=\"sdgen\""]);
    assert_eq!(
        server.get("/v1/models").json()["error"]["code"],
        "invalid_api_key"
    );
    let with = |header: &str| server.send("GET", "/v1/models", &[("authorization", header)], b"");
    assert_eq!(with(TOKEN.1).status, 200);
    let statuses: Vec<u16> = (0..15).map(|_| with("Bearer wrong").status).collect();
    assert_eq!(statuses[..10], [401; 10]);
    let refused = with("Bearer wrong");
    assert_eq!(refused.status, 429);
    assert!(
        refused
            .header("retry-after")
            .unwrap()
            .parse::<u64>()
            .unwrap()
            > 0
    );
    // Right credentials come in from the same address, also those it has not shown before.
    assert_eq!(with(TOKEN.1).status, 200);
    assert_eq!(with("Basic YW5uOnNlY3JldA==").status, 200);
    assert!(!server.log().contains("t0ken"), "{}", server.log());
}

/// `name{labels}` and value of every line, checked for the form of the text format.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let mut types = BTreeMap::new();
    let mut series = BTreeMap::new();
    for line in text.lines() {
        if let Some(row) = line.strip_prefix("# TYPE ") {
            let (name, kind) = row.split_once(' ').unwrap();
            assert_eq!(types.insert(name.to_string(), kind), None, "{name} twice");
        } else if !line.starts_with("# HELP ") {
            let (name, value) = line.rsplit_once(' ').unwrap();
            let bare = name.split('{').next().unwrap();
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| bare.strip_suffix(end));
            let known =
                types.contains_key(bare) || family.is_some_and(|name| types.contains_key(name));
            assert!(known, "{bare} has no type");
            let value: f64 = value.parse().unwrap();
            assert_eq!(series.insert(name.to_string(), value), None, "{name} twice");
        }
    }
    assert!(text.ends_with('\n'));
    series
}

#[test]
fn metrics_count_jobs_steps_loads_and_requests() {
    let server = Server::start(&[]);
    server.assert_works();
    assert_eq!(server.get("/nope/anything").status, 404);
    let answer = server.get("/metrics");
    assert_eq!(
        answer.header("content-type"),
        Some("text/plain; version=0.0.4; charset=utf-8")
    );
    let series = parse(&answer.text());
    let value = |name: &str| {
        *series
            .get(name)
            .unwrap_or_else(|| panic!("{name}: {series:?}"))
    };
    assert!((value("sdgen_jobs_total{result=\"done\"}") - 1.0).abs() < f64::EPSILON);
    assert!(value("sdgen_step_seconds_count") >= 1.0);
    assert!(value("sdgen_model_load_seconds_count") >= 1.0);
    assert!(value("sdgen_memory_bytes") > 1e6 && value("sdgen_device_memory_bytes") > 1e6);
    assert!((value("sdgen_device_jobs_total{device=\"cpu\"}") - 1.0).abs() < f64::EPSILON);
    assert!(value("sdgen_device_in_service{device=\"cpu\"}") > 0.5);
    assert!(value("sdgen_device_running{device=\"cpu\"}") < 0.5);
    assert!(value("sdgen_queue_length") < 1.0);
    let request = "method=\"POST\",route=\"/sdapi/v1/txt2img\"";
    let name = format!("sdgen_http_requests_total{{{request},status=\"200\"}}");
    assert!((value(&name) - 1.0).abs() < f64::EPSILON);
    let all = value(&format!(
        "sdgen_http_request_seconds_bucket{{{request},le=\"+Inf\"}}"
    ));
    let count = value(&format!("sdgen_http_request_seconds_count{{{request}}}"));
    assert!((all - count).abs() < f64::EPSILON);
    assert!(
        !answer.text().contains("anything"),
        "a path that is no route is no label"
    );
}

#[test]
fn openai_images_are_made_linked_and_refused_in_their_form() {
    let server = Server::start(&[]);
    let wanted = json!({ "prompt": "a red apple", "size": "64x64", "quality": "low" });
    let made = server.post("/v1/images/generations", &wanted);
    assert_eq!(made.status, 200, "{}", made.text());
    let url = made.json()["data"][0]["url"].as_str().unwrap().to_string();
    let path = url.split_once("localhost").unwrap().1;
    assert!(path.starts_with("/v1/images/files/"), "{url}");
    let picture = server.get(path);
    assert_eq!(
        (picture.status, picture.header("content-type")),
        (200, Some("image/png"))
    );
    for wrong in [
        "..%2f..%2fconfig.json",
        "0123456789abcdef0123456789abcdef.png",
    ] {
        let answer = server.get(&format!("/v1/images/files/{wrong}"));
        assert_eq!(answer.status, 404);
        assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
    }
    for (body, status, param) in [
        (json!({}), 400, "prompt"),
        (json!({ "prompt": "a", "n": 0 }), 400, "n"),
        (json!({ "prompt": "a", "size": "100000x8" }), 400, "size"),
        (json!({ "prompt": "a", "stream": true }), 400, "stream"),
        (json!({ "prompt": "a", "model": "nobody" }), 404, "model"),
    ] {
        let answer = server.post("/v1/images/generations", &body);
        let error = &answer.json()["error"];
        assert_eq!(
            (answer.status, error["param"].as_str()),
            (status, Some(param)),
            "{body}"
        );
        assert!(error["message"].as_str().unwrap().len() > 5);
    }
    let answer = server.post("/v1/images/edits", &json!({ "prompt": "a" }));
    assert_eq!(
        (answer.status, answer.json()["error"]["code"].as_str()),
        (400, Some("invalid_multipart"))
    );
}

#[test]
fn a_full_queue_is_429_with_retry_after() {
    let server = std::sync::Arc::new(Server::start(&["--queue-limit", "1"]));
    let busy = server.post_later("/sdapi/v1/txt2img", server::endless());
    server.wait_for_step();
    let answer = server.post(
        "/v1/images/generations",
        &json!({ "prompt": "a", "size": "64x64" }),
    );
    assert_eq!(answer.status, 429, "{}", answer.text());
    assert_eq!(answer.json()["error"]["code"], "rate_limit_exceeded");
    assert!(
        answer
            .header("retry-after")
            .unwrap()
            .parse::<u64>()
            .unwrap()
            > 0
    );
    server.post("/sdapi/v1/interrupt", &json!({}));
    assert_eq!(busy.join().unwrap().status, 200);
    assert_eq!(server.post("/sdapi/v1/txt2img", &small()).status, 200);
}
