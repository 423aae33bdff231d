//! Seeded random weights in the exact shape of SDXL base, for benchmarks: no download, no file.
//!
//! Each tensor depends on its key alone, so a written file and the source in memory are the same model (up to f16). Values
//! are uniform with variance 1/fan-in and norms are 1, so activations stay finite through the whole graph.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::View;

use super::detect::prefix;
use super::{Error, Source};

/// Values generated from one state of the generator.
const BLOCK: usize = 1 << 14;

/// A random checkpoint of SDXL base's shape.
#[derive(Debug)]
pub struct SyntheticSdxl {
    path: PathBuf,
    shapes: BTreeMap<String, Vec<usize>>,
}

impl Default for SyntheticSdxl {
    fn default() -> Self {
        Self::new()
    }
}

impl SyntheticSdxl {
    /// The 2,514 tensors of SDXL base 1.0.
    #[must_use]
    pub fn new() -> Self {
        let mut shapes = Shapes(BTreeMap::new());
        shapes.unet();
        shapes.vae();
        shapes.clip_l();
        shapes.big_g();
        Self {
            path: "synthetic-sdxl.safetensors".into(),
            shapes: shapes.0,
        }
    }

    /// Number of weights below a key prefix.
    #[must_use]
    pub fn parameters(&self, prefix: &str) -> usize {
        self.shapes
            .iter()
            .filter(|(k, _)| k.starts_with(prefix))
            .map(|(_, s)| s.iter().product::<usize>())
            .sum()
    }

    /// Writes the model as an f16 single file (6.9 GB), tensor by tensor.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), safetensors::SafeTensorError> {
        write_noise(&self.shapes, path)
    }
}

/// Writes noise (f16) in the given shapes to a file, tensor by tensor.
fn write_noise(
    shapes: &BTreeMap<String, Vec<usize>>,
    path: &Path,
) -> Result<(), safetensors::SafeTensorError> {
    let tensors = shapes
        .iter()
        .map(|(key, shape)| (key, HalfView { key, shape }));
    safetensors::serialize_to_file(tensors, None, path)
}

/// Writes a LoRA of seeded noise with kohya's names for every linear layer and convolution of a checkpoint's UNet and CLIP-L;
/// its `alpha` is 1. Returns the number of modules.
///
/// # Errors
/// When the file cannot be written.
pub fn write_lora(
    checkpoint: &dyn Source,
    rank: usize,
    path: &Path,
) -> Result<usize, safetensors::SafeTensorError> {
    let mut shapes = BTreeMap::new();
    let mut modules = 0;
    for key in checkpoint.keys() {
        let roots = [
            (prefix::UNET, "lora_unet_"),
            (prefix::CLIP_L, "lora_te1_text_model_"),
        ];
        let module = roots.iter().find_map(|(root, kohya)| {
            let name = key.strip_prefix(root)?.strip_suffix(".weight")?;
            Some(format!("{kohya}{}", name.replace('.', "_")))
        });
        let shape = checkpoint.shape(key).unwrap_or_default();
        let (Some(module), [outputs, rest @ ..]) = (module, shape) else {
            continue;
        };
        if rest.is_empty() || key.contains("embedding") {
            continue;
        }
        let down = std::iter::once(rank).chain(rest.iter().copied()).collect();
        shapes.insert(format!("{module}.lora_down.weight"), down);
        shapes.insert(format!("{module}.lora_up.weight"), vec![*outputs, rank]);
        shapes.insert(format!("{module}.alpha"), Vec::new());
        modules += 1;
    }
    write_noise(&shapes, path)?;
    Ok(modules)
}

struct HalfView<'a> {
    key: &'a str,
    shape: &'a [usize],
}

impl View for HalfView<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F16
    }
    fn shape(&self) -> &[usize] {
        self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let values = generate(self.key, self.shape);
        let mut bytes = vec![0u8; values.len() * 2];
        bytes
            .par_chunks_mut(2 * BLOCK)
            .zip(values.par_chunks(BLOCK))
            .for_each(|(bytes, values)| {
                for (b, v) in bytes.chunks_exact_mut(2).zip(values) {
                    b.copy_from_slice(&half::f16::from_f32(*v).to_le_bytes());
                }
            });
        bytes.into()
    }
    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * 2
    }
}

