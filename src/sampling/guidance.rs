//! Classifier-free guidance: one denoiser call from a network's conditional and unconditional predictions.
//!
//! Invariants: latents stay `f32`; the network sees the fractional timestep of a sigma; an error of the network ends the run
//! unchanged. Follows `CFGDenoiser` of A1111 1.10 (Ho and Salimans 2022 for the rule; Liu et al. 2022 for several prompts).

use super::Sampler;
use super::infotext::InfotextParams;
use super::mask::Mask;
use super::network::{Network, Parameterization, Uncond};
use super::plan::Plan;
use super::sampler::Flag;
use super::schedule::SigmaTable;
use super::skip_rules::SkipRules;
use super::solvers::consistency_scalings;
use super::{Denoiser, PredictedNoise};
use crate::rng::{Latents, lincomb};

/// CFG++ divides the guidance scale by this.
const CFG_PLUS_PLUS: f32 = 12.5;

/// Which prediction is shown while the run goes on (`live_preview_content`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PreviewContent {
    /// The prompt's.
    #[default]
    Prompt,
    /// The guided one.
    Combined,
    /// The negative prompt's.
    NegativePrompt,
}

/// How predictions are combined.
#[derive(Debug, Clone)]
pub struct Guidance {
    /// Guidance scale; 1 = the prompt alone.
    pub scale: f32,
    /// What the network's output means.
    pub parameterization: Parameterization,
    /// What is kept.
    pub mask: Option<Mask>,
    /// What the observer sees.
    pub preview: PreviewContent,
}

impl Default for Guidance {
    fn default() -> Self {
        Self {
            scale: 7.0,
            parameterization: Parameterization::Epsilon,
            mask: None,
            preview: PreviewContent::Prompt,
        }
    }
}

/// Called after every network call with its number and a denoised preview.
type Observe<'a> = Box<dyn FnMut(usize, &Latents) + 'a>;

/// A network under guidance, as a solver sees it.
pub struct CfgDenoiser<'a, N: Network> {
    network: N,
    guidance: Guidance,
    rules: SkipRules,
    sampler: Sampler,
    table: SigmaTable,
    calls: usize,
    last_denoised: Option<Latents>,
    observe: Observe<'a>,
}

impl<'a, N: Network> CfgDenoiser<'a, N> {
    /// A denoiser for one run of `plan`. `observe` gets the call's number and the denoised latents to show.
    pub fn new(
        network: N,
        guidance: Guidance,
        plan: &Plan,
        observe: impl FnMut(usize, &Latents) + 'a,
    ) -> Self {
        let rules = SkipRules::new(plan);
        let (sampler, table, observe) = (plan.sampler, plan.table.clone(), Box::new(observe));
        Self {
            network,
            guidance,
            rules,
            sampler,
            table,
            calls: 0,
            last_denoised: None,
            observe,
        }
    }

    /// Network calls so far.
    #[must_use]
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// The prompt's own denoised latents of the last call: what an interrupted run ends with.
    #[must_use]
    pub fn last_denoised(&self) -> Option<&Latents> {
        self.last_denoised.as_ref()
    }

    /// What infotext says about calls that went without the negative prompt.
    #[must_use]
    pub fn infotext(&self) -> InfotextParams {
        self.rules.infotext()
    }

    /// Asks the network; the answer's unconditional part is the first piece where it was left out.
    fn ask(&mut self, x: &Latents, timestep: f32, level: f32) -> Result<Answer, N::Error> {
        let cfg_plus_plus = self.sampler.has(Flag::CfgPlusPlus);
        let mut scale = self.guidance.scale;
        if cfg_plus_plus {
            scale /= CFG_PLUS_PLUS;
        }
        let skipped = self.rules.skip(self.calls, level);
        #[allow(
            clippy::float_cmp,
            reason = "only exactly 1 makes the negative prompt cancel out"
        )]
        let unneeded = scale == 1.0 && !cfg_plus_plus && !self.network.is_composed();
        let uncond = if skipped || unneeded {
            Uncond::Skip
        } else {
            Uncond::Needed
        };
        let prediction = self.network.predict(x, timestep, self.calls, uncond)?;
        let scale = if skipped { 1.0 } else { scale };
        let uncond = prediction
            .uncond
            .unwrap_or_else(|| prediction.cond[0].1.clone());
        Ok(Answer {
            cond: prediction.cond,
            uncond,
            scale,
        })
    }

    /// Ends a call: keeps and shows denoised latents.
    fn finish(
        &mut self,
        cond: Latents,
        uncond: impl FnOnce() -> Latents,
        combined: impl FnOnce() -> Latents,
    ) {
        match self.guidance.preview {
            PreviewContent::Prompt => (self.observe)(self.calls, &cond),
            PreviewContent::Combined => (self.observe)(self.calls, &combined()),
            PreviewContent::NegativePrompt => (self.observe)(self.calls, &uncond()),
        }
        self.last_denoised = Some(cond);
        self.calls += 1;
    }
}

