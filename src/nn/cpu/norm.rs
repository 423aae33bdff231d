//! Group norm (with `SiLU`) and layer norm on channels-last values; weights and sums are `f32` whatever the values are.
//!
//! Sums are taken per channel relative to the channel's first pixel, in `f32` over short runs and `f64` across them,
//! so a large mean does not eat the variance.
#![allow(
    unsafe_code,
    reason = "calls of `Simd` methods on slices whose sizes are asserted"
)]

use super::element::Element;
use super::math::silu;
use super::simd::Simd;
use super::{Isa, Kernel, Shared, for_each_task};

/// Pixels summed in `f32` before they join the `f64` sums.
const RUN: usize = 64;
/// Pixels of one task.
const PIXELS_PER_TASK: usize = 1024;

/// Shape and constants of a group norm over `[batch, pixels, channels]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Groups {
    pub(crate) batch: usize,
    pub(crate) pixels: usize,
    pub(crate) channels: usize,
    pub(crate) count: usize,
    pub(crate) eps: f32,
    pub(crate) silu: bool,
}

/// `out = (x - mean) / sqrt(var + eps) * weight + bias`, per group of neighbouring channels, then `SiLU` if asked.
pub(crate) fn group_norm<E: Element>(
    isa: Isa,
    x: &[E],
    weight: &[f32],
    bias: &[f32],
    g: Groups,
    out: &mut [E],
) {
    let (c, per_image) = (g.channels, g.pixels * g.channels);
    assert_eq!(x.len(), g.batch * per_image, "group norm: input size");
    assert_eq!(out.len(), x.len(), "group norm: output size");
    assert!(
        weight.len() == c && bias.len() == c && c.is_multiple_of(g.count),
        "group norm: channels"
    );
    let tasks = g.pixels.div_ceil(PIXELS_PER_TASK);
    let rows = |t: usize| {
        let from = t * PIXELS_PER_TASK;
        from * c..(from + PIXELS_PER_TASK).min(g.pixels) * c
    };

    // What is summed is the difference to the image's first pixel.
    let firsts = x.chunks_exact(per_image.max(1));
    let origins: Vec<f32> = firsts
        .flat_map(|image| image[..c].iter().map(|x| x.to_f32()))
        .collect();
    let mut sums = vec![0f64; g.batch * tasks * 2 * c];
    let shared = Shared::new(&mut sums);
    for_each_task(g.batch * tasks, x.len(), |t| {
        let image = &x[t / tasks * per_image..][..per_image];
        // SAFETY: one part per task.
        let sums = unsafe { shared.part(t * 2 * c, 2 * c) };
        isa.run(Sums {
            x: &image[rows(t % tasks)],
            origin: &origins[t / tasks * c..][..c],
            out: sums,
        });
    });

    let mut affine = vec![0f32; g.batch * 2 * c];
    let images = sums
        .chunks_exact(tasks * 2 * c)
        .zip(origins.chunks_exact(c));
    for ((sums, origin), affine) in images.zip(affine.chunks_exact_mut(2 * c)) {
        affine_of_image(sums, origin, weight, g, affine);
    }

    let shared = Shared::new(out);
    for_each_task(g.batch * tasks, x.len(), |t| {
        let image = t / tasks;
        let range = rows(t % tasks);
        // SAFETY: one part per task.
        let out = unsafe { shared.part(image * per_image + range.start, range.len()) };
        let (mean, scale) = affine[image * 2 * c..][..2 * c].split_at(c);
        isa.run(Apply {
            x: &x[image * per_image..][range],
            mean,
            scale,
            bias,
            silu: g.silu,
            out,
        });
    });
}

/// Per-channel sums of `x - origin` and of its square over all pixels of `x`: sums, then squares.
pub(crate) fn channel_sums<E: Element>(isa: Isa, x: &[E], origin: &[f32]) -> Vec<f64> {
    let c = origin.len();
    assert!(c > 0 && x.len().is_multiple_of(c), "channel sums: size");
    let part = PIXELS_PER_TASK * c;
    let tasks = x.len().div_ceil(part);
    let mut sums = vec![0f64; tasks * 2 * c];
    let shared = Shared::new(&mut sums);
    for_each_task(tasks, x.len(), |t| {
        // SAFETY: one part per task.
        let out = unsafe { shared.part(t * 2 * c, 2 * c) };
        let x = &x[t * part..((t + 1) * part).min(x.len())];
        isa.run(Sums { x, origin, out });
    });
    let mut total = vec![0f64; 2 * c];
    for part in sums.chunks_exact(2 * c) {
        total.iter_mut().zip(part).for_each(|(t, p)| *t += p);
    }
    total
}

