// The 8-bit float e4m3 (1 sign, 4 exponent, 3 mantissa bits, largest value 448, no infinity): rounding and row scales.
//
// Rounding is to nearest even and saturates. Cards from sm_89 on have an instruction for it; the arithmetic below is the same
// function for the others, and the one that the CPU emulation checks. NaN becomes 0x7f.
// Source: OCP 8-bit Floating Point Specification, revision 1.0, section 5.
#pragma once

#include "common.cuh"

constexpr float E4M3_LARGEST = 448.0f;

// What a row is divided by so that its largest magnitude becomes 448; a row of zeros, or of what is too small to divide, keeps 1.
__device__ inline float e4m3_scale(float largest) {
    const float scale = largest / E4M3_LARGEST;
    return scale > 0.0f ? scale : 1.0f;
}

// The value of a code.
__device__ inline float e4m3_value(unsigned code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float magnitude = (code & 0x7f) == 0x7f ? nanf("") : ldexpf(exponent ? 8 + mantissa : mantissa, max(exponent, 1) - 10);
    return code & 0x80 ? -magnitude : magnitude;
}

__device__ inline unsigned char e4m3_by_arithmetic(float x) {
    const unsigned sign = signbit(x) ? 0x80u : 0u;
    const float magnitude = fabsf(x);
    if (!(magnitude == magnitude)) return 0x7f;
    if (magnitude >= 464.0f) return sign | 0x7e;  // half way to the value after 448, which there is not
    // Below 2^-6 the steps are 2^-9; above, 8 steps to each power of two. `rintf` rounds ties to even.
    int exponent = 0;
    frexpf(magnitude, &exponent);
    exponent = magnitude > 0.0f ? max(exponent - 1, -6) : -6;
    const int steps = static_cast<int>(rintf(ldexpf(magnitude, 3 - exponent)));  // 8..16, or 0..8 at the lowest exponent
    // Sixteen steps carry into the exponent by themselves: the fields are added, not joined.
    return sign | static_cast<unsigned>((exponent + 6) * 8 + steps);
}

// Two values, the first in the low byte.
__device__ inline unsigned short e4m3_pair(float low, float high) {
#if !defined(SDGEN_EMULATION) && __CUDA_ARCH__ >= 890
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return e4m3_by_arithmetic(low) | e4m3_by_arithmetic(high) << 8;
#endif
}

// N values divided by `scale`; `out` is a multiple of N bytes.
template <int N>
__device__ inline void store_e4m3(unsigned char* out, const float (&v)[N], float scale) {
    if constexpr (N == 1) {
        *out = e4m3_pair(v[0] / scale, 0.0f) & 0xff;
    } else {
        Pack<unsigned short, N / 2> pack;
#pragma unroll
        for (int i = 0; i < N / 2; ++i) pack.v[i] = e4m3_pair(v[2 * i] / scale, v[2 * i + 1] / scale);
        *reinterpret_cast<Pack<unsigned short, N / 2>*>(out) = pack;
    }
}
