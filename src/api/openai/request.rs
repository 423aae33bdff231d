//! From `OpenAI`'s parameters to the request model of A1111's routes, which the rest of the server understands.
//!
//! | parameter | becomes |
//! | --- | --- |
//! | `quality` | steps: `low` 12, `medium`, `standard` and `auto` 25, `high` and `hd` 40, within `limits.max_steps` |
//! | `size` | width and height; `auto` is the checkpoint's own size, or the sent picture's shape at that area |
//! | `style` | `vivid` CFG scale 7, `natural` CFG scale 5 |
//! | `model` | `sd_model_checkpoint` for this request |
//! | `output_format`, `output_compression` | `samples_format`, `jpeg_quality` for this request |

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Failure, models};
use crate::api::App;
use crate::api::fields::{Default, Field, Kind};
use crate::engine::checkpoint::Checkpoint;

/// Most pictures of one request.
pub const MOST: i64 = 10;
/// Width and height of a checkpoint that names none, pixels.
const USUAL_SIZE: (u32, u32) = (1024, 1024);
/// Sides are multiples of this many pixels.
const GRAIN: u32 = 8;

/// The fields that all three requests share.
const SHARED: &[Field] = &[
    ("model", Kind::Text, Default::Text("")),
    ("n", Kind::Int, Default::Int(1)),
    ("size", Kind::Text, Default::Text("auto")),
    ("response_format", Kind::Text, Default::Null),
    ("user", Kind::Text, Default::Null),
];
const PROMPTED: &[Field] = &[
    ("prompt", Kind::Text, Default::Null),
    ("quality", Kind::Text, Default::Text("auto")),
    ("background", Kind::Text, Default::Text("auto")),
    ("output_format", Kind::Text, Default::Text("png")),
    ("output_compression", Kind::Int, Default::Int(100)),
    ("stream", Kind::Bool, Default::Bool(false)),
];
const GENERATION: &[Field] = &[
    ("style", Kind::Text, Default::Text("vivid")),
    ("moderation", Kind::Text, Default::Text("auto")),
];
/// The files of a form, beside its fields.
pub const FILES: &[Field] = &[
    ("image", Kind::Text, Default::Null),
    ("mask", Kind::Text, Default::Null),
];

/// Every field of `POST /v1/images/generations`.
#[must_use]
pub fn generation_fields() -> Vec<Field> {
    [PROMPTED, SHARED, GENERATION].concat()
}

/// Every field of `POST /v1/images/edits` but its files.
#[must_use]
pub fn edit_fields() -> Vec<Field> {
    [PROMPTED, SHARED].concat()
}

/// Every field of `POST /v1/images/variations` but its file.
#[must_use]
pub fn variation_fields() -> Vec<Field> {
    SHARED.to_vec()
}

/// How pictures are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// As an address.
    Link,
    /// As base64.
    Inline,
}

#[derive(Debug, Deserialize)]
struct Fields {
    #[serde(default)]
    prompt: Option<String>,
    model: String,
    n: i64,
    size: String,
    response_format: Option<String>,
    #[serde(default)]
    quality: String,
    #[serde(default)]
    background: String,
    #[serde(default)]
    output_format: Option<String>,
    #[serde(default)]
    output_compression: Option<i64>,
    #[serde(default)]
    stream: bool,
    #[serde(default)]
    style: String,
}

/// A picture that a request begins with.
#[derive(Debug, Clone)]
pub struct Source {
    /// The file as it was sent.
    pub file: Vec<u8>,
    /// Its width and height, pixels.
    pub size: (u32, u32),
    /// A PNG, white where the picture is painted anew; `None` for everywhere.
    pub mask: Option<Vec<u8>>,
    /// How far the result may be from it, 0 to 1.
    pub strength: f64,
}

/// A checked request.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// For `resolve::txt2img` or `img2img`, not yet complete.
    pub body: Map<String, Value>,
    /// How its pictures are answered.
    pub delivery: Delivery,
    /// Repeated in the answer.
    pub output_format: String,
    /// Repeated in the answer.
    pub size: String,
}

