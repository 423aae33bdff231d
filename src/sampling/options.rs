//! The numbers a run of a sampler depends on besides its schedule, with A1111's defaults.

/// Which variant of `UniPC`'s coefficients is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UniPcVariant {
    /// `B(h) = h`.
    #[default]
    Bh1,
    /// `B(h) = expm1(h)`.
    Bh2,
}

/// How `UniPC` spreads its steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UniPcSkip {
    /// Equal distances in time.
    #[default]
    TimeUniform,
    /// Equal distances in the square root of time.
    TimeQuadratic,
    /// Equal distances in log signal-to-noise ratio.
    LogSnr,
}

macro_rules! named {
    ($type:ty, $count:literal, $($variant:ident = $name:literal),+) => {
        impl $type {
            /// Every value.
            pub const ALL: [Self; $count] = [$(Self::$variant),+];

            /// The value as A1111's setting spells it.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// Reads A1111's spelling, in any letter case.
            #[must_use]
            pub fn find(name: &str) -> Option<Self> {
                Self::ALL.into_iter().find(|value| value.name().eq_ignore_ascii_case(name))
            }
        }
    };
}

named!(UniPcVariant, 2, Bh1 = "bh1", Bh2 = "bh2");
named!(
    UniPcSkip,
    3,
    TimeUniform = "time_uniform",
    TimeQuadratic = "time_quadratic",
    LogSnr = "logSNR"
);

/// Everything a request or a setting can say about a run of a sampler.
#[derive(Debug, Clone, PartialEq)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "each is one A1111 setting of the same name"
)]
pub struct SamplerOptions {
    /// The request's `eta`; `None` takes the setting of the sampler's family.
    pub eta: Option<f32>,
    /// Setting for samplers that add noise (`eta_ancestral`).
    pub eta_ancestral: f32,
    /// Setting for DDIM (`eta_ddim`).
    pub eta_ddim: f32,
    /// Noise added before each step by Euler, Heun and DPM2.
    pub s_churn: f32,
    /// Smallest sigma that is churned.
    pub s_tmin: f32,
    /// Largest sigma that is churned; 0 = no limit.
    pub s_tmax: f32,
    /// Factor on added noise.
    pub s_noise: f32,
    /// Below this sigma every second call goes without the negative prompt ("NGMS"); 0 = off.
    pub s_min_uncond: f32,
    /// Let `s_min_uncond` act on every call.
    pub s_min_uncond_all: bool,
    /// Share of the first calls that go without the negative prompt; 0 = off.
    pub skip_early_cond: f32,
    /// Overrides the schedule's smallest sigma; 0 = off.
    pub sigma_min: f32,
    /// Overrides the schedule's largest sigma; 0 = off.
    pub sigma_max: f32,
    /// Overrides the exponent of Karras and Polyexponential; 0 = off.
    pub rho: f32,
    /// Limits 0.1 and 10 in place of the model's.
    pub use_old_karras_scheduler_sigmas: bool,
    /// Leave the last but one sigma out whatever the sampler.
    pub always_discard_next_to_last_sigma: bool,
    /// Scale initial noise by `sqrt(1 + sigma^2)` in place of `sigma`.
    pub sgm_noise_multiplier: bool,
    /// Added to the seeds of every noise but the first ("ENSD").
    pub eta_noise_seed_delta: i64,
    /// One Brownian tree for the whole batch, seeded by its last picture (`no_dpmpp_sde_batch_determinism`).
    pub no_dpmpp_sde_batch_determinism: bool,
    /// `UniPC`'s coefficients.
    pub uni_pc_variant: UniPcVariant,
    /// `UniPC`'s steps.
    pub uni_pc_skip_type: UniPcSkip,
    /// `UniPC`'s highest order, at least 1.
    pub uni_pc_order: usize,
    /// Let `UniPC`'s order fall towards the end.
    pub uni_pc_lower_order_final: bool,
    /// First parameter of the Beta scheduler.
    pub beta_dist_alpha: f64,
    /// Second parameter of the Beta scheduler.
    pub beta_dist_beta: f64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self {
            eta: None,
            eta_ancestral: 1.0,
            eta_ddim: 0.0,
            s_churn: 0.0,
            s_tmin: 0.0,
            s_tmax: 0.0,
            s_noise: 1.0,
            s_min_uncond: 0.0,
            s_min_uncond_all: false,
            skip_early_cond: 0.0,
            sigma_min: 0.0,
            sigma_max: 0.0,
            rho: 0.0,
            use_old_karras_scheduler_sigmas: false,
            always_discard_next_to_last_sigma: false,
            sgm_noise_multiplier: false,
            eta_noise_seed_delta: 0,
            no_dpmpp_sde_batch_determinism: false,
            uni_pc_variant: UniPcVariant::Bh1,
            uni_pc_skip_type: UniPcSkip::TimeUniform,
            uni_pc_order: 3,
            uni_pc_lower_order_final: true,
            beta_dist_alpha: 0.6,
            beta_dist_beta: 0.6,
        }
    }
}
