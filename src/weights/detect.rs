//! What kind of model a file is, from its keys and shapes alone (no tensor is read). Order as A1111 decides it
//! (`sd_models_config.py`; pipeline specification 1.6).

use std::fmt;

use super::{Error, Source};

/// Key prefixes of an SDXL single-file checkpoint (sgm naming).
pub mod prefix {
    /// UNet.
    pub const UNET: &str = "model.diffusion_model.";
    /// VAE.
    pub const VAE: &str = "first_stage_model.";
    /// CLIP ViT-L/14, Hugging Face naming.
    pub const CLIP_L: &str = "conditioner.embedders.0.transformer.text_model.";
    /// OpenCLIP ViT-bigG/14, its own naming.
    pub const CLIP_G: &str = "conditioner.embedders.1.model.";
    /// OpenCLIP ViT-bigG/14 in a refiner, which has no other text encoder.
    pub const REFINER_CLIP_G: &str = "conditioner.embedders.0.model.";
}

/// A kind of file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// SDXL base and what is trained from it.
    Sdxl,
    /// SDXL with a 9-channel UNet input.
    SdxlInpaint,
    /// SDXL refiner.
    SdxlRefiner,
    /// Stable Diffusion 1.x.
    Sd1,
    /// Stable Diffusion 2.x.
    Sd2,
    /// Stable Diffusion 3 or 3.5.
    Sd3,
    /// Flux.
    Flux,
    /// A LoRA or one of its relatives.
    Lora,
    /// A VAE alone.
    Vae,
    /// A textual-inversion embedding.
    Embedding,
    /// A `ControlNet`.
    ControlNet,
    /// An upscaler.
    Upscaler,
    /// A UNet alone, or in diffusers' naming.
    DiffusersUnet,
    /// SDXL parts, but not all of them.
    SdxlPart,
    /// Trained with EDM preconditioning (Playground v2.5, `CosXL`).
    Edm,
    /// Nothing known.
    Unknown,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sdxl => "an SDXL checkpoint",
            Self::SdxlInpaint => "an SDXL inpainting checkpoint",
            Self::SdxlRefiner => "an SDXL refiner",
            Self::Sd1 => "a Stable Diffusion 1.x checkpoint",
            Self::Sd2 => "a Stable Diffusion 2.x checkpoint",
            Self::Sd3 => "a Stable Diffusion 3 checkpoint",
            Self::Flux => "a Flux checkpoint",
            Self::Lora => "a LoRA",
            Self::Vae => "a VAE alone",
            Self::Embedding => "a textual-inversion embedding",
            Self::ControlNet => "a ControlNet",
            Self::Upscaler => "an upscaler",
            Self::DiffusersUnet => "a UNet alone (or in diffusers' naming)",
            Self::SdxlPart => "part of an SDXL checkpoint (the UNet or a text encoder is missing)",
            Self::Edm => {
                "an SDXL-shaped checkpoint with EDM preconditioning (Playground v2.5 or CosXL)"
            }
            Self::Unknown => "a safetensors file of an unknown model",
        })
    }
}

impl Kind {
    /// What to do with a file of this kind instead of loading it as a checkpoint.
    #[must_use]
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Lora => "put it into `models/Lora` and write `<lora:NAME:1>` in the prompt",
            Self::Vae => "give it with `--vae FILE` or put it into `models/VAE`",
            Self::Embedding => "put it into `embeddings` and write its name in the prompt",
            Self::SdxlRefiner => {
                "a refiner takes over from an SDXL checkpoint: name it as `refiner_checkpoint` or `--refiner`"
            }
            Self::DiffusersUnet | Self::SdxlPart => {
                "use the model's single-file release with UNet, both text encoders and VAE"
            }
            Self::Upscaler => "put it into `models/ESRGAN`",
            _ => "use an SDXL checkpoint",
        }
    }

    /// Short name for lists.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sdxl => "sdxl",
            Self::SdxlInpaint => "sdxl-inpaint",
            Self::SdxlRefiner => "sdxl-refiner",
            Self::Sd1 => "sd1",
            Self::Sd2 => "sd2",
            Self::Sd3 => "sd3",
            Self::Flux => "flux",
            Self::Lora => "lora",
            Self::Vae => "vae",
            Self::Embedding => "embedding",
            Self::ControlNet => "controlnet",
            Self::Upscaler => "upscaler",
            Self::DiffusersUnet => "diffusers-unet",
            Self::SdxlPart => "sdxl-part",
            Self::Edm => "sdxl-edm",
            Self::Unknown => "unknown",
        }
    }
}