/// Translates a request whose fields are complete. Reads the head of a checkpoint's file, so it blocks.
///
/// # Errors
/// 400 naming the parameter; 404 for a model.
pub fn translate(
    app: &App,
    model: &Map<String, Value>,
    source: Option<&Source>,
) -> Result<Wanted, Failure> {
    let fields = Fields::deserialize(model)
        .map_err(|error| Failure::parameter("body", error.to_string()))?;
    fields.check(model.contains_key("prompt"))?;
    let checkpoint = models::find(app, &fields.model)?;
    let format = fields.output_format.as_deref().unwrap_or("png");
    let mut overrides = Map::new();
    overrides.insert("samples_format".into(), json!(format));
    if let Some(quality) = fields.output_compression.filter(|_| format == "jpeg") {
        overrides.insert("jpeg_quality".into(), json!(quality.max(1)));
    }
    if let Some(checkpoint) = &checkpoint {
        overrides.insert("sd_model_checkpoint".into(), json!(checkpoint.title()));
    }
    let native = || native_size(&checkpoint.clone().unwrap_or_else(|| models::selected(app)));
    let (width, height) = match (fields.size.as_str(), source) {
        ("auto" | "", None) => native(),
        ("auto" | "", Some(source)) => shaped_as(source.size, native()),
        (text, _) => sides(text)?,
    };
    let body = json!({
        "prompt": fields.prompt.clone().unwrap_or_default(),
        "steps": steps(&fields.quality)?.min(app.config.limits.max_steps),
        "cfg_scale": if fields.style == "natural" { 5.0 } else { 7.0 },
        "sampler_name": "DPM++ 2M",
        "scheduler": "Karras",
        "width": width,
        "height": height,
        "n_iter": fields.n,
        "override_settings": overrides,
    });
    let Value::Object(mut body) = body else {
        return Err(Failure::parameter("body", "must be an object"));
    };
    if let Some(source) = source {
        add_source(&mut body, source);
    }
    Ok(Wanted {
        body,
        delivery: fields.delivery(),
        output_format: format.to_string(),
        size: format!("{width}x{height}"),
    })
}

fn add_source(body: &mut Map<String, Value>, source: &Source) {
    let mut put = |name: &str, value: Value| drop(body.insert(name.to_string(), value));
    put("init_images", json!([STANDARD.encode(&source.file)]));
    // Cut to the wanted shape, never squeezed.
    put("resize_mode", json!(1));
    put("denoising_strength", json!(source.strength));
    if let Some(mask) = &source.mask {
        put("mask", json!(STANDARD.encode(mask)));
        put("mask_blur", json!(4));
        put("inpainting_fill", json!(0));
        put("inpaint_full_res", json!(false));
    }
}

impl Fields {
    fn check(&self, needs_prompt: bool) -> Result<(), Failure> {
        let one_of = |name: &str, value: &str, valid: &[&str]| {
            if valid.contains(&value) {
                return Ok(());
            }
            let valid = valid.iter().filter(|value| !value.is_empty());
            let valid: Vec<String> = valid.map(|value| format!("`{value}`")).collect();
            let shown: String = value.chars().take(100).collect();
            let message = format!("`{name}` must be {}: `{shown}`", valid.join(" or "));
            Err(Failure::parameter(name, message))
        };
        if needs_prompt && self.prompt.as_deref().unwrap_or_default().is_empty() {
            return Err(Failure {
                code: Some("missing_required_parameter"),
                ..Failure::parameter("prompt", "`prompt` is missing or empty")
            });
        }
        if !(1..=MOST).contains(&self.n) {
            let message = format!("`n` must be between 1 and {MOST}: `{}`", self.n);
            return Err(Failure::parameter("n", message));
        }
        if let Some(form) = &self.response_format {
            one_of("response_format", form, &["url", "b64_json"])?;
        }
        if let Some(format) = &self.output_format {
            one_of("output_format", format, &["png", "jpeg", "webp"])?;
        }
        one_of("background", &self.background, &["auto", "opaque", ""])?;
        one_of("style", &self.style, &["vivid", "natural", ""])?;
        if self
            .output_compression
            .is_some_and(|percent| !(0..=100).contains(&percent))
        {
            let message = "`output_compression` must be between 0 and 100";
            return Err(Failure::parameter("output_compression", message));
        }
        if self.stream {
            let message = "`stream` is not supported; `/v1/jobs` tells of a job's progress";
            return Err(Failure::parameter("stream", message));
        }
        Ok(())
    }

