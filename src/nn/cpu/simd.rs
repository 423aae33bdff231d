//! One vector type per instruction set behind one trait, so that each kernel is written once.
//!
//! Invariant: a method of [`Simd`] for a set other than [`Portable`] is called only below [`super::Isa::run`], whose
//! `target_feature` wrapper is entered after the processor was asked. Every method is `inline(always)` so that it
//! ends up inside that wrapper.
#![allow(
    unsafe_code,
    reason = "std::arch intrinsics and raw loads; the caller guarantees the instruction set and the bounds"
)]

use half::bf16;

#[cfg(target_arch = "aarch64")]
mod arm;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "aarch64")]
pub(crate) use arm::Neon;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512, Avx512Bf16};

/// A vector of `f32` lanes, each of which may also hold two `bf16` side by side.
///
/// # Safety
/// Callers of every method guarantee that the processor has the instruction set; of `load*` and `store*` also that
/// the pointer is valid for the lanes touched.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Lanes of a vector.
    const LANES: usize;
    /// Rows of the GEMM micro-kernel; with [`super::gemm::NV`] vectors a row it fills the register file.
    const MR: usize;
    /// The register.
    type V: Copy;

    /// Asks for the cache line at `p`, which need not be valid.
    #[inline(always)]
    unsafe fn fetch(_: *const u8) {}

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `x * 2^n` for integral `n` in -126..=127.
    unsafe fn scale_by_power(x: Self::V, n: Self::V) -> Self::V;
    /// Nearest integer, ties to even.
    unsafe fn round(x: Self::V) -> Self::V;
    unsafe fn sum(v: Self::V) -> f32;
    unsafe fn maximum(v: Self::V) -> f32;

    /// The low halves of the lanes, read as `bf16`.
    unsafe fn low(v: Self::V) -> Self::V;
    /// The high halves of the lanes, read as `bf16`.
    unsafe fn high(v: Self::V) -> Self::V;
    /// `LANES` values of `bf16`.
    unsafe fn widen(p: *const bf16) -> Self::V;
    /// Stores each lane rounded to the nearest `bf16`, ties to even.
    unsafe fn narrow(p: *mut bf16, v: Self::V);

    /// `c` plus the products of both `bf16` halves of each lane of `a` and `b`.
    #[inline(always)]
    unsafe fn dot_pairs(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: register arithmetic only.
        unsafe {
            let c = Self::fma(Self::low(a), Self::low(b), c);
            Self::fma(Self::high(a), Self::high(b), c)
        }
    }

    /// The first `n < LANES` values of `bf16`, the others 0.
    #[inline(always)]
    unsafe fn widen_first(p: *const bf16, n: usize) -> Self::V {
        let mut lanes = [bf16::ZERO; 16];
        // SAFETY: n < LANES <= 16 and the caller vouches for `p`.
        unsafe {
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
            Self::widen(lanes.as_ptr())
        }
    }

    /// Stores the first `n < LANES` lanes as [`Self::narrow`] does.
    #[inline(always)]
    unsafe fn narrow_first(p: *mut bf16, v: Self::V, n: usize) {
        let mut lanes = [bf16::ZERO; 16];
        // SAFETY: n < LANES <= 16 and the caller vouches for `p`.
        unsafe {
            Self::narrow(lanes.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
        }
    }

    /// The first `n < LANES` lanes from memory, the others 0.
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self::V {
        let mut lanes = [0f32; 16];
        // SAFETY: n < LANES <= 16 and the caller vouches for `p`.
        unsafe {
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
            Self::load(lanes.as_ptr())
        }
    }

    /// Stores the first `n < LANES` lanes.
    #[inline(always)]
    unsafe fn store_first(p: *mut f32, v: Self::V, n: usize) {
        let mut lanes = [0f32; 16];
        // SAFETY: n < LANES <= 16 and the caller vouches for `p`.
        unsafe {
            Self::store(lanes.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
        }
    }
}

/// Plain Rust on arrays of eight; what every other set is compared with.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

#[inline(always)]
fn zip(a: [f32; 8], b: [f32; 8], f: impl Fn(f32, f32) -> f32) -> [f32; 8] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    const LANES: usize = 8;
    const MR: usize = 4;
    type V = [f32; 8];

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: the caller vouches for eight lanes.
        unsafe { p.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: the caller vouches for eight lanes.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Two roundings: without the instruction a fused product is a library call per lane.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn scale_by_power(x: Self::V, n: Self::V) -> Self::V {
        zip(x, n, |x, n| {
            x * f32::from_bits(((n as i32 + 127) << 23) as u32)
        })
    }
    #[inline(always)]
    unsafe fn round(x: Self::V) -> Self::V {
        // Adding and subtracting 1.5 * 2^23 leaves the nearest integer for |x| < 2^22.
        x.map(|x| (x + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        (v[0] + v[4]) + (v[1] + v[5]) + ((v[2] + v[6]) + (v[3] + v[7]))
    }
    #[inline(always)]
    unsafe fn maximum(v: Self::V) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn low(v: Self::V) -> Self::V {
        v.map(|x| f32::from_bits(x.to_bits() << 16))
    }
    #[inline(always)]
    unsafe fn high(v: Self::V) -> Self::V {
        v.map(|x| f32::from_bits(x.to_bits() & 0xFFFF_0000))
    }
    #[inline(always)]
    unsafe fn widen(p: *const bf16) -> Self::V {
        // SAFETY: the caller vouches for eight values.
        unsafe { p.cast::<[bf16; 8]>().read_unaligned() }.map(bf16::to_f32)
    }
    #[inline(always)]
    unsafe fn narrow(p: *mut bf16, v: Self::V) {
        // SAFETY: the caller vouches for eight values.
        unsafe { p.cast::<[bf16; 8]>().write_unaligned(v.map(bf16::from_f32)) }
    }
}

/// Writes the methods that are one expression each.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! intrinsics {
    ($($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $body:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $ty),*) -> $ret {
            // SAFETY: the instruction set and the pointers are the caller's promise (see the trait).
            unsafe { $body }
        }
    )*};
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use intrinsics;