/// What is asked of a file to tell its kind.
struct Keys<'a>(&'a dyn Source);

impl Keys<'_> {
    fn has(&self, key: &str) -> bool {
        self.0.shape(key).is_some()
    }

    /// Dimension `axis` of a tensor.
    fn dim(&self, key: &str, axis: usize) -> Option<usize> {
        self.0.shape(key)?.get(axis).copied()
    }

    fn any(&self, test: impl Fn(&str) -> bool) -> bool {
        self.0.keys().iter().any(|key| test(key))
    }

    fn any_starts_with(&self, starts: &[&str]) -> bool {
        self.any(|key| starts.iter().any(|start| key.starts_with(start)))
    }

    fn any_contains(&self, parts: &[&str]) -> bool {
        self.any(|key| parts.iter().any(|part| key.contains(part)))
    }
}

/// Decides the kind of `source`.
#[must_use]
pub fn kind(source: &dyn Source) -> Kind {
    let keys = Keys(source);
    if keys.any_contains(&["joint_blocks."]) {
        Kind::Sd3
    } else if keys.any(|key| key.contains("double_blocks.") && key.contains("img_attn")) {
        Kind::Flux
    } else if keys.any_starts_with(&[prefix::UNET]) {
        checkpoint_kind(&keys)
    } else {
        part_kind(&keys)
    }
}

/// The kind of a file with a UNet in it, in A1111's order.
fn checkpoint_kind(keys: &Keys<'_>) -> Kind {
    const REFINER: &str = "conditioner.embedders.0.model.ln_final.weight";
    const SD2: [&str; 2] = [
        "depth_model.model.pretrained.act_postprocess3.0.project.0.bias",
        "embedder.model.ln_final.weight",
    ];
    if keys.has("conditioner.embedders.1.model.ln_final.weight") {
        let clip_l = format!("{}embeddings.token_embedding.weight", prefix::CLIP_L);
        return if keys.has("edm_mean") || keys.has("edm_vpred.sigma_max") {
            Kind::Edm
        } else if !keys.has(&clip_l) {
            Kind::SdxlPart
        } else if keys.dim("model.diffusion_model.input_blocks.0.0.weight", 1) == Some(9) {
            Kind::SdxlInpaint
        } else {
            Kind::Sdxl
        };
    }
    match keys.dim(REFINER, 0) {
        // SD 2.1 Turbo in sgm's layout.
        Some(1024) => Kind::Sd2,
        Some(_) => Kind::SdxlRefiner,
        None if SD2.iter().any(|key| keys.has(key)) => Kind::Sd2,
        None if keys.any_starts_with(&["cond_stage_model.model."]) => Kind::Sd2,
        None if keys.any_starts_with(&["cond_stage_model."]) => Kind::Sd1,
        None if keys.has("model.diffusion_model.label_emb.0.0.weight") => Kind::SdxlPart,
        None => Kind::DiffusersUnet,
    }
}

