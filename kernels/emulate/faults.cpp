// Kernels that are wrong on purpose, each in one way that the emulation has to notice; tests/kernels/faults.rs.
#include "../common.cuh"
#include "launch.h"

// A value goes to the next thread; without the barrier the order of threads decides.
KERNEL(64) no_barrier(const float* x, float* out) {
    DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    shared[threadIdx.x] = x[threadIdx.x];
    out[threadIdx.x] = shared[(threadIdx.x + 1) % 64];
}

KERNEL(64) no_wait(const float* x, float* out) {
    DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    copy_async(shared + 4 * threadIdx.x, x, 16);
    copy_commit();
    __syncthreads();
    out[threadIdx.x] = shared[4 * threadIdx.x];
}

KERNEL(64) half_a_barrier(const float* x, float* out) {
    if (threadIdx.x < 32) __syncthreads();
    out[threadIdx.x] = x[threadIdx.x];
}

KERNEL(64) half_a_warp(const float* x, float* out) {
    float v = x[threadIdx.x];
    if (threadIdx.x % 2 == 0) v = __shfl_xor_sync(ALL_LANES, v, 2);
    out[threadIdx.x] = v;
}

KERNEL(64) one_too_far(const float* x, float* out) { out[threadIdx.x] = x[threadIdx.x + 1]; }

KERNEL(64) written_too_far(const float* x, float* out) { out[threadIdx.x + 1] = x[threadIdx.x]; }

KERNEL(64) not_aligned(const float* x, float* out) {
    float v[4] = {};
    if (threadIdx.x == 0) load<4>(x + 1, v);
    out[threadIdx.x] = v[0];
}

int main() {
    return emulation::run({
        ENTRY(no_barrier)
        ENTRY(no_wait)
        ENTRY(half_a_barrier)
        ENTRY(half_a_warp)
        ENTRY(one_too_far)
        ENTRY(written_too_far)
        ENTRY(not_aligned)
    });
}
