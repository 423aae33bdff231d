//! The wire types, with A1111's names and defaults.
//!
//! [`txt2img`] and [`img2img`] are the whole request models in A1111's order: what `parameters` of a response echoes. The parts of
//! them that act are [`Generation`], which both have, [`HiresFields`] and [`ImageFields`].

use serde::Deserialize;
use serde_json::{Map, Value};

use super::fields::{Default, Field, Kind};

/// Every field of `POST /sdapi/v1/txt2img`, and after them those that are read and not echoed ([`SILENT`]).
#[must_use]
pub fn txt2img() -> Vec<Field> {
    [COMMON, HIRES, TAIL, SILENT].concat()
}

/// Every field of `POST /sdapi/v1/img2img`.
#[must_use]
pub fn img2img() -> Vec<Field> {
    [COMMON, IMAGE, TAIL].concat()
}

/// Fields of later servers that clients send. They act, but A1111's model and so `parameters` has none of them.
pub const SILENT: &[Field] = &[("hr_cfg", Kind::Float, Default::Null)];

#[rustfmt::skip]
const COMMON: &[Field] = &[
    ("prompt", Kind::Text, Default::Text("")),
    ("negative_prompt", Kind::Text, Default::Text("")),
    ("styles", Kind::Texts, Default::Null),
    ("seed", Kind::Int, Default::Int(-1)),
    ("subseed", Kind::Int, Default::Int(-1)),
    ("subseed_strength", Kind::Float, Default::Int(0)),
    ("seed_resize_from_h", Kind::Int, Default::Int(-1)),
    ("seed_resize_from_w", Kind::Int, Default::Int(-1)),
    ("sampler_name", Kind::Text, Default::Null),
    ("scheduler", Kind::Text, Default::Null),
    ("batch_size", Kind::Int, Default::Int(1)),
    ("n_iter", Kind::Int, Default::Int(1)),
    ("steps", Kind::Int, Default::Int(50)),
    ("cfg_scale", Kind::Float, Default::Float(7.0)),
    ("width", Kind::Int, Default::Int(512)),
    ("height", Kind::Int, Default::Int(512)),
    ("restore_faces", Kind::Bool, Default::Null),
    ("tiling", Kind::Bool, Default::Null),
    ("do_not_save_samples", Kind::Bool, Default::Bool(false)),
    ("do_not_save_grid", Kind::Bool, Default::Bool(false)),
    ("eta", Kind::Float, Default::Null),
    ("denoising_strength", Kind::Float, Default::Float(0.75)),
    ("s_min_uncond", Kind::Float, Default::Null),
    ("s_churn", Kind::Float, Default::Null),
    ("s_tmax", Kind::Float, Default::Null),
    ("s_tmin", Kind::Float, Default::Null),
    ("s_noise", Kind::Float, Default::Null),
    ("override_settings", Kind::Object, Default::Null),
    ("override_settings_restore_afterwards", Kind::Bool, Default::Bool(true)),
    ("refiner_checkpoint", Kind::Text, Default::Null),
    ("refiner_switch_at", Kind::Float, Default::Null),
    ("disable_extra_networks", Kind::Bool, Default::Bool(false)),
    ("firstpass_image", Kind::Text, Default::Null),
    ("comments", Kind::Any, Default::Null),
];

#[rustfmt::skip]
const HIRES: &[Field] = &[
    ("enable_hr", Kind::Bool, Default::Bool(false)),
    ("firstphase_width", Kind::Int, Default::Int(0)),
    ("firstphase_height", Kind::Int, Default::Int(0)),
    ("hr_scale", Kind::Float, Default::Float(2.0)),
    ("hr_upscaler", Kind::Text, Default::Null),
    ("hr_second_pass_steps", Kind::Int, Default::Int(0)),
    ("hr_resize_x", Kind::Int, Default::Int(0)),
    ("hr_resize_y", Kind::Int, Default::Int(0)),
    ("hr_checkpoint_name", Kind::Text, Default::Null),
    ("hr_sampler_name", Kind::Text, Default::Null),
    ("hr_scheduler", Kind::Text, Default::Null),
    ("hr_prompt", Kind::Text, Default::Text("")),
    ("hr_negative_prompt", Kind::Text, Default::Text("")),
];

#[rustfmt::skip]
const IMAGE: &[Field] = &[
    ("init_images", Kind::Texts, Default::Null),
    ("resize_mode", Kind::Int, Default::Int(0)),
    ("image_cfg_scale", Kind::Float, Default::Null),
    ("mask", Kind::Text, Default::Null),
    ("mask_blur_x", Kind::Int, Default::Int(4)),
    ("mask_blur_y", Kind::Int, Default::Int(4)),
    ("mask_blur", Kind::Int, Default::Null),
    ("mask_round", Kind::Bool, Default::Bool(true)),
    ("inpainting_fill", Kind::Int, Default::Int(0)),
    ("inpaint_full_res", Kind::Bool, Default::Bool(true)),
    ("inpaint_full_res_padding", Kind::Int, Default::Int(0)),
    ("inpainting_mask_invert", Kind::Int, Default::Int(0)),
    ("initial_noise_multiplier", Kind::Float, Default::Null),
    ("latent_mask", Kind::Text, Default::Null),
    ("include_init_images", Kind::Bool, Default::Bool(false)),
];

