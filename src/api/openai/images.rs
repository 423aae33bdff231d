//! `POST /v1/images/generations`, `/v1/images/edits` and `/v1/images/variations`.
//!
//! A request takes a place of the queue or is answered 429 at once. A client that leaves takes its job with it, queued or
//! running: nobody else could get at its pictures.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::{DynamicImage, GrayImage, Luma};
use serde_json::{Map, Value, json};

use super::links::{self, Caller};
use super::request::{self, Delivery, Source, Wanted};
use super::{Failure, form};
use crate::api::body::Body;
use crate::api::client::Client;
use crate::api::error::{ApiError, with_causes};
use crate::api::middleware::Incompressible;
use crate::api::resolve::{self, Prepared};
use crate::api::{App, blocking, fields, outputs, types};
use crate::engine::status::CancelToken;
use crate::engine::{self, Outcome};
use crate::imaging::{self, EncodeOptions};

/// How far an edit without mask may be from its picture.
const EDIT: f64 = 0.75;
/// How far a variation may be from its picture.
const VARIATION: f64 = 0.6;

type Answer = Result<Response, Failure>;

/// Pictures from a prompt.
///
/// # Errors
/// 400 for parameters, 404 for a model, 429 for a full queue.
pub async fn generations(
    State(app): State<Arc<App>>,
    client: Client,
    caller: Caller,
    Body(body, _): Body,
) -> Answer {
    run(app, (client, caller), move |app| {
        let model = fields::read(&body, &request::generation_fields())?;
        let wanted = request::translate(app, &model, None)?;
        let wire = fields::complete(wanted.body.clone(), &types::txt2img())?;
        Ok((resolve::txt2img(app, wire)?, wanted))
    })
    .await
}

/// A picture painted anew where its mask, or else the picture itself, is transparent; as a whole if neither is.
///
/// # Errors
/// Those of [`generations`]; 400 for a form or picture that cannot be read.
pub async fn edits(
    State(app): State<Arc<App>>,
    client: Client,
    caller: Caller,
    headers: HeaderMap,
    Body(body, _): Body,
) -> Answer {
    run(app, (client, caller), move |app| {
        let (sent, files) = read_form(&headers, &body)?;
        let model = fields::complete(sent, &request::edit_fields())?;
        from_picture(app, &model, &source(app, &files, Kind::Edit)?)
    })
    .await
}

/// Pictures like a picture.
///
/// # Errors
/// Those of [`edits`].
pub async fn variations(
    State(app): State<Arc<App>>,
    client: Client,
    caller: Caller,
    headers: HeaderMap,
    Body(body, _): Body,
) -> Answer {
    run(app, (client, caller), move |app| {
        let (sent, files) = read_form(&headers, &body)?;
        let model = fields::complete(sent, &request::variation_fields())?;
        from_picture(app, &model, &source(app, &files, Kind::Variation)?)
    })
    .await
}

fn from_picture(
    app: &App,
    model: &Map<String, Value>,
    source: &Source,
) -> Result<(Prepared, Wanted), Failure> {
    let wanted = request::translate(app, model, Some(source))?;
    let wire = fields::complete(wanted.body.clone(), &types::img2img())?;
    Ok((resolve::img2img(app, wire)?, wanted))
}

/// Interrupts a job whose client has left.
struct Leave(Arc<CancelToken>);

impl Drop for Leave {
    fn drop(&mut self) {
        self.0.interrupt();
    }
}

async fn run(
    app: Arc<App>,
    (client, caller): (Client, Caller),
    prepare: impl FnOnce(&App) -> Result<(Prepared, Wanted), Failure> + Send + 'static,
) -> Answer {
    let for_check = app.clone();
    let (mut prepared, wanted) = blocking(move || Ok(prepare(&for_check))).await??;
    prepared.job.client = client.0;
    let mut handle = match app.engine.try_submit(prepared.job.clone()) {
        Err(error @ engine::Error::QueueFull { .. }) => {
            let seconds = app.jobs.average_seconds().unwrap_or(5.0).clamp(1.0, 60.0);
            return Err(Failure::busy(error.to_string(), seconds as u64));
        }
        other => other.map_err(ApiError::from)?,
    };
    let _leave = Leave(handle.cancel.clone());
    let outcome = handle.finished().await.map_err(ApiError::from)?;
    if outcome.generated.images.is_empty() {
        return Err(
            ApiError::failure("RuntimeError", "interrupted before a picture was finished").into(),
        );
    }
    let body = blocking(move || answer(&app, &prepared, &outcome, (&wanted, &caller))).await?;
    let mut response = Json(body).into_response();
    response.extensions_mut().insert(Incompressible);
    Ok(response)
}