    /// `gpt-image` models answer base64 where nothing else is asked for, all others addresses.
    fn delivery(&self) -> Delivery {
        match self.response_format.as_deref() {
            Some("url") => Delivery::Link,
            None if !self.model.contains("gpt-image") => Delivery::Link,
            _ => Delivery::Inline,
        }
    }
}

fn steps(quality: &str) -> Result<usize, Failure> {
    match quality {
        "low" => Ok(12),
        "" | "auto" | "medium" | "standard" => Ok(25),
        "high" | "hd" => Ok(40),
        other => {
            let shown: String = other.chars().take(100).collect();
            let message = format!(
                "`quality` must be `low`, `medium`, `high`, `standard`, `hd` or `auto`: `{shown}`"
            );
            Err(Failure::parameter("quality", message))
        }
    }
}

/// `1024x1536`.
fn sides(text: &str) -> Result<(u32, u32), Failure> {
    let parsed = text.split_once('x').and_then(|(width, height)| {
        let (width, height) = (width.parse().ok()?, height.parse().ok()?);
        (width % GRAIN == 0 && height % GRAIN == 0 && width > 0 && height > 0)
            .then_some((width, height))
    });
    parsed.ok_or_else(|| {
        let shown: String = text.chars().take(100).collect();
        let message = format!(
            "`size` must be `auto` or like `1024x1024`, in multiples of {GRAIN}: `{shown}`"
        );
        Failure::parameter("size", message)
    })
}

/// The size that a checkpoint's file asks for.
fn native_size(checkpoint: &Checkpoint) -> (u32, u32) {
    let inspection = checkpoint.inspect().ok();
    let resolution = inspection.and_then(|mut found| found.metadata.remove("modelspec.resolution"));
    let size = resolution.and_then(|text| sides(&text).ok());
    size.unwrap_or(USUAL_SIZE)
}

/// A size of the picture's shape, with at most the area of `most`.
fn shaped_as(picture: (u32, u32), most: (u32, u32)) -> (u32, u32) {
    let (width, height) = (f64::from(picture.0.max(1)), f64::from(picture.1.max(1)));
    let area = f64::from(most.0) * f64::from(most.1);
    let scale = (area / (width * height)).sqrt().min(1.0);
    let side = |length: f64| {
        let grains = (length * scale / f64::from(GRAIN)).round();
        (grains.clamp(1.0, f64::from(u16::MAX)) as u32) * GRAIN
    };
    (side(width), side(height))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_pairs_of_multiples() {
        assert_eq!(sides("1024x1536").unwrap(), (1024, 1536));
        for wrong in [
            "",
            "1024",
            "0x8",
            "8x",
            "-8x8",
            "8x8x8",
            "1001x8",
            "9999999999x8",
        ] {
            assert!(sides(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_pictures_shape_is_kept_within_the_area() {
        assert_eq!(shaped_as((3000, 2000), (1024, 1024)), (1256, 840));
        assert_eq!(shaped_as((64, 128), (1024, 1024)), (64, 128));
        assert_eq!(shaped_as((1, 100_000), (128, 128)).0, 8);
    }

    #[test]
    fn qualities_are_steps() {
        let of = |quality| steps(quality).ok();
        assert_eq!(
            (of("low"), of("auto"), of("hd")),
            (Some(12), Some(25), Some(40))
        );
        assert_eq!(of("best"), None);
    }
}
