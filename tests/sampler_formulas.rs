//! Schedules and samplers against scalars worked out in double precision from the published formulas.
//!
//! The denoiser is `tanh(x / (1 + sigma^2))`, every noise is 0.5, eta is 1. Values come from the pipeline specification; those
//! of DEIS, `IPNDM_V` and TCD from a double-precision script written after the papers' own forms (TCD in the
//! variance-preserving form of diffusers' `TCDScheduler.step`, `IPNDM_V` by solving moment equations).

mod support {
    pub(crate) mod close;
}

use std::convert::Infallible;

use sdgen::sampling::{
    Denoiser, Latents, Levels, PredictedNoise, Sampler, SamplerOptions, ScheduleShape, Scheduler,
    SigmaTable, StepNoise, UniPcVariant, plan, sample,
};
use support::close::{Tolerance, assert_close};

/// Single precision in sigmas, coefficients and state; the worst observed use is printed by every run.
const SCALAR: Tolerance = Tolerance {
    abs: 5e-6,
    rel_of_max: 0.0,
};
/// DPM-Solver's single-precision times are differences of logarithms.
const DPM_SOLVER: Tolerance = Tolerance {
    abs: 2e-5,
    rel_of_max: 0.0,
};
/// The adaptive step follows differences at the level of single-precision rounding while this denoiser is saturated: the same
/// script gives 0.597989 in double and 0.597770 with every value rounded to single precision.
const ADAPTIVE: Tolerance = Tolerance {
    abs: 4e-4,
    rel_of_max: 0.0,
};

/// The closed-form denoiser; its cumulative alpha is linear between timesteps.
#[derive(Default)]
struct Scalar {
    table: SigmaTable,
    calls: usize,
}

impl Denoiser for Scalar {
    type Error = Infallible;

    fn denoised(&mut self, x: &Latents, sigma: f32) -> Result<Latents, Infallible> {
        self.calls += 1;
        let scale = 1.0 + f64::from(sigma).powi(2);
        Ok(x.map(|x| (f64::from(x) / scale).tanh() as f32))
    }

    fn noise(&mut self, x: &Latents, timestep: f32) -> Result<PredictedNoise, Infallible> {
        self.calls += 1;
        let alphas = self.table.alphas_cumprod();
        let (low, high) = (timestep.floor() as usize, timestep.ceil() as usize);
        let alpha = alphas[low] + timestep.fract() * (alphas[high] - alphas[low]);
        let guided = x.map(|x| (f64::from(x).tanh() * f64::from(1.0 - alpha).sqrt()) as f32);
        Ok(PredictedNoise {
            uncond: guided.clone(),
            guided,
        })
    }
}

struct Half;

impl StepNoise for Half {
    fn independent(&mut self) -> Latents {
        Latents::new(vec![0.5], [1; 4])
    }

    fn brownian(&mut self, _sigma: f32, _next: f32) -> Latents {
        self.independent()
    }
}

/// The end of a run from `sigma_max` over given sigmas, and the number of network calls.
fn over(sampler: Sampler, sigmas: Vec<f32>, options: &SamplerOptions) -> (f32, usize) {
    let table = SigmaTable::default();
    let mut plan = plan(
        sampler,
        Scheduler::Automatic,
        sigmas.len() - 1,
        options,
        &table,
    );
    let x = Latents::new(vec![table.sigma_max()], [1; 4]);
    plan.levels = Levels::Sigmas(sigmas);
    let mut denoiser = Scalar::default();
    let Ok(end) = sample(&plan, &mut denoiser, x, &mut Half, &mut |_, _| {});
    (end.data()[0], denoiser.calls)
}

fn karras(n: usize) -> Vec<f32> {
    let table = SigmaTable::default();
    Scheduler::Karras.sigmas(n, &table, &ScheduleShape::of(&table))
}

/// The end of a run over `steps` timesteps from 1.
fn over_timesteps(sampler: Sampler, steps: usize, options: &SamplerOptions) -> f32 {
    let plan = plan(
        sampler,
        Scheduler::Automatic,
        steps,
        options,
        &SigmaTable::default(),
    );
    let x = plan.initial_latents(&Latents::new(vec![1.0], [1; 4]));
    let Ok(end) = sample(&plan, &mut Scalar::default(), x, &mut Half, &mut |_, _| {});
    end.data()[0]
}

