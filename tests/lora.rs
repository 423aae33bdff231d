//! LoRAs and textual inversions: every type against numpy, merged weights and outputs against `PyTorch`, sets put on and off,
//! files that do not fit.
//!
//! Tolerances: merged weights 1e-6 absolute for the golden LoRAs (their own README), 5e-7 of the largest value for the toy
//! types, which numpy computes in f64; outputs 1e-4 of the largest value, as for the plain models.

mod support {
    pub(crate) mod close;
    pub(crate) mod golden;
    pub(crate) mod tensors;
}

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use sdgen::models::Unet;
use sdgen::nn::{Placement, Rewrite};
use sdgen::pipeline::conditioning::{EncodeOptions, EncodedText, TextEncoder};
use sdgen::pipeline::merged::MergedNetworks;
use sdgen::pipeline::networks::{KnownLora, NetworkFile};
use sdgen::pipeline::{
    CheckpointIdentity, CheckpointSource, GenerateRequest, Generated, Hires, HiresSize,
    HiresUpscaler, LoadOptions, Pipeline,
};
use sdgen::prompt::{ScheduleSteps, Tokenizer};
use sdgen::rng::NoiseSource;
use sdgen::weights::embedding::Embedding;
use sdgen::weights::lora::{LoraFile, Plan, Targets, Use};
use sdgen::weights::{SafetensorsFile, Source};
use support::close::{Tolerance, assert_close};
use support::golden::{self, Golden, channels_first};
use support::tensors::Tensors;

const TINY: &str = "tiny_sdxl.safetensors";
const TOY: Tolerance = Tolerance {
    abs: 0.0,
    rel_of_max: 5e-7,
};
const MERGED: Tolerance = Tolerance {
    abs: 1e-6,
    rel_of_max: 0.0,
};
const OUTPUT: Tolerance = Tolerance {
    abs: 0.0,
    rel_of_max: 1e-4,
};

/// The bytes of a safetensors file of `f32` tensors.
fn bytes(tensors: &[(&str, &[usize], &[f32])]) -> Vec<u8> {
    let stored: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, _, values)| values.iter().flat_map(|v| v.to_le_bytes()).collect())
        .collect();
    let views = tensors.iter().zip(&stored).map(|((key, shape, _), data)| {
        let view = TensorView::new(Dtype::F32, shape.to_vec(), data).expect("shape fits");
        (*key, view)
    });
    safetensors::serialize(views, None).expect("serializes")
}

fn open(tensors: &[(&str, &[usize], &[f32])]) -> SafetensorsFile {
    SafetensorsFile::from_vec(Path::new("toy.safetensors"), bytes(tensors)).expect("a valid file")
}

#[test]
fn every_type_follows_its_formula() {
    const TYPES: [&str; 35] = [
        "lora",
        "lora_noalpha",
        "lora_scale",
        "lora_dyn",
        "lora_bias",
        "locon",
        "locon_cp",
        "lora_1x1",
        "inpaint_conv_in",
        "loha",
        "loha_tucker",
        "lokr_full",
        "lokr_factored",
        "lokr_w1_factored",
        "lokr_conv",
        "lokr_conv_flat",
        "lokr_tucker",
        "ia3_output",
        "ia3_input",
        "ia3_conv_input",
        "full",
        "full_bias_only",
        "norm",
        "glora",
        "oft",
        "oft_constraint",
        "oft_rescale",
        "oft_diag",
        "boft",
        "dora",
        "dora_conv",
        "dora_output",
        "dora_peft",
        "dora_loha",
        "dora_lokr",
    ];
    let want = Tensors::open("lora/types.safetensors");
    for case in TYPES {
        let (shape, weight) = want.get(&format!("{case}.weight"));
        let key = "model.diffusion_model.out.2.weight";
        let checkpoint = open(&[(key, &shape, &weight)]);
        let prefix = format!("{case}.part.");
        let parts: Vec<(String, Vec<usize>, Vec<f32>)> = want
            .names()
            .into_iter()
            .filter_map(|name| {
                let part = name.strip_prefix(&prefix)?;
                let (shape, values) = want.get(&name);
                Some((format!("lora_unet_out_2.{part}"), shape, values))
            })
            .collect();
        assert!(!parts.is_empty(), "{case} has parts");
        let parts: Vec<_> = parts
            .iter()
            .map(|(k, s, v)| (k.as_str(), &s[..], &v[..]))
            .collect();
        let file = LoraFile::new(open(&parts));
        let used = Use {
            file: &file,
            te_multiplier: 9.0,
            unet_multiplier: 0.7,
            dyn_dim: want
                .try_get(&format!("{case}.dyn"))
                .map(|(_, v)| v[0] as usize),
        };
        let plan = Plan::new(&Targets::new(&checkpoint), &[used]);
        let merged = plan
            .merge(&checkpoint, key)
            .expect("the checkpoint is readable");
        assert_eq!(merged.failures, [0usize; 0], "{case}");
        assert_close(
            case,
            &merged.weight,
            &want.values(&format!("{case}.merged")),
            TOY,
        );
        match want.try_get(&format!("{case}.bias")) {
            Some((_, bias)) => assert_close(case, &merged.bias.expect("a bias"), &bias, TOY),
            None => assert_eq!(merged.bias, None, "{case}"),
        }
    }
}

