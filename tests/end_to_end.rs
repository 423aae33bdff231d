//! Whole jobs against `PyTorch`: latents and PNGs of the tiny checkpoint and of the demo model, made by diffusers' and
//! k-diffusion's parts (`tests/golden/e2e`, `tests/golden/demo`).
//!
//! Tolerances are the golden data's own: latents within 5e-4 of the largest value, at most 1 % of PNG values off by more
//! than 1. An empty negative prompt is compared with the `zeroed.*` tensors, which is what A1111 does on SDXL.

mod support {
    pub(crate) mod close;
    pub(crate) mod golden;
}

use candle_core::{DType, Device};
use sdgen::pipeline::{
    CheckpointIdentity, CheckpointSource, GenerateRequest, Generated, LoadOptions, Pipeline,
};
use sdgen::rng::NoiseSource;
use sdgen::sampling::{Sampler, Scheduler};
use support::close::{Tolerance, assert_close};
use support::golden::{self, Golden};

const LATENTS: Tolerance = Tolerance {
    abs: 0.0,
    rel_of_max: 5e-4,
};

fn load(source: &CheckpointSource) -> Pipeline {
    load_with(source, false)
}

fn load_with(source: &CheckpointSource, latents_on_device: bool) -> Pipeline {
    let options = LoadOptions {
        latents_on_device,
        device: Device::Cpu,
        dtype: DType::F32,
        vae: None,
    };
    Pipeline::load(source, CheckpointIdentity::default(), &options).expect("loads")
}

/// The tiny checkpoint as a file, with the directory that keeps it alive.
fn tiny() -> (tempfile::TempDir, Pipeline) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("tiny.safetensors");
    std::fs::write(&path, golden::unpack("tiny_sdxl.safetensors")).expect("written");
    let pipeline = load(&CheckpointSource::File(path));
    (dir, pipeline)
}

fn request(prompt: &str, negative_prompt: &str) -> GenerateRequest {
    GenerateRequest {
        prompt: prompt.into(),
        negative_prompt: negative_prompt.into(),
        seed: 1,
        steps: 8,
        width: 128,
        height: 128,
        noise_source: NoiseSource::Cpu,
        keep_latents: true,
        ..GenerateRequest::default()
    }
}

/// The request of a golden case.
fn of_case(case: &serde_json::Value) -> GenerateRequest {
    let text = |key: &str| case[key].as_str().expect("a string");
    let number = |key: &str| usize::try_from(case[key].as_u64().expect("a number")).expect("small");
    let sampler = match text("sampler") {
        "euler_ancestral" => "Euler a",
        "dpmpp_2m" => "DPM++ 2M",
        "dpmpp_sde" => "DPM++ SDE",
        "dpmpp_2m_sde" => "DPM++ 2M SDE",
        "ddim" => "DDIM",
        other => panic!("sampler {other}"),
    };
    let scheduler = match case["schedule"].as_str() {
        Some("karras") => "Karras",
        Some("exponential") => "Exponential",
        _ => "Automatic",
    };
    let seeds = case["seeds"].as_array().expect("seeds");
    GenerateRequest {
        seed: seeds[0].as_u64().expect("a seed"),
        sampler: Sampler::find(sampler).expect("known"),
        scheduler: Scheduler::find(scheduler).expect("known"),
        steps: number("steps"),
        cfg_scale: case["cfg"].as_f64().expect("a number") as f32,
        width: number("width"),
        height: number("height"),
        batch_size: seeds.len(),
        ..request(text("prompt"), text("negative"))
    }
}

fn latents(generated: &Generated) -> Vec<f32> {
    let latents = generated
        .images
        .iter()
        .flat_map(|image| image.latents.clone().expect("kept"));
    latents.collect()
}

/// At most 1 % of the values off by more than 1.
fn assert_same_picture(name: &str, got: &image::RgbImage, png: &str) {
    let want = image::open(golden::path(png))
        .expect("golden PNG")
        .to_rgb8();
    assert_eq!(got.dimensions(), want.dimensions(), "{name}");
    let off = got.as_raw().iter().zip(want.as_raw());
    let off = off.filter(|(g, w)| g.abs_diff(**w) > 1).count();
    let share = off as f64 / want.as_raw().len() as f64;
    eprintln!(
        "{name}: {:.3}% of the values off by more than 1",
        share * 100.0
    );
    assert!(share <= 0.01, "{name}: {off} values off");
}

fn compare(folder: &str, pipeline: &mut Pipeline) -> usize {
    let cases = std::fs::read(golden::path(&format!("{folder}/e2e.json"))).expect("cases");
    let cases: serde_json::Value = serde_json::from_slice(&cases).expect("JSON");
    let cases = cases["cases"].as_array().expect("a list");
    for case in cases {
        let name = case["name"].as_str().expect("a name");
        let want = Golden::load(&format!("{folder}/{name}.safetensors"));
        let request = of_case(case);
        let zeroed = request.negative_prompt.is_empty();
        let got = pipeline.generate(&request, &()).expect("generates");
        let key = if zeroed { "zeroed.latents" } else { "latents" };
        assert_close(
            &format!("{folder}/{name}.{key}"),
            &latents(&got),
            &want.values(key),
            LATENTS,
        );
        for (i, image) in got.images.iter().enumerate() {
            let png = match (zeroed, got.images.len()) {
                (true, _) => format!("{folder}/{name}.zeroed.png"),
                (false, 1) => format!("{folder}/{name}.png"),
                (false, _) => format!("{folder}/{name}.{i}.png"),
            };
            assert_same_picture(&format!("{folder}/{name}.{i}"), &image.image, &png);
        }
    }
    cases.len()
}

