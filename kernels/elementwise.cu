// What is left between the products: joining channels, activations, sums, casts, and the epilogue of a product that another library made.
//
// Shapes: any; [rows][C] or a flat count. Floor: bytes. Nothing here is on the path where gemm.cu fuses it.
//
// How: blocks stride over the grid, a thread moves 16 bytes at a time (the end of a row that is not a multiple goes value by value).
// Versions considered: a thread per value (half to a quarter of the bandwidth for 16 bits); this.
#include "common.cuh"

constexpr int THREADS = 256;

// First index of this thread, and how far it is to the next.
__device__ inline size_t first_index() { return static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x; }
__device__ inline size_t index_stride() { return static_cast<size_t>(gridDim.x) * THREADS; }

// Row and column of the i-th of rows `width` long; 64-bit division only where it is needed.
struct Cell {
    size_t row;
    unsigned column;

    __device__ Cell(size_t i, unsigned width) {
        row = i >> 32 ? i / width : static_cast<unsigned>(i) / width;
        column = static_cast<unsigned>(i - row * width);
    }
};

// out[i] = f(of N values of each input at i), `count` values, flat.
template <typename From, typename To, typename F>
__device__ void map(const From* a, const From* b, To* out, size_t count, F f) {
    constexpr int N = sizeof(From) > sizeof(To) ? LANE_VALUES<From> : LANE_VALUES<To>;
    for (size_t i = first_index() * N; i < count; i += index_stride() * N) {
        const int valid = static_cast<int>(count - i < N ? count - i : N);
        float x[N], y[N] = {};
        load_tail<N>(a + i, valid == N, valid, x);
        if (b) load_tail<N>(b + i, valid == N, valid, y);
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] = f(x[j], y[j]);
        store_tail<N>(out + i, valid == N, valid, x);
    }
}

template <int N, typename T>
__device__ void concat_channels(const T* a, const T* b, T* out, size_t pixels, int channels_a, int channels_b) {
    const int channels = channels_a + channels_b;
    for (size_t i = first_index(); i < pixels * (channels / N); i += index_stride()) {
        const Cell cell(i, channels / N);
        const int c = cell.column * N;
        const T* from = c < channels_a ? a + cell.row * channels_a + c : b + cell.row * channels_b + (c - channels_a);
        *reinterpret_cast<Pack<T, N>*>(out + i * N) = *reinterpret_cast<const Pack<T, N>*>(from);
    }
}

// [rows][2 * channels], values then gates, to [rows][channels].
template <int N, typename T>
__device__ void geglu(const T* x, T* out, size_t rows, int channels) {
    for (size_t i = first_index(); i < rows * (channels / N); i += index_stride()) {
        const Cell cell(i, channels / N);
        const T* value = x + cell.row * 2 * channels + cell.column * N;
        float v[N], g[N];
        load<N>(value, v);
        load<N>(value + channels, g);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] *= gelu(g[j]);
        store<N>(out + i * N, v);
    }
}

// Alternating values and gates [count][2], as a library's product leaves them when the weight's rows are laid out for gemm.cu, to [count].
template <int N, typename T>
__device__ void geglu_pairs(const T* x, T* out, size_t count) {
    for (size_t i = first_index() * N; i < count; i += index_stride() * N) {
        const int valid = static_cast<int>(count - i < N ? count - i : N);
        float pairs[2 * N], v[N];
        load_tail<2 * N>(x + 2 * i, valid == N, 2 * valid, pairs);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] = pairs[2 * j] * gelu(pairs[2 * j + 1]);
        store_tail<N>(out + i, valid == N, valid, v);
    }
}

template <typename T>
struct Epilogue {
    const T* bias;
    const T* shift;
    const T* slopes;
    const T* residual;
    int rows_per_image;
    int activation;
};

