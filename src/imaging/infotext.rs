//! The `parameters` text: prompt, negative prompt, and one line of `Key: value` pairs.
//!
//! What [`build`] writes, [`parse`] reads back, unless the last line has fewer than three pairs: then it is prompt text, as it is
//! for every tool that reads these files. Follows A1111's `create_infotext` and `parse_generation_parameters`.

mod fields;
mod value;

use std::sync::LazyLock;

use regex::Regex;

pub use fields::{
    Completion, OVERRIDES, SAME_CHECKPOINT, SAME_SAMPLER, SAME_SCHEDULER, is_after, split_sampler,
};
pub use value::{Value, python_float};

/// Keyword of the text in a PNG.
pub const PNG_KEYWORD: &str = "parameters";

/// Fewest pairs that make the last line a parameter line.
const FEWEST_PAIRS: usize = 3;

const NEGATIVE: &str = "Negative prompt:";

/// One pair: a key of at least two characters, then a JSON string or text up to the next comma.
static PAIR: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r#"\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)"#)
        .expect("a constant pattern")
});

/// Ordered key-value pairs of the parameter line. A key keeps the place it got first, whatever its value becomes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Params {
    entries: Vec<(String, Value)>,
}

impl Params {
    /// No pairs.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets `key`: in its place if it has one, else at the end.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        let (key, value) = (key.into(), value.into());
        match self
            .entries
            .iter_mut()
            .find(|(existing, _)| *existing == key)
        {
            Some((_, slot)) => *slot = value,
            None => self.entries.push((key, value)),
        }
    }

    /// [`insert`](Self::insert)s `value` if there is one: A1111 leaves out what is `None`.
    pub fn insert_some(&mut self, key: impl Into<String>, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.insert(key, value);
        }
    }

    /// Sets `key` only if it is absent.
    pub fn insert_default(&mut self, key: &str, value: impl Into<Value>) {
        if self.get(key).is_none() {
            self.entries.push((key.to_string(), value.into()));
        }
    }

    /// The value of `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries
            .iter()
            .find(|(existing, _)| existing == key)
            .map(|(_, value)| value)
    }

    /// Takes `key` out.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        let at = self
            .entries
            .iter()
            .position(|(existing, _)| existing == key)?;
        Some(self.entries.remove(at).1)
    }

    /// The pairs in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries
            .iter()
            .map(|(key, value)| (key.as_str(), value))
    }

    /// Number of pairs.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no pair.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The parameter line.
    #[must_use]
    pub fn to_line(&self) -> String {
        let pair = |(key, value): &(String, Value)| {
            let text = value.to_string();
            if *key == text {
                text
            } else {
                format!("{key}: {}", quote(&text))
            }
        };
        self.entries.iter().map(pair).collect::<Vec<_>>().join(", ")
    }
}

impl<K: Into<String>, V: Into<Value>> Extend<(K, V)> for Params {
    fn extend<T: IntoIterator<Item = (K, V)>>(&mut self, pairs: T) {
        for (key, value) in pairs {
            self.insert(key, value);
        }
    }
}

impl<K: Into<String>, V: Into<Value>> FromIterator<(K, V)> for Params {
    fn from_iter<T: IntoIterator<Item = (K, V)>>(pairs: T) -> Self {
        let mut params = Self::new();
        params.extend(pairs);
        params
    }
}

/// A JSON object in the same order.
impl serde::Serialize for Params {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

/// Writes the text: the prompt, the negative prompt if there is one, the parameter line.
///
/// ```
/// use sdgen::imaging::infotext::{Params, build};
/// let params = Params::from_iter([("Steps", "20"), ("Size", "512x512")]);
/// assert_eq!(build("a cat", "blurry", &params), "a cat\nNegative prompt: blurry\nSteps: 20, Size: 512x512");
/// ```
#[must_use]
pub fn build(prompt: &str, negative_prompt: &str, params: &Params) -> String {
    let negative = if negative_prompt.is_empty() {
        String::new()
    } else {
        format!("\n{NEGATIVE} {negative_prompt}")
    };
    trim(&format!("{prompt}{negative}\n{}", params.to_line())).to_string()
}

/// A text taken apart.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Parsed {
    /// Lines before `Negative prompt:`.
    pub prompt: String,
    /// Lines from there on.
    pub negative_prompt: String,
    /// The parameter line; all values are text, quotes removed.
    pub params: Params,
}

