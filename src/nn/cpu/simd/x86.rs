//! The vectors of x86-64: AVX2, AVX-512 (F, BW, DQ, VL) and AVX-512 with `bf16` products.

use std::arch::x86_64::{
    __m128, __m128i, __m256, __m256bh, __m256i, __m512, __m512bh, __m512i, _CMP_UNORD_Q,
    _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T0, _mm_add_ps, _mm_cvtss_f32,
    _mm_loadu_si128, _mm_max_ps, _mm_movehl_ps, _mm_prefetch, _mm_shuffle_ps, _mm_storeu_si128,
    _mm256_add_epi32, _mm256_add_ps, _mm256_and_ps, _mm256_and_si256, _mm256_blendv_epi8,
    _mm256_castps_si256, _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_castsi256_si128,
    _mm256_cmp_ps, _mm256_cvtepu16_epi32, _mm256_cvtps_epi32, _mm256_div_ps, _mm256_extractf128_ps,
    _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_mask_storeu_epi16,
    _mm256_maskload_ps, _mm256_maskstore_ps, _mm256_maskz_loadu_epi16, _mm256_max_ps,
    _mm256_min_ps, _mm256_mul_ps, _mm256_packus_epi32, _mm256_permute4x64_epi64, _mm256_round_ps,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi32, _mm256_srli_epi32, _mm256_storeu_ps,
    _mm256_storeu_si256, _mm256_sub_ps, _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512,
    _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cmp_ps_mask, _mm512_cvtepi32_epi16,
    _mm512_cvtepu16_epi32, _mm512_cvtneps_pbh, _mm512_div_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_mask_blend_epi32, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps,
    _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps, _mm512_reduce_add_ps, _mm512_reduce_max_ps,
    _mm512_roundscale_ps, _mm512_scalef_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32,
    _mm512_srli_epi32, _mm512_storeu_ps, _mm512_sub_ps,
};
use std::mem::transmute;

use half::bf16;

use super::{Simd, intrinsics};

/// AVX2 with FMA.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;
/// AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;
/// The same with `vdpbf16ps` and its conversions.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16;

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
/// Sign and exponent, and the quiet bit, of a `bf16` that is not a number.
const QUIET_NAN: i32 = 0x7FC0;

/// Both sets of 512 bits, which differ in what they do with `bf16`.
macro_rules! avx512 {
    ($set:ident: $($own:tt)*) => {
        impl Simd for $set {
            const LANES: usize = 16;
            const MR: usize = 12;
            type V = __m512;
            #[inline(always)]
            unsafe fn fetch(p: *const u8) {
                // SAFETY: a hint, which any address may be given to.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
            }
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
                low(v: __m512) -> __m512 = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(v)));
                high(v: __m512) -> __m512 = _mm512_castsi512_ps(
                    _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0xFFFF_0000u32 as i32)));
                widen(p: *const bf16) -> __m512 = widen16(_mm256_loadu_si256(p.cast()));
                widen_first(p: *const bf16, n: usize) -> __m512 = widen16(_mm256_maskz_loadu_epi16((1u16 << n) - 1, p.cast()));
                narrow(p: *mut bf16, v: __m512) -> () = _mm256_storeu_si256(p.cast(), $set::narrowed(v));
                narrow_first(p: *mut bf16, v: __m512, n: usize) -> () =
                    _mm256_mask_storeu_epi16(p.cast(), (1u16 << n) - 1, $set::narrowed(v));
                $($own)*
            }
        }
    };
}

avx512!(Avx512:);
avx512!(Avx512Bf16: dot_pairs(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_dpbf16_ps(c, pairs(a), pairs(b)););

/// The same bits as pairs of `bf16`.
#[inline(always)]
fn pairs(v: __m512) -> __m512bh {
    // SAFETY: both types are 512 bits, of any pattern.
    unsafe { transmute::<__m512, __m512bh>(v) }
}

#[inline(always)]
unsafe fn widen16(x: __m256i) -> __m512 {
    // SAFETY: AVX-512 is the caller's promise.
    unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x))) }
}

impl Avx512Bf16 {
    #[inline(always)]
    unsafe fn narrowed(v: __m512) -> __m256i {
        // SAFETY: AVX-512-BF16 is the caller's promise; both types are 256 bits.
        unsafe { transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v)) }
    }
}

impl Avx512 {
    /// Adds half of the last place kept (one less where that place is even), then cuts.
    #[inline(always)]
    unsafe fn narrowed(v: __m512) -> __m256i {
        // SAFETY: AVX-512 is the caller's promise.
        unsafe {
            let bits: __m512i = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(
                nan,
                rounded,
                _mm512_set1_epi32(QUIET_NAN),
            ))
        }
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

/// All ones in the first `n <= 8` lanes.
#[inline(always)]
unsafe fn first(n: usize) -> __m256i {
    const WINDOW: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: eight values from `8 - n` on lie in the window.
    unsafe { _mm256_loadu_si256(WINDOW.as_ptr().add(8 - n).cast()) }
}

impl Avx2 {
    /// See [`Avx512::narrowed`].
    #[inline(always)]
    unsafe fn narrowed(v: __m256) -> __m128i {
        // SAFETY: AVX2 is the caller's promise.
        unsafe {
            let bits = _mm256_castps_si256(v);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            let rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(QUIET_NAN), nan);
            let packed = _mm256_packus_epi32(rounded, rounded);
            _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b1000>(packed))
        }
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
        load_first(p: *const f32, n: usize) -> __m256 = _mm256_maskload_ps(p, first(n));
        store_first(p: *mut f32, v: __m256, n: usize) -> () = _mm256_maskstore_ps(p, first(n), v);
        low(v: __m256) -> __m256 = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(v)));
        high(v: __m256) -> __m256 =
            _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0xFFFF_0000u32 as i32)));
        widen(p: *const bf16) -> __m256 = _mm256_castsi256_ps(
            _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))));
        narrow(p: *mut bf16, v: __m256) -> () = _mm_storeu_si128(p.cast(), Avx2::narrowed(v));
    }
}
