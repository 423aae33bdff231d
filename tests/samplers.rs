//! Schedules and samplers against numbers of k-diffusion and diffusers (golden files `schedule.*`, `sigmas.*`, `samplers.*`)
//! and against the closed-form vectors of the specification.

mod support {
    pub(crate) mod close;
    pub(crate) mod golden;
    pub(crate) mod tensors;
}

use std::convert::Infallible;

use candle_core::{Device, Tensor};
use sdgen::models::Unet;
use sdgen::nn::Placement;
use sdgen::sampling::{
    CfgDenoiser, Denoiser, Flag, Guidance, Latents, Levels, Network, Plan, PredictedNoise,
    Prediction, Sampler, SamplerOptions, ScheduleShape, Scheduler, SigmaTable, StepNoise, Uncond,
    UniPcVariant, plan, sample, timestep_list,
};
use support::close::{Tolerance, assert_close, assert_close_relative};
use support::tensors::{Tensors, json};

/// The golden README's tolerance for trajectories of the closed-form denoiser.
const TOY: Tolerance = Tolerance {
    abs: 0.0,
    rel_of_max: 5e-5,
};

fn numbers(value: &serde_json::Value) -> Vec<f32> {
    value
        .as_array()
        .expect("a list")
        .iter()
        .map(|v| v.as_f64().expect("a number") as f32)
        .collect()
}

#[test]
fn base_table_equals_the_reference() {
    let (golden, table) = (Tensors::open("schedule.safetensors"), SigmaTable::default());
    assert_close_relative(
        "alphas_cumprod",
        table.alphas_cumprod(),
        &golden.values("alphas_cumprod"),
        1e-6,
    );
    assert_close_relative("sigmas", table.sigmas(), &golden.values("sigmas"), 1e-6);
    let got: Vec<f32> = golden
        .values("sigma_to_t.sigma")
        .iter()
        .map(|&sigma| table.timestep(sigma))
        .collect();
    let want = golden.values("sigma_to_t.t");
    assert_close(
        "timestep of sigma",
        &got,
        &want,
        Tolerance {
            abs: 1e-3,
            rel_of_max: 0.0,
        },
    );
    let got: Vec<f32> = golden
        .values("t_to_sigma.t")
        .iter()
        .map(|&t| table.sigma(t))
        .collect();
    assert_close_relative(
        "sigma of timestep",
        &got,
        &golden.values("t_to_sigma.sigma"),
        1e-5,
    );
}

#[test]
fn timesteps_and_sigmas_invert_each_other() {
    let table = SigmaTable::default();
    let times: Vec<f32> = (0..=999 * 8).map(|i| i as f32 / 8.0).collect();
    let back: Vec<f32> = times
        .iter()
        .map(|&t| table.timestep(table.sigma(t)))
        .collect();
    assert_close(
        "t(sigma(t))",
        &back,
        &times,
        Tolerance {
            abs: 1e-3,
            rel_of_max: 0.0,
        },
    );
}

#[test]
fn every_schedule_equals_the_reference_at_every_step_count() {
    let (golden, table) = (json("sigmas.json"), SigmaTable::default());
    let shape = ScheduleShape::of(&table);
    for (name, counts) in golden["schedules"].as_object().expect("schedules") {
        let scheduler = Scheduler::find(name).expect(name);
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for (n, sigmas) in counts.as_object().expect("counts") {
            let ours = scheduler.sigmas(n.parse().expect("a count"), &table, &shape);
            let theirs = numbers(sigmas);
            assert_eq!(ours.len(), theirs.len(), "{name} {n}");
            got.extend(ours);
            want.extend(theirs);
        }
        let exact = got
            .iter()
            .zip(&want)
            .filter(|(a, b)| a.to_bits() == b.to_bits())
            .count();
        assert_close_relative(
            &format!("{name} ({exact} of {} bit-equal)", got.len()),
            &got,
            &want,
            1e-5,
        );
    }
}

#[test]
fn discarding_the_next_to_last_sigma_equals_the_reference() {
    let (golden, table) = (json("sigmas.json"), SigmaTable::default());
    let options = SamplerOptions {
        always_discard_next_to_last_sigma: true,
        ..SamplerOptions::default()
    };
    for (name, counts) in golden["discard_penultimate"].as_object().expect("tables") {
        let scheduler = Scheduler::find(name).expect(name);
        for (n, sigmas) in counts.as_object().expect("counts") {
            let plan = plan(
                Sampler::Euler,
                scheduler,
                n.parse().expect("a count"),
                &options,
                &table,
            );
            let Levels::Sigmas(ours) = &plan.levels else {
                panic!("Euler counts in sigmas")
            };
            assert_close_relative(&format!("discard {name} {n}"), ours, &numbers(sigmas), 1e-5);
            assert_eq!(
                plan.infotext[0],
                ("Discard penultimate sigma".to_string(), "True".to_string())
            );
        }
    }
}

