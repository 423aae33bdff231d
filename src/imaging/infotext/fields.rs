//! From a parsed text to the fields a program works with: sizes split, what is absent filled in, old versions read as meant.
//!
//! Follows A1111's `parse_generation_parameters`, `infotext_versions.backcompat` and the `infotext=` names of its settings.

use super::{Params, Parsed, Value};

/// `Hires sampler` when none is named.
pub const SAME_SAMPLER: &str = "Use same sampler";
/// `Hires schedule type` when none is named.
pub const SAME_SCHEDULER: &str = "Use same scheduler";
/// `Hires checkpoint` when none is named.
pub const SAME_CHECKPOINT: &str = "Use same checkpoint";

/// Infotext keys that set a setting: `(key, setting)`.
///
/// `Beta scheduler alpha` and `beta` are read under these names though pictures carry `Beta schedule …`, as in A1111.
pub const OVERRIDES: &[(&str, &str)] = &[
    ("Model hash", "sd_model_checkpoint"),
    ("VAE", "sd_vae"),
    ("Clip skip", "CLIP_stop_at_last_layers"),
    ("RNG", "randn_source"),
    ("Emphasis", "emphasis"),
    ("Tiling", "tiling"),
    ("SDXL CLIP-L skip", "sdxl_clip_l_skip"),
    ("Conditional mask weight", "inpainting_mask_weight"),
    ("Noise multiplier", "initial_noise_multiplier"),
    ("Extra noise", "img2img_extra_noise"),
    ("NGMS", "s_min_uncond"),
    ("NGMS all steps", "s_min_uncond_all"),
    ("Skip Early CFG", "skip_early_cond"),
    ("Token merging ratio", "token_merging_ratio"),
    ("Token merging ratio hr", "token_merging_ratio_hr"),
    ("Pad conds", "pad_cond_uncond"),
    ("Pad conds v0", "pad_cond_uncond_v0"),
    ("FP8 weight", "fp8_storage"),
    ("Cache FP16 weight for LoRA", "cache_fp16_weight"),
    ("Old prompt editing timelines", "use_old_scheduling"),
    ("Downcast alphas_cumprod", "use_downcasted_alpha_bar"),
    (
        "Refiner switch by sampling steps",
        "refiner_switch_by_sample_steps",
    ),
    ("Hires refiner pass", "hires_fix_refiner_pass"),
    ("VAE Encoder", "sd_vae_encode_method"),
    ("VAE Decoder", "sd_vae_decode_method"),
    ("Eta DDIM", "eta_ddim"),
    ("Eta", "eta_ancestral"),
    ("Sigma churn", "s_churn"),
    ("Sigma tmin", "s_tmin"),
    ("Sigma tmax", "s_tmax"),
    ("Sigma noise", "s_noise"),
    ("Schedule min sigma", "sigma_min"),
    ("Schedule max sigma", "sigma_max"),
    ("Schedule rho", "rho"),
    ("Noise Schedule", "sd_noise_schedule"),
    ("ENSD", "eta_noise_seed_delta"),
    (
        "Discard penultimate sigma",
        "always_discard_next_to_last_sigma",
    ),
    ("SGM noise multiplier", "sgm_noise_multiplier"),
    ("UniPC variant", "uni_pc_variant"),
    ("UniPC skip type", "uni_pc_skip_type"),
    ("UniPC order", "uni_pc_order"),
    ("UniPC lower order final", "uni_pc_lower_order_final"),
    ("Beta scheduler alpha", "beta_dist_alpha"),
    ("Beta scheduler beta", "beta_dist_beta"),
];

/// What [`Parsed::fields`] cannot know by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// Whether a prompt has a fragment of weight other than 1: only then is a missing `Emphasis` filled in.
    pub weighted_prompt: bool,
    /// Whether texts of older versions are read as those versions meant them (`auto_backcompat`).
    pub back_compatible: bool,
}

