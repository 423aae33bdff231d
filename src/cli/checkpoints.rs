//! Checkpoints that a job needs besides its own: the refiner's and the hires pass's.

use clap::Args;
use serde_json::{Value, json};

use super::Stop;
use crate::engine::checkpoint::{Selection, VaeChoice};
use crate::engine::models::Catalog;
use crate::pipeline::{GenerateRequest, OtherCheckpoint, Refiner};

/// A checkpoint that takes over in mid-run.
#[derive(Debug, Args)]
#[command(next_help_heading = "Refiner")]
pub struct RefinerArgs {
    /// Checkpoint that takes over, by path or name
    #[arg(long, value_name = "PATH|NAME")]
    pub refiner: Option<String>,
    /// Share of the run after which it does, 0 to 1
    #[arg(
        long,
        value_name = "F",
        default_value_t = 0.8,
        requires = "refiner",
        allow_negative_numbers = true
    )]
    pub refiner_switch_at: f64,
}

impl RefinerArgs {
    /// Adds the API's fields.
    pub fn describe(&self, body: &mut Value) {
        if let Some(name) = &self.refiner {
            body["refiner_checkpoint"] = json!(name);
            body["refiner_switch_at"] = json!(self.refiner_switch_at);
        }
    }
}

/// Finds the checkpoints named besides the job's own; a VAE file given for that one serves them as well.
///
/// # Errors
/// Exit 2 for a name that no checkpoint has.
pub fn add_others(
    refiner: &RefinerArgs,
    hires: Option<&str>,
    (catalog, own): (&Catalog, &Selection),
    request: &mut GenerateRequest,
) -> Result<(), Stop> {
    let find = |name: &str| -> Result<OtherCheckpoint, Stop> {
        let checkpoint = catalog.find_or_open(name).map_err(Stop::usage)?;
        let found = catalog.select(checkpoint, &VaeChoice::Automatic);
        let mut other = found.map_err(Stop::failed)?.as_other();
        other.vae = own.vae.clone().or(other.vae);
        Ok(other)
    };
    if let Some(name) = &refiner.refiner {
        let switch_at = refiner.refiner_switch_at as f32;
        request.refiner = Some(Refiner::new(find(name)?, switch_at));
    }
    if let (Some(name), Some(second)) = (hires, &mut request.hires) {
        second.checkpoint = Some(find(name)?);
    }
    Ok(())
}
