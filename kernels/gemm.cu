// Linear layers and convolutions: out[m][n] = epilogue(sum over k of a[m][k] * weight[n][k]).
//
// A convolution is the same product: its row m is an output pixel, its k runs over [tap][channel], and a is read in place from the
// picture (implicit GEMM: no im2col, no padded, enlarged or joined copy). Exact semantics: src/nn/cpu/gemm.rs.
//
// Shapes: SDXL at 1024x1024, batch 2: convolutions m = 32768, 8192, 2048 with n = 320..1280 and k = 2880..23040; linears m = 8192, 2048, n = 640..10240,
// k = 640..5120. VAE: m up to 1048576, n = 128..512 and 3, k = 1152..4608 and 36.
// Floor: 2 m n k operations; 64 % of a UNet forward are linears, 24 % convolutions.
//
// How: a block makes a tile of the output. Per step of 64 bytes of k (32 values of 16 bits, 16 of 32) the tile's rows of a and of the weight
// go to one of four stages in shared memory by cp.async, three steps ahead of their use. Rows of 64 bytes are swizzled so that ldmatrix meets no bank
// conflict. A warp owns a part of the tile and multiplies with mma.sync m16n8k16; sums stay f32 in registers. The epilogue passes through a slab
// of shared memory so that global memory is read and written in 16 bytes.
// k is never split: one order of summation, whatever the card.
//
// Versions considered:
//   1. a thread per output from global memory: the formula, 1 % of a card.
//   2. shared tiles, FMA (kept for f32, where it is the reference on the GPU).
//   3. mma.sync, two stages, 64-byte rows without swizzle: ldmatrix takes eight turns.
//   4. this: four stages, swizzle, tiles of 128x128 and 64x64.
//   5. wgmma + TMA (sm_90a) and tcgen05 (sm_100): needed for more than about two thirds of an H100; cublasLt and cuDNN have them, so
//      plain products belong there, and here what they cannot fuse (GEGLU, enlargement, two parts, circular edges).
#include "common.cuh"

// 18 ints, the same in the host's code.
struct GemmShape {
    int m, n, k;
    int channels, channels2;
    int height, width, out_height, out_width;
    int kernel, stride, pad, upsample, circular;
    int rows_per_image;
    int activation;
    int geglu;
    int shift_stride;
};

template <typename T>
struct Operands {
    const T* x;
    const T* x2;
    const T* weight;
    const T* bias;
    const T* shift;
    const T* slopes;
    const T* residual;
    T* out;
};

// ------------------------------------------------------------------------------------------------------ where rows come from

// Rows of matrices side by side.
template <typename T>
struct MatrixRows {
    const T* x;
    const T* x2;
    const GemmShape& shape;

    struct Row {
        int index;  // -1: past the end
    };
    struct Tap {
        int c;
    };

    __device__ Row row(int m) const { return {m < shape.m ? m : -1}; }
    __device__ Tap tap(int k) const { return {k}; }
    __device__ void advance(Tap& tap, int by) const { tap.c += by; }
    // Null past the end of the rows; `tap` lies within k.
    __device__ const T* at(const Row& row, const Tap& tap) const {
        if (row.index < 0) return nullptr;
        return tap.c < shape.channels ? x + static_cast<size_t>(row.index) * shape.channels + tap.c
                                      : x2 + static_cast<size_t>(row.index) * shape.channels2 + (tap.c - shape.channels);
    }
};

// Windows of a picture, or of two with their channels side by side.
template <typename T>
struct WindowRows {
    const T* x;
    const T* x2;
    const GemmShape& shape;

    struct Row {
        int base;  // first pixel of the image; -1: past the end
        int y, x;  // corner of the window in (enlarged) pixels
    };
    struct Tap {
        int y, x, c;
    };

    __device__ Row row(int m) const {
        if (m >= shape.m) return {-1, 0, 0};
        const int line = m / shape.out_width;
        const int image = line / shape.out_height;
        return {image * shape.height * shape.width, (line - image * shape.out_height) * shape.stride - shape.pad,
                (m - line * shape.out_width) * shape.stride - shape.pad};
    }
    __device__ Tap tap(int k) const {
        const int all = shape.channels + shape.channels2;
        const int tap = k / all;
        return {tap / shape.kernel, tap % shape.kernel, k - tap * all};
    }
    __device__ void advance(Tap& tap, int by) const {
        const int all = shape.channels + shape.channels2;
        for (tap.c += by; tap.c >= all; tap.c -= all) {
            if (++tap.x == shape.kernel) {
                tap.x = 0;
                ++tap.y;
            }
        }
    }
    __device__ const T* at(const Row& row, const Tap& tap) const {
        const int enlarged = shape.upsample >> 1;  // 0 or 1: a shift
        const int height = shape.height << enlarged, width = shape.width << enlarged;
        int y = row.y + tap.y, x_ = row.x + tap.x;
        if (row.base < 0) return nullptr;
        if (shape.circular) {
            y = (y % height + height) % height;
            x_ = (x_ % width + width) % width;
        } else if (y < 0 || x_ < 0 || y >= height || x_ >= width) {
            return nullptr;
        }
        const size_t pixel = row.base + (y >> enlarged) * shape.width + (x_ >> enlarged);
        return tap.c < shape.channels ? x + pixel * shape.channels + tap.c : x2 + pixel * shape.channels2 + (tap.c - shape.channels);
    }
};

