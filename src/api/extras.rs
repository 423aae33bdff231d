//! `POST /sdapi/v1/extra-single-image` and `extra-batch-images`: pictures enlarged, without a checkpoint.
//!
//! Follows `run_extras` and `encode_pil_to_base64` of A1111 1.10: texts of a PNG are kept, `postprocessing` is added. Restoring
//! faces needs models that this version cannot run and is refused by name.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::RgbImage;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::body::Body;
use super::client::Client;
use super::error::{ApiError, Problem, with_causes};
use super::fields::{self, Default, Field, Kind};
use super::image_source::ImageSource;
use super::middleware::Incompressible;
use super::options::Options;
use super::upscalers::Upscalers;
use super::{App, blocking, resolve};
use crate::config::Limits;
use crate::engine::{self, ExtrasJob};
use crate::imaging::infotext::PNG_KEYWORD;
use crate::imaging::{self, EncodeOptions, Format, Metadata};
use crate::pipeline::{Extras, ExtrasRequest, ExtrasSize, PictureUpscaler};

/// The fields that both requests share.
const FIELDS: &[Field] = &[
    ("resize_mode", Kind::Int, Default::Int(0)),
    ("show_extras_results", Kind::Bool, Default::Bool(true)),
    ("gfpgan_visibility", Kind::Float, Default::Float(0.0)),
    ("codeformer_visibility", Kind::Float, Default::Float(0.0)),
    ("codeformer_weight", Kind::Float, Default::Float(0.0)),
    ("upscaling_resize", Kind::Float, Default::Float(2.0)),
    ("upscaling_resize_w", Kind::Int, Default::Int(512)),
    ("upscaling_resize_h", Kind::Int, Default::Int(512)),
    ("upscaling_crop", Kind::Bool, Default::Bool(true)),
    ("upscaler_1", Kind::Text, Default::Text("None")),
    ("upscaler_2", Kind::Text, Default::Text("None")),
    (
        "extras_upscaler_2_visibility",
        Kind::Float,
        Default::Float(0.0),
    ),
    ("upscale_first", Kind::Bool, Default::Bool(false)),
];
const SINGLE: Field = ("image", Kind::Text, Default::Text(""));
const BATCH: Field = ("imageList", Kind::List, Default::Null);

/// Every field of `POST /sdapi/v1/extra-single-image`.
#[must_use]
pub fn single_fields() -> Vec<Field> {
    [FIELDS, &[SINGLE]].concat()
}

/// Every field of `POST /sdapi/v1/extra-batch-images`.
#[must_use]
pub fn batch_fields() -> Vec<Field> {
    [FIELDS, &[BATCH]].concat()
}

/// Longest side of a picture that is sent or made, pixels.
const LONGEST_SIDE: u32 = 16_384;

#[derive(Debug, Deserialize)]
struct Wire {
    resize_mode: i64,
    gfpgan_visibility: f64,
    codeformer_visibility: f64,
    codeformer_weight: f64,
    upscaling_resize: f64,
    upscaling_resize_w: i64,
    upscaling_resize_h: i64,
    upscaling_crop: bool,
    upscaler_1: String,
    upscaler_2: String,
    extras_upscaler_2_visibility: f64,
}

/// A checked request.
struct Prepared {
    job: ExtrasJob,
    /// What the files said, in the order of the pictures.
    texts: Vec<Metadata>,
    format: Format,
    quality: u8,
    with_texts: bool,
}

/// Enlarges a picture.
///
/// # Errors
/// 422 for fields and sizes, 400 for a picture or name that is unknown, 501 for restoring faces.
pub async fn single(
    State(app): State<Arc<App>>,
    client: Client,
    Body(body, _): Body,
) -> Result<Response, ApiError> {
    let made = run(app, client, move |app| {
        let mut model = fields::read(&body, &single_fields())?;
        let image = match model.remove("image") {
            Some(Value::String(text)) => text,
            _ => String::new(),
        };
        prepare(app, &model, &[image])
    })
    .await?;
    match made.images.into_iter().next() {
        Some(image) => Ok(answer(
            json!({ "html_info": made.html_info, "image": image }),
        )),
        None => Err(ApiError::failure(
            "RuntimeError",
            "interrupted before the picture was finished",
        )),
    }
}

/// Enlarges several pictures alike.
///
/// # Errors
/// As [`single`].
pub async fn batch(
    State(app): State<Arc<App>>,
    client: Client,
    Body(body, _): Body,
) -> Result<Response, ApiError> {
    let made = run(app, client, move |app| {
        let mut model = fields::read(&body, &batch_fields())?;
        let images = image_list(model.remove("imageList").unwrap_or_default())?;
        prepare(app, &model, &images)
    })
    .await?;
    Ok(answer(
        json!({ "html_info": made.html_info, "images": made.images }),
    ))
}

fn answer(body: Value) -> Response {
    let mut response = Json(body).into_response();
    response.extensions_mut().insert(Incompressible);
    response
}

/// What is answered.
struct Made {
    html_info: String,
    images: Vec<String>,
}

