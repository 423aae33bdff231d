//! Starting from pictures, inpainting, hires fix, refiner, circular padding and variation seeds against `PyTorch`: latents and pictures
//! of the tiny checkpoint, made by `tests/golden/make/modes.py` on diffusers', k-diffusion's, Pillow's and `OpenCV`'s parts.
//!
//! Tolerances: final latents within 1e-3 (f32 sums in another order, through up to 16 steps of a network at guidance 6); at
//! most 1 % of the 8-bit values off by more than 1 (a value cut off on the other side of a whole number changes by 1).

mod support {
    pub(crate) mod close;
    pub(crate) mod golden;
}

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use sdgen::imaging::ResizeMode;
use sdgen::imaging::inpaint::{InpaintArea, MaskEdge, MaskMode, MaskOptions, mask_from};
use sdgen::pipeline::{
    CheckpointIdentity, CheckpointSource, GenerateRequest, Generated, Hires, HiresSize,
    HiresUpscaler, ImageResize, InitImage, InpaintMask, LoadOptions, MaskedContent,
    OtherCheckpoint, PictureUpscaler, Pipeline, Refiner, RefinerPasses, SoftInpainting,
};
use sdgen::rng::NoiseSource;
use sdgen::sampling::{ExactSteps, Sampler, Scheduler, SoftBlend};
use serde_json::Value;
use support::close::{Tolerance, assert_close};
use support::golden;

const LATENTS: Tolerance = Tolerance {
    abs: 1e-3,
    rel_of_max: 0.0,
};
const INPUT: &str = "model.diffusion_model.input_blocks.0.0.weight";

/// Checkpoints, loaded once for all tests; the directory keeps the files.
static MODELS: LazyLock<Models> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("temporary directory");
    let tiny = golden::unpack("tiny_sdxl.safetensors");
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).expect("written");
        CheckpointSource::File(path)
    };
    let model = |name: &str, bytes: &[u8]| Mutex::new(load(&file(name, bytes)));
    Models {
        tiny: model("tiny.safetensors", &tiny),
        inpainting: model("inpainting.safetensors", &inpainting(&tiny)),
        refiner: OtherCheckpoint {
            source: file(
                "refiner.safetensors",
                &golden::unpack("modes/tiny_refiner.safetensors"),
            ),
            identity: CheckpointIdentity::default(),
            vae: None,
        },
        _dir: dir,
    }
});

struct Models {
    tiny: Mutex<Pipeline>,
    inpainting: Mutex<Pipeline>,
    refiner: OtherCheckpoint,
    _dir: tempfile::TempDir,
}

fn load(source: &CheckpointSource) -> Pipeline {
    let options = LoadOptions {
        latents_on_device: false,
        device: Device::Cpu,
        dtype: DType::F32,
        vae: None,
    };
    Pipeline::load(source, CheckpointIdentity::default(), &options).expect("loads")
}

/// The tiny checkpoint with five further input channels.
fn inpainting(tiny: &[u8]) -> Vec<u8> {
    let mut tensors: HashMap<String, Tensor> =
        candle_core::safetensors::load_buffer(tiny, &Device::Cpu).expect("a checkpoint");
    let more = std::fs::read(golden::path("modes/inpainting.safetensors")).expect("golden weights");
    let more = candle_core::safetensors::load_buffer(&more, &Device::Cpu).expect("weights");
    let more = more[&format!("{INPUT}.more")]
        .to_dtype(DType::F16)
        .expect("f16");
    let wider = Tensor::cat(&[&tensors[INPUT], &more], 1).expect("same shape otherwise");
    tensors.insert(INPUT.into(), wider);
    let metadata = HashMap::from([("sdgen.head_dim".to_string(), "16".to_string())]);
    safetensors::serialize(tensors.iter(), Some(metadata)).expect("serializes")
}

/// A field of a case; missing fields are a mistake in the case.
fn field<'a>(case: &'a Value, key: &str) -> &'a Value {
    case.get(key)
        .unwrap_or_else(|| panic!("no `{key}` in {case}"))
}

fn number(value: &Value) -> usize {
    usize::try_from(value.as_u64().expect("a whole number")).expect("small")
}

fn real(value: &Value) -> f32 {
    value.as_f64().expect("a number") as f32
}

fn pair(value: &Value) -> (usize, usize) {
    (number(&value[0]), number(&value[1]))
}