impl<N: Network> Denoiser for CfgDenoiser<'_, N> {
    type Error = N::Error;

    fn denoised(&mut self, x: &Latents, sigma: f32) -> Result<Latents, N::Error> {
        let timestep = self.table.timestep(sigma);
        let c_in = 1.0 / (sigma * sigma + 1.0).sqrt();
        let answer = self.ask(&(x * c_in), timestep, sigma)?;
        let (keep, take) = match self.guidance.parameterization {
            Parameterization::Epsilon => (1.0, -sigma),
            Parameterization::V => (c_in * c_in, -sigma * c_in),
        };
        let (c_skip, c_out) = match self.sampler {
            Sampler::Lcm => consistency_scalings(timestep),
            _ => (0.0, 1.0),
        };
        let denoise =
            |output: &Latents| lincomb(&[(c_skip + c_out * keep, x), (c_out * take, output)]);
        let answer = answer.map(denoise);
        let mut guided = answer.combine();
        if let Some(mask) = &self.guidance.mask {
            guided = mask.blend(&guided, sigma);
        }
        let Answer {
            mut cond, uncond, ..
        } = answer;
        self.finish(cond.swap_remove(0).1, || uncond, || guided.clone());
        Ok(guided)
    }

    fn noise(&mut self, x: &Latents, timestep: f32) -> Result<PredictedNoise, N::Error> {
        // A1111 hands a soft mask the timestep where it expects a sigma.
        let mask = self.guidance.mask.as_ref();
        let masked = mask.map(|mask| mask.blend(x, timestep));
        let x = masked.as_ref().unwrap_or(x);
        let alphas = self.table.alphas_cumprod();
        let alpha = alphas[(timestep.max(0.0) as usize).min(alphas.len() - 1)];
        let (root, noise_root) = (alpha.sqrt(), (1.0 - alpha).sqrt());
        let mut answer = self.ask(x, timestep, timestep)?;
        if self.guidance.parameterization == Parameterization::V {
            answer = answer.map(|v| lincomb(&[(root, v), (noise_root, x)]));
        }
        let guided = answer.combine();
        let clean = |noise: &Latents| lincomb(&[(1.0 / root, x), (-noise_root / root, noise)]);
        self.finish(
            clean(&answer.cond[0].1),
            || clean(&answer.uncond),
            || clean(&guided),
        );
        Ok(PredictedNoise {
            guided,
            uncond: answer.uncond,
        })
    }
}

/// A network's answer with the scale it is to be combined by.
struct Answer {
    cond: Vec<(f32, Latents)>,
    uncond: Latents,
    scale: f32,
}

impl Answer {
    fn map(self, f: impl Fn(&Latents) -> Latents) -> Self {
        let cond = self
            .cond
            .iter()
            .map(|(weight, output)| (*weight, f(output)))
            .collect();
        Self {
            cond,
            uncond: f(&self.uncond),
            scale: self.scale,
        }
    }

    /// `uncond + sum of weight * scale * (cond - uncond)`.
    fn combine(&self) -> Latents {
        let mut guided = self.uncond.clone();
        for (weight, cond) in &self.cond {
            guided.add_scaled(weight * self.scale, &(cond - &self.uncond));
        }
        guided
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "small whole numbers are exact")]
mod tests {
    use super::*;
    use crate::sampling::{Prediction, SamplerOptions, Scheduler, plan};

    /// Answers constants and remembers what it was asked.
    struct Script {
        cond: Vec<(f32, f32)>,
        uncond: f32,
        composed: bool,
        asked: Vec<(f32, usize, Uncond)>,
    }

    impl Network for Script {
        type Error = &'static str;

        fn predict(
            &mut self,
            x: &Latents,
            timestep: f32,
            call: usize,
            uncond: Uncond,
        ) -> Result<Prediction, Self::Error> {
            if timestep > 998.5 {
                return Err("cancelled");
            }
            self.asked.push((timestep, call, uncond));
            let cond = self
                .cond
                .iter()
                .map(|&(weight, value)| (weight, x.map(|_| value)))
                .collect();
            let uncond = (uncond == Uncond::Needed).then(|| x.map(|_| self.uncond));
            Ok(Prediction { cond, uncond })
        }

