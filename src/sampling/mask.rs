//! Inpainting: keeping a part of the picture while the rest is denoised.
//!
//! Invariant: the kept latents carry no noise, so they are blended into *denoised* latents (or, by the samplers that count in
//! timesteps, into the latents before a call, as A1111 does it). Soft blending follows A1111's `soft_inpainting.py`.

use crate::rng::Latents;

/// A part of the picture that is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Mask {
    /// 1 where the picture is painted anew, 0 where it is kept; shaped like the latents.
    pub paint: Latents,
    /// The kept latents, without noise.
    pub init: Latents,
    /// How the two meet; `None` adds them up.
    pub soft: Option<SoftBlend>,
}

/// Soft inpainting: the mask widens as noise falls, and a mixture keeps the length of its parts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SoftBlend {
    /// Exponent of sigma (`schedule bias`).
    pub power: f32,
    /// Factor on it (`preservation strength`).
    pub scale: f32,
    /// Exponent of the length average (`transition contrast boost`).
    pub contrast: f32,
}

impl Mask {
    /// `x` where the picture is painted, the kept latents elsewhere.
    pub(super) fn blend(&self, x: &Latents, sigma: f32) -> Latents {
        match self.soft {
            None => self
                .paint
                .zip(&(x - &self.init), |paint, change| paint * change)
                .zip(&self.init, |a, b| a + b),
            Some(soft) => soft.blend(self, x, sigma),
        }
    }
}

impl Mask {
    /// A run's result with the kept part put back to the bit, unless the blend was soft and has mixed it already.
    #[must_use]
    pub fn restore(&self, latents: Latents) -> Latents {
        if self.soft.is_some() {
            return latents;
        }
        let kept = self.init.zip(&self.paint, |z, p| z * (1.0 - p));
        &latents.zip(&self.paint, |x, p| x * p) + &kept
    }
}

impl SoftBlend {
    /// Mixes by `paint ^ (sigma ^ power * scale)` and restores the vectors' length over channels.
    fn blend(self, mask: &Mask, x: &Latents, sigma: f32) -> Latents {
        let [batch, channels, height, width] = x.shape;
        let area = height * width;
        let exponent = f64::from(sigma).powf(f64::from(self.power)) * f64::from(self.scale);
        let contrast = f64::from(self.contrast);
        let (paint, init, x_values) = (mask.paint.data(), mask.init.data(), x.data());
        let mut mixed = x.clone().into_host();
        let values = mixed.data_mut();
        for (image, pixel) in
            (0..batch).flat_map(|image| (0..area).map(move |pixel| (image, pixel)))
        {
            let at = |channel: usize| (image * channels + channel) * area + pixel;
            let length = |data: &[f32]| {
                (0..channels)
                    .map(|c| f64::from(data[at(c)]).powi(2))
                    .sum::<f64>()
                    .sqrt()
            };
            let share = f64::from(paint[at(0)]).powf(exponent);
            for index in (0..channels).map(at) {
                let (kept, painted) = (f64::from(init[index]), f64::from(x_values[index]));
                values[index] = (kept * (1.0 - share) + painted * share) as f32;
            }
            let (kept, painted) = (length(&init), length(&x_values));
            let wanted = kept.powf(contrast) * (1.0 - share) + painted.powf(contrast) * share;
            let factor = wanted.powf(1.0 / contrast) / (length(values) + 1e-5);
            for index in (0..channels).map(at) {
                values[index] = (f64::from(values[index]) * factor) as f32;
            }
        }
        mixed
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "kept values are copied")]
mod tests {
    use super::*;

    fn latents(values: [f32; 4]) -> Latents {
        Latents::new(values.to_vec(), [1, 2, 1, 2])
    }

    #[test]
    fn a_hard_mask_keeps_and_paints() {
        let mask = Mask {
            paint: latents([0.0, 1.0, 0.0, 1.0]),
            init: latents([5.0; 4]),
            soft: None,
        };
        assert_eq!(
            mask.blend(&latents([1.0, 2.0, 3.0, 4.0]), 1.0).data(),
            vec![5.0, 2.0, 5.0, 4.0]
        );
    }

    #[test]
    fn a_soft_mask_keeps_the_length_of_the_vectors_it_mixes() {
        let soft = Some(SoftBlend {
            power: 1.0,
            scale: 0.5,
            contrast: 4.0,
        });
        // Two pixels of two channels: (3, 4) kept against (4, -3) painted, and fully painted (1, 1).
        let mask = Mask {
            paint: latents([0.25, 1.0, 0.25, 1.0]),
            init: latents([3.0, 0.0, 4.0, 0.0]),
            soft,
        };
        let mixed = mask.blend(&latents([4.0, 1.0, -3.0, 1.0]), 1.0).into_data();
        // 0.25^(1 * 0.5) = 0.5 of each; both have length 5 and so has the mixture.
        assert!((mixed[0].hypot(mixed[2]) - 5.0).abs() < 1e-3, "{mixed:?}");
        assert!((mixed[0] / mixed[2] - 7.0).abs() < 1e-4, "{mixed:?}");
        assert!(
            (mixed[1] - 1.0).abs() < 1e-4 && (mixed[3] - 1.0).abs() < 1e-4,
            "{mixed:?}"
        );
    }
}
