// 8-bit floats for linear layers: rows to e4m3 with a scale each, and the epilogue that undoes the scales.
//
// Shapes: activations [8192 or 2048][640..5120] per token, weights [outputs][k] per output channel (once, at load); sums [rows][outputs] f32.
// Floor: bytes. In front of the norms' linears layer_norm_fp8 of norm.cu does this without a pass of its own. The product is cublasLt's
// (sm_89 and later); where it applies the scales itself, dequantise is not needed. widen_e4m3 lets our own product check the library's.
//
// How: a warp a row: its largest magnitude, then the values again from the cache. Rounding: e4m3.cuh.
// Versions considered: one scale a tensor (needs the maximum of all rows first, and outliers of one token cost all others precision); this.
#include "common.cuh"
#include "e4m3.cuh"

constexpr int THREADS = 256;
// Of quantise_rows: a warp each.
constexpr int ROWS = 4;

template <int N, typename T>
__device__ void quantise_rows(const T* x, unsigned char* out, float* scales, int rows, int channels) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    const size_t at = static_cast<size_t>(row) * channels;
    float largest = 0.0f;
    for (int c = lane * N; c < channels; c += WARP * N) {
        float v[N];
        load<N>(x + at + c, v);
#pragma unroll
        for (int i = 0; i < N; ++i) largest = fmaxf(largest, fabsf(v[i]));
    }
    const float scale = e4m3_scale(warp_max(largest));
    if (lane == 0) scales[row] = scale;
    for (int c = lane * N; c < channels; c += WARP * N) {
        float v[N];
        load<N>(x + at + c, v);
        store_e4m3<N>(out + at + c, v, scale);
    }
}

template <typename T>
struct Dequantise {
    const float* sums;
    const float* row_scales;
    const float* column_scales;
    const T* bias;
    const T* residual;
    T* out;
    size_t rows;
    int columns;
    int activation;

    // Activates, adds the residual and stores W values of a row that is `width` long.
    template <int W>
    __device__ void finish(float (&v)[W], size_t row, int column, int width) const {
        const bool whole = width % W == 0;
        const size_t at = row * width + column;
        float w[W] = {};
        if (residual) load_tail<W>(residual + at, whole, width - column, w);
#pragma unroll
        for (int i = 0; i < W; ++i) v[i] = activate(activation, v[i]) + w[i];
        store_tail<W>(out + at, whole, width - column, v);
    }

    __device__ void run(bool geglu) const {
        const int vectors = ceil_div(columns, 8);
        const bool whole = columns % 8 == 0;
        for (size_t i = static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x; i < rows * vectors; i += static_cast<size_t>(gridDim.x) * THREADS) {
            const size_t row = i / vectors;
            const int column = static_cast<int>(i - row * vectors) * 8, valid = columns - column;
            float v[8], w[8];
            load_tail<8>(sums + row * columns + column, whole, valid, v);
            const float row_scale = row_scales ? row_scales[row] : 1.0f;
            if (column_scales) load_tail<8>(column_scales + column, whole, valid, w);
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] *= row_scale * (column_scales ? w[j] : 1.0f);
            if (bias) {
                load_tail<8>(bias + column, whole, valid, w);
#pragma unroll
                for (int j = 0; j < 8; ++j) v[j] += w[j];
            }
            if (geglu) {
                float gated[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) gated[j] = v[2 * j] * gelu(v[2 * j + 1]);
                finish<4>(gated, row, column / 2, columns / 2);
            } else {
                finish<8>(v, row, column, columns);
            }
        }
    }
};

KERNEL(THREADS) widen_e4m3(const unsigned char* x, float* out, long long count) {
    for (long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x; i < count; i += static_cast<long long>(gridDim.x) * THREADS) {
        out[i] = e4m3_value(x[i]);
    }
}

#define FP8(T)                                                                                                                          \
    KERNEL(ROWS* WARP) quantise_rows_##T(const T* x, unsigned char* out, float* scales, int rows, int channels) {                       \
        if (channels % LANE_VALUES<T> == 0) {                                                                                           \
            quantise_rows<LANE_VALUES<T>>(x, out, scales, rows, channels);                                                              \
        } else {                                                                                                                        \
            quantise_rows<1>(x, out, scales, rows, channels);                                                                           \
        }                                                                                                                               \
    }                                                                                                                                   \
    KERNEL(THREADS) dequantise_##T(const float* sums, const float* row_scales, const float* column_scales, const T* bias,               \
                                   const T* residual, T* out, long long rows, int columns, int activation, int geglu) {                 \
        Dequantise<T>{sums, row_scales, column_scales, bias, residual, out, static_cast<size_t>(rows), columns, activation}.run(geglu);  \
    }
FOR_EACH_TYPE(FP8)
