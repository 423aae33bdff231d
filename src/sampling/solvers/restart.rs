//! Restart sampling (Xu et al. 2023, arXiv 2306.14878): Heun's method that goes back up to more noise now and then.

use super::heun::heun_step;
use super::{Run, steps};
use crate::rng::Latents;
use crate::sampling::Denoiser;
use crate::sampling::scheduler::karras;

/// Fewest steps for which a restart is worth its cost.
const MIN_STEPS: usize = 20;
/// From here on there are two restarts of a quarter of the steps.
const TWO_RESTARTS: usize = 36;
/// The restart goes from near this sigma back up to near the second.
const RESTART_FROM: f32 = 0.1;
const RESTART_TO: f32 = 2.0;

/// Heun steps over [`segments`], with fresh noise where the noise level jumps up.
pub(super) fn restart<D: Denoiser>(
    run: &mut Run<'_, D>,
    mut x: Latents,
    sigmas: &[f32],
) -> Result<Latents, D::Error> {
    let mut level = f32::INFINITY;
    for (i, (sigma, next)) in segments(sigmas).into_iter().enumerate() {
        if level < sigma {
            run.add_noise(&mut x, (sigma * sigma - level * level).sqrt());
        }
        run.begin(i, &x);
        x = heun_step(run, x, sigma, next)?;
        level = next;
    }
    Ok(x)
}

/// The steps to make, `(from, to)`: the schedule itself, or a shorter one of Karras and the restarts that fill it up.
fn segments(sigmas: &[f32]) -> Vec<(f32, f32)> {
    let pairs = |sigmas: &[f32]| {
        steps(sigmas)
            .map(|(_, from, to)| (from, to))
            .collect::<Vec<_>>()
    };
    let count = sigmas.len() - 1;
    if count < MIN_STEPS {
        return pairs(sigmas);
    }
    let (length, times) = if count >= TWO_RESTARTS {
        (count / 4, 2)
    } else {
        (9, 1)
    };
    let mut main = karras(count - length * times, sigmas[count - 1], sigmas[0], 7.0);
    main.push(0.0);
    let mut all = pairs(&main);
    let (low, high) = (nearest(&main, RESTART_FROM), nearest(&main, RESTART_TO));
    if high < low {
        let again = pairs(&karras(length + 1, main[low], main[high], 7.0));
        all.splice(low..low, again.repeat(times));
    }
    all
}

fn nearest(sigmas: &[f32], to: f32) -> usize {
    let distance = |&i: &usize| (sigmas[i] - to).abs();
    (0..sigmas.len())
        .min_by(|a, b| distance(a).total_cmp(&distance(b)))
        .unwrap_or(0)
}
