//! Clients that mean harm: pictures by address, bombs, paths, slow and many connections. Answers are clear, memory is bounded, and
//! the next job works.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/server.rs"]
mod server;

use std::io::{Cursor, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::{ImageFormat, RgbImage};
use serde_json::{Value, json};
use server::{Answer, DEADLINE, Server, Shared, small, with};

static SERVER: Shared = Shared::new(&[]);

fn file() -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    let picture = RgbImage::from_pixel(64, 64, image::Rgb([9, 99, 199]));
    picture.write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}

/// A web server that answers every path with `answer(path)`.
fn web(answer: impl Fn(&str) -> Vec<u8> + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let (mut head, mut byte) = (Vec::new(), [0]);
            while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
                head.push(byte[0]);
            }
            let head = String::from_utf8_lossy(&head).into_owned();
            let _ = stream.write_all(&answer(&head));
        }
    });
    address
}

fn http(status: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

fn with_options(options: &Value) -> Server {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    std::fs::write(dir.path().join("config.json"), options.to_string()).unwrap();
    let server = Server::spawn(dir, &[], &[]);
    server.wait_ready();
    server
}

fn said(answer: &Answer) -> (u16, String) {
    let body = answer.json();
    (
        answer.status,
        body["detail"].as_str().unwrap_or_default().to_string(),
    )
}

#[test]
fn pictures_come_from_addresses_if_the_options_allow_it() {
    let _held = SERVER.hold();
    let server =
        with_options(&json!({ "api_forbid_local_requests": false, "api_useragent": "sdgen-test" }));
    let address = web(|head| {
        match head.split(' ').nth(1).unwrap_or_default() {
        "/a.png" if head.to_lowercase().contains("user-agent: sdgen-test") => http("200 OK", &file()),
        "/text" => http("200 OK", b"<html>"),
        "/moved" => b"HTTP/1.1 302 Found\r\nlocation: /a.png\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".to_vec(),
        _ => http("404 Not Found", b""),
    }
    });
    let at = |path: &str| format!("{address}{path}");
    let body = with(
        small(),
        json!({ "init_images": [at("/a.png")], "mask": at("/moved") }),
    );
    let made = server.post("/sdapi/v1/img2img", &body);
    assert_eq!(made.status, 200, "{}", made.text());
    let larger = server.post(
        "/sdapi/v1/extra-single-image",
        &json!({ "image": at("/a.png"), "upscaler_1": "Nearest" }),
    );
    assert_eq!(larger.status, 200, "{}", larger.text());
    assert_eq!(
        server
            .post("/sdapi/v1/png-info", &json!({ "image": at("/a.png") }))
            .status,
        200
    );
    for (path, message) in [
        ("/none", "Invalid image url: the server answered 404"),
        (
            "/text",
            "Invalid image url: unknown picture format; use PNG, JPEG or WebP",
        ),
    ] {
        let body = with(small(), json!({ "init_images": [at(path)] }));
        assert_eq!(
            said(&server.post("/sdapi/v1/img2img", &body)),
            (400, message.to_string())
        );
    }
    server.assert_works();
}

#[test]
fn addresses_of_this_machine_and_net_are_refused_by_default() {
    let server = SERVER.hold();
    let visited = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = visited.clone();
    let address = web(move |_| {
        count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        http("200 OK", &file())
    });
    let port = address.rsplit(':').next().unwrap().to_string();
    for host in [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "10.0.0.1",
        "169.254.169.254",
        "192.168.0.1",
        "0.0.0.0",
    ] {
        let url = format!("http://{host}:{port}/a.png");
        for (path, body) in [
            (
                "/sdapi/v1/img2img",
                with(small(), json!({ "init_images": [url] })),
            ),
            (
                "/sdapi/v1/img2img",
                with(
                    small(),
                    json!({ "init_images": [STANDARD.encode(file())], "mask": url }),
                ),
            ),
            ("/sdapi/v1/png-info", json!({ "image": url })),
            ("/sdapi/v1/extra-single-image", json!({ "image": url })),
            (
                "/sdapi/v1/extra-batch-images",
                json!({ "imageList": [{ "data": url, "name": "a" }] }),
            ),
        ] {
            let (status, words) = said(&server.post(path, &body));
            let refused = words == "Request to local resource not allowed"
                || words == "Invalid image url: no answer from the server";
            assert!(status == 400 && refused, "{host} {path}: {status} {words}");
        }
    }
    assert_eq!(visited.load(std::sync::atomic::Ordering::Relaxed), 0);
    // The options that allow it cannot be set over the API.
    server.post(
        "/sdapi/v1/options",
        &json!({ "api_forbid_local_requests": false }),
    );
    let body = with(
        small(),
        json!({ "init_images": [format!("{address}/a.png")], "override_settings": { "api_forbid_local_requests": false } }),
    );
    assert_eq!(server.post("/sdapi/v1/img2img", &body).status, 400);
    let server = with_options(&json!({ "api_enable_requests": false }));
    let body = with(
        small(),
        json!({ "init_images": ["https://example.org/a.png"] }),
    );
    assert_eq!(
        said(&server.post("/sdapi/v1/img2img", &body)),
        (400, "Requests not allowed".to_string())
    );
}

#[test]
fn a_picture_that_declares_a_hundred_thousand_pixels_a_side_costs_nothing() {
    let server = SERVER.hold();
    let mut huge = file();
    for at in [16, 20] {
        huge[at..at + 4].copy_from_slice(&100_000_u32.to_be_bytes());
    }
    let crc = !huge[12..29].iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 {
                crc >> 1 ^ 0xedb8_8320
            } else {
                crc >> 1
            }
        })
    });
    huge[29..33].copy_from_slice(&crc.to_be_bytes());
    let bomb = STANDARD.encode(huge);
    for (path, body) in [
        (
            "/sdapi/v1/img2img",
            with(small(), json!({ "init_images": [bomb] })),
        ),
        (
            "/sdapi/v1/img2img",
            with(
                small(),
                json!({ "init_images": [STANDARD.encode(file())], "mask": bomb }),
            ),
        ),
        (
            "/sdapi/v1/extra-single-image",
            json!({ "image": bomb, "upscaler_1": "Lanczos" }),
        ),
    ] {
        let answer = server.post(path, &body);
        assert_eq!(answer.status, 400, "{path}: {}", answer.text());
        assert!(answer.text().contains("100000x100000"), "{}", answer.text());
    }
    server.assert_works();
}

