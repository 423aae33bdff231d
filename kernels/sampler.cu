// What lies between two calls of the network: scaling its input, guidance, a solver's sum, the mask, the check for NaN.
//
// Shapes: latents f32 planar [batch][4][pixels], network tensors [copies][batch][pixels][4]; 16384 pixels at 1024x1024.
// Floor: a launch each; the tensors are 0.3 MB. What counts is that nothing comes from the host: coefficients lie in device memory, a row
// per step, and the step is a counter there too, so one captured graph serves all steps.
//
// Versions considered: candle's operations (a dozen launches and two copies a step); this, three launches a step.
#include "common.cuh"

constexpr int THREADS = 256;

__device__ inline size_t first_index() { return static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x; }
__device__ inline size_t index_stride() { return static_cast<size_t>(gridDim.x) * THREADS; }

// This step's coefficients.
struct Coefficients {
    const float* row;

    __device__ Coefficients(const float* table, const int* step, int width, int column)
        : row(table + (step ? static_cast<size_t>(*step) * width : 0) + column) {}
    __device__ float operator[](int i) const { return row[i]; }
};

// A pixel of a batch of planar latents.
struct Pixel {
    size_t image, pixel;

    __device__ Pixel(size_t i, int pixels) : image(i / pixels), pixel(i % pixels) {}
    __device__ size_t planar(int channel, int channels, int pixels) const { return (image * channels + channel) * pixels + pixel; }
    // In copy `copy` of a batch of channels-last tensors.
    __device__ size_t channels_last(int copy, int batch, int channel, int channels, int pixels) const {
        return ((static_cast<size_t>(copy) * batch + image) * pixels + pixel) * channels + channel;
    }
};

template <typename T>
__device__ void scale_input(const float* latents, T* out, Coefficients c, int batch, int channels, int pixels, int copies) {
    for (size_t i = first_index(); i < static_cast<size_t>(batch) * pixels; i += index_stride()) {
        const Pixel at(i, pixels);
        for (int channel = 0; channel < channels; ++channel) {
            const T value = from_float<T>(latents[at.planar(channel, channels, pixels)] * c[0]);
            for (int copy = 0; copy < copies; ++copy) out[at.channels_last(copy, batch, channel, channels, pixels)] = value;
        }
    }
}

// Coefficients: c_skip, c_out, then the weights of copies 1, 2, ... against copy 0, the negative prompt's.
template <typename T>
__device__ void guide(const T* prediction, const float* latents, float* denoised, Coefficients c, int batch, int channels, int pixels, int copies) {
    for (size_t i = first_index(); i < static_cast<size_t>(batch) * pixels; i += index_stride()) {
        const Pixel at(i, pixels);
        for (int channel = 0; channel < channels; ++channel) {
            const float base = to_float(prediction[at.channels_last(0, batch, channel, channels, pixels)]);
            float guided = base;
            for (int copy = 1; copy < copies; ++copy) {
                guided += c[1 + copy] * (to_float(prediction[at.channels_last(copy, batch, channel, channels, pixels)]) - base);
            }
            const size_t to = at.planar(channel, channels, pixels);
            denoised[to] = c[0] * latents[to] + c[1] * guided;
        }
    }
}

template <typename T>
__device__ void check_finite(const T* x, size_t count, int* flag) {
    constexpr int N = LANE_VALUES<T>;
    bool bad = false;
    for (size_t i = first_index() * N; i < count; i += index_stride() * N) {
        const int valid = static_cast<int>(count - i < N ? count - i : N);
        float v[N];
        load_tail<N>(x + i, valid == N, valid, v);
#pragma unroll
        for (int j = 0; j < N; ++j) bad |= !isfinite(v[j]);
    }
    // Everyone writes the same value.
    if (bad) *flag = 1;
}

#define SAMPLER(T)                                                                                                                       \
    KERNEL(THREADS) scale_input_##T(const float* latents, T* out, const float* table, const int* step, int width, int column, int batch, \
                                    int channels, int pixels, int copies) {                                                              \
        scale_input(latents, out, Coefficients(table, step, width, column), batch, channels, pixels, copies);                            \
    }                                                                                                                                    \
    KERNEL(THREADS) guide_##T(const T* prediction, const float* latents, float* denoised, const float* table, const int* step, int width, \
                              int column, int batch, int channels, int pixels, int copies) {                                             \
        guide(prediction, latents, denoised, Coefficients(table, step, width, column), batch, channels, pixels, copies);                 \
    }                                                                                                                                    \
    KERNEL(THREADS) check_finite_##T(const T* x, long long n, int* flag) { check_finite(x, n, flag); }
FOR_EACH_TYPE(SAMPLER)

KERNEL(THREADS) combine_latents(float* out, const float* x0, const float* x1, const float* x2, const float* x3, const float* x4, const float* x5,
                                const float* x6, const float* x7, const float* table, const int* step, int width, int column, int count,
                                long long n) {
    const Coefficients c(table, step, width, column);
    const float* const inputs[8] = {x0, x1, x2, x3, x4, x5, x6, x7};
    for (size_t i = first_index(); i < static_cast<size_t>(n); i += index_stride()) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (j < count) sum = fmaf(c[j], inputs[j][i], sum);
        }
        out[i] = sum;
    }
}

KERNEL(THREADS) mask_blend(float* x, const float* init, const float* paint, long long n) {
    for (size_t i = first_index(); i < static_cast<size_t>(n); i += index_stride()) x[i] = init[i] + paint[i] * (x[i] - init[i]);
}

KERNEL(1) advance_step(int* step) { *step += 1; }
