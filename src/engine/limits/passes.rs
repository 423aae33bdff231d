//! What a job from pictures and a second pass may ask for.
//!
//! A size is worked out only as far as it is known to be small, and nothing of it is allocated before it is allowed.

use super::{MIN_SIDE, Violation, long_text};
use crate::config::Limits;
use crate::pipeline::HiresSize;

/// The numbers of a job that starts from pictures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ImageNumbers {
    /// 0 to 1.
    pub denoising_strength: f64,
    /// Sampler steps, if all of them are run.
    pub exact_steps: Option<i64>,
    /// 0 to 3.
    pub resize_mode: i64,
    /// Pixels along the rows and along the columns; what is negative means 0.
    pub mask_blur: (i64, i64),
    /// 0 to 3.
    pub inpainting_fill: i64,
    /// Pixels.
    pub padding: i64,
    /// Factor on the initial noise.
    pub noise_multiplier: f64,
}

/// The numbers of a second pass over pictures of `width` x `height` pixels, which are within their limits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HiresNumbers<'a> {
    /// Pixels.
    pub width: i64,
    /// Pixels.
    pub height: i64,
    /// Pictures per batch.
    pub batch_size: i64,
    /// 0 to 1.
    pub denoising_strength: f64,
    /// Factor on both sides; used if `resize` is all 0.
    pub scale: f64,
    /// Width and height in pixels; 0 follows the other.
    pub resize: (i64, i64),
    /// Steps of the first pass.
    pub first_steps: i64,
    /// Steps of the second; 0 = as the first.
    pub steps: i64,
    /// Guidance scale of the second pass.
    pub cfg_scale: Option<f64>,
    /// Prompt of the second pass.
    pub prompt: &'a str,
    /// Negative prompt of the second pass.
    pub negative_prompt: &'a str,
}

/// Largest `mask_blur` in pixels.
const MAX_MASK_BLUR: i64 = 256;

/// Largest `inpaint_full_res_padding` in pixels.
const MAX_PADDING: i64 = 16_384;

/// Longest schedule of which a part is run.
const MAX_SCHEDULE: f64 = 100_000.0;

/// Every number of a job from pictures that is outside its limits.
#[must_use]
pub fn check_image(numbers: &ImageNumbers) -> Vec<Violation> {
    let mut found: Vec<Violation> = strength(numbers.denoising_strength, numbers.exact_steps)
        .into_iter()
        .collect();
    let mut fail = |field, message| found.push(Violation { field, message });
    if !(0..=3).contains(&numbers.resize_mode) {
        fail(
            "resize_mode",
            format!(
                "must be 0 (stretch), 1 (crop), 2 (fill) or 3 (stretch latents): `{}`",
                numbers.resize_mode
            ),
        );
    }
    if !(0..=3).contains(&numbers.inpainting_fill) {
        fail(
            "inpainting_fill",
            format!(
                "must be 0 (fill), 1 (original), 2 (latent noise) or 3 (latent nothing): `{}`",
                numbers.inpainting_fill
            ),
        );
    }
    let blur = numbers.mask_blur.0.max(numbers.mask_blur.1);
    if blur > MAX_MASK_BLUR {
        fail(
            "mask_blur",
            format!("must be at most {MAX_MASK_BLUR} pixels: `{blur}`"),
        );
    }
    if !(0..=MAX_PADDING).contains(&numbers.padding) {
        fail(
            "inpaint_full_res_padding",
            format!(
                "must be between 0 and {MAX_PADDING} pixels: `{}`",
                numbers.padding
            ),
        );
    }
    if !(0.0..=100.0).contains(&numbers.noise_multiplier) {
        fail(
            "initial_noise_multiplier",
            format!("must be between 0 and 100: `{}`", numbers.noise_multiplier),
        );
    }
    found
}