/// The kind of a file without a UNet in the single-file layout.
fn part_kind(keys: &Keys<'_>) -> Kind {
    const LORA: [&str; 9] = [
        ".lora_A.",
        ".lora_B.",
        ".lora.up",
        ".lora.down",
        ".lora_up.",
        ".lora_down.",
        ".hada_w1",
        ".lokr_w",
        ".oft_blocks",
    ];
    let vae = |key: &str| key.trim_start_matches(prefix::VAE).starts_with("decoder.");
    let control = ["control_model.", "controlnet_", "lllite_"];
    if keys.any_starts_with(&control) || keys.any_contains(&["input_hint_block"]) {
        Kind::ControlNet
    } else if keys.any_starts_with(&["lora_", "lycoris_", "oft_", "bundle_emb"])
        || keys.any_contains(&LORA)
    {
        Kind::Lora
    } else if (keys.has("clip_l") && keys.has("clip_g")) || keys.has("emb_params") {
        Kind::Embedding
    } else if keys.any_starts_with(&["down_blocks.", "input_blocks."])
        && keys.any_contains(&["transformer_blocks."])
    {
        Kind::DiffusersUnet
    } else if keys.any(vae) && keys.any_contains(&["conv_in"]) {
        Kind::Vae
    } else if keys.any_contains(&["RDB", "rdb1", "RRDB_trunk"]) || keys.has("body.1.weight") {
        Kind::Upscaler
    } else if keys.any_starts_with(&["conditioner.", "text_model."]) {
        Kind::SdxlPart
    } else {
        Kind::Unknown
    }
}

/// How the UNet's output is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameterization {
    /// The output is `v` (Salimans & Ho 2022) instead of the noise.
    pub v_prediction: bool,
    /// Sigmas are rescaled to zero terminal signal-to-noise ratio (Lin et al. 2023).
    pub zero_terminal_snr: bool,
}

/// Reads the marker tensors `v_pred` and `ztsnr`, and the metadata other trainers write instead.
#[must_use]
pub fn parameterization(source: &dyn Source) -> Parameterization {
    let says = |key: &str, value: &str| {
        source
            .metadata(key)
            .is_some_and(|v| v.eq_ignore_ascii_case(value))
    };
    Parameterization {
        v_prediction: source.shape("v_pred").is_some() || says("modelspec.prediction_type", "v"),
        zero_terminal_snr: source.shape("ztsnr").is_some(),
    }
}

/// What a checkpoint is loaded for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Making pictures on its own.
    Main,
    /// Taking over in mid-run, which an SDXL refiner can do as well.
    Refiner,
}

/// Accepts checkpoints that can fill a role and names everything else.
///
/// # Errors
/// [`Error::Kind`].
pub fn require(source: &dyn Source, role: Role) -> Result<Kind, Error> {
    match kind(source) {
        Kind::SdxlRefiner if role == Role::Refiner => Ok(Kind::SdxlRefiner),
        _ => require_sdxl(source),
    }
}