/// The prompt as typed: `text` where `prompt` is what the prompt language makes of it.
fn typed(case: &Value) -> String {
    let text = case.get("text").unwrap_or_else(|| field(case, "prompt"));
    text.as_str().expect("a text").to_string()
}

/// An optional text.
fn words(case: &Value, key: &str) -> String {
    let text = case.get(key).and_then(Value::as_str);
    text.unwrap_or_default().to_string()
}

fn picture(name: &Value) -> image::DynamicImage {
    let name = name.as_str().expect("a file name");
    image::open(golden::path(&format!("modes/{name}"))).expect("golden PNG")
}

/// The request of a golden case.
fn of_case(case: &Value) -> GenerateRequest {
    let sampler = |name: &Value| Sampler::find(name.as_str().expect("a name")).expect("known");
    let size = (number(field(case, "width")), number(field(case, "height")));
    GenerateRequest {
        prompt: typed(case),
        negative_prompt: words(case, "negative"),
        seed: field(case, "seed").as_u64().expect("a seed"),
        subseed: case
            .get("subseed")
            .map_or(0, |s| s.as_u64().expect("a seed")),
        subseed_strength: case.get("subseed_strength").map_or(0.0, real),
        seed_resize_from: case.get("seed_resize_from").map(pair),
        sampler: sampler(field(case, "sampler")),
        scheduler: scheduler(field(case, "scheduler")),
        steps: number(field(case, "steps")),
        cfg_scale: real(field(case, "cfg")),
        width: size.0,
        height: size.1,
        batch_size: number(field(case, "batch")),
        batch_count: number(field(case, "batches")),
        tiling: field(case, "tiling").as_bool().expect("a switch"),
        noise_source: NoiseSource::Cpu,
        keep_latents: true,
        init_image: case.get("img2img").map(|i2i| init_image(i2i, size)),
        hires: case.get("hires").map(|hires| Hires {
            size: hires.get("resize").map_or_else(
                || HiresSize::Scale(field(hires, "scale").as_f64().expect("a number")),
                |resize| HiresSize::Resize(pair(resize).0, pair(resize).1),
            ),
            upscaler: HiresUpscaler::find(field(hires, "upscaler").as_str().expect("a name"))
                .expect("known"),
            steps: hires.get("steps").map_or(0, number),
            strength: real(field(hires, "strength")),
            sampler: hires.get("sampler").map(sampler),
            scheduler: hires.get("scheduler").map(scheduler),
            prompt: words(hires, "prompt"),
            negative_prompt: words(hires, "negative"),
            cfg_scale: hires.get("cfg").map(real),
            checkpoint: None,
        }),
        refiner: case.get("refiner").map(refiner),
        ..GenerateRequest::default()
    }
}

fn refiner(refiner: &Value) -> Refiner {
    let named = |passes: &RefinerPasses| refiner.get("passes").is_some_and(|p| p == passes.label());
    Refiner {
        passes: RefinerPasses::ALL
            .into_iter()
            .find(named)
            .unwrap_or(RefinerPasses::Second),
        ..Refiner::new(MODELS.refiner.clone(), real(field(refiner, "switch_at")))
    }
}

fn scheduler(name: &Value) -> Scheduler {
    Scheduler::find(name.as_str().expect("a name")).expect("known")
}

fn init_image(i2i: &Value, size: (usize, usize)) -> InitImage {
    let names = field(i2i, "init").as_array().expect("names");
    let resize = match number(field(i2i, "resize_mode")) {
        0 => ImageResize::Pixels(ResizeMode::Stretch),
        1 => ImageResize::Pixels(ResizeMode::Crop),
        2 => ImageResize::Pixels(ResizeMode::Fill),
        _ => ImageResize::Latents,
    };
    let flag = |key: &str| i2i.get(key).is_some_and(|v| v.as_bool() == Some(true));
    InitImage {
        pictures: Arc::new(names.iter().map(|n| picture(n).into_rgb8()).collect()),
        resize,
        upscaler: PictureUpscaler::None,
        strength: real(field(i2i, "strength")),
        exact_steps: if flag("exact") {
            ExactSteps::Yes
        } else {
            ExactSteps::No
        },
        noise_multiplier: i2i.get("noise_multiplier").map_or(1.0, real),
        extra_noise: i2i.get("extra_noise").map_or(0.0, real),
        color_correction: flag("color_correction"),
        color_source: None,
        mask: i2i.get("mask").map(|mask| inpaint(mask, resize, size)),
    }
}