impl Source for SyntheticSdxl {
    fn path(&self) -> &Path {
        &self.path
    }
    fn keys(&self) -> Vec<&str> {
        self.shapes.keys().map(String::as_str).collect()
    }
    fn shape(&self, key: &str) -> Option<&[usize]> {
        self.shapes.get(key).map(Vec::as_slice)
    }
    fn metadata(&self, _key: &str) -> Option<&str> {
        None
    }
    fn read(&self, key: &str) -> Result<Vec<f32>, Error> {
        match self.shapes.get(key) {
            Some(shape) => Ok(generate(key, shape)),
            None => Err(Error::Missing {
                path: self.path.clone(),
                key: key.into(),
            }),
        }
    }
}

/// Values of one tensor: ones for norms, zeros for biases, noise of variance 1/fan-in otherwise.
fn generate(key: &str, shape: &[usize]) -> Vec<f32> {
    let len = shape.iter().product();
    if key.ends_with("bias") {
        return vec![0.0; len];
    }
    if shape.len() <= 1 {
        return vec![1.0; len];
    }
    let fan_in = shape[1..].iter().product::<usize>().max(1) as f32;
    let amplitude = if key.contains("embedding") {
        0.02
    } else {
        (3.0 / fan_in).sqrt()
    };
    // FNV-1a of the key seeds the tensor.
    let seed = key.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut out = crate::nn::block_cache::buffer(len);
    out.par_chunks_mut(BLOCK).enumerate().for_each(|(i, out)| {
        let mut state = (seed ^ (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)) | 1;
        for x in out {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *x = ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * amplitude;
        }
    });
    out
}

/// Collects keys and shapes.
struct Shapes(BTreeMap<String, Vec<usize>>);

impl Shapes {
    fn put(&mut self, key: String, shape: &[usize]) {
        self.0.insert(key, shape.to_vec());
    }
    fn conv(&mut self, key: &str, out: usize, inp: usize, kernel: usize) {
        self.put(format!("{key}.weight"), &[out, inp, kernel, kernel]);
        self.put(format!("{key}.bias"), &[out]);
    }
    fn linear(&mut self, key: &str, out: usize, inp: usize) {
        self.put(format!("{key}.weight"), &[out, inp]);
        self.put(format!("{key}.bias"), &[out]);
    }
    fn norm(&mut self, key: &str, channels: usize) {
        self.put(format!("{key}.weight"), &[channels]);
        self.put(format!("{key}.bias"), &[channels]);
    }

    fn unet(&mut self) {
        const U: &str = "model.diffusion_model";
        self.linear(&format!("{U}.time_embed.0"), 1280, 320);
        self.linear(&format!("{U}.time_embed.2"), 1280, 1280);
        self.linear(&format!("{U}.label_emb.0.0"), 1280, 2816);
        self.linear(&format!("{U}.label_emb.0.2"), 1280, 1280);
        self.conv(&format!("{U}.input_blocks.0.0"), 320, 4, 3);
        let levels = [(320, 0), (640, 2), (1280, 10)];
        let (mut skips, mut c, mut i) = (vec![320], 320, 1);
        for (level, (width, depth)) in levels.into_iter().enumerate() {
            for _ in 0..2 {
                self.res_block(&format!("{U}.input_blocks.{i}.0"), c, width);
                c = width;
                self.transformer(&format!("{U}.input_blocks.{i}.1"), c, depth);
                skips.push(c);
                i += 1;
            }
            if level < 2 {
                self.conv(&format!("{U}.input_blocks.{i}.0.op"), c, c, 3);
                skips.push(c);
                i += 1;
            }
        }
        self.res_block(&format!("{U}.middle_block.0"), c, c);
        self.transformer(&format!("{U}.middle_block.1"), c, 10);
        self.res_block(&format!("{U}.middle_block.2"), c, c);
        for (j, (width, depth)) in levels.into_iter().rev().flat_map(|l| [l; 3]).enumerate() {
            self.res_block(
                &format!("{U}.output_blocks.{j}.0"),
                c + skips.pop().unwrap_or(0),
                width,
            );
            c = width;
            self.transformer(&format!("{U}.output_blocks.{j}.1"), c, depth);
            if j % 3 == 2 && j < 8 {
                self.conv(&format!("{U}.output_blocks.{j}.2.conv"), c, c, 3);
            }
        }
        self.norm(&format!("{U}.out.0"), 320);
        self.conv(&format!("{U}.out.2"), 4, 320, 3);
    }

