//! A run worked out before it starts: noise levels, initial latents, and what infotext will say about it.
//!
//! Invariants: sigmas descend; a partial run ([`Plan::from_image`]) walks the end of the full schedule. Follows `get_sigmas`,
//! `get_timesteps` and `sample_img2img` of A1111 1.10.

#![allow(
    clippy::float_cmp,
    reason = "an option is compared with its own default"
)]

use super::options::{InfotextParams, SamplerOptions, python_bool, python_float};
use super::sampler::{Eta, Family, Flag, Sampler};
use super::schedule::{SigmaTable, timestep_list};
use super::scheduler::{ScheduleShape, Scheduler};
use crate::rng::{Latents, lincomb};

/// The points a run visits.
#[derive(Debug, Clone, PartialEq)]
pub enum Levels {
    /// Descending noise levels.
    Sigmas(Vec<f32>),
    /// Ascending training timesteps; they are visited from the end.
    Timesteps(Vec<usize>),
}

/// What a run starts from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Start {
    /// Noise only.
    Noise,
    /// A picture with noise of this `sqrt` of the cumulative alpha; 1 for the sigma family, which does not scale it.
    Image { alpha: f32 },
}

/// A run of a sampler, ready to be carried out.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The sampler.
    pub sampler: Sampler,
    /// Infotext's `Schedule type`.
    pub schedule_type: &'static str,
    /// Sampler steps of this run, the number progress is counted in.
    pub steps: usize,
    /// The points it visits.
    pub levels: Levels,
    /// The options it was made with.
    pub options: SamplerOptions,
    /// Further infotext, in A1111's order.
    pub infotext: InfotextParams,
    pub(super) table: SigmaTable,
    pub(super) start: Start,
    /// Smallest positive and largest sigma of the full schedule.
    brownian: (f32, f32),
}

/// Works out a run from pure noise.
#[must_use]
pub fn plan(
    sampler: Sampler,
    scheduler: Scheduler,
    steps: usize,
    options: &SamplerOptions,
    table: &SigmaTable,
) -> Plan {
    let steps = steps.max(1);
    let mut infotext = InfotextParams::new();
    let mut say = |key: &str, value: String| infotext.push((key.to_string(), value));
    let mut count = steps;
    if sampler.has(Flag::Discard) {
        count += 1;
    } else if options.always_discard_next_to_last_sigma {
        count += 1;
        say("Discard penultimate sigma", python_bool(true));
    }
    let mut schedule_type = scheduler.label();
    let table = table.clone();
    let mut brownian = (table.sigma_min(), table.sigma_max());
    let levels = match sampler.info().family {
        Family::Timestep => Levels::Timesteps(timestep_list(count)),
        Family::Sigma => {
            let effective = match scheduler {
                Scheduler::Automatic => sampler.info().scheduler.unwrap_or(Scheduler::Automatic),
                chosen => chosen,
            };
            schedule_type = effective.label();
            let shape = shape(effective, options, &table, &mut say);
            let mut sigmas = effective.sigmas(count, &table, &shape);
            if count > steps {
                sigmas.remove(sigmas.len() - 2);
            }
            let positive = sigmas.iter().copied().filter(|&sigma| sigma > 0.0);
            brownian = (
                positive.fold(f32::INFINITY, f32::min),
                sigmas.iter().copied().fold(0.0, f32::max),
            );
            if options.sgm_noise_multiplier {
                say("SGM noise multiplier", python_bool(true));
            }
            Levels::Sigmas(sigmas)
        }
    };
    describe_solver(sampler, options, &mut say);
    let options = options.clone();
    Plan {
        sampler,
        schedule_type,
        steps,
        levels,
        options,
        infotext,
        table,
        start: Start::Noise,
        brownian,
    }
}

/// Limits and parameters of the schedule, after the overrides that infotext mentions.
fn shape(
    scheduler: Scheduler,
    options: &SamplerOptions,
    table: &SigmaTable,
    say: &mut impl FnMut(&str, String),
) -> ScheduleShape {
    let mut shape = ScheduleShape::of(table);
    let default = if options.use_old_karras_scheduler_sigmas {
        (0.1, 10.0)
    } else {
        (shape.sigma_min, shape.sigma_max)
    };
    (shape.sigma_min, shape.sigma_max) = default;
    shape.beta = (options.beta_dist_alpha, options.beta_dist_beta);
    if scheduler == Scheduler::Automatic {
        return shape;
    }
    if options.sigma_min > 0.0 && options.sigma_min != default.0 {
        shape.sigma_min = options.sigma_min;
        say("Schedule min sigma", python_float(options.sigma_min));
    }
    if options.sigma_max > 0.0 && options.sigma_max != default.1 {
        shape.sigma_max = options.sigma_max;
        say("Schedule max sigma", python_float(options.sigma_max));
    }
    let default_rho = scheduler.info().default_rho;
    if default_rho > 0.0 && options.rho > 0.0 && f64::from(options.rho) != default_rho {
        shape.rho = Some(f64::from(options.rho));
        say("Schedule rho", python_float(options.rho));
    }
    if scheduler == Scheduler::Beta {
        say(
            "Beta schedule alpha",
            format!("{:?}", options.beta_dist_alpha),
        );
        say(
            "Beta schedule beta",
            format!("{:?}", options.beta_dist_beta),
        );
    }
    shape
}