fn inpaint(mask: &Value, resize: ImageResize, size: (usize, usize)) -> InpaintMask {
    let blur = pair(field(mask, "blur"));
    InpaintMask {
        mask: mask_from(&picture(field(mask, "file")), MaskEdge::Hard),
        options: MaskOptions {
            mode: if field(mask, "invert") == true {
                MaskMode::NotMasked
            } else {
                MaskMode::Masked
            },
            blur: (blur.0 as u32, blur.1 as u32),
            area: match field(mask, "area").as_str() {
                Some("whole") => InpaintArea::WholePicture,
                _ => InpaintArea::OnlyMasked {
                    padding: number(field(mask, "padding")) as u32,
                },
            },
            resize_mode: match resize {
                ImageResize::Pixels(mode) => mode,
                ImageResize::Latents => ResizeMode::Fill,
            },
            size: (size.0 as u32, size.1 as u32),
        },
        content: match number(field(mask, "fill")) {
            0 => MaskedContent::Fill,
            1 => MaskedContent::Original,
            2 => MaskedContent::LatentNoise,
            _ => MaskedContent::LatentNothing,
        },
        edge: MaskEdge::Hard,
        soft: mask.get("soft").map(|soft| SoftInpainting {
            blend: SoftBlend {
                power: real(field(soft, "power")),
                scale: real(field(soft, "scale")),
                contrast: real(field(soft, "contrast")),
            },
            mask_influence: real(field(soft, "influence")),
            difference_threshold: real(field(soft, "threshold")),
            difference_contrast: real(field(soft, "difference_contrast")),
        }),
        overlay: field(mask, "overlay").as_bool().expect("a switch"),
        condition_weight: real(field(mask, "weight")),
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
#[track_caller]
fn assert_same_picture(name: &str, got: &image::RgbImage, want: &image::RgbImage) {
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

fn compare(case: &Value) {
    let name = field(case, "name").as_str().expect("a name");
    let model = match case.get("model").and_then(Value::as_str) {
        Some("inpainting") => &MODELS.inpainting,
        _ => &MODELS.tiny,
    };
    let result = model
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .generate(&of_case(case), &());
    let got = result.expect("generates");
    let want = std::fs::read(golden::path(&format!("modes/{name}.safetensors"))).expect("latents");
    let want = candle_core::safetensors::load_buffer(&want, &Device::Cpu).expect("latents");
    assert_close(
        name,
        &latents(&got),
        &golden::values(&want["latents"]),
        LATENTS,
    );
    assert_eq!(got.images.len(), number(field(case, "pictures")), "{name}");
    for (i, image) in got.images.iter().enumerate() {
        let want = picture(&Value::from(format!("{name}.{i}.png"))).into_rgb8();
        assert_same_picture(&format!("{name}.{i}"), &image.image, &want);
    }
}

/// Compares all cases whose name starts so, and names every one that differs.
#[track_caller]
fn compare_all(start: &str, expected: usize) {
    let cases = std::fs::read(golden::path("modes/modes.json")).expect("cases");
    let cases: Vec<Value> = serde_json::from_slice(&cases).expect("JSON");
    let named = |case: &&Value| {
        field(case, "name")
            .as_str()
            .expect("a name")
            .starts_with(start)
    };
    let cases: Vec<&Value> = cases.iter().filter(named).collect();
    assert_eq!(cases.len(), expected, "cases of {start}");
    let failed: Vec<&Value> = cases
        .into_iter()
        .filter(|case| std::panic::catch_unwind(|| compare(case)).is_err())
        .map(|case| &case["name"])
        .collect();
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn pictures_are_started_from_as_the_reference_does() {
    compare_all("image_", 17);
}

#[test]
fn masked_parts_are_painted_as_the_reference_does() {
    compare_all("inpaint_", 19);
}

#[test]
fn second_passes_equal_the_reference() {
    compare_all("hires_", 13);
}

#[test]
fn a_refiner_takes_over_as_in_the_reference() {
    compare_all("refiner_", 6);
}

#[test]
fn circular_padding_and_variation_seeds_equal_the_reference() {
    compare_all("tiling_", 2);
    compare_all("variation", 2);
}
