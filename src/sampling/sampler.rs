//! What is known of a sampler besides its formula: names, flags, defaults. The samplers themselves are the rows of
//! `solvers/table.rs`.

use super::options::SamplerOptions;
use super::{Sampler, Scheduler};

/// What a sampler's steps are counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Noise levels; latents grow with sigma.
    Sigma,
    /// Training timesteps; latents keep unit variance.
    Timestep,
}

/// A property of a sampler that something outside its formula depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flag {
    /// The last but one sigma is left out (`discard_next_to_last_sigma`).
    Discard,
    /// Infotext names the seed delta (`uses_ensd`).
    Ensd,
    /// Two network calls per step (`second_order`).
    SecondOrder,
    /// Noise comes from a Brownian tree (`brownian_noise`).
    Brownian,
    /// The second-order variant of its solver (`solver_type`: `heun`).
    HeunType,
    /// Takes `s_churn`, `s_tmin` and `s_tmax`.
    Churn,
    /// Takes `s_noise`.
    Noise,
    /// Guidance is scaled by 1/12.5 (CFG++).
    CfgPlusPlus,
}

/// Which default `eta` a sampler takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Eta {
    /// The formula has none.
    Unused,
    /// `eta_ancestral`, written to infotext as `Eta`.
    Ancestral,
    /// `eta_ddim`, written to infotext as `Eta DDIM`.
    Ddim,
    /// The paper's gamma, 0.3 if the request has no `eta`; written to infotext as `Eta`.
    Tcd,
}

/// One row of the sampler list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SamplerInfo {
    /// A1111's label.
    pub label: &'static str,
    /// Other accepted names.
    pub aliases: &'static [&'static str],
    /// What `Automatic` means for it; `None` = Uniform.
    pub scheduler: Option<Scheduler>,
    /// What its steps are counted in.
    pub family: Family,
    /// Which `eta` it takes.
    pub eta: Eta,
    /// Its properties.
    pub flags: &'static [Flag],
}

/// Default stochasticity of trajectory consistency sampling.
pub(super) const TCD_GAMMA: f32 = 0.3;

pub(super) const KARRAS: Option<Scheduler> = Some(Scheduler::Karras);
pub(super) const EXPONENTIAL: Option<Scheduler> = Some(Scheduler::Exponential);

impl SamplerInfo {
    /// A sampler that counts in sigmas.
    pub(super) const fn sigma(
        label: &'static str,
        aliases: &'static [&'static str],
        scheduler: Option<Scheduler>,
        flags: &'static [Flag],
    ) -> Self {
        Self {
            label,
            aliases,
            scheduler,
            family: Family::Sigma,
            eta: Eta::Unused,
            flags,
        }
    }

    /// A sampler that counts in timesteps.
    pub(super) const fn timestep(
        label: &'static str,
        aliases: &'static [&'static str],
        eta: Eta,
    ) -> Self {
        Self {
            label,
            aliases,
            scheduler: None,
            family: Family::Timestep,
            eta,
            flags: &[],
        }
    }

    /// With the ancestral samplers' `eta`.
    pub(super) const fn ancestral(self) -> Self {
        Self {
            eta: Eta::Ancestral,
            ..self
        }
    }
}

