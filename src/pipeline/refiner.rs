//! The refiner: another checkpoint that takes over while a picture is denoised, and the checkpoints a job needs besides its own.
//!
//! A refiner (Podell et al. 2023, section 2.5) was trained for low noise alone, so it takes over at a noise level, or at a share
//! of the steps. Follows `apply_refiner` of A1111 (pipeline specification, 4.5). Any SDXL checkpoint can be one.

use super::request::GenerateRequest;
use super::{
    CheckpointIdentity, CheckpointSource, Error, LoadOptions, Pipeline, VaeIdentity,
    hires::HiresPass,
};
use crate::sampling::{InfotextParams, Plan, SigmaTable};
use crate::weights::detect::Role;

/// What a refiner is told of prompt and negative prompt unless a job says otherwise.
pub(super) const AESTHETIC_SCORES: (f32, f32) = (6.0, 2.5);

/// A checkpoint besides the pipeline's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherCheckpoint {
    /// Where the bytes are.
    pub source: CheckpointSource,
    /// Its names.
    pub identity: CheckpointIdentity,
    /// A VAE in place of its own.
    pub vae: Option<VaeIdentity>,
}

impl OtherCheckpoint {
    /// `foo [31e35c80fc]`, without bracket while the hash is unknown.
    #[must_use]
    pub fn short_title(&self) -> String {
        let CheckpointIdentity { name, shorthash } = &self.identity;
        if shorthash.is_empty() {
            name.clone()
        } else {
            format!("{name} [{shorthash}]")
        }
    }
}

/// A checkpoint that takes over in mid-run.
#[derive(Debug, Clone, PartialEq)]
pub struct Refiner {
    /// Which.
    pub checkpoint: OtherCheckpoint,
    /// Share of the run, 0 to 1, after which it does.
    pub switch_at: f32,
    /// What the share is of.
    pub switch_by: SwitchBy,
    /// The passes of hires fix in which it does.
    pub passes: RefinerPasses,
    /// What a refiner is told of the quality of prompt and negative prompt, 1 to 10.
    pub aesthetic_scores: (f32, f32),
}

impl Refiner {
    /// A1111's defaults.
    #[must_use]
    pub fn new(checkpoint: OtherCheckpoint, switch_at: f32) -> Self {
        Self {
            checkpoint,
            switch_at,
            switch_by: SwitchBy::Noise,
            passes: RefinerPasses::Second,
            aesthetic_scores: AESTHETIC_SCORES,
        }
    }
}

/// What the share of the run is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SwitchBy {
    /// The training timesteps that a noise level stands for.
    Noise,
    /// Calls of the denoiser (`refiner_switch_by_sample_steps`).
    Steps,
}

/// The passes of hires fix in which the refiner takes over (`hires_fix_refiner_pass`); without hires fix there is one pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefinerPasses {
    /// The first.
    First,
    /// The second.
    Second,
    /// Both.
    Both,
}

impl RefinerPasses {
    /// Every choice.
    pub const ALL: [Self; 3] = [Self::First, Self::Second, Self::Both];

    /// A1111's name.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::First => "first pass",
            Self::Second => "second pass",
            Self::Both => "both passes",
        }
    }

    /// Whether the refiner takes over in `pass` of a job with hires fix.
    pub(super) fn contain(self, pass: HiresPass) -> bool {
        match self {
            Self::Both => true,
            Self::First => pass == HiresPass::First,
            Self::Second => pass == HiresPass::Second,
        }
    }
}

impl Refiner {
    /// When it takes over in a run of `plan`.
    pub(super) fn switch(&self, plan: &Plan) -> Switch {
        Switch {
            at: self.switch_at,
            by: self.switch_by,
            table: plan.sigmas().first().map(|_| plan.table().clone()),
            calls: plan.expected_calls(),
        }
    }

    /// What the infotext says once it has taken over, in a job with hires fix or without.
    pub(super) fn infotext(&self, has_hires: bool) -> InfotextParams {
        let by_steps = self.switch_by == SwitchBy::Steps;
        let not_second = has_hires && self.passes != RefinerPasses::Second;
        let lines = [
            by_steps.then(|| ("Refiner switch by sampling steps", "True".to_string())),
            not_second.then(|| ("Hires refiner", self.passes.label().to_string())),
            Some(("Refiner", self.checkpoint.short_title())),
            Some(("Refiner switch at", format!("{:?}", self.switch_at))),
        ];
        let lines = lines.into_iter().flatten();
        lines.map(|(key, value)| (key.to_string(), value)).collect()
    }
}

/// When a run goes on with the refiner.
#[derive(Debug, Clone)]
pub(super) struct Switch {
    at: f32,
    by: SwitchBy,
    /// For samplers that count in sigmas; the others count in training timesteps anyway.
    table: Option<SigmaTable>,
    calls: usize,
}

impl Switch {
    /// Whether denoiser call `call`, at fractional training timestep `timestep`, is the refiner's.
    pub(super) fn is_due(&self, timestep: f32, call: usize) -> bool {
        let completed = match (self.by, &self.table) {
            (SwitchBy::Steps, _) => call as f32 / self.calls as f32,
            (SwitchBy::Noise, Some(table)) => {
                (999.0 - nearest(table, table.sigma(timestep)) as f32) / 1000.0
            }
            (SwitchBy::Noise, None) => (999.0 - timestep.trunc()) / 1000.0,
        };
        completed >= self.at
    }
}

