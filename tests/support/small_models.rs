//! Tiny stand-ins of the VAE with seeded weights, and the demo model's VAE as a file of its own.

#![allow(
    dead_code,
    reason = "every test file uses its own part of the shared code"
)]

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use sdgen::weights::{Source, demo};

/// Named tensors of a model file.
pub(crate) type Weights = HashMap<String, Tensor>;

/// Channels inside a tiny TAESD; the published model has 64.
const WIDTH: usize = 8;

/// Seeded values in [-amplitude, amplitude).
pub(crate) fn noise(shape: &[usize], seed: u64, amplitude: f32) -> Tensor {
    let mut state = seed * 2 + 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * amplitude
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("shape fits")
}

fn conv(weights: &mut Weights, key: &str, [outputs, inputs, kernel]: [usize; 3], bias: bool) {
    let seed = weights.len() as u64 + 7;
    let amplitude = (3.0 / (kernel * kernel * inputs) as f32).sqrt();
    let weight = noise(&[outputs, inputs, kernel, kernel], seed, amplitude);
    weights.insert(format!("{key}.weight"), weight);
    if bias {
        weights.insert(format!("{key}.bias"), noise(&[outputs], seed, 0.1));
    }
}

fn block(weights: &mut Weights, index: usize) {
    for part in [0, 2, 4] {
        let key = format!("{index}.conv.{part}");
        conv(weights, &key, [WIDTH, WIDTH, 3], true);
    }
}

/// TAESD's decoder with the published layers.
pub(crate) fn taesd_decoder() -> Weights {
    let mut w = Weights::new();
    conv(&mut w, "1", [WIDTH, 4, 3], true);
    for (blocks, up) in [(3, 7), (8, 12), (13, 17)] {
        (blocks..blocks + 3).for_each(|i| block(&mut w, i));
        conv(&mut w, &up.to_string(), [WIDTH, WIDTH, 3], false);
    }
    block(&mut w, 18);
    conv(&mut w, "19", [3, WIDTH, 3], true);
    w
}

/// TAESD's encoder with the published layers.
pub(crate) fn taesd_encoder() -> Weights {
    let mut w = Weights::new();
    conv(&mut w, "0", [WIDTH, 3, 3], true);
    block(&mut w, 1);
    for down in [2, 6, 10] {
        conv(&mut w, &down.to_string(), [WIDTH, WIDTH, 3], false);
        (down + 1..down + 4).for_each(|i| block(&mut w, i));
    }
    conv(&mut w, "14", [4, WIDTH, 3], true);
    w
}

/// A1111's approximation network.
pub(crate) fn approx_nn() -> Weights {
    let mut w = Weights::new();
    let widths = [4, 8, 16, 32, 64, 32, 16, 8, 3];
    for (i, pair) in widths.windows(2).enumerate() {
        let kernel = [7, 5].get(i).copied().unwrap_or(3);
        let key = format!("conv{}", i + 1);
        conv(&mut w, &key, [pair[1], pair[0], kernel], true);
    }
    w
}

/// The demo model's VAE without prefix.
pub(crate) fn demo_vae() -> Weights {
    let file = demo::open().expect("embedded");
    let keys = file.keys();
    let inside = keys
        .into_iter()
        .filter_map(|key| Some((key, key.strip_prefix("first_stage_model.")?)));
    inside
        .map(|(key, name)| {
            let shape = file.shape(key).expect("listed").to_vec();
            let values = file.read(key).expect("readable");
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu);
            (name.to_string(), tensor.expect("shape fits"))
        })
        .collect()
}

/// The same under diffusers' names, attention as linear layers.
pub(crate) fn diffusers_names(vae: &Weights) -> Weights {
    let rename = |key: &str| {
        let mut name = key
            .replace("norm_out", "conv_norm_out")
            .replace("nin_shortcut", "conv_shortcut")
            .replace("mid.block_1", "mid_block.resnets.0")
            .replace("mid.block_2", "mid_block.resnets.1")
            .replace("mid.attn_1.norm", "mid_block.attentions.0.group_norm")
            .replace("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0")
            .replace("mid.attn_1.", "mid_block.attentions.0.to_")
            .replace("downsample.conv", "downsamplers.0.conv")
            .replace("upsample.conv", "upsamplers.0.conv")
            .replace(".block.", ".resnets.");
        for i in 0..4 {
            name = name.replace(
                &format!("encoder.down.{i}"),
                &format!("encoder.down_blocks.{i}"),
            );
            name = name.replace(
                &format!("decoder.up.{i}"),
                &format!("decoder.up_blocks.{}", 3 - i),
            );
        }
        name
    };
    let flat = |key: &str, tensor: &Tensor| match tensor.dims() {
        &[a, b, 1, 1] if key.contains("attn_1") => tensor.reshape((a, b)).expect("same size"),
        _ => tensor.clone(),
    };
    vae.iter()
        .map(|(key, tensor)| (rename(key), flat(key, tensor)))
        .collect()
}

/// Writes a model file, its directory too.
pub(crate) fn write(weights: &Weights, path: &Path) {
    std::fs::create_dir_all(path.parent().expect("in a directory")).expect("created");
    let bytes = safetensors::serialize(weights, None).expect("serialises");
    std::fs::write(path, bytes).expect("written");
}