/// Infotext of the solver's own numbers, where they are not the defaults.
fn describe_solver(sampler: Sampler, options: &SamplerOptions, say: &mut impl FnMut(&str, String)) {
    let mut number = |key: &str, value: f32, default: f32| {
        if value != default {
            say(key, python_float(value));
        }
    };
    match sampler.info().eta {
        Eta::Unused => {}
        Eta::Ancestral => number("Eta", sampler.eta(options), 1.0),
        Eta::Ddim => number("Eta DDIM", sampler.eta(options), 0.0),
    }
    if sampler.has(Flag::Churn) {
        number("Sigma churn", options.s_churn, 0.0);
        number("Sigma tmin", options.s_tmin, 0.0);
        number("Sigma tmax", options.s_tmax, 0.0);
    }
    if sampler.has(Flag::Noise) {
        number("Sigma noise", options.s_noise, 1.0);
    }
}

/// How `steps` turns into a schedule's length and the number of intervals run of it, less one.
///
/// `exact` (A1111's `img2img_fix_steps`, and every hires pass) runs `steps` intervals; otherwise `steps` is the whole schedule
/// and the denoising strength cuts it.
#[must_use]
pub fn image_steps(steps: usize, strength: f32, exact: ExactSteps) -> (usize, usize) {
    let steps = steps.max(1);
    // The decimal number that was meant, as Python's double holds it: 20 steps at 0.7 are 14, not 13.
    let strength: f64 = strength.to_string().parse().unwrap_or(f64::from(strength));
    let strength = strength.clamp(0.0, 0.999);
    match exact {
        ExactSteps::Yes if strength > 0.0 => ((steps as f64 / strength) as usize, steps - 1),
        ExactSteps::Yes => (steps, 0),
        ExactSteps::No => (steps, (strength * steps as f64) as usize),
    }
}

/// Whether a run from a picture makes as many steps as were asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExactSteps {
    /// As many intervals as asked for, from a longer schedule.
    Yes,
    /// The asked-for schedule, cut by the denoising strength.
    No,
}

impl Plan {
    /// The end of this plan with `t_enc + 1` intervals (or, counted in timesteps, `t_enc` levels), starting from a picture.
    #[must_use]
    pub fn from_image(mut self, t_enc: usize) -> Self {
        self.start = match &mut self.levels {
            Levels::Sigmas(sigmas) => {
                let first = self.steps.saturating_sub(t_enc + 1).min(sigmas.len() - 2);
                sigmas.drain(..first);
                Start::Image { alpha: 1.0 }
            }
            Levels::Timesteps(timesteps) => {
                let start = t_enc.min(timesteps.len() - 1);
                let alpha = self.table.alphas_cumprod()[timesteps[start]];
                timesteps.truncate(start);
                Start::Image {
                    alpha: alpha.sqrt(),
                }
            }
        };
        self.steps = t_enc + 1;
        self
    }

    /// The latents a run from pure noise begins with.
    #[must_use]
    pub fn initial_latents(&self, noise: &Latents) -> Latents {
        match &self.levels {
            Levels::Sigmas(sigmas) if self.options.sgm_noise_multiplier => {
                noise * (1.0 + sigmas[0].powi(2)).sqrt()
            }
            Levels::Sigmas(sigmas) => noise * sigmas[0],
            Levels::Timesteps(_) => noise.clone(),
        }
    }

    /// The latents a run from the picture `image` begins with; `extra_noise` is A1111's `img2img_extra_noise` (0 = off).
    #[must_use]
    pub fn noised_image(&self, image: &Latents, noise: &Latents, extra_noise: f32) -> Latents {
        let alpha = match self.start {
            Start::Image { alpha } => alpha,
            Start::Noise => 1.0,
        };
        let amount = match &self.levels {
            Levels::Sigmas(sigmas) => sigmas[0],
            Levels::Timesteps(_) => (1.0 - alpha * alpha).sqrt(),
        };
        lincomb(&[(alpha, image), (amount + extra_noise * alpha, noise)])
    }

    /// Network calls the run is expected to make, as prompt editing and skipping rules count them.
    #[must_use]
    pub fn expected_calls(&self) -> usize {
        if self.sampler.has(Flag::SecondOrder) {
            2 * self.steps
        } else {
            self.steps
        }
    }

    /// The interval of the Brownian trees: the full schedule's smallest positive and largest sigma.
    #[must_use]
    pub fn brownian_range(&self) -> (f32, f32) {
        self.brownian
    }

    /// The training schedule this run is built on.
    #[must_use]
    pub fn table(&self) -> &SigmaTable {
        &self.table
    }
}
