//! Schedules and solvers over a denoiser: how noise becomes a latent, without knowing any network.
//!
//! A caller writes [`plan`] -> [`Plan::initial_latents`] -> [`sample`]. A sampler is a function of (denoiser, latents, noise
//! levels) as in k-diffusion; guidance, masks and prediction types are [`CfgDenoiser`]'s. Everything is `f32` on the host:
//! latents are small, networks are not.

mod guidance;
mod incomplete_beta;
mod infotext;
mod mask;
mod network;
mod noise;
mod options;
mod plan;
mod sampler;
mod schedule;
mod scheduler;
mod skip_rules;
mod solvers;

pub use crate::rng::{Latents, lincomb};
pub use guidance::{CfgDenoiser, Guidance, PreviewContent};
pub use infotext::InfotextParams;
pub use mask::{Mask, SoftBlend};
pub use network::{Network, Parameterization, Prediction, Uncond};
pub use noise::{NoiseStreams, StepNoise};
pub use options::{SamplerOptions, UniPcSkip, UniPcVariant};
pub use plan::{ExactSteps, Levels, Plan, image_steps, plan};
pub use sampler::{Eta, Family, Flag, SamplerInfo};
pub use schedule::{SigmaTable, TableOptions, timestep_list};
pub use scheduler::{ScheduleShape, Scheduler, SchedulerInfo};
pub use solvers::{Sampler, sample};

/// What a solver asks: the clean latents (or the noise) that a network sees in noisy ones.
pub trait Denoiser {
    /// Why a run can end early: a failed network, or a cancelled job.
    type Error;

    /// The denoised latents under guidance, for the samplers that count in sigmas.
    ///
    /// # Errors
    /// Whatever the network answers; the run ends with it.
    fn denoised(&mut self, x: &Latents, sigma: f32) -> Result<Latents, Self::Error>;

    /// The predicted noise under guidance, for the samplers that count in timesteps; `x` has unit variance.
    ///
    /// # Errors
    /// Whatever the network answers; the run ends with it.
    fn noise(&mut self, x: &Latents, timestep: f32) -> Result<PredictedNoise, Self::Error>;
}

/// A noise prediction.
#[derive(Debug, Clone, PartialEq)]
pub struct PredictedNoise {
    /// Under guidance.
    pub guided: Latents,
    /// Of the negative prompt alone.
    pub uncond: Latents,
}