fn answer(
    app: &App,
    prepared: &Prepared,
    outcome: &Outcome,
    (wanted, caller): (&Wanted, &Caller),
) -> Result<Value, ApiError> {
    let mut data = Vec::new();
    for image in &outcome.generated.images {
        let file = outputs::encode_image(prepared, image)?;
        data.push(match wanted.delivery {
            Delivery::Inline => json!({ "b64_json": STANDARD.encode(&file.bytes) }),
            Delivery::Link => json!({ "url": caller.address(&links::store(app, &file)?) }),
        });
    }
    Ok(json!({
        "created": chrono::Utc::now().timestamp(),
        "data": data,
        "background": "opaque",
        "output_format": wanted.output_format,
        "size": wanted.size,
    }))
}

/// The files of a form.
#[derive(Default)]
struct Files {
    images: Vec<Bytes>,
    mask: Option<Bytes>,
}

fn read_form(headers: &HeaderMap, body: &Bytes) -> Result<(Map<String, Value>, Files), Failure> {
    let (mut sent, mut files) = (Map::new(), Files::default());
    for part in form::parse(headers, body)? {
        match part.name.as_str() {
            "image" | "image[]" => files.images.push(part.content),
            "mask" => files.mask = Some(part.content),
            _ => {
                let text = std::str::from_utf8(&part.content);
                let text = text.map_err(|_| Failure::parameter(&part.name, "is not UTF-8"))?;
                sent.insert(part.name, json!(text));
            }
        }
    }
    Ok((sent, files))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Edit,
    Variation,
}

fn source(app: &App, files: &Files, kind: Kind) -> Result<Source, Failure> {
    let [file] = &files.images[..] else {
        let message = format!("exactly one `image` is needed: {}", files.images.len());
        return Err(Failure::parameter("image", message));
    };
    let picture = decode(app, "image", file)?;
    let size = (picture.width(), picture.height());
    let mask = match (&files.mask, kind) {
        (_, Kind::Variation) => None,
        (None, Kind::Edit) => transparency(&picture),
        (Some(mask), Kind::Edit) => {
            let mask = decode(app, "mask", mask)?;
            if (mask.width(), mask.height()) != size {
                let message = "`mask` must have the size of `image`";
                return Err(Failure::parameter("mask", message));
            }
            let message = "`mask` is nowhere transparent, so nothing would be edited";
            let mask = transparency(&mask);
            Some(mask.ok_or_else(|| Failure::parameter("mask", message))?)
        }
    };
    let mask = mask.map(|mask| imaging::encode(&mask, &EncodeOptions::default()));
    let mask = mask
        .transpose()
        .map_err(|error| Failure::parameter("mask", with_causes(&error)))?;
    Ok(Source {
        file: file.to_vec(),
        size,
        strength: match (kind, &mask) {
            (Kind::Edit, Some(_)) => 1.0,
            (Kind::Edit, None) => EDIT,
            (Kind::Variation, _) => VARIATION,
        },
        mask: mask.map(|file| file.bytes),
    })
}

fn decode(app: &App, name: &str, file: &Bytes) -> Result<DynamicImage, Failure> {
    let limits = imaging::Limits {
        pixels: app.config.limits.max_megapixels as u64 * 1_000_000,
        ..imaging::Limits::default()
    };
    imaging::decode(file, limits).map_err(|error| {
        let message = format!("`{name}` cannot be read: {}", with_causes(&error));
        Failure::parameter(name, message)
    })
}

/// White where a picture is transparent; `None` if it is nowhere.
fn transparency(picture: &DynamicImage) -> Option<GrayImage> {
    if !picture.color().has_alpha() {
        return None;
    }
    let picture = picture.to_rgba8();
    let mut mask = GrayImage::new(picture.width(), picture.height());
    for (from, to) in picture.pixels().zip(mask.pixels_mut()) {
        *to = Luma([255 - from.0[3]]);
    }
    mask.pixels().any(|pixel| pixel.0[0] > 0).then_some(mask)
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{Rgb, RgbImage, Rgba, RgbaImage};

    #[test]
    fn a_mask_is_white_where_a_picture_is_transparent() {
        let mut picture = RgbaImage::from_pixel(2, 1, Rgba([9, 9, 9, 255]));
        assert!(transparency(&picture.clone().into()).is_none());
        picture.put_pixel(1, 0, Rgba([9, 9, 9, 0]));
        let mask = transparency(&picture.into()).unwrap();
        assert_eq!(mask.into_raw(), [0, 255]);
        let opaque = RgbImage::from_pixel(1, 1, Rgb([0, 0, 0]));
        assert!(transparency(&opaque.into()).is_none());
    }
}
