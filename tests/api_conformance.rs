//! Every route of A1111's endpoint index: a good request whose answer is checked field by field, and bad ones; what all routes
//! have in common; and wrong types in every field.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(
    clippy::print_stdout,
    reason = "the table is what the suite is read for"
)]

#[path = "support/conformance_table.rs"]
mod conformance_table;
#[path = "support/server.rs"]
mod server;

use std::collections::BTreeSet;
use std::io::Cursor;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use conformance_table::{Request, Row, UNKNOWN, refusals, rows};
use image::{ImageFormat, RgbImage};
use serde_json::{Value, json};
use server::{Answer, Server, Shared, small, with};

static SERVER: Shared = Shared::new(&["--cors-allow-origins", "http://ui.test"]);

fn png() -> String {
    let picture = RgbImage::from_fn(64, 64, |x, y| image::Rgb([x as u8 * 4, y as u8 * 4, 80]));
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png).unwrap();
    STANDARD.encode(bytes.into_inner())
}

fn ask((method, path, body): &Request) -> Answer {
    let body = body.as_deref().unwrap_or_default();
    SERVER.hold().send(
        method,
        path,
        &[("content-type", "application/json")],
        body.as_bytes(),
    )
}

fn header<'a>(answer: &'a Answer, name: &str) -> Option<&'a str> {
    let mut all = answer.headers.iter();
    all.find(|(key, _)| key.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim())
}

/// What a value has that its shape has not; empty if it fits.
fn misfit(value: &Value, shape: &Value, at: &str) -> Vec<String> {
    match shape {
        Value::String(kind) => {
            let (kind, nullable) = kind
                .strip_suffix('?')
                .map_or((kind.as_str(), false), |kind| (kind, true));
            let fits = match kind {
                "any" => true,
                "null" => value.is_null(),
                "str" => value.is_string(),
                "int" => value.is_i64() || value.is_u64(),
                "num" => value.is_number(),
                "bool" => value.is_boolean(),
                "obj" => value.is_object(),
                "list" => value.is_array(),
                other => panic!("no such kind: {other}"),
            };
            if fits || (nullable && value.is_null()) {
                Vec::new()
            } else {
                vec![format!("{at}: {value} is no {kind}")]
            }
        }
        Value::Array(item) => match value.as_array() {
            Some(values) => values
                .iter()
                .enumerate()
                .flat_map(|(i, value)| misfit(value, &item[0], &format!("{at}[{i}]")))
                .collect(),
            None => vec![format!("{at}: {value} is no list")],
        },
        Value::Object(fields) => {
            let Some(found) = value.as_object() else {
                return vec![format!("{at}: {value} is no object")];
            };
            let open = fields.contains_key("*");
            let named: Vec<&String> = fields.keys().filter(|key| *key != "*").collect();
            let keys: Vec<&String> = found.keys().collect();
            let same = if open {
                keys.starts_with(&named)
            } else {
                keys == named
            };
            let mut wrong: Vec<String> = (!same)
                .then(|| format!("{at}: keys {keys:?}, not {named:?}"))
                .into_iter()
                .collect();
            for (key, shape) in fields.iter().filter(|(key, _)| *key != "*") {
                wrong.extend(found.get(key).map_or_else(Vec::new, |value| {
                    misfit(value, shape, &format!("{at}.{key}"))
                }));
            }
            wrong
        }
        other => panic!("no shape: {other}"),
    }
}

/// A refusal has one of the three forms, and names the methods if the method was wrong.
fn check_refusal(answer: &Answer) -> Vec<String> {
    let body = answer.json();
    let mut wrong = Vec::new();
    if !refusals()
        .iter()
        .any(|shape| misfit(&body, shape, "").is_empty())
    {
        wrong.push(format!("a refusal of no known form: {body}"));
    }
    if answer.status == 405 && header(answer, "allow").is_none() {
        wrong.push("405 without Allow".into());
    }
    wrong
}

fn check(row: &Row) -> (Vec<String>, Vec<String>) {
    let answer = ask(&row.good);
    let mut wrong = Vec::new();
    if answer.status != row.status {
        wrong.push(format!(
            "status {}, not {}: {}",
            answer.status,
            row.status,
            answer.text()
        ));
    }
    wrong.extend(misfit(&answer.json(), &row.shape, ""));
    wrong.extend(
        header(&answer, "x-process-time")
            .is_none()
            .then(|| "no X-Process-Time".into()),
    );
    let mut cells = vec![answer.status.to_string()];
    for (request, status) in &row.bad {
        let answer = ask(request);
        cells.push(answer.status.to_string());
        if answer.status != *status {
            wrong.push(format!(
                "{request:?}: status {}, not {status}: {}",
                answer.status,
                answer.text()
            ));
        }
        wrong.extend(check_refusal(&answer));
        wrong.extend(
            header(&answer, "x-process-time")
                .is_none()
                .then(|| "no X-Process-Time".into()),
        );
    }
    (cells, wrong)
}