#[test]
fn timestep_lists_equal_the_reference() {
    for (n, want) in json("sigmas.json")["a1111_timesteps"]
        .as_object()
        .expect("lists")
    {
        let got: Vec<f32> = timestep_list(n.parse().expect("a count"))
            .into_iter()
            .map(|t| t as f32)
            .collect();
        assert_eq!(got, numbers(want), "{n} steps");
    }
}

/// The denoiser of the golden trajectories, `x / (1 + s^2) + 0.4 s / (1 + s) sin x`.
#[derive(Default)]
struct Toy {
    table: SigmaTable,
}

impl Denoiser for Toy {
    type Error = Infallible;

    fn denoised(&mut self, x: &Latents, sigma: f32) -> Result<Latents, Infallible> {
        Ok(x.map(|x| x / (1.0 + sigma * sigma) + 0.4 * (sigma / (1.0 + sigma)) * x.sin()))
    }

    fn noise(&mut self, x: &Latents, timestep: f32) -> Result<PredictedNoise, Infallible> {
        let sigma = self.table.sigma(timestep);
        let x = x * (1.0 + sigma * sigma).sqrt();
        let guided = &(&x - &self.denoised(&x, sigma)?) * (1.0 / sigma);
        Ok(PredictedNoise {
            uncond: guided.clone(),
            guided,
        })
    }
}

/// Noise from a golden file, in order of use, whatever kind is asked for.
struct Bank {
    noises: Vec<Latents>,
    used: usize,
}

impl StepNoise for Bank {
    fn independent(&mut self) -> Latents {
        self.used += 1;
        // An adaptive run without noise (eta 0) may draw more than was kept.
        self.noises[(self.used - 1) % self.noises.len()].clone()
    }

    fn brownian(&mut self, _sigma: f32, _next: f32) -> Latents {
        self.independent()
    }
}

/// One golden trajectory: its name in the files, the sampler, and the options that differ from the defaults.
struct Case {
    name: &'static str,
    sampler: Sampler,
    options: SamplerOptions,
}

fn case(name: &'static str, sampler: Sampler) -> Case {
    Case {
        name,
        sampler,
        options: SamplerOptions::default(),
    }
}

/// Every golden trajectory of the sigma family.
fn sigma_cases() -> Vec<Case> {
    let defaults = SamplerOptions::default;
    let eta = |eta| SamplerOptions {
        eta: Some(eta),
        ..defaults()
    };
    let churn = SamplerOptions {
        s_churn: 3.0,
        ..defaults()
    };
    let limited = SamplerOptions {
        s_tmin: 0.05,
        s_tmax: 12.0,
        s_noise: 1.003,
        ..churn.clone()
    };
    let with = |options: SamplerOptions, case: Case| Case { options, ..case };
    vec![
        case("euler", Sampler::Euler),
        with(limited, case("euler_churn", Sampler::Euler)),
        case("euler_ancestral", Sampler::EulerA),
        with(eta(0.5), case("euler_ancestral_eta0.5", Sampler::EulerA)),
        case("heun", Sampler::Heun),
        with(churn.clone(), case("heun_churn", Sampler::Heun)),
        case("dpm_2", Sampler::Dpm2),
        with(churn, case("dpm_2_churn", Sampler::Dpm2)),
        case("dpm_2_ancestral", Sampler::Dpm2A),
        case("lms", Sampler::Lms),
        case("dpmpp_2s_ancestral", Sampler::Dpmpp2SA),
        case("dpmpp_sde", Sampler::DpmppSde),
        case("dpmpp_2m", Sampler::Dpmpp2M),
        case("dpmpp_2m_sde", Sampler::Dpmpp2MSde),
        case("dpmpp_2m_sde_heun", Sampler::Dpmpp2MSdeHeun),
        with(eta(0.0), case("dpmpp_2m_sde_eta0", Sampler::Dpmpp2MSde)),
        case("dpmpp_3m_sde", Sampler::Dpmpp3MSde),
        with(eta(0.0), case("dpm_fast_eta0", Sampler::DpmFast)),
        case("dpm_fast_eta1", Sampler::DpmFast),
        with(eta(0.0), case("dpm_adaptive_eta0", Sampler::DpmAdaptive)),
        case("dpm_adaptive_eta1", Sampler::DpmAdaptive),
        case("lcm", Sampler::Lcm),
        case("heunpp2", Sampler::HeunPp2),
        case("ipndm", Sampler::Ipndm),
        case("restart", Sampler::Restart),
    ]
}

