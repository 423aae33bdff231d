//! The options store: A1111's settings in memory and in `config.json`.
//!
//! A file written by A1111 is taken as it stands: keys we do not know stay in it untouched. The file is replaced as a whole. A
//! file that is not JSON is an error at start and is never overwritten.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError, RwLock};

use serde_json::{Map, Value};

use super::error::{ApiError, Problem};
use super::fields::{self, Default, Kind};
use super::option_choices;
use super::options_table::{OPTIONS, RESTRICTED, find};
use crate::engine::hashes::replace_file;

/// Why the store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file exists and cannot be read.
    #[error("options file cannot be read: `{}`: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not a JSON object.
    #[error("options file is not a JSON object: `{}`: {reason}; repair or remove it", path.display())]
    NotJson {
        /// The file.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
}

/// A complete set of values at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Options(Map<String, Value>);

impl Options {
    /// A1111's defaults.
    #[must_use]
    pub fn defaults() -> Self {
        Self(
            OPTIONS
                .iter()
                .map(|(key, _, default)| ((*key).to_string(), default.to_json()))
                .collect(),
        )
    }

    /// A text option; its default if it is null.
    #[must_use]
    pub fn text(&self, key: &str) -> &str {
        let stored = self.0.get(key).and_then(Value::as_str);
        stored.unwrap_or(match find(key) {
            Some((_, _, Default::Text(default))) => default,
            _ => "",
        })
    }

    /// A whole number, whatever number it was stored as; its default if it is null.
    #[must_use]
    pub fn int(&self, key: &str) -> i64 {
        let stored = self
            .0
            .get(key)
            .and_then(|value| value.as_i64().or_else(|| value.as_f64().map(|f| f as i64)));
        stored.unwrap_or(match find(key) {
            Some((_, _, Default::Int(default))) => *default,
            _ => 0,
        })
    }

    /// A number; its default if it is null.
    #[must_use]
    pub fn float(&self, key: &str) -> f64 {
        self.0
            .get(key)
            .and_then(Value::as_f64)
            .unwrap_or(match find(key) {
                Some((_, _, Default::Float(default))) => *default,
                _ => 0.0,
            })
    }

    /// A switch; its default if it is null.
    #[must_use]
    pub fn flag(&self, key: &str) -> bool {
        self.0
            .get(key)
            .and_then(Value::as_bool)
            .unwrap_or(matches!(find(key), Some((_, _, Default::Bool(true)))))
    }

    /// A list of texts; empty if it is null.
    #[must_use]
    pub fn texts(&self, key: &str) -> Vec<String> {
        let items = self.0.get(key).and_then(Value::as_array);
        let texts = items.into_iter().flatten().filter_map(Value::as_str);
        texts.map(str::to_string).collect()
    }

    /// All values, as `GET /sdapi/v1/options` returns them.
    #[must_use]
    pub fn as_map(&self) -> &Map<String, Value> {
        &self.0
    }

    /// Sets one value that was checked before.
    pub fn set(&mut self, key: &str, value: Value) {
        self.0.insert(key.to_string(), value);
    }
}

/// The values in memory and their file.
#[derive(Debug)]
pub struct OptionStore {
    path: PathBuf,
    /// Held while the file is written.
    saving: Mutex<()>,
    values: RwLock<Options>,
}

impl OptionStore {
    /// Reads the file; a missing one means defaults. Values of the wrong type in the file fall back to the default.
    ///
    /// # Errors
    /// The file cannot be read or is not JSON.
    pub fn open(path: PathBuf) -> Result<Self, OpenError> {
        let mut options = Options::defaults();
        for (key, value) in read_file(&path)? {
            let Some((name, kind, _)) = find(&key) else {
                continue;
            };
            if value.is_null() {
                continue;
            }
            if let Ok(value) = coerce(name, *kind, value) {
                options.set(name, value);
            } else {
                tracing::warn!(key, path = %path.display(), "option of a wrong type or value ignored");
            }
        }
        Ok(Self {
            path,
            saving: Mutex::default(),
            values: RwLock::new(options),
        })
    }

