//! Text towers, UNet and VAE against `PyTorch` (diffusers, transformers, `open_clip`) on the tiny checkpoint.
//!
//! Tolerances are the golden data's own (`tests/golden/README.md`): text 2e-5 absolute, UNet and VAE 1e-4 of the largest
//! value. Both sides compute in f32; sums in another order differ by a few ulp per layer.

mod support {
    pub(crate) mod close;
    pub(crate) mod golden;
}

use candle_core::Tensor;
use sdgen::models::{TextTower, Unet, Vae};
use sdgen::nn::Placement;
use support::close::{Tolerance, assert_close};
use support::golden::{self, Golden, channels_first, values};

const TINY: &str = "tiny_sdxl.safetensors";
const TEXT: Tolerance = Tolerance {
    abs: 2e-5,
    rel_of_max: 0.0,
};
const MODEL: Tolerance = Tolerance {
    abs: 0.0,
    rel_of_max: 1e-4,
};

#[test]
fn text_towers_equal_the_reference_for_every_case() {
    let (file, want) = (golden::open(TINY), Golden::load("text.safetensors"));
    let place = Placement::cpu();
    let clip_l = TextTower::clip_l(&file, &place).expect("CLIP-L");
    let big_g = TextTower::big_g(&file, &place).expect("bigG");
    for case in 0..8 {
        let key = |name: &str| format!("case{case}.{name}");
        let l = clip_l
            .encode(&[want.chunk(&key("ids_l"))], &[])
            .expect("encode");
        let g = big_g
            .encode(&[want.chunk(&key("ids_g"))], &[])
            .expect("encode");
        assert_close(
            &key("hidden_l"),
            &values(&l.hidden),
            &want.values(&key("hidden_l")),
            TEXT,
        );
        assert_close(
            &key("hidden_g"),
            &values(&g.hidden),
            &want.values(&key("hidden_g")),
            TEXT,
        );
        assert_close(
            &key("pooled"),
            &values(&g.pooled.expect("bigG pools")),
            &want.values(&key("pooled")),
            TEXT,
        );
        let context = Tensor::cat(&[l.hidden, g.hidden], 2).expect("cat");
        assert_close(
            &key("context"),
            &values(&context),
            &want.values(&key("context")),
            TEXT,
        );
    }
}

#[test]
fn two_chunks_are_encoded_as_if_alone() {
    let (file, want) = (golden::open(TINY), Golden::load("text.safetensors"));
    let place = Placement::cpu();
    let l = TextTower::clip_l(&file, &place)
        .and_then(|t| Ok(t.encode(&[want.chunk("long.ids_l0"), want.chunk("long.ids_l1")], &[])?));
    let g = TextTower::big_g(&file, &place)
        .and_then(|t| Ok(t.encode(&[want.chunk("long.ids_g0"), want.chunk("long.ids_g1")], &[])?));
    let (l, g) = (l.expect("CLIP-L"), g.expect("bigG"));
    let context = Tensor::cat(&[l.hidden, g.hidden], 2).expect("cat");
    assert_close(
        "long.context",
        &values(&context),
        &want.values("long.context"),
        TEXT,
    );
    let pooled = g
        .pooled
        .expect("bigG pools")
        .narrow(0, 0, 1)
        .expect("first chunk");
    assert_close(
        "long.pooled",
        &values(&pooled),
        &want.values("long.pooled"),
        TEXT,
    );
}

#[test]
fn unet_equals_the_reference_with_its_intermediate_activations() {
    let (file, want) = (golden::open(TINY), Golden::load("unet.safetensors"));
    let unet = Unet::new(&file, &Placement::cpu()).expect("UNet");
    for case in 0..3 {
        let key = |name: &str| format!("case{case}.{name}");
        let conditioning = unet
            .condition(want.tensor(&key("context")), want.tensor(&key("y")))
            .expect("condition");
        let act = |name: &str| format!("case{case}.act.{name}");
        let mut seen = 0;
        let mut observe = |stage: &str, h: &Tensor| {
            let name = match stage {
                "input_blocks.0.0" => "after_conv_in",
                "input_blocks.1.0" => "after_input_block_1",
                "input_blocks.4.0" => "after_input_block_4_res",
                "input_blocks.4.1" => "after_input_block_4",
                "middle_block.2" => "after_middle",
                "output_blocks.0.1" => "after_output_block_0",
                "label_emb" | "emb" if want.has(&act("after_label_embedding")) => {
                    let mut sum = want.values(&act("after_label_embedding"));
                    if stage == "emb" {
                        let time = want.values(&act("after_time_embedding"));
                        sum.iter_mut().zip(time).for_each(|(s, t)| *s += t);
                    }
                    assert_close(&act(stage), &values(h), &sum, MODEL);
                    seen += 1;
                    return;
                }
                _ => return,
            };
            if want.has(&act(name)) {
                assert_close(
                    &act(name),
                    &channels_first(h),
                    &want.values(&act(name)),
                    MODEL,
                );
                seen += 1;
            }
        };
        let x = want.channels_last(&key("x"));
        let eps = unet
            .forward_observed(&x, &want.values(&key("t")), &conditioning, &mut observe)
            .expect("forward");
        assert_close(
            &key("eps"),
            &channels_first(&eps),
            &want.values(&key("eps")),
            MODEL,
        );
        assert_eq!(
            seen,
            if case == 0 { 8 } else { 0 },
            "stored activations compared"
        );
    }
}

#[test]
fn vae_encodes_and_decodes_as_the_reference() {
    let (file, want) = (golden::open(TINY), Golden::load("vae.safetensors"));
    let vae = Vae::new(&file, "first_stage_model.", &Placement::cpu()).expect("VAE");
    for case in 0..2 {
        let key = |name: &str| format!("case{case}.{name}");
        let (mean, logvar) = vae
            .encode(&want.channels_last(&key("image")))
            .expect("encode");
        assert_close(
            &key("mean"),
            &channels_first(&mean),
            &want.values(&key("mean")),
            MODEL,
        );
        let clamped: Vec<f32> = want
            .values(&key("logvar"))
            .iter()
            .map(|v| v.clamp(-30.0, 20.0))
            .collect();
        assert_close(&key("logvar"), &channels_first(&logvar), &clamped, MODEL);
        let scaled = (mean * f64::from(sdgen::models::vae::SCALE)).expect("scale");
        assert_close(
            &key("latent_mode"),
            &channels_first(&scaled),
            &want.values(&key("latent_mode")),
            MODEL,
        );
        let decoded = vae.decode(&want.channels_last(&key("z"))).expect("decode");
        assert_close(
            &key("decoded"),
            &channels_first(&decoded),
            &want.values(&key("decoded")),
            MODEL,
        );
    }
}
