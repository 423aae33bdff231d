//! The passes of a job, worked out before the first of them runs: steps, prompts, LoRAs, sizes and models of each.

use super::conditioning::{Prompts, Sizes};
use super::hires::{Hires, HiresPass};
use super::networks::{NetworkFile, Networks, Remarks};
use super::refiner::{Model, OtherCheckpoint, Switch};
use super::texts::Texts;
use super::{Error, GenerateRequest, Pipeline};
use crate::prompt::ScheduleSteps;
use crate::sampling::{ExactSteps, InfotextParams, Plan, Sampler, Scheduler, image_steps, plan};

/// One run of the sampler: what it is told and how far it goes.
pub(super) struct Pass {
    pub(super) model: Model,
    pub(super) plan: Plan,
    pub(super) prompts: Prompts,
    pub(super) sizes: Sizes,
    pub(super) cfg_scale: f32,
    /// Who takes over, and when.
    pub(super) refiner: Option<Takeover>,
    networks: Vec<NetworkFile>,
}

/// The second part of a pass.
pub(super) struct Takeover {
    pub(super) model: Model,
    pub(super) prompts: Prompts,
    pub(super) switch: Switch,
    /// What a refiner is told of prompt and negative prompt.
    pub(super) aesthetic_scores: (f32, f32),
    /// What is said once it has happened.
    pub(super) infotext: InfotextParams,
}

/// What both passes' prompts are encoded for.
struct Wanted<'a> {
    request: &'a GenerateRequest,
    texts: (&'a str, &'a str),
    networks: Networks,
    schedule: ScheduleSteps,
}

impl Pipeline {
    /// The passes of a job: one, and a second for hires fix unless it only enlarges.
    pub(super) fn passes(
        &mut self,
        request: &GenerateRequest,
        texts: &Texts,
        [networks, hires_networks]: [Networks; 2],
        remarks: &mut Remarks,
    ) -> Result<Vec<Pass>, Error> {
        let (first, calls) = self.first_plan(request);
        let mut schedule = ScheduleSteps {
            base: calls,
            hires: None,
        };
        let wanted = Wanted {
            request,
            texts: (&texts.plain, &texts.negative),
            networks,
            schedule,
        };
        let sizes = Sizes::of_picture(request.width, request.height);
        let pass = HiresPass::First;
        let first = self.pass(pass, Model::Own, (first, sizes), wanted, remarks)?;
        let mut passes = vec![first];
        if let Some(hires) = &request.hires
            && hires.strength > 0.0
        {
            let model = self.own_or(hires.checkpoint.as_ref())?;
            let (second, calls) = self.second_plan(request, hires, model);
            schedule.hires = Some(calls);
            let wanted = Wanted {
                request,
                texts: (&texts.hires_plain, &texts.hires_negative),
                networks: hires_networks,
                schedule,
            };
            let target = hires.size.target(request.width, request.height);
            let sizes = Sizes::of_picture(target.width, target.height);
            let pass = HiresPass::Second;
            let mut second = self.pass(pass, model, (second, sizes), wanted, remarks)?;
            second.cfg_scale = hires.cfg_scale.unwrap_or(request.cfg_scale);
            passes.push(second);
        }
        Ok(passes)
    }

    /// Merges a pass's LoRAs and encodes its prompts, for the model it begins with and the one that takes over.
    fn pass(
        &mut self,
        pass: HiresPass,
        model: Model,
        (plan, sizes): (Plan, Sizes),
        wanted: Wanted<'_>,
        remarks: &mut Remarks,
    ) -> Result<Pass, Error> {
        let request = wanted.request;
        let Wanted {
            texts,
            networks,
            schedule,
            ..
        } = wanted;
        let prompts = self
            .model_mut(model)
            .encode_with(&networks, texts, schedule, request, remarks)?;
        let refiner = match &request.refiner {
            Some(refiner) if request.hires.is_none() || refiner.passes.contain(pass) => {
                let other = self.own_or(Some(&refiner.checkpoint))?;
                if other == model {
                    None
                } else {
                    self.check_takeover(model, other)?;
                    // The LoRAs of a prompt are made for the first model: what the second makes of them is no news.
                    let prompts = self.model_mut(other).encode_with(
                        &networks,
                        texts,
                        schedule,
                        request,
                        &mut Remarks::default(),
                    )?;
                    Some(Takeover {
                        model: other,
                        prompts,
                        switch: refiner.switch(&plan),
                        aesthetic_scores: refiner.aesthetic_scores,
                        infotext: refiner.infotext(request.hires.is_some()),
                    })
                }
            }
            _ => None,
        };
        Ok(Pass {
            model,
            plan,
            prompts,
            sizes,
            cfg_scale: request.cfg_scale,
            refiner,
            networks: networks.files,
        })
    }

    /// Merges the LoRAs of a pass into its models.
    pub(super) fn merge_for(&mut self, pass: &Pass) -> Result<(), Error> {
        self.model_mut(pass.model).merge(&pass.networks)?;
        match &pass.refiner {
            Some(refiner) => self.model_mut(refiner.model).merge(&pass.networks),
            None => Ok(()),
        }
    }

    fn own_or(&self, other: Option<&OtherCheckpoint>) -> Result<Model, Error> {
        match other {
            None => Ok(Model::Own),
            Some(other) => self.find(other).ok_or_else(|| {
                Error::Invalid(format!(
                    "checkpoint `{}` is not loaded",
                    other.short_title()
                ))
            }),
        }
    }

    /// A run keeps its sigmas and its reading of the network's output when another model takes over.
    fn check_takeover(&self, from: Model, to: Model) -> Result<(), Error> {
        let (from, to) = (self.model(from), self.model(to));
        if from.parameterization == to.parameterization {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "`{}` cannot take over from `{}`: one predicts noise, the other velocity",
            to.identity.name, from.identity.name
        )))
    }

    fn plan_for(
        &self,
        model: Model,
        request: &GenerateRequest,
        (sampler, scheduler, steps): (Sampler, Scheduler, usize),
    ) -> Plan {
        let table = &self.model(model).table;
        plan(sampler, scheduler, steps, &request.sampler_options, table)
    }

    /// The first pass's plan, and the denoiser calls that its prompts' editing counts in.
    fn first_plan(&self, request: &GenerateRequest) -> (Plan, usize) {
        let plan_of = |steps| {
            let how = (request.sampler, request.scheduler, steps);
            self.plan_for(Model::Own, request, how)
        };
        let full = plan_of(request.steps);
        let calls = full.expected_calls();
        let plan = match &request.init_image {
            Some(init) => {
                let (steps, t_enc) = image_steps(request.steps, init.strength, init.exact_steps);
                plan_of(steps).from_image(t_enc)
            }
            None => full,
        };
        (plan, calls)
    }

    /// The hires pass's plan and calls.
    fn second_plan(&self, request: &GenerateRequest, hires: &Hires, model: Model) -> (Plan, usize) {
        let steps = if hires.steps == 0 {
            request.steps
        } else {
            hires.steps
        };
        let plan_of = |steps| {
            let sampler = hires.sampler.unwrap_or(request.sampler);
            let scheduler = hires.scheduler.unwrap_or(request.scheduler);
            self.plan_for(model, request, (sampler, scheduler, steps))
        };
        let (total, t_enc) = image_steps(steps, hires.strength, ExactSteps::Yes);
        let calls = plan_of(steps).expected_calls();
        (plan_of(total).from_image(t_enc), calls)
    }
}
