//! Latents at another size, as torch's `interpolate` does it (`align_corners=False`): hires fix's latent upscalers.
//!
//! Each axis is a table of weighted taps. Without antialiasing taps past the edge repeat it; with antialiasing the kernel
//! widens when shrinking, taps past the edge are left out and the weights are normalised; the cubic kernel is then Keys'
//! with a = -0.5 instead of -0.75, as in torch.

use crate::sampling::Latents;

/// How latents are enlarged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LatentMode {
    /// `Latent`.
    Bilinear,
    /// `Latent (antialiased)`.
    BilinearAntialiased,
    /// `Latent (bicubic)`.
    Bicubic,
    /// `Latent (bicubic antialiased)`.
    BicubicAntialiased,
    /// `Latent (nearest)`.
    Nearest,
    /// `Latent (nearest-exact)`.
    NearestExact,
}

impl LatentMode {
    /// Every mode, in A1111's order.
    pub const ALL: [Self; 6] = [
        Self::Bilinear,
        Self::BilinearAntialiased,
        Self::Bicubic,
        Self::BicubicAntialiased,
        Self::Nearest,
        Self::NearestExact,
    ];

    /// A1111's name.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Bilinear => "Latent",
            Self::BilinearAntialiased => "Latent (antialiased)",
            Self::Bicubic => "Latent (bicubic)",
            Self::BicubicAntialiased => "Latent (bicubic antialiased)",
            Self::Nearest => "Latent (nearest)",
            Self::NearestExact => "Latent (nearest-exact)",
        }
    }

    /// Reads A1111's name.
    #[must_use]
    pub fn find(label: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|mode| mode.label().eq_ignore_ascii_case(label))
    }
}

/// Input indexes with their weights, for one output index.
type Taps = Vec<(usize, f32)>;

/// `latents` at `height` x `width` latent pixels.
#[must_use]
pub fn resample(latents: &Latents, height: usize, width: usize, mode: LatentMode) -> Latents {
    let [batch, channels, from_height, from_width] = latents.shape;
    let (rows, columns) = (
        taps(from_height, height, mode),
        taps(from_width, width, mode),
    );
    let mut data = Vec::with_capacity(batch * channels * height * width);
    let values = latents.data();
    for plane in values.chunks_exact((from_height * from_width).max(1)) {
        let across: Vec<f32> = plane
            .chunks_exact(from_width.max(1))
            .flat_map(|row| {
                columns
                    .iter()
                    .map(|taps| taps.iter().map(|(i, w)| row[*i] * w).sum::<f32>())
            })
            .collect();
        for taps in &rows {
            data.extend((0..width).map(|x| {
                taps.iter()
                    .map(|(i, w)| across[i * width + x] * w)
                    .sum::<f32>()
            }));
        }
    }
    Latents::new(data, [batch, channels, height, width])
}

fn taps(from: usize, to: usize, mode: LatentMode) -> Vec<Taps> {
    let scale = from as f32 / to as f32;
    let last = from.saturating_sub(1);
    (0..to)
        .map(|i| match mode {
            LatentMode::Nearest => vec![(((i as f32 * scale) as usize).min(last), 1.0)],
            LatentMode::NearestExact => {
                vec![((((i as f32 + 0.5) * scale) as usize).min(last), 1.0)]
            }
            LatentMode::Bilinear => {
                let at = ((i as f32 + 0.5) * scale - 0.5).max(0.0);
                let low = (at as usize).min(last);
                let share = at - low as f32;
                vec![(low, 1.0 - share), ((low + 1).min(last), share)]
            }
            LatentMode::Bicubic => {
                let at = (i as f32 + 0.5) * scale - 0.5;
                let low = at.floor();
                let clamped = |k: i64| (low as i64 + k).clamp(0, last as i64) as usize;
                (-1..=2)
                    .map(|k| (clamped(k), cubic(at - low - k as f32, -0.75)))
                    .collect()
            }
            LatentMode::BilinearAntialiased => {
                wide(i, scale, from, 1.0, |x| (1.0 - x.abs()).max(0.0))
            }
            LatentMode::BicubicAntialiased => wide(i, scale, from, 2.0, |x| cubic(x, -0.5)),
        })
        .collect()
}

/// Taps of a kernel of half width `support`, widened by `scale` when shrinking.
fn wide(i: usize, scale: f32, from: usize, support: f32, kernel: impl Fn(f32) -> f32) -> Taps {
    let stretch = scale.max(1.0);
    let center = scale * (i as f32 + 0.5);
    let begin = (center - support * stretch + 0.5).max(0.0) as usize;
    let end = ((center + support * stretch + 0.5) as usize).min(from);
    let weight = |k: usize| kernel((k as f32 + 0.5 - center) / stretch);
    let total: f32 = (begin..end).map(weight).sum();
    (begin..end).map(|k| (k, weight(k) / total)).collect()
}

/// Keys' cubic convolution kernel.
fn cubic(x: f32, a: f32) -> f32 {
    let x = x.abs();
    if x <= 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * a
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_keeps_constants_and_the_same_size_is_the_same_picture() {
        let flat = Latents::new(vec![2.5; 2 * 4 * 5 * 3], [2, 4, 5, 3]);
        let ramp = Latents::new(
            (0..4 * 5 * 3).map(|i| (i % 7) as f32).collect(),
            [1, 4, 5, 3],
        );
        for mode in LatentMode::ALL {
            let larger = resample(&flat, 8, 7, mode);
            assert_eq!(larger.shape, [2, 4, 8, 7]);
            assert!(
                larger.data().iter().all(|v| (v - 2.5).abs() < 1e-5),
                "{mode:?}"
            );
            let same = resample(&ramp, 5, 3, mode);
            assert!(
                same.data()
                    .iter()
                    .zip(ramp.data().iter())
                    .all(|(a, b)| (a - b).abs() < 1e-5),
                "{mode:?}"
            );
            assert_eq!(LatentMode::find(mode.label()), Some(mode));
        }
    }

    #[test]
    fn two_pixels_enlarge_as_in_torch() {
        // torch.nn.functional.interpolate(torch.tensor([[[[0., 1.]]]]), size=(1, 4), mode=...)
        let two = Latents::new(vec![0.0, 1.0], [1, 1, 1, 2]);
        for (mode, want) in [
            (LatentMode::Bilinear, [0.0, 0.25, 0.75, 1.0]),
            (LatentMode::Nearest, [0.0, 0.0, 1.0, 1.0]),
            (LatentMode::NearestExact, [0.0, 0.0, 1.0, 1.0]),
            (
                LatentMode::Bicubic,
                [-0.105_468_75, 0.226_562_5, 0.773_437_5, 1.105_468_8],
            ),
        ] {
            let got = resample(&two, 1, 4, mode);
            assert!(
                got.data()
                    .iter()
                    .zip(want)
                    .all(|(g, w)| (g - w).abs() < 1e-6),
                "{mode:?}: {:?}",
                got.data()
            );
        }
    }
}