/// Every number of a second pass that is outside its limits, the size it leads to included.
#[must_use]
pub fn check_hires(numbers: &HiresNumbers<'_>, limits: &Limits) -> Vec<Violation> {
    let steps = if numbers.steps == 0 {
        numbers.first_steps
    } else {
        numbers.steps
    };
    let mut found = Vec::new();
    if (0..=limits.max_steps as i64).contains(&numbers.steps) {
        found.extend(strength(numbers.denoising_strength, Some(steps)));
    } else {
        found.push(Violation {
            field: "hr_second_pass_steps",
            message: format!(
                "must be between 0 and {} (setting `limits.max_steps`): `{}`",
                limits.max_steps, numbers.steps
            ),
        });
    }
    if let Some(scale) = numbers
        .cfg_scale
        .filter(|scale| !scale.is_finite() || scale.abs() > 1e4)
    {
        found.push(Violation {
            field: "hr_cfg",
            message: format!("must be a finite number of at most 10000: `{scale}`"),
        });
    }
    found.extend(long_text("hr_prompt", numbers.prompt, limits));
    found.extend(long_text(
        "hr_negative_prompt",
        numbers.negative_prompt,
        limits,
    ));
    found.extend(check_target(numbers, limits));
    found
}

/// The size of the second pass, worked out only as far as it is known to be small.
fn check_target(numbers: &HiresNumbers<'_>, limits: &Limits) -> Option<Violation> {
    let most = limits.max_side as i64;
    let range = format!("between {MIN_SIDE} and {most} pixels (setting `limits.max_side`)");
    let violation = |field, message| Some(Violation { field, message });
    for (field, side) in [
        ("hr_resize_x", numbers.resize.0),
        ("hr_resize_y", numbers.resize.1),
    ] {
        if side != 0 && !(MIN_SIDE..=most).contains(&side) {
            return violation(field, format!("must be 0 or {range}: `{side}`"));
        }
    }
    let (field, asked, size) = match numbers.resize {
        (0, 0) => {
            let longest = numbers.width.max(numbers.height) as f64 * numbers.scale;
            // Not a number fails here as well.
            if !(longest < most as f64 + 1.0 && numbers.scale > 0.0) {
                let message = format!(
                    "of `{}` makes a side of {longest:.0} pixels; a side must be {range}",
                    numbers.scale
                );
                return violation("hr_scale", message);
            }
            (
                "hr_scale",
                numbers.scale.to_string(),
                HiresSize::Scale(numbers.scale),
            )
        }
        (x, y) => (
            "hr_resize_x",
            format!("{x}x{y}"),
            HiresSize::Resize(x as usize, y as usize),
        ),
    };
    let target = size.target(numbers.width as usize, numbers.height as usize);
    let (width, height) = (target.width as i64, target.height as i64);
    if width.min(height) < MIN_SIDE || width.max(height) > most {
        let message = format!("of `{asked}` makes {width}x{height} pixels; a side must be {range}");
        return violation(field, message);
    }
    let pixels = numbers.batch_size as u64 * width as u64 * height as u64;
    let limit = limits.max_megapixels;
    if pixels <= limit as u64 * 1_000_000 {
        return None;
    }
    violation(
        field,
        format!(
            "of `{asked}` makes {} x {width}x{height} pixels, {:.1} megapixels and more than {limit} (setting `limits.max_megapixels`)",
            numbers.batch_size,
            pixels as f64 / 1e6
        ),
    )
}

