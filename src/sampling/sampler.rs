//! The list of samplers: names, flags, defaults. One row per sampler, A1111's order first, additions after it.

use super::Scheduler;
use super::options::SamplerOptions;

/// A sampler, by A1111's label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(
    missing_docs,
    reason = "the variants are the labels; the solvers' own documentation says what they do"
)]
pub enum Sampler {
    Dpmpp2M,
    DpmppSde,
    EulerA,
    Euler,
    Heun,
}

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
}

/// One row of the sampler list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SamplerInfo {
    /// The sampler.
    pub sampler: Sampler,
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

const fn row(
    sampler: Sampler,
    label: &'static str,
    aliases: &'static [&'static str],
    scheduler: Option<Scheduler>,
    eta: Eta,
    flags: &'static [Flag],
) -> SamplerInfo {
    SamplerInfo {
        sampler,
        label,
        aliases,
        scheduler,
        family: Family::Sigma,
        eta,
        flags,
    }
}

const KARRAS: Option<Scheduler> = Some(Scheduler::Karras);
const CHURN: &[Flag] = &[Flag::Churn, Flag::Noise];

/// In the order of the enum.
const TABLE: [SamplerInfo; 5] = [
    row(
        Sampler::Dpmpp2M,
        "DPM++ 2M",
        &["k_dpmpp_2m"],
        KARRAS,
        Eta::Unused,
        &[],
    ),
    row(
        Sampler::DpmppSde,
        "DPM++ SDE",
        &["k_dpmpp_sde"],
        KARRAS,
        Eta::Ancestral,
        &[Flag::SecondOrder, Flag::Brownian, Flag::Noise],
    ),
    row(
        Sampler::EulerA,
        "Euler a",
        &["k_euler_a", "k_euler_ancestral"],
        None,
        Eta::Ancestral,
        &[Flag::Ensd],
    ),
    row(
        Sampler::Euler,
        "Euler",
        &["k_euler"],
        None,
        Eta::Unused,
        CHURN,
    ),
    row(
        Sampler::Heun,
        "Heun",
        &["k_heun"],
        None,
        Eta::Unused,
        &[Flag::SecondOrder, Flag::Churn, Flag::Noise],
    ),
];

impl Sampler {
    /// Every sampler, in A1111's order.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|info| info.sampler)
    }

    /// The sampler's row.
    #[must_use]
    pub fn info(self) -> &'static SamplerInfo {
        &TABLE[self as usize]
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
        let matches =
            |info: &&SamplerInfo| info.names().any(|known| known.eq_ignore_ascii_case(name));
        TABLE.iter().find(matches).map(|info| info.sampler)
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
        for info in &TABLE {
            assert_eq!(info.sampler.info(), info);
            for name in info.names() {
                assert_eq!(
                    Sampler::find(&name.to_uppercase()),
                    Some(info.sampler),
                    "{name}"
                );
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
        assert_eq!(split("Karras"), None);
        assert_eq!(split("Eulerkarras"), None);
    }
}