    fn res_block(&mut self, key: &str, inp: usize, out: usize) {
        self.norm(&format!("{key}.in_layers.0"), inp);
        self.conv(&format!("{key}.in_layers.2"), out, inp, 3);
        self.linear(&format!("{key}.emb_layers.1"), out, 1280);
        self.norm(&format!("{key}.out_layers.0"), out);
        self.conv(&format!("{key}.out_layers.3"), out, out, 3);
        if inp != out {
            self.conv(&format!("{key}.skip_connection"), out, inp, 1);
        }
    }

    fn transformer(&mut self, key: &str, c: usize, depth: usize) {
        if depth == 0 {
            return;
        }
        self.norm(&format!("{key}.norm"), c);
        self.linear(&format!("{key}.proj_in"), c, c);
        self.linear(&format!("{key}.proj_out"), c, c);
        for block in (0..depth).map(|i| format!("{key}.transformer_blocks.{i}")) {
            for (attention, context) in [("attn1", c), ("attn2", 2048)] {
                self.put(format!("{block}.{attention}.to_q.weight"), &[c, c]);
                self.put(format!("{block}.{attention}.to_k.weight"), &[c, context]);
                self.put(format!("{block}.{attention}.to_v.weight"), &[c, context]);
                self.linear(&format!("{block}.{attention}.to_out.0"), c, c);
            }
            for norm in 1..=3 {
                self.norm(&format!("{block}.norm{norm}"), c);
            }
            self.linear(&format!("{block}.ff.net.0.proj"), 8 * c, c);
            self.linear(&format!("{block}.ff.net.2"), c, 4 * c);
        }
    }

    fn vae(&mut self) {
        const V: &str = "first_stage_model";
        self.conv(&format!("{V}.quant_conv"), 8, 8, 1);
        self.conv(&format!("{V}.post_quant_conv"), 4, 4, 1);
        self.conv(&format!("{V}.encoder.conv_in"), 128, 3, 3);
        let mut c = 128;
        for (level, width) in [128, 256, 512, 512].into_iter().enumerate() {
            for block in 0..2 {
                self.vae_block(&format!("{V}.encoder.down.{level}.block.{block}"), c, width);
                c = width;
            }
            if level < 3 {
                self.conv(
                    &format!("{V}.encoder.down.{level}.downsample.conv"),
                    c,
                    c,
                    3,
                );
            }
        }
        for side in ["encoder", "decoder"] {
            self.vae_block(&format!("{V}.{side}.mid.block_1"), 512, 512);
            self.vae_block(&format!("{V}.{side}.mid.block_2"), 512, 512);
            self.norm(&format!("{V}.{side}.mid.attn_1.norm"), 512);
            for part in ["q", "k", "v", "proj_out"] {
                self.conv(&format!("{V}.{side}.mid.attn_1.{part}"), 512, 512, 1);
            }
        }
        self.norm(&format!("{V}.encoder.norm_out"), 512);
        self.conv(&format!("{V}.encoder.conv_out"), 8, 512, 3);
        self.conv(&format!("{V}.decoder.conv_in"), 512, 4, 3);
        c = 512;
        for (level, width) in [(3, 512), (2, 512), (1, 256), (0, 128)] {
            for block in 0..3 {
                self.vae_block(&format!("{V}.decoder.up.{level}.block.{block}"), c, width);
                c = width;
            }
            if level > 0 {
                self.conv(&format!("{V}.decoder.up.{level}.upsample.conv"), c, c, 3);
            }
        }
        self.norm(&format!("{V}.decoder.norm_out"), 128);
        self.conv(&format!("{V}.decoder.conv_out"), 3, 128, 3);
    }

