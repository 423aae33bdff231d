//! Names of LoRA modules: which checkpoint tensor each changes.
//!
//! Trainers name modules after the checkpoint with `_` for `.` (`lora_unet_input_blocks_4_1_proj_in`), or after diffusers in
//! the same form (`lora_unet_down_blocks_1_attentions_0_proj_in`). Both are read as A1111 reads them (`networks.py`,
//! `convert_diffusers_name_to_compvis`). Nothing here fails on any name: what does not match names no tensor.

use std::collections::HashMap;
use std::ops::Range;

use crate::weights::Source;
use crate::weights::detect::prefix;

/// Module prefixes of the model's own names, as A1111 flattens them.
const UNET: &str = "diffusion_model_";
const CLIP_L: &str = "0_transformer_text_model_";
const CLIP_G: &str = "1_model_";

/// The checkpoint tensor, or rows of it, that a module changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Checkpoint key of the weight.
    pub weight: String,
    /// Its rows; fewer than all for the query, key and value of bigG, which are one tensor.
    pub rows: Range<usize>,
    /// Whether the text encoders' multiplier counts.
    pub text_encoder: bool,
}

/// All modules of a checkpoint by A1111's names.
#[derive(Debug)]
pub struct Targets(HashMap<String, Target>);

impl Targets {
    /// Reads the names and shapes of UNet and text encoders.
    #[must_use]
    pub fn new(source: &dyn Source) -> Self {
        let roots = [
            (prefix::UNET, UNET),
            (prefix::CLIP_L, CLIP_L),
            (prefix::CLIP_G, CLIP_G),
        ];
        let mut targets = HashMap::new();
        for key in source.keys() {
            let found = roots
                .iter()
                .find_map(|(root, flat)| Some((key.strip_prefix(root)?, *flat)));
            let Some((name, flat)) = found else { continue };
            let rows = source.shape(key).and_then(|s| s.first()).copied();
            let rows = rows.unwrap_or(0);
            let mut put = |name: &str, rows| {
                let target = Target {
                    weight: key.to_string(),
                    rows,
                    text_encoder: flat != UNET,
                };
                targets.insert(format!("{flat}{}", name.replace('.', "_")), target);
            };
            if let Some(attention) = name.strip_suffix("in_proj_weight") {
                let third = rows / 3;
                for (i, part) in ["q_proj", "k_proj", "v_proj"].iter().enumerate() {
                    put(&format!("{attention}{part}"), i * third..(i + 1) * third);
                }
            } else if let Some(module) = name.strip_suffix(".weight") {
                put(module, 0..rows);
            }
        }
        Self(targets)
    }

    /// What a module of a LoRA changes here, if this checkpoint has it.
    #[must_use]
    pub fn find(&self, module: &str) -> Option<&Target> {
        candidates(module).iter().find_map(|name| self.0.get(name))
    }
}

/// The names a module may have in the checkpoint, in the order in which they are tried.
fn candidates(module: &str) -> Vec<String> {
    let unet = ["lora_unet_", "oft_unet_"]
        .iter()
        .find_map(|root| module.strip_prefix(root));
    if let Some(name) = unet {
        let mut names = diffusers_unet(name);
        names.push(name.to_string());
        return names.iter().map(|name| format!("{UNET}{name}")).collect();
    }
    if let Some(name) = module.strip_prefix("lora_te1_text_model_") {
        return vec![format!("{CLIP_L}{name}")];
    }
    if let Some(name) = module.strip_prefix("lora_te2_text_model_encoder_layers_") {
        let Some((layer, name)) = number(name) else {
            return Vec::new();
        };
        let name = name
            .replace("mlp_fc1", "mlp_c_fc")
            .replace("mlp_fc2", "mlp_c_proj")
            .replace("self_attn", "attn")
            .replace("layer_norm", "ln_");
        return vec![format!("{CLIP_G}transformer_resblocks_{layer}_{name}")];
    }
    Vec::new()
}

