// What a solver does between two calls of the network, guidance included: one sum of up to eight latents.
//
// Shapes: f32 [batch, height, width, 4], 0.3 MB at 1024x1024. Floor: a launch; the tensors fit any cache. What counts is that nothing
// is copied and nobody waits: the sums of a step's formulas are merged on the host, where only their coefficients are, and run as one.
//
// Versions considered: candle's operations (a dozen launches a step); a table of all steps' coefficients in device memory for a graph of
// the whole run (every solver would have to be written down as a table); this, coefficients as parameters.
#include "common.cuh"

constexpr int THREADS = 256;

KERNEL(THREADS) combine_latents(float* out, const float* x0, const float* x1, const float* x2, const float* x3, const float* x4, const float* x5,
                                const float* x6, const float* x7, float c0, float c1, float c2, float c3, float c4, float c5, float c6, float c7,
                                int count, long long n) {
    const float* const inputs[8] = {x0, x1, x2, x3, x4, x5, x6, x7};
    const float c[8] = {c0, c1, c2, c3, c4, c5, c6, c7};
    const size_t stride = static_cast<size_t>(gridDim.x) * THREADS;
    for (size_t i = static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x; i < static_cast<size_t>(n); i += stride) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (j < count) sum = fmaf(c[j], inputs[j][i], sum);
        }
        out[i] = sum;
    }
}
