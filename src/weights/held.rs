//! Values of a tensor where they lie in a file, for as long as a layer is made of them.
//!
//! Invariant: they are finite, and of a type and at an address that can be read as they are; everything else is converted to `f32`
//! first. When they are let go, the file's pages need not stay in memory.
#![allow(unsafe_code, reason = "reads bytes of a file as the numbers they are")]

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

use super::file::Bytes;
use crate::nn::Stored;

/// Values of a tensor; [`Self::values`] shows them.
#[derive(Debug)]
pub struct Held<'a> {
    values: Values<'a>,
    /// The file and where in it they lie.
    lies: Option<(&'a Bytes, Range<usize>)>,
}

#[derive(Debug)]
enum Values<'a> {
    Owned(Vec<f32>),
    Lying(Stored<'a>),
}

impl<'a> Held<'a> {
    /// The values, row major.
    #[must_use]
    pub fn values(&self) -> Stored<'_> {
        match &self.values {
            Values::Owned(values) => Stored::F32(values),
            Values::Lying(values) => *values,
        }
    }

    /// Bytes of a file as they lie, and whether all are finite; `None` where they cannot be used so.
    pub(super) fn lying(dtype: Dtype, file: &'a Bytes, at: Range<usize>) -> Option<(Self, bool)> {
        let bytes = &file.as_slice()[at.clone()];
        let (values, finite) = match dtype {
            Dtype::F32 => {
                let values = typed::<f32>(bytes)?;
                let finite = all(values, |x| u16::from(!x.is_finite()));
                (Stored::F32(values), finite)
            }
            Dtype::F16 => {
                let values = typed::<f16>(bytes)?;
                let finite = all(values, |x| u16::from(x.to_bits() & 0x7c00 == 0x7c00));
                (Stored::F16(values), finite)
            }
            Dtype::BF16 => {
                let values = typed::<bf16>(bytes)?;
                let finite = all(values, |x| u16::from(x.to_bits() & 0x7f80 == 0x7f80));
                (Stored::Bf16(values), finite)
            }
            _ => return None,
        };
        let held = Self {
            values: Values::Lying(values),
            lies: Some((file, at)),
        };
        Some((held, finite))
    }
}

impl From<Vec<f32>> for Held<'_> {
    fn from(values: Vec<f32>) -> Self {
        Self {
            values: Values::Owned(values),
            lies: None,
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Some((file, at)) = &self.lies {
            file.done_with(at.start, at.len());
        }
    }
}

/// A type whose every bit pattern is a value.
trait Plain: Copy + Sync {}
impl Plain for f32 {}
impl Plain for f16 {}
impl Plain for bf16 {}

/// The bytes as numbers, if they begin on a number's boundary and this machine has the file's byte order.
fn typed<T: Plain>(bytes: &[u8]) -> Option<&[T]> {
    // SAFETY: any bytes are values of a `Plain` type.
    let (before, values, after) = unsafe { bytes.align_to::<T>() };
    (cfg!(target_endian = "little") && before.is_empty() && after.is_empty()).then_some(values)
}

/// Whether no value is `bad` (1, otherwise 0: without a branch a compiler makes vectors of it).
fn all<T: Plain>(values: &[T], bad: impl Fn(T) -> u16 + Sync) -> bool {
    const BLOCK: usize = 1 << 16;
    values
        .par_chunks(BLOCK)
        .all(|block| block.iter().fold(0, |any, x| any | bad(*x)) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_lie_as_they_are_stored_and_are_checked() {
        for (dtype, one, nan) in [
            (Dtype::F16, f16::ONE.to_le_bytes(), f16::NAN.to_le_bytes()),
            (
                Dtype::BF16,
                bf16::ONE.to_le_bytes(),
                bf16::INFINITY.to_le_bytes(),
            ),
        ] {
            let file = Bytes::Owned([one, one, one, nan].concat());
            let (held, finite) = Held::lying(dtype, &file, 0..6).expect("even addresses");
            assert!(finite && held.values().len() == 3, "{dtype:?}");
            let (_, finite) = Held::lying(dtype, &file, 0..8).expect("even addresses");
            assert!(!finite, "{dtype:?}");
            assert!(Held::lying(dtype, &file, 1..5).is_none(), "an odd address");
        }
        let file = Bytes::Owned(vec![0x40; 8]);
        assert!(
            Held::lying(Dtype::F8_E4M3, &file, 0..8).is_none(),
            "converted"
        );
    }
}
