//! The noise levels a latent diffusion model was trained on, and the maps between a noise level and a timestep.
//!
//! Invariant: `sigmas` increase strictly, `log_sigmas[k] = ln sigmas[k]`, and `timestep(sigma(t)) = t` up to rounding. A
//! timestep is real-valued: the network is asked at fractional ones. Follows the `scaled_linear` schedule of latent diffusion
//! and `DiscreteSchedule` of k-diffusion, in `f32` where they use `f32`.

use half::f16;

/// Noise levels of the training schedule.
const TRAINING_STEPS: usize = 1000;
const BETA_START: f64 = 0.00085;
const BETA_END: f64 = 0.012;
/// The last level of a schedule rescaled to zero terminal SNR, kept above zero so that sigma stays finite.
const ZTSNR_LAST_ALPHA: f32 = 4.8973451890853435e-08;
/// LCM was distilled on every 20th level.
const LCM_STRIDE: usize = 20;

/// Settings that change the training schedule itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TableOptions {
    /// Round the cumulative alphas to half precision (`use_downcasted_alpha_bar`).
    pub downcast_alphas: bool,
    /// Rescale to zero terminal SNR (`sd_noise_schedule`, or the checkpoint's `ztsnr` marker).
    pub zero_terminal_snr: bool,
    /// Round timesteps to whole ones (`enable_quantization`).
    pub quantize: bool,
}

/// Noise levels by index, smallest first, and the timestep each index stands for.
#[derive(Debug, Clone, PartialEq)]
pub struct SigmaTable {
    alphas_cumprod: Vec<f32>,
    sigmas: Vec<f32>,
    log_sigmas: Vec<f32>,
    first_timestep: usize,
    stride: usize,
    quantize: bool,
}

impl Default for SigmaTable {
    fn default() -> Self {
        Self::new(TableOptions::default())
    }
}

impl SigmaTable {
    /// The schedule of SD 1, SD 2 and SDXL: betas linear in their square roots.
    #[must_use]
    pub fn new(options: TableOptions) -> Self {
        let (start, end) = (BETA_START.sqrt(), BETA_END.sqrt());
        let beta =
            |k: usize| (start + k as f64 / (TRAINING_STEPS - 1) as f64 * (end - start)).powi(2);
        let cumulative = (0..TRAINING_STEPS).scan(1.0, |product, k| {
            *product *= 1.0 - beta(k);
            Some(*product as f32)
        });
        let mut alphas: Vec<f32> = cumulative.collect();
        if options.downcast_alphas {
            alphas = alphas.into_iter().map(half).collect();
        }
        if options.zero_terminal_snr {
            rescale_to_zero_terminal_snr(&mut alphas);
        }
        let mut table = Self::from_alphas(alphas, 0, 1, options.quantize);
        // Half precision goes on in A1111: its levels and their logarithms are computed from a half tensor. At zero terminal
        // SNR the last level would overflow it, so there only the alphas were rounded.
        if options.downcast_alphas && !options.zero_terminal_snr {
            let level = |alpha: &f32| half(half(half(1.0 - alpha) / alpha).sqrt());
            table.sigmas = table.alphas_cumprod.iter().map(level).collect();
            table.log_sigmas = table.sigmas.iter().map(|sigma| half(sigma.ln())).collect();
        }
        table
    }

    /// The 50 levels that a latent consistency model knows.
    #[must_use]
    pub fn lcm(&self) -> Self {
        let alphas = self
            .alphas_cumprod
            .iter()
            .skip(LCM_STRIDE - 1)
            .step_by(LCM_STRIDE)
            .copied()
            .collect();
        Self::from_alphas(alphas, LCM_STRIDE - 1, LCM_STRIDE, true)
    }

    fn from_alphas(
        alphas_cumprod: Vec<f32>,
        first_timestep: usize,
        stride: usize,
        quantize: bool,
    ) -> Self {
        let sigmas: Vec<f32> = alphas_cumprod
            .iter()
            .map(|&alpha| ((1.0 - alpha) / alpha).sqrt())
            .collect();
        let log_sigmas = sigmas.iter().map(|sigma| sigma.ln()).collect();
        Self {
            alphas_cumprod,
            sigmas,
            log_sigmas,
            first_timestep,
            stride,
            quantize,
        }
    }

    /// The cumulative product of alphas per level.
    #[must_use]
    pub fn alphas_cumprod(&self) -> &[f32] {
        &self.alphas_cumprod
    }

    /// The noise levels, smallest first.
    #[must_use]
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// The smallest noise level.
    #[must_use]
    pub fn sigma_min(&self) -> f32 {
        self.sigmas[0]
    }

    /// The largest noise level.
    #[must_use]
    pub fn sigma_max(&self) -> f32 {
        self.sigmas[self.sigmas.len() - 1]
    }

    /// The first and the last timestep.
    #[must_use]
    pub fn timestep_range(&self) -> (f32, f32) {
        let last = self.first_timestep + self.stride * (self.sigmas.len() - 1);
        (self.first_timestep as f32, last as f32)
    }

    /// The noise level of a timestep, linear in the logarithm between two levels.
    #[must_use]
    pub fn sigma(&self, timestep: f32) -> f32 {
        let last = (self.sigmas.len() - 1) as f32;
        let index = ((timestep - self.first_timestep as f32) / self.stride as f32).clamp(0.0, last);
        let (low, high, w) = (index.floor() as usize, index.ceil() as usize, index.fract());
        ((1.0 - w) * self.log_sigmas[low] + w * self.log_sigmas[high]).exp()
    }

