//! Schedules and samplers against numbers of k-diffusion and diffusers (golden files `schedule.*`, `sigmas.*`, `samplers.*`)
//! and against the closed-form vectors of the specification.

mod support {
    pub(crate) mod close;
    pub(crate) mod tensors;
}

use std::convert::Infallible;

use sdgen::sampling::{
    Denoiser, Flag, Latents, Levels, Plan, PredictedNoise, Sampler, SamplerOptions, ScheduleShape,
    Scheduler, SigmaTable, StepNoise, plan, sample, timestep_list,
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
struct Toy {
    table: SigmaTable,
    calls: usize,
}

impl Denoiser for Toy {
    type Error = Infallible;

    fn denoised(&mut self, x: &Latents, sigma: f32) -> Result<Latents, Infallible> {
        self.calls += 1;
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
        self.noises[self.used - 1].clone()
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
    let churn = SamplerOptions {
        s_churn: 3.0,
        ..SamplerOptions::default()
    };
    let limited = SamplerOptions {
        s_tmin: 0.05,
        s_tmax: 12.0,
        s_noise: 1.003,
        ..churn.clone()
    };
    vec![
        case("euler", Sampler::Euler),
        Case {
            options: limited,
            ..case("euler_churn", Sampler::Euler)
        },
        case("euler_ancestral", Sampler::EulerA),
        case("heun", Sampler::Heun),
        Case {
            options: churn,
            ..case("heun_churn", Sampler::Heun)
        },
        case("dpmpp_2m", Sampler::Dpmpp2M),
        case("dpmpp_sde", Sampler::DpmppSde),
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

    fn bank(&self) -> Bank {
        let (shape, data) = self.tensors.get(&format!("{}.bank", self.prefix));
        let shape: [usize; 4] = shape[1..].try_into().expect("five dimensions");
        let noises = data
            .chunks_exact(shape.iter().product())
            .map(|d| Latents::new(d.to_vec(), shape))
            .collect();
        Bank { noises, used: 0 }
    }

    /// Runs a plan over `denoiser` and compares its end, every step's entry, and how much noise it used.
    fn check<D: Denoiser<Error = Infallible>>(
        &self,
        run: &str,
        plan: &Plan,
        denoiser: &mut D,
        tolerance: Tolerance,
    ) {
        let mut bank = self.bank();
        let mut entries = Vec::new();
        let x = plan.initial_latents(&self.latents("noise"));
        let on_step = &mut |_, x: &Latents| entries.extend_from_slice(&x.data);
        let Ok(got) = sample(plan, denoiser, x, &mut bank, on_step);
        let name = format!("{}.{run}", self.prefix);
        assert_close(
            &format!("{name}.final"),
            &got.data,
            &self.latents(&format!("{run}.final")).data,
            tolerance,
        );
        if let Some((_, xs)) = self.tensors.try_get(&format!("{name}.xs")) {
            assert_close(&format!("{name}.xs"), &entries, &xs, tolerance);
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

#[test]
fn toy_trajectories_equal_the_reference() {
    let golden = Golden::open("toy");
    for case in sigma_cases() {
        for tag in ["a", "b"] {
            let sigmas = golden.tensors.values(&format!("toy.sigmas.{tag}"));
            let mut toy = Toy {
                table: SigmaTable::default(),
                calls: 0,
            };
            golden.check(
                &format!("{}.{tag}", case.name),
                &plan_over(sigmas, &case),
                &mut toy,
                TOY,
            );
        }
    }
}
