//! Checkpoints that a request names besides its own: the refiner's and the hires pass's.

use axum::http::StatusCode;

use super::App;
use super::error::ApiError;
use super::hires;
use super::options::Options;
use super::resolve::select_for;
use super::types::{Generation, HiresFields};
use crate::engine;
use crate::pipeline::{GenerateRequest, OtherCheckpoint, Refiner, RefinerPasses, SwitchBy};

/// Adds the refiner of a request. Hashes a checkpoint seen for the first time, so it blocks.
///
/// # Errors
/// A1111's sentence for a name that no checkpoint has.
pub fn add_refiner(
    app: &App,
    request: &Generation,
    options: &Options,
    generate: &mut GenerateRequest,
) -> Result<(), ApiError> {
    let name = request.refiner_checkpoint.as_deref().map(str::trim);
    let Some(name) = name.filter(|name| !matches!(*name, "" | "None")) else {
        return Ok(());
    };
    // Without a place to switch A1111 does so at once.
    let switch_at = request.refiner_switch_at.unwrap_or(0.0) as f32;
    let score = |key: &str| options.float(key) as f32;
    let passes = options.text("hires_fix_refiner_pass");
    generate.refiner = Some(Refiner {
        switch_by: if options.flag("refiner_switch_by_sample_steps") {
            SwitchBy::Steps
        } else {
            SwitchBy::Noise
        },
        passes: RefinerPasses::ALL
            .into_iter()
            .find(|choice| choice.label() == passes)
            .unwrap_or(RefinerPasses::Second),
        aesthetic_scores: (
            score("sdxl_refiner_high_aesthetic_score"),
            score("sdxl_refiner_low_aesthetic_score"),
        ),
        ..Refiner::new(find(app, name, options)?, switch_at)
    });
    Ok(())
}

/// Adds the hires pass's own checkpoint, if the fields name one.
///
/// # Errors
/// A1111's sentence for a name that no checkpoint has.
pub fn add_hires(
    app: &App,
    fields: &HiresFields,
    options: &Options,
    generate: &mut GenerateRequest,
) -> Result<(), ApiError> {
    if let (Some(second), Some(name)) = (&mut generate.hires, hires::checkpoint(fields)) {
        second.checkpoint = Some(find(app, name, options)?);
    }
    Ok(())
}

fn find(app: &App, name: &str, options: &Options) -> Result<OtherCheckpoint, ApiError> {
    let checkpoint = app
        .engine
        .catalog()
        .find(name)
        .map_err(|error| match error {
            // A1111 answers 500 to this mistake of the client's.
            engine::Error::CheckpointNotFound { .. } => {
                ApiError::Http(StatusCode::NOT_FOUND, error.to_string())
            }
            other => other.into(),
        })?;
    Ok(select_for(app, checkpoint, options)?.as_other())
}
