//! `GET /openapi.json`: the `OpenAPI` 3.1 document of the routes that this server has.
//!
//! Requests are described by the field tables that read them, limits by the configuration, paths by [`operations`]; the tests
//! here compare paths and methods with the routes.

pub mod operations;
mod schemas;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Map, Value, json};

use super::{App, openai, routes};
use operations::{Answer, Body, OPERATIONS, Operation, QUERIES};

/// `GET /openapi.json`.
pub async fn openapi(State(app): State<Arc<App>>) -> Json<Value> {
    Json(document(&app))
}

/// The whole document.
#[must_use]
pub fn document(app: &App) -> Value {
    let known: BTreeSet<&str> = routes(app).into_iter().map(|(path, _)| path).collect();
    let mut paths = Map::new();
    for operation in OPERATIONS.iter().filter(|row| known.contains(row.path)) {
        let entry = paths.entry(operation.path).or_insert_with(|| json!({}));
        entry[operation.method] = describe(operation);
    }
    let server = &app.config.server;
    let ways = [
        ("basic", !server.api_auth.is_empty()),
        ("bearer", !server.api_tokens.is_empty()),
    ];
    let ways = ways.iter().filter(|(_, is_open)| *is_open);
    let security: Vec<Value> = ways.map(|(way, _)| json!({ *way: [] })).collect();
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "sdgen",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Stable Diffusion XL behind A1111's REST API, jobs of its own and OpenAI's images API. \
                Numbers may be sent as text, fields that are not listed are ignored, null means the default.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas::components(&app.config.limits),
            "securitySchemes": {
                "basic": { "type": "http", "scheme": "basic" },
                "bearer": { "type": "http", "scheme": "bearer" },
            },
        },
    });
    if !security.is_empty() {
        document["security"] = json!(security);
    }
    document
}

fn describe(operation: &Operation) -> Value {
    let id = operation
        .path
        .replace(|c: char| !c.is_ascii_alphanumeric(), "_");
    let mut described = json!({
        "operationId": format!("{}{id}", operation.method),
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": responses(operation),
    });
    let parameters = parameters(operation);
    if !parameters.is_empty() {
        described["parameters"] = json!(parameters);
    }
    let (mime, schema) = match operation.body {
        Body::None => ("", ""),
        Body::Json(schema) => ("application/json", schema),
        Body::Form(schema) => ("multipart/form-data", schema),
    };
    if !schema.is_empty() {
        described["requestBody"] =
            json!({ "required": true, "content": { mime: { "schema": named(schema) } } });
    }
    if matches!(operation.path, "/healthz" | "/readyz" | "/internal/ping")
        || operation.path.starts_with(openai::links::PATH)
    {
        described["security"] = json!([]);
    }
    described
}

fn parameters(operation: &Operation) -> Vec<Value> {
    let parts = operation.path.split('/');
    let names = parts.filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let in_path = names.map(|name| {
        let schema = match name {
            "number" => json!({ "type": "integer", "minimum": 0 }),
            _ => json!({ "type": "string", "minLength": 1 }),
        };
        json!({ "name": name, "in": "path", "required": true, "schema": schema })
    });
    let queries = QUERIES.iter().filter(|_| operation.method == "get");
    let queries = queries.filter(|(path, ..)| *path == operation.path);
    let in_query = queries.map(|(_, name, kind, meaning)| {
        json!({ "name": name, "in": "query", "description": meaning, "schema": schemas::kind_of(kind) })
    });
    in_path.chain(in_query).collect()
}

fn responses(operation: &Operation) -> Value {
    let json = |schema: Value| json!({ "application/json": { "schema": schema } });
    let content = match operation.answer {
        Answer::Kind(kind) => json(schemas::kind_of(kind)),
        Answer::Object(notation) => json(schemas::object(notation)),
        Answer::List(notation) => {
            json(json!({ "type": "array", "items": schemas::object(notation) }))
        }
        Answer::Named(name) | Answer::Accepted(name) => json(named(name)),
        Answer::Null => json(json!({ "type": "null" })),
        Answer::Bytes(mimes) => {
            let each = mimes.iter().map(|mime| ((*mime).to_string(), json!({})));
            Value::Object(each.collect())
        }
    };
    let mut responses = Map::new();
    let mut put = |status: &str, description: &str, content: &Value| {
        let response = json!({ "description": description, "content": content });
        responses.insert(status.to_string(), response);
    };
    put("200", "Done.", &content);
    if matches!(operation.answer, Answer::Accepted(_)) {
        put("202", "Accepted.", &content);
    }
    if openai::is_route(operation.path) {
        let error = json(named("OpenAiError"));
        put(
            "4XX",
            "Refused; 429 with `Retry-After` while the queue is full.",
            &error,
        );
        put("5XX", "Failed.", &error);
        return Value::Object(responses);
    }
    let error = json(named("Error"));
    if operation.path == "/readyz" {
        put(
            "503",
            "Not ready.",
            &json(schemas::object("status:s reason:s")),
        );
    }
    put("401", "No or wrong credentials.", &error);
    let invalid = json!({ "anyOf": [named("ValidationError"), named("Error")] });
    put(
        "422",
        "The request does not fit its schema or the limits.",
        &json(invalid),
    );
    put("4XX", "Refused.", &error);
    put("5XX", "Failed.", &error);
    Value::Object(responses)
}

fn named(schema: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{schema}") })
}
