//! A run worked out before it starts: noise levels, initial latents, and what infotext will say about it.
//!
//! Invariants: sigmas descend; a partial run ([`Plan::from_image`]) walks the end of the full schedule. Follows `get_sigmas`,
//! `get_timesteps` and `sample_img2img` of A1111 1.10.

#![allow(
    clippy::float_cmp,
    reason = "an option is compared with its own default"
)]

use super::Sampler;
use super::infotext::{InfotextParams, describe_solver, python_bool, python_float};
use super::options::SamplerOptions;
use super::sampler::{Family, Flag};
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
    let table = if sampler == Sampler::Lcm {
        table.lcm()
    } else {
        table.clone()
    };
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
            brownian = positive_range(&sigmas);
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

/// The smallest positive and the largest sigma.
fn positive_range(sigmas: &[f32]) -> (f32, f32) {
    let positive = sigmas.iter().copied().filter(|&sigma| sigma > 0.0);
    (
        positive.fold(f32::INFINITY, f32::min),
        sigmas.iter().copied().fold(0.0, f32::max),
    )
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

    /// The descending noise levels; none for the samplers that count in timesteps.
    #[must_use]
    pub fn sigmas(&self) -> &[f32] {
        match &self.levels {
            Levels::Sigmas(sigmas) => sigmas,
            Levels::Timesteps(_) => &[],
        }
    }

    /// The ascending timesteps; none for the samplers that count in sigmas.
    #[must_use]
    pub fn timesteps(&self) -> &[usize] {
        match &self.levels {
            Levels::Timesteps(timesteps) => timesteps,
            Levels::Sigmas(_) => &[],
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn plan_with(
        sampler: Sampler,
        scheduler: Scheduler,
        steps: usize,
        options: &SamplerOptions,
    ) -> Plan {
        plan(sampler, scheduler, steps, options, &SigmaTable::default())
    }

    fn keys(plan: &Plan) -> Vec<String> {
        plan.infotext
            .iter()
            .map(|(key, value)| format!("{key}: {value}"))
            .collect()
    }

    #[test]
    fn denoising_strength_cuts_the_schedule_as_in_a1111() {
        // (strength, steps) -> intervals, first index.
        for (strength, steps, intervals, first) in [
            (0.75, 20, 16, 4),
            (0.5, 20, 11, 9),
            (0.3, 10, 4, 6),
            (0.05, 20, 2, 18),
            (1.0, 20, 20, 0),
            (0.0, 20, 1, 19),
        ] {
            let (length, t_enc) = image_steps(steps, strength, ExactSteps::No);
            assert_eq!(
                (t_enc + 1, length - t_enc - 1),
                (intervals, first),
                "{strength} of {steps}"
            );
            let full = plan_with(
                Sampler::Euler,
                Scheduler::Karras,
                length,
                &SamplerOptions::default(),
            );
            let part = full.clone().from_image(t_enc);
            assert_eq!(
                part.sigmas(),
                &full.sigmas()[first..],
                "{strength} of {steps}"
            );
            assert_eq!(
                (part.steps, part.brownian_range()),
                (intervals, full.brownian_range())
            );
        }
    }

    #[test]
    fn exact_steps_lengthen_the_schedule() {
        for (steps, strength, length, first) in [
            (20, 0.5, 40, 20),
            (10, 0.3, 33, 23),
            (15, 0.7, 21, 6),
            (20, 1.0, 20, 0),
        ] {
            let (got, t_enc) = image_steps(steps, strength, ExactSteps::Yes);
            assert_eq!(
                (got, t_enc, got - t_enc - 1),
                (length, steps - 1, first),
                "{steps} at {strength}"
            );
        }
    }

    #[test]
    fn schedule_type_is_the_effective_label() {
        let label = |sampler, scheduler| {
            plan_with(sampler, scheduler, 20, &SamplerOptions::default()).schedule_type
        };
        assert_eq!(label(Sampler::Dpmpp2M, Scheduler::Automatic), "Karras");
        assert_eq!(label(Sampler::Euler, Scheduler::Automatic), "Automatic");
        assert_eq!(label(Sampler::Euler, Scheduler::SgmUniform), "SGM Uniform");
        assert_eq!(label(Sampler::Ddim, Scheduler::Karras), "Karras");
    }

    #[test]
    fn samplers_that_discard_keep_their_number_of_steps() {
        let plan = plan_with(
            Sampler::Dpm2,
            Scheduler::Automatic,
            20,
            &SamplerOptions::default(),
        );
        assert_eq!(plan.sigmas().len(), 21);
        assert!(plan.infotext.is_empty() && plan.sigmas()[19] > plan.table().sigma_min() * 1.1);
    }

    #[test]
    fn infotext_names_what_differs_from_the_defaults() {
        let options = SamplerOptions {
            eta: Some(0.5),
            s_churn: 2.0,
            sigma_max: 10.0,
            rho: 5.0,
            sgm_noise_multiplier: true,
            always_discard_next_to_last_sigma: true,
            uni_pc_order: 2,
            ..SamplerOptions::default()
        };
        let karras = [
            "Discard penultimate sigma: True",
            "Schedule max sigma: 10.0",
            "Schedule rho: 5.0",
            "SGM noise multiplier: True",
        ];
        let plan = |sampler| plan_with(sampler, Scheduler::Karras, 20, &options);
        assert_eq!(
            keys(&plan(Sampler::EulerA)),
            [&karras[..], &["Eta: 0.5"]].concat()
        );
        assert_eq!(
            keys(&plan(Sampler::Euler)),
            [&karras[..], &["Sigma churn: 2.0"]].concat()
        );
        assert_eq!(
            keys(&plan(Sampler::UniPc)),
            ["Discard penultimate sigma: True", "UniPC order: 2"]
        );
        assert!((plan(Sampler::Euler).sigmas()[0] - 10.0).abs() < 1e-5);
        let defaults = SamplerOptions::default();
        for sampler in Sampler::all() {
            assert!(
                plan_with(sampler, Scheduler::Automatic, 20, &defaults)
                    .infotext
                    .is_empty(),
                "{sampler:?}"
            );
        }
    }

    #[test]
    fn initial_latents_follow_the_family() {
        let (one, options) = (Latents::new(vec![1.0], [1; 4]), SamplerOptions::default());
        let start = |sampler, options: &SamplerOptions| {
            plan_with(sampler, Scheduler::Ddim, 20, options)
                .initial_latents(&one)
                .data()[0]
        };
        // The first listed sigma, which is below the model's largest with the DDIM scheduler.
        assert!(
            (start(Sampler::Euler, &options) - SigmaTable::default().sigmas()[951]).abs() < 1e-5
        );
        assert_eq!(start(Sampler::Plms, &options), 1.0);
        let sgm = SamplerOptions {
            sgm_noise_multiplier: true,
            ..SamplerOptions::default()
        };
        let (multiplied, plain) = (start(Sampler::Euler, &sgm), start(Sampler::Euler, &options));
        assert!((multiplied.powi(2) - plain.powi(2) - 1.0).abs() < 1e-3);
    }

    #[test]
    fn a_picture_gets_the_noise_of_its_first_level() {
        let options = SamplerOptions::default();
        let (image, noise) = (
            Latents::new(vec![3.0], [1; 4]),
            Latents::new(vec![1.0], [1; 4]),
        );
        let sigmas = plan_with(Sampler::Euler, Scheduler::Karras, 20, &options).from_image(9);
        let x = sigmas.noised_image(&image, &noise, 0.5).data()[0];
        assert!((x - (3.0 + sigmas.sigmas()[0] + 0.5)).abs() < 1e-5);
        // 20 steps, strength 0.5: level of T[10] = 501, walked over T[..10].
        let times = plan_with(Sampler::Ddim, Scheduler::Automatic, 20, &options).from_image(10);
        assert_eq!(
            (times.timesteps().len(), times.timesteps().last()),
            (10, Some(&451))
        );
        let alpha = times.table().alphas_cumprod()[501];
        let x = times.noised_image(&image, &noise, 0.5).data()[0];
        assert!((x - (3.5 * alpha.sqrt() + (1.0 - alpha).sqrt())).abs() < 1e-5);
    }

    #[test]
    fn every_sampler_runs_from_every_cut_of_a_picture() {
        for sampler in Sampler::all() {
            for t_enc in 0..4 {
                let part = plan_with(sampler, Scheduler::Automatic, 4, &SamplerOptions::default())
                    .from_image(t_enc);
                assert_eq!(part.steps, t_enc + 1);
                assert!(
                    part.sigmas().len() == t_enc + 2 || part.timesteps().len() == t_enc,
                    "{sampler:?}"
                );
            }
        }
    }
}