/// A denoising strength that is none, or that makes a schedule without end.
fn strength(strength: f64, exact_steps: Option<i64>) -> Option<Violation> {
    let message = if (0.0..=1.0).contains(&strength) {
        let schedule = exact_steps? as f64 / strength.min(0.999);
        if strength == 0.0 || schedule <= MAX_SCHEDULE {
            return None;
        }
        format!(
            "of `{strength}` makes a schedule of {schedule:.0} steps, more than {MAX_SCHEDULE}; 0 leaves the picture as it is"
        )
    } else {
        format!("must be between 0 and 1: `{strength}`")
    };
    Some(Violation {
        field: "denoising_strength",
        message,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENLARGED: HiresNumbers<'_> = HiresNumbers {
        width: 1024,
        height: 1024,
        batch_size: 1,
        denoising_strength: 0.5,
        scale: 2.0,
        resize: (0, 0),
        first_steps: 20,
        steps: 0,
        cfg_scale: None,
        prompt: "",
        negative_prompt: "",
    };

    fn of_hires(numbers: &HiresNumbers<'_>) -> Vec<String> {
        let found = check_hires(numbers, &Limits::default());
        found
            .into_iter()
            .map(|v| format!("{} {}", v.field, v.message))
            .collect()
    }

    #[test]
    fn sizes_of_a_second_pass_are_refused_by_what_they_lead_to() {
        assert_eq!(of_hires(&ENLARGED), [""; 0]);
        for (scale, message) in [
            (1e300, "hr_scale of `1000"),
            (
                -1.0,
                "hr_scale of `-1` makes a side of -1024 pixels; a side must be between 8 and 4096 pixels (setting `limits.max_side`)",
            ),
            (
                f64::NAN,
                "hr_scale of `NaN` makes a side of NaN pixels; a side",
            ),
            (
                0.001,
                "hr_scale of `0.001` makes 1x1 pixels; a side must be between 8",
            ),
        ] {
            let found = of_hires(&HiresNumbers { scale, ..ENLARGED });
            assert!(
                found.len() == 1 && found[0].starts_with(message),
                "{found:?}"
            );
        }
        let resize = |resize| {
            of_hires(&HiresNumbers {
                resize,
                height: 8,
                ..ENLARGED
            })
        };
        assert_eq!(resize((2048, 0)), [""; 0]);
        assert_eq!(
            resize((0, 100_000)),
            [
                "hr_resize_y must be 0 or between 8 and 4096 pixels (setting `limits.max_side`): `100000`"
            ]
        );
        assert_eq!(
            resize((64, 64)),
            [
                "hr_resize_x of `64x64` makes 8192x64 pixels; a side must be between 8 and 4096 pixels (setting `limits.max_side`)"
            ]
        );
        let many = HiresNumbers {
            scale: 4.0,
            batch_size: 4,
            ..ENLARGED
        };
        assert_eq!(
            of_hires(&many),
            [
                "hr_scale of `4` makes 4 x 4096x4096 pixels, 67.1 megapixels and more than 64 (setting `limits.max_megapixels`)"
            ]
        );
    }

    #[test]
    fn strengths_are_shares_and_schedules_end() {
        let image = ImageNumbers {
            denoising_strength: 0.0,
            exact_steps: Some(20),
            resize_mode: 3,
            mask_blur: (-1, 256),
            inpainting_fill: 3,
            padding: 0,
            noise_multiplier: 1.0,
        };
        assert_eq!(check_image(&image), []);
        let bad = ImageNumbers {
            denoising_strength: 1e-9,
            resize_mode: 4,
            mask_blur: (0, 257),
            inpainting_fill: -1,
            padding: -1,
            noise_multiplier: -0.5,
            ..image
        };
        let messages: Vec<String> = check_image(&bad).into_iter().map(|v| v.message).collect();
        assert_eq!(
            messages,
            [
                "of `0.000000001` makes a schedule of 20000000000 steps, more than 100000; 0 leaves the picture as it is",
                "must be 0 (stretch), 1 (crop), 2 (fill) or 3 (stretch latents): `4`",
                "must be 0 (fill), 1 (original), 2 (latent noise) or 3 (latent nothing): `-1`",
                "must be at most 256 pixels: `257`",
                "must be between 0 and 16384 pixels: `-1`",
                "must be between 0 and 100: `-0.5`",
            ]
        );
        let over = HiresNumbers {
            denoising_strength: 1.5,
            ..ENLARGED
        };
        assert_eq!(
            of_hires(&over),
            ["denoising_strength must be between 0 and 1: `1.5`"]
        );
    }
}