#[test]
fn paths_do_not_leave_their_folders() {
    let server = SERVER.hold();
    let secret = server.data().join("secret.safetensors");
    std::fs::write(&secret, b"hush").unwrap();
    std::fs::write(server.data().join("secret.png"), file()).unwrap();
    let models = server.data().join("models/Lora");
    std::fs::create_dir_all(&models).unwrap();
    std::fs::write(models.join("seen.png"), file()).unwrap();
    let thumb = |path: &str| {
        server
            .get(&format!("/sd_extra_networks/thumb?filename={path}"))
            .status
    };
    assert_eq!(thumb(&models.join("seen.png").display().to_string()), 200);
    for path in [
        format!("{}/secret.png", server.data().display()),
        format!("{}/../../secret.png", models.display()),
        format!("{}/%2e%2e/%2e%2e/secret.png", models.display()),
        secret.display().to_string(),
        "/etc/passwd".into(),
        "%00".into(),
    ] {
        assert_eq!(thumb(&path), 404, "{path}");
        assert_eq!(server.get(&format!("/file={path}")).status, 404, "{path}");
    }
    server.assert_works();
}

#[test]
fn names_do_not_leave_their_folders() {
    let server = SERVER.hold();
    let secret = server.data().join("secret.safetensors");
    std::fs::write(&secret, b"hush").unwrap();
    for name in [
        "../../secret",
        "../../secret.safetensors",
        secret.to_str().unwrap(),
        "/etc/passwd",
        "..%2f..%2fsecret",
        "a\u{0}b",
    ] {
        let override_with =
            |key: &str| with(small(), json!({ "override_settings": { key: name } }));
        let refused = |body: &Value, what: &str| {
            let answer = server.post("/sdapi/v1/txt2img", body);
            assert!(
                (400..500).contains(&answer.status),
                "{what} {name}: {} {}",
                answer.status,
                answer.text()
            );
        };
        refused(
            &with(
                small(),
                json!({ "refiner_checkpoint": name, "refiner_switch_at": 0.5 }),
            ),
            "refiner",
        );
        refused(
            &with(small(), json!({ "enable_hr": true, "hr_upscaler": name })),
            "hr_upscaler",
        );
        refused(
            &with(
                small(),
                json!({ "enable_hr": true, "hr_checkpoint_name": name }),
            ),
            "hr_checkpoint",
        );
        assert_eq!(
            server
                .post(
                    "/sdapi/v1/extra-single-image",
                    &json!({ "image": STANDARD.encode(file()), "upscaler_1": name })
                )
                .status,
            400,
            "{name}"
        );
        let lora = server.post(
            "/sdapi/v1/txt2img",
            &with(
                small(),
                json!({ "prompt": format!("x <lora:{name}:1>"), "styles": [name] }),
            ),
        );
        assert_eq!(lora.status, 200, "{name}: {}", lora.text());
        assert!(
            lora.json()["parameters"]["comments"]
                .to_string()
                .contains("not found"),
            "{name}: {}",
            lora.json()["parameters"]["comments"]
        );
        // A1111 drops an unknown checkpoint of `override_settings`.
        let answer = server.post("/sdapi/v1/txt2img", &override_with("sd_model_checkpoint"));
        assert!(answer.status < 500, "{name}: {}", answer.text());
        let answer = server.post("/sdapi/v1/txt2img", &override_with("sd_vae"));
        assert!(answer.status < 500, "{name}: {}", answer.text());
        let answer = server.post("/sdapi/v1/options", &json!({ "sd_model_checkpoint": name }));
        assert_eq!(answer.status, 404, "{}", answer.text());
    }
    server.assert_works();
}

