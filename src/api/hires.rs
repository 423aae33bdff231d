//! Hires fix's fields: the sizes they mean, and names looked up.
//!
//! Shared with the command line, which has the same fields. Follows `StableDiffusionProcessingTxt2Img` of A1111 1.10.

use super::types::{Generation, HiresFields};
use super::vocabulary;
use crate::engine::limits::HiresNumbers;
use crate::pipeline::{Hires, HiresSize};
use crate::sampling::{Sampler, Scheduler};

/// Names of the drop-downs' first entries, which mean the first pass's choice.
const SAME: [&str; 4] = [
    "",
    "Use same checkpoint",
    "Use same sampler",
    "Use same scheduler",
];

/// Takes the old fields `firstphase_width` and `firstphase_height` at their word: they are the first pass's size, and the request's
/// size is the second's.
pub fn apply_first_phase(request: &mut Generation, fields: &mut HiresFields) {
    let first = (fields.firstphase_width, fields.firstphase_height);
    if first == (0, 0) {
        return;
    }
    if (fields.hr_resize_x, fields.hr_resize_y) == (0, 0) {
        (fields.hr_resize_x, fields.hr_resize_y) = (request.width, request.height);
    }
    (request.width, request.height) = first;
}

/// The numbers to be checked, for pictures of `size` pixels in batches of `batch_size` by `steps`.
#[must_use]
pub fn numbers(
    fields: &HiresFields,
    size: (i64, i64),
    batch_size: i64,
    steps: i64,
) -> HiresNumbers<'_> {
    HiresNumbers {
        width: size.0,
        height: size.1,
        batch_size,
        denoising_strength: fields.denoising_strength,
        scale: fields.hr_scale,
        resize: (fields.hr_resize_x, fields.hr_resize_y),
        first_steps: steps,
        steps: fields.hr_second_pass_steps,
        cfg_scale: fields.hr_cfg,
        prompt: &fields.hr_prompt,
        negative_prompt: &fields.hr_negative_prompt,
    }
}

/// The second pass of fields whose numbers were checked; its checkpoint is [`checkpoint`]'s, by name.
///
/// # Errors
/// A sentence that names what is unknown and what there is.
pub fn build(fields: &HiresFields) -> Result<Hires, String> {
    let (sampler, scheduler) = find_sampler(fields)?;
    Ok(Hires {
        size: match (fields.hr_resize_x, fields.hr_resize_y) {
            (0, 0) => HiresSize::Scale(fields.hr_scale),
            (x, y) => HiresSize::Resize(x as usize, y as usize),
        },
        upscaler: vocabulary::find_hires_upscaler(fields.hr_upscaler.as_deref())?,
        steps: fields.hr_second_pass_steps as usize,
        strength: fields.denoising_strength as f32,
        sampler,
        scheduler,
        prompt: fields.hr_prompt.clone(),
        negative_prompt: fields.hr_negative_prompt.clone(),
        cfg_scale: fields.hr_cfg.map(|scale| scale as f32),
        checkpoint: None,
    })
}

/// The name of the second pass's own checkpoint, if it is to use one.
#[must_use]
pub fn checkpoint(fields: &HiresFields) -> Option<&str> {
    named(fields.hr_checkpoint_name.as_deref())
}

/// A scheduler at the end of the sampler's name wins, as in the first pass.
fn find_sampler(fields: &HiresFields) -> Result<(Option<Sampler>, Option<Scheduler>), String> {
    let (sampler, suffix) = match named(fields.hr_sampler_name.as_deref()) {
        Some(name) => {
            let (sampler, suffix) = vocabulary::find_sampler(name)?;
            (Some(sampler), suffix)
        }
        None => (None, None),
    };
    let scheduler = match (suffix, named(fields.hr_scheduler.as_deref())) {
        (None, Some(name)) => Some(vocabulary::find_scheduler(name)?),
        (suffix, _) => suffix,
    };
    Ok((sampler, scheduler))
}

fn named(name: Option<&str>) -> Option<&str> {
    name.map(str::trim)
        .filter(|name| !SAME.iter().any(|same| same.eq_ignore_ascii_case(name)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::api::fields::read;
    use crate::api::types::txt2img;
    use serde::Deserialize;

    fn fields(body: &str) -> HiresFields {
        HiresFields::deserialize(&read(body.as_bytes(), &txt2img()).unwrap()).unwrap()
    }

    #[test]
    fn nothing_sent_is_twice_the_size_by_latents() {
        let hires = build(&fields("{}")).unwrap();
        assert_eq!(hires.size, HiresSize::Scale(2.0));
        assert_eq!(hires.upscaler.label(), "Latent");
        assert_eq!((hires.sampler, hires.scheduler), (None, None));
        assert!((hires.strength - 0.75).abs() < f32::EPSILON);
    }

    #[test]
    fn the_words_for_the_same_are_no_names() {
        let same = r#"{"hr_sampler_name": "Use same sampler", "hr_scheduler": "Use same scheduler", "hr_checkpoint_name": "Use same checkpoint"}"#;
        let same = fields(same);
        let hires = build(&same).unwrap();
        assert_eq!((hires.sampler, hires.scheduler), (None, None));
        assert_eq!(checkpoint(&same), None);
        let other = fields(r#"{"hr_checkpoint_name": "other"}"#);
        assert_eq!(checkpoint(&other), Some("other"));
        let other = build(&fields(
            r#"{"hr_sampler_name": "DPM++ 2M Karras", "hr_scheduler": "simple"}"#,
        ));
        assert_eq!(
            other.unwrap().scheduler.map(Scheduler::label),
            Some("Karras")
        );
    }

    #[test]
    fn the_old_fields_swap_the_sizes() {
        let body =
            br#"{"firstphase_width": 64, "firstphase_height": 96, "width": 128, "height": 192}"#;
        let wire = read(body, &txt2img()).unwrap();
        let mut request = Generation::deserialize(&wire).unwrap();
        let mut hires = HiresFields::deserialize(&wire).unwrap();
        apply_first_phase(&mut request, &mut hires);
        assert_eq!((request.width, request.height), (64, 96));
        assert_eq!(build(&hires).unwrap().size, HiresSize::Resize(128, 192));
    }

    #[test]
    fn unknown_upscalers_are_named_in_a1111s_words() {
        assert_eq!(
            build(&fields(r#"{"hr_upscaler": "4x-UltraSharp"}"#)).unwrap_err(),
            "could not find upscaler named 4x-UltraSharp; valid: `Latent`, `Latent (antialiased)`, `Latent (bicubic)`, \
             `Latent (bicubic antialiased)`, `Latent (nearest)`, `Latent (nearest-exact)`, `None`, `Lanczos`, `Nearest`"
        );
    }
}