/// Accepts SDXL checkpoints and names everything else.
///
/// # Errors
/// [`Error::Kind`].
pub fn require_sdxl(source: &dyn Source) -> Result<Kind, Error> {
    match kind(source) {
        kind @ (Kind::Sdxl | Kind::SdxlInpaint) => Ok(kind),
        kind => Err(Error::Kind {
            path: source.path().into(),
            kind,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::weights::SafetensorsFile;

    /// A file of empty tensors with these keys and shapes.
    fn file(entries: &[(&str, &[usize])]) -> SafetensorsFile {
        let mut offset = 0;
        let mut header = serde_json::Map::new();
        for (key, shape) in entries {
            let len = 2 * shape.iter().product::<usize>();
            header.insert((*key).into(), serde_json::json!({"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + len]}));
            offset += len;
        }
        let json = serde_json::to_vec(&header).expect("serialises");
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json);
        bytes.resize(bytes.len() + offset, 0);
        SafetensorsFile::from_vec(Path::new("x.safetensors"), bytes).expect("valid")
    }

    const UNET_IN: &str = "model.diffusion_model.input_blocks.0.0.weight";
    const BIG_G: &str = "conditioner.embedders.1.model.ln_final.weight";
    const CLIP_L: &str =
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight";

    #[test]
    fn each_kind_is_recognised_from_its_keys() {
        type Keys<'a> = &'a [(&'a str, &'a [usize])];
        let cases: &[(Kind, Keys<'_>)] = &[
            (
                Kind::Sdxl,
                &[(UNET_IN, &[1, 4, 3, 3]), (BIG_G, &[4]), (CLIP_L, &[4, 4])],
            ),
            (
                Kind::SdxlInpaint,
                &[(UNET_IN, &[1, 9, 3, 3]), (BIG_G, &[4]), (CLIP_L, &[4, 4])],
            ),
            (Kind::SdxlPart, &[(UNET_IN, &[1, 4, 3, 3]), (BIG_G, &[4])]),
            (
                Kind::Edm,
                &[
                    (UNET_IN, &[1, 4, 3, 3]),
                    (BIG_G, &[4]),
                    (CLIP_L, &[4, 4]),
                    ("edm_mean", &[1]),
                ],
            ),
            (
                Kind::SdxlRefiner,
                &[
                    (UNET_IN, &[1, 4, 3, 3]),
                    ("conditioner.embedders.0.model.ln_final.weight", &[1280]),
                ],
            ),
            (
                Kind::Sd2,
                &[
                    (UNET_IN, &[1, 4, 3, 3]),
                    ("conditioner.embedders.0.model.ln_final.weight", &[1024]),
                ],
            ),
            (
                Kind::Sd2,
                &[
                    (UNET_IN, &[1, 4, 3, 3]),
                    ("cond_stage_model.model.ln_final.weight", &[4]),
                ],
            ),
            (
                Kind::Sd1,
                &[
                    (UNET_IN, &[1, 4, 3, 3]),
                    (
                        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
                        &[4],
                    ),
                ],
            ),
            (
                Kind::Lora,
                &[(
                    "lora_unet_input_blocks_4_1_proj_in.lora_down.weight",
                    &[4, 4],
                )],
            ),
            (
                Kind::Lora,
                &[(
                    "unet.down_blocks.1.attentions.0.to_q.lora_A.weight",
                    &[4, 4],
                )],
            ),
            (Kind::Vae, &[("decoder.conv_in.weight", &[4, 4, 3, 3])]),
            (
                Kind::Embedding,
                &[("clip_l", &[1, 768]), ("clip_g", &[1, 1280])],
            ),
            (
                Kind::ControlNet,
                &[("control_model.input_hint_block.0.weight", &[4])],
            ),
            (
                Kind::Flux,
                &[("double_blocks.0.img_attn.qkv.weight", &[4, 4])],
            ),
            (
                Kind::Sd3,
                &[("model.diffusion_model.joint_blocks.0.x", &[4])],
            ),
            (Kind::Unknown, &[("weight", &[4])]),
        ];
        for (want, keys) in cases {
            assert_eq!(kind(&file(keys)), *want, "{keys:?}");
        }
    }

    #[test]
    fn marker_tensors_select_the_parameterization() {
        let plain = parameterization(&file(&[(BIG_G, &[4])]));
        assert_eq!(
            plain,
            Parameterization {
                v_prediction: false,
                zero_terminal_snr: false
            }
        );
        let marked = parameterization(&file(&[("v_pred", &[]), ("ztsnr", &[])]));
        assert_eq!(
            marked,
            Parameterization {
                v_prediction: true,
                zero_terminal_snr: true
            }
        );
    }

    #[test]
    fn the_refusal_names_what_the_file_is_and_what_to_do() {
        let error =
            require_sdxl(&file(&[("lora_te1_x.lora_up.weight", &[1])])).expect_err("refused");
        assert_eq!(
            error.to_string(),
            "`x.safetensors` is a LoRA, not an SDXL checkpoint; put it into `models/Lora` and write `<lora:NAME:1>` in the prompt"
        );
    }
}
