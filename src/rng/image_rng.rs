//! The noise of one batch: one generator per picture, variation seeds, and noise pasted from another size.
//!
//! Invariant: picture `i` of a batch has the noise it would have alone with seed `seeds[i]`. After the first call every
//! generator has been advanced by exactly one draw. Follows `ImageRNG` of A1111's `rng.py`.

use super::{Generator, Latents, NoiseSource};

/// What the noise of a batch depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageRngConfig {
    /// The generator.
    pub source: NoiseSource,
    /// `[channels, height, width]` in latent pixels.
    pub shape: [usize; 3],
    /// One seed per picture.
    pub seeds: Vec<u64>,
    /// Variation seeds, one per picture; a missing one counts as 0.
    pub subseeds: Vec<u64>,
    /// 0 = off, 1 = only the variation seed.
    pub subseed_strength: f32,
    /// `(width, height)` in pixels of the picture whose noise is pasted into the middle.
    pub seed_resize_from: Option<(usize, usize)>,
    /// Added to every seed for the draws after the first (`eta_noise_seed_delta`, "ENSD").
    pub eta_noise_seed_delta: i64,
}

/// Noise for a batch of pictures.
#[derive(Debug, Clone)]
pub struct ImageRng {
    config: ImageRngConfig,
    generators: Vec<Generator>,
    started: bool,
}

impl ImageRng {
    /// One fresh generator per seed.
    #[must_use]
    pub fn new(config: ImageRngConfig) -> Self {
        let generators = config
            .seeds
            .iter()
            .map(|&seed| Generator::new(config.source, seed))
            .collect();
        Self {
            config,
            generators,
            started: false,
        }
    }

    /// What this noise was made from.
    #[must_use]
    pub fn config(&self) -> &ImageRngConfig {
        &self.config
    }

    /// The initial noise, `[pictures, channels, height, width]`.
    pub fn first(&mut self) -> Latents {
        self.started = true;
        let mut data = Vec::new();
        for i in 0..self.config.seeds.len() {
            data.extend(self.first_of(i));
        }
        let delta = self.config.eta_noise_seed_delta;
        if delta != 0 {
            let shifted = self
                .config
                .seeds
                .iter()
                .map(|seed| seed.wrapping_add_signed(delta));
            self.generators = shifted
                .map(|seed| Generator::new(self.config.source, seed))
                .collect();
        }
        self.stack(data)
    }

    /// The next noise of the batch; the first call equals [`ImageRng::first`].
    pub fn next_noise(&mut self) -> Latents {
        if !self.started {
            return self.first();
        }
        let n = self.config.shape.iter().product();
        let data = self
            .generators
            .iter_mut()
            .flat_map(|generator| generator.normals(n))
            .collect();
        self.stack(data)
    }

    fn stack(&self, data: Vec<f32>) -> Latents {
        let [channels, height, width] = self.config.shape;
        Latents::new(data, [self.config.seeds.len(), channels, height, width])
    }

    fn first_of(&mut self, i: usize) -> Vec<f32> {
        let ImageRngConfig {
            source,
            shape,
            subseed_strength: strength,
            ..
        } = self.config;
        let from = match self.config.seed_resize_from {
            Some((width, height)) if width > 0 && height > 0 => [shape[0], height / 8, width / 8],
            _ => shape,
        };
        let count = |shape: [usize; 3]| shape.iter().product::<usize>();
        let own = |rng: &mut Self| rng.generators[i].normals(count(shape));
        let mut noise = if from == shape {
            own(self)
        } else {
            Generator::new(source, self.config.seeds[i]).normals(count(from))
        };
        if strength != 0.0 {
            let subseed = self.config.subseeds.get(i).copied().unwrap_or(0);
            let variation = Generator::new(source, subseed).normals(count(from));
            noise = slerp(strength, &noise, &variation, from);
        }
        if from == shape {
            return noise;
        }
        let mut canvas = own(self);
        paste_centred(&mut canvas, shape, &noise, from);
        canvas
    }
}

/// Copies the middle of `noise` into the middle of `canvas`; both `[channels, height, width]`.
fn paste_centred(canvas: &mut [f32], shape: [usize; 3], noise: &[f32], from: [usize; 3]) {
    let [channels, height, width] = shape;
    let [_, from_height, from_width] = from;
    // (offset in canvas, offset in noise, length) along one axis; a negative difference is floored like Python's `//`.
    let axis = |outer: usize, inner: usize| {
        let shift = (outer as i64 - inner as i64).div_euclid(2);
        let len = if shift >= 0 {
            inner as i64
        } else {
            inner as i64 + 2 * shift
        };
        let (to, from) = (shift.max(0) as usize, (-shift).max(0) as usize);
        (
            to,
            from,
            (len.max(0) as usize).min(outer - to).min(inner - from),
        )
    };
    let (to_y, from_y, rows) = axis(height, from_height);
    let (to_x, from_x, columns) = axis(width, from_width);
    for channel in 0..channels {
        for row in 0..rows {
            let to = (channel * height + to_y + row) * width + to_x;
            let source = (channel * from_height + from_y + row) * from_width + from_x;
            canvas[to..to + columns].copy_from_slice(&noise[source..source + columns]);
        }
    }
}

