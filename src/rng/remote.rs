//! Arrays on a device, as the layers above the models know them: what can be summed there, sent there and fetched from there.
//!
//! Invariant: a [`Combination`] has at most `MOST_TERMS` terms, each array once; what would be longer is evaluated first. A device
//! that fails makes arrays that are lost: they fetch as NaN, which ends a run as a network's NaN would, and the layer that owns the
//! device says why.

use std::fmt::Debug;
use std::sync::Arc;

/// Terms that one pass over memory sums.
pub const MOST_TERMS: usize = 8;

/// An array of `f32` on a device. Its layout there is its own affair; arrays that are summed have one shape.
pub trait Remote: Debug + Send + Sync {
    /// `sum of c * array` over 1 to [`MOST_TERMS`] terms of this device.
    fn sum(&self, terms: &[(f32, Arc<dyn Remote>)]) -> Arc<dyn Remote>;

    /// An array of this device with these values, row-major of `shape` `[batch, channels, height, width]`.
    fn upload(&self, values: &[f32], shape: [usize; 4]) -> Arc<dyn Remote>;

    /// The values, row-major of `shape`.
    fn fetch(&self, shape: [usize; 4]) -> Vec<f32>;

    /// The array as its device's own type.
    fn as_any(&self) -> &dyn std::any::Any;
}

/// A sum that is not computed yet.
#[derive(Debug, Clone)]
pub(super) struct Combination(Vec<(f32, Arc<dyn Remote>)>);

impl From<Arc<dyn Remote>> for Combination {
    fn from(array: Arc<dyn Remote>) -> Self {
        Self(vec![(1.0, array)])
    }
}

impl Combination {
    /// `self += c * other`.
    pub(super) fn add(&mut self, c: f32, other: &Self) {
        let mut terms = self.0.clone();
        merge(&mut terms, c, &other.0);
        if terms.len() > MOST_TERMS {
            terms = vec![(1.0, self.evaluate())];
            merge(&mut terms, c, &other.0);
        }
        if terms.len() > MOST_TERMS {
            terms.truncate(1);
            merge(&mut terms, c, &[(1.0, other.evaluate())]);
        }
        self.0 = terms;
    }

    /// `c * self`.
    pub(super) fn scaled(&self, c: f32) -> Self {
        let terms = self.0.iter().map(|(own, array)| (own * c, array.clone()));
        Self(terms.collect())
    }

    /// The sum as an array.
    pub(super) fn evaluate(&self) -> Arc<dyn Remote> {
        match self.0.as_slice() {
            [(c, array)] if c.to_bits() == 1f32.to_bits() => array.clone(),
            terms => terms[0].1.sum(terms),
        }
    }

    /// An array beside those of the sum.
    pub(super) fn upload(&self, values: &[f32], shape: [usize; 4]) -> Arc<dyn Remote> {
        self.0[0].1.upload(values, shape)
    }

    /// The sum's values.
    pub(super) fn fetch(&self, shape: [usize; 4]) -> Vec<f32> {
        self.evaluate().fetch(shape)
    }
}

/// `terms += c * others`, an array that is there already in its place.
fn merge(terms: &mut Vec<(f32, Arc<dyn Remote>)>, c: f32, others: &[(f32, Arc<dyn Remote>)]) {
    for (own, array) in others {
        match terms
            .iter_mut()
            .find(|(_, known)| Arc::ptr_eq(known, array))
        {
            Some((factor, _)) => *factor += c * own,
            None => terms.push((c * own, array.clone())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Latents, lincomb};
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A device in memory that counts its passes.
    #[derive(Debug)]
    struct Counting {
        values: Vec<f32>,
        passes: Arc<AtomicUsize>,
    }

    impl Remote for Counting {
        fn sum(&self, terms: &[(f32, Arc<dyn Remote>)]) -> Arc<dyn Remote> {
            assert!(terms.len() <= MOST_TERMS);
            self.passes.fetch_add(1, Ordering::Relaxed);
            let mut values = vec![0.0; self.values.len()];
            for (c, term) in terms {
                let term = term.as_any().downcast_ref::<Self>().unwrap();
                let pairs = values.iter_mut().zip(&term.values);
                pairs.for_each(|(sum, value)| *sum += c * value);
            }
            let passes = self.passes.clone();
            Arc::new(Self { values, passes })
        }
        fn upload(&self, values: &[f32], _: [usize; 4]) -> Arc<dyn Remote> {
            let (values, passes) = (values.to_vec(), self.passes.clone());
            Arc::new(Self { values, passes })
        }
        fn fetch(&self, _: [usize; 4]) -> Vec<f32> {
            self.values.clone()
        }
        fn as_any(&self) -> &dyn std::any::Any {
            self
        }
    }

    fn latents(passes: &Arc<AtomicUsize>, value: f32) -> Latents {
        let (values, passes) = (vec![value, -value], passes.clone());
        Latents::on_device(Arc::new(Counting { values, passes }), [1, 1, 1, 2])
    }

    #[test]
    fn a_step_of_euler_under_guidance_is_one_pass() {
        let passes = Arc::new(AtomicUsize::new(0));
        let [x, cond, uncond] = [3.0, 1.0, 0.5].map(|value| latents(&passes, value));
        // denoised = x - sigma * eps of both halves, guided at scale 7, then Euler from sigma 2 to 1.
        let clean = |eps| lincomb(&[(1.0, &x), (-2.0, eps)]);
        let mut guided = clean(&uncond);
        guided.add_scaled(7.0, &(&clean(&cond) - &clean(&uncond)));
        let d = &(&x - &guided) * 0.5;
        let next = lincomb(&[(1.0, &x), (-1.0, &d)]);
        assert_eq!(passes.load(Ordering::Relaxed), 0);
        // eps = 0.5 + 7 * (1 - 0.5) = 4, next = 3 - 4.
        assert_eq!(next.data(), vec![-1.0, 1.0]);
        assert_eq!(passes.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn long_sums_are_taken_in_parts_and_host_values_join_them() {
        let passes = Arc::new(AtomicUsize::new(0));
        let mut sum = latents(&passes, 1.0);
        for value in 2..=20 {
            sum.add_scaled(1.0, &latents(&passes, value as f32));
        }
        let on_host = Latents::new(vec![1000.0, 0.0], [1, 1, 1, 2]);
        let sum = &(&on_host + &sum) * 2.0;
        assert_eq!(sum.data(), vec![2420.0, -420.0]);
        let mut changed = sum.clone();
        changed.data_mut()[0] = 0.0;
        assert_eq!(
            changed.into_host(),
            Latents::new(vec![0.0, -420.0], sum.shape)
        );
    }
}
