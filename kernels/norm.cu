// Group norm (+ SiLU), the same of a picture that is seen strip by strip, and layer norm.
//
// Shapes: pictures [batch][pixels][C], C up to 4096 in 32 groups; SDXL's UNet has 320..2560 channels at 16384..1024 pixels, its VAE
// 128..512 channels at 1048576..16384. Rows of layer norm [rows][640 or 1280].
// Floor: bytes. Group norm reads twice and writes once (the second read often hits the L2), layer norm reads and writes once.
//
// Group norm is two passes over the tensor and no third launch: statistics leaves one (mean, squared deviations) per slice
// and group, and every block of apply merges the few slices of its image by itself, in order. Sums are taken per channel relative
// to the image's first pixel, so a mean far from zero does not eat the variance (as src/nn/cpu/norm.rs does it).
//
// Versions considered:
//   1. one block a (image, group): 64 blocks at batch 2, and 20-byte runs of a pixel's 320 channels: neither fills a card.
//   2. thread = one channel, runs over pixels: coalesced, 2-byte loads.
//   3. thread = 16 bytes of channels over every L-th pixel of a slice, L = 256 / vectors a pixel (this one): all loads are 16 bytes,
//      neighbouring threads read on without a gap, any C and any group size, weights stay in registers during apply.
//   4. statistics in the epilogue of the convolution before: saves the first read, to be tried with a measurement.
#include "common.cuh"
#include "e4m3.cuh"

constexpr int THREADS = 256;

// One or two pictures of `pixels` pixels, their channels side by side.
template <typename T>
struct Picture {
    const T* x;
    const T* x2;
    int channels;
    int channels2;

    __device__ int all() const { return channels + channels2; }
    // Of the image's first pixel: where channel c lies, and how far it is to the next pixel.
    __device__ const T* channel(size_t first_pixel, int c) const {
        return c < channels ? x + first_pixel * channels + c : x2 + first_pixel * channels2 + (c - channels);
    }
    __device__ int stride(int c) const { return c < channels ? channels : channels2; }
    __device__ bool whole_vectors() const { return (channels | channels2) % LANE_VALUES<T> == 0; }
};

// The part of a pass over channels that a thread does: `vectors` vectors a pixel are dealt to 256 threads as (pixel lane, vector),
// in passes of 256 vectors where there are more.
struct Deal {
    int vectors;  // of this pass
    int lanes;    // pixels side by side
    int lane;     // of this thread; >= lanes: idle
    int vector;

    __device__ Deal(int all, int first) {
        vectors = min(all - first, THREADS);
        lanes = THREADS / vectors;
        lane = threadIdx.x / vectors;
        vector = first + threadIdx.x % vectors;
    }
    __device__ bool busy() const { return lane < lanes; }
};

// Slice `index` of `count` over `pixels`.
struct Slice {
    int begin;
    int end;

    __device__ Slice(int pixels, int index, int count) {
        const int size = ceil_div(pixels, count);
        begin = min(static_cast<long long>(index) * size, static_cast<long long>(pixels));
        end = min(static_cast<long long>(begin) + size, static_cast<long long>(pixels));
    }
    __device__ int pixels() const { return end - begin; }
};

// sums [2][C] = per channel, over a slice of an image: x - origin, then its square. `scratch` is [2 * N][256]. `origin` names the value that is
// taken off each channel. Ends with a barrier.
template <int N, typename T, typename Origin>
__device__ void slice_sums(Picture<T> picture, size_t first_pixel, Slice slice, float* sums, float* scratch, Origin origin) {
    const int channels = picture.all();
    for (int first = 0; first < channels / N; first += THREADS) {
        const Deal deal(channels / N, first);
        const int c = deal.vector * N;
        float sum[N] = {}, square[N] = {};
        if (deal.busy()) {
            const T* p = picture.channel(first_pixel, c);
            const size_t stride = picture.stride(c);
            float at[N];
#pragma unroll
            for (int i = 0; i < N; ++i) at[i] = origin(p, c, i);
#pragma unroll 4
            for (int pixel = slice.begin + deal.lane; pixel < slice.end; pixel += deal.lanes) {
                float v[N];
                load<N>(p + pixel * stride, v);
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const float d = v[i] - at[i];
                    sum[i] += d;
                    square[i] = fmaf(d, d, square[i]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            scratch[i * THREADS + threadIdx.x] = sum[i];
            scratch[(N + i) * THREADS + threadIdx.x] = square[i];
        }
        __syncthreads();
        if (deal.lane == 0) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float s = 0.0f, q = 0.0f;
                for (int lane = 0; lane < deal.lanes; ++lane) {
                    s += scratch[i * THREADS + lane * deal.vectors + threadIdx.x];
                    q += scratch[(N + i) * THREADS + lane * deal.vectors + threadIdx.x];
                }
                sums[c + i] = s;
                sums[channels + c + i] = q;
            }
        }
        __syncthreads();
    }
}

