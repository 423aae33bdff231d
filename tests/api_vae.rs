//! The choice of VAE, TAESD and previews over the API, with VAE files made of the demo model's own.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support {
    pub(crate) mod server;
    pub(crate) mod small_models;
}

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::server::{Answer, Server, endless, small, until, with};
use support::small_models::{self, Weights};

/// An address where nobody answers.
const NO_HUB: (&str, &str) = ("HF_ENDPOINT", "http://127.0.0.1:1");

fn picture(answer: &Answer) -> image::RgbImage {
    let file = answer.images().swap_remove(0);
    image::load_from_memory(&file).unwrap().to_rgb8()
}

fn infotext(answer: &Answer) -> String {
    answer.info()["infotexts"][0].as_str().unwrap().to_string()
}

fn with_options(options: &Value) -> Value {
    with(small(), json!({ "override_settings": options }))
}

/// The demo VAE, its pictures a little brighter.
fn brighter() -> Weights {
    let mut vae = small_models::demo_vae();
    let bias = vae.get_mut("decoder.conv_out.bias").unwrap();
    *bias = (&*bias + 0.25).unwrap();
    vae
}

/// The same with the keys of a training run around it.
fn with_leftovers(vae: &Weights) -> Weights {
    let mut weights: Weights = vae
        .iter()
        .map(|(key, tensor)| (format!("first_stage_model.{key}"), tensor.clone()))
        .collect();
    for key in ["loss.logvar", "model_ema.decay", "model_ema.num_updates"] {
        weights.insert(key.into(), small_models::noise(&[1], 1, 1.0));
    }
    weights
}

fn server_with(files: &[(&str, &Weights)], args: &[&str]) -> Server {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    for (name, weights) in files {
        small_models::write(weights, &dir.path().join("models").join(name));
    }
    let server = Server::spawn(dir, args, &[NO_HUB]);
    server.wait_ready();
    server
}

fn hash_of(path: &Path) -> String {
    sdgen::engine::hashes::sha256(path).unwrap()[..10].to_string()
}

#[test]
fn vae_files_of_every_naming_are_listed_chosen_and_named_in_the_infotext() {
    let vae = brighter();
    let (plain, wrapped) = ("VAE/plain.safetensors", "VAE/wrapped.safetensors");
    let diffusers = "VAE/diffusers.safetensors";
    let files = [
        (plain, &vae),
        (wrapped, &with_leftovers(&vae)),
        (diffusers, &small_models::diffusers_names(&vae)),
    ];
    let server = server_with(&files, &[]);
    let list = server.get("/sdapi/v1/sd-vae").json();
    let names: Vec<&str> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["model_name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        [
            "diffusers.safetensors",
            "plain.safetensors",
            "wrapped.safetensors"
        ]
    );
    let own = server.post("/sdapi/v1/txt2img", &small());
    assert!(!infotext(&own).contains("VAE"), "{}", infotext(&own));
    let mut pictures = Vec::new();
    for file in [plain, wrapped, diffusers] {
        let name = file.trim_start_matches("VAE/");
        let answer = server.post(
            "/sdapi/v1/txt2img",
            &with_options(&json!({ "sd_vae": name })),
        );
        let hash = hash_of(&server.data().join("models").join(file));
        let (text, info) = (infotext(&answer), answer.info());
        assert!(
            text.contains(&format!(", VAE hash: {hash}, VAE: {name}, ")),
            "{text}"
        );
        assert_eq!(
            (&info["sd_vae_name"], &info["sd_vae_hash"]),
            (&json!(name), &json!(hash))
        );
        pictures.push(picture(&answer));
    }
    assert!(pictures[0] == pictures[1] && pictures[0] == pictures[2]);
    assert!(pictures[0] != picture(&own));
    let unnamed = json!({
        "sd_vae": "plain.safetensors", "add_vae_name_to_info": false, "add_vae_hash_to_info": false,
    });
    let unnamed = server.post("/sdapi/v1/txt2img", &with_options(&unnamed));
    assert!(
        !infotext(&unnamed).contains("VAE"),
        "{}",
        infotext(&unnamed)
    );

    // The override was for one request; only VAEs were loaded for it.
    let again = server.post("/sdapi/v1/txt2img", &small());
    assert_eq!(picture(&again), picture(&own));
    until("the log to name five VAEs", || {
        (server.log().matches("VAE loaded").count() == 5).then_some(())
    });
    let loads = server.log().matches("INFO loaded checkpoint=").count();
    assert_eq!(loads, 1, "the checkpoint stays:\n{}", server.log());

    // A setting holds for all requests; one that names nothing means the checkpoint's own.
    let set = server.post(
        "/sdapi/v1/options",
        &json!({ "sd_vae": "plain.safetensors" }),
    );
    assert_eq!(set.status, 200, "{}", set.text());
    let bright = server.post("/sdapi/v1/txt2img", &small());
    assert_eq!(picture(&bright), pictures[0]);
    for (name, warns) in [("None", false), ("gone.safetensors", true)] {
        let answer = server.post(
            "/sdapi/v1/txt2img",
            &with_options(&json!({ "sd_vae": name })),
        );
        assert_eq!(picture(&answer), picture(&own), "{name}");
        assert_eq!(server.log().contains("VAE not found"), warns, "{name}");
    }
}