/// Checkpoint names of a UNet module in diffusers' naming; empty for any other.
fn diffusers_unet(name: &str) -> Vec<String> {
    for (diffusers, ours) in [
        ("conv_in", "input_blocks_0_0"),
        ("conv_out", "out_2"),
        ("conv_norm_out", "out_0"),
    ] {
        if let Some(rest) = name.strip_prefix(diffusers) {
            return vec![format!("{ours}{rest}")];
        }
    }
    for (diffusers, ours) in [
        ("time_embedding_linear_", "time_embed_"),
        ("add_embedding_linear_", "label_emb_0_"),
    ] {
        if let Some((k, rest)) = name.strip_prefix(diffusers).and_then(number_at_end) {
            return vec![format!("{ours}{}{rest}", (2 * k).saturating_sub(2))];
        }
    }
    let block = |root: &str| name.strip_prefix(root).and_then(number);
    if let Some((level, rest)) = block("down_blocks_") {
        return match rest {
            "downsamplers_0_conv" => vec![format!("input_blocks_{}_0_op", 3 + 3 * level)],
            _ => level_module(rest)
                .map(|(layer, stage, rest)| {
                    format!("input_blocks_{}_{stage}_{rest}", 1 + 3 * level + layer)
                })
                .into_iter()
                .collect(),
        };
    }
    if let Some((level, rest)) = block("up_blocks_") {
        return match rest {
            // Behind a transformer where the level has one. A1111 assumes none at level 0, which is SD 1's layout.
            "upsamplers_0_conv" => [2, 1]
                .map(|stage| format!("output_blocks_{}_{stage}_conv", 2 + 3 * level))
                .into(),
            _ => level_module(rest)
                .map(|(layer, stage, rest)| {
                    format!("output_blocks_{}_{stage}_{rest}", 3 * level + layer)
                })
                .into_iter()
                .collect(),
        };
    }
    if let Some(rest) = name.strip_prefix("mid_block_") {
        return level_module(rest)
            .map(|(layer, stage, rest)| {
                let stage = if stage == 1 { 1 } else { 2 * layer };
                format!("middle_block_{stage}_{rest}")
            })
            .into_iter()
            .collect();
    }
    Vec::new()
}

/// `attentions_L_S` or `resnets_L_S` to layer, stage within the block, and the rest in checkpoint naming.
fn level_module(name: &str) -> Option<(usize, usize, &str)> {
    if let Some(rest) = name.strip_prefix("attentions_") {
        let (layer, rest) = number(rest)?;
        return Some((layer, 1, rest));
    }
    let (layer, rest) = number(name.strip_prefix("resnets_")?)?;
    let rest = match rest {
        "conv1" => "in_layers_2",
        "conv2" => "out_layers_3",
        "norm1" => "in_layers_0",
        "norm2" => "out_layers_0",
        "time_emb_proj" => "emb_layers_1",
        "conv_shortcut" => "skip_connection",
        other => other,
    };
    Some((layer, 0, rest))
}

/// A number at the start of `text` and what follows the `_` behind it. Block numbers have at most three digits.
fn number(text: &str) -> Option<(usize, &str)> {
    let (digits, rest) = text.split_once('_')?;
    (digits.len() <= 3).then_some(())?;
    Some((digits.parse().ok()?, rest))
}

fn number_at_end(text: &str) -> Option<(usize, &str)> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    (end <= 3).then_some(())?;
    Some((text[..end].parse().ok()?, &text[end..]))
}

#[cfg(test)]
mod tests {
    use super::super::keys::split;
    use super::*;
    use crate::weights::synthetic::SyntheticSdxl;

    fn key(targets: &Targets, module: &str) -> Option<String> {
        targets.find(module).map(|t| t.weight.clone())
    }

