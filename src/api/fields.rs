//! The lenient reading of request bodies that A1111's clients rely on: a table of fields with kinds and defaults, applied to
//! whatever JSON arrived.
//!
//! Follows pydantic v1 as `FastAPI` used it: numeric strings are numbers, floats are truncated to ints, 0/1 and `"on"`/`"off"`
//! are booleans, numbers are text where text is wanted, unknown fields are ignored, `null` means the default. Every problem
//! of a body is reported at once, in `FastAPI`'s form.

use serde_json::{Map, Number, Value, json};

use super::error::{ApiError, Problem};

/// What a field holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Text.
    Text,
    /// A whole number of 64 bits.
    Int,
    /// A number.
    Float,
    /// True or false.
    Bool,
    /// A list of texts.
    Texts,
    /// An object.
    Object,
    /// A list of anything.
    List,
    /// Anything.
    Any,
}

/// Value of a field that was not sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Default {
    /// `null`.
    Null,
    /// A text.
    Text(&'static str),
    /// A whole number.
    Int(i64),
    /// A number.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// A list of texts.
    Texts(&'static [&'static str]),
    /// `{}`.
    Object,
}

impl Default {
    /// The default as JSON.
    #[must_use]
    pub fn to_json(self) -> Value {
        match self {
            Self::Null => Value::Null,
            Self::Text(text) => json!(text),
            Self::Int(number) => json!(number),
            Self::Float(number) => json!(number),
            Self::Bool(flag) => json!(flag),
            Self::Texts(items) => json!(items),
            Self::Object => json!({}),
        }
    }
}

/// One field: wire name, kind, default.
pub type Field = (&'static str, Kind, Default);

/// Reads a body into the complete model: every field of the table, in its order, coerced or defaulted.
///
/// # Errors
/// [`ApiError::Invalid`] with every problem.
pub fn read(body: &[u8], table: &[Field]) -> Result<Map<String, Value>, ApiError> {
    complete(parse_object(body)?, table)
}

/// The complete model of what was sent: every field of the table, in its order, coerced or defaulted.
///
/// # Errors
/// [`ApiError::Invalid`] with every problem.
pub fn complete(
    mut sent: Map<String, Value>,
    table: &[Field],
) -> Result<Map<String, Value>, ApiError> {
    let mut model = Map::new();
    let mut problems = Vec::new();
    for (name, kind, default) in table {
        let value = match sent.remove(*name) {
            None | Some(Value::Null) => default.to_json(),
            Some(value) => coerce(name, *kind, value).unwrap_or_else(|mut found| {
                problems.append(&mut found);
                Value::Null
            }),
        };
        model.insert((*name).to_string(), value);
    }
    if problems.is_empty() {
        Ok(model)
    } else {
        Err(problems.into())
    }
}

/// Reads a body that must be a JSON object.
///
/// # Errors
/// [`ApiError::Invalid`] in `FastAPI`'s words for an empty body, malformed JSON, text that is not UTF-8, or another JSON type.
pub fn parse_object(body: &[u8]) -> Result<Map<String, Value>, ApiError> {
    let problem =
        |loc: Vec<Value>, msg: String, kind| ApiError::Invalid(vec![Problem { loc, msg, kind }]);
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(problem(
            vec![json!("body")],
            "field required".into(),
            "value_error.missing",
        ));
    }
    let text = std::str::from_utf8(body).map_err(|error| {
        let at = error.valid_up_to();
        problem(
            vec![json!("body"), json!(at)],
            format!("body is not valid UTF-8 at byte {at}"),
            "value_error.unicode",
        )
    })?;
    let value: Value = serde_json::from_str(text).map_err(|error| {
        let loc = vec![
            json!("body"),
            json!(offset(text, error.line(), error.column())),
        ];
        problem(
            loc,
            format!("not valid JSON: {error}"),
            "value_error.jsondecode",
        )
    })?;
    match value {
        Value::Object(map) => Ok(map),
        _ => Err(problem(
            vec![json!("body")],
            "value is not a valid dict".into(),
            "type_error.dict",
        )),
    }
}

/// Makes a value fit its kind.
///
/// # Errors
/// The problems in `FastAPI`'s words; more than one for lists.
pub fn coerce(name: &str, kind: Kind, value: Value) -> Result<Value, Vec<Problem>> {
    let wrong = |msg: &str, kind| vec![Problem::field(name, msg, kind)];
    match kind {
        Kind::Any => Ok(value),
        Kind::Text => text(&value)
            .map(Value::from)
            .ok_or_else(|| wrong("str type expected", "type_error.str")),
        Kind::Int => int(&value)
            .map(Value::from)
            .ok_or_else(|| wrong("value is not a valid integer", "type_error.integer")),
        // NaN and infinity have no JSON form: they become `null` here and must not pass for "not sent".
        Kind::Float => match float(&value) {
            Some(number) => Number::from_f64(number).map(Value::Number).ok_or_else(|| {
                wrong(
                    "value must be a finite number",
                    "value_error.number.not_finite_number",
                )
            }),
            None => Err(wrong("value is not a valid float", "type_error.float")),
        },
        Kind::Bool => boolean(&value)
            .map(Value::from)
            .ok_or_else(|| wrong("value could not be parsed to a boolean", "type_error.bool")),
        Kind::Object if value.is_object() => Ok(value),
        Kind::Object => Err(wrong("value is not a valid dict", "type_error.dict")),
        Kind::List if value.is_array() => Ok(value),
        Kind::List => Err(wrong("value is not a valid list", "type_error.list")),
        Kind::Texts => texts(name, value),
    }
}