    /// The values now.
    #[must_use]
    pub fn snapshot(&self) -> Options {
        self.values
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Changes values in memory only.
    pub fn apply(&self, changes: &Map<String, Value>) {
        let mut values = self.values.write().unwrap_or_else(PoisonError::into_inner);
        for (key, value) in changes {
            values.set(key, value.clone());
        }
    }

    /// Changes values and writes the file. Blocks on the disk.
    ///
    /// # Errors
    /// The file cannot be written; the values in memory stay changed, as in A1111.
    pub fn save(&self, changes: &Map<String, Value>) -> Result<(), ApiError> {
        let _alone = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        self.apply(changes);
        let mut stored = read_file(&self.path)
            .map_err(|error| ApiError::failure("OSError", error.to_string()))?;
        for (key, value) in self.snapshot().0 {
            stored.insert(key, value);
        }
        replace_file(&self.path, &Value::Object(stored)).map_err(|error| {
            ApiError::failure(
                "OSError",
                format!(
                    "options file cannot be written: `{}`: {error}",
                    self.path.display()
                ),
            )
        })
    }
}

/// Checks a partial object against the table: unknown and restricted keys are left out (unknown ones with a log line), the
/// rest is coerced. `null` stays `null`.
///
/// # Errors
/// Every value that does not fit its key.
pub fn check(sent: Map<String, Value>) -> Result<Map<String, Value>, Vec<Problem>> {
    let mut good = Map::new();
    let mut problems = Vec::new();
    for (key, value) in sent {
        match find(&key) {
            None => tracing::warn!(key, "unknown option ignored"),
            Some(_) if RESTRICTED.contains(&key.as_str()) => {}
            Some(_) if value.is_null() => drop(good.insert(key, Value::Null)),
            Some((name, kind, _)) => match coerce(name, *kind, value) {
                Ok(value) => drop(good.insert(key, value)),
                Err(mut found) => problems.append(&mut found),
            },
        }
    }
    if problems.is_empty() {
        Ok(good)
    } else {
        Err(problems)
    }
}

/// A value in the type and, where there are few, one of the words of its key.
fn coerce(name: &str, kind: Kind, value: Value) -> Result<Value, Vec<Problem>> {
    let value = fields::coerce(name, kind, value)?;
    option_choices::keep(name, value).map_err(|problem| vec![problem])
}

fn read_file(path: &PathBuf) -> Result<Map<String, Value>, OpenError> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(source) => {
            return Err(OpenError::Unreadable {
                path: path.clone(),
                source,
            });
        }
    };
    serde_json::from_slice(&text).map_err(|error| OpenError::NotJson {
        path: path.clone(),
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_table_has_no_duplicates_and_no_forge_marker() {
        let keys: std::collections::BTreeSet<_> = OPTIONS.iter().map(|(key, ..)| *key).collect();
        assert_eq!(keys.len(), OPTIONS.len());
        assert!(!keys.contains("forge_preset"));
    }

    #[test]
    fn defaults_fit_their_kinds() {
        for (key, kind, default) in OPTIONS {
            let value = default.to_json();
            assert!(
                value.is_null() || fields::coerce(key, *kind, value.clone()) == Ok(value),
                "{key}"
            );
        }
    }

    #[test]
    fn null_is_the_default() {
        let mut options = Options::defaults();
        options.set("randn_source", Value::Null);
        options.set("jpeg_quality", Value::Null);
        assert_eq!(options.text("randn_source"), "GPU");
        assert_eq!(options.int("jpeg_quality"), 80);
        assert_eq!(options.text("sd_model_checkpoint"), "");
    }

    #[test]
    fn saving_keeps_foreign_keys_and_survives_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(
            &path,
            r#"{"their_extension": [1], "jpeg_quality": 90.0, "tiling": "what"}"#,
        )
        .unwrap();
        let store = OptionStore::open(path.clone()).unwrap();
        assert_eq!(store.snapshot().int("jpeg_quality"), 90);
        assert!(!store.snapshot().flag("tiling"));
        let changes = check(
            json!({"sd_vae": "None", "api_useragent": "x", "nope": 1})
                .as_object()
                .unwrap()
                .clone(),
        )
        .unwrap();
        assert_eq!(changes.len(), 1);
        store.save(&changes).unwrap();
        let file: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(
            (&file["their_extension"], &file["sd_vae"]),
            (&json!([1]), &json!("None"))
        );
        assert_eq!(
            OptionStore::open(path).unwrap().snapshot().text("sd_vae"),
            "None"
        );
    }

    #[test]
    fn the_whole_object_can_be_posted_back() {
        let options = Options::defaults();
        let changes = check(options.as_map().clone()).unwrap();
        let mut after = options.clone();
        for (key, value) in changes {
            after.set(&key, value);
        }
        assert_eq!(after, options);
    }

    #[test]
    fn a_file_that_is_not_json_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, "{").unwrap();
        let error = OptionStore::open(path.clone()).unwrap_err().to_string();
        assert!(
            error.starts_with("options file is not a JSON object: `"),
            "{error}"
        );
        assert_eq!(std::fs::read_to_string(path).unwrap(), "{");
    }
}