/// Every golden trajectory of the timestep family.
fn timestep_cases() -> Vec<Case> {
    let defaults = SamplerOptions::default;
    vec![
        case("ddim", Sampler::Ddim),
        Case {
            options: SamplerOptions {
                eta: Some(1.0),
                ..defaults()
            },
            ..case("ddim_eta1", Sampler::Ddim)
        },
        case("plms", Sampler::Plms),
        case("unipc_bh1", Sampler::UniPc),
        Case {
            options: SamplerOptions {
                uni_pc_variant: UniPcVariant::Bh2,
                ..defaults()
            },
            ..case("unipc_bh2", Sampler::UniPc)
        },
    ]
}

/// Golden data of one denoiser (`toy` or `model`): initial noise and the noise to be used, in order.
struct Golden {
    tensors: Tensors,
    runs: serde_json::Value,
    prefix: &'static str,
}

impl Golden {
    fn open(prefix: &'static str) -> Self {
        let runs = json("samplers.json")[prefix]["runs"].clone();
        Self {
            tensors: Tensors::open("samplers.safetensors"),
            runs,
            prefix,
        }
    }

    fn latents(&self, name: &str) -> Latents {
        let (shape, data) = self.tensors.get(&format!("{}.{name}", self.prefix));
        Latents::new(data, shape.try_into().expect("four dimensions"))
    }

    /// The noise to be used, times `amount`.
    fn bank(&self, amount: f32) -> Bank {
        let (shape, data) = self.tensors.get(&format!("{}.bank", self.prefix));
        let shape: [usize; 4] = shape[1..].try_into().expect("five dimensions");
        let noises = data
            .chunks_exact(shape.iter().product())
            .map(|d| &Latents::new(d.to_vec(), shape) * amount)
            .collect();
        Bank { noises, used: 0 }
    }

    /// Runs a plan over `denoiser` and compares its end, every step's entry, and how much noise it used.
    fn check<D>(&self, run: &str, plan: &Plan, denoiser: &mut D, amount: f32, tolerance: Tolerance)
    where
        D: Denoiser,
        D::Error: std::fmt::Debug,
    {
        let mut bank = self.bank(amount);
        let mut entries = Vec::new();
        let x = plan.initial_latents(&self.latents("noise"));
        let on_step = &mut |_, x: &Latents| entries.extend_from_slice(&x.data());
        let got = sample(plan, denoiser, x, &mut bank, on_step).expect("the run ends");
        let name = format!("{}.{run}", self.prefix);
        assert_close(
            &format!("{name}.final"),
            &got.data(),
            &self.latents(&format!("{run}.final")).data(),
            tolerance,
        );
        if let Some((_, xs)) = self.tensors.try_get(&format!("{name}.xs")) {
            // Of the adaptive solver the reference kept the latents after each attempt.
            let entered = if plan.sampler == Sampler::DpmAdaptive {
                &xs[..xs.len() - got.data().len()]
            } else {
                &xs[..]
            };
            let skipped = entries.len() - entered.len();
            assert_close(
                &format!("{name}.xs"),
                &entries[skipped..],
                entered,
                tolerance,
            );
        }
        // The reference did not count draws without effect, which A1111 (and so we) make at every step.
        let drawn = if self.runs[run]["noise"].is_null() && plan.sampler.has(Flag::Churn) {
            Some(plan.steps as u64)
        } else {
            self.runs[run]["noise_used"].as_u64()
        };
        assert_eq!(Some(bank.used as u64), drawn, "{name}: noise used");
    }
}

/// A plan over given sigmas.
fn plan_over(sigmas: Vec<f32>, case: &Case) -> Plan {
    let mut plan = plan(
        case.sampler,
        Scheduler::Automatic,
        sigmas.len() - 1,
        &case.options,
        &SigmaTable::default(),
    );
    plan.levels = Levels::Sigmas(sigmas);
    plan
}