impl Parsed {
    /// All fields, prompts included, as A1111's `png-info` answers them.
    #[must_use]
    pub fn fields(&self, completion: Completion) -> Params {
        let mut fields = Params::new();
        for (key, value) in self.params.iter() {
            match split_size(&value.to_string()) {
                Some((width, height)) => {
                    fields.insert(format!("{key}-1"), width);
                    fields.insert(format!("{key}-2"), height);
                }
                None => fields.insert(key, value.clone()),
            }
        }
        fields.insert("Prompt", self.prompt.as_str());
        fields.insert("Negative prompt", self.negative_prompt.as_str());
        add_hypernetwork(&mut fields);
        if fields.get("Hires resize-1").is_none() {
            fields.insert("Hires resize-1", 0);
            fields.insert("Hires resize-2", 0);
        }
        for (key, value) in [
            ("Clip skip", "1"),
            ("Hires sampler", SAME_SAMPLER),
            ("Hires schedule type", SAME_SCHEDULER),
            ("Hires checkpoint", SAME_CHECKPOINT),
        ] {
            fields.insert_default(key, value);
        }
        for (key, value) in [
            ("Hires prompt", ""),
            ("Hires negative prompt", ""),
            ("Mask mode", "Inpaint masked"),
            ("Masked content", "original"),
        ] {
            fields.insert_default(key, value);
        }
        fields.insert_default("Inpaint area", "Whole picture");
        fields.insert_default("Masked area padding", 32);
        restore_first_pass(&mut fields);
        fields.insert_default("RNG", "GPU");
        fields.insert_default("Schedule type", "Automatic");
        for key in ["Schedule max sigma", "Schedule min sigma", "Schedule rho"] {
            fields.insert_default(key, 0);
        }
        fields.insert_default("VAE Encoder", "Full");
        fields.insert_default("VAE Decoder", "Full");
        fields.insert_default("FP8 weight", "Disable");
        if fields.get("FP8 weight") != Some(&Value::from("Disable")) {
            fields.insert_default("Cache FP16 weight for LoRA", false);
        }
        if completion.weighted_prompt {
            fields.insert_default("Emphasis", "Original");
        }
        fields.insert_default("Refiner switch by sampling steps", false);
        if completion.back_compatible {
            apply_version(&mut fields);
        }
        fields
    }
}

/// `512x768` as its two numbers, which stay text.
fn split_size(text: &str) -> Option<(&str, &str)> {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.split_once('x')
        .filter(|(width, height)| digits(width) && digits(height))
}

/// Texts older than the tag syntax name a hypernetwork by a key.
fn add_hypernetwork(fields: &mut Params) {
    let Some(name) = fields.get("Hypernet").cloned() else {
        return;
    };
    let strength = fields
        .get("Hypernet strength")
        .map_or_else(|| "1.0".to_string(), ToString::to_string);
    let prompt = fields
        .get("Prompt")
        .map(ToString::to_string)
        .unwrap_or_default();
    fields.insert("Prompt", format!("{prompt}<hypernet:{name}:{strength}>"));
}

/// The oldest hires fix wrote the final size as `Size` and the first pass apart.
fn restore_first_pass(fields: &mut Params) {
    let number = |key: &str| {
        fields
            .get(key)
            .and_then(|value| value.to_string().parse::<u32>().ok())
    };
    let (Some(first_width), Some(first_height)) =
        (number("First pass size-1"), number("First pass size-2"))
    else {
        return;
    };
    let (width, height) = (
        number("Size-1").unwrap_or(512),
        number("Size-2").unwrap_or(512),
    );
    let (first_width, first_height) = if first_width == 0 || first_height == 0 {
        let scale =
            (f64::from(512 * 512) / (f64::from(width.max(1)) * f64::from(height.max(1)))).sqrt();
        let side = |length: u32| (scale * f64::from(length) / 64.0).ceil() as u32 * 64;
        (side(width), side(height))
    } else {
        (first_width, first_height)
    };
    fields.extend([
        ("Size-1", first_width),
        ("Size-2", first_height),
        ("Hires resize-1", width),
        ("Hires resize-2", height),
    ]);
}

/// A released version: numbers and the count of commits after them.
type Version = ([u32; 3], u32);

/// Reads `v1.7.0-225-gabcdef`, `v1.10.1`, `1.6`.
fn parse_version(text: &str) -> Option<Version> {
    let text = text.strip_prefix('v').unwrap_or(text);
    let mut parts = text.split('-');
    let mut numbers = [0; 3];
    for (slot, number) in numbers.iter_mut().zip(parts.next()?.split('.')) {
        *slot = number.parse().ok()?;
    }
    let commits = parts
        .next()
        .and_then(|commits| commits.parse().ok())
        .unwrap_or(0);
    Some((numbers, commits))
}

/// Whether a text was written by a version after `numbers` and `commits` more; a text without a readable version was.
#[must_use]
pub fn is_after(version: Option<&str>, numbers: [u32; 3], commits: u32) -> bool {
    let version = version.and_then(parse_version);
    version.is_none_or(|version| version > (numbers, commits))
}