/// Takes a text apart. Any text is one: without a parameter line it is all prompt.
#[must_use]
pub fn parse(text: &str) -> Parsed {
    let text = trim(text);
    let (lines, last) = text
        .rsplit_once('\n')
        .map_or((None, text), |(lines, last)| (Some(lines), last));
    let is_parameters = PAIR.find_iter(last).take(FEWEST_PAIRS).count() == FEWEST_PAIRS;
    let mut parsed = Parsed::default();
    let prompt_lines = lines
        .into_iter()
        .flat_map(|lines| lines.split('\n'))
        .chain((!is_parameters).then_some(last));
    let mut in_negative = false;
    for line in prompt_lines {
        let mut line = trim(line);
        if let Some(rest) = line.strip_prefix(NEGATIVE) {
            in_negative = true;
            line = trim(rest);
        }
        let part = if in_negative {
            &mut parsed.negative_prompt
        } else {
            &mut parsed.prompt
        };
        if !part.is_empty() {
            part.push('\n');
        }
        part.push_str(line);
    }
    if is_parameters {
        for pair in PAIR.captures_iter(last) {
            // An empty value is no value: such a pair says nothing.
            if !pair[2].is_empty() {
                parsed.params.insert(&pair[1], unquote(&pair[2]));
            }
        }
    }
    parsed
}

/// Puts a value in quotes, as a JSON string, if a comma, a colon or a line end in it would mislead a reader.
#[must_use]
pub fn quote(text: &str) -> String {
    if text.contains([',', '\n', ':']) {
        serde_json::Value::from(text).to_string()
    } else {
        text.to_string()
    }
}

/// Undoes [`quote`]; text that is no JSON string stays as it is.
#[must_use]
pub fn unquote(text: &str) -> String {
    let quoted = text.len() > 1 && text.starts_with('"') && text.ends_with('"');
    quoted
        .then(|| serde_json::from_str(text).ok())
        .flatten()
        .unwrap_or_else(|| text.to_string())
}

/// Trims what Python's `str.strip` trims.
fn trim(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}'))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_key_keeps_its_place() {
        let mut params = Params::from_iter([("Steps", 20), ("Seed", 1)]);
        params.insert("Steps", 30);
        params.insert_some("ENSD", None::<i64>);
        params.insert_default("Seed", 5);
        params.insert("CFG scale", 7.0);
        params.insert("Extra", "Extra");
        assert_eq!(
            params.to_line(),
            "Steps: 30, Seed: 1, CFG scale: 7.0, Extra"
        );
        assert_eq!(
            serde_json::to_string(&params).unwrap(),
            r#"{"Steps":30,"Seed":1,"CFG scale":7.0,"Extra":"Extra"}"#
        );
        assert_eq!(params.remove("Steps"), Some(Value::Int(30)));
        assert_eq!((params.len(), params.is_empty()), (3, false));
    }

    #[test]
    fn only_misleading_values_are_quoted() {
        for (text, quoted) in [
            ("a b", "a b"),
            ("x: 1", "\"x: 1\""),
            ("é, \"日\"\n\\", "\"é, \\\"日\\\"\\n\\\\\""),
            ("\"a\"", "\"a\""),
        ] {
            assert_eq!(quote(text), quoted);
        }
        assert_eq!(unquote("\"x: \\u00e9\""), "x: é");
        assert_eq!(
            (unquote("\"broken\\\""), unquote("\"")),
            ("\"broken\\\"".to_string(), "\"".to_string())
        );
    }

    #[test]
    fn two_pairs_are_prompt_text() {
        let parsed = parse("Steps: 20, Seed: 1");
        assert_eq!(
            (parsed.prompt.as_str(), parsed.params.len()),
            ("Steps: 20, Seed: 1", 0)
        );
        assert_eq!(parse(""), Parsed::default());
    }
}
