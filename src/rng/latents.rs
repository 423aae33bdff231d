//! Latents on the host: four-dimensional `f32` data with just enough algebra for formulas to read like the paper.
//!
//! Invariant: `data.len()` is the product of `shape`; every operation of two latents needs equal shapes. Order is
//! `[batch, channels, height, width]`, latent pixels, row-major.

use std::ops::{Add, Mul, Sub};

/// A batch of latents, `[batch, channels, height, width]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Latents {
    /// Row-major values.
    pub data: Vec<f32>,
    /// `[batch, channels, height, width]`, height and width in latent pixels.
    pub shape: [usize; 4],
}

impl Latents {
    /// Wraps row-major data.
    ///
    /// # Panics
    /// If `data` does not hold as many values as `shape` says.
    #[must_use]
    pub fn new(data: Vec<f32>, shape: [usize; 4]) -> Self {
        assert_eq!(
            data.len(),
            shape.iter().product::<usize>(),
            "latents of shape {shape:?}"
        );
        Self { data, shape }
    }

    /// All zeros.
    #[must_use]
    pub fn zeros(shape: [usize; 4]) -> Self {
        Self {
            data: vec![0.0; shape.iter().product()],
            shape,
        }
    }

    /// Number of pictures.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.shape[0]
    }

    /// The pictures, each `[channels, height, width]`.
    pub fn images(&self) -> impl Iterator<Item = &[f32]> {
        let [_, channels, height, width] = self.shape;
        self.data.chunks_exact((channels * height * width).max(1))
    }

    /// The same picture `n` times, for a batch of one.
    #[must_use]
    pub fn repeat(&self, n: usize) -> Self {
        let [batch, channels, height, width] = self.shape;
        Self {
            data: self.data.repeat(n),
            shape: [batch * n, channels, height, width],
        }
    }

    /// Applies `f` to every value.
    #[must_use]
    pub fn map(&self, f: impl Fn(f32) -> f32) -> Self {
        Self {
            data: self.data.iter().map(|&v| f(v)).collect(),
            shape: self.shape,
        }
    }

    /// Applies `f` to every pair of values.
    ///
    /// # Panics
    /// If the shapes differ.
    #[must_use]
    pub fn zip(&self, other: &Self, f: impl Fn(f32, f32) -> f32) -> Self {
        assert_eq!(self.shape, other.shape, "latents of one shape");
        let data = self
            .data
            .iter()
            .zip(&other.data)
            .map(|(&a, &b)| f(a, b))
            .collect();
        Self {
            data,
            shape: self.shape,
        }
    }

    /// `self += c * other`.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn add_scaled(&mut self, c: f32, other: &Self) {
        assert_eq!(self.shape, other.shape, "latents of one shape");
        for (a, &b) in self.data.iter_mut().zip(&other.data) {
            *a += c * b;
        }
    }
}

/// The sum of `c * latents` over all terms.
///
/// # Panics
/// If `terms` is empty or the shapes differ.
#[must_use]
pub fn lincomb(terms: &[(f32, &Latents)]) -> Latents {
    let (&(c, first), rest) = terms
        .split_first()
        .expect("a linear combination has a term");
    let mut sum = first * c;
    for &(c, term) in rest {
        sum.add_scaled(c, term);
    }
    sum
}

impl Add for &Latents {
    type Output = Latents;
    fn add(self, other: Self) -> Latents {
        self.zip(other, |a, b| a + b)
    }
}

impl Sub for &Latents {
    type Output = Latents;
    fn sub(self, other: Self) -> Latents {
        self.zip(other, |a, b| a - b)
    }
}

impl Mul<f32> for &Latents {
    type Output = Latents;
    fn mul(self, c: f32) -> Latents {
        self.map(|v| v * c)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formulas_read_like_the_paper() {
        let a = Latents::new(vec![1.0, 2.0], [1, 1, 1, 2]);
        let b = Latents::new(vec![10.0, 20.0], [1, 1, 1, 2]);
        assert_eq!((&(&a + &b) * 2.0).data, [22.0, 44.0]);
        assert_eq!((&b - &a).data, [9.0, 18.0]);
        assert_eq!(lincomb(&[(3.0, &a), (-0.5, &b)]).data, [-2.0, -4.0]);
        assert_eq!(a.repeat(3).shape, [3, 1, 1, 2]);
        assert_eq!(a.repeat(2).images().count(), 2);
    }
}