/// The tiny checkpoint with a folder of LoRA files beside it.
struct Model {
    source: SafetensorsFile,
    text: TextEncoder,
    unet: Unet,
    networks: MergedNetworks,
    folder: tempfile::TempDir,
}

impl Model {
    fn load() -> Self {
        let (source, place) = (golden::open(TINY), Placement::cpu());
        let text = TextEncoder::load(
            &source,
            sdgen::weights::detect::Kind::Sdxl,
            Arc::new(Tokenizer::new()),
            &place,
        );
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["unet_linear", "full_te", "locon_noalpha"] {
            let bytes = golden::unpack(&format!("lora/{name}.safetensors"));
            std::fs::write(folder.path().join(format!("{name}.safetensors")), bytes)
                .expect("written");
        }
        Self {
            text: text.expect("text encoders"),
            unet: Unet::new(&source, &place).expect("UNet"),
            networks: MergedNetworks::default(),
            source,
            folder,
        }
    }

    fn network(&self, name: &str, te: f32, unet: f32) -> NetworkFile {
        NetworkFile {
            name: name.into(),
            path: self.path(name),
            te_multiplier: te,
            unet_multiplier: unet,
            dyn_dim: None,
            hash: "0123456789ab".into(),
            modified: None,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.safetensors"))
    }

    fn switch(&mut self, wanted: &[NetworkFile]) -> bool {
        let mut layers: Vec<&mut dyn Rewrite> = self.text.layers_mut();
        layers.extend(self.unet.layers_mut());
        let changed = self.networks.switch(wanted, &self.source, layers);
        changed.expect("the checkpoint is readable")
    }

    fn encode(&self, prompt: &str) -> EncodedText {
        let encoded = self
            .text
            .encode(&[prompt.to_string()], EncodeOptions::default());
        encoded.expect("encodes").remove(0)
    }

    /// `eps`, `context` and `pooled` as the golden files have them.
    fn outputs(&self, inputs: &Golden) -> [(&'static str, Vec<f32>); 3] {
        let text = self.encode("a photo of a cat");
        let conditioning = self
            .unet
            .condition(inputs.tensor("case0.context"), inputs.tensor("case0.y"))
            .expect("condition");
        let x = inputs.channels_last("case0.x");
        let eps = self
            .unet
            .forward(&x, &inputs.values("case0.t"), &conditioning)
            .expect("forward");
        [
            ("eps", channels_first(&eps)),
            ("context", text.context),
            ("pooled", text.pooled),
        ]
    }
}

/// The golden files with their multipliers for text encoders and UNet.
const FILES: [(&str, f32, f32); 3] = [
    ("unet_linear", 0.8, 0.8),
    ("full_te", 0.5, 1.0),
    ("locon_noalpha", 0.7, -0.6),
];

#[test]
fn merged_weights_equal_the_reference() {
    let (source, want) = (
        golden::open(TINY),
        Golden::load("lora/expected.safetensors"),
    );
    let targets = Targets::new(&source);
    for (name, te_multiplier, unet_multiplier) in FILES {
        let file = LoraFile::new(golden::open(&format!("lora/{name}.safetensors")));
        let used = Use {
            file: &file,
            te_multiplier,
            unet_multiplier,
            dyn_dim: None,
        };
        let plan = Plan::new(&targets, &[used]);
        assert_eq!(
            plan.matched(),
            [file.modules()],
            "{name}: every module has its tensor"
        );
        let prefix = format!("{name}.merged.");
        let keys: Vec<&str> = want
            .names()
            .filter_map(|key| key.strip_prefix(&prefix))
            .collect();
        assert!(keys.len() >= 4, "{name}");
        for key in keys {
            let merged = plan.merge(&source, key).expect("readable");
            assert_eq!(merged.failures, [0usize; 0], "{key}");
            assert_close(
                key,
                &merged.weight,
                &want.values(&format!("{prefix}{key}")),
                MERGED,
            );
        }
    }
}

#[test]
fn outputs_with_one_or_two_loras_equal_the_reference_in_any_order_of_switching() {
    let (inputs, want) = (
        Golden::load("unet.safetensors"),
        Golden::load("lora/expected.safetensors"),
    );
    let mut model = Model::load();
    let plain = model.outputs(&inputs);
    let mut sets: Vec<(&str, Vec<NetworkFile>)> = FILES
        .iter()
        .map(|(name, te, unet)| (*name, vec![model.network(name, *te, *unet)]))
        .collect();
    let stacked = vec![
        model.network("unet_linear", 0.8, 0.8),
        model.network("full_te", 0.4, 0.4),
    ];
    sets.insert(1, ("stacked", stacked));
    for (name, set) in sets {
        assert!(model.switch(&set), "{name}");
        for (output, got) in model.outputs(&inputs) {
            let name = format!("{name}.{output}");
            assert_close(&name, &got, &want.values(&name), OUTPUT);
        }
        assert!(!model.switch(&set), "{name} is there already");
        assert_eq!(model.networks.comments(), [""; 0], "{name}");
    }
    model.switch(&[]);
    assert_eq!(
        model.outputs(&inputs),
        plain,
        "the empty set is the checkpoint, bit by bit"
    );
}

#[test]
fn a_multiplier_of_zero_changes_nothing_but_counts_as_applied() {
    let inputs = Golden::load("unet.safetensors");
    let mut model = Model::load();
    let plain = model.outputs(&inputs);
    let set = [model.network("full_te", 0.0, 0.0)];
    assert!(model.switch(&set));
    assert_eq!(model.outputs(&inputs), plain);
    assert_eq!(model.networks.hashes(), ["full_te: 0123456789ab"]);
}

#[test]
fn what_does_not_fit_is_skipped_counted_and_named() {
    let mut model = Model::load();
    let write =
        |name: &str, bytes: &[u8]| std::fs::write(model.path(name), bytes).expect("written");
    let (two, nan) = ([1.0; 2], [f32::NAN; 4]);
    // A tensor of SD 1's width under a name that SDXL has too, one that fits nothing, and one of no type.
    let query = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q";
    let wrong = bytes(&[
        (&format!("{query}.lora_up.weight"), &[2, 1], &two),
        (&format!("{query}.lora_down.weight"), &[1, 2], &two),
        ("lora_unet_out_2.hada_w1_a", &[2, 1], &two),
        ("lora_unet_out_0.diff", &[4], &nan),
        ("lora_unet_time_embed_0.what", &[2], &two),
        (
            "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
            &[],
            &[1.0],
        ),
    ]);
    write("wrong", &wrong);
    let flux = "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight";
    write("flux", &bytes(&[(flux, &[2, 1], &two)]));
    write("pickle", b"PK\x03\x04 not safetensors");
    write("short", &wrong[..wrong.len() - 4]);
    write("huge", &u64::MAX.to_le_bytes());
    let inputs = Golden::load("unet.safetensors");
    let plain = model.outputs(&inputs);
    let names = ["wrong", "flux", "pickle", "short", "huge", "gone"];
    let set = names.map(|name| model.network(name, 1.0, 1.0));
    assert!(model.switch(&set));
    assert_eq!(model.outputs(&inputs), plain);
    let comments = model.networks.comments();
    for (start, part) in [
        ("LoRA `flux` has no effect", "none of its 1 modules"),
        ("LoRA `pickle` cannot be used", "pickled"),
        ("LoRA `short` cannot be used", "truncated"),
        ("LoRA `huge` cannot be used", "not a safetensors file"),
        ("LoRA `gone` cannot be used", "cannot read"),
        ("Networks with errors: wrong (4)", ""),
    ] {
        let found = comments
            .iter()
            .any(|c| c.starts_with(start) && c.contains(part));
        assert!(found, "{start} … {part}: {comments:#?}");
    }
    assert_eq!(comments.len(), 6, "{comments:#?}");
    assert_eq!(
        model.networks.hashes(),
        ["wrong: 0123456789ab", "flux: 0123456789ab"]
    );
}

#[test]
fn diffusers_names_give_the_weights_that_kohya_names_give() {
    let source = golden::open(TINY);
    let up: Vec<f32> = (0..64).map(|i| (i as f32).sin()).collect();
    let pairs = [
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_q",
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q",
        ),
        (
            "lora_te2_text_model_encoder_layers_1_self_attn_v_proj",
            "text_encoder_2.text_model.encoder.layers.1.self_attn.v_proj",
        ),
        (
            "lora_te1_text_model_encoder_layers_0_mlp_fc2",
            "text_encoder.text_model.encoder.layers.0.mlp.fc2",
        ),
    ];
    let targets = Targets::new(&source);
    for (kohya, diffusers) in pairs {
        let target = targets.find(kohya).expect("part of the checkpoint");
        let inputs = source.shape(&target.weight).expect("there")[1];
        let outputs = target.rows.len();
        let matrix = |n: usize| up.iter().copied().cycle().take(n).collect::<Vec<f32>>();
        let (u, d) = (matrix(outputs), matrix(inputs));
        let merged = |up: String, down: String| {
            let file = LoraFile::new(open(&[(&up, &[outputs, 1], &u), (&down, &[1, inputs], &d)]));
            let used = Use {
                file: &file,
                te_multiplier: 0.5,
                unet_multiplier: 0.5,
                dyn_dim: None,
            };
            let plan = Plan::new(&targets, &[used]);
            let merged = plan.merge(&source, &target.weight).expect("readable");
            assert_eq!(merged.failures, [0usize; 0]);
            merged.weight
        };
        let first = merged(
            format!("{kohya}.lora_up.weight"),
            format!("{kohya}.lora_down.weight"),
        );
        let second = merged(
            format!("{diffusers}.lora_B.weight"),
            format!("{diffusers}.lora_A.weight"),
        );
        assert_eq!(first, second, "{kohya}");
        assert_ne!(first, source.read(&target.weight).expect("there"));
    }
}

#[test]
fn a_textual_inversion_of_a_words_own_vectors_is_that_word() {
    let mut model = Model::load();
    let row = |key: &str, id: usize| {
        let width = model.source.shape(key).expect("there")[1];
        model.source.read(key).expect("readable")[id * width..][..width].to_vec()
    };
    // `cat` is token 2368.
    let embedding = |name: &str| {
        Arc::new(Embedding {
            name: name.into(),
            shorthash: "abcdef012345".into(),
            vectors: 1,
            clip_l: row(
                "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
                2368,
            ),
            clip_g: row("conditioner.embedders.1.model.token_embedding.weight", 2368),
        })
    };
    let given = vec![embedding("Photo Word"), embedding("unused")];
    let want = model.encode("a cat, (cat:1.2)");
    model.text.set_embeddings(given);
    let got = model.encode("a photo word, (PHOTO WORD:1.2)");
    assert_eq!(got.context.len(), want.context.len());
    // Only the ids differ: 0 stands where a vector goes.
    assert_eq!(got, want);
    let steps = ScheduleSteps {
        base: 4,
        hires: None,
    };
    let prompts = model
        .text
        .prompts(
            "photo word",
            "a photo word",
            steps,
            EncodeOptions::default(),
        )
        .expect("encodes");
    let hashes: Vec<String> = prompts.embedding_hashes().collect();
    assert_eq!(
        hashes, ["Photo Word: abcdef012345"; 2],
        "positive and negative"
    );
}

/// A small job on the tiny checkpoint that knows the golden LoRAs.
fn job(model: &Model, prompt: &str) -> GenerateRequest {
    let known = FILES.map(|(name, ..)| {
        let lora = KnownLora {
            path: model.path(name),
            hash: format!("hash of {name}"),
            modified: None,
        };
        (name.to_string(), lora)
    });
    GenerateRequest {
        prompt: prompt.into(),
        seed: 1,
        steps: 2,
        width: 64,
        height: 64,
        batch_count: 2,
        noise_source: NoiseSource::Cpu,
        keep_latents: true,
        loras: Some(known.into()),
        ..GenerateRequest::default()
    }
}

fn latents(done: &Generated) -> Vec<&[f32]> {
    let images = done.images.iter();
    images
        .map(|image| image.latents.as_deref().expect("kept"))
        .collect()
}

#[test]
fn a_job_puts_its_networks_on_and_each_pass_its_own() {
    let model = Model::load();
    let path = model.folder.path().join("tiny.safetensors");
    std::fs::write(&path, golden::unpack(TINY)).expect("written");
    let options = LoadOptions {
        latents_on_device: false,
        device: Device::Cpu,
        dtype: DType::F32,
        vae: None,
    };
    let source = CheckpointSource::File(path);
    let mut pipeline =
        Pipeline::load(&source, CheckpointIdentity::default(), &options).expect("loads");
    let mut run = |request: &GenerateRequest| pipeline.generate(request, &()).expect("a picture");
    let hires = |prompt: &str| {
        Some(Hires {
            size: HiresSize::Scale(2.0),
            upscaler: HiresUpscaler::find("Latent").expect("an upscaler"),
            steps: 2,
            strength: 0.7,
            prompt: prompt.into(),
            ..Hires::default()
        })
    };
    let plain = run(&job(&model, "a cat"));
    let tagged = "a cat<lora:full_te:1> <lora:none:1><hypernet:old:1>";
    let with_lora = run(&job(&model, tagged));
    assert_ne!(latents(&with_lora), latents(&plain));
    assert_eq!(
        with_lora.comments,
        [
            "Lora not found: none",
            "Hypernetworks are not supported: `<hypernet:old>` was ignored"
        ]
    );
    let infotext = &with_lora.images[0].infotext;
    assert!(
        infotext.contains("Lora hashes: \"full_te: hash of full_te\", "),
        "{infotext}"
    );
    let ignored = GenerateRequest {
        loras: None,
        ..job(&model, "a cat<lora:full_te:1>")
    };
    let ignored = run(&ignored);
    assert_eq!(
        (latents(&ignored), ignored.comments.len()),
        (latents(&plain), 0)
    );

    let twice = |prompt: &str, second: &str| GenerateRequest {
        hires: hires(second),
        ..job(&model, prompt)
    };
    let both = run(&twice("a cat<lora:full_te:1>", ""));
    let first_only = run(&twice("a cat<lora:full_te:1>", "a cat"));
    let second_only = run(&twice("a cat", "a cat<lora:full_te:1>"));
    let neither = run(&twice("a cat", ""));
    let results = [&both, &first_only, &second_only, &neither].map(latents);
    for (i, one) in results.iter().enumerate() {
        assert!(results[..i].iter().all(|other| other != one), "case {i}");
    }
    assert_eq!(
        latents(&run(&twice("a cat<lora:full_te:1>", "a cat"))),
        results[1]
    );
    assert!(second_only.images[0].infotext.contains("Lora hashes"));
    // Encoded as the first pass is, the second pass's LoRA acts on its UNet alone.
    let mut request = twice("a cat", "a cat<lora:full_te:1>");
    request.settings.firstpass_conds = true;
    let first_conds = run(&request);
    assert_ne!(latents(&first_conds), latents(&second_only));
    assert!(first_conds.images[0].infotext.contains("Lora hashes"));
    assert_eq!(
        latents(&run(&job(&model, "a cat"))),
        latents(&plain),
        "no trace"
    );

    let bad = pipeline.generate(&job(&model, "<lora:full_te:much>"), &());
    let message = bad.expect_err("not a number").to_string();
    assert_eq!(
        message,
        "`<lora:full_te:…>`: multiplier `much` is not a number"
    );
}

#[test]
fn embeddings_packed_into_a_lora_are_words_while_it_is_applied() {
    let file = LoraFile::new(open(&[
        ("bundle_emb.neg.one.clip_l", &[2, 3], &[1.0; 6]),
        ("bundle_emb.neg.one.clip_g", &[2, 5], &[2.0; 10]),
        ("bundle_emb.old.string_to_param.*", &[2, 3], &[1.0; 6]),
        ("lora_unet_out_2.alpha", &[], &[1.0]),
    ]));
    let embeddings = file.embeddings();
    assert_eq!((file.modules(), embeddings.len()), (1, 1));
    let Embedding {
        name,
        vectors,
        clip_l,
        clip_g,
        ..
    } = &embeddings[0];
    assert_eq!(
        (name.as_str(), *vectors, clip_l.len(), clip_g.len()),
        ("neg.one", 2, 6, 10)
    );
}
