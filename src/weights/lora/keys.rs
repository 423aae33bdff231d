//! Keys of LoRA files: which module and which part of it a tensor is.
//!
//! kohya's keys have the module before the first dot. Keys of PEFT and diffusers have dots throughout
//! (`unet.down_blocks.1.attentions.0.proj_in.lora_A.weight`); their modules are brought into kohya's form.

/// A part's name as this crate spells it, for each spelling of it behind a dotted module name.
const DOTTED_PARTS: [(&str, &str); 10] = [
    (".lora_A.weight", "lora_down.weight"),
    (".lora_B.weight", "lora_up.weight"),
    (".lora.down.weight", "lora_down.weight"),
    (".lora.up.weight", "lora_up.weight"),
    (".lora_linear_layer.down.weight", "lora_down.weight"),
    (".lora_linear_layer.up.weight", "lora_up.weight"),
    ("_lora.down.weight", "lora_down.weight"),
    ("_lora.up.weight", "lora_up.weight"),
    (".lora_magnitude_vector.weight", "lora_magnitude_vector"),
    (".lora_mid.weight", "lora_mid.weight"),
];

/// Splits a key into module and part: `lora_unet_out_2.lora_up.weight` into `lora_unet_out_2` and `lora_up.weight`.
pub(super) fn split(key: &str) -> Option<(String, String)> {
    let (first, rest) = key.split_once('.')?;
    if let Some(name) = dotted_module(key) {
        return dotted(name);
    }
    let part = match rest {
        "lora_A.weight" => "lora_down.weight",
        "lora_B.weight" => "lora_up.weight",
        part => part,
    };
    Some((first.to_string(), part.to_string()))
}

/// The rest of a dotted key with its root in the underscore form, or `None` for a key of the other kind.
fn dotted_module(key: &str) -> Option<(&'static str, &str)> {
    let key = key.strip_prefix("base_model.model.").unwrap_or(key);
    for (root, flat) in [
        ("unet.base_model.model.", "lora_unet_"),
        ("unet.", "lora_unet_"),
        ("model.diffusion_model.", "lora_unet_"),
        ("diffusion_model.", "lora_unet_"),
        ("text_encoder.text_model.", "lora_te1_text_model_"),
        ("text_encoder_2.text_model.", "lora_te2_text_model_"),
        ("text_encoder.", "lora_te1_"),
        ("text_encoder_2.", "lora_te2_"),
    ] {
        if let Some(rest) = key.strip_prefix(root) {
            return Some((flat, rest));
        }
    }
    let bare = [
        "down_blocks.",
        "mid_block.",
        "up_blocks.",
        "time_embedding.",
        "add_embedding.",
        "conv_in.",
        "conv_out.",
    ];
    bare.iter()
        .any(|root| key.starts_with(root))
        .then_some(("lora_unet_", key))
}

/// Module (underscore form) and part of a dotted key.
fn dotted((root, rest): (&str, &str)) -> Option<(String, String)> {
    // PEFT may name its adapter between the matrix and `weight`.
    let adapter = ["lora_A.", "lora_B.", "lora_magnitude_vector."];
    let named = adapter.iter().find_map(|a| {
        let at = rest.find(&format!(".{a}"))? + a.len();
        Some(format!("{}weight", &rest[..=at]))
    });
    let rest = named.as_deref().unwrap_or(rest);
    let (module, part) = DOTTED_PARTS
        .iter()
        .find_map(|(spelling, part)| Some((rest.strip_suffix(spelling)?, *part)))
        .or_else(|| {
            PLAIN_PARTS
                .iter()
                .find_map(|part| Some((rest.strip_suffix(part)?.strip_suffix('.')?, *part)))
        })?;
    // Attention processors of early diffusers: `attn1.processor.to_out_lora`.
    let module = match module.split_once(".processor.") {
        Some((attention, "to_out")) => format!("{attention}.to_out.0"),
        Some((attention, layer)) => format!("{attention}.{layer}"),
        None => module.to_string(),
    };
    Some((
        format!("{root}{}", module.replace('.', "_")),
        part.to_string(),
    ))
}

/// Parts whose names do not depend on the style of the module's.
const PLAIN_PARTS: [&str; 33] = [
    "lora_up.weight",
    "lora_down.weight",
    "alpha",
    "scale",
    "dora_scale",
    "lora_magnitude_vector",
    "bias",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "hada_t1",
    "hada_t2",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
    "diff",
    "diff_b",
    "w_norm",
    "b_norm",
    "a1.weight",
    "a2.weight",
    "b1.weight",
    "b2.weight",
    "oft_blocks",
    "oft_diag",
    "rescale",
    "on_input",
    "weight",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_processors_and_plain_parts_are_read() {
        for (key, module, part) in [
            (
                "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
                "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0",
                "lora_up.weight",
            ),
            (
                "unet.mid_block.attentions.0.proj_in.lora_magnitude_vector.default.weight",
                "lora_unet_mid_block_attentions_0_proj_in",
                "lora_magnitude_vector",
            ),
            (
                "diffusion_model.out.2.lokr_w1_a",
                "lora_unet_out_2",
                "lokr_w1_a",
            ),
            (
                "lora_unet_out_2.lora_B.weight",
                "lora_unet_out_2",
                "lora_up.weight",
            ),
            ("lora_unet_out_2.a1.weight", "lora_unet_out_2", "a1.weight"),
            ("unet.conv_in.alpha", "lora_unet_conv_in", "alpha"),
        ] {
            assert_eq!(split(key), Some((module.into(), part.into())), "{key}");
        }
    }

    #[test]
    fn keys_without_a_part_are_none() {
        assert_eq!((split("alpha"), split("unet.")), (None, None));
    }
}
