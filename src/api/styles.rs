//! Prompt styles from `styles.csv`: `GET /sdapi/v1/prompt-styles`, and the names a request may use.
//!
//! The files are read anew each time, so an edit is seen at once. A file that is missing has no styles; a damaged one is logged.

use std::path::PathBuf;
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
    let mut styles = Vec::new();
    for path in files {
        let Ok(text) = std::fs::read(path) else {
            continue;
        };
        match read_styles(&String::from_utf8_lossy(&text)) {
            Ok(found) => styles.extend(found),
            Err(error) => tracing::warn!(path = %path.display(), %error, "styles not read"),
        }
    }
    styles
}

/// `GET /sdapi/v1/prompt-styles`.
///
/// # Errors
/// None of its own.
pub async fn prompt_styles(
    State(app): State<Arc<App>>,
) -> Result<Json<Value>, super::error::ApiError> {
    let styles = blocking(move || Ok(load(&app.config))).await?;
    let row = |style: &Style| json!({ "name": style.name, "prompt": style.prompt, "negative_prompt": style.negative_prompt });
    Ok(Json(styles.iter().map(row).collect()))
}
