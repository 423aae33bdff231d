//! A1111's schedulers: how the noise levels of a run are spread between the largest and the smallest.
//!
//! Every schedule is a pure function of the number of steps and the limits and returns descending sigmas; all but KL Optimal
//! end in 0. Follows `sd_schedulers.py` of A1111 1.10 and k-diffusion, with their precision at every operation, because a
//! Brownian tree notices the last bit of a sigma.

use super::incomplete_beta::beta_quantile;
use super::schedule::SigmaTable;

/// Align Your Steps for SDXL (Sabour et al. 2024), without the final 0.
const ALIGN_YOUR_STEPS: [f64; 11] = [
    14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029,
];

/// A sigma schedule, by A1111's label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Scheduler {
    /// The sampler's own; Uniform where it has none.
    #[default]
    Automatic,
    /// Equal distances in timesteps over the whole training range.
    Uniform,
    /// Karras et al. (2022), equation 5.
    Karras,
    /// Equal distances in the logarithm.
    Exponential,
    /// A power of equal distances in the logarithm.
    Polyexponential,
    /// Equal distances in timesteps, the last one left out.
    SgmUniform,
    /// Equal distances in the arc tangent; does not end in 0.
    KlOptimal,
    /// A published table, interpolated.
    AlignYourSteps,
    /// Equal distances in table indexes from the top.
    Simple,
    /// Equal distances in timesteps between the limits.
    Normal,
    /// Equal distances in table indexes from the bottom; can have more steps than asked for.
    Ddim,
    /// Quantiles of a beta distribution.
    Beta,
    /// Rounded timesteps of distilled models; not in A1111 1.10.
    Turbo,
}

/// One row of the scheduler list.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SchedulerInfo {
    /// The scheduler.
    pub scheduler: Scheduler,
    /// Short name.
    pub name: &'static str,
    /// Name shown to people and written to infotext.
    pub label: &'static str,
    /// Another accepted name.
    pub alias: Option<&'static str>,
    /// `rho` where the schedule has one, else -1.
    pub default_rho: f64,
    /// Whether the schedule reads the model's table rather than its limits only.
    pub need_inner_model: bool,
}

const fn row(
    scheduler: Scheduler,
    name: &'static str,
    label: &'static str,
    default_rho: f64,
    need_inner_model: bool,
) -> SchedulerInfo {
    SchedulerInfo {
        scheduler,
        name,
        label,
        alias: None,
        default_rho,
        need_inner_model,
    }
}

/// In the order of the enum.
const TABLE: [SchedulerInfo; 13] = [
    row(Scheduler::Automatic, "automatic", "Automatic", -1.0, false),
    row(Scheduler::Uniform, "uniform", "Uniform", -1.0, true),
    row(Scheduler::Karras, "karras", "Karras", 7.0, false),
    row(
        Scheduler::Exponential,
        "exponential",
        "Exponential",
        -1.0,
        false,
    ),
    row(
        Scheduler::Polyexponential,
        "polyexponential",
        "Polyexponential",
        1.0,
        false,
    ),
    SchedulerInfo {
        alias: Some("SGMUniform"),
        ..row(
            Scheduler::SgmUniform,
            "sgm_uniform",
            "SGM Uniform",
            -1.0,
            true,
        )
    },
    row(
        Scheduler::KlOptimal,
        "kl_optimal",
        "KL Optimal",
        -1.0,
        false,
    ),
    row(
        Scheduler::AlignYourSteps,
        "align_your_steps",
        "Align Your Steps",
        -1.0,
        false,
    ),
    row(Scheduler::Simple, "simple", "Simple", -1.0, true),
    row(Scheduler::Normal, "normal", "Normal", -1.0, true),
    row(Scheduler::Ddim, "ddim", "DDIM", -1.0, true),
    row(Scheduler::Beta, "beta", "Beta", -1.0, true),
    row(Scheduler::Turbo, "turbo", "Turbo", -1.0, true),
];

/// What shapes a schedule besides its number of steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScheduleShape {
    /// Smallest positive sigma; ignored by Align Your Steps, Simple, DDIM, Uniform and Turbo.
    pub sigma_min: f32,
    /// Largest sigma; ignored by the same.
    pub sigma_max: f32,
    /// Exponent of Karras and Polyexponential; `None` = the schedule's default.
    pub rho: Option<f64>,
    /// Parameters of the beta distribution.
    pub beta: (f64, f64),
}

impl ScheduleShape {
    /// The full range of `table` and A1111's default parameters.
    #[must_use]
    pub fn of(table: &SigmaTable) -> Self {
        Self {
            sigma_min: table.sigma_min(),
            sigma_max: table.sigma_max(),
            rho: None,
            beta: (0.6, 0.6),
        }
    }
}