impl Sampler {
    /// Every sampler, in A1111's order.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::ALL.iter().copied()
    }

    /// A1111's label.
    #[must_use]
    pub fn label(self) -> &'static str {
        self.info().label
    }

    /// Whether the sampler has a property.
    #[must_use]
    pub fn has(self, flag: Flag) -> bool {
        self.info().flags.contains(&flag)
    }

    /// Finds a sampler by label or alias, in any letter case.
    #[must_use]
    pub fn find(name: &str) -> Option<Self> {
        let is_named = |sampler: &Self| {
            let mut names = sampler.info().names();
            names.any(|known| known.eq_ignore_ascii_case(name))
        };
        Self::all().find(is_named)
    }

    /// Finds a sampler by a name that may end in a scheduler's, as in `DPM++ 2M Karras`.
    #[must_use]
    pub fn find_with_scheduler(name: &str) -> Option<(Self, Option<Scheduler>)> {
        if let Some(sampler) = Self::find(name) {
            return Some((sampler, None));
        }
        let split = |suffix: &'static str| {
            let start = name.len().checked_sub(suffix.len())?;
            let (head, tail) = (name.get(..start)?, name.get(start..)?);
            (tail.eq_ignore_ascii_case(suffix))
                .then(|| head.strip_suffix(' '))
                .flatten()
        };
        Scheduler::all()
            .flat_map(|scheduler| {
                scheduler
                    .info()
                    .names()
                    .map(move |suffix| (scheduler, suffix))
            })
            .find_map(|(scheduler, suffix)| Some((Self::find(split(suffix)?)?, Some(scheduler))))
    }

    /// The options object of A1111's sampler list, values as text.
    #[must_use]
    pub fn options(self) -> Vec<(&'static str, &'static str)> {
        let scheduler = self
            .info()
            .scheduler
            .map(|scheduler| ("scheduler", scheduler.info().name));
        let flag = |flag: &Flag| match flag {
            Flag::Discard => Some(("discard_next_to_last_sigma", "True")),
            Flag::Ensd => Some(("uses_ensd", "True")),
            Flag::SecondOrder => Some(("second_order", "True")),
            Flag::Brownian => Some(("brownian_noise", "True")),
            Flag::HeunType => Some(("solver_type", "heun")),
            Flag::Churn | Flag::Noise | Flag::CfgPlusPlus => None,
        };
        scheduler
            .into_iter()
            .chain(self.info().flags.iter().filter_map(flag))
            .collect()
    }

    /// The `eta` of a run; 0 where the formula has none.
    #[must_use]
    pub fn eta(self, options: &SamplerOptions) -> f32 {
        match self.info().eta {
            Eta::Unused => 0.0,
            Eta::Ancestral => options.eta.unwrap_or(options.eta_ancestral),
            Eta::Ddim => options.eta.unwrap_or(options.eta_ddim),
            Eta::Tcd => options.eta.unwrap_or(TCD_GAMMA),
        }
    }

    /// Whether infotext names the seed delta (`ENSD`).
    #[must_use]
    pub fn writes_ensd(self, options: &SamplerOptions) -> bool {
        options.eta_noise_seed_delta != 0 && self.has(Flag::Ensd) && self.eta(options) != 0.0
    }
}

impl SamplerInfo {
    /// Label and aliases.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        std::iter::once(self.label).chain(self.aliases.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_and_aliases_are_found_in_any_case() {
        for sampler in Sampler::all() {
            for name in sampler.info().names() {
                assert_eq!(Sampler::find(&name.to_uppercase()), Some(sampler), "{name}");
            }
        }
        assert_eq!(Sampler::find("Euler b"), None);
    }

    #[test]
    fn old_combined_names_split() {
        let split = Sampler::find_with_scheduler;
        assert_eq!(
            split("DPM++ 2M Karras"),
            Some((Sampler::Dpmpp2M, Some(Scheduler::Karras)))
        );
        assert_eq!(
            split("euler sgmuniform"),
            Some((Sampler::Euler, Some(Scheduler::SgmUniform)))
        );
        assert_eq!(split("Euler a"), Some((Sampler::EulerA, None)));
        assert_eq!(
            split("DPM++ 2M SDE Heun Exponential"),
            Some((Sampler::Dpmpp2MSdeHeun, Some(Scheduler::Exponential)))
        );
        assert_eq!(split("DDIM"), Some((Sampler::Ddim, None)));
        assert_eq!(split("Karras"), None);
        assert_eq!(split("Eulerkarras"), None);
    }

    #[test]
    fn options_are_listed_as_a1111_lists_them() {
        let options = |sampler: Sampler| {
            sampler
                .options()
                .iter()
                .map(|(k, v)| format!("{k}={v}"))
                .collect::<Vec<_>>()
        };
        assert_eq!(options(Sampler::Euler), [""; 0]);
        assert_eq!(
            options(Sampler::DpmppSde),
            [
                "scheduler=karras",
                "second_order=True",
                "brownian_noise=True"
            ]
        );
        assert_eq!(
            options(Sampler::Dpm2A),
            [
                "scheduler=karras",
                "discard_next_to_last_sigma=True",
                "uses_ensd=True",
                "second_order=True"
            ]
        );
        assert_eq!(
            options(Sampler::Dpmpp2MSdeHeun),
            [
                "scheduler=exponential",
                "brownian_noise=True",
                "solver_type=heun"
            ]
        );
    }

    #[test]
    fn the_seed_delta_is_named_only_where_it_acts() {
        let options = SamplerOptions {
            eta_noise_seed_delta: 31337,
            ..SamplerOptions::default()
        };
        assert!(Sampler::EulerA.writes_ensd(&options) && !Sampler::Euler.writes_ensd(&options));
        assert!(!Sampler::EulerA.writes_ensd(&SamplerOptions {
            eta: Some(0.0),
            ..options.clone()
        }));
        assert!(!Sampler::EulerA.writes_ensd(&SamplerOptions {
            eta_noise_seed_delta: 0,
            ..options
        }));
    }
}