/// `out = (x - mean) * scale + bias` per channel (`affine` = means, then scales), then `SiLU` if asked.
pub(crate) fn apply<E: Element>(
    isa: Isa,
    x: &[E],
    affine: &[f32],
    bias: &[f32],
    silu: bool,
    out: &mut [E],
) {
    let c = bias.len();
    assert!(
        affine.len() == 2 * c && x.len() == out.len() && x.len().is_multiple_of(c.max(1)),
        "group norm: sizes"
    );
    let (mean, scale) = affine.split_at(c);
    let part = PIXELS_PER_TASK * c;
    let shared = Shared::new(out);
    for_each_task(x.len().div_ceil(part.max(1)), x.len(), |t| {
        let x = &x[t * part..((t + 1) * part).min(x.len())];
        // SAFETY: one part per task.
        let out = unsafe { shared.part(t * part, x.len()) };
        isa.run(Apply {
            x,
            mean,
            scale,
            bias,
            silu,
            out,
        });
    });
}

/// Folds the sums of one image into `y = (x - mean) * scale + bias` per channel (`affine` = means, then scales).
///
/// The mean stays apart: folded into the bias it would cancel badly where a group hardly varies.
pub(crate) fn affine_of_image(
    sums: &[f64],
    origin: &[f32],
    weight: &[f32],
    g: Groups,
    affine: &mut [f32],
) {
    let c = g.channels;
    let mut total = vec![0f64; 2 * c];
    for part in sums.chunks_exact(2 * c) {
        total.iter_mut().zip(part).for_each(|(t, p)| *t += p);
    }
    let n = g.pixels as f64;
    let per_group = c / g.count;
    for group in 0..g.count {
        let channels = group * per_group..(group + 1) * per_group;
        let channel_mean = |i: usize| f64::from(origin[i]) + total[i] / n;
        let mean = channels.clone().map(channel_mean).sum::<f64>() / per_group as f64;
        let variance = channels
            .clone()
            .map(|i| {
                (total[c + i] - total[i] * total[i] / n) / n + (channel_mean(i) - mean).powi(2)
            })
            .sum::<f64>()
            / per_group as f64;
        let inverse = 1.0 / (variance + f64::from(g.eps)).sqrt();
        for i in channels {
            affine[i] = mean as f32;
            affine[c + i] = (inverse * f64::from(weight[i])) as f32;
        }
    }
}

/// Per-channel sums of `x - origin` and its square.
struct Sums<'a, E> {
    x: &'a [E],
    origin: &'a [f32],
    out: &'a mut [f64],
}

impl<E: Element> Kernel for Sums<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self) {
        let c = self.origin.len();
        for run in self.x.chunks(RUN * c) {
            let mut at = 0;
            while at < c {
                // Several vectors at once, so that a pixel's cache lines are read in a row.
                let vectors = if at + WIDE * S::LANES <= c { WIDE } else { 1 };
                // SAFETY: `at + vectors * LANES <= c`, or one vector is cut at `c`; each pixel of the run holds `c` values.
                unsafe {
                    if vectors == WIDE {
                        self.columns::<S, WIDE>(run, at, S::LANES);
                    } else {
                        self.columns::<S, 1>(run, at, S::LANES.min(c - at));
                    }
                }
                at += vectors * S::LANES;
            }
        }
    }
}

/// Vectors of channels summed at once.
const WIDE: usize = 4;

impl<E: Element> Sums<'_, E> {
    /// Adds `N` vectors of channels from `at` on, the last `width` lanes wide.
    #[inline(always)]
    unsafe fn columns<S: Simd, const N: usize>(&mut self, run: &[E], at: usize, width: usize) {
        let c = self.origin.len();
        let (sum, square) = self.out.split_at_mut(c);
        // SAFETY: see `run`.
        unsafe {
            let read = |p: *const E, j: usize| E::load_up_to::<S>(p.add(at + j * S::LANES), width);
            let origin: [S::V; N] = std::array::from_fn(|j| {
                f32::load_up_to::<S>(self.origin.as_ptr().add(at + j * S::LANES), width)
            });
            let mut sums = [[S::splat(0.0); 2]; N];
            for pixel in run.chunks_exact(c) {
                for (j, [s, q]) in sums.iter_mut().enumerate() {
                    let d = S::sub(read(pixel.as_ptr(), j), origin[j]);
                    *s = S::add(*s, d);
                    *q = S::fma(d, d, *q);
                }
            }
            for (j, [s, q]) in sums.into_iter().enumerate() {
                let mut lanes = [[0f32; 16]; 2];
                S::store(lanes[0].as_mut_ptr(), s);
                S::store(lanes[1].as_mut_ptr(), q);
                for i in 0..width {
                    sum[at + j * S::LANES + i] += f64::from(lanes[0][i]);
                    square[at + j * S::LANES + i] += f64::from(lanes[1][i]);
                }
            }
        }
    }
}

