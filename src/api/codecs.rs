//! A1111's options about the VAE and previews, put into a request: methods by name, files found or fetched.

use super::App;
use super::options::Options;
use crate::engine::approximations::TaesdHalf;
use crate::engine::models::Catalog;
use crate::engine::{self, PREVIEW_BATCHES};
use crate::pipeline::{AutoPrecision, Codec, GenerateRequest, PreviewMethod, PreviewOptions};
use crate::sampling::PreviewContent;

/// Fills `request.vae` and `request.preview`. Blocks for seconds while TAESD is downloaded.
///
/// # Errors
/// TAESD is wanted for the picture, and is neither there nor to be had.
pub fn apply(
    app: &App,
    options: &Options,
    request: &mut GenerateRequest,
) -> Result<(), engine::Error> {
    let catalog = app.engine.catalog();
    request.vae.precision = AutoPrecision {
        f32: options.flag("auto_vae_precision"),
        bf16: options.flag("auto_vae_precision_bfloat16"),
    };
    let decoder = options.text("sd_vae_decode_method");
    request.vae.decoder = codec(catalog, decoder, TaesdHalf::Decoder)?;
    let encodes = request.init_image.is_some() || request.hires.is_some();
    if encodes {
        let encoder = options.text("sd_vae_encode_method");
        request.vae.encoder = codec(catalog, encoder, TaesdHalf::Encoder)?;
    }
    if options.flag("live_previews_enable") {
        request.preview = previews(catalog, options);
    }
    Ok(())
}

/// `Full` or `TAESD`, as A1111 writes them; anything else is `Full` there, and here with a warning.
///
/// # Errors
/// TAESD is neither there nor to be had.
pub fn codec(catalog: &Catalog, name: &str, half: TaesdHalf) -> Result<Codec, engine::Error> {
    if name.eq_ignore_ascii_case("TAESD") {
        return catalog.approximations().taesd(half).map(Codec::Taesd);
    }
    if !name.is_empty() && !name.eq_ignore_ascii_case("Full") {
        tracing::warn!(method = name, "unknown VAE method, `Full` is used");
    }
    Ok(Codec::Full)
}

/// Steps between previews, from `show_progress_every_n_steps`: -1 shows finished batches only.
#[must_use]
pub fn preview_every(options: &Options) -> usize {
    match options.int("show_progress_every_n_steps") {
        _ if !options.flag("live_previews_enable") => 0,
        -1 => PREVIEW_BATCHES,
        steps => usize::try_from(steps).unwrap_or(0),
    }
}

fn previews(catalog: &Catalog, options: &Options) -> PreviewOptions {
    let files = catalog.approximations();
    let method = match options.text("show_progress_type") {
        "Full" => Some(PreviewMethod::Full),
        "TAESD" => files.taesd_for_previews().map(PreviewMethod::Taesd),
        "Approx NN" => files.approx_nn().map(PreviewMethod::ApproxNn),
        _ => None,
    };
    PreviewOptions {
        method: method.unwrap_or(PreviewMethod::Cheap),
        content: match options.text("live_preview_content") {
            "Combined" => PreviewContent::Combined,
            "Negative prompt" => PreviewContent::NegativePrompt,
            _ => PreviewContent::Prompt,
        },
        grid: options.flag("show_progress_grid"),
    }
}