const TAIL: &[Field] = &[
    ("force_task_id", Kind::Text, Default::Null),
    ("sampler_index", Kind::Text, Default::Text("Euler")),
    ("script_name", Kind::Text, Default::Null),
    ("script_args", Kind::List, Default::Texts(&[])),
    ("send_images", Kind::Bool, Default::Bool(true)),
    ("save_images", Kind::Bool, Default::Bool(false)),
    ("alwayson_scripts", Kind::Object, Default::Object),
    ("infotext", Kind::Text, Default::Null),
];

/// The fields of both requests that act.
#[derive(Debug, Clone, Deserialize)]
#[expect(
    missing_docs,
    reason = "the field names are A1111's and documented by its API"
)]
#[allow(clippy::struct_excessive_bools, reason = "the wire's own fields")]
pub struct Generation {
    pub prompt: String,
    pub negative_prompt: String,
    pub styles: Option<Vec<String>>,
    pub seed: i64,
    pub subseed: i64,
    pub subseed_strength: f64,
    pub seed_resize_from_h: i64,
    pub seed_resize_from_w: i64,
    pub sampler_name: Option<String>,
    pub sampler_index: String,
    pub scheduler: Option<String>,
    pub batch_size: i64,
    pub n_iter: i64,
    pub steps: i64,
    pub cfg_scale: f64,
    pub width: i64,
    pub height: i64,
    pub restore_faces: Option<bool>,
    pub tiling: Option<bool>,
    pub eta: Option<f64>,
    pub denoising_strength: f64,
    pub s_min_uncond: Option<f64>,
    pub s_churn: Option<f64>,
    pub s_tmax: Option<f64>,
    pub s_tmin: Option<f64>,
    pub s_noise: Option<f64>,
    pub override_settings: Option<Map<String, Value>>,
    pub override_settings_restore_afterwards: bool,
    pub refiner_checkpoint: Option<String>,
    pub refiner_switch_at: Option<f64>,
    pub force_task_id: Option<String>,
    pub script_name: Option<String>,
    pub script_args: Vec<Value>,
    pub alwayson_scripts: Map<String, Value>,
    pub disable_extra_networks: bool,
    pub send_images: bool,
    pub save_images: bool,
    pub infotext: Option<String>,
}

/// The fields of txt2img's second pass. The command line fills them as well.
#[derive(Debug, Clone, Deserialize)]
#[expect(
    missing_docs,
    reason = "the field names are A1111's and documented by its API"
)]
pub struct HiresFields {
    pub enable_hr: bool,
    pub denoising_strength: f64,
    pub firstphase_width: i64,
    pub firstphase_height: i64,
    pub hr_scale: f64,
    pub hr_upscaler: Option<String>,
    pub hr_second_pass_steps: i64,
    pub hr_resize_x: i64,
    pub hr_resize_y: i64,
    pub hr_checkpoint_name: Option<String>,
    pub hr_sampler_name: Option<String>,
    pub hr_scheduler: Option<String>,
    pub hr_prompt: String,
    pub hr_negative_prompt: String,
    pub hr_cfg: Option<f64>,
}

/// The fields of img2img, its pictures aside. The command line fills them as well.
#[derive(Debug, Clone, Deserialize)]
#[expect(
    missing_docs,
    reason = "the field names are A1111's and documented by its API"
)]
pub struct ImageFields {
    pub denoising_strength: f64,
    pub resize_mode: i64,
    pub mask_blur_x: i64,
    pub mask_blur_y: i64,
    pub mask_blur: Option<i64>,
    pub mask_round: bool,
    pub inpainting_fill: i64,
    pub inpaint_full_res: bool,
    pub inpaint_full_res_padding: i64,
    pub inpainting_mask_invert: i64,
    pub initial_noise_multiplier: Option<f64>,
}

/// Every field of `POST /internal/progress`.
pub const TASK_PROGRESS: &[Field] = &[
    ("id_task", Kind::Text, Default::Null),
    ("id_live_preview", Kind::Int, Default::Int(-1)),
    ("live_preview", Kind::Bool, Default::Bool(true)),
];

/// Every field of `POST /sdapi/v1/png-info`.
pub const PNG_INFO: &[Field] = &[("image", Kind::Text, Default::Null)];

/// A field of a model that was read by its table.
#[must_use]
pub fn text<'a>(model: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    model.get(name).and_then(Value::as_str)
}