/// `out = (x - mean) * scale + bias`, then `SiLU` if asked, pixel by pixel.
struct Apply<'a, E> {
    x: &'a [E],
    mean: &'a [f32],
    scale: &'a [f32],
    bias: &'a [f32],
    silu: bool,
    out: &'a mut [E],
}

impl<E: Element> Kernel for Apply<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let c = self.scale.len();
        for (x, out) in self.x.chunks_exact(c).zip(self.out.chunks_exact_mut(c)) {
            let mut at = 0;
            while at < c {
                let width = S::LANES.min(c - at);
                // SAFETY: `at + width <= c`, the length of all five.
                unsafe {
                    let read = |p: &[f32]| f32::load_up_to::<S>(p.as_ptr().add(at), width);
                    let x = E::load_up_to::<S>(x.as_ptr().add(at), width);
                    let mut y = S::fma(
                        S::sub(x, read(self.mean)),
                        read(self.scale),
                        read(self.bias),
                    );
                    if self.silu {
                        y = silu::<S>(y);
                    }
                    E::store_up_to::<S>(out.as_mut_ptr().add(at), y, width);
                }
                at += S::LANES;
            }
        }
    }
}

/// Layer norm over the last axis of `[rows, weight.len()]`.
pub(crate) fn layer_norm<E: Element>(
    isa: Isa,
    x: &[E],
    weight: &[f32],
    bias: &[f32],
    eps: f32,
    out: &mut [E],
) {
    let c = weight.len();
    assert!(
        bias.len() == c && x.len() == out.len() && x.len().is_multiple_of(c),
        "layer norm: sizes"
    );
    let rows = x.len() / c;
    let per_task = rows.div_ceil(4 * rayon::current_num_threads()).max(1);
    let shared = Shared::new(out);
    for_each_task(rows.div_ceil(per_task), x.len(), |t| {
        let from = t * per_task * c;
        let len = (per_task * c).min(x.len() - from);
        // SAFETY: one part per task.
        let out = unsafe { shared.part(from, len) };
        isa.run(Layer {
            x: &x[from..from + len],
            weight,
            bias,
            eps,
            out,
        });
    });
}

struct Layer<'a, E> {
    x: &'a [E],
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f32,
    out: &'a mut [E],
}

impl<E: Element> Kernel for Layer<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let c = self.weight.len();
        for (x, out) in self.x.chunks_exact(c).zip(self.out.chunks_exact_mut(c)) {
            let n = c as f32;
            let mean = sum::<S, E, false>(x, 0.0) / n;
            let variance = sum::<S, E, true>(x, mean) / n;
            let inverse = 1.0 / (variance + self.eps).sqrt();
            let mut at = 0;
            while at < c {
                let width = S::LANES.min(c - at);
                // SAFETY: `at + width <= c`, the length of all four.
                unsafe {
                    let read = |p: &[f32]| f32::load_up_to::<S>(p.as_ptr().add(at), width);
                    let x = E::load_up_to::<S>(x.as_ptr().add(at), width);
                    let normal = S::mul(S::sub(x, S::splat(mean)), S::splat(inverse));
                    let y = S::fma(normal, read(self.weight), read(self.bias));
                    E::store_up_to::<S>(out.as_mut_ptr().add(at), y, width);
                }
                at += S::LANES;
            }
        }
    }
}

/// Vectors summed side by side: as many as an addition takes cycles.
const SIDE_BY_SIDE: usize = 4;

/// Sum of `x - origin` over a row, or of its squares.
#[inline(always)]
fn sum<S: Simd, E: Element, const SQUARED: bool>(x: &[E], origin: f32) -> f32 {
    let step = SIDE_BY_SIDE * S::LANES;
    let whole = x.len() / step * step;
    // SAFETY: register arithmetic, and reads of `SIDE_BY_SIDE * LANES` values below `whole`, so below `len`.
    let total = unsafe {
        let from = S::splat(origin);
        let mut sums = [S::splat(0.0); SIDE_BY_SIDE];
        for at in (0..whole).step_by(step) {
            for (j, sum) in sums.iter_mut().enumerate() {
                let d = S::sub(E::load::<S>(x.as_ptr().add(at + j * S::LANES)), from);
                *sum = if SQUARED {
                    S::fma(d, d, *sum)
                } else {
                    S::add(*sum, d)
                };
            }
        }
        S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])))
    };
    let rest = x[whole..].iter().map(|x| x.to_f32() - origin);
    total + rest.map(|d| if SQUARED { d * d } else { d }).sum::<f32>()
}