    /// The timestep of a noise level; fractional unless the table is quantized, and within the training range.
    #[must_use]
    pub fn timestep(&self, sigma: f32) -> f32 {
        let log_sigma = sigma.ln();
        let index = if self.quantize {
            self.nearest(log_sigma) as f32
        } else {
            self.interpolate(log_sigma)
        };
        self.first_timestep as f32 + self.stride as f32 * index
    }

    fn nearest(&self, log_sigma: f32) -> usize {
        let distance = |&index: &usize| (log_sigma - self.log_sigmas[index]).abs();
        (0..self.log_sigmas.len())
            .min_by(|a, b| distance(a).total_cmp(&distance(b)))
            .unwrap_or(0)
    }

    fn interpolate(&self, log_sigma: f32) -> f32 {
        let not_above = self.log_sigmas.partition_point(|&level| level <= log_sigma);
        let low = not_above.saturating_sub(1).min(self.log_sigmas.len() - 2);
        let (below, above) = (self.log_sigmas[low], self.log_sigmas[low + 1]);
        let w = ((below - log_sigma) / (below - above)).clamp(0.0, 1.0);
        (1.0 - w) * low as f32 + w * (low + 1) as f32
    }
}

/// A number as half precision holds it.
fn half(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

/// Shifts and scales the square roots so that the last level is pure noise (Lin et al. 2023, algorithm 1).
fn rescale_to_zero_terminal_snr(alphas: &mut [f32]) {
    let (first, last) = (alphas[0].sqrt(), alphas[alphas.len() - 1].sqrt());
    for alpha in alphas.iter_mut() {
        *alpha = ((alpha.sqrt() - last) * (first / (first - last))).powi(2);
    }
    alphas[alphas.len() - 1] = ZTSNR_LAST_ALPHA;
}

/// The timesteps of the samplers that walk over whole training steps, ascending; there can be more than `steps`.
#[must_use]
pub fn timestep_list(steps: usize) -> Vec<usize> {
    let stride = (TRAINING_STEPS / steps.max(1)).max(1);
    (0..TRAINING_STEPS)
        .step_by(stride)
        .map(|v| (v + 1).min(TRAINING_STEPS - 1))
        .collect()
}

#[cfg(test)]
#[allow(
    clippy::float_cmp,
    reason = "table entries and whole timesteps are exact"
)]
mod tests {
    use super::*;

    #[test]
    fn zero_terminal_snr_keeps_the_first_level_and_raises_the_last() {
        let table = SigmaTable::new(TableOptions {
            zero_terminal_snr: true,
            ..TableOptions::default()
        });
        let sigmas = table.sigmas();
        assert!((sigmas[0] - 0.0291675).abs() < 1e-6, "{}", sigmas[0]);
        assert!(
            (sigmas[998] / 2254.24 - 1.0).abs() < 1e-3,
            "{}",
            sigmas[998]
        );
        assert!(
            (sigmas[999] / 4518.76 - 1.0).abs() < 1e-5,
            "{}",
            sigmas[999]
        );
    }

    const HALF_LEVELS: [f32; 6] = [
        0.03125,
        0.038_299_56,
        0.695_800_8,
        1.618_164_1,
        14.523_437_5,
        14.609_375,
    ];
    const HALF_UNIFORM: [f32; 5] = [
        14.609_042,
        4.084_611,
        1.615_648_3,
        0.695_136_2,
        0.031_277_89,
    ];

    #[test]
    fn half_precision_alphas_give_half_precision_levels() {
        // Python: struct's 'e' after each operation of sqrt((1 - a) / a).
        let table = SigmaTable::new(TableOptions {
            downcast_alphas: true,
            ..TableOptions::default()
        });
        let levels = [0, 1, 250, 500, 998, 999].map(|k| table.sigmas()[k]);
        assert_eq!(levels, HALF_LEVELS);
        for (i, want) in HALF_UNIFORM.into_iter().enumerate() {
            let got = table.sigma(999.0 * (1.0 - i as f32 / 4.0));
            assert!((got / want - 1.0).abs() < 1e-6, "{got} {want}");
        }
    }

    #[test]
    fn a_quantized_table_answers_whole_timesteps() {
        let table = SigmaTable::new(TableOptions {
            quantize: true,
            ..TableOptions::default()
        });
        assert_eq!(table.timestep(1.6155), 499.0);
        assert_eq!(table.timestep(100.0), 999.0);
    }

    #[test]
    fn lcm_levels_are_every_twentieth_from_the_top() {
        let (base, lcm) = (SigmaTable::default(), SigmaTable::default().lcm());
        assert_eq!(lcm.sigmas().len(), 50);
        assert_eq!(lcm.sigma_max(), base.sigma_max());
        assert_eq!(lcm.timestep_range(), (19.0, 999.0));
        assert_eq!(lcm.timestep(base.sigmas()[519]), 519.0);
        assert!((lcm.sigma(519.0) / base.sigmas()[519] - 1.0).abs() < 1e-6);
    }

    #[test]
    fn timestep_lists_are_those_of_a1111() {
        assert_eq!(timestep_list(5), [1, 201, 401, 601, 801]);
        assert_eq!(timestep_list(30).len(), 31);
        assert_eq!(timestep_list(1), [1]);
        assert_eq!(timestep_list(5000).len(), 1000);
    }
}