impl Scheduler {
    /// Every scheduler, in A1111's order.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|info| info.scheduler)
    }

    /// The scheduler's row.
    #[must_use]
    pub fn info(self) -> &'static SchedulerInfo {
        &TABLE[self as usize]
    }

    /// Name shown to people and written to infotext.
    #[must_use]
    pub fn label(self) -> &'static str {
        self.info().label
    }

    /// Finds a scheduler by name, label or alias, in any letter case.
    #[must_use]
    pub fn find(name: &str) -> Option<Self> {
        TABLE
            .iter()
            .find(|info| info.names().any(|known| known.eq_ignore_ascii_case(name)))
            .map(|info| info.scheduler)
    }

    /// Descending sigmas of `n` steps (at least one); Automatic means Uniform here.
    #[must_use]
    pub fn sigmas(self, n: usize, table: &SigmaTable, shape: &ScheduleShape) -> Vec<f32> {
        let n = n.max(1);
        let mut sigmas = match self {
            Self::Automatic | Self::Uniform => uniform(n, table),
            Self::Karras => karras(
                n,
                shape.sigma_min,
                shape.sigma_max,
                shape.rho.unwrap_or(7.0),
            ),
            Self::Exponential => exponential(n, shape),
            Self::Polyexponential => polyexponential(n, shape),
            Self::SgmUniform => sgm_uniform(n, table, shape),
            Self::KlOptimal => return kl_optimal(n, shape),
            Self::AlignYourSteps => align_your_steps(n),
            Self::Simple => simple(n, table),
            Self::Normal => normal(n, table, shape),
            Self::Ddim => ddim(n, table),
            Self::Beta => beta(n, shape),
            Self::Turbo => turbo(n, table),
        };
        sigmas.push(0.0);
        sigmas
    }
}

impl SchedulerInfo {
    /// Name, label and alias.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        [self.label, self.name].into_iter().chain(self.alias)
    }
}

/// `n` equally spaced values, both ends included, rounded as torch's `linspace` is.
pub(super) fn linspace(start: f32, end: f32, n: usize) -> Vec<f32> {
    if n == 1 {
        return vec![start];
    }
    let step = (end - start) / (n - 1) as f32;
    let value = |i: usize| {
        if i < n / 2 {
            start + step * i as f32
        } else {
            end - step * (n - 1 - i) as f32
        }
    };
    (0..n).map(value).collect()
}

fn uniform(n: usize, table: &SigmaTable) -> Vec<f32> {
    let (first, last) = table.timestep_range();
    linspace(last, first, n)
        .into_iter()
        .map(|t| table.sigma(t))
        .collect()
}

/// Karras et al. (2022), equation 5, without the final 0.
pub(super) fn karras(n: usize, sigma_min: f32, sigma_max: f32, rho: f64) -> Vec<f32> {
    let inverse = |sigma: f32| f64::from(sigma).powf(1.0 / rho);
    let (low, high) = (inverse(sigma_min), inverse(sigma_max));
    let (start, slope) = (high as f32, (low - high) as f32);
    let ramp = linspace(0.0, 1.0, n).into_iter();
    ramp.map(|r| f64::from(start + r * slope).powf(rho) as f32)
        .collect()
}

fn exponential(n: usize, shape: &ScheduleShape) -> Vec<f32> {
    let ln = |sigma: f32| f64::from(sigma).ln() as f32;
    linspace(ln(shape.sigma_max), ln(shape.sigma_min), n)
        .into_iter()
        .map(f32::exp)
        .collect()
}

fn polyexponential(n: usize, shape: &ScheduleShape) -> Vec<f32> {
    let (low, high) = (
        f64::from(shape.sigma_min).ln(),
        f64::from(shape.sigma_max).ln(),
    );
    let rho = shape.rho.unwrap_or(1.0) as f32;
    let ramp = linspace(1.0, 0.0, n).into_iter();
    ramp.map(|r| (r.powf(rho) * (high - low) as f32 + low as f32).exp())
        .collect()
}

fn sgm_uniform(n: usize, table: &SigmaTable, shape: &ScheduleShape) -> Vec<f32> {
    let timesteps = linspace(
        table.timestep(shape.sigma_max),
        table.timestep(shape.sigma_min),
        n + 1,
    );
    timesteps[..n].iter().map(|&t| table.sigma(t)).collect()
}

fn normal(n: usize, table: &SigmaTable, shape: &ScheduleShape) -> Vec<f32> {
    let timesteps = linspace(
        table.timestep(shape.sigma_max),
        table.timestep(shape.sigma_min),
        n,
    );
    timesteps.into_iter().map(|t| table.sigma(t)).collect()
}

fn kl_optimal(n: usize, shape: &ScheduleShape) -> Vec<f32> {
    let (low, high) = (shape.sigma_min.atan(), shape.sigma_max.atan());
    let share = |i: usize| i as f32 / n as f32;
    (0..=n)
        .map(|i| (share(i) * low + (1.0 - share(i)) * high).tan())
        .collect()
}

