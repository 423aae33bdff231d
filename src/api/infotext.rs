//! The request field `infotext`: the text of a picture fills the fields that a request does not send.
//!
//! A field that was sent, `null` included, keeps its value. Settings that the text implies go into `override_settings` unless they
//! are there or in force already. Follows `Api.apply_infotext` and `infotext_utils.py` of A1111 1.10, with two differences: there
//! the fields of img2img other than sampler and seed have no API names and are not filled, and width and height of
//! `Seed resize from` are swapped.

use serde_json::{Map, Value, json};

use super::App;
use super::fields::{self, Field, Kind};
use super::known_names::{Known, rename_loras, take_styles};
use super::options::Options;
use super::options_table::find;
use super::vocabulary::has_weights;
use super::{styles, types};
use crate::imaging::infotext::{
    self as text, Completion, OVERRIDES, Params, SAME_SAMPLER, SAME_SCHEDULER,
};
use crate::sampling::{Sampler, Scheduler};

/// Which request is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tab {
    /// `txt2img`.
    Txt2img,
    /// `img2img`.
    Img2img,
}

impl Tab {
    /// Every field of the request.
    #[must_use]
    pub fn fields(self) -> Vec<Field> {
        match self {
            Self::Txt2img => types::txt2img(),
            Self::Img2img => types::img2img(),
        }
    }
}

/// Infotext's keys and the fields they fill as they are.
const BOTH: &[(&str, &str)] = &[
    ("Prompt", "prompt"),
    ("Negative prompt", "negative_prompt"),
    ("Steps", "steps"),
    ("CFG scale", "cfg_scale"),
    ("Seed", "seed"),
    ("Size-1", "width"),
    ("Size-2", "height"),
    ("Batch size", "batch_size"),
    ("Denoising strength", "denoising_strength"),
    ("Variation seed", "subseed"),
    ("Variation seed strength", "subseed_strength"),
    ("Seed resize from-1", "seed_resize_from_w"),
    ("Seed resize from-2", "seed_resize_from_h"),
    ("Refiner", "refiner_checkpoint"),
    ("Refiner switch at", "refiner_switch_at"),
];

const TXT2IMG: &[(&str, &str)] = &[
    ("Hires upscale", "hr_scale"),
    ("Hires upscaler", "hr_upscaler"),
    ("Hires steps", "hr_second_pass_steps"),
    ("Hires resize-1", "hr_resize_x"),
    ("Hires resize-2", "hr_resize_y"),
    ("Hires checkpoint", "hr_checkpoint_name"),
    ("Hires prompt", "hr_prompt"),
    ("Hires negative prompt", "hr_negative_prompt"),
    ("Hires CFG Scale", "hr_cfg"),
];

const IMG2IMG: &[(&str, &str)] = &[
    ("Image CFG scale", "image_cfg_scale"),
    ("Mask blur", "mask_blur"),
    ("Masked area padding", "inpaint_full_res_padding"),
];

/// The values of `inpainting_fill`, by number.
const MASKED_CONTENT: [&str; 4] = ["fill", "original", "latent noise", "latent nothing"];

/// Fills a request's body from its `infotext`, if it has one.
pub fn fill(app: &App, sent: &mut Map<String, Value>, tab: Tab) {
    let Some(infotext) = sent
        .get("infotext")
        .and_then(Value::as_str)
        .filter(|text| !text.is_empty())
    else {
        return;
    };
    let options = app.options.snapshot();
    let known = Known {
        styles: styles::load(&app.config),
        loras: app.engine.catalog().networks().loras(),
        names_by_file: options.text("lora_preferred_name") == "Filename",
        hash_of: &|lora| app.engine.catalog().known_lora_hash(lora),
    };
    let read = read(infotext, &options, &known);
    complete(sent, &read, &options, tab);
}

/// A text taken apart.
struct Read {
    fields: Params,
    /// Styles found in the prompts, if they are to be used.
    styles: Option<Vec<String>>,
}