#[test]
fn a_body_over_the_limit_is_cut_off_while_it_comes() {
    let _held = SERVER.hold();
    let server = Server::start(&["--body-limit", "1"]);
    let announced = server.send("POST", "/sdapi/v1/txt2img", &[], &vec![b' '; 2 << 20]);
    assert_eq!(announced.status, 413);
    // Chunked: no length to refuse by.
    let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(b"POST /sdapi/v1/txt2img HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n").unwrap();
    let chunk = [b"10000\r\n".as_slice(), &vec![b' '; 0x10000], b"\r\n"].concat();
    let sent = (0..4096)
        .take_while(|_| stream.write_all(&chunk).is_ok())
        .count();
    assert!(sent < 4096, "the server has read 256 MiB");
    server.assert_works();
}

/// What the server says to these bytes; nothing if it closes.
fn raw(bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", SERVER.hold().port)).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn requests_cannot_be_smuggled() {
    let server = SERVER.hold();
    let hidden = "GET /internal/pending-tasks HTTP/1.1\r\nhost: a\r\n\r\n";
    for head in [
        // Two ways to say how long: nothing after the first request may be read as a second.
        format!(
            "POST /sdapi/v1/skip HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {}\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{hidden}",
            hidden.len() + 5
        ),
        format!(
            "POST /sdapi/v1/skip HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 0\r\ncontent-length: 5\r\n\r\n{hidden}"
        ),
        format!(
            "POST /sdapi/v1/skip HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: xchunked\r\n\r\n{hidden}"
        ),
        format!(
            "POST /sdapi/v1/skip HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: +0\r\n\r\n{hidden}"
        ),
        format!(
            "GET /internal/ping HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx : y\r\n\r\n{hidden}"
        ),
        format!(
            "GET /internal/ping HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx: a\0b\r\n\r\n{hidden}"
        ),
    ] {
        let answer = raw(head.as_bytes());
        assert!(
            answer.matches("HTTP/1.1 ").count() <= 1,
            "{head:?}\n{answer}"
        );
        assert!(!answer.contains("\"tasks\""), "{head:?}\n{answer}");
    }
    let long = format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "a".repeat(1 << 20));
    assert!(!raw(long.as_bytes()).contains(" 200 "));
    let many = "x-a: y\r\n".repeat(5000);
    assert!(
        !raw(format!("GET /internal/ping HTTP/1.1\r\nhost: a\r\n{many}\r\n").as_bytes())
            .contains(" 200 ")
    );
    server.assert_works();
}

#[test]
fn slow_clients_lose_their_place_and_many_take_none_from_others() {
    let _held = SERVER.hold();
    let server = Server::start(&[]);
    let started = Instant::now();
    let slow = |text: &str| {
        let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        stream
    };
    // Half a head, nothing at all, and many more of both: fewer than a process of 1024 files may hold.
    let mut heads: Vec<TcpStream> = ["GET /internal/ping HTTP/1.1\r\nhost:", ""]
        .map(slow)
        .into();
    heads.extend((0..600).map(|index| slow(if index % 2 == 0 { "POST /sdapi" } else { "" })));
    server.assert_works();
    assert!(started.elapsed() < Duration::from_mins(1));
    for stream in &mut heads {
        let mut rest = Vec::new();
        // Closed by the server: the read ends, by an end or a reset.
        let _ = stream.read_to_end(&mut rest);
        assert!(!String::from_utf8_lossy(&rest).contains(" 200 "));
    }
    assert!(
        started.elapsed() < Duration::from_secs(90),
        "{:?}",
        started.elapsed()
    );
    server.assert_works();
}
