// What every kernel here shares: types, 16-byte access, reductions, activations, and the few PTX instructions used.
//
// Conventions: arithmetic is f32 whatever the storage type; sums have one order that no launch shape of other blocks can
// change (no float atomics), so the same input gives the same bytes. Activations are channels-last. Offsets into tensors are
// 64-bit, counts 32-bit.
//
// The wrappers between EMULATION marks are the only code that kernels/emulate/ replaces: there the same sources run on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;
typedef __half f16;
typedef float f32;

// Writes one entry point per type: ENTRY is a macro of the type, which is also the suffix of the name.
#define FOR_16_BIT(ENTRY) ENTRY(bf16) ENTRY(f16)
#define FOR_EACH_TYPE(ENTRY) FOR_16_BIT(ENTRY) ENTRY(f32)

// An entry point for blocks of `threads`; a second argument asks for that many blocks a multiprocessor.
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// Values of T in the 16 bytes that one thread moves at best.
template <typename T>
constexpr int LANE_VALUES = 16 / sizeof(T);

// ---------------------------------------------------------------------------------------------------------------- types

__device__ inline float to_float(f32 x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(f16 x) { return __half2float(x); }

// Rounds to nearest, ties to even.
template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline f32 from_float<f32>(float x) { return x; }
template <>
__device__ inline bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline f16 from_float<f16>(float x) { return __float2half_rn(x); }

// -------------------------------------------------------------------------------------------------------- memory access

// N values moved by one instruction; N * sizeof(T) is a power of two up to 16.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
    T v[N];
};

// N values at p, which is a multiple of their size (16 bytes at most).
template <int N, typename T>
__device__ inline void load(const T* p, float (&v)[N]) {
    constexpr int STEP = N < LANE_VALUES<T> ? N : LANE_VALUES<T>;
#pragma unroll
    for (int i = 0; i < N; i += STEP) {
        const Pack<T, STEP> pack = *reinterpret_cast<const Pack<T, STEP>*>(p + i);
#pragma unroll
        for (int j = 0; j < STEP; ++j) v[i + j] = to_float(pack.v[j]);
    }
}

template <int N, typename T>
__device__ inline void store(T* p, const float (&v)[N]) {
    constexpr int STEP = N < LANE_VALUES<T> ? N : LANE_VALUES<T>;
#pragma unroll
    for (int i = 0; i < N; i += STEP) {
        Pack<T, STEP> pack;
#pragma unroll
        for (int j = 0; j < STEP; ++j) pack.v[j] = from_float<T>(v[i + j]);
        *reinterpret_cast<Pack<T, STEP>*>(p + i) = pack;
    }
}

// The same for the end of a row: `whole` says that all N are there and aligned, else the first `valid` go one by one.
template <int N, typename T>
__device__ inline void load_tail(const T* p, bool whole, int valid, float (&v)[N]) {
    if (whole) {
        load<N>(p, v);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = i < valid ? to_float(p[i]) : 0.0f;
}

template <int N, typename T>
__device__ inline void store_tail(T* p, bool whole, int valid, const float (&v)[N]) {
    if (whole) {
        store<N>(p, v);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (i < valid) p[i] = from_float<T>(v[i]);
    }
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ------------------------------------------------------------------------------------------------------------ reductions

// The same value in all lanes, bit for bit: a butterfly adds the same pairs on both sides.
__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(ALL_LANES, x, mask);
    return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, mask));
    return x;
}

// ----------------------------------------------------------------------------------------------------------- activations

// In the order of sdgen's `Activation`.
enum Activation { NONE = 0, SILU = 1, GELU = 2, QUICK_GELU = 3, RELU = 4, LEAKY_RELU = 5 };

__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }
__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

__device__ inline float activate(int activation, float x) {
    switch (activation) {
        case SILU: return silu(x);
        case GELU: return gelu(x);
        case QUICK_GELU: return x / (1.0f + expf(-1.702f * x));
        case RELU: return fmaxf(x, 0.0f);
        case LEAKY_RELU: return fmaxf(x, 0.2f * x);
        default: return x;
    }
}

// ------------------------------------------------------------------------------------------------------------------- PTX
// EMULATION: from here on replaced.
#ifndef SDGEN_EMULATION

// The block's dynamic shared memory.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Starts copying 16 bytes to shared memory past the L1 cache, of which those from `bytes` (0 or 16) on become zeros.
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}

// Closes the group of copies that this thread has started since the last call.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but this thread's last PENDING groups have landed; other threads see them after a barrier.
template <int PENDING>
__device__ inline void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Four 8x8 matrices of 16-bit values: lane l names row l % 8 of matrix l / 8 (16 bytes); lane l gets of each matrix the values
// 2 * (l % 4) and + 1 of row l / 4.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

// The same of the transposed matrices: lane l gets rows 2 * (l % 4) and + 1 of column l / 4.
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

// d[16][8] += a[16][16] b[16][8] over a warp (m16n8k16). With g = lane / 4, t = lane % 4: a = rows g, g+8, g, g+8 at columns 2t (first
// two) and 2t+8; b = rows 2t and 2t+8 of column g; d = columns 2t, 2t+1 of row g, then of row g+8.
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif  // SDGEN_EMULATION

// Two values in one register, the first in the low half, as `multiply_add` takes them.
template <typename T>
__device__ inline uint32_t pack_pair(float low, float high) {
    union {
        Pack<T, 2> pair;
        uint32_t bits;
    } u;
    u.pair.v[0] = from_float<T>(low);
    u.pair.v[1] = from_float<T>(high);
    return u.bits;
}
