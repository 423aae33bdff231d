//! Soft inpainting: how far a result differs from what it was painted over decides how much of the original is put back.
//!
//! Follows A1111's `soft_inpainting.py` (pipeline specification, 7.6). The blend during denoising is [`SoftBlend`]'s; this is the
//! end: the distance of the latents, made robust by two passes of a weighted rank filter, becomes an opacity.

use image::GrayImage;

use crate::imaging::infotext::Params;
use crate::sampling::{Latents, SoftBlend};

/// Soft inpainting's settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SoftInpainting {
    /// How kept and painted latents are mixed at each call.
    pub blend: SoftBlend,
    /// How far the mask decides what is put back, 0 to 1; the rest is decided by the difference.
    pub mask_influence: f32,
    /// Latent distance at which half of the original is put back.
    pub difference_threshold: f32,
    /// Steepness of the change between original and result.
    pub difference_contrast: f32,
}

/// A1111's defaults.
impl Default for SoftInpainting {
    fn default() -> Self {
        Self {
            blend: SoftBlend {
                power: 1.0,
                scale: 0.5,
                contrast: 4.0,
            },
            mask_influence: 0.0,
            difference_threshold: 0.5,
            difference_contrast: 2.0,
        }
    }
}

impl SoftInpainting {
    /// The infotext keys.
    pub(super) fn infotext(&self) -> Params {
        let mut p = Params::new();
        p.insert("Soft inpainting enabled", true);
        for (key, value) in [
            ("schedule bias", self.blend.power),
            ("preservation strength", self.blend.scale),
            ("transition contrast boost", self.blend.contrast),
            ("mask influence", self.mask_influence),
            ("difference threshold", self.difference_threshold),
            ("difference contrast", self.difference_contrast),
        ] {
            p.insert(format!("Soft inpainting {key}"), value);
        }
        p
    }

    /// Where the result is to be seen, 0 to 255 for each latent pixel of picture `index`. `paint` is the latent mask, 1 where
    /// painted; `before` and `after` the latents.
    pub(super) fn opacity(
        &self,
        index: usize,
        paint: &Latents,
        before: &Latents,
        after: &[f32],
    ) -> GrayImage {
        let [_, channels, height, width] = before.shape;
        let area = height * width;
        let image = |latents: &Latents| {
            let at = index.min(latents.shape[0] - 1) * channels * area;
            latents.data()[at..at + channels * area].to_vec()
        };
        let (paint, before) = (image(paint), image(before));
        let distance: Vec<f32> = (0..area)
            .map(|pixel| {
                let of = |c: usize| after[c * area + pixel] - before[c * area + pixel];
                (0..channels).map(|c| of(c) * of(c)).sum::<f32>().sqrt()
            })
            .collect();
        let brightest = rank_filter(&distance, width, (0.9, 1.0));
        let typical = rank_filter(&brightest, width, (0.25, 0.75));
        let bytes = typical.iter().zip(&paint).map(|(distance, paint)| {
            let half = self.difference_threshold * self.mask_scale(*paint);
            let kept = 1.0 / (1.0 + (distance / half).powf(self.difference_contrast));
            (255.0 * (1.0 - smootherstep(kept))) as u8
        });
        GrayImage::from_raw(width as u32, height as u32, bytes.collect())
            .expect("one value for each latent pixel")
    }

    /// Factor on the distance that hides half of the original.
    fn mask_scale(&self, paint: f32) -> f32 {
        let covered = 1.0 - paint.clamp(0.0, 1.0).powf(self.blend.scale / 2.0);
        let scale = 0.5 * (1.0 - self.mask_influence) + covered * self.mask_influence;
        scale / (1.00001 - scale)
    }
}

/// Perlin's step of fifth degree.
fn smootherstep(x: f32) -> f32 {
    x * x * x * (x * (6.0 * x - 15.0) + 10.0)
}

/// Side of the rank filter's window, pixels.
const WINDOW: usize = 5;
/// Least part of the sorted weights that is averaged.
const LEAST_WIDTH: f64 = 1.0;