// In the order of gemm.cu.
template <int N, typename T>
__device__ void finish(const T* x, const Epilogue<T>& e, T* out, size_t rows, int channels) {
    for (size_t i = first_index(); i < rows * (channels / N); i += index_stride()) {
        const Cell cell(i, channels / N);
        const int c = cell.column * N;
        float v[N], w[N];
        load<N>(x + i * N, v);
        const auto add = [&](const T* p) {
            load<N>(p, w);
#pragma unroll
            for (int j = 0; j < N; ++j) v[j] += w[j];
        };
        if (e.bias) add(e.bias + c);
        if (e.shift) add(e.shift + cell.row / e.rows_per_image * channels + c);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] = activate(e.activation, v[j]);
        if (e.slopes) {
            load<N>(e.slopes + c, w);
#pragma unroll
            for (int j = 0; j < N; ++j) v[j] = fmaf(fminf(v[j], 0.0f), w[j], fmaxf(v[j], 0.0f));
        }
        if (e.residual) add(e.residual + i * N);
        store<N>(out + i * N, v);
    }
}

// Every pixel four times: a thread reads a vector once and writes it to its two rows of two.
template <int N, typename T>
__device__ void upsample_nearest(const T* x, T* out, int batch, int height, int width, int channels) {
    const size_t pixels = static_cast<size_t>(batch) * height * width;
    for (size_t i = first_index(); i < pixels * (channels / N); i += index_stride()) {
        const Cell cell(i, channels / N), at(cell.row, width);  // at.row counts lines of all images
        const Pack<T, N> values = *reinterpret_cast<const Pack<T, N>*>(x + i * N);
        T* corner = out + (at.row * 4 * width + at.column * 2) * static_cast<size_t>(channels) + cell.column * N;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            *reinterpret_cast<Pack<T, N>*>(corner + (static_cast<size_t>(j / 2) * 2 * width + j % 2) * channels) = values;
        }
    }
}

// Runs FUNCTION in vectors where rows consist of them, else value by value.
#define IN_VECTORS(T, CHANNELS, FUNCTION, ...)       \
    if ((CHANNELS) % LANE_VALUES<T> == 0) {          \
        FUNCTION<LANE_VALUES<T>>(__VA_ARGS__);       \
    } else {                                         \
        FUNCTION<1>(__VA_ARGS__);                    \
    }

#define ELEMENTWISE(T)                                                                                                                        \
    KERNEL(THREADS) concat_channels_##T(const T* a, const T* b, T* out, long long pixels, int channels_a, int channels_b) {                    \
        IN_VECTORS(T, channels_a | channels_b, concat_channels, a, b, out, pixels, channels_a, channels_b)                                     \
    }                                                                                                                                         \
    KERNEL(THREADS) activate_##T(const T* x, T* out, long long count, int activation) {                                                       \
        map(x, static_cast<const T*>(nullptr), out, count, [=](float v, float) { return activate(activation, v); });                           \
    }                                                                                                                                         \
    KERNEL(THREADS) add_##T(const T* a, const T* b, T* out, long long count) {                                                                \
        map(a, b, out, count, [](float v, float w) { return v + w; });                                                                        \
    }                                                                                                                                         \
    KERNEL(THREADS) geglu_##T(const T* x, T* out, long long rows, int channels) { IN_VECTORS(T, channels, geglu, x, out, rows, channels) }     \
    KERNEL(THREADS) geglu_pairs_##T(const T* x, T* out, long long count) { geglu_pairs<LANE_VALUES<T> / 2>(x, out, count); }                   \
    KERNEL(THREADS) finish_##T(const T* x, const T* bias, const T* shift, const T* slopes, const T* residual, T* out, long long rows,         \
                               int channels, int rows_per_image, int activation) {                                                            \
        const Epilogue<T> epilogue{bias, shift, slopes, residual, rows_per_image, activation};                                                \
        IN_VECTORS(T, channels, finish, x, epilogue, out, rows, channels)                                                                     \
    }                                                                                                                                         \
    KERNEL(THREADS) upsample_nearest_##T(const T* x, T* out, int batch, int height, int width, int channels) {                                \
        IN_VECTORS(T, channels, upsample_nearest, x, out, batch, height, width, channels)                                                     \
    }
FOR_EACH_TYPE(ELEMENTWISE)

#define CAST(A, B)                                                                                                          \
    KERNEL(THREADS) cast_##A##_##B(const A* x, B* out, long long count) {                                                   \
        map(x, static_cast<const A*>(nullptr), out, count, [](float v, float) { return v; });                               \
    }
CAST(bf16, f16)
CAST(bf16, f32)
CAST(f16, bf16)
CAST(f16, f32)
CAST(f32, bf16)
CAST(f32, f16)