/// Reads a text as `parse_generation_parameters` does.
fn read(infotext: &str, options: &Options, known: &Known<'_>) -> Read {
    let mut parsed = text::parse(infotext);
    let styles = take_styles(&mut parsed, options.text("infotext_styles"), &known.styles);
    let mut fields = parsed.fields(Completion {
        weighted_prompt: has_weights(&parsed.prompt) || has_weights(&parsed.negative_prompt),
        back_compatible: options.flag("auto_backcompat"),
    });
    if options.flag("use_old_hires_fix_width_height") {
        let resize = ["Hires resize-1", "Hires resize-2"].map(|key| shown(&fields, key));
        if resize
            .iter()
            .all(|side| side.parse().is_ok_and(|side: u32| side > 0))
        {
            let [width, height] = resize;
            fields.extend([("Size-1", width), ("Size-2", height)]);
        }
    }
    for key in options.texts("infotext_skip_pasting") {
        fields.remove(&key);
    }
    if let Some(hashes) = fields.get("Lora hashes").map(ToString::to_string) {
        let prompt = rename_loras(&shown(&fields, "Prompt"), &hashes, known);
        fields.insert("Prompt", prompt);
    }
    Read { fields, styles }
}

/// Puts what was read into the fields that were not sent.
fn complete(sent: &mut Map<String, Value>, read: &Read, options: &Options, tab: Tab) {
    let fields = &read.fields;
    let mut fill = |field: &str, value: Value| {
        if !value.is_null() && !sent.contains_key(field) {
            sent.insert(field.to_string(), value);
        }
    };
    let own = if tab == Tab::Txt2img {
        TXT2IMG
    } else {
        IMG2IMG
    };
    for (key, field) in BOTH.iter().chain(own) {
        fill(field, value(fields, key));
    }
    fill("styles", json!(read.styles));
    let (sampler, scheduler) = sampler(&shown(fields, "Sampler"), &shown(fields, "Schedule type"));
    if fields.get("Sampler").is_some() {
        fill("sampler_name", json!(sampler));
        fill("scheduler", json!(scheduler));
    }
    match tab {
        Tab::Txt2img => {
            let has = |key| fields.get(key).is_some();
            let hires = ["Hires upscale", "Hires upscaler", "Hires resize-1"];
            let enabled = has("Denoising strength") && hires.into_iter().any(has);
            fill("enable_hr", json!(enabled));
            let (sampler, scheduler) = hires_sampler(fields);
            fill("hr_sampler_name", json!(sampler));
            fill("hr_scheduler", json!(scheduler));
        }
        Tab::Img2img => {
            let inverted = shown(fields, "Mask mode") == "Inpaint not masked";
            fill("inpainting_mask_invert", json!(i64::from(inverted)));
            let content = shown(fields, "Masked content");
            let content = MASKED_CONTENT.iter().position(|name| *name == content);
            fill("inpainting_fill", json!(content));
            let area = shown(fields, "Inpaint area");
            fill("inpaint_full_res", json!(area == "Only masked"));
        }
    }
    let implied = implied_settings(fields, options);
    let overrides = sent.entry("override_settings").or_insert(Value::Null);
    if overrides.is_null() {
        *overrides = json!({});
    }
    if let Value::Object(overrides) = overrides {
        for (key, value) in implied {
            overrides.entry(key).or_insert(value);
        }
    }
}

/// The settings that a text implies and that are not in force.
fn implied_settings(fields: &Params, options: &Options) -> Map<String, Value> {
    let mut implied = Map::new();
    for (key, setting) in OVERRIDES {
        let Some((name, kind, default)) = find(setting) else {
            continue;
        };
        let Some(text) = fields.get(key).map(ToString::to_string) else {
            continue;
        };
        if *setting == "sd_model_checkpoint" && options.flag("disable_weights_auto_swap") {
            continue;
        }
        // As Python's `type(default)(text)`: every text but "False" is true.
        let value = match kind {
            Kind::Bool => Ok(json!(text != "False" && !text.is_empty())),
            kind => fields::coerce(name, *kind, Value::from(text)),
        };
        let Ok(value) = value else {
            tracing::warn!(
                key,
                "value of an infotext does not fit its setting and is left out"
            );
            continue;
        };
        let current = match options.as_map().get(*setting) {
            Some(value) if !value.is_null() => value.clone(),
            _ => default.to_json(),
        };
        if !equal(&value, &current) {
            implied.insert((*name).to_string(), value);
        }
    }
    implied
}

