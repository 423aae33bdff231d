//! Small pictures of a running job, in A1111's four ways (`show_progress_type`).
//!
//! Invariant: a preview never fails a job. What cannot be made, for want of a file or of a sound VAE, falls back to the linear
//! approximation, which needs nothing and costs a dozen multiplications per latent pixel.

use std::path::PathBuf;

use image::{Rgb, RgbImage};

use super::{Error, Pipeline, decode};
use crate::imaging::{GridShape, grid};
use crate::sampling::{Latents, PreviewContent};

/// What previews show and how they are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreviewOptions {
    /// How latents become a picture.
    pub method: PreviewMethod,
    /// Which prediction is shown.
    pub content: PreviewContent,
    /// Show all pictures of the batch, not only the first.
    pub grid: bool,
}

impl Default for PreviewOptions {
    fn default() -> Self {
        Self {
            method: PreviewMethod::Cheap,
            content: PreviewContent::Prompt,
            grid: true,
        }
    }
}

/// How latents become a preview.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum PreviewMethod {
    /// The VAE: full size, as slow as the final decode.
    Full,
    /// A1111's approximation network from this file: a quarter of the size.
    ApproxNn(PathBuf),
    /// A linear map of the latent channels: an eighth of the size.
    #[default]
    Cheap,
    /// TAESD's decoder from this file: full size.
    Taesd(PathBuf),
}

impl Pipeline {
    /// A picture of `denoised`, the batch side by side.
    pub(super) fn preview(&self, denoised: &Latents, options: &PreviewOptions) -> Option<RgbImage> {
        let shown = if options.grid {
            denoised.clone()
        } else {
            let [_, c, h, w] = denoised.shape;
            Latents::new(denoised.images().next()?, [1, c, h, w])
        };
        let made = match &options.method {
            PreviewMethod::Cheap => Ok(decode::approximate(&shown)),
            method => self.decode_each(&shown, method),
        };
        let pictures = made.unwrap_or_else(|error| {
            tracing::debug!(%error, "the preview falls back to the linear approximation");
            decode::approximate(&shown)
        });
        sheet(&pictures)
    }

    fn decode_each(&self, shown: &Latents, method: &PreviewMethod) -> Result<Vec<RgbImage>, Error> {
        let [_, c, h, w] = shown.shape;
        let singles = shown.images().map(|one| Latents::new(one, [1, c, h, w]));
        singles
            .map(|latents| match method {
                PreviewMethod::Full => {
                    let picture = self.autoencoder.decode_full(&latents, &())?;
                    picture.ok_or(Error::Interrupted)
                }
                PreviewMethod::ApproxNn(path) => self.autoencoder.approximate(&latents, path),
                PreviewMethod::Taesd(path) => self.autoencoder.decode_small(&latents, path),
                PreviewMethod::Cheap => Ok(decode::approximate(&latents).swap_remove(0)),
            })
            .collect()
    }
}

/// The linear approximation of a batch.
#[must_use]
pub fn cheap(latents: &Latents) -> Option<RgbImage> {
    sheet(&decode::approximate(latents))
}

/// Pictures of one size side by side.
pub(super) fn sheet(pictures: &[RgbImage]) -> Option<RgbImage> {
    grid(pictures, GridShape::Square, Rgb([255; 3])).ok()
}