// --------------------------------------------------------------------------------------------------------------- pipeline

constexpr int STAGES = 4;
// A row of a stage: 64 bytes of k in four chunks of 16.
constexpr int ROW_BYTES = 64;
constexpr int CHUNKS = 4;

// Offset of a chunk in a tile of rows. Eight rows of one chunk, as ldmatrix reads them, fall on all 32 banks once: two rows make a line of 128
// bytes, and every second row rotates the chunks.
__device__ inline int chunk_offset(int row, int chunk) { return row * ROW_BYTES + ((chunk ^ (row >> 1 & 3)) << 4); }

// Where this block's tile lies. Blocks run through bands of eight tiles of rows, so that those at work at one time share rows of
// both operands in the L2.
struct TilePlace {
    int m, n;

    __device__ TilePlace(const GemmShape& shape, int tile_m, int tile_n) {
        constexpr int BAND = 8;
        const int rows = ceil_div(shape.m, tile_m), columns = ceil_div(shape.n, tile_n);
        const int index = blockIdx.x, band = index / (BAND * columns), within = index % (BAND * columns);
        const int high = min(BAND, rows - band * BAND);
        m = (band * BAND + within % high) * tile_m;
        n = within / high * tile_n;
    }
};

// Runs over k: `multiply(a, b)` sees one stage after the other, [TM] and [TN] swizzled rows. Ends with a barrier and all stages free.
template <int TM, int TN, int THREADS, typename T, typename Rows, typename Multiply>
__device__ void for_each_stage(const Rows& source, const T* weight, const GemmShape& shape, TilePlace place, unsigned char* memory, Multiply multiply) {
    constexpr int N = LANE_VALUES<T>;
    constexpr int STEP = CHUNKS * N;              // of k
    constexpr int DEALT = THREADS / CHUNKS;       // rows that the block moves at a time
    constexpr int A_ROWS = TM / DEALT, B_ROWS = TN / DEALT;
    constexpr int STAGE = (TM + TN) * ROW_BYTES;
    const int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
    // Chunks of 16 bytes lie within one tap, one part and one row.
    const bool whole = (shape.channels | shape.channels2) % N == 0;

    typename Rows::Row rows[A_ROWS];
#pragma unroll
    for (int i = 0; i < A_ROWS; ++i) rows[i] = source.row(place.m + first + i * DEALT);
    int k = chunk * N;
    typename Rows::Tap tap = source.tap(k);

    const auto fill = [&](int stage) {
        unsigned char* a = memory + stage * STAGE;
        unsigned char* b = a + TM * ROW_BYTES;
        if (whole) {
#pragma unroll
            for (int i = 0; i < A_ROWS; ++i) {
                const T* p = k < shape.k ? source.at(rows[i], tap) : nullptr;
                copy_async(a + chunk_offset(first + i * DEALT, chunk), p ? p : weight, p ? 16 : 0);
            }
#pragma unroll
            for (int i = 0; i < B_ROWS; ++i) {
                const int n = place.n + first + i * DEALT;
                const bool there = n < shape.n && k < shape.k;
                copy_async(b + chunk_offset(first + i * DEALT, chunk), there ? weight + static_cast<size_t>(n) * shape.k + k : weight, there ? 16 : 0);
            }
        } else {
            for (int i = 0; i < A_ROWS; ++i) {
                Pack<T, N> values;
                typename Rows::Tap at = tap;
#pragma unroll
                for (int e = 0; e < N; ++e) {
                    const T* p = k + e < shape.k ? source.at(rows[i], at) : nullptr;
                    values.v[e] = p ? *p : from_float<T>(0.0f);
                    source.advance(at, 1);
                }
                *reinterpret_cast<Pack<T, N>*>(a + chunk_offset(first + i * DEALT, chunk)) = values;
            }
            for (int i = 0; i < B_ROWS; ++i) {
                const int n = place.n + first + i * DEALT;
                Pack<T, N> values;
#pragma unroll
                for (int e = 0; e < N; ++e) {
                    values.v[e] = n < shape.n && k + e < shape.k ? weight[static_cast<size_t>(n) * shape.k + k + e] : from_float<T>(0.0f);
                }
                *reinterpret_cast<Pack<T, N>*>(b + chunk_offset(first + i * DEALT, chunk)) = values;
            }
        }
        k += STEP;
        source.advance(tap, STEP);
    };

    const int steps = ceil_div(shape.k, STEP);
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (stage < steps) fill(stage);
        copy_commit();
    }
    for (int step = 0; step < steps; ++step) {
        copy_wait<STAGES - 2>();
        // Everyone's copies for this step are there, and everyone is done with the stage that is filled next.
        __syncthreads();
        if (step + STAGES - 1 < steps) fill((step + STAGES - 1) % STAGES);
        copy_commit();
        const unsigned char* a = memory + step % STAGES * STAGE;
        multiply(a, a + TM * ROW_BYTES);
    }
    copy_wait<0>();
    __syncthreads();
}