/// Spherical interpolation from `low` (`t` = 0) to `high` (`t` = 1), both `[channels, height, width]`.
///
/// A1111 interpolates each column of each channel on its own, and for nearly parallel noises linearly with the ends swapped;
/// both are kept because pictures depend on them.
///
/// # Panics
/// If the slices do not hold `shape`.
#[must_use]
pub fn slerp(t: f32, low: &[f32], high: &[f32], shape: [usize; 3]) -> Vec<f32> {
    let [channels, height, width] = shape;
    assert!(
        low.len() == channels * height * width && high.len() == low.len(),
        "noise of shape {shape:?}"
    );
    let t = f64::from(t);
    let columns: Vec<usize> = (0..channels)
        .flat_map(|c| (0..width).map(move |x| c * height * width + x))
        .collect();
    let sum = |a: &[f32], b: &[f32], start: usize| -> f64 {
        (0..height)
            .map(|y| f64::from(a[start + y * width]) * f64::from(b[start + y * width]))
            .sum()
    };
    let cosine = |&start: &usize| {
        sum(low, high, start) / (sum(low, low, start) * sum(high, high, start)).sqrt()
    };
    let cosines: Vec<f64> = columns.iter().map(cosine).collect();
    let linear = cosines.iter().sum::<f64>() / cosines.len() as f64 > 0.9995;
    let mut result = vec![0.0; low.len()];
    for (&start, &cosine) in columns.iter().zip(&cosines) {
        let omega = cosine.clamp(-1.0, 1.0).acos();
        let (a, b) = match omega.sin() {
            _ if linear => (t, 1.0 - t),
            // Parallel columns have no arc to follow (torch would give NaN).
            sine if sine < 1e-7 => (1.0 - t, t),
            sine => (((1.0 - t) * omega).sin() / sine, (t * omega).sin() / sine),
        };
        for index in (0..height).map(|y| start + y * width) {
            result[index] = (a * f64::from(low[index]) + b * f64::from(high[index])) as f32;
        }
    }
    result
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "copied values are equal")]
mod tests {
    use super::*;

    fn config(seeds: &[u64]) -> ImageRngConfig {
        ImageRngConfig {
            source: NoiseSource::Nv,
            shape: [4, 6, 5],
            seeds: seeds.to_vec(),
            subseeds: vec![100, 101],
            subseed_strength: 0.3,
            seed_resize_from: None,
            eta_noise_seed_delta: 0,
        }
    }

    #[test]
    fn a_batch_of_two_equals_two_singles() {
        let mut both = ImageRng::new(config(&[5, 6]));
        let mut single = ImageRng::new(ImageRngConfig {
            subseeds: vec![101],
            ..config(&[6])
        });
        for _ in 0..3 {
            assert_eq!(
                both.next_noise().images().nth(1),
                single.next_noise().images().next()
            );
        }
    }

    #[test]
    fn slerp_ends_are_its_arguments() {
        let shape = [2, 7, 3];
        let a = Generator::new(NoiseSource::Nv, 1).normals(42);
        let b = Generator::new(NoiseSource::Nv, 2).normals(42);
        for (t, end) in [(0.0, &a), (1.0, &b)] {
            let mixed = slerp(t, &a, &b, shape);
            assert!(
                mixed.iter().zip(end).all(|(x, y)| (x - y).abs() < 1e-6),
                "t = {t}"
            );
        }
        assert_eq!(slerp(0.25, &a, &a, shape), a);
    }

    #[test]
    fn slerp_keeps_the_length_of_equally_long_columns() {
        let mixed = slerp(0.5, &[1.0, 0.0], &[0.0, 1.0], [1, 2, 1]);
        assert!(
            mixed.iter().all(|v| (v - 0.5f32.sqrt()).abs() < 1e-6),
            "{mixed:?}"
        );
    }

    #[test]
    fn resized_noise_is_pasted_into_the_middle() {
        let plain = ImageRngConfig {
            subseed_strength: 0.0,
            ..config(&[5])
        };
        let smaller = ImageRngConfig {
            seed_resize_from: Some((24, 32)),
            ..plain.clone()
        };
        let noise = ImageRng::new(smaller).first();
        let outer = Generator::new(NoiseSource::Nv, 5).normals(4 * 6 * 5);
        let inner = Generator::new(NoiseSource::Nv, 5).normals(4 * 4 * 3);
        for (index, value) in noise.data().iter().enumerate() {
            let (c, y, x) = (index / 30, index / 5 % 6, index % 5);
            let inside = (1..5).contains(&y) && (1..4).contains(&x);
            let want = if inside {
                inner[(c * 4 + y - 1) * 3 + x - 1]
            } else {
                outer[index]
            };
            assert_eq!(*value, want, "at {c},{y},{x}");
        }
        let larger = ImageRngConfig {
            seed_resize_from: Some((80, 88)),
            ..plain
        };
        let noise = ImageRng::new(larger).first();
        let inner = Generator::new(NoiseSource::Nv, 5).normals(4 * 11 * 10);
        // dy = floor(-5 / 2) = -3: rows 3..8 of the larger noise land in rows 0..5; dx = floor(-5 / 2) = -3 likewise.
        assert_eq!(noise.data()[0], inner[3 * 10 + 3]);
    }

    #[test]
    fn the_seed_delta_changes_only_later_noise() {
        let plain = config(&[5]);
        let mut shifted = ImageRng::new(ImageRngConfig {
            eta_noise_seed_delta: 31337,
            ..plain.clone()
        });
        let mut unshifted = ImageRng::new(plain);
        assert_eq!(shifted.first(), unshifted.first());
        assert_eq!(
            shifted.next_noise().data(),
            Generator::new(NoiseSource::Nv, 5 + 31337).normals(120)
        );
        assert_ne!(
            unshifted.next_noise().data(),
            Generator::new(NoiseSource::Nv, 5 + 31337).normals(120)
        );
    }
}
