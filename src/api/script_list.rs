//! `/sdapi/v1/scripts` and `/sdapi/v1/script-info`: the scripts that work, with the fields of A1111's page.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::App;
use super::script_runs::Selectable;
use super::scripts::Page;
use crate::pipeline::Curve;

/// Titles in the order of the list: those that always run first.
fn titles(page: Page) -> Vec<(&'static str, bool)> {
    let always = ["refiner", "sampler", "seed"].into_iter();
    let soft = (page == Page::Img2img).then_some("soft inpainting");
    let selectable = Selectable::ALL
        .into_iter()
        .filter(|script| script.is_on(page));
    let always = always.chain(soft).map(|title| (title, true));
    always
        .chain(selectable.map(|script| (script.title(), false)))
        .collect()
}

/// `GET /sdapi/v1/scripts`.
pub async fn scripts() -> Json<Value> {
    let names = |page| -> Vec<&str> { titles(page).into_iter().map(|(title, _)| title).collect() };
    Json(json!({ "txt2img": names(Page::Txt2img), "img2img": names(Page::Img2img) }))
}

/// `GET /sdapi/v1/script-info`: one entry for each script and page.
pub async fn script_info(State(app): State<Arc<App>>) -> Json<Value> {
    let upscalers = app.engine.catalog().upscalers().names();
    let mut entries = Vec::new();
    for page in [Page::Txt2img, Page::Img2img] {
        for (title, is_alwayson) in titles(page) {
            entries.push(json!({
                "name": title,
                "is_alwayson": is_alwayson,
                "is_img2img": page == Page::Img2img,
                "args": arguments(title, &upscalers),
            }));
        }
    }
    Json(Value::Array(entries))
}

/// A plain field.
fn field(label: &str, value: impl Into<Value>) -> Value {
    slider(label, value, [Value::Null, Value::Null, Value::Null])
}

/// A number between two others.
fn number(label: &str, value: f64, [least, most, step]: [f64; 3]) -> Value {
    slider(label, value, [json!(least), json!(most), json!(step)])
}

fn slider(label: &str, value: impl Into<Value>, [minimum, maximum, step]: [Value; 3]) -> Value {
    json!({ "label": label, "value": value.into(), "minimum": minimum, "maximum": maximum, "step": step, "choices": null })
}

/// A choice of texts.
fn choice<T: Into<Value>>(label: &str, value: &str, choices: impl IntoIterator<Item = T>) -> Value {
    let mut choice = field(label, value);
    choice["choices"] = choices.into_iter().map(Into::into).collect();
    choice
}

#[rustfmt::skip]
fn arguments(title: &str, upscalers: &[String]) -> Vec<Value> {
    match title {
        "refiner" => vec![
            field("Refiner", false),
            field("Checkpoint", ""),
            number("Switch at", 0.8, [0.01, 1.0, 0.01]),
        ],
        "sampler" => vec![
            number("Sampling steps", 20.0, [1.0, 150.0, 1.0]),
            field("Sampling method", "DPM++ 2M"),
            field("Schedule type", "Automatic"),
        ],
        "seed" => vec![
            field("Seed", -1),
            field("Extra", false),
            field("Variation seed", -1),
            number("Variation strength", 0.0, [0.0, 1.0, 0.01]),
            number("Resize seed from width", 0.0, [0.0, 2048.0, 8.0]),
            number("Resize seed from height", 0.0, [0.0, 2048.0, 8.0]),
        ],
        "soft inpainting" => vec![
            field("Soft inpainting", false),
            number("Schedule bias", 1.0, [0.0, 8.0, 0.1]),
            number("Preservation strength", 0.5, [0.0, 8.0, 0.05]),
            number("Transition contrast boost", 4.0, [1.0, 32.0, 0.5]),
            number("Mask influence", 0.0, [0.0, 1.0, 0.05]),
            number("Difference threshold", 0.5, [0.0, 8.0, 0.25]),
            number("Difference contrast", 2.0, [0.0, 8.0, 0.25]),
        ],
        "prompts from file or textbox" => vec![
            field("Iterate seed every line", false),
            field("Use same random seed for all lines", false),
            choice("Insert prompts at the", "start", ["start", "end"]),
            field("List of prompt inputs", ""),
        ],
        "loopback" => vec![
            number("Loops", 4.0, [1.0, 32.0, 1.0]),
            number("Final denoising strength", 0.5, [0.0, 1.0, 0.01]),
            choice("Denoising strength curve", "Linear", Curve::ALL.map(Curve::label)),
            choice("Append interrogated prompt at each iteration", "None", ["None"]),
        ],
        "sd upscale" => vec![
            field("HTML", ""),
            number("Tile overlap", 64.0, [0.0, 256.0, 16.0]),
            choice("Upscaler", "None", upscalers.iter().map(String::as_str)),
            number("Scale Factor", 2.0, [1.0, 4.0, 0.05]),
        ],
        _ => Vec::new(),
    }
}
