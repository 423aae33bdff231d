//! `sdgen png-info`: the generation parameters inside a picture file.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use super::{Stop, print};
use crate::imaging;

/// What to look at.
#[derive(Debug, Args)]
pub struct PngInfoArgs {
    /// A PNG, JPEG or WebP file
    pub file: PathBuf,
}

/// Prints the infotext of a file.
///
/// # Errors
/// Exit 1 if the file cannot be read, is no picture, or carries no parameters.
pub fn png_info(args: &PngInfoArgs) -> Result<(), Stop> {
    let shown = args.file.display();
    let bytes = std::fs::read(&args.file)
        .with_context(|| format!("cannot read `{shown}`"))
        .map_err(Stop::Failed)?;
    let metadata = imaging::read_metadata(&bytes)
        .with_context(|| format!("`{shown}`"))
        .map_err(Stop::Failed)?;
    match metadata.infotext.filter(|text| !text.is_empty()) {
        Some(text) => print(&format!("{text}\n")),
        None => Err(Stop::failed(anyhow::anyhow!(
            "no generation parameters in `{shown}`"
        ))),
    }
}
