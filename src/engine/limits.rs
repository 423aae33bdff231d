//! What a job may ask for, checked before any work. Shared by the HTTP API and the command line, which name the fields their
//! own way.

mod passes;

pub use passes::{HiresNumbers, ImageNumbers, check_hires, check_image};

use crate::config::Limits;

/// Smallest width and height, pixels: one latent pixel.
pub const MIN_SIDE: i64 = 8;

/// The numbers of a request as they were typed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Numbers<'a> {
    /// Pixels.
    pub width: i64,
    /// Pixels.
    pub height: i64,
    /// Sampler steps.
    pub steps: i64,
    /// Guidance scale.
    pub cfg_scale: f64,
    /// Pictures per batch.
    pub batch_size: i64,
    /// Batches.
    pub batch_count: i64,
    /// -1 or a seed.
    pub seed: i64,
    /// -1 or a variation seed.
    pub subseed: i64,
    /// 0 to 1.
    pub subseed_strength: f64,
    /// Positive prompt.
    pub prompt: &'a str,
    /// Negative prompt.
    pub negative_prompt: &'a str,
}

/// A number outside its limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// A1111's name of the field.
    pub field: &'static str,
    /// What it must be, which setting limits it, and what it was.
    pub message: String,
}

/// Every number outside its limits.
#[must_use]
pub fn check(numbers: &Numbers<'_>, limits: &Limits) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut fail = |field, message| found.push(Violation { field, message });
    #[rustfmt::skip]
    let ranges = [
        ("width", numbers.width, MIN_SIDE, limits.max_side, "pixels ", "max_side"),
        ("height", numbers.height, MIN_SIDE, limits.max_side, "pixels ", "max_side"),
        ("steps", numbers.steps, 1, limits.max_steps, "", "max_steps"),
        ("batch_size", numbers.batch_size, 1, limits.max_batch_size, "", "max_batch_size"),
        ("n_iter", numbers.batch_count, 1, limits.max_batch_count, "", "max_batch_count"),
    ];
    for (field, value, least, most, unit, key) in ranges {
        if value < least || value > most as i64 {
            fail(
                field,
                format!(
                    "must be between {least} and {most} {unit}(setting `limits.{key}`): `{value}`"
                ),
            );
        }
    }
    if !numbers.cfg_scale.is_finite() || numbers.cfg_scale.abs() > 1e4 {
        fail(
            "cfg_scale",
            format!(
                "must be a finite number of at most 10000: `{}`",
                numbers.cfg_scale
            ),
        );
    }
    if !(0.0..=1.0).contains(&numbers.subseed_strength) {
        fail(
            "subseed_strength",
            format!("must be between 0 and 1: `{}`", numbers.subseed_strength),
        );
    }
    for (field, seed) in [("seed", numbers.seed), ("subseed", numbers.subseed)] {
        if seed < -1 {
            fail(
                field,
                format!(
                    "must be -1 (random) or between 0 and {}: `{seed}`",
                    i64::MAX
                ),
            );
        }
    }
    found.extend(long_text("prompt", numbers.prompt, limits));
    found.extend(long_text(
        "negative_prompt",
        numbers.negative_prompt,
        limits,
    ));
    if found.is_empty() {
        found.extend(check_area(numbers, limits));
    }
    found
}

fn long_text(field: &'static str, text: &str, limits: &Limits) -> Option<Violation> {
    let limit = limits.max_prompt_kib * 1024;
    (text.len() > limit).then(|| Violation {
        field,
        message: format!(
            "has {} bytes, more than {limit} (setting `limits.max_prompt_kib`)",
            text.len()
        ),
    })
}

/// Sizes that are good one by one can be too much together.
fn check_area(numbers: &Numbers<'_>, limits: &Limits) -> Option<Violation> {
    let pixels = numbers.batch_size as u64 * numbers.width as u64 * numbers.height as u64;
    let limit = limits.max_megapixels;
    (pixels > limit as u64 * 1_000_000).then(|| Violation {
        field: "batch_size",
        message: format!(
            "`batch_size * width * height` is {:.1} megapixels, more than {limit} (setting `limits.max_megapixels`)",
            pixels as f64 / 1e6
        ),
    })
}

/// The seed itself, or a random one as A1111 draws it: 0 to 4294967293.
#[must_use]
pub fn resolve_seed(seed: i64) -> u64 {
    u64::try_from(seed).unwrap_or_else(|_| rand::random_range(0..4_294_967_294))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Numbers<'_> = Numbers {
        width: 1024,
        height: 1024,
        steps: 20,
        cfg_scale: 7.0,
        batch_size: 1,
        batch_count: 1,
        seed: -1,
        subseed: -1,
        subseed_strength: 0.0,
        prompt: "",
        negative_prompt: "",
    };

    fn violations(numbers: &Numbers<'_>) -> Vec<String> {
        let found = check(numbers, &Limits::default());
        found
            .into_iter()
            .map(|v| format!("{} {}", v.field, v.message))
            .collect()
    }

    #[test]
    fn the_limits_are_named_with_the_value() {
        assert_eq!(violations(&GOOD), [""; 0]);
        let bad = Numbers {
            width: 7,
            height: 100_000,
            steps: 0,
            cfg_scale: f64::NAN,
            seed: -2,
            ..GOOD
        };
        assert_eq!(
            violations(&bad),
            [
                "width must be between 8 and 4096 pixels (setting `limits.max_side`): `7`",
                "height must be between 8 and 4096 pixels (setting `limits.max_side`): `100000`",
                "steps must be between 1 and 1000 (setting `limits.max_steps`): `0`",
                "cfg_scale must be a finite number of at most 10000: `NaN`",
                "seed must be -1 (random) or between 0 and 9223372036854775807: `-2`",
            ]
        );
    }

    #[test]
    fn a_batch_of_large_pictures_is_one_limit_of_its_own() {
        let bad = Numbers {
            width: 4096,
            height: 4096,
            batch_size: 4,
            ..GOOD
        };
        let message = "batch_size `batch_size * width * height` is 67.1 megapixels, more than 64 (setting `limits.max_megapixels`)";
        assert_eq!(violations(&bad), [message]);
    }

    #[test]
    fn long_prompts_are_measured_in_bytes() {
        let prompt = "x".repeat(1 << 20);
        let bad = Numbers {
            prompt: &prompt,
            ..GOOD
        };
        assert_eq!(
            violations(&bad),
            ["prompt has 1048576 bytes, more than 65536 (setting `limits.max_prompt_kib`)"]
        );
    }

    #[test]
    fn random_seeds_stay_in_range_and_others_are_kept() {
        assert_eq!(resolve_seed(i64::MAX), i64::MAX as u64);
        assert!((0..100).all(|_| resolve_seed(-1) < 4_294_967_294));
    }
}