template <int N, typename T>
__device__ void statistics(Picture<T> picture, float2* partials, int pixels, int groups, float* sums) {
    const int channels = picture.all();
    const Slice slice(pixels, blockIdx.x, gridDim.x);
    const size_t first_pixel = static_cast<size_t>(blockIdx.y) * pixels;
    slice_sums<N>(picture, first_pixel, slice, sums, sums + 2 * channels, [](const T* p, int, int i) { return to_float(p[i]); });

    // A warp a group: means of its channels, their mean, then the deviations within and between channels.
    const float n = slice.pixels(), inverse = n > 0.0f ? 1.0f / n : 0.0f;
    const int size = channels / groups;
    for (int group = threadIdx.x / WARP; group < groups; group += THREADS / WARP) {
        const int lane = threadIdx.x % WARP;
        const auto mean_of = [&](int c) { return to_float(*picture.channel(first_pixel, c)) + sums[c] * inverse; };
        // Relative to the first channel, for the same reason.
        const float base = mean_of(group * size);
        float mean = 0.0f;
        for (int c = group * size + lane; c < (group + 1) * size; c += WARP) mean += mean_of(c) - base;
        mean = base + warp_sum(mean) / size;
        float deviation = 0.0f;
        for (int c = group * size + lane; c < (group + 1) * size; c += WARP) {
            const float within = fmaxf(sums[channels + c] - sums[c] * sums[c] * inverse, 0.0f);
            const float between = mean_of(c) - mean;
            deviation += within + n * between * between;
        }
        deviation = warp_sum(deviation);
        if (lane == 0) partials[(static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x) * groups + group] = make_float2(mean, deviation);
    }
}

// Mean and 1 / sqrt(var + eps) of every group of image blockIdx.y, [groups] each, from its slices. Ends with a barrier.
__device__ void merge_slices(const float2* partials, int pixels, int size, int groups, int slices, float eps, float* means, float* scales) {
    partials += static_cast<size_t>(blockIdx.y) * slices * groups;
    for (int group = threadIdx.x / WARP; group < groups; group += THREADS / WARP) {
        const int lane = threadIdx.x % WARP;
        const float base = partials[group].x;
        float mean = 0.0f;
        for (int s = lane; s < slices; s += WARP) {
            const int n = Slice(pixels, s, slices).pixels();
            if (n > 0) mean += n * (partials[s * groups + group].x - base);
        }
        mean = base + warp_sum(mean) / pixels;
        float deviation = 0.0f;
        for (int s = lane; s < slices; s += WARP) {
            const float n = Slice(pixels, s, slices).pixels();
            if (n > 0.0f) {
                const float2 part = partials[s * groups + group];
                deviation += part.y / size + n * (part.x - mean) * (part.x - mean);
            }
        }
        deviation = warp_sum(deviation);
        if (lane == 0) {
            means[group] = mean;
            scales[group] = 1.0f / sqrtf(deviation / pixels + eps);
        }
    }
    __syncthreads();
}

