//! One vector type per instruction set behind one trait, so that each kernel is written once.
//!
//! Invariant: a method of [`Simd`] for a set other than [`Portable`] is called only below [`super::Isa::run`], whose
//! `target_feature` wrapper is entered after the processor was asked. Every method is `inline(always)` so that it
//! ends up inside that wrapper.
#![allow(
    unsafe_code,
    reason = "std::arch intrinsics and raw loads; the caller guarantees the instruction set and the bounds"
)]

/// A vector of `f32` lanes.
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

    /// The first `n <= LANES` lanes from memory, the others 0.
    #[inline(always)]
    unsafe fn load_up_to(p: *const f32, n: usize) -> Self::V {
        // SAFETY: the caller vouches for `n` values.
        unsafe {
            if n == Self::LANES {
                Self::load(p)
            } else {
                Self::load_first(p, n)
            }
        }
    }

    /// Stores the first `n <= LANES` lanes.
    #[inline(always)]
    unsafe fn store_up_to(p: *mut f32, v: Self::V, n: usize) {
        // SAFETY: the caller vouches for `n` values.
        unsafe {
            if n == Self::LANES {
                Self::store(p, v);
            } else {
                Self::store_first(p, v, n);
            }
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
}

/// AVX-512F.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

/// AVX2 with FMA.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

/// ARM NEON.
#[cfg(target_arch = "aarch64")]
#[derive(Clone, Copy)]
pub(crate) struct Neon;

/// Writes the methods that are one intrinsic each.
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

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Avx2, Avx512, Simd};
    use std::arch::x86_64::{
        __m128, __m256, __m512, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _mm_add_ps,
        _mm_cvtss_f32, _mm_max_ps, _mm_movehl_ps, _mm_shuffle_ps, _mm256_add_epi32, _mm256_add_ps,
        _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_cvtps_epi32, _mm256_div_ps,
        _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_max_ps, _mm256_min_ps,
        _mm256_mul_ps, _mm256_round_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi32,
        _mm256_storeu_ps, _mm256_sub_ps, _mm512_add_ps, _mm512_div_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_max_ps,
        _mm512_min_ps, _mm512_mul_ps, _mm512_reduce_add_ps, _mm512_reduce_max_ps,
        _mm512_roundscale_ps, _mm512_scalef_ps, _mm512_set1_ps, _mm512_storeu_ps, _mm512_sub_ps,
    };

    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

    impl Simd for Avx512 {
        const LANES: usize = 16;
        const MR: usize = 8;
        type V = __m512;
        intrinsics! {
            splat(x: f32) -> __m512 = _mm512_set1_ps(x);
            load(p: *const f32) -> __m512 = _mm512_loadu_ps(p);
            store(p: *mut f32, v: __m512) -> () = _mm512_storeu_ps(p, v);
            add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
            sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
            mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
            div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
            max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
            min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
            fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
            scale_by_power(x: __m512, n: __m512) -> __m512 = _mm512_scalef_ps(x, n);
            round(x: __m512) -> __m512 = _mm512_roundscale_ps::<NEAREST>(x);
            sum(v: __m512) -> f32 = _mm512_reduce_add_ps(v);
            maximum(v: __m512) -> f32 = _mm512_reduce_max_ps(v);
            load_first(p: *const f32, n: usize) -> __m512 = _mm512_maskz_loadu_ps((1u16 << n) - 1, p);
            store_first(p: *mut f32, v: __m512, n: usize) -> () = _mm512_mask_storeu_ps(p, (1u16 << n) - 1, v);
        }
    }

    #[inline(always)]
    unsafe fn halves(v: __m256, f: impl Fn(__m128, __m128) -> __m128) -> f32 {
        // SAFETY: AVX2 is the caller's promise.
        unsafe {
            let v = f(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = f(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(f(v, _mm_shuffle_ps::<0x55>(v, v)))
        }
    }

    impl Simd for Avx2 {
        const LANES: usize = 8;
        const MR: usize = 6;
        type V = __m256;
        intrinsics! {
            splat(x: f32) -> __m256 = _mm256_set1_ps(x);
            load(p: *const f32) -> __m256 = _mm256_loadu_ps(p);
            store(p: *mut f32, v: __m256) -> () = _mm256_storeu_ps(p, v);
            add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
            sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
            mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
            div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
            max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
            min(a: __m256, b: __m256) -> __m256 = _mm256_min_ps(a, b);
            fma(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
            scale_by_power(x: __m256, n: __m256) -> __m256 = _mm256_mul_ps(x, _mm256_castsi256_ps(
                _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)))));
            round(x: __m256) -> __m256 = _mm256_round_ps::<NEAREST>(x);
            sum(v: __m256) -> f32 = halves(v, |a, b| _mm_add_ps(a, b));
            maximum(v: __m256) -> f32 = halves(v, |a, b| _mm_max_ps(a, b));
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::{Neon, Simd};
    use std::arch::aarch64::*;

    impl Simd for Neon {
        const LANES: usize = 4;
        const MR: usize = 8;
        type V = float32x4_t;
        intrinsics! {
            splat(x: f32) -> float32x4_t = vdupq_n_f32(x);
            load(p: *const f32) -> float32x4_t = vld1q_f32(p);
            store(p: *mut f32, v: float32x4_t) -> () = vst1q_f32(p, v);
            add(a: float32x4_t, b: float32x4_t) -> float32x4_t = vaddq_f32(a, b);
            sub(a: float32x4_t, b: float32x4_t) -> float32x4_t = vsubq_f32(a, b);
            mul(a: float32x4_t, b: float32x4_t) -> float32x4_t = vmulq_f32(a, b);
            div(a: float32x4_t, b: float32x4_t) -> float32x4_t = vdivq_f32(a, b);
            max(a: float32x4_t, b: float32x4_t) -> float32x4_t = vmaxq_f32(a, b);
            min(a: float32x4_t, b: float32x4_t) -> float32x4_t = vminq_f32(a, b);
            fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t = vfmaq_f32(c, a, b);
            scale_by_power(x: float32x4_t, n: float32x4_t) -> float32x4_t = vmulq_f32(x, vreinterpretq_f32_s32(
                vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)))));
            round(x: float32x4_t) -> float32x4_t = vrndnq_f32(x);
            sum(v: float32x4_t) -> f32 = vaddvq_f32(v);
            maximum(v: float32x4_t) -> f32 = vmaxvq_f32(v);
        }
    }
}
