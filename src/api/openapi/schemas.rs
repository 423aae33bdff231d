//! JSON schemas: of requests from the field tables, of answers from a short notation.
//!
//! The notation of an answer is `name:kind` pairs, with kinds `s` text, `i` whole number, `n` number, `b` boolean, `o` object,
//! `x` anything, `[k]` a list of kind `k`, and `k?` for `null` as well. Every named key is always there.

use serde_json::{Map, Value, json};

use crate::api::fields::{Default, Field, Kind};
use crate::api::openai::request as openai;
use crate::api::options_table::OPTIONS;
use crate::api::{extras, types, vocabulary};
use crate::config::Limits;

/// The named schemas.
pub(super) fn components(limits: &Limits) -> Map<String, Value> {
    let table = |fields: &[Field], required: &[&str]| request(fields, required, limits);
    let mut all = Map::new();
    let mut put = |name: &str, schema: Value| drop(all.insert(name.to_string(), schema));
    put("Txt2Img", table(&types::txt2img(), &[]));
    put("Img2Img", table(&types::img2img(), &["init_images"]));
    put("ExtrasSingle", table(&extras::single_fields(), &["image"]));
    put(
        "ExtrasBatch",
        batch(table(&extras::batch_fields(), &["imageList"])),
    );
    put("PngInfo", table(types::PNG_INFO, &["image"]));
    put("TaskProgress", table(types::TASK_PROGRESS, &["id_task"]));
    put("Options", table(OPTIONS, &[]));
    put(
        "ImageGeneration",
        table(&openai::generation_fields(), &["prompt"]),
    );
    put(
        "ImageEdit",
        form(table(&openai::edit_fields(), &["prompt"]), openai::FILES),
    );
    put(
        "ImageVariation",
        form(table(&openai::variation_fields(), &[]), &openai::FILES[..1]),
    );
    put("JobSubmission", job_submission());
    put(
        "Job",
        object(
            "id:s type:s client:s state:s title:s position:i? progress:o? eta_seconds:n? device:s? attempts:i \
        created:i started:i? finished:i? result:o? error:s? links:o",
        ),
    );
    put("Model", object("id:s object:s created:i owned_by:s"));
    put("Error", error());
    put("ValidationError", validation_error());
    put("OpenAiError", openai_error());
    all
}

/// The schema of a request that a field table reads. `null` means the default.
fn request(fields: &[Field], required: &[&str], limits: &Limits) -> Value {
    let mut properties = Map::new();
    for (name, kind, default) in fields {
        let must = required.contains(name);
        let mut schema = kind_schema(*kind, !must);
        if *default != Default::Null {
            schema.insert("default".into(), default.to_json());
        }
        schema.extend(facts(name, limits));
        properties.insert((*name).to_string(), Value::Object(schema));
    }
    let mut schema = json!({ "type": "object", "properties": properties });
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema
}

fn kind_schema(kind: Kind, nullable: bool) -> Map<String, Value> {
    let name = match kind {
        Kind::Text => "string",
        Kind::Int => "integer",
        Kind::Float => "number",
        Kind::Bool => "boolean",
        Kind::Texts | Kind::List => "array",
        Kind::Object => "object",
        Kind::Any => return Map::new(),
    };
    let mut schema = Map::new();
    let kinds = if nullable {
        json!([name, "null"])
    } else {
        json!(name)
    };
    schema.insert("type".into(), kinds);
    match kind {
        Kind::Int => drop(schema.insert("format".into(), json!("int64"))),
        Kind::Texts => drop(schema.insert("items".into(), json!({ "type": "string" }))),
        Kind::List => drop(schema.insert("items".into(), json!({}))),
        _ => {}
    }
    schema
}

/// What a field's name says beyond its kind.
fn facts(name: &str, limits: &Limits) -> Map<String, Value> {
    let samplers = || vocabulary::samplers_json();
    let names = |list: Value, key: &str| -> Vec<Value> {
        let rows = list.as_array().cloned().unwrap_or_default();
        rows.into_iter().map(|mut row| row[key].take()).collect()
    };
    let facts = match name {
        "width" | "height" => json!({ "minimum": 8, "maximum": limits.max_side }),
        "steps" => json!({ "minimum": 1, "maximum": limits.max_steps }),
        "batch_size" => json!({ "minimum": 1, "maximum": limits.max_batch_size }),
        "n_iter" => json!({ "minimum": 1, "maximum": limits.max_batch_count }),
        "seed" | "subseed" => json!({ "minimum": -1 }),
        "cfg_scale" => json!({ "minimum": -10_000, "maximum": 10_000 }),
        "denoising_strength"
        | "subseed_strength"
        | "gfpgan_visibility"
        | "codeformer_visibility"
        | "codeformer_weight"
        | "extras_upscaler_2_visibility" => {
            json!({ "minimum": 0, "maximum": 1 })
        }
        "prompt" | "negative_prompt" => json!({ "maxLength": limits.max_prompt_kib * 1024 }),
        "sampler_name" | "hr_sampler_name" => json!({ "examples": names(samplers(), "name") }),
        "scheduler" | "hr_scheduler" => {
            json!({ "examples": names(vocabulary::schedulers_json(), "label") })
        }
        "init_images" | "image" => {
            json!({ "description": "base64, with or without a `data:` prefix" })
        }
        "mask" => json!({ "description": "base64; white is painted anew" }),
        "n" => json!({ "minimum": 1, "maximum": openai::MOST }),
        "size" => json!({ "description": "`auto` or `WIDTHxHEIGHT`, multiples of 8" }),
        "quality" => {
            json!({ "description": "steps: `low` 12, `medium`, `standard`, `auto` 25, `high`, `hd` 40" })
        }
        "response_format" => json!({ "examples": ["url", "b64_json"] }),
        "output_format" => json!({ "examples": ["png", "jpeg", "webp"] }),
        "output_compression" => json!({ "minimum": 0, "maximum": 100 }),
        _ => json!({}),
    };
    facts.as_object().cloned().unwrap_or_default()
}

