//! Prompt styles from `styles.csv`: `GET /sdapi/v1/prompt-styles`, and the names a request may use.
//!
//! The files are read anew each time, so an edit is seen at once. A file that is missing has no styles; a damaged one is logged.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::{App, blocking};
use crate::config::Config;
use crate::prompt::styles::{Style, read_styles};

/// The styles of all configured files, in order.
#[must_use]
pub fn load(config: &Config) -> Vec<Style> {
    let default = vec![config.data_dir.join("styles.csv")];
    let files: &[PathBuf] = if config.paths.styles_files.is_empty() {
        &default
    } else {
        &config.paths.styles_files
    };
    files.iter().flat_map(|path| read_file(path)).collect()
}

fn read_file(path: &Path) -> Vec<Style> {
    let Ok(text) = std::fs::read(path) else {
        return Vec::new();
    };
    read_styles(&String::from_utf8_lossy(&text))
        .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "styles not read"))
        .unwrap_or_default()
}

/// `GET /sdapi/v1/prompt-styles`.
///
/// # Errors
/// None of its own.
pub async fn prompt_styles(
    State(app): State<Arc<App>>,
) -> Result<Json<Value>, super::error::ApiError> {
    let rows = blocking(move || Ok(rows(&app.config))).await?;
    Ok(Json(Value::Array(rows)))
}

/// The list's rows; each of several files is announced by a row without prompts, as in A1111.
fn rows(config: &Config) -> Vec<Value> {
    let row = |style: &Style| json!({ "name": style.name, "prompt": style.prompt, "negative_prompt": style.negative_prompt });
    let files = &config.paths.styles_files;
    if files.len() < 2 {
        return load(config).iter().map(row).collect();
    }
    let of_file = |path: &PathBuf| {
        let divider = divider(&path.file_stem().unwrap_or_default().to_string_lossy());
        let divider = json!({ "name": divider, "prompt": null, "negative_prompt": null });
        let styles = read_file(path);
        let rows: Vec<Value> = std::iter::once(divider)
            .chain(styles.iter().map(row))
            .collect();
        rows
    };
    files.iter().flat_map(of_file).collect()
}

/// A file's name in capitals, dashes around it up to 40 characters, as Python's `str.center` puts them.
fn divider(stem: &str) -> String {
    let name = format!(" {} ", stem.to_uppercase());
    let missing = 40_usize.saturating_sub(name.chars().count());
    let left = missing / 2;
    format!("{}{name}{}", "-".repeat(left), "-".repeat(missing - left))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dividers_are_centred() {
        // python3 -c "print(' STYLES '.center(40, '-'))"
        assert_eq!(
            divider("styles"),
            "---------------- STYLES ----------------"
        );
        assert_eq!(divider("a"), "------------------ A -------------------");
    }

    #[test]
    fn a_damaged_file_has_no_styles_and_the_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let mut config = Config::default();
        config.paths.styles_files = vec![
            write("broken.csv", "name,prompt\nx,\"y"),
            write("good.csv", "name,prompt,negative_prompt\nInk,ink,\n"),
        ];
        assert_eq!(load(&config).len(), 1);
        let names: Vec<Value> = rows(&config)
            .iter()
            .map(|row| row["name"].clone())
            .collect();
        assert_eq!(names.len(), 3);
        assert_eq!(names[2], "Ink");
    }
}