// --------------------------------------------------------------------------------------------------------------- epilogue

// Finishes W values of an output row from `column` on, and stores them. What lies past the last column is not stored.
template <int W, typename T>
__device__ inline void finish_outputs(float (&v)[W], int row, int column, int columns, const Operands<T>& o, const GemmShape& shape) {
    const bool whole = columns % W == 0;
    const int valid = columns - column;
    float w[W];
    if (o.shift) {
        const size_t image = static_cast<size_t>(row / shape.rows_per_image);
        load_tail<W>(o.shift + image * shape.shift_stride + column, whole && shape.shift_stride % W == 0, valid, w);
#pragma unroll
        for (int i = 0; i < W; ++i) v[i] += w[i];
    }
    if (shape.activation != NONE) {
#pragma unroll
        for (int i = 0; i < W; ++i) v[i] = activate(shape.activation, v[i]);
    }
    if (o.slopes) {
        load_tail<W>(o.slopes + column, whole, valid, w);
#pragma unroll
        for (int i = 0; i < W; ++i) v[i] = fmaf(fminf(v[i], 0.0f), w[i], fmaxf(v[i], 0.0f));
    }
    const size_t at = static_cast<size_t>(row) * columns + column;
    if (o.residual) {
        load_tail<W>(o.residual + at, whole, valid, w);
#pragma unroll
        for (int i = 0; i < W; ++i) v[i] += w[i];
    }
    store_tail<W>(o.out + at, whole, valid, v);
}

// The same of eight sums of the product.
template <typename T>
__device__ inline void finish_sums(float (&v)[8], int row, int column, const Operands<T>& o, const GemmShape& shape) {
    if (row >= shape.m || column >= shape.n) return;
    if (o.bias) {
        float bias[8];
        load_tail<8>(o.bias + column, shape.n % 8 == 0, shape.n - column, bias);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] += bias[i];
    }
    if (shape.geglu) {
        // Values and gates alternate, so a thread has both.
        float gated[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) gated[i] = v[2 * i] * gelu(v[2 * i + 1]);
        finish_outputs<4>(gated, row, column / 2, shape.n / 2, o, shape);
    } else {
        finish_outputs<8>(v, row, column, shape.n, o, shape);
    }
}

// ----------------------------------------------------------------------------------------------------- 16 bits: mma.sync

// WARPS_M x WARPS_N warps; each owns TM / WARPS_M rows and 32 columns of the tile.
template <int TM, int TN, int WARPS_M, typename Rows, typename T>
__device__ void tensor_gemm(const Operands<T>& o, const GemmShape& shape) {
    constexpr int WM = TM / WARPS_M, WN = 32, WARPS_N = TN / WN;
    constexpr int BLOCKS_M = WM / 16, BLOCKS_N = WN / 8;  // of an mma
    DYNAMIC_SHARED(memory);
    const TilePlace place(shape, TM, TN);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int warp_m = warp % WARPS_M * WM, warp_n = warp / WARPS_M * WN;

    float sums[BLOCKS_M][BLOCKS_N][4] = {};
    for_each_stage<TM, TN, WARPS_M * WARPS_N * WARP>(Rows{o.x, o.x2, shape}, o.weight, shape, place, memory, [&](const unsigned char* a, const unsigned char* b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // 16 values of k each
            uint32_t left[BLOCKS_M][4], right[BLOCKS_N / 2][4];
#pragma unroll
            for (int i = 0; i < BLOCKS_M; ++i) {
                // Rows 0..16 of the first eight values, then of the second.
                load_matrices(left[i], a + chunk_offset(warp_m + i * 16 + lane % 16, 2 * half + lane / 16));
            }
#pragma unroll
            for (int j = 0; j < BLOCKS_N / 2; ++j) {
                // Eight columns with both halves of their values, then the next eight.
                load_matrices(right[j], b + chunk_offset(warp_n + j * 16 + lane % 8 + lane / 16 * 8, 2 * half + lane / 8 % 2));
            }
#pragma unroll
            for (int i = 0; i < BLOCKS_M; ++i) {
#pragma unroll
                for (int j = 0; j < BLOCKS_N; ++j) {
                    multiply_add(sums[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1], T());
                }
            }
        }
    });

    // Sixteen rows at a time through a slab of the warp's own. 40 floats a row: the pairs that four rows write fall on different banks.
    constexpr int PITCH = WN + 8;
    float* slab = reinterpret_cast<float*>(memory) + warp * 16 * PITCH;