    fn vae_block(&mut self, key: &str, inp: usize, out: usize) {
        self.norm(&format!("{key}.norm1"), inp);
        self.conv(&format!("{key}.conv1"), out, inp, 3);
        self.norm(&format!("{key}.norm2"), out);
        self.conv(&format!("{key}.conv2"), out, out, 3);
        if inp != out {
            self.conv(&format!("{key}.nin_shortcut"), out, inp, 1);
        }
    }

    fn clip_l(&mut self) {
        const L: &str = "conditioner.embedders.0.transformer.text_model";
        self.put(
            format!("{L}.embeddings.token_embedding.weight"),
            &[49408, 768],
        );
        self.put(
            format!("{L}.embeddings.position_embedding.weight"),
            &[77, 768],
        );
        for layer in (0..12).map(|i| format!("{L}.encoder.layers.{i}")) {
            for part in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                self.linear(&format!("{layer}.self_attn.{part}"), 768, 768);
            }
            self.norm(&format!("{layer}.layer_norm1"), 768);
            self.norm(&format!("{layer}.layer_norm2"), 768);
            self.linear(&format!("{layer}.mlp.fc1"), 3072, 768);
            self.linear(&format!("{layer}.mlp.fc2"), 768, 3072);
        }
        self.norm(&format!("{L}.final_layer_norm"), 768);
    }

    fn big_g(&mut self) {
        const G: &str = "conditioner.embedders.1.model";
        self.put(format!("{G}.token_embedding.weight"), &[49408, 1280]);
        self.put(format!("{G}.positional_embedding"), &[77, 1280]);
        self.put(format!("{G}.text_projection"), &[1280, 1280]);
        self.put(format!("{G}.logit_scale"), &[]);
        for block in (0..32).map(|i| format!("{G}.transformer.resblocks.{i}")) {
            self.put(format!("{block}.attn.in_proj_weight"), &[3840, 1280]);
            self.put(format!("{block}.attn.in_proj_bias"), &[3840]);
            self.linear(&format!("{block}.attn.out_proj"), 1280, 1280);
            self.norm(&format!("{block}.ln_1"), 1280);
            self.norm(&format!("{block}.ln_2"), 1280);
            self.linear(&format!("{block}.mlp.c_fc"), 5120, 1280);
            self.linear(&format!("{block}.mlp.c_proj"), 1280, 5120);
        }
        self.norm(&format!("{G}.ln_final"), 1280);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::lora::{LoraFile, Plan, Targets, Use};
    use crate::weights::{Kind, detect};

    #[test]
    fn the_synthetic_model_has_the_published_size_and_kind() {
        let model = SyntheticSdxl::new();
        assert_eq!(model.shapes.len(), 2514);
        assert_eq!(model.parameters(detect::prefix::UNET), 2_567_463_684);
        assert_eq!(detect::kind(&model), Kind::Sdxl);
        let a = model
            .read("model.diffusion_model.input_blocks.0.0.weight")
            .expect("there");
        assert_eq!(
            a,
            model
                .read("model.diffusion_model.input_blocks.0.0.weight")
                .expect("there")
        );
        let scale = model.read("conditioner.embedders.1.model.logit_scale");
        assert_eq!(scale.expect("there").len(), 1, "a scalar has one value");
        let variance = a.iter().map(|x| x * x).sum::<f32>() / a.len() as f32;
        assert!(
            (variance * 36.0 - 1.0).abs() < 0.1,
            "variance times fan-in: {}",
            variance * 36.0
        );
    }

    #[test]
    fn a_synthetic_lora_fits_every_layer() {
        let (model, folder) = (SyntheticSdxl::new(), tempfile::tempdir().unwrap());
        let path = folder.path().join("lora.safetensors");
        let modules = write_lora(&model, 1, &path).unwrap();
        let file = LoraFile::open(&path).unwrap();
        let used = Use {
            file: &file,
            te_multiplier: 1.0,
            unet_multiplier: 1.0,
            dyn_dim: None,
        };
        let plan = Plan::new(&Targets::new(&model), &[used]);
        assert_eq!(
            (plan.matched(), plan.keys().count()),
            (&[modules][..], modules)
        );
        let key = "model.diffusion_model.input_blocks.3.0.op.weight";
        assert!(plan.merge(&model, key).unwrap().failures.is_empty());
    }
}