async fn run(
    app: Arc<App>,
    client: Client,
    prepare: impl FnOnce(&App) -> Result<Prepared, ApiError> + Send + 'static,
) -> Result<Made, ApiError> {
    let for_check = app.clone();
    let mut prepared = blocking(move || prepare(&for_check)).await?;
    prepared.job.client = client.0;
    let mut handle = app.engine.submit_extras(prepared.job.clone()).await?;
    handle.started().await;
    let extras = handle.finished().await?;
    if extras.interrupted && app.shutdown.is_cancelled() {
        return Err(engine::Error::ShuttingDown.into());
    }
    blocking(move || encode(&prepared, &extras)).await
}

/// Data of `[{data, name}]`.
fn image_list(list: Value) -> Result<Vec<String>, ApiError> {
    let missing = |loc: Vec<Value>| Problem {
        loc,
        msg: "field required".into(),
        kind: "value_error.missing",
    };
    let Value::Array(items) = list else {
        return Err(vec![missing(vec![json!("body"), json!("imageList")])].into());
    };
    let mut images = Vec::with_capacity(items.len());
    let mut problems = Vec::new();
    for (index, mut item) in items.into_iter().enumerate() {
        let data = item.get_mut("data").map(Value::take);
        match data {
            Some(Value::String(data)) => images.push(data),
            _ => problems.push(missing(vec![
                json!("body"),
                json!("imageList"),
                json!(index),
                json!("data"),
            ])),
        }
    }
    if problems.is_empty() {
        Ok(images)
    } else {
        Err(problems.into())
    }
}

fn prepare(app: &App, model: &Map<String, Value>, images: &[String]) -> Result<Prepared, ApiError> {
    let wire = Wire::deserialize(model)
        .map_err(|error| ApiError::failure("ValueError", error.to_string()))?;
    check(&wire, &app.config.limits)?;
    for (field, visibility) in [
        ("gfpgan_visibility", wire.gfpgan_visibility),
        ("codeformer_visibility", wire.codeformer_visibility),
    ] {
        if visibility > 0.0 {
            return Err(ApiError::bad_request(format!(
                "restoring faces (`{field}`) needs a model that is not there; send 0"
            )));
        }
    }
    let options = app.options.snapshot();
    let upscalers = Upscalers::new(app.engine.catalog().upscalers(), &options);
    let find = |name: &str| match name {
        "" => Ok(PictureUpscaler::None),
        name => upscalers.picture(name).map_err(ApiError::bad_request),
    };
    let (upscaler, second) = (find(&wire.upscaler_1)?, find(&wire.upscaler_2)?);
    let share = wire.extras_upscaler_2_visibility as f32;
    let format = options.text("samples_format").parse();
    let format: Format =
        format.map_err(|error: imaging::Error| ApiError::bad_request(error.to_string()))?;
    let (pictures, texts) = decode(images, &options, &app.config.limits)?;
    let size = size(&wire);
    if upscaler != PictureUpscaler::None {
        check_results(size, &pictures, &app.config.limits)?;
    }
    let request = ExtrasRequest {
        pictures: Arc::new(pictures),
        size,
        upscaler,
        second: (share > 0.0).then_some((second, share)),
    };
    Ok(Prepared {
        job: ExtrasJob {
            id: resolve::task_id("extras"),
            client: String::new(),
            request,
        },
        texts,
        format,
        quality: options.int("jpeg_quality").clamp(1, 100) as u8,
        with_texts: options.flag("enable_pnginfo"),
    })
}

fn size(wire: &Wire) -> ExtrasSize {
    if wire.resize_mode == 1 {
        ExtrasSize::To {
            width: wire.upscaling_resize_w as u32,
            height: wire.upscaling_resize_h as u32,
            crop: wire.upscaling_crop,
        }
    } else {
        ExtrasSize::By {
            factor: wire.upscaling_resize,
            longest: 0,
        }
    }
}

/// Every number outside its limits.
fn check(wire: &Wire, limits: &Limits) -> Result<(), ApiError> {
    let mut problems = Vec::new();
    let mut check = |field: &str, good: bool, must: String| {
        if !good {
            problems.push(Problem::limit(field, must));
        }
    };
    let mode = wire.resize_mode;
    let must = format!("must be 0 (by a factor) or 1 (to a size): `{mode}`");
    check("resize_mode", (0..=1).contains(&mode), must);
    for (field, share) in [
        ("gfpgan_visibility", wire.gfpgan_visibility),
        ("codeformer_visibility", wire.codeformer_visibility),
        ("codeformer_weight", wire.codeformer_weight),
        (
            "extras_upscaler_2_visibility",
            wire.extras_upscaler_2_visibility,
        ),
    ] {
        let must = format!("must be between 0 and 1: `{share}`");
        check(field, (0.0..=1.0).contains(&share), must);
    }
    let factor = wire.upscaling_resize;
    let must = format!("must be greater than 0: `{factor}`");
    check("upscaling_resize", factor > 0.0, must);
    let most = i64::from(LONGEST_SIDE);
    for (field, side) in [
        ("upscaling_resize_w", wire.upscaling_resize_w),
        ("upscaling_resize_h", wire.upscaling_resize_h),
    ] {
        let must = format!("must be between 1 and {most} pixels: `{side}`");
        check(field, (1..=most).contains(&side), must);
    }
    let megapixels = limits.max_megapixels;
    let area = wire
        .upscaling_resize_w
        .saturating_mul(wire.upscaling_resize_h);
    if mode == 1 && area > megapixels as i64 * 1_000_000 {
        let must = format!(
            "makes more than {megapixels} megapixels with `upscaling_resize_h` (setting `limits.max_megapixels`)"
        );
        check("upscaling_resize_w", false, must);
    }
    if problems.is_empty() {
        Ok(())
    } else {
        Err(problems.into())
    }
}

