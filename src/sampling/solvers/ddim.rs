//! Samplers over whole training timesteps whose latents keep unit variance: DDIM and PLMS.
//!
//! `timesteps` ascend and are walked from the end; the last update lands on the first timestep, which the network never sees.

use super::Run;
use super::multistep::adams_bashforth;
use crate::rng::{Latents, lincomb};
use crate::sampling::{Denoiser, SigmaTable};

/// Which prediction carries the latents from the clean estimate back to noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Renoise {
    /// The guided one.
    Guided,
    /// The negative prompt's (CFG++, Chung et al. 2024).
    Uncond,
}

/// DDIM (Song et al. 2021), equation 12. Noise is drawn at every step, whatever `eta`.
pub(super) fn ddim<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    timesteps: &[usize],
    table: &SigmaTable,
    renoise: Renoise,
) -> Result<Latents, D::Error> {
    for (step, index) in (1..timesteps.len()).rev().enumerate() {
        run.begin(step, &x);
        let update = Update::new(table, timesteps[index], timesteps[index - 1], run.eta);
        let eps = run.denoiser.noise(&x, timesteps[index] as f32)?;
        let direction = match renoise {
            Renoise::Guided => &eps.guided,
            Renoise::Uncond => &eps.uncond,
        };
        x = update.apply(&x, &eps.guided, direction);
        let noise = run.noise.independent();
        x.add_scaled(update.noise as f32, &noise);
    }
    Ok(x)
}

/// PLMS (Liu et al. 2022, arXiv 2202.09778): DDIM's step along a multistep average, started by an improved Euler step.
pub(super) fn plms<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    timesteps: &[usize],
    table: &SigmaTable,
) -> Result<Latents, D::Error> {
    let mut history: Vec<Latents> = Vec::new();
    for (step, index) in (1..timesteps.len()).rev().enumerate() {
        run.begin(step, &x);
        let update = Update::new(table, timesteps[index], timesteps[index - 1], 0.0);
        history.insert(0, run.denoiser.noise(&x, timesteps[index] as f32)?.guided);
        history.truncate(4);
        let eps = if let [first] = history.as_slice() {
            let end = update.apply(&x, first, first);
            let second = run
                .denoiser
                .noise(&end, timesteps[index - 1] as f32)?
                .guided;
            lincomb(&[(0.5, first), (0.5, &second)])
        } else {
            let weights = adams_bashforth(history.len()).iter().map(|&c| c as f32);
            lincomb(&weights.zip(&history).collect::<Vec<_>>())
        };
        x = update.apply(&x, &eps, &eps);
    }
    Ok(x)
}

/// The coefficients of one DDIM update.
struct Update {
    root: f64,
    noise_root: f64,
    root_next: f64,
    direction: f64,
    /// Standard deviation of the noise to add.
    noise: f64,
}

impl Update {
    fn new(table: &SigmaTable, from: usize, to: usize, eta: f32) -> Self {
        let alpha = f64::from(table.alphas_cumprod()[from]);
        let next = f64::from(table.alphas_cumprod()[to]);
        let noise = f64::from(eta) * ((1.0 - next) / (1.0 - alpha) * (1.0 - alpha / next)).sqrt();
        // An eta above 1 can ask for more noise than there is room for.
        let direction = (1.0 - next - noise * noise).max(0.0).sqrt();
        Self {
            root: alpha.sqrt(),
            noise_root: (1.0 - alpha).sqrt(),
            root_next: next.sqrt(),
            direction,
            noise,
        }
    }

    /// The clean estimate from `eps`, moved to the next level along `direction`.
    fn apply(&self, x: &Latents, eps: &Latents, direction: &Latents) -> Latents {
        let keep = self.root_next / self.root;
        let remove = -keep * self.noise_root;
        lincomb(&[
            (keep as f32, x),
            (remove as f32, eps),
            (self.direction as f32, direction),
        ])
    }
}
