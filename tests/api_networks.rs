//! LoRAs and textual inversions on a real server with the demo model: lists, prompts that name them, hashes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/server.rs"]
mod server;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use server::{Server, small, with};

/// Writes a safetensors file of `f32` tensors filled with one value each.
fn write(path: &Path, tensors: &[(&str, &[usize], f32)], metadata: &[(&str, &str)]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let stored: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, shape, value)| value.to_le_bytes().repeat(shape.iter().product()))
        .collect();
    let views = tensors.iter().zip(&stored).map(|((key, shape, _), data)| {
        let view = TensorView::new(Dtype::F32, shape.to_vec(), data).unwrap();
        (*key, view)
    });
    let metadata: HashMap<String, String> = metadata
        .iter()
        .map(|(key, value)| (key.to_string(), value.to_string()))
        .collect();
    std::fs::write(path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

/// A data directory with two LoRAs and two embeddings, the second of each of no use here.
fn folder() -> Arc<tempfile::TempDir> {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let at = |name: &str| dir.path().join(name);
    let half = [("lora_unet_out_2.weight", &[4usize][..], -0.5)];
    let metadata = [
        ("ss_output_name", "Half"),
        ("ss_tag_frequency", r#"{"1_x": {"cat": 3}}"#),
        ("ssmd_cover_images", "[]"),
    ];
    write(&at("models/Lora/sub/halver.safetensors"), &half, &metadata);
    let other = [("lora_unet_out_2.diff", &[3usize][..], 1.0)];
    write(
        &at("models/LyCORIS/misfit.safetensors"),
        &other,
        &[("sshs_model_hash", "feedfacecafe0123")],
    );
    let widths = |l, g| [("clip_l", [2usize, l], 0.1f32), ("clip_g", [2, g], 0.1)];
    // The demo model's text encoders.
    let file = sdgen::weights::demo::open().unwrap();
    let width = |key: &str| sdgen::weights::Source::shape(&file, key).unwrap()[1];
    let (l, g) = (
        width("conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"),
        width("conditioner.embedders.1.model.token_embedding.weight"),
    );
    for (name, tensors) in [("zyx", widths(l, g)), ("wide", widths(l + 1, g))] {
        let tensors = tensors
            .each_ref()
            .map(|(key, shape, value)| (*key, &shape[..], *value));
        write(
            &at(&format!("embeddings/{name}.safetensors")),
            &tensors,
            &[],
        );
    }
    write(
        &at("embeddings/sd1.safetensors"),
        &[("emb_params", &[1, 768], 0.0)],
        &[],
    );
    dir
}

fn picture(server: &Server, prompt: &str) -> (Vec<u8>, Value) {
    let answer = server.post(
        "/sdapi/v1/txt2img",
        &with(small(), json!({ "prompt": prompt })),
    );
    assert_eq!(answer.status, 200, "{prompt}: {}", answer.text());
    let pixels = image::load_from_memory(&answer.images()[0])
        .unwrap()
        .into_rgb8()
        .into_raw();
    (pixels, answer.info())
}

#[test]
fn networks_are_listed_with_a1111s_keys() {
    let dir = folder();
    let server = Server::spawn(dir.clone(), &[], &[]);
    server.wait_ready();
    let list = |path: &str| server.get(&format!("/sdapi/v1/{path}")).json();
    let path = dir.path().join("models/Lora/sub/halver.safetensors");
    let loras = list("loras");
    assert_eq!(
        loras[0],
        json!({
            "name": "halver",
            "alias": "Half",
            "path": path,
            "metadata": { "ss_tag_frequency": { "1_x": { "cat": 3 } }, "ss_output_name": "Half" },
        })
    );
    assert_eq!(
        (loras.as_array().unwrap().len(), loras[1]["alias"].as_str()),
        (2, Some("misfit"))
    );
    let embeddings = list("embeddings");
    let keys = |part: &str| {
        embeddings[part]
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect::<Vec<_>>()
    };
    assert_eq!(
        (keys("loaded"), keys("skipped")),
        (vec!["wide".into(), "zyx".into()], vec!["sd1".to_string()])
    );
    assert_eq!(embeddings["loaded"]["zyx"]["vectors"], 2);

    std::fs::remove_file(path).unwrap();
    std::fs::remove_file(dir.path().join("embeddings/wide.safetensors")).unwrap();
    for name in ["refresh-loras", "refresh-embeddings"] {
        let answer = server.send("POST", &format!("/sdapi/v1/{name}"), &[], b"");
        assert_eq!((answer.status, answer.json()), (200, Value::Null), "{name}");
    }
    assert_eq!(list("loras").as_array().unwrap().len(), 1);
    assert_eq!(list("embeddings")["loaded"].as_object().unwrap().len(), 1);
}

#[test]
fn prompts_use_networks_and_say_so() {
    let server = Server::spawn(folder(), &[], &[]);
    server.wait_ready();
    let (plain, info) = picture(&server, "a cat");
    assert_eq!(info["extra_generation_params"].get("Lora hashes"), None);

    let (halved, info) = picture(&server, "a cat<lora:Half:0.6>");
    assert_ne!(plain, halved);
    // SHA-256 of four times -0.5.
    let extra = &info["extra_generation_params"];
    assert_eq!(extra["Lora hashes"], "Half: a6ce1aacec14");
    let text = info["infotexts"][0].as_str().unwrap();
    assert!(text.starts_with("a cat<lora:Half:0.6>\n"), "{text}");
    assert!(text.contains(r#"Lora hashes: "Half: "#), "{text}");

    let (zero, _) = picture(&server, "a cat<lora:halver:0>");
    let (again, info) = picture(&server, "a cat<lora:gone:1><lora:misfit:1><hypernet:x>");
    assert!(plain == zero && plain == again, "nothing is left of a LoRA");
    assert_eq!(
        info["extra_generation_params"]["Lora hashes"],
        "misfit: feedfacecafe"
    );

    let (named, info) = picture(&server, "a zyx cat");
    assert_ne!(named, plain);
    let hash = info["extra_generation_params"]["TI hashes"]
        .as_str()
        .unwrap()
        .to_string();
    assert!(hash.starts_with("zyx: ") && hash.len() == 17, "{hash}");
    let (_, info) = picture(&server, "a wide cat");
    assert_eq!(
        info["extra_generation_params"].get("TI hashes"),
        None,
        "of another width"
    );

    let larger = json!({ "enable_hr": true, "hr_prompt": "a cat<lora:Half:1>" });
    let answer = server.post(
        "/sdapi/v1/txt2img",
        &with(with(small(), json!({ "prompt": "a cat" })), larger),
    );
    let extra = &answer.info()["extra_generation_params"];
    assert_eq!(
        extra["Lora hashes"], "Half: a6ce1aacec14",
        "of the second pass's own prompt"
    );

    let off = with(
        small(),
        json!({ "prompt": "a cat<lora:Half:0.6>", "disable_extra_networks": true }),
    );
    let answer = server.post("/sdapi/v1/txt2img", &off);
    assert_eq!(
        answer.info()["extra_generation_params"].get("Lora hashes"),
        None
    );
    let bad = server.post(
        "/sdapi/v1/txt2img",
        &with(small(), json!({ "prompt": "<lora:Half:x>" })),
    );
    assert!(
        (400..500).contains(&bad.status),
        "{}: {}",
        bad.status,
        bad.text()
    );
    assert!(
        bad.text().contains("multiplier `x` is not a number"),
        "{}",
        bad.text()
    );
    server.assert_works();
}