fn align_your_steps(n: usize) -> Vec<f32> {
    let last = ALIGN_YOUR_STEPS.len() - 1;
    let point = |i: usize| {
        // `numpy.linspace(0, 1, 1)` is 0, which after A1111's reversal is the low end.
        let from_end = if n == 1 {
            0.0
        } else {
            (n - 1 - i) as f64 / (n - 1) as f64
        };
        let position = from_end * last as f64;
        let index = (position.floor() as usize).min(last - 1);
        let (a, b) = (
            ALIGN_YOUR_STEPS[last - index].ln(),
            ALIGN_YOUR_STEPS[last - index - 1].ln(),
        );
        (a + (position - index as f64) * (b - a)).exp() as f32
    };
    if n == ALIGN_YOUR_STEPS.len() {
        return ALIGN_YOUR_STEPS.iter().map(|&sigma| sigma as f32).collect();
    }
    (0..n).map(point).collect()
}

fn simple(n: usize, table: &SigmaTable) -> Vec<f32> {
    let sigmas = table.sigmas();
    let stride = sigmas.len() as f64 / n as f64;
    (0..n)
        .map(|x| sigmas[sigmas.len() - 1 - (x as f64 * stride) as usize])
        .collect()
}

fn ddim(n: usize, table: &SigmaTable) -> Vec<f32> {
    let stride = (table.sigmas().len() / n).max(1);
    let mut sigmas: Vec<f32> = table
        .sigmas()
        .iter()
        .skip(1)
        .step_by(stride)
        .copied()
        .collect();
    sigmas.reverse();
    sigmas
}

fn beta(n: usize, shape: &ScheduleShape) -> Vec<f32> {
    let (low, high) = (f64::from(shape.sigma_min), f64::from(shape.sigma_max));
    let (alpha, beta) = shape.beta;
    let level = |i: usize| {
        1.0 - if n == 1 {
            0.0
        } else {
            i as f64 / (n - 1) as f64
        }
    };
    (0..n)
        .map(|i| (low + beta_quantile(level(i), alpha, beta) * (high - low)) as f32)
        .collect()
}

fn turbo(n: usize, table: &SigmaTable) -> Vec<f32> {
    let last = table.sigmas().len() - 1;
    let index =
        |k: usize| (table.sigmas().len() as f32 / n as f32 * k as f32 - 1.0).round_ties_even();
    (1..=n)
        .rev()
        .map(|k| table.sigmas()[(index(k).max(0.0) as usize).min(last)])
        .collect()
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "table entries are exact")]
mod tests {
    use super::*;

    #[test]
    fn names_labels_and_aliases_are_found_in_any_case() {
        for info in &TABLE {
            assert_eq!(info.scheduler.info(), info);
            for name in info.names() {
                assert_eq!(
                    Scheduler::find(&name.to_uppercase()),
                    Some(info.scheduler),
                    "{name}"
                );
            }
        }
        assert_eq!(Scheduler::find("sgmuniform"), Some(Scheduler::SgmUniform));
        assert_eq!(Scheduler::find("no such"), None);
    }

    #[test]
    fn every_schedule_descends_and_all_but_kl_optimal_end_in_zero() {
        let table = SigmaTable::default();
        for scheduler in Scheduler::all() {
            for n in 2..60 {
                let sigmas = scheduler.sigmas(n, &table, &ScheduleShape::of(&table));
                assert!(
                    sigmas.windows(2).all(|pair| pair[0] > pair[1]),
                    "{scheduler:?} {n}: {sigmas:?}"
                );
                assert_eq!(
                    sigmas[sigmas.len() - 1] == 0.0,
                    scheduler != Scheduler::KlOptimal,
                    "{scheduler:?} {n}"
                );
            }
        }
    }

    #[test]
    fn turbo_of_one_step_starts_at_the_top() {
        let table = SigmaTable::default();
        let sigmas = |n| Scheduler::Turbo.sigmas(n, &table, &ScheduleShape::of(&table));
        assert_eq!(sigmas(1), [table.sigma_max(), 0.0]);
        assert_eq!(
            sigmas(4)[..4],
            [999, 749, 499, 249].map(|k| table.sigmas()[k])
        );
    }

    #[test]
    fn limits_and_rho_shape_karras() {
        let table = SigmaTable::default();
        let shape = ScheduleShape {
            sigma_min: 0.1,
            sigma_max: 10.0,
            rho: Some(1.0),
            ..ScheduleShape::of(&table)
        };
        let sigmas = Scheduler::Karras.sigmas(3, &table, &shape);
        assert!(
            (sigmas[0] - 10.0).abs() < 1e-5
                && (sigmas[1] - 5.05).abs() < 1e-5
                && (sigmas[2] - 0.1).abs() < 1e-6
        );
    }
}