        fn is_composed(&self) -> bool {
            self.composed
        }
    }

    fn script(cond: &[(f32, f32)], uncond: f32) -> Script {
        Script {
            cond: cond.to_vec(),
            uncond,
            composed: true,
            asked: Vec::new(),
        }
    }

    fn run_plan(sampler: Sampler, options: &SamplerOptions) -> Plan {
        plan(
            sampler,
            Scheduler::Automatic,
            10,
            options,
            &SigmaTable::default(),
        )
    }

    fn one(value: f32) -> Latents {
        Latents::new(vec![value], [1; 4])
    }

    fn guidance(scale: f32) -> Guidance {
        Guidance {
            scale,
            ..Guidance::default()
        }
    }

    /// The answer of one call at sigma 1 to latents 8.
    fn denoised(network: &mut Script, guidance: Guidance, options: &SamplerOptions) -> f32 {
        let plan = run_plan(Sampler::Euler, options);
        let mut denoiser = CfgDenoiser::new(network, guidance, &plan, |_, _| {});
        denoiser
            .denoised(&one(8.0), 1.0)
            .map_or(f32::NAN, |x| x.data()[0])
    }

    #[test]
    fn pieces_are_weighed_against_the_negative_prompt() {
        // eps = 1 + (2 - 1) * 3 + (5 - 1) * 0.5 * 3 = 10, denoised = 8 - 10
        let options = SamplerOptions::default();
        assert_eq!(
            denoised(
                &mut script(&[(1.0, 2.0), (0.5, 5.0)], 1.0),
                guidance(3.0),
                &options
            ),
            -2.0
        );
    }

    #[test]
    fn scale_one_asks_for_the_negative_prompt_only_if_it_can_matter() {
        let (mut network, options) = (script(&[(1.0, 2.0)], 1.0), SamplerOptions::default());
        assert_eq!(denoised(&mut network, guidance(1.0), &options), 6.0);
        network.composed = false;
        assert_eq!(denoised(&mut network, guidance(1.0), &options), 6.0);
        let uncond: Vec<Uncond> = network.asked.iter().map(|asked| asked.2).collect();
        assert_eq!(uncond, [Uncond::Needed, Uncond::Skip]);
    }

    #[test]
    fn noise_and_velocity_describe_the_same_picture() {
        // Clean 0.5 and noise -2 at sigma 3: x = 0.5 - 6; alpha = 1 / sqrt(10), v = alpha * -2 - 3 * alpha * 0.5.
        let (sigma, options) = (3.0f32, SamplerOptions::default());
        let velocity = (-2.0 - 1.5) / 10f32.sqrt();
        for (parameterization, output) in [
            (Parameterization::Epsilon, -2.0),
            (Parameterization::V, velocity),
        ] {
            let plan = run_plan(Sampler::Euler, &options);
            let guidance = Guidance {
                scale: 5.0,
                parameterization,
                ..Guidance::default()
            };
            let mut denoiser =
                CfgDenoiser::new(script(&[(1.0, output)], output), guidance, &plan, |_, _| {});
            let got = denoiser.denoised(&one(-5.5), sigma).map(|x| x.data()[0]);
            assert!(
                got.is_ok_and(|got| (got - 0.5).abs() < 1e-5),
                "{parameterization:?}: {got:?}"
            );
        }
    }

    #[test]
    fn low_sigmas_skip_the_negative_prompt_at_odd_calls() {
        let options = SamplerOptions {
            s_min_uncond: 2.0,
            ..SamplerOptions::default()
        };
        let plan = run_plan(Sampler::Euler, &options);
        let mut network = script(&[(1.0, 2.0)], 1.0);
        let mut denoiser = CfgDenoiser::new(&mut network, guidance(3.0), &plan, |_, _| {});
        assert!(denoiser.infotext().is_empty());
        let sigmas = [1.0, 1.0, 1.0, 3.0];
        let got: Vec<f32> = sigmas
            .iter()
            .filter_map(|&sigma| denoiser.denoised(&one(8.0), sigma).ok())
            .map(|x| x.data()[0])
            .collect();
        assert_eq!(got, [4.0, 6.0, 4.0, -4.0]);
        assert_eq!(
            denoiser.infotext(),
            [("NGMS".to_string(), "2.0".to_string())]
        );
        assert_eq!(denoiser.calls(), 4);
    }

