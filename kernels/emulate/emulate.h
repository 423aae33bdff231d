// What CUDA C++ gives the kernels, for a C++17 compiler on a CPU: one launch at a time, every thread of a block a fiber.
//
// Exactness: a thread runs until it waits at a barrier or for its warp, so what it has written is seen by others only as far as
// the kernel synchronises; the order in which threads run is chosen per launch, and a kernel whose result depends on it is wrong.
// Beyond that, what a GPU leaves undefined is an error here: a barrier that not all threads reach, warp operations that do not
// meet, copies that are read before they were waited for (shared memory is poisoned with NaN), addresses outside their buffer
// (guard pages) or not aligned (the compiler's checks).
#pragma once

#define SDGEN_EMULATION

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

using std::isfinite;
using std::signbit;

#define __global__
#define __device__
#define __host__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

// --------------------------------------------------------------------------------------------------------------- types

struct float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

namespace emulation {
template <typename To, typename From>
To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}
float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
}  // namespace emulation

inline float __half2float(__half x) { return emulation::half_to_float(x.bits); }
inline __half __float2half_rn(float x) { return {emulation::float_to_half(x)}; }

inline float __bfloat162float(__nv_bfloat16 x) { return emulation::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = emulation::bit_cast<uint32_t>(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <typename T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
    return a < b ? b : a;
}

// ---------------------------------------------------------------------------------------------------- threads and warps

namespace emulation {

struct Place {
    dim3 thread, block;
};
extern dim3 grid_size, block_size;
// Of the thread that runs.
extern Place place;
extern unsigned char* shared_memory;

// A barrier of the whole block.
void block_barrier();

// What the lanes of a warp do together; all must do the same.
enum class Together { SYNC, SHUFFLE, MATRICES, PRODUCT };

// Lays `bytes` (32 at most) of this lane beside those of the others and returns all of them, `EXCHANGE_STRIDE` apart, once
// every lane is there. They stay until the lane's next exchange but one.
constexpr size_t EXCHANGE_STRIDE = 32;
const unsigned char* exchange(Together what, const void* mine, size_t bytes);

int lane();

void copy_start(void* shared, const void* global, int bytes);
void copy_commit();
void copy_wait(int pending);
void load_matrices(uint32_t (&r)[4], const void* shared, bool transposed);
// d += a b of `multiply_add`; `decode` makes floats of 16-bit values.
void product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*decode)(uint16_t));

template <typename T>
T shuffle(T value, int from) {
    const unsigned char* all = exchange(Together::SHUFFLE, &value, sizeof(T));
    T result;
    memcpy(&result, all + from * EXCHANGE_STRIDE, sizeof(T));
    return result;
}

}  // namespace emulation

#define threadIdx (emulation::place.thread)
#define blockIdx (emulation::place.block)
#define gridDim (emulation::grid_size)
#define blockDim (emulation::block_size)

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulation::exchange(emulation::Together::SYNC, nullptr, 0); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::shuffle(value, emulation::lane() ^ mask);
}
// Within segments of `width` lanes.
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int) {
    return emulation::shuffle(value, emulation::lane() ^ mask);
}

// ----------------------------------------------------------------------------------- the replaced wrappers of common.cuh

#define DYNAMIC_SHARED(name) unsigned char* name = emulation::shared_memory

inline void copy_async(void* shared, const void* global, int bytes) { emulation::copy_start(shared, global, bytes); }
inline void copy_commit() { emulation::copy_commit(); }
template <int PENDING>
void copy_wait() {
    emulation::copy_wait(PENDING);
}
inline void load_matrices(uint32_t (&r)[4], const void* shared) { emulation::load_matrices(r, shared, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* shared) { emulation::load_matrices(r, shared, true); }
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
    emulation::product(d, a, b0, b1, [](uint16_t bits) { return __bfloat162float({bits}); });
}
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
    emulation::product(d, a, b0, b1, [](uint16_t bits) { return __half2float({bits}); });
}
