//! The network under guidance, as the sampling layer knows it: a function of latents, timestep and prompt.

use crate::rng::Latents;

/// Whether a call needs the negative prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Uncond {
    /// It does.
    Needed,
    /// Only the conditional pieces are wanted.
    Skip,
}

/// What the network says about one noisy batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// The prompt's pieces (joined by `AND`) with their weights; at least one.
    pub cond: Vec<(f32, Latents)>,
    /// The negative prompt; `None` if it was not wanted.
    pub uncond: Option<Latents>,
}

/// The network under guidance.
pub trait Network {
    /// Why a call can fail, including a cancelled job.
    type Error;

    /// The raw output (noise or velocity) for `x`, which is already scaled to unit variance.
    ///
    /// `timestep` is fractional; `call` counts from 0 within a run.
    ///
    /// # Errors
    /// Ends the run; passed on unchanged.
    fn predict(
        &mut self,
        x: &Latents,
        timestep: f32,
        call: usize,
        uncond: Uncond,
    ) -> Result<Prediction, Self::Error>;

    /// Whether the prompt can have several pieces or a weight other than 1. If not, guidance at scale 1 is the
    /// conditional prediction itself, and the negative prompt is not asked for.
    fn is_composed(&self) -> bool {
        true
    }
}

impl<N: Network> Network for &mut N {
    type Error = N::Error;

    fn predict(
        &mut self,
        x: &Latents,
        timestep: f32,
        call: usize,
        uncond: Uncond,
    ) -> Result<Prediction, N::Error> {
        (**self).predict(x, timestep, call, uncond)
    }

    fn is_composed(&self) -> bool {
        (**self).is_composed()
    }
}

/// What the network's output means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Parameterization {
    /// The noise.
    #[default]
    Epsilon,
    /// The velocity (Salimans and Ho 2022).
    V,
}