/// Whether two values of an option are the same; `1` and `1.0` are.
fn equal(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a.to_bits() == b.to_bits(),
        _ => a == b,
    }
}

/// Sampler and scheduler as the request names them: a scheduler in the sampler's name counts, and one that is the sampler's own is
/// `Automatic`. A name that is unknown stays as it is and is refused later.
fn sampler(sampler: &str, scheduler: &str) -> (String, String) {
    let Some((found, suffix)) = Sampler::find_with_scheduler(sampler) else {
        return (sampler.to_string(), scheduler.to_string());
    };
    let chosen = suffix.or_else(|| Scheduler::find(scheduler));
    let chosen = chosen.unwrap_or(Scheduler::Automatic);
    let own = found.info().scheduler == Some(chosen);
    let chosen = if own { Scheduler::Automatic } else { chosen };
    (found.label().to_string(), chosen.label().to_string())
}

/// The second pass's, each `Use same …` where it is the first pass's.
fn hires_sampler(fields: &Params) -> (String, String) {
    let (first, first_type) = (shown(fields, "Sampler"), shown(fields, "Schedule type"));
    let or = |key, same: &str, first: &String| match shown(fields, key) {
        text if text == same || text.is_empty() => first.clone(),
        text => text,
    };
    let (name, scheduler) = sampler(
        &or("Hires sampler", SAME_SAMPLER, &first),
        &or("Hires schedule type", SAME_SCHEDULER, &first_type),
    );
    let unless = |text: String, first: &str, same: &str| {
        if text == first {
            same.to_string()
        } else {
            text
        }
    };
    (
        unless(name, &first, SAME_SAMPLER),
        unless(scheduler, &first_type, SAME_SCHEDULER),
    )
}

fn shown(fields: &Params, key: &str) -> String {
    fields.get(key).map(ToString::to_string).unwrap_or_default()
}

