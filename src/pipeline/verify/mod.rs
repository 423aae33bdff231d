//! `sdgen bench --verify`: a device and type against `f32` on the CPU, operation by operation and model by model.
//!
//! Invariants: both sides start from the same values, which every type here holds exactly, so that what differs is what was computed;
//! everything is seeded; a check that cannot run is a row that failed, not the end of the others.

mod golden;
mod models;
mod operations;

use std::path::Path;

use candle_core::{DType, Tensor};

use super::CheckpointSource;
use crate::nn::Placement;

/// How much is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The smaller shapes of every operation, for tools that slow a program down a hundredfold.
    Quick,
    /// Every operation.
    Operations,
    /// Every operation, the demo model, and golden data where they are given.
    All,
}

/// What is checked.
#[derive(Debug, Clone)]
pub struct VerifyOptions<'a> {
    /// How much.
    pub scope: Scope,
    /// The checkpoint that pictures are made with; small, since the CPU makes them too.
    pub checkpoint: CheckpointSource,
    /// `tests/golden` of a checkout.
    pub golden: Option<&'a Path>,
}

/// One check.
#[derive(Debug, Clone)]
pub struct Row {
    /// What was compared.
    pub check: String,
    /// The worst difference, in the unit of `tolerance`; infinite where the check could not run.
    pub error: f64,
    /// The largest difference allowed.
    pub tolerance: f64,
    /// Where the worst difference was, or what went wrong.
    pub note: String,
}

impl Row {
    /// Whether the check passed; not a number never does.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.error <= self.tolerance
    }

    /// A check that ended in an error.
    fn failed(check: impl Into<String>, tolerance: f64, note: &impl ToString) -> Self {
        Self {
            check: check.into(),
            error: f64::INFINITY,
            tolerance,
            note: note.to_string(),
        }
    }
}

/// Runs the checks and hands each row to `report` as it is known.
pub fn verify(place: &Placement, options: &VerifyOptions<'_>, report: &mut dyn FnMut(Row)) {
    operations::verify(place, options.scope, report);
    if options.scope != Scope::All {
        return;
    }
    models::verify(place, &options.checkpoint, report);
    if let Some(folder) = options.golden {
        golden::verify(place, folder, report);
    }
}

/// The allowance of a type: what one rounding of its mantissa and the ones inside an operation may come to, relative to a value plus
/// the root mean square of all.
fn tolerance(dtype: DType, in_f32: f64) -> f64 {
    match dtype {
        DType::BF16 => 1e-2,
        DType::F16 => 2e-3,
        _ => in_f32,
    }
}

/// Worst difference relative to a value plus the root mean square of all; infinite where shapes or finiteness differ.
fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    if got.len() != want.len() || want.is_empty() {
        return f64::INFINITY;
    }
    let square = |x: &f32| f64::from(*x).powi(2);
    let rms = (want.iter().map(square).sum::<f64>() / want.len() as f64).sqrt();
    let floor = rms.max(f64::MIN_POSITIVE);
    got.iter()
        .zip(want)
        .map(|(got, want)| {
            let off = f64::from(got - want).abs() / (f64::from(*want).abs() + floor);
            if off.is_finite() { off } else { f64::INFINITY }
        })
        .fold(0.0, f64::max)
}

/// Values on the host, row major.
fn host(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_relative_to_a_value_and_the_mean_of_all() {
        // rms of [3, 4, 0, 0] = 2.5: off by 0.55 at 3 is 0.1, off by 0.5 at 0 is 0.2.
        let want = [3.0, 4.0, 0.0, 0.0];
        assert!((relative_error(&[3.55, 4.0, 0.0, 0.0], &want) - 0.1).abs() < 1e-6);
        assert!((relative_error(&[3.0, 4.0, 0.5, 0.0], &want) - 0.2).abs() < 1e-6);
        assert!(relative_error(&want, &want) <= 0.0);
    }

    #[test]
    fn what_cannot_be_compared_fails() {
        let row = |error| Row {
            error,
            ..Row::failed("x", 1.0, &"")
        };
        assert!(row(1.0).is_ok() && !row(1.1).is_ok() && !row(f64::NAN).is_ok());
        for (got, want) in [
            (&[1.0][..], &[1.0, 2.0][..]),
            (&[], &[]),
            (&[f32::NAN], &[1.0]),
        ] {
            assert!(relative_error(got, want).is_infinite());
        }
    }
}
