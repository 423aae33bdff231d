//! The options in force for one request, and what they mean to the engine.
//!
//! A request's `override_settings` change the options for that request only, or in memory for good if it says so; the settings
//! file never changes. An override that names no checkpoint is dropped, as A1111 drops it.

use serde_json::{Map, Value};

use super::App;
use super::error::ApiError;
use super::options::{self, Options};
use super::options_table::{RESTRICTED, find};
use super::types::Generation;
use crate::engine;
use crate::pipeline::{PadConds, Settings};
use crate::prompt::EditRule;
use crate::sampling::TableOptions;

/// The stored options with the request's overrides.
///
/// # Errors
/// Values that do not fit their keys; a checkpoint file that cannot be read.
pub fn in_force(app: &App, request: &Generation) -> Result<Options, ApiError> {
    let mut in_force = app.options.snapshot();
    let Some(sent) = request.override_settings.clone() else {
        return Ok(in_force);
    };
    let mut overrides = options::check(sent)?;
    if let Some(name) = overrides.get("sd_model_checkpoint").and_then(Value::as_str) {
        match app.engine.catalog().find(name) {
            Ok(checkpoint) => {
                drop(overrides.insert("sd_model_checkpoint".into(), checkpoint.title().into()));
            }
            Err(engine::Error::CheckpointNotFound { name, .. }) => {
                // A1111's contract: the override is dropped and the request goes on with the current model.
                tracing::warn!(
                    checkpoint = name,
                    "override of `sd_model_checkpoint` names no checkpoint and is dropped"
                );
                overrides.remove("sd_model_checkpoint");
            }
            Err(error) => return Err(error.into()),
        }
    }
    for (key, value) in &overrides {
        if !value.is_null() {
            in_force.set(key, value.clone());
        }
    }
    Ok(in_force)
}

/// Keeps the overrides of a request that is carried out in memory, unless they are to be restored afterwards.
pub fn keep(app: &App, request: &Generation, in_force: &Options) {
    let sent = request.override_settings.iter().flatten();
    let settable = |key: &&String| find(key).is_some() && !RESTRICTED.contains(&key.as_str());
    let kept: Map<String, Value> = sent
        .filter(|(_, value)| !value.is_null())
        .map(|(key, _)| key)
        .filter(settable)
        .filter_map(|key| Some((key.clone(), in_force.as_map().get(key)?.clone())))
        .collect();
    if !request.override_settings_restore_afterwards && !kept.is_empty() {
        app.options.apply(&kept);
    }
}

/// What the options say about how a job is carried out.
#[must_use]
pub fn settings(options: &Options) -> Settings {
    let pixels = |key: &str| options.int(key).max(0) as usize;
    Settings {
        crop: (pixels("sdxl_crop_top"), pixels("sdxl_crop_left")),
        clip_l_skip: options.flag("sdxl_clip_l_skip"),
        comma_backtrack: options.int("comma_padding_backtrack").clamp(0, 74) as usize,
        strip_comments: options.flag("enable_prompt_comments"),
        edit_rule: if options.flag("use_old_scheduling") {
            EditRule::Old
        } else {
            EditRule::Current
        },
        // The old way wins where both are on, as in A1111.
        padding: if options.flag("pad_cond_uncond_v0") {
            PadConds::NegativeOnly
        } else if options.flag("pad_cond_uncond") {
            PadConds::EmptyPrompt
        } else {
            PadConds::Apart
        },
        firstpass_conds: options.flag("hires_fix_use_firstpass_conds"),
        hires_extra_noise: options.float("img2img_extra_noise").clamp(0.0, 100.0) as f32,
        mask_weight: options.float("inpainting_mask_weight").clamp(0.0, 1.0) as f32,
        table: TableOptions {
            downcast_alphas: options.flag("use_downcasted_alpha_bar"),
            zero_terminal_snr: options.text("sd_noise_schedule") == "Zero Terminal SNR",
            quantize: options.flag("enable_quantization"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_options_are_default_settings() {
        assert_eq!(settings(&Options::defaults()), Settings::default());
    }

    #[test]
    fn absurd_numbers_are_brought_to_their_ranges() {
        let mut options = Options::defaults();
        options.set("sdxl_crop_top", (-5).into());
        options.set("comma_padding_backtrack", 1_000.into());
        options.set("pad_cond_uncond", true.into());
        options.set("pad_cond_uncond_v0", true.into());
        let settings = settings(&options);
        assert_eq!((settings.crop, settings.comma_backtrack), ((0, 0), 74));
        assert_eq!(settings.padding, PadConds::NegativeOnly);
    }
}
