//! Previews of a running job: what each method and each content shows, on the demo model and tiny stand-ins.

mod support {
    pub(crate) mod close;
    pub(crate) mod golden;
    pub(crate) mod small_models;
}

use std::cell::RefCell;
use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Tensor};
use image::RgbImage;
use sdgen::models::VaeApprox;
use sdgen::nn::Placement;
use sdgen::pipeline::{
    CheckpointIdentity, CheckpointSource, Codec, GenerateRequest, Generated, LoadOptions, Observer,
    Pipeline, PreviewMethod, PreviewOptions,
};
use sdgen::rng::NoiseSource;
use sdgen::sampling::PreviewContent;
use sdgen::weights::SafetensorsFile;
use support::close::{Tolerance, assert_close};
use support::golden::{channels_first, values};
use support::small_models::{self, Weights};

fn demo() -> Pipeline {
    let options = LoadOptions {
        latents_on_device: false,
        device: Device::Cpu,
        dtype: DType::F32,
        vae: None,
    };
    let source = CheckpointSource::Embedded;
    Pipeline::load(&source, CheckpointIdentity::default(), &options).expect("loads")
}

/// Wants every preview and keeps it.
#[derive(Default)]
struct Album(RefCell<Vec<RgbImage>>);

impl Observer for Album {
    fn wants_preview(&self) -> bool {
        true
    }
    fn preview(&self, image: RgbImage) {
        self.0.borrow_mut().push(image);
    }
}

fn request(preview: PreviewOptions) -> GenerateRequest {
    GenerateRequest {
        prompt: "a red apple".into(),
        negative_prompt: "a rocket".into(),
        seed: 7,
        steps: 2,
        cfg_scale: 4.0,
        width: 64,
        height: 48,
        noise_source: NoiseSource::Cpu,
        preview,
        ..GenerateRequest::default()
    }
}

fn run(pipeline: &mut Pipeline, request: &GenerateRequest) -> (Vec<RgbImage>, Generated) {
    let album = Album::default();
    let generated = pipeline.generate(request, &album).expect("runs");
    (album.0.into_inner(), generated)
}

fn method(method: PreviewMethod) -> PreviewOptions {
    PreviewOptions {
        method,
        ..PreviewOptions::default()
    }
}

#[test]
fn every_method_has_its_size_and_a_missing_file_falls_back() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = |name: &str, weights: &Weights| {
        let path = dir.path().join(name);
        small_models::write(weights, &path);
        path
    };
    let taesd = file("taesd.safetensors", &small_models::taesd_decoder());
    let approx = file("approx.safetensors", &small_models::approx_nn());
    let broken = file("broken.safetensors", &Weights::new());
    let mut pipeline = demo();
    let plain = pipeline.generate(&request(PreviewOptions::default()), &());
    let plain = plain.expect("runs").images.swap_remove(0).image;
    for (preview, size) in [
        (PreviewMethod::Cheap, (8, 6)),
        (PreviewMethod::ApproxNn(approx), (16, 12)),
        (PreviewMethod::Taesd(taesd), (64, 48)),
        (PreviewMethod::Full, (64, 48)),
        (PreviewMethod::Taesd(broken), (8, 6)),
        (PreviewMethod::ApproxNn("nowhere".into()), (8, 6)),
    ] {
        let (previews, generated) = run(&mut pipeline, &request(method(preview.clone())));
        let sizes: Vec<_> = previews.iter().map(RgbImage::dimensions).collect();
        assert_eq!(sizes, [size; 2], "{preview:?}");
        assert_eq!(
            generated.images[0].image, plain,
            "previews change nothing: {preview:?}"
        );
    }
    // The last call's prediction is not the final picture, but the VAE shows it as the final picture is shown.
    let (full, _) = run(&mut pipeline, &request(method(PreviewMethod::Full)));
    assert!(full[0] != full[1]);
}

#[test]
fn a_batch_is_one_sheet_or_its_first_picture() {
    let mut pipeline = demo();
    let mut batch = request(PreviewOptions::default());
    batch.batch_size = 3;
    let (sheets, _) = run(&mut pipeline, &batch);
    assert_eq!(sheets[0].dimensions(), (16, 12), "two by two");
    batch.preview.grid = false;
    let (firsts, _) = run(&mut pipeline, &batch);
    assert_eq!(firsts[0].dimensions(), (8, 6));
    let corner = image::imageops::crop_imm(&sheets[0], 0, 0, 8, 6).to_image();
    assert_eq!(firsts[0], corner);
}

#[test]
fn contents_are_the_prompts_the_negatives_and_their_combination() {
    let mut pipeline = demo();
    let mut first = |content, prompt: &str, negative: &str| {
        let mut request = request(PreviewOptions {
            content,
            ..PreviewOptions::default()
        });
        (request.prompt, request.negative_prompt) = (prompt.into(), negative.into());
        run(&mut pipeline, &request).0.swap_remove(0)
    };
    let cond = first(PreviewContent::Prompt, "a red apple", "a rocket");
    let uncond = first(PreviewContent::NegativePrompt, "a red apple", "a rocket");
    let combined = first(PreviewContent::Combined, "a red apple", "a rocket");
    // The first call sees the same noise whatever the prompts.
    assert_eq!(
        uncond,
        first(PreviewContent::Prompt, "a rocket", "a red apple")
    );
    assert!(cond != uncond && combined != cond);
    // The linear approximation of u + 4 (c - u) is the same sum of both approximations, but for truncation (below 1 + 4 + 3 steps
    // of the scale) and what is clamped.
    let mut compared = 0;
    for ((c, u), got) in cond.iter().zip(uncond.iter()).zip(combined.iter()) {
        let want = f32::from(*u) + 4.0 * (f32::from(*c) - f32::from(*u));
        if (5.0..250.0).contains(&want) && *c > 0 && *u > 0 && *c < 255 && *u < 255 {
            assert!((f32::from(*got) - want).abs() < 8.0, "{got} {want}");
            compared += 1;
        }
    }
    assert!(compared > 50, "{compared}");
}

