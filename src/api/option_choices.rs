//! The options that take one of a few words, or a colour. They are held to that when they are set, so that no stored text fails a
//! later job.
//!
//! A word is matched whatever its case and kept as it is spelled here.

use serde_json::Value;

use super::error::Problem;
use super::pictures::parse_color;
use crate::pipeline::RefinerPasses;
use crate::prompt::Emphasis;
use crate::rng::NoiseSource;
use crate::sampling::{UniPcSkip, UniPcVariant};

const PICTURE_FORMATS: &[&str] = &["png", "jpg", "jpeg", "webp"];

const COLORS: &[&str] = &["img2img_background_color", "grid_background_color"];

/// The words of an option; none if it takes any text.
fn words(option: &str) -> Vec<&'static str> {
    match option {
        "randn_source" => NoiseSource::ALL.map(NoiseSource::label).to_vec(),
        "emphasis" => Emphasis::ALL.map(Emphasis::label).to_vec(),
        "uni_pc_variant" => UniPcVariant::ALL.map(UniPcVariant::name).to_vec(),
        "uni_pc_skip_type" => UniPcSkip::ALL.map(UniPcSkip::name).to_vec(),
        "hires_fix_refiner_pass" => RefinerPasses::ALL.map(RefinerPasses::label).to_vec(),
        "sd_noise_schedule" => vec!["Default", "Zero Terminal SNR"],
        "sd_vae_encode_method" | "sd_vae_decode_method" => vec!["Full", "TAESD"],
        "samples_format" | "grid_format" => PICTURE_FORMATS.to_vec(),
        "live_preview_content" => vec!["Combined", "Prompt", "Negative prompt"],
        _ => Vec::new(),
    }
}

/// The value as the option keeps it.
///
/// # Errors
/// Names the words that the option takes.
pub fn keep(option: &str, value: Value) -> Result<Value, Problem> {
    let words = words(option);
    let Some(text) = value.as_str() else {
        return Ok(value);
    };
    if COLORS.contains(&option) && parse_color(text).is_none() {
        let msg = format!("no colour like `#ffffff`: {text:?}");
        return Err(Problem::field(option, msg, "value_error.color"));
    }
    if words.is_empty() {
        return Ok(value);
    }
    let word = words.iter().find(|word| word.eq_ignore_ascii_case(text));
    word.map(|word| Value::from(*word)).ok_or_else(|| {
        let msg = format!("unknown value: {text:?}; one of: {}", words.join(", "));
        Problem::field(option, msg, "value_error.const")
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::api::options_table::OPTIONS;

    #[test]
    fn every_default_is_one_of_the_words() {
        for (option, _, default) in OPTIONS {
            assert_eq!(keep(option, default.to_json()), Ok(default.to_json()));
        }
    }

    #[test]
    fn words_are_kept_in_their_own_spelling_and_others_refused() {
        assert_eq!(keep("randn_source", json!("nv")), Ok(json!("NV")));
        assert_eq!(keep("sd_vae", json!("anything")), Ok(json!("anything")));
        let problem = keep("samples_format", json!("b\0mp")).unwrap_err();
        assert_eq!(
            problem.msg,
            r#"unknown value: "b\0mp"; one of: png, jpg, jpeg, webp"#
        );
    }
}