/// Compares every run of a golden file; `tolerance` may depend on the run's name.
fn compare_all<D>(
    prefix: &'static str,
    mut denoiser: impl FnMut() -> D,
    tolerance: impl Fn(&str) -> Tolerance,
) where
    D: Denoiser,
    D::Error: std::fmt::Debug,
{
    let golden = Golden::open(prefix);
    let mut compared = 0;
    for (case, suffix) in sigma_cases()
        .iter()
        .flat_map(|case| ["", ".a", ".b", ".c"].map(|suffix| (case, suffix)))
    {
        let run = format!("{}{suffix}", case.name);
        let Some(sigmas) = golden.runs.get(&run).and_then(|run| run["sigmas"].as_str()) else {
            continue;
        };
        let plan = plan_over(golden.tensors.values(sigmas), case);
        // A1111 has no `s_noise` for Euler a; the reference run had 1.02.
        let amount = if case.name == "euler_ancestral_eta0.5" {
            1.02
        } else {
            1.0
        };
        golden.check(&run, &plan, &mut denoiser(), amount, tolerance(case.name));
        compared += 1;
    }
    for case in timestep_cases() {
        let steps = golden.runs[case.name]["steps"].as_u64().expect("a count") as usize;
        let plan = plan(
            case.sampler,
            Scheduler::Automatic,
            steps,
            &case.options,
            &SigmaTable::default(),
        );
        golden.check(case.name, &plan, &mut denoiser(), 1.0, tolerance(case.name));
        compared += 1;
    }
    assert_eq!(
        Some(compared),
        golden.runs.as_object().map(serde_json::Map::len),
        "every run was compared"
    );
}

#[test]
fn toy_trajectories_equal_the_reference() {
    compare_all("toy", Toy::default, |_| TOY);
}

/// The tiny UNet with the prompts of the golden run.
struct TinyUnet {
    unet: Unet,
    conditioning: sdgen::models::Conditioning,
}

impl TinyUnet {
    fn load() -> Self {
        let golden = Tensors::open("samplers.safetensors");
        let both = |name: &str| {
            let rows = ["cond", "uncond"].map(|side| {
                let (shape, values) = golden.get(&format!("model.{side}.{name}"));
                Tensor::from_vec(values, shape, &Device::Cpu).expect("shape fits")
            });
            Tensor::cat(&rows, 0).expect("same shape")
        };
        let file = support::golden::open("tiny_sdxl.safetensors");
        let unet = Unet::new(&file, &Placement::cpu()).expect("UNet");
        let conditioning = unet.condition(&both("context"), &both("y")).expect("fits");
        Self { unet, conditioning }
    }
}

impl Network for &TinyUnet {
    type Error = candle_core::Error;

    fn predict(
        &mut self,
        x: &Latents,
        timestep: f32,
        _call: usize,
        _uncond: Uncond,
    ) -> candle_core::Result<Prediction> {
        let x =
            Tensor::from_slice(&x.data(), x.shape.to_vec(), &Device::Cpu)?.permute((0, 2, 3, 1))?;
        let x = Tensor::cat(&[&x, &x], 0)?.contiguous()?;
        let eps = self
            .unet
            .forward(&x, &[timestep; 2], &self.conditioning)?
            .permute((0, 3, 1, 2))?;
        let row = |i| {
            let row = eps.narrow(0, i, 1)?;
            let shape = row.dims4()?;
            let data = row.flatten_all()?.to_vec1()?;
            Ok::<_, candle_core::Error>(Latents::new(data, [shape.0, shape.1, shape.2, shape.3]))
        };
        Ok(Prediction {
            cond: vec![(1.0, row(0)?)],
            uncond: Some(row(1)?),
        })
    }
}

/// 5e-4 of the largest value over 6 to 8 UNet calls; LMS and DPM adaptive amplify rounding, hence 1e-3 (the golden data's own).
#[test]
fn trajectories_on_the_tiny_unet_equal_the_reference() {
    let tiny = TinyUnet::load();
    // Any sigma plan: the reference runs have no consistency scalings, not even LCM's.
    let euler = plan(
        Sampler::Euler,
        Scheduler::Karras,
        6,
        &SamplerOptions::default(),
        &SigmaTable::default(),
    );
    let denoiser = || CfgDenoiser::new(&tiny, Guidance::default(), &euler, |_, _| {});
    compare_all("model", denoiser, |name| Tolerance {
        abs: 0.0,
        rel_of_max: if name.starts_with("lms") || name.starts_with("dpm_adaptive") {
            1e-3
        } else {
            5e-4
        },
    });
}