// out = (x - mean) * scale + bias over this block's slice of an image; `affine(c, mean, scale)` gives a channel's two numbers.
template <int N, typename T, typename Affine>
__device__ void apply(Picture<T> picture, const T* bias, T* out, int pixels, int silu_after, Affine affine) {
    const int channels = picture.all();
    const Slice slice(pixels, blockIdx.x, gridDim.x);
    const size_t first_pixel = static_cast<size_t>(blockIdx.y) * pixels;
    for (int first = 0; first < channels / N; first += THREADS) {
        const Deal deal(channels / N, first);
        if (!deal.busy()) continue;
        const int c = deal.vector * N;
        float mean[N], scale[N], offset[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            affine(c + i, mean[i], scale[i]);
            offset[i] = to_float(bias[c + i]);
        }
        const T* p = picture.channel(first_pixel, c);
        const size_t stride = picture.stride(c);
        T* to = out + first_pixel * channels + c;
#pragma unroll 2
        for (int pixel = slice.begin + deal.lane; pixel < slice.end; pixel += deal.lanes) {
            float v[N];
            load<N>(p + pixel * stride, v);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                v[i] = fmaf(v[i] - mean[i], scale[i], offset[i]);
                if (silu_after) v[i] = silu(v[i]);
            }
            store<N>(to + static_cast<size_t>(pixel) * channels, v);
        }
    }
}

template <int N, typename T>
__device__ void group_norm(Picture<T> picture, const T* weight, const T* bias, T* out, int pixels, int groups, int silu_after, const float* means,
                           const float* scales) {
    const int size = picture.all() / groups;
    apply<N>(picture, bias, out, pixels, silu_after, [=](int c, float& mean, float& scale) {
        mean = means[c / size];
        scale = scales[c / size] * to_float(weight[c]);
    });
}

// A picture whose channels do not come in whole vectors is read value by value.
#define GROUP_NORM(T)                                                                                                                     \
    KERNEL(THREADS, 3) group_norm_statistics_##T(const T* x, const T* x2, float2* partials, int pixels, int channels, int channels2,        \
                                              int groups) {                                                                               \
        DYNAMIC_SHARED(memory);                                                                                                           \
        float* sums = reinterpret_cast<float*>(memory);                                                                                   \
        const Picture<T> picture{x, x2, channels, channels2};                                                                             \
        if (picture.whole_vectors()) {                                                                                                    \
            statistics<LANE_VALUES<T>>(picture, partials, pixels, groups, sums);                                                          \
        } else {                                                                                                                          \
            statistics<1>(picture, partials, pixels, groups, sums);                                                                       \
        }                                                                                                                                 \
    }                                                                                                                                     \
    KERNEL(THREADS) group_norm_apply_##T(const T* x, const T* x2, const float2* partials, const T* weight, const T* bias, T* out,        \
                                         int pixels, int channels, int channels2, int groups, int slices, float eps, int silu_after) {   \
        DYNAMIC_SHARED(memory);                                                                                                           \
        float* means = reinterpret_cast<float*>(memory);                                                                                  \
        float* scales = means + groups;                                                                                                   \
        const Picture<T> picture{x, x2, channels, channels2};                                                                             \
        merge_slices(partials, pixels, picture.all() / groups, groups, slices, eps, means, scales);                                       \
        if (picture.whole_vectors()) {                                                                                                    \
            group_norm<LANE_VALUES<T>>(picture, weight, bias, out, pixels, groups, silu_after, means, scales);                            \
        } else {                                                                                                                          \
            group_norm<1>(picture, weight, bias, out, pixels, groups, silu_after, means, scales);                                         \
        }                                                                                                                                 \
    }
FOR_EACH_TYPE(GROUP_NORM)

// ------------------------------------------------------------------------------------------------ strips of a picture

template <int N, typename T>
__device__ void strip_sums(Picture<T> picture, const float* origin, float* partials, int pixels, float* sums) {
    const int channels = picture.channels;
    slice_sums<N>(picture, 0, Slice(pixels, blockIdx.x, gridDim.x), sums, sums + 2 * channels,
                  [=](const T*, int c, int i) { return origin[c + i]; });
    for (int i = threadIdx.x; i < 2 * channels; i += THREADS) partials[static_cast<size_t>(blockIdx.x) * 2 * channels + i] = sums[i];
}