/// The approximation network written out with candle's `[batch, channels, h, w]` operations.
fn approx_written_out(w: &Weights, z: &Tensor) -> Result<Tensor> {
    let (_, _, height, width) = z.dims4()?;
    let mut h = z.upsample_nearest2d(2 * height, 2 * width)?;
    h = h.pad_with_zeros(2, 11, 11)?.pad_with_zeros(3, 11, 11)?;
    for i in 1..=8 {
        h = h.conv2d(&w[&format!("conv{i}.weight")], 0, 1, 1, 1)?;
        h = h.broadcast_add(&w[&format!("conv{i}.bias")].reshape((1, (), 1, 1))?)?;
        h = (h.relu()? - (h.neg()?.relu()? * 0.1)?)?;
    }
    Ok(h)
}

#[test]
fn the_approximation_network_equals_its_layers_written_out() {
    let weights = small_models::approx_nn();
    let bytes = safetensors::serialize(&weights, None).expect("serialises");
    let file = SafetensorsFile::from_vec(Path::new("approx"), bytes).expect("valid");
    let network = VaeApprox::new(&file, &Placement::cpu()).expect("builds");
    let z = small_models::noise(&[2, 4, 5, 3], 1, 4.0);
    let last = z.permute((0, 2, 3, 1)).and_then(|z| z.contiguous());
    let got = network.forward(&last.expect("four dimensions"));
    let got = got.expect("runs");
    assert_eq!(got.dims(), [2, 10, 6, 3]);
    // The same f32 sums in another order, eight layers deep.
    assert_close(
        "approximation network",
        &channels_first(&got),
        &values(&approx_written_out(&weights, &z).expect("runs")),
        Tolerance {
            abs: 0.0,
            rel_of_max: 1e-5,
        },
    );
}

#[test]
fn taesd_decodes_and_encodes_in_place_of_the_vae() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (decoder, encoder) = (
        dir.path().join("d.safetensors"),
        dir.path().join("e.safetensors"),
    );
    small_models::write(&small_models::taesd_decoder(), &decoder);
    small_models::write(&small_models::taesd_encoder(), &encoder);
    let mut pipeline = demo();
    let mut job = request(PreviewOptions::default());
    job.keep_latents = true;
    let full = run(&mut pipeline, &job).1.images.swap_remove(0);
    assert!(!full.infotext.contains("VAE Decoder"), "{}", full.infotext);
    job.vae.decoder = Codec::Taesd(decoder.clone());
    let fast = run(&mut pipeline, &job).1.images.swap_remove(0);
    assert_eq!(full.latents, fast.latents);
    assert!(
        fast.infotext.contains(", VAE Decoder: TAESD, Version: "),
        "{}",
        fast.infotext
    );
    // Its picture is in [0, 1]: 8-bit values are its values times 255, truncated.
    let file = SafetensorsFile::open(&decoder).expect("opens");
    let side = sdgen::models::taesd::Side::Decoder;
    let taesd = sdgen::models::Taesd::new(&file, side, &Placement::cpu()).expect("builds");
    let z = Tensor::from_vec(fast.latents.expect("kept"), (1, 4, 6, 8), &Device::Cpu)
        .and_then(|z| z.permute((0, 2, 3, 1))?.contiguous());
    let picture = values(&taesd.forward(&z.expect("fits")).expect("runs"));
    for (got, want) in fast.image.iter().zip(picture) {
        // x * 2 - 1 and back rounds: the truncation may fall on the other side.
        let want = want.clamp(0.0, 1.0) * 255.0;
        assert!((f32::from(*got) + 0.5 - want).abs() < 0.501, "{got} {want}");
    }
    let as_it_was = pipeline.encode_picture(&[0.25; 3 * 64], 8, 8);
    let by_vae = as_it_was.expect("encodes");
    job.vae.encoder = Codec::Taesd(encoder);
    job.infotext.version = None;
    run(&mut pipeline, &job);
    let by_taesd = pipeline.encode_picture(&[0.25; 3 * 64], 8, 8);
    assert!(by_taesd.expect("encodes") != by_vae);
    let uneven = pipeline.encode_picture(&[0.25; 3 * 13 * 17], 17, 13);
    assert_eq!(uneven.expect("encodes").shape, [1, 4, 1, 2], "as the VAE");
}

#[test]
fn the_cheap_preview_costs_less_than_a_hundredth_of_a_step() {
    let mut pipeline = demo();
    let mut job = request(PreviewOptions::default());
    (job.width, job.height, job.steps) = (128, 128, 4);
    let clock = Instant::now();
    run(&mut pipeline, &job);
    let with_previews = clock.elapsed();
    // A1111's default is every tenth step and ours at most four a second; here is one for each call. Measured by itself:
    let latents = sdgen::rng::Latents::zeros([1, 4, 16, 16]);
    let clock = Instant::now();
    let mut made = 0;
    while made < 100 {
        assert!(sdgen::pipeline::preview::cheap(&latents).is_some());
        made += 1;
    }
    let each = clock.elapsed() / made;
    let step = with_previews / 4;
    eprintln!("cheap preview {each:?}, step {step:?}");
    assert!(
        each < step / 100 + Duration::from_micros(20),
        "{each:?} {step:?}"
    );
}