/// Position of the listed sigma nearest to `sigma`.
fn nearest(table: &SigmaTable, sigma: f32) -> usize {
    let sigmas = table.sigmas();
    let after = sigmas.partition_point(|&listed| listed < sigma);
    match after {
        0 => 0,
        n if n == sigmas.len() => n - 1,
        n if sigmas[n] - sigma < sigma - sigmas[n - 1] => n,
        n => n - 1,
    }
}

/// Which of the checkpoints in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Model {
    /// The pipeline's own.
    Own,
    /// One of the others.
    Other(usize),
}

impl GenerateRequest {
    /// The checkpoints it needs besides the pipeline's own.
    fn others(&self) -> impl Iterator<Item = (&OtherCheckpoint, Role)> {
        let refiner = self.refiner.iter();
        let hires = self.hires.iter();
        let hires = hires.filter_map(|hires| Some((hires.checkpoint.as_ref()?, Role::Main)));
        hires.chain(refiner.map(|refiner| (&refiner.checkpoint, Role::Refiner)))
    }
}

impl Pipeline {
    /// Loads the checkpoints that `request` needs besides this one, and lets go of those of earlier jobs.
    pub(super) fn load_others(&mut self, request: &GenerateRequest) -> Result<(), Error> {
        self.others
            .retain(|(other, _)| request.others().any(|(wanted, _)| wanted == other));
        for (wanted, role) in request.others() {
            if self.find(wanted).is_some() {
                continue;
            }
            let options = LoadOptions {
                vae: wanted.vae.clone(),
                ..self.load_options.clone()
            };
            let identity = wanted.identity.clone();
            let other = Self::load_as(role, &wanted.source, identity, &options)?;
            self.others.push((wanted.clone(), other));
        }
        Ok(())
    }

    /// The model of a checkpoint that [`Self::load_others`] has seen.
    pub(super) fn find(&self, wanted: &OtherCheckpoint) -> Option<Model> {
        if wanted.source == self.source && wanted.identity == self.identity {
            return Some(Model::Own);
        }
        let mut others = self.others.iter();
        others
            .position(|(other, _)| other == wanted)
            .map(Model::Other)
    }

    pub(super) fn model(&self, model: Model) -> &Self {
        match model {
            Model::Own => self,
            Model::Other(i) => &self.others[i].1,
        }
    }

    pub(super) fn model_mut(&mut self, model: Model) -> &mut Self {
        match model {
            Model::Own => self,
            Model::Other(i) => &mut self.others[i].1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::{Sampler, SamplerOptions, Scheduler, plan};

    fn refiner(switch_by: SwitchBy, switch_at: f32) -> Refiner {
        let checkpoint = OtherCheckpoint {
            source: CheckpointSource::Embedded,
            identity: CheckpointIdentity {
                name: "r".into(),
                shorthash: "0123456789".into(),
            },
            vae: None,
        };
        Refiner {
            switch_by,
            ..Refiner::new(checkpoint, switch_at)
        }
    }

    fn due(sampler: Sampler, refiner: &Refiner, levels: &[(f32, usize)]) -> Vec<bool> {
        let (options, table) = (SamplerOptions::default(), SigmaTable::default());
        let plan = plan(sampler, Scheduler::Automatic, 10, &options, &table);
        let switch = refiner.switch(&plan);
        let levels = levels.iter();
        levels.map(|&(t, call)| switch.is_due(t, call)).collect()
    }

    #[test]
    fn a_share_of_the_noise_is_counted_in_training_timesteps() {
        let half = refiner(SwitchBy::Noise, 0.5);
        // 499 is the first at which (999 - t) / 1000 reaches a half; 499.4 is nearest to it, and whole for timestep samplers.
        let levels = [(999.0, 0), (499.6, 1), (499.4, 2), (10.0, 0)];
        assert_eq!(
            due(Sampler::Euler, &half, &levels),
            [false, false, true, true]
        );
        assert_eq!(
            due(Sampler::Ddim, &half, &levels),
            [false, true, true, true]
        );
    }

    #[test]
    fn a_share_of_the_steps_is_counted_in_calls() {
        let half = refiner(SwitchBy::Steps, 0.5);
        let levels = [(10.0, 4), (999.0, 5), (999.0, 10)];
        assert_eq!(due(Sampler::Euler, &half, &levels), [false, true, true]);
        // Heun calls twice a step.
        assert_eq!(due(Sampler::Heun, &half, &levels), [false, false, true]);
    }

    #[test]
    fn infotext_names_the_pass_only_if_it_is_not_the_second() {
        let keys = |refiner: &Refiner, has_hires| -> Vec<String> {
            let params = refiner.infotext(has_hires);
            params.into_iter().map(|(key, _)| key).collect()
        };
        let second = refiner(SwitchBy::Noise, 0.8);
        assert_eq!(keys(&second, true), ["Refiner", "Refiner switch at"]);
        let both = Refiner {
            passes: RefinerPasses::Both,
            ..refiner(SwitchBy::Steps, 0.8)
        };
        let all = [
            "Refiner switch by sampling steps",
            "Hires refiner",
            "Refiner",
            "Refiner switch at",
        ];
        assert_eq!(keys(&both, true), all);
        assert_eq!(keys(&both, false).len(), 3);
    }
}