    #[test]
    fn early_calls_can_skip_the_negative_prompt() {
        let options = SamplerOptions {
            skip_early_cond: 0.2,
            ..SamplerOptions::default()
        };
        let plan = run_plan(Sampler::Euler, &options);
        let mut network = script(&[(1.0, 2.0)], 1.0);
        let mut denoiser = CfgDenoiser::new(&mut network, guidance(3.0), &plan, |_, _| {});
        for _ in 0..5 {
            assert!(denoiser.denoised(&one(8.0), 1.0).is_ok());
        }
        assert_eq!(
            denoiser.infotext(),
            [("Skip Early CFG".to_string(), "0.2".to_string())]
        );
        drop(denoiser);
        // Calls 0, 1 and 2 of 10 are at or below a fifth.
        let skipped = network
            .asked
            .iter()
            .filter(|asked| asked.2 == Uncond::Skip)
            .count();
        assert_eq!(skipped, 3);
    }

    #[test]
    fn cfg_plus_plus_divides_the_scale_and_hands_out_the_negative_noise() {
        let plan = run_plan(Sampler::DdimCfgPp, &SamplerOptions::default());
        let mut denoiser =
            CfgDenoiser::new(script(&[(1.0, 2.0)], 1.0), guidance(25.0), &plan, |_, _| {});
        let noise = denoiser
            .noise(&one(8.0), 501.0)
            .map(|noise| (noise.guided.data()[0], noise.uncond.data()[0]));
        assert_eq!(noise, Ok((3.0, 1.0)));
    }

    #[test]
    fn the_network_sees_fractional_timesteps_and_its_error_ends_the_call() {
        let plan = run_plan(Sampler::Euler, &SamplerOptions::default());
        let mut network = script(&[(1.0, 2.0)], 1.0);
        let mut shown = Vec::new();
        let mut denoiser = CfgDenoiser::new(&mut network, guidance(3.0), &plan, |call, x| {
            shown.push((call, x.data()[0]));
        });
        assert!(denoiser.denoised(&one(8.0), 1.6155).is_ok());
        assert_eq!(denoiser.denoised(&one(8.0), 14.6146), Err("cancelled"));
        // The prompt's own prediction, 8 - 2 sigma, is what an interrupted run ends with.
        assert_eq!(
            denoiser.last_denoised().map(|x| x.data()[0]),
            Some(8.0 - 2.0 * 1.6155)
        );
        drop(denoiser);
        assert_eq!(shown, [(0, 8.0 - 2.0 * 1.6155)]);
        assert!(
            (network.asked[0].0 - 499.485).abs() < 1e-2,
            "{:?}",
            network.asked
        );
    }

    #[test]
    fn masks_blend_denoised_latents_but_the_latents_themselves_in_the_timestep_family() {
        let mask = Some(Mask {
            paint: one(0.0),
            init: one(7.0),
            soft: None,
        });
        let (mut network, options) = (script(&[(1.0, 2.0)], 1.0), SamplerOptions::default());
        let guidance = Guidance {
            scale: 1.0,
            mask,
            ..Guidance::default()
        };
        assert_eq!(denoised(&mut network, guidance.clone(), &options), 7.0);
        let plan = run_plan(Sampler::Ddim, &options);
        let mut seen = Vec::new();
        let mut denoiser =
            CfgDenoiser::new(&mut network, guidance, &plan, |_, x| seen.push(x.data()[0]));
        assert!(denoiser.noise(&one(8.0), 1.0).is_ok());
        drop(denoiser);
        let alpha = SigmaTable::default().alphas_cumprod()[1];
        let want = (7.0 - 2.0 * (1.0 - alpha).sqrt()) / alpha.sqrt();
        assert!((seen[0] - want).abs() < 1e-5, "{seen:?} {want}");
    }

    #[test]
    fn lcm_denoises_by_its_consistency_function() {
        // At timestep 19 of the model: scaled 190; c_skip = 0.25 / 36100.25, c_out = 190 / sqrt(36100.25).
        let plan = run_plan(Sampler::Lcm, &SamplerOptions::default());
        let sigma = plan.table().sigma_min();
        let mut denoiser =
            CfgDenoiser::new(script(&[(1.0, 2.0)], 2.0), guidance(1.0), &plan, |_, _| {});
        let want = 190.0 / 36100.25f32.sqrt() * (8.0 - 2.0 * sigma) + 0.25 / 36100.25 * 8.0;
        let got = denoiser.denoised(&one(8.0), sigma).map(|x| x.data()[0]);
        assert!(
            got.is_ok_and(|got| (got - want).abs() < 1e-5),
            "{got:?} {want}"
        );
    }
}