#[test]
fn the_command_lines_vae_wins_and_one_that_cannot_be_loaded_leaves_the_one_before() {
    let vae = brighter();
    let mut damaged = vae.clone();
    damaged.remove("decoder.mid.block_1.conv1.weight");
    let files = [
        ("VAE/bright.safetensors", &vae),
        ("VAE/damaged.safetensors", &damaged),
    ];
    let server = server_with(&files, &["--vae-path", "bright.safetensors"]);
    let fixed = server.post(
        "/sdapi/v1/txt2img",
        &with_options(&json!({ "sd_vae": "None" })),
    );
    assert!(
        infotext(&fixed).contains("VAE: bright.safetensors"),
        "{}",
        infotext(&fixed)
    );
    drop(server);

    let server = server_with(&files, &[]);
    let own = picture(&server.post("/sdapi/v1/txt2img", &small()));
    let refused = server.post(
        "/sdapi/v1/txt2img",
        &with_options(&json!({ "sd_vae": "damaged.safetensors" })),
    );
    assert_eq!(refused.status, 500);
    let text = refused.text();
    assert!(
        text.contains("`decoder.mid.block_1.conv1.weight` is missing from `"),
        "{text}"
    );
    assert_eq!(picture(&server.post("/sdapi/v1/txt2img", &small())), own);
}

#[test]
fn taesd_is_used_where_it_is_and_missed_in_words_without_a_network() {
    let server = server_with(
        &[(
            "VAE-approx/taesdxl_decoder.safetensors",
            &small_models::taesd_decoder(),
        )],
        &[],
    );
    let full = server.post("/sdapi/v1/txt2img", &small());
    let options = json!({ "sd_vae_decode_method": "TAESD" });
    let fast = server.post("/sdapi/v1/txt2img", &with_options(&options));
    assert!(
        infotext(&fast).contains(", VAE Decoder: TAESD, Version: "),
        "{}",
        infotext(&fast)
    );
    assert_eq!(
        fast.info()["extra_generation_params"]["VAE Decoder"],
        "TAESD"
    );
    assert!(picture(&fast) != picture(&full));
    assert_eq!(picture(&fast).dimensions(), (64, 64));

    let image = json!([full.json()["images"][0]]);
    let options = json!({ "sd_vae_encode_method": "TAESD" });
    let start = with(with_options(&options), json!({ "init_images": image }));
    let missing = server.post("/sdapi/v1/img2img", &start);
    assert_eq!(missing.status, 500);
    let detail = missing.json()["detail"].as_str().unwrap().to_string();
    assert!(
        detail.starts_with("`taesdxl_encoder.safetensors` is not in `")
            && detail.contains("VAE-approx` and cannot be downloaded from `madebyollin/taesdxl`: ")
            && detail.ends_with("; put the file there, or use the method `Full`"),
        "{detail}"
    );
    small_models::write(
        &small_models::taesd_encoder(),
        &server
            .data()
            .join("models/VAE-taesd/taesdxl_encoder.safetensors"),
    );
    let started = server.post("/sdapi/v1/img2img", &start);
    assert!(
        infotext(&started).contains("VAE Encoder: TAESD"),
        "{}",
        infotext(&started)
    );
    // A text to image job encodes nothing, and says nothing about it.
    let options = json!({ "sd_vae_encode_method": "TAESD" });
    let plain = server.post("/sdapi/v1/txt2img", &with_options(&options));
    assert_eq!(infotext(&plain), infotext(&full));
}

/// A hub that has one file; the `ETag` is the SHA-256 it claims. Returns its address.
fn hub(name: &'static str, file: Vec<u8>, etag: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut reader = BufReader::new(stream);
            let lines = reader.by_ref().lines().map_while(Result::ok);
            let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
            let wanted = format!("/madebyollin/taesdxl/resolve/main/{name}");
            // The question for the size asks for the first byte only.
            let is_question = head
                .iter()
                .any(|line| line.to_lowercase() == "range: bytes=0-0");
            let body = if is_question { &file[..1] } else { &file[..] };
            let status = match (head[0].contains(&wanted), is_question) {
                (false, _) => "404 Not Found",
                (true, false) => "200 OK",
                (true, true) => "206 Partial Content",
            };
            let answer = format!(
                "HTTP/1.1 {status}\r\ncontent-length: {}\r\ncontent-range: bytes 0-{}/{}\r\netag: \"{etag}\"\r\nx-repo-commit: abc\r\nconnection: close\r\n\r\n",
                body.len(),
                body.len() - 1,
                file.len()
            );
            let mut stream = reader.into_inner();
            // A client that has left shows in its own answer.
            let _ = stream
                .write_all(answer.as_bytes())
                .and_then(|()| stream.write_all(body));
        }
    });
    address
}