fn value(fields: &Params, key: &str) -> Value {
    fields
        .get(key)
        .and_then(|value| serde_json::to_value(value).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::networks::LoraEntry;
    use crate::prompt::styles::Style;

    fn lora(name: &str, alias: &str) -> LoraEntry {
        LoraEntry {
            name: name.into(),
            alias: alias.into(),
            path: "x".into(),
            metadata: std::collections::BTreeMap::default(),
        }
    }

    /// The body of a request that sends `sent` and an infotext.
    fn filled(sent: &Value, infotext: &str, options: &Options, tab: Tab) -> Map<String, Value> {
        let known = Known {
            styles: vec![Style {
                name: "Ink".into(),
                prompt: "{prompt}, ink".into(),
                negative_prompt: "blurry".into(),
            }],
            loras: vec![lora("file", "Nice Name")],
            names_by_file: false,
            hash_of: &|_| Some("aabbccddeeff".into()),
        };
        let mut sent = sent.as_object().cloned().unwrap_or_default();
        complete(&mut sent, &read(infotext, options, &known), options, tab);
        sent
    }

    const TEXT: &str = "a cat <lora:theirs:0.7>, ink\nNegative prompt: ugly, blurry\nSteps: 21, Sampler: DPM++ 2M Karras, \
        CFG scale: 6.5, Seed: 7, Size: 640x512, Model hash: 0123456789, Variation seed: 3, Variation seed strength: 0.25, \
        Denoising strength: 0.4, Clip skip: 2, RNG: NV, Hires upscale: 1.5, Hires steps: 9, Hires upscaler: Latent, \
        Lora hashes: \"theirs: aabbccddeeff\", NGMS: 1.5, Noise Schedule: Zero Terminal SNR, Version: v1.10.1";

    #[test]
    fn a_text_alone_is_a_whole_request() {
        let body = filled(&json!({}), TEXT, &Options::defaults(), Tab::Txt2img);
        for (field, value) in [
            ("prompt", json!("a cat <lora:Nice Name:0.7>")),
            ("negative_prompt", json!("ugly")),
            ("styles", json!(["Ink"])),
            ("steps", json!("21")),
            ("sampler_name", json!("DPM++ 2M")),
            ("scheduler", json!("Automatic")),
            ("width", json!("640")),
            ("height", json!("512")),
            ("subseed_strength", json!("0.25")),
            ("enable_hr", json!(true)),
            ("hr_scale", json!("1.5")),
            ("hr_resize_x", json!(0)),
            ("hr_sampler_name", json!("DPM++ 2M")),
            ("hr_scheduler", json!(SAME_SCHEDULER)),
        ] {
            assert_eq!(body[field], value, "{field}");
        }
        assert_eq!(
            body["override_settings"],
            json!({
                "CLIP_stop_at_last_layers": 2,
                "randn_source": "NV",
                "s_min_uncond": 1.5,
                "sd_noise_schedule": "Zero Terminal SNR",
            })
        );
    }

    #[test]
    fn what_was_sent_wins() {
        let sent = json!({ "prompt": "dog", "seed": null, "override_settings": { "randn_source": "CPU" } });
        let body = filled(&sent, TEXT, &Options::defaults(), Tab::Txt2img);
        assert_eq!(
            (&body["prompt"], &body["seed"]),
            (&json!("dog"), &json!(null))
        );
        assert_eq!(body["override_settings"]["randn_source"], "CPU");
    }

    #[test]
    fn options_say_what_is_taken() {
        let mut options = Options::defaults();
        options.set("infotext_styles", "Discard".into());
        options.set("infotext_skip_pasting", json!(["Seed", "RNG"]));
        options.set("disable_weights_auto_swap", false.into());
        options.set("CLIP_stop_at_last_layers", 2.into());
        let body = filled(&json!({}), TEXT, &options, Tab::Txt2img);
        assert!(!body.contains_key("styles") && !body.contains_key("seed"));
        assert_eq!(
            body["override_settings"],
            json!({
                "sd_model_checkpoint": "0123456789",
                "s_min_uncond": 1.5,
                "sd_noise_schedule": "Zero Terminal SNR",
            })
        );
        options.set("infotext_styles", "Ignore".into());
        let body = filled(&json!({}), TEXT, &options, Tab::Txt2img);
        assert_eq!(body["prompt"], "a cat <lora:Nice Name:0.7>, ink");
    }

    #[test]
    fn old_versions_turn_their_rules_on() {
        let text = "[a:b:3]\nSteps: 5, Sampler: DDIM, Seed: 1, Size: 8x8, Version: v1.5.2";
        let body = filled(&json!({}), text, &Options::defaults(), Tab::Txt2img);
        assert_eq!(
            body["override_settings"],
            json!({ "use_old_scheduling": true, "pad_cond_uncond_v0": true, "use_downcasted_alpha_bar": true })
        );
        assert_eq!(body["enable_hr"], false);
    }

    #[test]
    fn img2img_has_its_mask_back() {
        let text = "a\nSteps: 5, Sampler: Euler, Seed: 1, Mask mode: Inpaint not masked, Mask blur: 6, Inpaint area: Only masked, \
                    Masked area padding: 16, Masked content: latent noise";
        let body = filled(&json!({}), text, &Options::defaults(), Tab::Img2img);
        assert_eq!(
            (
                &body["inpainting_mask_invert"],
                &body["mask_blur"],
                &body["inpaint_full_res"],
                &body["inpaint_full_res_padding"],
                &body["inpainting_fill"]
            ),
            (
                &json!(1),
                &json!("6"),
                &json!(true),
                &json!("16"),
                &json!(2)
            )
        );
        assert!(!body.contains_key("enable_hr"));
    }

    #[test]
    fn text_without_parameters_is_a_prompt() {
        let body = filled(&json!({}), "only words", &Options::defaults(), Tab::Txt2img);
        assert_eq!(body["prompt"], "only words");
        assert!(!body.contains_key("sampler_name"));
    }
}
