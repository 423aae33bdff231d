//! What the UNet is told besides text: the sizes of the picture, and how much of it was cropped away.
//!
//! Each value becomes 256 numbers behind the pooled text (pipeline specification, 2.8).

use crate::nn::sinusoidal_embedding;

/// Width of the embedding of one size value.
const SIZE_EMBEDDING: usize = 256;

/// The sizes SDXL is told (Podell et al. 2023, section 2.2), each as height before width, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Size of the training picture this one should look like.
    pub original: (usize, usize),
    /// Top and left of the crop.
    pub crop: (usize, usize),
    /// Size of the picture.
    pub target: (usize, usize),
}

impl Sizes {
    /// Original and target size are the picture's; `crop` is top and left.
    #[must_use]
    pub fn of_picture(width: usize, height: usize, crop: (usize, usize)) -> Self {
        Self {
            original: (height, width),
            crop,
            target: (height, width),
        }
    }

    /// The UNet's vector: pooled text, then the embedding of each value.
    #[must_use]
    pub fn vector(self, pooled: &[f32]) -> Vec<f32> {
        let values = [
            self.original.0,
            self.original.1,
            self.crop.0,
            self.crop.1,
            self.target.0,
            self.target.1,
        ];
        let values = values.map(half_precision);
        with_embedded(pooled, &values)
    }

    /// The refiner's vector: pooled text, then the embedding of size, crop and aesthetic score.
    #[must_use]
    pub fn refiner_vector(self, pooled: &[f32], aesthetic_score: f32) -> Vec<f32> {
        let sizes = [self.original.0, self.original.1, self.crop.0, self.crop.1];
        let [h, w, top, left] = sizes.map(half_precision);
        let score = half::f16::from_f32(aesthetic_score).to_f32();
        with_embedded(pooled, &[h, w, top, left, score])
    }
}

/// A1111 holds the sizes in half precision: exact up to 2048, even numbers beyond.
fn half_precision(size: usize) -> f32 {
    half::f16::from_f32(size as f32).to_f32()
}

/// Pooled text, then the embedding of each value.
fn with_embedded(pooled: &[f32], values: &[f32]) -> Vec<f32> {
    let mut vector = pooled.to_vec();
    vector.extend(sinusoidal_embedding(values, SIZE_EMBEDDING));
    vector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn height_comes_before_width_and_large_sizes_are_half_precision() {
        let vector = Sizes::of_picture(832, 2049, (0, 0)).vector(&[7.0]);
        assert_eq!(vector.len(), 1 + 6 * SIZE_EMBEDDING);
        assert_eq!(
            (vector[0], vector[1]),
            (7.0, 2048f32.cos()),
            "2049 rounds to 2048"
        );
        assert_eq!(&vector[1 + SIZE_EMBEDDING..][..1], [832f32.cos()]);
    }

    #[test]
    fn the_crop_is_told_top_before_left() {
        // Entry k of a value v is cos(v * 10000^(-k / 128)).
        let vector = Sizes::of_picture(64, 32, (100, 300)).vector(&[]);
        let entry = |value: usize, k: usize| vector[value * SIZE_EMBEDDING + k];
        let cos = |v: f64, k: f64| (v * 10_000f64.powf(-k / 128.0)).cos() as f32;
        for (value, size) in [32.0, 64.0, 100.0, 300.0, 32.0, 64.0]
            .into_iter()
            .enumerate()
        {
            for k in [0, 1, 64] {
                let (got, want) = (entry(value, k), cos(size, k as f64));
                assert!(
                    (got - want).abs() < 3e-5,
                    "value {value}, entry {k}: {got} {want}"
                );
            }
        }
    }
}
