//! Latents: four-dimensional `f32` data with just enough algebra for formulas to read like the paper.
//!
//! Values lie on the host or on a device. On a device a formula's sums stay sums ([`Combination`]) until somebody needs their
//! values, so that all the arithmetic of a step is one pass over memory and nothing waits for the device. What is not a sum is
//! computed on the host.
//!
//! Invariant: there are as many values as `shape` says; every operation of two latents needs equal shapes. Order is
//! `[batch, channels, height, width]`, latent pixels, row-major.

use std::borrow::Cow;
use std::ops::{Add, Mul, Sub};
use std::sync::Arc;

use super::remote::{Combination, Remote};

/// A batch of latents, `[batch, channels, height, width]`.
#[derive(Debug, Clone)]
pub struct Latents {
    values: Values,
    /// `[batch, channels, height, width]`, height and width in latent pixels.
    pub shape: [usize; 4],
}

#[derive(Debug, Clone)]
enum Values {
    Host(Vec<f32>),
    Device(Combination),
}

impl PartialEq for Latents {
    fn eq(&self, other: &Self) -> bool {
        self.shape == other.shape && self.data() == other.data()
    }
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
        let values = Values::Host(data);
        Self { values, shape }
    }

    /// Wraps values on a device.
    #[must_use]
    pub fn on_device(values: Arc<dyn Remote>, shape: [usize; 4]) -> Self {
        let values = Values::Device(Combination::from(values));
        Self { values, shape }
    }

    /// All zeros.
    #[must_use]
    pub fn zeros(shape: [usize; 4]) -> Self {
        Self::new(vec![0.0; shape.iter().product()], shape)
    }

    /// The values, row-major; copied from the device if they lie there.
    #[must_use]
    pub fn data(&self) -> Cow<'_, [f32]> {
        match &self.values {
            Values::Host(data) => Cow::Borrowed(data),
            Values::Device(sum) => Cow::Owned(sum.fetch(self.shape)),
        }
    }

    /// The values, row-major.
    #[must_use]
    pub fn into_data(self) -> Vec<f32> {
        match self.values {
            Values::Host(data) => data,
            Values::Device(sum) => sum.fetch(self.shape),
        }
    }

    /// The values to be changed, brought to the host.
    pub fn data_mut(&mut self) -> &mut [f32] {
        if let Values::Device(sum) = &self.values {
            self.values = Values::Host(sum.fetch(self.shape));
        }
        match &mut self.values {
            Values::Host(data) => data,
            Values::Device(_) => unreachable!("the values were brought to the host"),
        }
    }

    /// The same latents on the host.
    #[must_use]
    pub fn into_host(self) -> Self {
        let shape = self.shape;
        Self::new(self.into_data(), shape)
    }

    /// The values as one array of the device they lie on; `None` on the host.
    #[must_use]
    pub fn remote(&self) -> Option<Arc<dyn Remote>> {
        match &self.values {
            Values::Host(_) => None,
            Values::Device(sum) => Some(sum.evaluate()),
        }
    }

    /// Number of pictures.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.shape[0]
    }

    /// The pictures, each `[channels, height, width]`.
    #[must_use]
    pub fn images(&self) -> std::vec::IntoIter<Vec<f32>> {
        let [_, channels, height, width] = self.shape;
        let data = self.data();
        let images = data.chunks_exact((channels * height * width).max(1));
        images.map(<[f32]>::to_vec).collect::<Vec<_>>().into_iter()
    }

    /// The same picture `n` times, for a batch of one.
    #[must_use]
    pub fn repeat(&self, n: usize) -> Self {
        let [batch, channels, height, width] = self.shape;
        Self::new(self.data().repeat(n), [batch * n, channels, height, width])
    }

    /// Applies `f` to every value, on the host.
    #[must_use]
    pub fn map(&self, f: impl Fn(f32) -> f32) -> Self {
        Self::new(self.data().iter().map(|&v| f(v)).collect(), self.shape)
    }

    /// Applies `f` to every pair of values, on the host.
    ///
    /// # Panics
    /// If the shapes differ.
    #[must_use]
    pub fn zip(&self, other: &Self, f: impl Fn(f32, f32) -> f32) -> Self {
        assert_eq!(self.shape, other.shape, "latents of one shape");
        let (a, b) = (self.data(), other.data());
        let data = a.iter().zip(b.iter()).map(|(&a, &b)| f(a, b)).collect();
        Self::new(data, self.shape)
    }

    /// `self += c * other`.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn add_scaled(&mut self, c: f32, other: &Self) {
        assert_eq!(self.shape, other.shape, "latents of one shape");
        match (&mut self.values, &other.values) {
            (Values::Host(a), Values::Host(b)) => {
                for (a, &b) in a.iter_mut().zip(b) {
                    *a += c * b;
                }
            }
            (Values::Device(a), Values::Device(b)) => a.add(c, b),
            (Values::Device(a), Values::Host(b)) => {
                let b = Combination::from(a.upload(b, other.shape));
                a.add(c, &b);
            }
            (Values::Host(a), Values::Device(b)) => {
                let mut sum = Combination::from(b.upload(a, other.shape));
                sum.add(c, b);
                self.values = Values::Device(sum);
            }
        }
    }

    /// `c * self`.
    fn scaled(&self, c: f32) -> Self {
        match &self.values {
            Values::Host(_) => self.map(|v| v * c),
            Values::Device(sum) => Self {
                values: Values::Device(sum.scaled(c)),
                shape: self.shape,
            },
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
    let mut sum = first.scaled(c);
    for &(c, term) in rest {
        sum.add_scaled(c, term);
    }
    sum
}

impl Add for &Latents {
    type Output = Latents;
    fn add(self, other: Self) -> Latents {
        match (&self.values, &other.values) {
            (Values::Host(_), Values::Host(_)) => self.zip(other, |a, b| a + b),
            _ => lincomb(&[(1.0, self), (1.0, other)]),
        }
    }
}

impl Sub for &Latents {
    type Output = Latents;
    fn sub(self, other: Self) -> Latents {
        match (&self.values, &other.values) {
            (Values::Host(_), Values::Host(_)) => self.zip(other, |a, b| a - b),
            _ => lincomb(&[(1.0, self), (-1.0, other)]),
        }
    }
}

impl Mul<f32> for &Latents {
    type Output = Latents;
    fn mul(self, c: f32) -> Latents {
        self.scaled(c)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formulas_read_like_the_paper() {
        let a = Latents::new(vec![1.0, 2.0], [1, 1, 1, 2]);
        let b = Latents::new(vec![10.0, 20.0], [1, 1, 1, 2]);
        assert_eq!((&(&a + &b) * 2.0).data(), vec![22.0, 44.0]);
        assert_eq!((&b - &a).data(), vec![9.0, 18.0]);
        assert_eq!(lincomb(&[(3.0, &a), (-0.5, &b)]).data(), vec![-2.0, -4.0]);
        assert_eq!(a.repeat(3).shape, [3, 1, 1, 2]);
        assert_eq!(a.repeat(2).images().len(), 2);
    }
}