fn batch(mut schema: Value) -> Value {
    let item = json!({ "type": "object", "required": ["data"], "properties": {
        "data": { "type": "string" }, "name": { "type": "string" } } });
    schema["properties"]["imageList"]["items"] = item;
    schema
}

/// A form's schema: that of its fields, and files.
fn form(mut schema: Value, files: &[Field]) -> Value {
    for (name, ..) in files {
        schema["properties"][*name] =
            json!({ "type": "string", "contentMediaType": "image/png", "format": "binary" });
    }
    let mut required = vec![json!("image")];
    required.extend(schema["required"].as_array().cloned().unwrap_or_default());
    schema["required"] = Value::Array(required);
    schema
}

fn job_submission() -> Value {
    json!({ "type": "object", "required": ["request"], "properties": {
        "type": { "type": ["string", "null"], "enum": ["txt2img", "img2img", null], "default": "txt2img" },
        "request": { "anyOf": [{ "$ref": "#/components/schemas/Txt2Img" }, { "$ref": "#/components/schemas/Img2Img" }] },
        "webhook": { "type": ["string", "null"], "description": "an `http` or `https` address" },
        "id": { "type": ["string", "null"], "pattern": "^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}$" },
    } })
}

fn error() -> Value {
    json!({ "type": "object", "required": ["detail"], "properties": {
        "error": { "type": "string" }, "detail": { "type": "string" },
        "body": { "type": "string" }, "errors": { "type": "string" } } })
}

fn validation_error() -> Value {
    let problem = json!({ "type": "object", "required": ["loc", "msg", "type"], "properties": {
        "loc": { "type": "array", "items": { "type": ["string", "integer"] } },
        "msg": { "type": "string" }, "type": { "type": "string" } } });
    json!({ "type": "object", "required": ["detail"], "properties": {
        "detail": { "type": "array", "items": problem } } })
}

fn openai_error() -> Value {
    let error = object("message:s type:s param:s? code:s?");
    json!({ "type": "object", "required": ["error"], "properties": { "error": error } })
}

/// The schema of an object in the notation.
pub(super) fn object(notation: &str) -> Value {
    let (mut properties, mut required) = (Map::new(), Vec::new());
    let pairs = notation.split_whitespace();
    for (name, kind) in pairs.filter_map(|pair| pair.split_once(':')) {
        required.push(json!(name));
        properties.insert(name.to_string(), kind_of(kind));
    }
    json!({ "type": "object", "required": required, "properties": properties })
}

/// The schema of a kind in the notation.
pub(super) fn kind_of(kind: &str) -> Value {
    if let Some(item) = kind
        .strip_prefix('[')
        .and_then(|kind| kind.strip_suffix(']'))
    {
        return json!({ "type": "array", "items": kind_of(item) });
    }
    let (bare, nullable) = kind
        .strip_suffix('?')
        .map_or((kind, false), |bare| (bare, true));
    if let Some(item) = bare
        .strip_prefix('[')
        .and_then(|kind| kind.strip_suffix(']'))
    {
        return json!({ "type": ["array", "null"], "items": kind_of(item) });
    }
    let name = match bare {
        "s" => "string",
        "i" => "integer",
        "n" => "number",
        "b" => "boolean",
        "o" => "object",
        _ => return json!({}),
    };
    if nullable {
        json!({ "type": [name, "null"] })
    } else {
        json!({ "type": name })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_notation_is_read() {
        let schema = object("a:s b:i? c:[n] d:[s]? e:x");
        let properties = &schema["properties"];
        assert_eq!(schema["required"], json!(["a", "b", "c", "d", "e"]));
        assert_eq!(properties["b"], json!({ "type": ["integer", "null"] }));
        assert_eq!(
            properties["c"],
            json!({ "type": "array", "items": { "type": "number" } })
        );
        assert_eq!(properties["d"]["type"], json!(["array", "null"]));
        assert_eq!(properties["e"], json!({}));
    }

    #[test]
    fn every_field_of_a_table_is_in_its_schema() {
        let all = components(&Limits::default());
        for (name, kind, _) in types::img2img() {
            assert!(
                all["Img2Img"]["properties"][name].is_object(),
                "{name} {kind:?}"
            );
        }
        let steps = &all["Txt2Img"]["properties"]["steps"];
        let expected = json!({ "type": ["integer", "null"], "format": "int64", "default": 50, "minimum": 1, "maximum": 1000 });
        assert_eq!(*steps, expected);
    }
}