#define MEASURED_NORM(T)                                                                                                                  \
    KERNEL(THREADS) channel_sums_##T(const T* x, const float* origin, float* partials, int pixels, int channels) {                        \
        DYNAMIC_SHARED(memory);                                                                                                           \
        float* sums = reinterpret_cast<float*>(memory);                                                                                   \
        const Picture<T> picture{x, nullptr, channels, 0};                                                                                \
        if (picture.whole_vectors()) {                                                                                                    \
            strip_sums<LANE_VALUES<T>>(picture, origin, partials, pixels, sums);                                                          \
        } else {                                                                                                                          \
            strip_sums<1>(picture, origin, partials, pixels, sums);                                                                       \
        }                                                                                                                                 \
    }                                                                                                                                     \
    KERNEL(WARP) group_affine_##T(const double* sums, const float* origin, const T* weight, float* affine, long long pixels,             \
                                  int channels, int groups, float eps) {                                                                  \
        group_affine(sums, origin, weight, affine, pixels, channels, groups, eps);                                                        \
    }                                                                                                                                     \
    KERNEL(THREADS) channel_affine_##T(const T* x, const float* affine, const T* bias, T* out, int pixels, int channels,                 \
                                       int silu_after) {                                                                                  \
        const Picture<T> picture{x, nullptr, channels, 0};                                                                                \
        const auto of = [=](int c, float& mean, float& scale) {                                                                           \
            mean = affine[c];                                                                                                             \
            scale = affine[channels + c];                                                                                                 \
        };                                                                                                                                \
        if (picture.whole_vectors()) {                                                                                                    \
            apply<LANE_VALUES<T>>(picture, bias, out, pixels, silu_after, of);                                                            \
        } else {                                                                                                                          \
            apply<1>(picture, bias, out, pixels, silu_after, of);                                                                         \
        }                                                                                                                                 \
    }

// One lane folds a group, in f64: a few hundred operations, once a picture and layer.
template <typename T>
__device__ void group_affine(const double* sums, const float* origin, const T* weight, float* affine, long long pixels, int channels, int groups,
                             float eps) {
    if (threadIdx.x != 0) return;
    const int size = channels / groups, first = blockIdx.x * size;
    const double n = static_cast<double>(pixels);
    double mean = 0.0, variance = 0.0;
    for (int c = first; c < first + size; ++c) mean += origin[c] + sums[c] / n;
    mean /= size;
    for (int c = first; c < first + size; ++c) {
        const double between = origin[c] + sums[c] / n - mean;
        variance += (sums[channels + c] - sums[c] * sums[c] / n) / n + between * between;
    }
    const double scale = 1.0 / sqrt(variance / size + eps);
    for (int c = first; c < first + size; ++c) {
        affine[c] = static_cast<float>(mean);
        affine[channels + c] = static_cast<float>(scale * to_float(weight[c]));
    }
}
FOR_EACH_TYPE(MEASURED_NORM)

KERNEL(THREADS) channel_sums_add(const float* partials, double* sums, int slices, int channels) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= 2 * channels) return;
    double sum = sums[i];
    for (int s = 0; s < slices; ++s) sum += partials[static_cast<size_t>(s) * 2 * channels + i];
    sums[i] = sum;
}

// ------------------------------------------------------------------------------------------------------------ layer norm

// Rows of a block: a warp each, so no barrier is needed.
constexpr int ROWS = 4;
// Values a lane keeps of its row between mean, variance and result (1280 channels, SDXL's widest); longer rows are read again, from the L1
// cache.
constexpr int KEPT = 40;

// A row [channels] dealt to the lanes of a warp in vectors of N; `each(i, c, v)` sees vector i of this lane, at channel c.
template <int N, typename T>
struct Row {
    const T* x;
    int channels;
    float kept[KEPT / N][N];

    __device__ Row(const T* x, int channels) : x(x), channels(channels) {
#pragma unroll
        for (int i = 0; i < KEPT / N; ++i) {
            const int c = (i * WARP + threadIdx.x % WARP) * N;
            if (c < channels) load<N>(x + c, kept[i]);
        }
    }

