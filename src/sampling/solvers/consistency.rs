//! Samplers of distilled models: jump to clean latents, go back to less noise, repeat.

use super::{Run, steps};
use crate::rng::{Latents, lincomb};
use crate::sampling::{Denoiser, SigmaTable};

/// The standard deviation of data, and the factor on timesteps, of the consistency function of latent consistency models.
const LCM_SIGMA_DATA: f32 = 0.5;
const LCM_TIMESTEP_SCALE: f32 = 10.0;

/// `(c_skip, c_out)` of the consistency function (Luo et al. 2023, appendix B).
pub(in crate::sampling) fn consistency_scalings(timestep: f32) -> (f32, f32) {
    let (scaled, variance) = (
        LCM_TIMESTEP_SCALE * timestep,
        LCM_SIGMA_DATA * LCM_SIGMA_DATA,
    );
    let total = scaled * scaled + variance;
    (variance / total, scaled / total.sqrt())
}

/// Latent consistency models (Luo et al. 2023), algorithm 3: fresh noise on clean latents.
pub(super) fn lcm<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    sigmas: &[f32],
) -> Result<Latents, D::Error> {
    for (i, sigma, next) in steps(sigmas) {
        run.begin(i, &x);
        x = run.denoised(&x, sigma)?;
        if next > 0.0 {
            run.add_noise(&mut x, next);
        }
    }
    Ok(x)
}

/// Trajectory consistency (Zheng et al. 2024, algorithm 4): along the trajectory to a level below the next, then noise up.
///
/// `eta` is the paper's gamma: 0 follows the trajectory, 1 is multistep consistency sampling.
pub(super) fn tcd<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    sigmas: &[f32],
    table: &SigmaTable,
) -> Result<Latents, D::Error> {
    for (i, sigma, next) in steps(sigmas) {
        run.begin(i, &x);
        let denoised = run.denoised(&x, sigma)?;
        if next == 0.0 {
            return Ok(denoised);
        }
        let below = ((1.0 - run.eta) * table.timestep(next)).floor();
        let down = if run.eta == 0.0 {
            next
        } else {
            table.sigma(below).min(next)
        };
        // denoised + down * d
        x = lincomb(&[(down / sigma, &x), (1.0 - down / sigma, &denoised)]);
        run.add_noise(&mut x, (next * next - down * down).sqrt());
    }
    Ok(x)
}