    #[test]
    fn every_style_of_a_name_hits_the_same_tensor() {
        let targets = Targets::new(&SyntheticSdxl::new());
        let unet = "model.diffusion_model.";
        for (ours, kohya, diffusers) in [
            (
                "input_blocks.4.1.transformer_blocks.1.attn1.to_q",
                "input_blocks_4_1_transformer_blocks_1_attn1_to_q",
                "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
            ),
            (
                "input_blocks.8.1.proj_in",
                "input_blocks_8_1_proj_in",
                "down_blocks.2.attentions.1.proj_in",
            ),
            (
                "input_blocks.5.0.in_layers.2",
                "input_blocks_5_0_in_layers_2",
                "down_blocks.1.resnets.1.conv1",
            ),
            (
                "input_blocks.1.0.out_layers.0",
                "input_blocks_1_0_out_layers_0",
                "down_blocks.0.resnets.0.norm2",
            ),
            (
                "input_blocks.4.0.skip_connection",
                "input_blocks_4_0_skip_connection",
                "down_blocks.1.resnets.0.conv_shortcut",
            ),
            (
                "input_blocks.3.0.op",
                "input_blocks_3_0_op",
                "down_blocks.0.downsamplers.0.conv",
            ),
            (
                "middle_block.1.transformer_blocks.9.ff.net.2",
                "middle_block_1_transformer_blocks_9_ff_net_2",
                "mid_block.attentions.0.transformer_blocks.9.ff.net.2",
            ),
            (
                "middle_block.2.emb_layers.1",
                "middle_block_2_emb_layers_1",
                "mid_block.resnets.1.time_emb_proj",
            ),
            (
                "output_blocks.5.0.out_layers.3",
                "output_blocks_5_0_out_layers_3",
                "up_blocks.1.resnets.2.conv2",
            ),
            (
                "output_blocks.2.1.transformer_blocks.0.attn2.to_out.0",
                "output_blocks_2_1_transformer_blocks_0_attn2_to_out_0",
                "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_out.0",
            ),
            (
                "output_blocks.2.2.conv",
                "output_blocks_2_2_conv",
                "up_blocks.0.upsamplers.0.conv",
            ),
            (
                "output_blocks.5.2.conv",
                "output_blocks_5_2_conv",
                "up_blocks.1.upsamplers.0.conv",
            ),
            ("input_blocks.0.0", "input_blocks_0_0", "conv_in"),
            ("out.2", "out_2", "conv_out"),
            ("time_embed.2", "time_embed_2", "time_embedding.linear_2"),
            ("label_emb.0.0", "label_emb_0_0", "add_embedding.linear_1"),
        ] {
            let want = Some(format!("{unet}{ours}.weight"));
            assert_eq!(key(&targets, &format!("lora_unet_{kohya}")), want);
            assert_eq!(key(&targets, &format!("oft_unet_{kohya}")), want);
            assert_eq!(
                key(
                    &targets,
                    &format!("lora_unet_{}", diffusers.replace('.', "_"))
                ),
                want,
                "{diffusers}"
            );
            for spelling in [
                "lora_A.weight",
                "lora_A.default.weight",
                "lora.down.weight",
                "lora_down.weight",
            ] {
                for root in ["unet.", "base_model.model.", "unet.base_model.model."] {
                    let (module, part) =
                        split(&format!("{root}{diffusers}.{spelling}")).expect("a module");
                    assert_eq!(
                        (key(&targets, &module), part.as_str()),
                        (want.clone(), "lora_down.weight")
                    );
                }
            }
        }
    }

    #[test]
    fn text_encoder_names_find_their_layers_and_the_rows_of_fused_attention() {
        let targets = Targets::new(&SyntheticSdxl::new());
        let l = targets
            .find("lora_te1_text_model_encoder_layers_3_self_attn_q_proj")
            .expect("CLIP-L");
        assert_eq!(
            l.weight,
            format!("{}encoder.layers.3.self_attn.q_proj.weight", prefix::CLIP_L)
        );
        let at = |name: &str| {
            targets
                .find(&format!("lora_te2_text_model_encoder_layers_31_{name}"))
                .expect(name)
        };
        let block = format!("{}transformer.resblocks.31.", prefix::CLIP_G);
        for (name, tensor, rows) in [
            ("self_attn_q_proj", "attn.in_proj_weight", 0..1280),
            ("self_attn_k_proj", "attn.in_proj_weight", 1280..2560),
            ("self_attn_v_proj", "attn.in_proj_weight", 2560..3840),
            ("self_attn_out_proj", "attn.out_proj.weight", 0..1280),
            ("mlp_fc1", "mlp.c_fc.weight", 0..5120),
            ("mlp_fc2", "mlp.c_proj.weight", 0..1280),
            ("layer_norm2", "ln_2.weight", 0..1280),
        ] {
            let want = Target {
                weight: format!("{block}{tensor}"),
                rows,
                text_encoder: true,
            };
            assert_eq!(*at(name), want, "{name}");
        }
        let (module, _) = split("text_encoder_2.text_model.encoder.layers.31.self_attn.k_proj.lora_linear_layer.up.weight").expect("dotted");
        assert_eq!(targets.find(&module), Some(at("self_attn_k_proj")));
    }

    #[test]
    fn names_of_other_models_and_nonsense_match_nothing() {
        let targets = Targets::new(&SyntheticSdxl::new());
        for module in [
            "lora_te_text_model_encoder_layers_0_mlp_fc1",
            "lora_unet_double_blocks_0_img_attn_qkv",
            "lora_unet_down_blocks_99999999999999999999_attentions_0_proj_in",
            "lora_unet_down_blocks_0_attentions_0_proj_in",
            "lora_unet_",
            "lora_unet_time_embedding_linear_",
            "lora_unet_up_blocks_",
            "é",
            "",
        ] {
            assert_eq!(targets.find(module), None, "{module}");
        }
    }
}