#[test]
fn every_route_answers_as_the_contract_says() {
    let server = SERVER.hold();
    let mut failures = Vec::new();
    println!("| route | good | bad1 | bad2 | more |\n|---|---|---|---|---|");
    for row in rows(&png()) {
        let (mut cells, wrong) = check(&row);
        assert!(cells.len() >= 3, "{}: two bad requests", row.path);
        let more = cells.split_off(3).join(" ");
        println!(
            "| {} {} | {} | {more} |",
            row.good.0,
            row.path,
            cells.join(" | ")
        );
        failures.extend(
            wrong
                .into_iter()
                .map(|what| format!("{}: {what}", row.path)),
        );
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    server.assert_works();
}

#[test]
fn every_route_is_in_the_table() {
    let _held = SERVER.hold();
    let source = include_str!("../src/api/mod.rs");
    let paths = source
        .split("(\"/")
        .skip(1)
        .filter_map(|rest| rest.split('"').next());
    let ours = [
        "v1/",
        "healthz",
        "readyz",
        "docs",
        "redoc",
        "openapi.json",
        "metrics",
        "ui",
        "assets",
        "sdapi/v1/server-",
        "file=",
        "{",
    ];
    let known: BTreeSet<String> = rows("").iter().map(|row| row.path.to_string()).collect();
    let theirs =
        paths.filter(|path| !path.is_empty() && !ours.iter().any(|own| path.starts_with(own)));
    let missing: Vec<String> = theirs
        .map(|path| format!("/{path}"))
        .filter(|path| !known.contains(path))
        .collect();
    assert!(missing.is_empty(), "routes without a row: {missing:?}");
}

#[test]
fn what_is_not_there_is_404() {
    let server = SERVER.hold();
    for path in UNKNOWN {
        let answer = server.get(path);
        assert_eq!(answer.status, 404, "{path}: {}", answer.text());
        assert!(answer.json()["detail"].is_string(), "{path}");
    }
}

#[test]
fn all_routes_share_their_manners() {
    let server = SERVER.hold();
    for row in rows(&png()) {
        let (method, path, _) = &row.good;
        let slash = format!("{}/?a=1", row.path);
        let redirect = server.send(method, &slash, &[], b"");
        assert_eq!(redirect.status, 307, "{slash}");
        assert_eq!(
            header(&redirect, "location"),
            Some(format!("{}?a=1", row.path).as_str())
        );
        let head = server.send("HEAD", row.path, &[], b"");
        let is_probe = row.path == "/internal/ping";
        assert!(
            head.status == if is_probe { 200 } else { 405 } || head.status == row.status,
            "HEAD {path}: {}",
            head.status
        );
        let preflight = server.send(
            "OPTIONS",
            row.path,
            &[
                ("origin", "http://ui.test"),
                ("access-control-request-method", method),
                ("access-control-request-headers", "x-a"),
            ],
            b"",
        );
        assert_eq!(
            header(&preflight, "access-control-allow-origin"),
            Some("http://ui.test"),
            "{path}"
        );
        assert_eq!(
            header(&preflight, "access-control-allow-headers"),
            Some("x-a"),
            "{path}"
        );
    }
    let stranger = server.send(
        "GET",
        "/sdapi/v1/samplers",
        &[("origin", "http://evil.test")],
        b"",
    );
    assert_eq!(header(&stranger, "access-control-allow-origin"), None);
    let packed = server.send(
        "GET",
        "/sdapi/v1/options",
        &[("accept-encoding", "gzip")],
        b"",
    );
    assert_eq!(header(&packed, "content-encoding"), Some("gzip"));
    let short = server.send("GET", "/internal/ping", &[("accept-encoding", "gzip")], b"");
    assert_eq!(header(&short, "content-encoding"), None);
}

#[test]
fn the_server_is_ended_only_under_its_flag() {
    let _held = SERVER.hold();
    let mut server = Server::start(&["--api-server-stop"]);
    assert_eq!(
        server.post("/sdapi/v1/server-restart", &json!({})).status,
        501
    );
    assert_eq!(server.get("/sdapi/v1/server-stop").status, 405);
    let stop = server.post("/sdapi/v1/server-stop", &json!({}));
    assert_eq!((stop.status, stop.text().as_str()), (200, "Stopping."));
    assert!(server.wait_exit().success());
}

#[test]
fn credentials_are_shown_nowhere() {
    let _held = SERVER.hold();
    let env = [
        ("A1111_ARGS", "--api-auth=ann:hush1"),
        ("COMMANDLINE_ARGS", "--gradio-auth ben:hush2 --frobnicate"),
    ];
    let dir = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let server =
        Server::spawn(dir, &["--api-auth", "cat:hush3"], &env).with_credentials("cat:hush3");
    server.wait_ready();
    for path in [
        "/sdapi/v1/cmd-flags",
        "/internal/sysinfo",
        "/internal/sysinfo-download",
        "/sdapi/v1/options",
    ] {
        let answer = server.get(path);
        assert_eq!(answer.status, 200, "{path}");
        assert!(!answer.text().contains("hush"), "{path}: {}", answer.text());
    }
    assert!(!server.log().contains("hush"));
    let warned = server
        .log()
        .matches("unknown flag ignored: `--frobnicate`")
        .count();
    assert_eq!(warned, 1, "{}", server.log());
}

/// What a field may be sent as by mistake.
fn odd_values() -> Vec<Value> {
    let deep = (0..100).fold(json!(1), |inner, _| json!([inner]));
    vec![
        json!(null),
        json!(true),
        json!(false),
        json!(-1),
        json!(0),
        json!(3),
        json!(1.5),
        json!(1e308),
        json!(-1e308),
        json!(i64::MAX),
        json!(u64::MAX),
        json!(""),
        json!("x"),
        json!("20"),
        json!("nan"),
        json!("../../../etc/passwd"),
        json!("a\u{0}b"),
        json!([]),
        json!([1]),
        json!([null]),
        json!(["x"]),
        json!({}),
        json!({ "a": [null] }),
        json!({ "args": "x" }),
        deep,
        json!("<lora:../x:1>"),
    ]
}

/// A small generator: the same cases at every run (Numerical Recipes' constants).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % sides
    }
}