    template <typename Each>
    __device__ void for_each(Each each) const {
#pragma unroll
        for (int i = 0; i < KEPT / N; ++i) {
            const int c = (i * WARP + threadIdx.x % WARP) * N;
            if (c < channels) each(c, kept[i]);
        }
        for (int c = (KEPT / N * WARP + threadIdx.x % WARP) * N; c < channels; c += WARP * N) {
            float v[N];
            load<N>(x + c, v);
            each(c, v);
        }
    }
};

// `finish(c, y)` sees the normalised vectors.
template <int N, typename T, typename Finish>
__device__ void normalise(const Row<N, T>& row, const T* weight, const T* bias, float eps, Finish finish) {
    float sum = 0.0f;
    row.for_each([&](int, const float(&v)[N]) {
#pragma unroll
        for (int i = 0; i < N; ++i) sum += v[i];
    });
    const float mean = warp_sum(sum) / row.channels;
    float square = 0.0f;
    row.for_each([&](int, const float(&v)[N]) {
#pragma unroll
        for (int i = 0; i < N; ++i) square = fmaf(v[i] - mean, v[i] - mean, square);
    });
    const float scale = 1.0f / sqrtf(warp_sum(square) / row.channels + eps);
    row.for_each([&](int c, const float(&v)[N]) {
        float w[N], y[N];
        load<N>(weight + c, w);
        load<N>(bias + c, y);
#pragma unroll
        for (int i = 0; i < N; ++i) y[i] = fmaf((v[i] - mean) * scale, w[i], y[i]);
        finish(c, y);
    });
}

template <int N, typename T>
__device__ void layer_norm(const T* x, const T* weight, const T* bias, T* out, int rows, int channels, float eps) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP;
    if (row >= rows) return;
    const size_t at = static_cast<size_t>(row) * channels;
    normalise<N>(Row<N, T>(x + at, channels), weight, bias, eps, [=](int c, const float(&y)[N]) { store<N>(out + at + c, y); });
}

// Two rounds of normalising: the first finds the row's largest value, the second writes; the row itself stays in registers.
template <int N, typename T>
__device__ void layer_norm_fp8(const T* x, const T* weight, const T* bias, unsigned char* out, float* scales, int rows, int channels, float eps) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP;
    if (row >= rows) return;
    const size_t at = static_cast<size_t>(row) * channels;
    const Row<N, T> values(x + at, channels);
    float largest = 0.0f;
    normalise<N>(values, weight, bias, eps, [&](int, const float(&y)[N]) {
#pragma unroll
        for (int i = 0; i < N; ++i) largest = fmaxf(largest, fabsf(y[i]));
    });
    const float scale = e4m3_scale(warp_max(largest));
    if (threadIdx.x % WARP == 0) scales[row] = scale;
    normalise<N>(values, weight, bias, eps, [&](int c, const float(&y)[N]) { store_e4m3<N>(out + at + c, y, scale); });
}

#define LAYER_NORM(T)                                                                                                                     \
    KERNEL(ROWS* WARP, 4) layer_norm_##T(const T* x, const T* weight, const T* bias, T* out, int rows, int channels, float eps) {            \
        if (channels % LANE_VALUES<T> == 0) {                                                                                             \
            layer_norm<LANE_VALUES<T>>(x, weight, bias, out, rows, channels, eps);                                                        \
        } else {                                                                                                                          \
            layer_norm<1>(x, weight, bias, out, rows, channels, eps);                                                                     \
        }                                                                                                                                 \
    }                                                                                                                                     \
    KERNEL(ROWS* WARP) layer_norm_fp8_##T(const T* x, const T* weight, const T* bias, unsigned char* out, float* scales, int rows,        \
                                          int channels, float eps) {                                                                      \
        if (channels % LANE_VALUES<T> == 0) {                                                                                             \
            layer_norm_fp8<LANE_VALUES<T>>(x, weight, bias, out, scales, rows, channels, eps);                                            \
        } else {                                                                                                                          \
            layer_norm_fp8<1>(x, weight, bias, out, scales, rows, channels, eps);                                                         \
        }                                                                                                                                 \
    }
FOR_EACH_TYPE(LAYER_NORM)
