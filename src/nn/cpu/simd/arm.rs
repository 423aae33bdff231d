//! The vectors of 64-bit ARM.

use std::arch::aarch64::*;

use half::bf16;

use super::{Simd, intrinsics};

/// ARM NEON.
#[derive(Clone, Copy)]
pub(crate) struct Neon;

impl Neon {
    /// Adds half of the last place kept (one less where that place is even), then cuts.
    #[inline(always)]
    unsafe fn narrowed(v: float32x4_t) -> uint16x4_t {
        // SAFETY: every 64-bit ARM has NEON.
        unsafe {
            let bits = vreinterpretq_u32_f32(v);
            let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
            let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
            let number = vceqq_f32(v, v);
            vshrn_n_u32::<16>(vbslq_u32(number, rounded, vdupq_n_u32(0x7FC0_0000)))
        }
    }
}

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
        low(v: float32x4_t) -> float32x4_t = vreinterpretq_f32_u32(vshlq_n_u32::<16>(vreinterpretq_u32_f32(v)));
        high(v: float32x4_t) -> float32x4_t =
            vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0xFFFF_0000)));
        widen(p: *const bf16) -> float32x4_t = vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast())));
        narrow(p: *mut bf16, v: float32x4_t) -> () = vst1_u16(p.cast(), Neon::narrowed(v));
    }
}