#[test]
fn taesd_is_downloaded_once_and_what_arrives_is_checked() {
    const NAME: &str = "taesdxl_decoder.safetensors";
    let bytes = safetensors::serialize(&small_models::taesd_decoder(), None).unwrap();
    let good = sdgen::engine::hashes::hex(&Sha256::digest(&bytes));
    let request = with_options(&json!({ "sd_vae_decode_method": "TAESD" }));
    for (etag, status) in [("0".repeat(64), 500), (good, 200)] {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let endpoint = hub(NAME, bytes.clone(), etag);
        let env = [("HF_ENDPOINT", endpoint.as_str())];
        let server = Server::spawn(dir, &[], &env);
        server.wait_ready();
        let answer = server.post("/sdapi/v1/txt2img", &request);
        assert_eq!(answer.status, status, "{}", answer.text());
        let files = server.files("models/VAE-approx");
        if status == 200 {
            assert_eq!(std::fs::read(&files[0]).unwrap(), bytes);
            assert!(infotext(&answer).contains("VAE Decoder: TAESD"));
            server.post("/sdapi/v1/txt2img", &request);
            assert_eq!(server.log().matches("downloading").count(), 1);
        } else {
            assert!(
                answer.text().contains("arrived, not `0000"),
                "{}",
                answer.text()
            );
            assert_eq!(files, [] as [std::path::PathBuf; 0]);
            server.assert_works();
        }
    }
}

/// The first preview of a job with these options, through `/internal/progress`.
fn first_preview(server: &Arc<Server>, options: &Value) -> image::DynamicImage {
    use base64::Engine as _;
    let body = with(
        endless(),
        json!({ "force_task_id": "task(watched)", "override_settings": options }),
    );
    let job = server.post_later("/sdapi/v1/txt2img", body);
    let ask = || {
        let body = json!({ "id_task": "task(watched)" });
        server.post("/internal/progress", &body).json()
    };
    let preview = until("a preview", || {
        ask()["live_preview"].as_str().map(String::from)
    });
    server.post("/sdapi/v1/interrupt", &json!({}));
    job.join().unwrap();
    server.wait_idle();
    let (head, data) = preview.split_once(',').unwrap();
    assert_eq!(head, "data:image/png;base64");
    let bytes = base64::engine::general_purpose::STANDARD.decode(data);
    image::load_from_memory(&bytes.unwrap()).unwrap()
}

#[test]
fn previews_are_made_by_the_method_of_the_options() {
    let files = [
        (
            "VAE-approx/taesdxl_decoder.safetensors",
            &small_models::taesd_decoder(),
        ),
        (
            "VAE-approx/vaeapprox-sdxl.safetensors",
            &small_models::approx_nn(),
        ),
    ];
    let server = Arc::new(server_with(&files, &[]));
    for (options, size) in [
        (json!({ "show_progress_type": "Approx cheap" }), 16),
        (json!({ "show_progress_type": "Approx NN" }), 32),
        (json!({ "show_progress_type": "TAESD" }), 128),
        (
            json!({ "show_progress_type": "Full", "show_progress_every_n_steps": 1 }),
            128,
        ),
        (
            json!({ "live_preview_content": "Negative prompt", "show_progress_every_n_steps": 3 }),
            32,
        ),
    ] {
        let preview = first_preview(&server, &options);
        assert_eq!(preview.width(), size, "{options}");
    }
    // Of finished batches only.
    let options = json!({ "show_progress_every_n_steps": -1 });
    let body = with(
        small(),
        json!({ "steps": 1, "n_iter": 300, "force_task_id": "task(batches)", "override_settings": options }),
    );
    let job = server.post_later("/sdapi/v1/txt2img", body);
    let finished = until("a finished batch", || {
        let body = json!({ "id_task": "task(batches)" });
        let answer = server.post("/internal/progress", &body).json();
        answer["live_preview"].as_str().map(String::from)
    });
    server.post("/sdapi/v1/interrupt", &json!({}));
    job.join().unwrap();
    assert!(finished.starts_with("data:image/png;base64,"));
}

#[test]
fn without_files_network_or_permission_previews_are_cheap_or_none() {
    let server = Arc::new(server_with(&[], &[]));
    let options = json!({ "show_progress_type": "TAESD" });
    assert_eq!(first_preview(&server, &options).width(), 16);
    assert!(
        server
            .log()
            .contains("previews are approximated without TAESD")
    );
    assert_eq!(
        first_preview(&server, &json!({})).width(),
        16,
        "`Approx NN` without its file"
    );

    let body = with(
        endless(),
        json!({ "override_settings": { "live_previews_enable": false, "show_progress_every_n_steps": 1 } }),
    );
    let job = server.post_later("/sdapi/v1/txt2img", body);
    server.wait_for_step();
    let mut last = json!(null);
    until("ten more steps", || {
        let progress = server.get("/sdapi/v1/progress").json();
        last = progress["current_image"].clone();
        (progress["state"]["sampling_step"].as_i64() > Some(10)).then_some(())
    });
    assert_eq!(last, Value::Null);
    server.post("/sdapi/v1/interrupt", &json!({}));
    job.join().unwrap();
}
