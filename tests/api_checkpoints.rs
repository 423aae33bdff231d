//! Jobs with a second checkpoint, for the hires pass or as refiner, on a real server: the demo model and a copy of it on disk.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/server.rs"]
mod server;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use sdgen::weights::{Source, demo};
use serde_json::{Value, json};
use server::{Answer, Server, small, until, with};

const TXT2IMG: &str = "/sdapi/v1/txt2img";
/// Bytes of the copy's weights in f32, less what the process may need meanwhile.
const COPY: f64 = 40e6;

/// A server that has `other.safetensors` besides the demo model, and a LoRA.
fn server() -> Server {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let file = demo::open().unwrap();
    let stored: Vec<(String, Vec<usize>, Vec<u8>)> = file
        .keys()
        .into_iter()
        .filter(|key| !key.ends_with("position_ids"))
        .map(|key| {
            let values = file.read(key).unwrap();
            let bytes = values.iter().flat_map(|value| value.to_le_bytes());
            (key.into(), file.shape(key).unwrap().into(), bytes.collect())
        })
        .collect();
    let copy = dir.path().join("models/Stable-diffusion/other.safetensors");
    let metadata = file.all_metadata().clone();
    write(&copy, &stored, metadata);
    let half = (-0.5f32).to_le_bytes().repeat(4);
    let half = [("lora_unet_out_2.weight".to_string(), vec![4], half)];
    write(
        &dir.path().join("models/Lora/half.safetensors"),
        &half,
        HashMap::new(),
    );
    let server = Server::spawn(dir, &["--checkpoint", "sdgen-demo"], &[]);
    server.wait_ready();
    server
}

fn write(
    path: &Path,
    tensors: &[(String, Vec<usize>, Vec<u8>)],
    metadata: HashMap<String, String>,
) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let views = tensors.iter().map(|(key, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
        (key, view)
    });
    std::fs::write(path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

fn hires(changes: Value) -> Value {
    let hires = json!({ "enable_hr": true, "hr_scale": 2, "denoising_strength": 0.7, "steps": 3 });
    with(with(small(), hires), changes)
}

fn infotext(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.info()["infotexts"][0].as_str().unwrap().to_string()
}

/// Bytes of the process in memory.
fn used(server: &Server) -> f64 {
    let memory = server.get("/sdapi/v1/memory").json();
    memory["ram"]["used"].as_f64().unwrap()
}

#[test]
fn a_second_checkpoint_of_the_same_weights_makes_the_same_picture_and_is_named() {
    let server = server();
    let post = |changes: Value| server.post(TXT2IMG, &hires(changes));
    let own = post(json!({}));
    let other = post(json!({ "hr_checkpoint_name": "other" }));
    let text = infotext(&other);
    assert!(text.contains("Hires checkpoint: other ["), "{text}");
    assert!(!infotext(&own).contains("Hires checkpoint"));
    let pixels = |answer: &Answer| image::load_from_memory(&answer.images()[0]).unwrap();
    assert_eq!(pixels(&own), pixels(&other));

    let refined = |prompt: &str| {
        let refiner =
            json!({ "refiner_checkpoint": "other", "refiner_switch_at": 0.5, "prompt": prompt });
        server.post(TXT2IMG, &with(small(), refiner))
    };
    let plain = refined("a red apple");
    let text = infotext(&plain);
    assert!(
        text.contains("Refiner: other [") && text.contains("Refiner switch at: 0.5"),
        "{text}"
    );
    // A LoRA of the prompt is on both models.
    let with_lora = refined("a red apple <lora:half:1>");
    assert!(infotext(&with_lora).contains("Lora hashes: \"half: "));
    assert_ne!(pixels(&plain), pixels(&with_lora));
    assert_eq!(pixels(&plain), pixels(&refined("a red apple")));
    server.assert_works();
}

#[test]
fn unknown_checkpoints_are_refused_by_name() {
    let server = server();
    for (field, more) in [
        ("hr_checkpoint_name", json!({})),
        ("refiner_checkpoint", json!({ "refiner_switch_at": 0.5 })),
    ] {
        let request = with(hires(more), json!({ field: "neither" }));
        let answer = server.post(TXT2IMG, &request);
        assert!(answer.status >= 400, "{field}");
        let text = answer.text();
        assert!(
            text.contains("checkpoint not found: `neither`"),
            "{field}: {text}"
        );
    }
    server.assert_works();
}

#[test]
fn an_interrupt_in_the_second_pass_keeps_the_picture_and_the_next_job_frees_the_other_model() {
    let server = Arc::new(server());
    let steps = json!({ "hr_checkpoint_name": "other", "hr_second_pass_steps": 150, "denoising_strength": 1 });
    let running = server.post_later(TXT2IMG, hires(steps));
    until("the second pass", || {
        let state = server.progress()["state"].clone();
        (state["sampling_step"].as_u64() > Some(5)).then_some(())
    });
    assert_eq!(server.post("/sdapi/v1/interrupt", &json!({})).status, 200);
    let answer = running.join().unwrap();
    assert_eq!(answer.images().len(), 1);
    assert!(infotext(&answer).contains("Hires checkpoint: other"));
    let both = used(&server);
    assert_eq!(server.post(TXT2IMG, &small()).status, 200);
    let one = used(&server);
    assert!(
        one + COPY < both,
        "{both} bytes with two models, {one} with one"
    );
}
