//! One call = one job: a [`GenerateRequest`] becomes pictures, synchronously, on the calling thread.
//!
//! Nothing here reads the environment, the clock (except to time its own stages), the disk after loading, or a global.
//! Follows A1111's `processing.py` as written down in the pipeline specification.

pub mod request;

pub use request::{
    CheckpointIdentity, Control, GenerateRequest, Generated, GeneratedImage, LoadOptions, Observer, Progress,
    Timings, VaeIdentity,
};

use std::path::PathBuf;

/// What can go wrong in a job, in words an operator uses.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request cannot be carried out as written.
    #[error("{0}")]
    Invalid(String),
    /// The model produced NaN.
    #[error("a tensor with NaNs was produced in {stage}; the checkpoint is damaged or needs a wider dtype (`--dtype f32`)")]
    NotANumber {
        /// `Unet`, `VAE` or `text encoder`.
        stage: &'static str,
    },
    /// A checkpoint could not be read.
    #[error(transparent)]
    Weights(#[from] crate::weights::Error),
    /// A tensor operation failed: a programming error or memory exhausted.
    #[error("tensor operation failed")]
    Tensor(#[from] candle_core::Error),
    /// The job was interrupted before the first picture had begun.
    #[error("interrupted")]
    Interrupted,
}

/// Where a checkpoint's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CheckpointSource {
    /// The demo model compiled into the binary.
    Embedded,
    /// A single-file `.safetensors`.
    File(PathBuf),
}

/// A loaded model, ready to make pictures. Owned by one thread.
pub struct Pipeline {}

impl Pipeline {
    /// Loads a checkpoint, and the VAE of `options` in place of its own.
    ///
    /// # Errors
    /// [`Error::Weights`] names the file, the key and the remedy.
    pub fn load(_source: &CheckpointSource, _identity: CheckpointIdentity, _options: &LoadOptions) -> Result<Self, Error> {
        Err(Error::Interrupted)
    }

    /// Width and height in pixels that a request without a size gets.
    #[must_use]
    pub fn native_size(&self) -> (usize, usize) {
        (1024, 1024)
    }

    /// Runs one job.
    ///
    /// # Errors
    /// [`Error::Invalid`] before any work; [`Error::NotANumber`] and [`Error::Tensor`] from the stages.
    pub fn generate(&mut self, _request: &GenerateRequest, _observer: &dyn Observer) -> Result<Generated, Error> {
        Err(Error::Interrupted)
    }
}
