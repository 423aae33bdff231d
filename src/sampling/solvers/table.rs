//! The samplers: one row each, with name, aliases, default scheduler, flags, and the call of its function. A1111's order first,
//! additions after it.

use super::ddim::Renoise;
use super::dpmpp_sde::Correction;
use super::{
    Run, consistency, ddim, dpm_solver, dpm2, dpmpp, dpmpp_sde, euler, heun, multistep, restart,
    unipc,
};
use super::{evaluations, limits, unipc_start};
use crate::rng::Latents;
use crate::sampling::sampler::Flag::{
    Brownian, CfgPlusPlus, Churn, Discard, Ensd, HeunType, Noise, SecondOrder,
};
use crate::sampling::sampler::{EXPONENTIAL, Eta, KARRAS, SamplerInfo as Row};
use crate::sampling::{Denoiser, Plan};

/// Makes the enum, the rows and the call of each from `NAME = ROW => CALL;`.
macro_rules! samplers {
    (|$run:ident, $x:ident, $plan:ident| $($name:ident = $row:expr => $call:expr;)*) => {
        /// A sampler, by A1111's label.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(
            missing_docs,
            reason = "the variants are the labels; the solvers' own documentation says what they do"
        )]
        pub enum Sampler {
            $($name,)*
        }

        const ROWS: &[Row] = &[$($row),*];

        impl Sampler {
            pub(in crate::sampling) const ALL: &[Self] = &[$(Self::$name),*];

            /// The sampler's row.
            #[must_use]
            pub fn info(self) -> &'static Row {
                &ROWS[self as usize]
            }
        }

        /// Runs the function of the plan's sampler.
        pub(super) fn solve<D: Denoiser>(
            $run: &mut Run<'_, D>,
            $x: Latents,
            $plan: &Plan,
        ) -> Result<Latents, D::Error> {
            match $plan.sampler {
                $(Sampler::$name => $call,)*
            }
        }
    };
}

samplers! {
    |run, x, plan|
    Dpmpp2M = Row::sigma("DPM++ 2M", &["k_dpmpp_2m"], KARRAS, &[])
        => dpmpp::dpmpp_2m(run, x, plan.sigmas());
    DpmppSde = Row::sigma("DPM++ SDE", &["k_dpmpp_sde"], KARRAS, &[SecondOrder, Brownian, Noise]).ancestral()
        => dpmpp_sde::dpmpp_sde(run, x, plan.sigmas());
    Dpmpp2MSde = Row::sigma("DPM++ 2M SDE", &["k_dpmpp_2m_sde"], EXPONENTIAL, &[Brownian, Noise]).ancestral()
        => dpmpp_sde::dpmpp_2m_sde(run, x, plan.sigmas(), Correction::Midpoint);
    Dpmpp2MSdeHeun = Row::sigma("DPM++ 2M SDE Heun", &["k_dpmpp_2m_sde_heun"], EXPONENTIAL, &[Brownian, HeunType, Noise]).ancestral()
        => dpmpp_sde::dpmpp_2m_sde(run, x, plan.sigmas(), Correction::Heun);
    Dpmpp2SA = Row::sigma("DPM++ 2S a", &["k_dpmpp_2s_a"], KARRAS, &[Ensd, SecondOrder, Noise]).ancestral()
        => dpmpp::dpmpp_2s_ancestral(run, x, plan.sigmas());
    Dpmpp3MSde = Row::sigma("DPM++ 3M SDE", &["k_dpmpp_3m_sde"], EXPONENTIAL, &[Discard, Brownian, Noise]).ancestral()
        => dpmpp_sde::dpmpp_3m_sde(run, x, plan.sigmas());
    EulerA = Row::sigma("Euler a", &["k_euler_a", "k_euler_ancestral"], None, &[Ensd]).ancestral()
        => euler::euler_ancestral(run, x, plan.sigmas());
    Euler = Row::sigma("Euler", &["k_euler"], None, &[Churn, Noise])
        => euler::euler(run, x, plan.sigmas());
    Lms = Row::sigma("LMS", &["k_lms"], None, &[])
        => multistep::lms(run, x, plan.sigmas());
    Heun = Row::sigma("Heun", &["k_heun"], None, &[SecondOrder, Churn, Noise])
        => heun::heun(run, x, plan.sigmas());
    Dpm2 = Row::sigma("DPM2", &["k_dpm_2"], KARRAS, &[Discard, SecondOrder, Churn, Noise])
        => dpm2::dpm_2(run, x, plan.sigmas());
    Dpm2A = Row::sigma("DPM2 a", &["k_dpm_2_a"], KARRAS, &[Discard, Ensd, SecondOrder, Noise]).ancestral()
        => dpm2::dpm_2_ancestral(run, x, plan.sigmas());
    DpmFast = Row::sigma("DPM fast", &["k_dpm_fast"], None, &[Ensd, Noise]).ancestral()
        => dpm_solver::dpm_fast(run, x, limits(plan), evaluations(plan));
    DpmAdaptive = Row::sigma("DPM adaptive", &["k_dpm_ad"], None, &[Ensd]).ancestral()
        => dpm_solver::dpm_adaptive(run, x, limits(plan));
    Restart = Row::sigma("Restart", &["restart"], KARRAS, &[SecondOrder])
        => restart::restart(run, x, plan.sigmas());
    Ddim = Row::timestep("DDIM", &["ddim"], Eta::Ddim)
        => ddim::ddim(run, x, plan.timesteps(), plan.table(), Renoise::Guided);
    DdimCfgPp = Row { flags: &[CfgPlusPlus], ..Row::timestep("DDIM CFG++", &["ddim_cfgpp"], Eta::Ddim) }
        => ddim::ddim(run, x, plan.timesteps(), plan.table(), Renoise::Uncond);
    Plms = Row::timestep("PLMS", &["plms"], Eta::Unused)
        => ddim::plms(run, x, plan.timesteps(), plan.table());
    UniPc = Row::timestep("UniPC", &["unipc"], Eta::Unused)
        => unipc::unipc(run, x, plan.timesteps().len(), unipc_start(plan), plan.table());
    Lcm = Row::sigma("LCM", &["k_lcm"], None, &[])
        => consistency::lcm(run, x, plan.sigmas());
    HeunPp2 = Row::sigma("HeunPP2", &["heunpp2"], None, &[])
        => heun::heunpp2(run, x, plan.sigmas());
    Ipndm = Row::sigma("IPNDM", &["ipndm"], None, &[])
        => multistep::ipndm(run, x, plan.sigmas());
    IpndmV = Row::sigma("IPNDM_V", &["ipndm_v"], None, &[])
        => multistep::lms(run, x, plan.sigmas());
    Deis = Row::sigma("DEIS", &["deis"], None, &[])
        => multistep::deis(run, x, plan.sigmas());
    Tcd = Row { eta: Eta::Tcd, ..Row::sigma("TCD", &["tcd"], None, &[]) }
        => consistency::tcd(run, x, plan.sigmas(), plan.table());
    ResMultistep = Row::sigma("Res Multistep", &["res_multistep"], None, &[])
        => dpmpp::res_multistep(run, x, plan.sigmas());
}