#[test]
fn wrong_types_in_every_field_are_answered_in_form() {
    let _held = SERVER.hold();
    let server = Server::start(&[]);
    let options = server.get("/sdapi/v1/options").json();
    let values = odd_values();
    let mut dice = Dice(7);
    let mut counts = std::collections::BTreeMap::new();
    for row in rows(&png()).into_iter().filter(|row| {
        row.good
            .2
            .as_deref()
            .is_some_and(|body| body.starts_with('{'))
    }) {
        let good: Value = serde_json::from_str(row.good.2.as_deref().unwrap()).unwrap();
        let mut fields: Vec<String> = row.shape["parameters"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(key, _)| key.clone())
            .collect();
        fields.extend(good.as_object().unwrap().keys().cloned());
        if row.path.contains("/extra-") {
            fields.extend(
                [
                    "resize_mode",
                    "upscaling_resize",
                    "upscaling_resize_w",
                    "upscaling_crop",
                    "upscaler_2",
                    "codeformer_weight",
                ]
                .map(String::from),
            );
        }
        if row.path.ends_with("options") {
            fields.extend(
                server
                    .get("/sdapi/v1/options")
                    .json()
                    .as_object()
                    .unwrap()
                    .keys()
                    .filter(|key| !key.starts_with("sd_model"))
                    .cloned(),
            );
        }
        for field in &fields {
            // Two odd values a field, and a second odd field beside one of them.
            for pair in [false, true] {
                let mut body = good.clone();
                body[field] = values[dice.roll(values.len())].clone();
                if pair {
                    let other = &fields[dice.roll(fields.len())];
                    body[other] = values[dice.roll(values.len())].clone();
                }
                let answer = server.post(row.path, &body);
                let fine = matches!(answer.status, 200 | 400..=499 | 501);
                assert!(
                    fine,
                    "{} {body}: {} {}",
                    row.path,
                    answer.status,
                    answer.text()
                );
                let form = if answer.status == 200 {
                    misfit(&answer.json(), &row.shape, "")
                } else {
                    check_refusal(&answer)
                };
                assert!(form.is_empty(), "{} {body}: {form:?}", row.path);
                *counts.entry(answer.status).or_insert(0) += 1;
            }
        }
    }
    println!("answers by status: {counts:?}");
    // Whatever was stored, the options can be put back.
    assert_eq!(server.post("/sdapi/v1/options", &options).status, 200);
    server.assert_works();
}

#[test]
fn json_broken_at_any_place_is_422() {
    let server = SERVER.hold();
    let whole = with(
        small(),
        json!({ "alwayson_scripts": { "seed": { "args": [[1, { "a": "b" }]] } } }),
    )
    .to_string();
    for end in 1..whole.len() {
        let broken = &whole[..end];
        let answer = server.send("POST", "/sdapi/v1/txt2img", &[], broken.as_bytes());
        assert_eq!(answer.status, 422, "{broken}");
        assert!(check_refusal(&answer).is_empty(), "{broken}");
    }
    let nested = "[".repeat(200_000);
    let deep = format!("{{\"comments\": {nested}");
    assert_eq!(
        server
            .send("POST", "/sdapi/v1/txt2img", &[], deep.as_bytes())
            .status,
        422
    );
    server.assert_works();
}