#pragma unroll
    for (int i = 0; i < BLOCKS_M; ++i) {
#pragma unroll
        for (int j = 0; j < BLOCKS_N; ++j) {
            float* to = slab + lane / 4 * PITCH + j * 8 + lane % 4 * 2;
            *reinterpret_cast<float2*>(to) = make_float2(sums[i][j][0], sums[i][j][1]);
            *reinterpret_cast<float2*>(to + 8 * PITCH) = make_float2(sums[i][j][2], sums[i][j][3]);
        }
        __syncwarp();
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const int row = lane / 4 + part * 8, column = lane % 4 * 8;
            float v[8];
            load<8>(slab + row * PITCH + column, v);
            finish_sums(v, place.m + warp_m + i * 16 + row, place.n + warp_n + column, o, shape);
        }
        __syncwarp();
    }
}

// -------------------------------------------------------------------------------------------------------------- f32: FMA

// 256 threads as 16 x 16; each owns rows y + 16 i and columns x + 16 j of a tile of 64 x 64.
template <typename Rows>
__device__ void plain_gemm(const Operands<f32>& o, const GemmShape& shape) {
    constexpr int TILE = 64, OWN = 4;
    DYNAMIC_SHARED(memory);
    const TilePlace place(shape, TILE, TILE);
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;

    float sums[OWN][OWN] = {};
    for_each_stage<TILE, TILE, 256>(Rows{o.x, o.x2, shape}, o.weight, shape, place, memory, [&](const unsigned char* a, const unsigned char* b) {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {  // four values of k each
            float left[OWN][4], right[OWN][4];
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                load<4>(reinterpret_cast<const float*>(a + chunk_offset(y + 16 * i, chunk)), left[i]);
                load<4>(reinterpret_cast<const float*>(b + chunk_offset(x + 16 * i, chunk)), right[i]);
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
#pragma unroll
                    for (int j = 0; j < OWN; ++j) sums[i][j] = fmaf(left[i][k], right[j][k], sums[i][j]);
                }
            }
        }
    });

    constexpr int PITCH = TILE + 4;
    float* slab = reinterpret_cast<float*>(memory);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
#pragma unroll
        for (int j = 0; j < OWN; ++j) slab[(y + 16 * i) * PITCH + x + 16 * j] = sums[i][j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TILE * TILE / 8; i += 256) {
        const int row = i / (TILE / 8), column = i % (TILE / 8) * 8;
        float v[8];
        load<8>(slab + row * PITCH + column, v);
        finish_sums(v, place.m + row, place.n + column, o, shape);
    }
}

// ----------------------------------------------------------------------------------------------------------- entry points

#define PARAMETERS(T)                                                                                                              \
    const T *x, const T *x2, const T *weight, const T *bias, const T *shift, const T *slopes, const T *residual, T *out, GemmShape shape
#define OPERANDS(T) \
    Operands<T> { x, x2, weight, bias, shift, slopes, residual, out }

#define GEMM_16_BIT(T)                                                                                                                      \
    KERNEL(256, 2) linear_128x128_##T(PARAMETERS(T)) { tensor_gemm<128, 128, 2, MatrixRows<T>>(OPERANDS(T), shape); }                       \
    KERNEL(256, 2) conv_128x128_##T(PARAMETERS(T)) { tensor_gemm<128, 128, 2, WindowRows<T>>(OPERANDS(T), shape); }                         \
    KERNEL(128, 4) linear_64x64_##T(PARAMETERS(T)) { tensor_gemm<64, 64, 2, MatrixRows<T>>(OPERANDS(T), shape); }                              \
    KERNEL(128, 4) conv_64x64_##T(PARAMETERS(T)) { tensor_gemm<64, 64, 2, WindowRows<T>>(OPERANDS(T), shape); }
FOR_16_BIT(GEMM_16_BIT)

KERNEL(256) linear_64x64_f32(PARAMETERS(f32)) { plain_gemm<MatrixRows<f32>>(OPERANDS(f32), shape); }
KERNEL(256) conv_64x64_f32(PARAMETERS(f32)) { plain_gemm<WindowRows<f32>>(OPERANDS(f32), shape); }
