//! What can go wrong between a request and its pictures, in words an operator uses.

use std::path::PathBuf;

use super::checkpoint;
use crate::{pipeline, weights};

/// What can go wrong between a request and its pictures.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process is ending.
    #[error("the server is shutting down; send the request again after its restart")]
    ShuttingDown,
    /// Every place of the queue is taken.
    #[error("the queue is full: {limit} jobs wait; try again later or raise `server.queue_limit`")]
    QueueFull {
        /// Places of the queue.
        limit: usize,
    },
    /// No checkpoint has this name.
    #[error("checkpoint not found: `{name}`; {}", checkpoint::known(known))]
    CheckpointNotFound {
        /// As asked for.
        name: String,
        /// Titles there are.
        known: Vec<String>,
    },
    /// No VAE has this name.
    #[error("VAE not found: `{name}`; {}", checkpoint::known(known))]
    VaeNotFound {
        /// As asked for.
        name: String,
        /// File names there are.
        known: Vec<String>,
    },
    /// A file could not be read or written.
    #[error("cannot read `{}`: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A small model that is fetched when first used is neither there nor to be had.
    #[error(
        "`{file}` is not in `{}` and cannot be downloaded from `{repo}`: {reason}; put the file there, or use the method `Full`",
        dir.display()
    )]
    NotDownloaded {
        /// The file.
        file: &'static str,
        /// Where it belongs.
        dir: PathBuf,
        /// Where it comes from.
        repo: &'static str,
        /// Why it did not.
        reason: String,
    },
    /// The device cannot be used.
    #[error("device not available: `{device}`; {reason}")]
    Device {
        /// As asked for.
        device: String,
        /// Why, and what to do.
        reason: String,
    },
    /// The job or load failed below.
    #[error(transparent)]
    Pipeline(#[from] pipeline::Error),
    /// The file is no checkpoint that can be loaded.
    #[error(transparent)]
    Weights(#[from] weights::Error),
    /// A bug: the job panicked. The model was dropped and will be loaded again.
    #[error("the job crashed: {0}")]
    Panicked(String),
}

impl Error {
    /// Whether the device may be to blame rather than what was asked of it. Too little memory is not: the next job may fit.
    pub(super) fn may_be_the_device(&self) -> bool {
        matches!(
            self,
            Self::Panicked(_) | Self::Pipeline(pipeline::Error::Tensor(_))
        )
    }
}

/// An error's sentence followed by those of its causes.
#[must_use]
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        // Some libraries repeat their cause in their own text.
        if !text.ends_with(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text
}