#[test]
fn sigma_samplers_equal_their_formulas() {
    let options = SamplerOptions::default();
    for (sampler, want) in [
        (Sampler::Euler, [0.52117186, 0.54482230]),
        (Sampler::EulerA, [0.43947596, 0.53745232]),
        (Sampler::Heun, [0.40127636, 0.52277099]),
        (Sampler::Dpm2, [0.53709000, 0.54347042]),
        (Sampler::Dpm2A, [-0.05983876, 0.43109833]),
        (Sampler::Lms, [0.54521219, 0.55005076]),
        (Sampler::Dpmpp2SA, [0.48951254, 0.52331191]),
        (Sampler::DpmppSde, [0.51645490, 0.54622887]),
        (Sampler::Dpmpp2M, [0.65357857, 0.58651140]),
        (Sampler::Dpmpp2MSde, [0.59857061, 0.58722134]),
        (Sampler::Dpmpp2MSdeHeun, [0.68690469, 0.60501586]),
        (Sampler::Dpmpp3MSde, [0.72454755, 0.48344983]),
        (Sampler::HeunPp2, [0.53461283, 0.55139242]),
        (Sampler::Ipndm, [0.50167117, 0.51265807]),
        (Sampler::IpndmV, [0.54521219, 0.55005076]),
        (Sampler::Deis, [0.59442241, 0.57204564]),
        (Sampler::ResMultistep, [0.69340385, 0.59354795]),
    ] {
        let got = [5, 8].map(|n| over(sampler, karras(n), &options).0);
        assert_close(
            &format!("{} over Karras 5 and 8", sampler.label()),
            &got,
            &want,
            SCALAR,
        );
    }
}

#[test]
fn dpm_fast_spends_exactly_its_evaluations() {
    let still = SamplerOptions {
        eta: Some(0.0),
        ..SamplerOptions::default()
    };
    for (n, want) in [(5, 0.55674253), (6, 0.81134585), (7, 0.64835881)] {
        let (got, calls) = over(Sampler::DpmFast, karras(n), &still);
        assert_close(
            &format!("DPM fast, {n} evaluations, eta 0"),
            &[got],
            &[want],
            DPM_SOLVER,
        );
        assert_eq!(calls, n);
    }
    let (got, _) = over(Sampler::DpmFast, karras(6), &SamplerOptions::default());
    assert_close(
        "DPM fast, 6 evaluations, eta 1",
        &[got],
        &[0.93897181],
        DPM_SOLVER,
    );
}

#[test]
fn dpm_adaptive_accepts_and_rejects_as_its_formula() {
    for (eta, want, calls) in [(0.0, 0.59798857, 21), (1.0, 0.61838568, 39)] {
        let options = SamplerOptions {
            eta: Some(eta),
            ..SamplerOptions::default()
        };
        let (got, counted) = over(Sampler::DpmAdaptive, karras(8), &options);
        assert_close(
            &format!("DPM adaptive, eta {eta}"),
            &[got],
            &[want],
            ADAPTIVE,
        );
        assert_eq!(counted, calls, "eta {eta}");
    }
}

#[test]
fn restart_goes_back_up_from_twenty_steps_on() {
    for (n, want, calls) in [
        (5, 0.40127636, 9),
        (20, 0.47591799, 39),
        (36, 0.47049852, 71),
    ] {
        let (got, counted) = over(Sampler::Restart, karras(n), &SamplerOptions::default());
        assert_close(&format!("Restart, {n} steps"), &[got], &[want], SCALAR);
        assert_eq!(counted, calls, "{n} steps");
    }
}

#[test]
fn tcd_equals_its_variance_preserving_form() {
    let table = SigmaTable::default();
    for (gamma, want) in [
        (None, 0.61510161),
        (Some(1.0), 0.39260820),
        (Some(0.0), 0.59776283),
    ] {
        let sigmas: Vec<f32> = [999, 749, 499, 249]
            .map(|k: usize| table.sigmas()[k])
            .into_iter()
            .chain([0.0])
            .collect();
        let options = SamplerOptions {
            eta: gamma,
            ..SamplerOptions::default()
        };
        let (mut plan, denoiser) = (
            plan(Sampler::Tcd, Scheduler::Automatic, 4, &options, &table),
            &mut Scalar::default(),
        );
        plan.levels = Levels::Sigmas(sigmas);
        let x = Latents::new(vec![table.sigma_max()], [1; 4]);
        let Ok(end) = sample(&plan, denoiser, x, &mut Half, &mut |_, _| {});
        assert_close(
            &format!("TCD, gamma {gamma:?}"),
            &end.data(),
            &[want],
            SCALAR,
        );
    }
}