fn texts(name: &str, value: Value) -> Result<Value, Vec<Problem>> {
    let Value::Array(items) = value else {
        return Err(vec![Problem::field(
            name,
            "value is not a valid list",
            "type_error.list",
        )]);
    };
    let mut good = Vec::with_capacity(items.len());
    let mut problems = Vec::new();
    for (index, item) in items.iter().enumerate() {
        match text(item) {
            Some(text) => good.push(text),
            None => problems.push(Problem {
                loc: vec![json!("body"), json!(name), json!(index)],
                msg: "str type expected".into(),
                kind: "type_error.str",
            }),
        }
    }
    if problems.is_empty() {
        Ok(json!(good))
    } else {
        Err(problems)
    }
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(if *flag { "True" } else { "False" }.to_string()),
        _ => None,
    }
}

fn int(value: &Value) -> Option<i64> {
    match value {
        Value::Number(number) => number.as_i64().or_else(|| truncate(number.as_f64()?)),
        Value::String(text) => text.trim().parse().ok(),
        Value::Bool(flag) => Some(i64::from(*flag)),
        _ => None,
    }
}

/// The whole part, if it fits 64 bits.
fn truncate(number: f64) -> Option<i64> {
    const LIMIT: f64 = 9_223_372_036_854_775_808.0;
    (number > -LIMIT && number < LIMIT).then_some(number as i64)
}

fn float(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        Value::Bool(flag) => Some(f64::from(u8::from(*flag))),
        _ => None,
    }
}

fn boolean(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(flag) => Some(*flag),
        Value::Number(number) => match number.as_f64()? {
            0.0 => Some(false),
            1.0 => Some(true),
            _ => None,
        },
        Value::String(text) => match text.to_lowercase().as_str() {
            "true" | "on" | "yes" | "y" | "t" | "1" => Some(true),
            "false" | "off" | "no" | "n" | "f" | "0" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// Byte offset of serde's 1-based line and column.
fn offset(text: &str, line: usize, column: usize) -> usize {
    let before: usize = text
        .split_inclusive('\n')
        .take(line.saturating_sub(1))
        .map(str::len)
        .sum();
    (before + column.saturating_sub(1)).min(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[Field] = &[
        ("steps", Kind::Int, Default::Int(50)),
        ("cfg", Kind::Float, Default::Float(7.0)),
        ("tiling", Kind::Bool, Default::Null),
        ("prompt", Kind::Text, Default::Text("")),
        ("styles", Kind::Texts, Default::Null),
    ];

    fn model(body: &str) -> Value {
        Value::Object(read(body.as_bytes(), TABLE).unwrap())
    }

    fn problems(body: &[u8]) -> Vec<(Value, String, &'static str)> {
        match read(body, TABLE) {
            Err(ApiError::Invalid(list)) => list
                .into_iter()
                .map(|p| (json!(p.loc), p.msg, p.kind))
                .collect(),
            other => panic!("expected problems, got {other:?}"),
        }
    }

    #[test]
    fn defaults_fill_what_was_not_sent_or_null() {
        let expected =
            json!({"steps": 50, "cfg": 7.0, "tiling": null, "prompt": "", "styles": null});
        assert_eq!(model("{}"), expected);
        assert_eq!(
            model(r#"{"steps": null, "cfg": null, "unknown": [1]}"#),
            expected
        );
    }

    #[test]
    fn scalars_are_coerced_as_pydantic_does() {
        let sent = r#"{"steps": "20", "cfg": "1.5", "tiling": 1, "prompt": 7, "styles": ["a", 2]}"#;
        assert_eq!(
            model(sent),
            json!({"steps": 20, "cfg": 1.5, "tiling": true, "prompt": "7", "styles": ["a", "2"]})
        );
        assert_eq!(
            model(r#"{"steps": 20.7, "cfg": 3, "tiling": "off"}"#)["steps"],
            20
        );
        assert_eq!(model(r#"{"cfg": 3}"#)["cfg"].to_string(), "3.0");
    }

    #[test]
    fn every_problem_is_reported_at_its_place() {
        let found = problems(br#"{"steps": "many", "cfg": [], "styles": ["a", {}]}"#);
        assert_eq!(
            found,
            [
                (
                    json!(["body", "steps"]),
                    "value is not a valid integer".into(),
                    "type_error.integer"
                ),
                (
                    json!(["body", "cfg"]),
                    "value is not a valid float".into(),
                    "type_error.float"
                ),
                (
                    json!(["body", "styles", 1]),
                    "str type expected".into(),
                    "type_error.str"
                ),
            ]
        );
    }

    #[test]
    fn numbers_that_are_none_are_refused() {
        let found = problems(br#"{"cfg": "nan"}"#);
        assert_eq!(found[0].1, "value must be a finite number");
        assert_eq!(problems(br#"{"cfg": NaN}"#)[0].2, "value_error.jsondecode");
        assert_eq!(
            problems(br#"{"steps": 1e300}"#)[0].1,
            "value is not a valid integer"
        );
    }

    #[test]
    fn bodies_that_are_no_object_are_named() {
        assert_eq!(
            problems(b" ")[0],
            (
                json!(["body"]),
                "field required".into(),
                "value_error.missing"
            )
        );
        assert_eq!(problems(b"[]")[0].1, "value is not a valid dict");
        assert_eq!(
            problems(b"{\"prompt\": \"\xff\"}")[0].1,
            "body is not valid UTF-8 at byte 12"
        );
        let (loc, _, kind) = problems(b"{\n \"steps\": x}").remove(0);
        assert_eq!((loc, kind), (json!(["body", 12]), "value_error.jsondecode"));
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_a_crash() {
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(problems(deep.as_bytes())[0].2, "value_error.jsondecode");
    }
}
