//! Scripts that a request switches on: soft inpainting, and those of A1111's that act only in its own page.
//!
//! A1111 answers 422 to unknown scripts. Entries whose every argument is off are harmless, and clients send them.

use axum::http::StatusCode;
use serde_json::Value;

use super::error::ApiError;
use super::script_runs::Selectable;
use super::types::Generation;
use crate::pipeline::SoftInpainting;

/// Scripts of A1111's that fill fields from its page; the API sends those fields itself.
const PAGE_ONLY: [&str; 6] = [
    "comments",
    "extra options",
    "refiner",
    "sampler",
    "seed",
    "hypertile",
];

const SOFT_INPAINTING: &str = "soft inpainting";

/// Which request it is: soft inpainting belongs to one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page {
    /// txt2img.
    Txt2img,
    /// img2img.
    Img2img,
}

/// Refuses scripts that would act and are not ours.
///
/// # Errors
/// 422 in A1111's words.
pub fn check(request: &Generation, page: Page) -> Result<(), ApiError> {
    let unknown = |name: &str| unprocessable(format!("Script '{name}' not found"));
    Selectable::of(request.script_name.as_deref(), page)?;
    let selectable = |name: &&String| {
        let lower = name.to_lowercase();
        Selectable::ALL.iter().any(|script| script.title() == lower)
    };
    if let Some(name) = request.alwayson_scripts.keys().find(selectable) {
        return Err(unprocessable(format!(
            "Cannot have a selectable script in the always on scripts params: `{name}`"
        )));
    }
    let is_known = |name: &str| {
        let name = name.to_lowercase();
        PAGE_ONLY.contains(&name.as_str()) || (page == Page::Img2img && name == SOFT_INPAINTING)
    };
    let unknown_name = request
        .alwayson_scripts
        .iter()
        .find(|(name, script)| !is_known(name) && !is_off(script));
    unknown_name.map_or(Ok(()), |(name, _)| Err(unknown(name)))
}

/// Whether the request names a script.
///
/// # Errors
/// 422 for a script that the page does not have.
pub fn is_selected(request: &Generation, page: Page) -> Result<bool, ApiError> {
    Ok(Selectable::of(request.script_name.as_deref(), page)?.is_some())
}

/// Whether the request is a list of prompts.
///
/// # Errors
/// 422 for a script that the page does not have.
pub fn is_list_of_prompts(request: &Generation, page: Page) -> Result<bool, ApiError> {
    let script = Selectable::of(request.script_name.as_deref(), page)?;
    Ok(script == Some(Selectable::Prompts))
}

/// The settings of soft inpainting, if the request switches it on: `args` are `[enabled, schedule bias, preservation strength,
/// transition contrast boost, mask influence, difference threshold, difference contrast]`, defaults for what is missing.
///
/// # Errors
/// 422 for arguments of other types.
pub fn soft_inpainting(request: &Generation) -> Result<Option<SoftInpainting>, ApiError> {
    let mut scripts = request.alwayson_scripts.iter();
    let Some((_, script)) = scripts.find(|(name, _)| name.to_lowercase() == SOFT_INPAINTING) else {
        return Ok(None);
    };
    let args = match script.get("args") {
        Some(Value::Array(args)) => args.as_slice(),
        None | Some(Value::Null) => &[],
        Some(_) => {
            return Err(unprocessable(
                "`Soft Inpainting`: `args` is not a list".into(),
            ));
        }
    };
    if args.first().is_none_or(is_falsy) {
        return Ok(None);
    }
    let number = |index: usize, default: f32| match args.get(index) {
        None | Some(Value::Null) => Ok(default),
        Some(value) => value
            .as_f64()
            .map(|value| value as f32)
            .filter(|value| value.is_finite())
            .ok_or_else(|| {
                unprocessable(format!(
                    "`Soft Inpainting`: argument {index} is not a number"
                ))
            }),
    };
    let mut soft = SoftInpainting::default();
    soft.blend.power = number(1, soft.blend.power)?;
    soft.blend.scale = number(2, soft.blend.scale)?;
    soft.blend.contrast = number(3, soft.blend.contrast)?;
    soft.mask_influence = number(4, soft.mask_influence)?;
    soft.difference_threshold = number(5, soft.difference_threshold)?;
    soft.difference_contrast = number(6, soft.difference_contrast)?;
    Ok(Some(soft))
}

fn unprocessable(message: String) -> ApiError {
    ApiError::Http(StatusCode::UNPROCESSABLE_ENTITY, message)
}

fn is_off(script: &Value) -> bool {
    match script.get("args") {
        None | Some(Value::Null) => true,
        Some(Value::Array(items)) => items.iter().all(is_falsy),
        Some(Value::Object(items)) => items.values().all(is_falsy),
        Some(_) => false,
    }
}

fn is_falsy(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.iter().all(is_falsy),
        // A unit of ControlNet's, for example.
        Value::Object(items) => items.is_empty() || items.get("enabled").is_some_and(is_falsy),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::api::{fields::read, types::img2img};
    use serde::Deserialize;

    fn request(scripts: &str) -> Generation {
        let body = format!(r#"{{"alwayson_scripts": {scripts}}}"#);
        Generation::deserialize(&read(body.as_bytes(), &img2img()).unwrap()).unwrap()
    }

    #[test]
    fn soft_inpainting_takes_its_arguments_in_a1111s_order() {
        let soft = request(r#"{"Soft Inpainting": {"args": [true, 2, 0.25, 5, 0.5, 0.75, 3]}}"#);
        assert!(check(&soft, Page::Img2img).is_ok());
        assert!(check(&soft, Page::Txt2img).is_err());
        let got = soft_inpainting(&soft).unwrap().unwrap();
        assert_eq!(
            (got.blend.power, got.blend.scale, got.blend.contrast),
            (2.0, 0.25, 5.0)
        );
        assert_eq!(
            (
                got.mask_influence,
                got.difference_threshold,
                got.difference_contrast
            ),
            (0.5, 0.75, 3.0)
        );
        let short = soft_inpainting(&request(r#"{"soft inpainting": {"args": [true]}}"#));
        assert_eq!(short.unwrap(), Some(SoftInpainting::default()));
        let off = soft_inpainting(&request(r#"{"soft inpainting": {"args": [false, 9]}}"#));
        assert_eq!(off.unwrap(), None);
        let wrong = request(r#"{"soft inpainting": {"args": [true, "x"]}}"#);
        assert!(soft_inpainting(&wrong).is_err());
    }

    #[test]
    fn unknown_scripts_are_refused_unless_they_are_off() {
        let on = request(r#"{"ControlNet": {"args": [{"enabled": true}]}}"#);
        assert!(check(&on, Page::Img2img).is_err());
        let off = request(
            r#"{"ControlNet": {"args": [{"enabled": false}]}, "Refiner": {"args": [true, "x", 0.8]}}"#,
        );
        assert!(check(&off, Page::Img2img).is_ok());
    }
}