/// Replaces each value by the average of those around it whose share of the sorted weights lies within `percentiles`.
fn rank_filter(values: &[f32], width: usize, percentiles: (f64, f64)) -> Vec<f32> {
    let height = values.len() / width.max(1);
    let reach = WINDOW / 2;
    let mut window: Vec<(f32, f64)> = Vec::with_capacity(WINDOW * WINDOW);
    let mut filtered = Vec::with_capacity(values.len());
    for y in 0..height {
        for x in 0..width {
            window.clear();
            for row in y.saturating_sub(reach)..(y + reach + 1).min(height) {
                for column in x.saturating_sub(reach)..(x + reach + 1).min(width) {
                    let weight = kernel(row.abs_diff(y), column.abs_diff(x));
                    window.push((values[row * width + column], weight));
                }
            }
            window.sort_by(|a, b| a.0.total_cmp(&b.0));
            filtered.push(ranked_mean(&window, percentiles));
        }
    }
    filtered
}

/// A Gaussian of standard radius 1.5 that reaches 0 at three pixels.
fn kernel(dy: usize, dx: usize) -> f64 {
    let gaussian = |squared: f64| (-squared / 2.25).exp();
    let floor = gaussian(9.0);
    ((gaussian((dy * dy + dx * dx) as f64) - floor) / (1.0 - floor)).max(0.0)
}

/// Mean of sorted, weighted values within a part of the stack of their weights.
fn ranked_mean(sorted: &[(f32, f64)], (low, high): (f64, f64)) -> f32 {
    let total: f64 = sorted.iter().map(|(_, weight)| weight).sum();
    let (mut start, mut end) = (total * low, total * high);
    if end - start < LEAST_WIDTH {
        let middle = f64::midpoint(start, end);
        (start, end) = (middle - LEAST_WIDTH / 2.0, middle + LEAST_WIDTH / 2.0);
        if end > total {
            (start, end) = (total - LEAST_WIDTH, total);
        }
        if start < 0.0 {
            (start, end) = (0.0, LEAST_WIDTH);
        }
    }
    let (mut below, mut sum, mut taken) = (0.0, 0.0, 0.0);
    for (value, weight) in sorted {
        let part = (end.min(below + weight) - start.max(below)).max(0.0);
        sum += f64::from(*value) * part;
        taken += part;
        below += weight;
    }
    if taken == 0.0 {
        0.0
    } else {
        (sum / taken) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_is_part_of_the_sorted_weights() {
        let sorted = [(1.0, 1.0), (2.0, 1.0), (5.0, 2.0)];
        // A quarter to three quarters of 4: one of the twos, one of the fives.
        assert!((ranked_mean(&sorted, (0.25, 0.75)) - 3.5).abs() < 1e-6);
        // The last tenth is narrower than 1 and grows downwards.
        assert!((ranked_mean(&sorted, (0.9, 1.0)) - 5.0).abs() < 1e-6);
        assert!((ranked_mean(&[(3.0, 0.25)], (0.9, 1.0)) - 3.0).abs() < 1e-6);
    }

    #[test]
    fn a_single_bright_pixel_shines_as_far_as_its_weight_reaches_one() {
        let mut values = vec![0.0; 49];
        values[24] = 9.0;
        let bright = rank_filter(&values, 7, (0.9, 1.0));
        assert!(
            (bright[24] - 9.0).abs() < 1e-6 || bright[24] > 5.0,
            "{}",
            bright[24]
        );
        assert!(bright[0] < 1e-6 && bright[24 + 3] < 1e-6);
    }

    #[test]
    fn what_has_not_changed_is_put_back_and_what_has_is_not() {
        let shape = [1, 4, 6, 6];
        let before = Latents::zeros(shape);
        let paint = before.map(|_| 1.0);
        let settings = SoftInpainting::default();
        let same = settings.opacity(0, &paint, &before, &before.data());
        assert!(same.pixels().all(|p| p[0] == 0));
        let far = before.map(|_| 5.0);
        let changed = settings.opacity(0, &paint, &before, &far.data());
        assert!(
            changed.pixels().all(|p| p[0] == 254 || p[0] == 255),
            "{changed:?}"
        );
    }
}
