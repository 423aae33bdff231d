//! The types in which activations and packed weights lie in memory; every kernel is written over this trait and [`Simd`].
//!
//! Sums are `f32` in all cases. A packed operand lies in groups of [`Element::GROUP`] neighbouring factors, one group a lane, so
//! that a product consumes 32 bits of each lane whatever the type.
#![allow(
    unsafe_code,
    reason = "calls of `Simd` methods; the caller guarantees the instruction set and the bounds"
)]

use half::bf16;

use super::simd::Simd;

/// A type of values in memory.
///
/// # Safety
/// Callers of the unsafe methods promise what [`Simd`] asks for. Any bit pattern is a value.
pub(crate) trait Element:
    Copy + Default + PartialEq + std::fmt::Debug + Send + Sync + 'static
{
    /// Neighbouring factors in one lane of a packed vector.
    const GROUP: usize;

    /// The nearest value.
    fn from_f32(x: f32) -> Self;
    /// The value itself.
    fn to_f32(self) -> f32;
    /// The values of a packed weight, if it is of this type.
    fn packed(values: &Values) -> Option<&[Self]>;

    /// `LANES` values.
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;
    /// The first `n < LANES` values, 0 in the other lanes.
    unsafe fn load_first<S: Simd>(p: *const Self, n: usize) -> S::V;
    /// Stores `LANES` values.
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V);
    /// Stores the first `n < LANES` values.
    unsafe fn store_first<S: Simd>(p: *mut Self, v: S::V, n: usize);
    /// One group of factors in every lane.
    unsafe fn spread<S: Simd>(p: *const Self) -> S::V;
    /// `c` plus the products of the groups of each lane.
    unsafe fn multiply_add<S: Simd>(a: S::V, b: S::V, c: S::V) -> S::V;

    /// `LANES` groups of factors.
    #[inline(always)]
    unsafe fn groups<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: a group is as wide as a lane.
        unsafe { S::load(p.cast()) }
    }

    /// The first `n <= LANES` values, 0 in the other lanes.
    #[inline(always)]
    unsafe fn load_up_to<S: Simd>(p: *const Self, n: usize) -> S::V {
        // SAFETY: the caller vouches for `n` values.
        unsafe {
            if n == S::LANES {
                Self::load::<S>(p)
            } else {
                Self::load_first::<S>(p, n)
            }
        }
    }

    /// Stores the first `n <= LANES` values.
    #[inline(always)]
    unsafe fn store_up_to<S: Simd>(p: *mut Self, v: S::V, n: usize) {
        // SAFETY: the caller vouches for `n` values.
        unsafe {
            if n == S::LANES {
                Self::store::<S>(p, v);
            } else {
                Self::store_first::<S>(p, v, n);
            }
        }
    }
}

impl Element for f32 {
    const GROUP: usize = 1;

    fn from_f32(x: f32) -> Self {
        x
    }
    fn to_f32(self) -> f32 {
        self
    }
    fn packed(values: &Values) -> Option<&[Self]> {
        match values {
            Values::F32(values) => Some(values),
            Values::Bf16(_) => None,
        }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's promise; so below.
        unsafe { S::load(p) }
    }
    #[inline(always)]
    unsafe fn load_first<S: Simd>(p: *const Self, n: usize) -> S::V {
        // SAFETY: as above.
        unsafe { S::load_first(p, n) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V) {
        // SAFETY: as above.
        unsafe { S::store(p, v) }
    }
    #[inline(always)]
    unsafe fn store_first<S: Simd>(p: *mut Self, v: S::V, n: usize) {
        // SAFETY: as above.
        unsafe { S::store_first(p, v, n) }
    }
    #[inline(always)]
    unsafe fn spread<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: as above.
        unsafe { S::splat(*p) }
    }
    #[inline(always)]
    unsafe fn multiply_add<S: Simd>(a: S::V, b: S::V, c: S::V) -> S::V {
        // SAFETY: as above.
        unsafe { S::fma(a, b, c) }
    }
}

impl Element for bf16 {
    const GROUP: usize = 2;

    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    fn packed(values: &Values) -> Option<&[Self]> {
        match values {
            Values::Bf16(values) => Some(values),
            Values::F32(_) => None,
        }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's promise; so below.
        unsafe { S::widen(p) }
    }
    #[inline(always)]
    unsafe fn load_first<S: Simd>(p: *const Self, n: usize) -> S::V {
        // SAFETY: as above.
        unsafe { S::widen_first(p, n) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V) {
        // SAFETY: as above.
        unsafe { S::narrow(p, v) }
    }
    #[inline(always)]
    unsafe fn store_first<S: Simd>(p: *mut Self, v: S::V, n: usize) {
        // SAFETY: as above.
        unsafe { S::narrow_first(p, v, n) }
    }
    #[inline(always)]
    unsafe fn spread<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: as above; two values of 16 bits are read as one of 32.
        unsafe { S::splat(p.cast::<f32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn multiply_add<S: Simd>(a: S::V, b: S::V, c: S::V) -> S::V {
        // SAFETY: as above.
        unsafe { S::dot_pairs(a, b, c) }
    }
}

/// The values of a packed weight.
#[derive(Debug, Clone)]
pub(crate) enum Values {
    /// 32 bits a value.
    F32(Vec<f32>),
    /// 16 bits a value, the factors of a sum in pairs.
    Bf16(Vec<bf16>),
}