#[test]
fn jobs_on_the_tiny_checkpoint_equal_the_reference() {
    let (_dir, mut pipeline) = tiny();
    assert_eq!(compare("e2e", &mut pipeline), 5);
}

#[test]
fn jobs_on_the_demo_model_equal_the_reference() {
    assert_eq!(compare("demo", &mut load(&CheckpointSource::Embedded)), 3);
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_a_batch_equals_singles() {
    let (_dir, mut pipeline) = tiny();
    for (sampler, source) in [
        (Sampler::EulerA, NoiseSource::Gpu),
        (Sampler::Dpmpp2M, NoiseSource::Cpu),
        (Sampler::DpmppSde, NoiseSource::Nv),
    ] {
        let one = GenerateRequest {
            sampler,
            noise_source: source,
            steps: 3,
            width: 64,
            height: 64,
            seed: 40,
            ..request("a cat, (detailed:1.2)", "blurry")
        };
        let batch = GenerateRequest {
            batch_size: 2,
            batch_count: 2,
            ..one.clone()
        };
        let four = pipeline.generate(&batch, &()).expect("generates");
        assert_eq!(four.seeds, [40, 41, 42, 43]);
        for (i, image) in four.images.iter().enumerate() {
            let single = GenerateRequest {
                seed: 40 + i as u64,
                ..one.clone()
            };
            let first = pipeline.generate(&single, &()).expect("generates");
            let second = pipeline.generate(&single, &()).expect("generates");
            assert_eq!(first.images[0].image, second.images[0].image, "twice");
            assert_eq!(latents(&first), latents(&second), "twice");
            assert_eq!(
                first.images[0].image, image.image,
                "{sampler:?}: picture {i} of the batch"
            );
            assert_eq!(first.images[0].infotext, image.infotext);
        }
    }
}

#[test]
fn prompt_features_change_the_picture_and_unusual_sizes_work() {
    let (_dir, mut pipeline) = tiny();
    let base = GenerateRequest {
        steps: 3,
        width: 72,
        height: 104,
        ..request("a cat", "")
    };
    let plain = pipeline
        .generate(&base, &())
        .expect("generates")
        .images
        .remove(0);
    assert_eq!(
        plain.image.dimensions(),
        (72, 104),
        "multiples of 8 that do not halve evenly"
    );
    let prompts = [
        "a (cat:1.3)",
        "a cat BREAK dog",
        "a [cat:dog:1]",
        "a cat AND a dog :0.5",
        "",
        "a cat :2",
    ];
    for prompt in prompts {
        let other = GenerateRequest {
            prompt: prompt.into(),
            ..base.clone()
        };
        let other = pipeline
            .generate(&other, &())
            .expect("generates")
            .images
            .remove(0);
        assert_ne!(plain.image, other.image, "{prompt}");
    }
    let long = GenerateRequest {
        prompt: "a cat, ".repeat(60),
        ..base.clone()
    };
    let long = pipeline.generate(&long, &()).expect("generates");
    assert_eq!(
        long.images.len(),
        1,
        "prompts of different length run apart"
    );
    let tiled = GenerateRequest {
        tiling: true,
        ..base.clone()
    };
    let tiled = pipeline
        .generate(&tiled, &())
        .expect("generates")
        .images
        .remove(0);
    assert_ne!(plain.image, tiled.image, "tiling wraps around");
    let again = pipeline
        .generate(&base, &())
        .expect("generates")
        .images
        .remove(0);
    assert_eq!(plain.image, again.image, "tiling is over with its job");
}

/// The sums of a step are merged before they are computed: other roundings, the same picture. The host's latents are those that the
/// golden data holds.
#[test]
fn latents_that_stay_on_the_device_are_the_hosts() {
    let mut host = load(&CheckpointSource::Embedded);
    let mut device = load_with(&CheckpointSource::Embedded, true);
    for name in [
        "Euler",
        "Euler a",
        "Heun",
        "LMS",
        "DPM2 a",
        "DPM++ 2S a",
        "DPM++ 2M",
        "DPM++ SDE",
        "DPM++ 3M SDE",
        "DPM fast",
        "DPM adaptive",
        "Restart",
        "DDIM",
        "PLMS",
        "UniPC",
        "LCM",
        "Res Multistep",
    ] {
        let request = GenerateRequest {
            sampler: Sampler::find(name).expect("known"),
            batch_size: 2,
            width: 64,
            height: 64,
            cfg_scale: 3.0,
            ..request("a red apple AND a blue cube :0.5", "blurry")
        };
        let [want, got] = [&mut host, &mut device].map(|pipeline| {
            let made = pipeline.generate(&request, &()).expect("makes a picture");
            latents(&made)
        });
        assert_close(name, &got, &want, LATENTS);
    }
}