/// Pictures as A1111's `convert("RGB")` makes them, and the texts of their files.
fn decode(
    images: &[String],
    options: &Options,
    limits: &Limits,
) -> Result<(Vec<RgbImage>, Vec<Metadata>), ApiError> {
    let mut source = ImageSource::new(options);
    let mut left = limits.max_megapixels as u64 * 1_000_000;
    let (mut pictures, mut texts) = (Vec::new(), Vec::new());
    for image in images {
        let bytes = source.file(image)?;
        let invalid = |error: imaging::Error| source.unreadable(image, &error);
        let allowed = imaging::Limits {
            side: LONGEST_SIDE,
            pixels: left,
        };
        let picture = imaging::decode(&bytes, allowed).map_err(invalid)?.to_rgb8();
        left -= u64::from(picture.width()) * u64::from(picture.height());
        pictures.push(picture);
        texts.push(imaging::read_metadata(&bytes).map_err(invalid)?);
    }
    Ok((pictures, texts))
}

/// Refuses results that are too large before a place in the queue is taken.
fn check_results(size: ExtrasSize, pictures: &[RgbImage], limits: &Limits) -> Result<(), ApiError> {
    let mut pixels = 0;
    let mut longest = 0;
    for picture in pictures {
        let (width, height) = size.result(picture.dimensions());
        longest = longest.max(width).max(height);
        pixels += u64::from(width) * u64::from(height);
    }
    let most = limits.max_megapixels;
    if longest <= LONGEST_SIDE && pixels <= most as u64 * 1_000_000 {
        return Ok(());
    }
    let field = match size {
        ExtrasSize::By { .. } => "upscaling_resize",
        ExtrasSize::To { .. } => "upscaling_resize_w",
    };
    let message = format!(
        "makes {:.1} megapixels with a side of {longest} pixels; a side may have {LONGEST_SIDE} and all pictures {most} megapixels (setting `limits.max_megapixels`)",
        pixels as f64 / 1e6
    );
    Err(vec![Problem::limit(field, message)].into())
}

fn encode(prepared: &Prepared, extras: &Extras) -> Result<Made, ApiError> {
    let mut images = Vec::with_capacity(extras.pictures.len());
    for (index, picture) in &extras.pictures {
        let metadata = &prepared.texts[*index];
        let mut texts = other_texts(metadata);
        texts.push(("postprocessing", &extras.infotext));
        let options = EncodeOptions {
            format: prepared.format,
            jpeg_quality: prepared.quality,
            infotext: parameters(metadata).filter(|_| prepared.with_texts),
            texts: if prepared.with_texts { &texts } else { &[] },
            ..EncodeOptions::default()
        };
        let file = imaging::encode(picture, &options)
            .map_err(|error| ApiError::failure("ValueError", with_causes(&error)))?;
        images.push(STANDARD.encode(&file.bytes));
    }
    Ok(Made {
        html_info: format!("<p>{}</p>", html(&extras.infotext)),
        images,
    })
}

/// How the picture of a file was generated. What was done to it afterwards (`extras`) does not count.
#[must_use]
pub fn parameters(metadata: &Metadata) -> Option<&str> {
    let has = |wanted: &str| metadata.texts.iter().any(|(keyword, _)| keyword == wanted);
    let afterwards = has("extras") && !has(PNG_KEYWORD);
    metadata.infotext.as_deref().filter(|_| !afterwards)
}

/// The texts of a file that are kept besides [`parameters`].
#[must_use]
pub fn other_texts(metadata: &Metadata) -> Vec<(&str, &str)> {
    let replaced = [PNG_KEYWORD, "postprocessing", "extras"];
    metadata
        .texts
        .iter()
        .map(|(keyword, text)| (keyword.as_str(), text.as_str()))
        .filter(|(keyword, _)| !replaced.contains(keyword))
        .collect()
}

/// Python's `html.escape`.
#[must_use]
pub fn html(text: &str) -> String {
    [
        ('&', "&amp;"),
        ('<', "&lt;"),
        ('>', "&gt;"),
        ('"', "&quot;"),
        ('\'', "&#x27;"),
    ]
    .iter()
    .fold(text.to_string(), |text, (from, to)| text.replace(*from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_break_out_of_the_answers_html() {
        assert_eq!(
            html(r#"<b a="1">&'"#),
            "&lt;b a=&quot;1&quot;&gt;&amp;&#x27;"
        );
    }
}
