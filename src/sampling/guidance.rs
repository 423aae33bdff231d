//! Classifier-free guidance: one denoiser call from a network's conditional and unconditional predictions.
//!
//! Invariants: latents stay `f32`; the network sees the fractional timestep of a sigma; an error of the network ends the run
//! unchanged. Follows `CFGDenoiser` of A1111 1.10 (Ho and Salimans 2022 for the rule; Liu et al. 2022 for several prompts).

use super::options::{InfotextParams, python_bool, python_float};
use super::plan::Plan;
use super::sampler::{Flag, Sampler};
use super::schedule::SigmaTable;
use super::{Denoiser, PredictedNoise};
use crate::rng::{Latents, lincomb};

/// CFG++ divides the guidance scale by this.
const CFG_PLUS_PLUS: f32 = 12.5;

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

/// A part of the picture that is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Mask {
    /// 1 where the picture is painted anew, 0 where it is kept; shaped like the latents.
    pub paint: Latents,
    /// The kept latents, without noise.
    pub init: Latents,
    /// How the two meet; `None` adds them up.
    pub soft: Option<SoftBlend>,
}

/// Soft inpainting: the mask widens as noise falls, and a mixture keeps the length of its parts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SoftBlend {
    /// Exponent of sigma (`schedule bias`).
    pub power: f32,
    /// Factor on it (`preservation strength`).
    pub scale: f32,
    /// Exponent of the length average (`transition contrast boost`).
    pub contrast: f32,
}

/// How predictions are combined.
#[derive(Debug, Clone, Default)]
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

/// When the negative prompt is left out.
#[derive(Debug, Clone, Copy)]
struct SkipRules {
    early: f32,
    below_sigma: f32,
    every_call: bool,
    expected_calls: usize,
    early_used: bool,
    below_used: bool,
}

impl<'a, N: Network> CfgDenoiser<'a, N> {
    /// A denoiser for one run of `plan`. `observe` gets the call's number and the denoised latents to show.
    pub fn new(
        network: N,
        guidance: Guidance,
        plan: &Plan,
        observe: impl FnMut(usize, &Latents) + 'a,
    ) -> Self {
        let rules = SkipRules {
            early: plan.options.skip_early_cond,
            below_sigma: plan.options.s_min_uncond,
            every_call: plan.options.s_min_uncond_all,
            expected_calls: plan.expected_calls(),
            early_used: false,
            below_used: false,
        };
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
        let mut params = InfotextParams::new();
        if self.rules.early_used {
            params.push(("Skip Early CFG".to_string(), python_float(self.rules.early)));
        }
        if self.rules.below_used {
            params.push(("NGMS".to_string(), python_float(self.rules.below_sigma)));
            if self.rules.every_call {
                params.push(("NGMS all steps".to_string(), python_bool(true)));
            }
        }
        params
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
        let denoise = |output: &Latents| lincomb(&[(keep, x), (take, output)]);
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
        let masked = self
            .guidance
            .mask
            .as_ref()
            .map(|mask| mask.blend(x, self.table.sigma(timestep)));
        let x = masked.as_ref().unwrap_or(x);
        let alpha = self.table.alphas_cumprod()[timestep.max(0.0) as usize];
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

impl SkipRules {
    /// `level` is sigma, or the timestep for the samplers that count in timesteps (as A1111 compares it).
    fn skip(&mut self, call: usize, level: f32) -> bool {
        let early = self.early != 0.0 && call as f32 / self.expected_calls as f32 <= self.early;
        let below = self.below_sigma > 0.0
            && level < self.below_sigma
            && (call % 2 == 1 || self.every_call);
        self.early_used |= early;
        self.below_used |= below && !early;
        early || below
    }
}

impl Mask {
    /// `x` where the picture is painted, the kept latents elsewhere.
    fn blend(&self, x: &Latents, sigma: f32) -> Latents {
        match self.soft {
            None => self
                .paint
                .zip(&(x - &self.init), |paint, change| paint * change)
                .zip(&self.init, |a, b| a + b),
            Some(soft) => soft.blend(self, x, sigma),
        }
    }
}

impl SoftBlend {
    /// Mixes by `paint ^ (sigma ^ power * scale)` and restores the vectors' length over channels.
    fn blend(self, mask: &Mask, x: &Latents, sigma: f32) -> Latents {
        let [batch, channels, height, width] = x.shape;
        let area = height * width;
        let exponent = f64::from(sigma).powf(f64::from(self.power)) * f64::from(self.scale);
        let contrast = f64::from(self.contrast);
        let mut mixed = x.clone();
        for (image, pixel) in
            (0..batch).flat_map(|image| (0..area).map(move |pixel| (image, pixel)))
        {
            let at = |channel: usize| (image * channels + channel) * area + pixel;
            let length = |data: &[f32]| {
                (0..channels)
                    .map(|c| f64::from(data[at(c)]).powi(2))
                    .sum::<f64>()
                    .sqrt()
            };
            let share = f64::from(mask.paint.data[at(0)]).powf(exponent);
            for index in (0..channels).map(at) {
                let (kept, painted) = (f64::from(mask.init.data[index]), f64::from(x.data[index]));
                mixed.data[index] = (kept * (1.0 - share) + painted * share) as f32;
            }
            let (kept, painted) = (length(&mask.init.data), length(&x.data));
            let wanted = kept.powf(contrast) * (1.0 - share) + painted.powf(contrast) * share;
            let factor = wanted.powf(1.0 / contrast) / (length(&mixed.data) + 1e-5);
            for index in (0..channels).map(at) {
                mixed.data[index] = (f64::from(mixed.data[index]) * factor) as f32;
            }
        }
        mixed
    }
}