fn apply_version(fields: &mut Params) {
    let text = |key: &str| fields.get(key).map(ToString::to_string).unwrap_or_default();
    let Some(version) = parse_version(&text("Version")) else {
        return;
    };
    let (edits, sampler, refiner) = (
        text("Prompt").contains('['),
        text("Sampler"),
        !text("Refiner").is_empty(),
    );
    for (before, applies, key) in [
        (([1, 6, 0], 0), edits, "Old prompt editing timelines"),
        (
            ([1, 6, 0], 0),
            matches!(sampler.as_str(), "DDIM" | "PLMS"),
            "Pad conds v0",
        ),
        (([1, 7, 0], 225), true, "Downcast alphas_cumprod"),
        (([1, 8, 0], 0), refiner, "Refiner switch by sampling steps"),
    ] {
        if version < before && applies {
            fields.insert(key, true);
        }
    }
}

/// Splits `DPM++ 2M Karras`, as versions before 1.9 wrote it, given the names of all schedulers.
///
/// ```
/// use sdgen::imaging::infotext::split_sampler;
/// assert_eq!(split_sampler("DPM++ 2M Karras", &["Karras", "Exponential"]), ("DPM++ 2M", Some("Karras")));
/// ```
#[must_use]
pub fn split_sampler<'a>(sampler: &'a str, schedulers: &[&'a str]) -> (&'a str, Option<&'a str>) {
    let found = schedulers.iter().find_map(|&scheduler| {
        let name = sampler.strip_suffix(scheduler)?.strip_suffix(' ')?;
        Some((name, Some(scheduler)))
    });
    found.unwrap_or((sampler, None))
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;

    const PLAIN: Completion = Completion {
        weighted_prompt: false,
        back_compatible: true,
    };

    fn field(fields: &Params, key: &str) -> String {
        fields
            .get(key)
            .unwrap_or_else(|| panic!("no {key}"))
            .to_string()
    }

    #[test]
    fn what_is_absent_is_filled_in() {
        let fields =
            parse("a\nSteps: 20, Sampler: Euler, Size: 512x768, Version: v1.10.1").fields(PLAIN);
        for (key, value) in [
            ("Size-1", "512"),
            ("Size-2", "768"),
            ("Prompt", "a"),
            ("Negative prompt", ""),
            ("Clip skip", "1"),
            ("Hires resize-1", "0"),
            ("Hires sampler", SAME_SAMPLER),
            ("Masked area padding", "32"),
            ("RNG", "GPU"),
            ("Schedule type", "Automatic"),
            ("Refiner switch by sampling steps", "False"),
        ] {
            assert_eq!(field(&fields, key), value, "{key}");
        }
        assert!(
            [
                "Emphasis",
                "Downcast alphas_cumprod",
                "Cache FP16 weight for LoRA",
                "Size"
            ]
            .iter()
            .all(|key| fields.get(key).is_none())
        );
        let weighted = parse("a\nSteps: 2, Sampler: x, FP8 weight: Enable").fields(Completion {
            weighted_prompt: true,
            ..PLAIN
        });
        assert_eq!(
            (
                field(&weighted, "Emphasis"),
                field(&weighted, "Cache FP16 weight for LoRA")
            ),
            ("Original".into(), "False".into())
        );
    }

    #[test]
    fn old_versions_are_read_as_they_meant() {
        let old =
            parse("[a:b:3]\nSteps: 20, Sampler: DDIM, Refiner: x, Version: v1.5.2").fields(PLAIN);
        for key in [
            "Old prompt editing timelines",
            "Pad conds v0",
            "Downcast alphas_cumprod",
            "Refiner switch by sampling steps",
        ] {
            assert_eq!(field(&old, key), "True", "{key}");
        }
        for (version, downcast) in [
            ("v1.7.0-224-gabc", true),
            ("v1.7.0-225-gabc", false),
            ("v1.8.0-RC", false),
            ("sdgen", false),
        ] {
            let fields = parse(&format!(
                "a\nSteps: 1, Sampler: Euler, Seed: 2, Version: {version}"
            ))
            .fields(PLAIN);
            assert_eq!(
                fields.get("Downcast alphas_cumprod").is_some(),
                downcast,
                "{version}"
            );
        }
    }

    #[test]
    fn first_pass_sizes_and_hypernetworks_of_old_texts_are_restored() {
        let fields =
            parse("a\nSteps: 1, Size: 1024x768, First pass size: 0x0, Hypernet: anime, Seed: 1")
                .fields(PLAIN);
        assert_eq!(field(&fields, "Prompt"), "a<hypernet:anime:1.0>");
        assert_eq!(
            ["Size-1", "Size-2", "Hires resize-1", "Hires resize-2"].map(|key| field(&fields, key)),
            ["640", "448", "1024", "768"]
        );
    }
}