#[test]
fn timestep_samplers_equal_their_formulas() {
    let options = SamplerOptions::default;
    let eta = |eta| SamplerOptions {
        eta: Some(eta),
        ..options()
    };
    let bh2 = SamplerOptions {
        uni_pc_variant: UniPcVariant::Bh2,
        ..options()
    };
    let second = SamplerOptions {
        uni_pc_order: 2,
        ..options()
    };
    for (name, sampler, steps, options, want) in [
        ("DDIM, eta 0", Sampler::Ddim, 5, options(), 1.58471643),
        ("DDIM, eta 1", Sampler::Ddim, 5, eta(1.0), 1.74567596),
        ("PLMS, 5 steps", Sampler::Plms, 5, options(), 1.68217471),
        ("PLMS, 8 steps", Sampler::Plms, 8, options(), 2.02297466),
        ("UniPC, 5 steps", Sampler::UniPc, 5, options(), 3.02577271),
        ("UniPC, 8 steps", Sampler::UniPc, 8, options(), 3.09856130),
        ("UniPC bh2, 8 steps", Sampler::UniPc, 8, bh2, 3.13498472),
        (
            "UniPC of order 2, 8 steps",
            Sampler::UniPc,
            8,
            second,
            3.07044475,
        ),
    ] {
        assert_close(
            name,
            &[over_timesteps(sampler, steps, &options)],
            &[want],
            SCALAR,
        );
    }
}

#[test]
fn every_sampler_ends_in_finite_latents_from_every_start() {
    let table = SigmaTable::default();
    for (sampler, scheduler) in
        Sampler::all().flat_map(|s| Scheduler::all().map(move |scheduler| (s, scheduler)))
    {
        for steps in [1, 2, 3, 4, 7] {
            let whole = plan(
                sampler,
                scheduler,
                steps,
                &SamplerOptions::default(),
                &table,
            );
            let cuts = (0..steps).map(|t_enc| whole.clone().from_image(t_enc));
            for plan in std::iter::once(whole.clone()).chain(cuts) {
                let x = plan.initial_latents(&Latents::new(vec![1.0], [1; 4]));
                let mut begun = 0;
                let on_step = &mut |step, _: &Latents| {
                    assert_eq!(step, begun);
                    begun += 1;
                };
                let Ok(end) = sample(&plan, &mut Scalar::default(), x, &mut Half, on_step);
                assert!(
                    end.data()[0].is_finite(),
                    "{sampler:?} {scheduler:?} {:?}",
                    plan.levels
                );
            }
        }
    }
}

#[test]
fn schedules_of_ten_steps_equal_the_tabulated_ones() {
    let table = SigmaTable::default();
    // Printed with five decimals.
    let tolerance = Tolerance {
        abs: 6e-6,
        rel_of_max: 0.0,
    };
    let rows: [(Scheduler, &[f32]); 5] = [
        (
            Scheduler::Uniform,
            &[
                14.61464, 7.83988, 4.60917, 2.91831, 1.95016, 1.34493, 0.93236, 0.62498, 0.36866,
                0.02917, 0.0,
            ],
        ),
        (
            Scheduler::Karras,
            &[
                14.61464, 9.10293, 5.47840, 3.16861, 1.74942, 0.91408, 0.44692, 0.20140, 0.08191,
                0.02917, 0.0,
            ],
        ),
        (
            Scheduler::SgmUniform,
            &[
                14.61464, 8.30717, 5.09241, 3.32507, 2.27973, 1.61558, 1.16286, 0.83188, 0.57119,
                0.34370, 0.0,
            ],
        ),
        (
            Scheduler::AlignYourSteps,
            &[
                14.615, 5.96340, 3.33897, 1.85505, 1.10233, 0.67496, 0.43114, 0.26062, 0.12252,
                0.029, 0.0,
            ],
        ),
        (
            Scheduler::Beta,
            &[
                14.61464, 13.92779, 12.49098, 10.59761, 8.44244, 6.20137, 4.04620, 2.15283,
                0.71602, 0.02917, 0.0,
            ],
        ),
    ];
    for (scheduler, want) in rows {
        let got = scheduler.sigmas(10, &table, &ScheduleShape::of(&table));
        assert_close(
            &format!("{} of 10 steps", scheduler.label()),
            &got,
            want,
            tolerance,
        );
    }
}
