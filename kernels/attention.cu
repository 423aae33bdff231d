// Attention: out = softmax(q k^T * scale) v, heads read where they lie and never the whole matrix of scores (flash attention:
// Dao et al. 2022, algorithm 1; the two-loop order of Dao 2023).
//
// Shapes: SDXL at 1024x1024: self-attention of 4096 tokens x 10 heads and 1024 x 20, cross-attention to 77 or 154 tokens, heads of 64; text encoders 77
// tokens, causal; the VAE one head of 512 over 16384 tokens. Floor: 4 * tokens * key_tokens * head_dim operations and tokens * key_tokens
// exponentials a head; at head size 64 an SM's 16 special units a clock bound it about as much as its products do.
//
// How (16 bits): a block takes some queries of one head and walks over tiles of keys. Scores are mma.sync products kept in registers; each row has a
// running maximum and sum in f32, and what was summed is rescaled when the maximum grows. A score fragment's layout is that of the left factor, so
// probabilities go into the product with v without leaving registers. Keys and values of the next tile are copied while this one is multiplied.
// Head sizes below a kernel's width are padded with zeros in shared memory.
//
// Versions considered:
//   1. scores in global memory, three kernels: 2 * 16384^2 * 2 bytes for the VAE.
//   2. 16 queries a warp: shared memory traffic equals the products' time on an A100 and exceeds it later.
//   3. 32 queries a warp for heads of 64 (this): every fragment of k and v is used twice.
//   4. heads of 512: accumulators of 16 x 512 do not fit a warp, so two warps share 16 queries, each with half of the scores and half of the
//      output's width; 16 keys a tile so that 96 KiB of shared memory do on every card.
//   5. wgmma (sm_90a): cuDNN has it for heads of 64.
#include "common.cuh"

struct Heads {
    int tokens, key_tokens, head_dim;
    int q_stride, kv_stride, out_stride;
    float scale;
    int causal;
};

// Of the head and batch entry that this block works on.
template <typename T>
struct Operands {
    const T* q;
    const T* k;
    const T* v;
    T* out;

    __device__ Operands(const T* q_, const T* k_, const T* v_, T* out_, const Heads& h) {
        const size_t batch = blockIdx.z, head = static_cast<size_t>(blockIdx.y) * h.head_dim;
        q = q_ + batch * h.tokens * h.q_stride + head;
        k = k_ + batch * h.key_tokens * h.kv_stride + head;
        v = v_ + batch * h.key_tokens * h.kv_stride + head;
        out = out_ + batch * h.tokens * h.out_stride + head;
    }
};

// Keys that the queries before `end` see.
__device__ inline int visible_keys(const Heads& h, int end) { return h.causal ? min(h.key_tokens, end) : h.key_tokens; }

// exp(x) as a power of two: factors on scores carry log2(e).
constexpr float LOG2_E = 1.4426950408889634f;

// ------------------------------------------------------------------------------------------------------------ shared rows

// Offset of 16 bytes in rows of D 16-bit values: the eight rows of one chunk that ldmatrix reads fall on all banks once.
template <int D>
__device__ inline int chunk_offset(int row, int chunk) {
    return row * D * 2 + ((chunk ^ (row & 7)) << 4);
}

// Starts to copy tokens [first, first + ROWS) to swizzled rows of D values; what is past the last token or the head's size becomes 0.
template <int ROWS, int D, int THREADS, typename T>
__device__ void copy_rows(unsigned char* to, const T* from, int stride, int first, int tokens, int head_dim) {
    const bool whole = (stride | head_dim) % 8 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * D / 8; i += THREADS) {
        const int row = i / (D / 8), chunk = i % (D / 8);
        const int token = first + row, valid = token < tokens ? head_dim - chunk * 8 : 0;
        const T* p = from + static_cast<size_t>(token) * stride + chunk * 8;
        if (whole) {
            copy_async(to + chunk_offset<D>(row, chunk), valid > 0 ? p : from, valid > 0 ? 16 : 0);
        } else {
            Pack<T, 8> values;
#pragma unroll
            for (int e = 0; e < 8; ++e) values.v[e] = e < valid ? p[e] : from_float<T>(0.0f);
            *reinterpret_cast<Pack<T, 8>*>(to + chunk_offset<D>(row, chunk)) = values;
        }
    }
}

// Writes swizzled rows [begin, begin + 16) of a warp to tokens from `first + begin` on; chunks [from, to) of each.
template <int D, typename T>
__device__ void write_rows(const unsigned char* rows, T* out, const Heads& h, int begin, int first, int from, int to) {
    const bool whole = (h.out_stride | h.head_dim) % 8 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
    const int chunks = to - from;
    for (int i = threadIdx.x % WARP; i < 16 * chunks; i += WARP) {
        const int row = begin + i / chunks, chunk = from + i % chunks;
        const int token = first + row, valid = h.head_dim - chunk * 8;
        if (token >= h.tokens || valid <= 0) continue;
        const Pack<T, 8> values = *reinterpret_cast<const Pack<T, 8>*>(rows + chunk_offset<D>(row, chunk));
        T* p = out + static_cast<size_t>(token) * h.out_stride + chunk * 8;
        if (whole) {
            *reinterpret_cast<Pack<T, 8>*>(p) = values;
        } else {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                if (e < valid) p[e] = values.v[e];
            }
        }
    }
}

// --------------------------------------------------------------------------------------------------------- online softmax

// Rows g and g + 8 of a fragment (g = lane / 4): what was seen of them.
struct Running {
    float largest[2] = {-INFINITY, -INFINITY};
    // This lane's part of the row's sum.
    float sum[2] = {};

    // Turns scores into probabilities relative to the largest so far and returns in `shrink` what earlier sums are worth. `factor` = scale * log2(e).
    template <int BLOCKS>
    __device__ void take(float (&scores)[BLOCKS][4], float factor, float (&shrink)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float top = largest[r];
#pragma unroll
            for (int j = 0; j < BLOCKS; ++j) top = fmaxf(top, fmaxf(scores[j][2 * r], scores[j][2 * r + 1]));
            // The four lanes of a row.
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
            // Key 0 is seen by every row, so the largest is finite from the first tile on.
            shrink[r] = exp2f((largest[r] - top) * factor);
            largest[r] = top;
            sum[r] *= shrink[r];
#pragma unroll
            for (int j = 0; j < BLOCKS; ++j) {
#pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; ++e) {
                    scores[j][e] = exp2f((scores[j][e] - top) * factor);
                    sum[r] += scores[j][e];
                }
            }
        }
    }

    __device__ void inverse(float (&result)[2]) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float all = sum[r];
            all += __shfl_xor_sync(ALL_LANES, all, 1);
            all += __shfl_xor_sync(ALL_LANES, all, 2);
            result[r] = 1.0f / all;
        }
    }
};

// Takes out scores of keys that row `first_row` + g (+ 8) does not see; block j holds keys from `first_key` + 8 j on.
template <int BLOCKS>
__device__ void mask(float (&scores)[BLOCKS][4], int first_row, int first_key, const Heads& h) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int row = first_row + lane / 4 + e / 2 * 8, key = first_key + j * 8 + lane % 4 * 2 + e % 2;
            if (key >= h.key_tokens || (h.causal && key > row)) scores[j][e] = -INFINITY;
        }
    }
}

// The left factor of sixteen keys from two blocks of probabilities.
template <typename T>
__device__ void probabilities(uint32_t (&left)[4], const float (&low)[4], const float (&high)[4]) {
    left[0] = pack_pair<T>(low[0], low[1]);
    left[1] = pack_pair<T>(low[2], low[3]);
    left[2] = pack_pair<T>(high[0], high[1]);
    left[3] = pack_pair<T>(high[2], high[3]);
}

// ------------------------------------------------------------------------------------------------ heads of up to 64 and 128

// Four warps of 16 * FRAGMENTS queries each.
template <int D, int FRAGMENTS, typename T>
__device__ void flash(const Operands<T>& o, const Heads& h) {
    constexpr int WARPS = 4, THREADS = WARPS * WARP, QUERIES = WARPS * 16 * FRAGMENTS, KEYS = 64;
    constexpr int TILE = KEYS * D * 2;  // bytes
    DYNAMIC_SHARED(memory);
    unsigned char* q_rows = memory;
    unsigned char* tiles = memory + QUERIES * D * 2;  // k, v; k, v
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int first_query = blockIdx.x * QUERIES, warp_row = warp * 16 * FRAGMENTS;
    const int steps = ceil_div(visible_keys(h, first_query + QUERIES), KEYS);
    const float factor = h.scale * LOG2_E;

    const auto copy_tile = [&](int step) {
        unsigned char* to = tiles + step % 2 * 2 * TILE;
        copy_rows<KEYS, D, THREADS>(to, o.k, h.kv_stride, step * KEYS, h.key_tokens, h.head_dim);
        copy_rows<KEYS, D, THREADS>(to + TILE, o.v, h.kv_stride, step * KEYS, h.key_tokens, h.head_dim);
        copy_commit();
    };
    copy_rows<QUERIES, D, THREADS>(q_rows, o.q, h.q_stride, first_query, h.tokens, h.head_dim);
    copy_tile(0);

    uint32_t q[FRAGMENTS][D / 16][4];
    float sums[FRAGMENTS][D / 8][4] = {};
    Running running[FRAGMENTS];
    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) {
            copy_tile(step + 1);
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        __syncthreads();
        const unsigned char* k_rows = tiles + step % 2 * 2 * TILE;
        const unsigned char* v_rows = k_rows + TILE;
        if (step == 0) {
#pragma unroll
            for (int f = 0; f < FRAGMENTS; ++f) {
#pragma unroll
                for (int d = 0; d < D / 16; ++d) load_matrices(q[f][d], q_rows + chunk_offset<D>(warp_row + f * 16 + lane % 16, 2 * d + lane / 16));
            }
        }

        float scores[FRAGMENTS][KEYS / 8][4] = {};
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j) {
                uint32_t right[4];  // eight keys with both halves of sixteen dimensions, then the next eight
                load_matrices(right, k_rows + chunk_offset<D>(j * 16 + lane % 8 + lane / 16 * 8, 2 * d + lane / 8 % 2));
#pragma unroll
                for (int f = 0; f < FRAGMENTS; ++f) {
                    multiply_add(scores[f][2 * j], q[f][d], right[0], right[1], T());
                    multiply_add(scores[f][2 * j + 1], q[f][d], right[2], right[3], T());
                }
            }
        }

        const bool masked = (step + 1) * KEYS > h.key_tokens || (h.causal && (step + 1) * KEYS > first_query + warp_row);
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) {
            if (masked) mask(scores[f], first_query + warp_row + f * 16, step * KEYS, h);
            float shrink[2];
            running[f].take(scores[f], factor, shrink);
#pragma unroll
            for (int d = 0; d < D / 8; ++d) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[f][d][e] *= shrink[e / 2];
            }
        }
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) {
            uint32_t left[FRAGMENTS][4];
#pragma unroll
            for (int f = 0; f < FRAGMENTS; ++f) probabilities<T>(left[f], scores[f][2 * j], scores[f][2 * j + 1]);
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                uint32_t right[4];  // both halves of sixteen keys with eight dimensions, then the next eight
                load_matrices_transposed(right, v_rows + chunk_offset<D>(j * 16 + lane % 16, 2 * d + lane / 16));
#pragma unroll
                for (int f = 0; f < FRAGMENTS; ++f) {
                    multiply_add(sums[f][2 * d], left[f], right[0], right[1], T());
                    multiply_add(sums[f][2 * d + 1], left[f], right[2], right[3], T());
                }
            }
        }
        __syncthreads();  // before the tile is overwritten
    }

    // Through the warp's own rows of queries, so that whole chunks are written.
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
        float inverse[2];
        running[f].inverse(inverse);
        const int row = warp_row + f * 16 + lane / 4;
#pragma unroll
        for (int d = 0; d < D / 8; ++d) {
            const float(&s)[4] = sums[f][d];
            *reinterpret_cast<uint32_t*>(q_rows + chunk_offset<D>(row, d) + lane % 4 * 4) = pack_pair<T>(s[0] * inverse[0], s[1] * inverse[0]);
            *reinterpret_cast<uint32_t*>(q_rows + chunk_offset<D>(row + 8, d) + lane % 4 * 4) = pack_pair<T>(s[2] * inverse[1], s[3] * inverse[1]);
        }
        __syncwarp();
        write_rows<D>(q_rows, o.out, h, warp_row + f * 16, first_query, 0, D / 8);
    }
}

// ------------------------------------------------------------------------------------------------------ heads of up to 512

// Eight warps: warp % 4 is its 16 of 64 queries, warp / 4 its half of the keys when scores are made, and of the width when they are used.
template <typename T>
__device__ void flash_512(const Operands<T>& o, const Heads& h) {
    constexpr int D = 512, THREADS = 256, QUERIES = 64, KEYS = 16, PITCH = KEYS + 4;
    DYNAMIC_SHARED(memory);
    unsigned char* q_rows = memory;
    unsigned char* k_rows = q_rows + QUERIES * D * 2;
    unsigned char* v_rows = k_rows + KEYS * D * 2;
    // The halves of the scores meet where the keys were.
    float* exchange = reinterpret_cast<float*>(k_rows);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, half = warp / 4;
    const int first_query = blockIdx.x * QUERIES, warp_row = warp % 4 * 16;
    const int steps = ceil_div(visible_keys(h, first_query + QUERIES), KEYS);
    const float factor = h.scale * LOG2_E;

    const auto copy_tile = [&](unsigned char* to, const T* from, int step) {
        if (step < steps) copy_rows<KEYS, D, THREADS>(to, from, h.kv_stride, step * KEYS, h.key_tokens, h.head_dim);
        copy_commit();
    };
    copy_rows<QUERIES, D, THREADS>(q_rows, o.q, h.q_stride, first_query, h.tokens, h.head_dim);
    copy_tile(k_rows, o.k, 0);
    copy_tile(v_rows, o.v, 0);

    float sums[D / 16][4] = {};  // 16 queries x 256 dimensions
    Running running;
    for (int step = 0; step < steps; ++step) {
        copy_wait<1>();  // the keys; the values may still be on their way
        __syncthreads();
        float part[4] = {};  // 16 queries x 8 keys
#pragma unroll 4
        for (int d = 0; d < D / 32; ++d) {
            uint32_t left[2][4], right[4];  // 32 dimensions of the eight keys
            load_matrices(right, k_rows + chunk_offset<D>(half * 8 + lane % 8, 4 * d + lane / 8));
            load_matrices(left[0], q_rows + chunk_offset<D>(warp_row + lane % 16, 4 * d + lane / 16));
            load_matrices(left[1], q_rows + chunk_offset<D>(warp_row + lane % 16, 4 * d + 2 + lane / 16));
            multiply_add(part, left[0], right[0], right[1], T());
            multiply_add(part, left[1], right[2], right[3], T());
        }
        __syncthreads();  // all have read the keys
        float* to = exchange + (warp_row + lane / 4) * PITCH + half * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(to) = make_float2(part[0], part[1]);
        *reinterpret_cast<float2*>(to + 8 * PITCH) = make_float2(part[2], part[3]);
        __syncthreads();
        float scores[2][4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float* from = exchange + (warp_row + lane / 4) * PITCH + j * 8 + lane % 4 * 2;
            scores[j][0] = from[0];
            scores[j][1] = from[1];
            scores[j][2] = from[8 * PITCH];
            scores[j][3] = from[8 * PITCH + 1];
        }
        copy_wait<0>();
        __syncthreads();  // the values are there, the scores read
        copy_tile(k_rows, o.k, step + 1);

        mask(scores, first_query + warp_row, step * KEYS, h);
        float shrink[2];
        running.take(scores, factor, shrink);
        uint32_t left[4];
        probabilities<T>(left, scores[0], scores[1]);
#pragma unroll
        for (int d = 0; d < D / 32; ++d) {
            uint32_t right[4];
            load_matrices_transposed(right, v_rows + chunk_offset<D>(lane % 16, half * (D / 16) + 2 * d + lane / 16));
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float(&s)[4] = sums[2 * d + j];
#pragma unroll
                for (int e = 0; e < 4; ++e) s[e] *= shrink[e / 2];
                multiply_add(s, left, right[2 * j], right[2 * j + 1], T());
            }
        }
        __syncthreads();  // all have read the values
        copy_tile(v_rows, o.v, step + 1);
    }

    float inverse[2];
    running.inverse(inverse);
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
        const float(&s)[4] = sums[d];
        unsigned char* to = q_rows + lane % 4 * 4;
        const int row = warp_row + lane / 4, chunk = half * (D / 16) + d;
        *reinterpret_cast<uint32_t*>(to + chunk_offset<D>(row, chunk)) = pack_pair<T>(s[0] * inverse[0], s[1] * inverse[0]);
        *reinterpret_cast<uint32_t*>(to + chunk_offset<D>(row + 8, chunk)) = pack_pair<T>(s[2] * inverse[1], s[3] * inverse[1]);
    }
    // Swizzling stays within eight chunks, so a warp reads what it wrote itself.
    __syncwarp();
    write_rows<D>(q_rows, o.out, h, warp_row, first_query, half * (D / 16), (half + 1) * (D / 16));
}

// -------------------------------------------------------------------------------------------------------------------- f32

// 16 queries and 16 keys a tile, a thread for each pair; it owns every sixteenth dimension of its query's output.
template <int D>
__device__ void flash_f32(const Operands<f32>& o, const Heads& h) {
    constexpr int SIDE = 16, PITCH = D + 4;
    DYNAMIC_SHARED(memory);
    float* q_rows = reinterpret_cast<float*>(memory);
    float* kv_rows = q_rows + SIDE * PITCH;
    float* shares = kv_rows + SIDE * PITCH;  // probabilities
    const int row = threadIdx.x / SIDE, column = threadIdx.x % SIDE;
    const int first_query = blockIdx.x * SIDE, query = first_query + row;
    const float factor = h.scale * LOG2_E;

    const auto copy = [&](float* to, const float* from, int stride, int first, int tokens) {
        for (int i = threadIdx.x; i < SIDE * D; i += SIDE * SIDE) {
            const int token = first + i / D, d = i % D;
            to[i / D * PITCH + d] = token < tokens && d < h.head_dim ? from[static_cast<size_t>(token) * stride + d] : 0.0f;
        }
    };
    copy(q_rows, o.q, h.q_stride, first_query, h.tokens);

    float sums[D / SIDE] = {}, largest = -INFINITY, sum = 0.0f;
    const int keys = visible_keys(h, first_query + SIDE);
    for (int first = 0; first < keys; first += SIDE) {
        copy(kv_rows, o.k, h.kv_stride, first, h.key_tokens);
        __syncthreads();
        float score = 0.0f;
#pragma unroll 4
        for (int d = 0; d < D; d += 4) {
            float q[4], k[4];
            load<4>(q_rows + row * PITCH + d, q);
            load<4>(kv_rows + column * PITCH + d, k);
#pragma unroll
            for (int i = 0; i < 4; ++i) score = fmaf(q[i], k[i], score);
        }
        const int key = first + column;
        if (key >= h.key_tokens || (h.causal && key > query)) score = -INFINITY;
        float top = fmaxf(largest, score);
#pragma unroll
        for (int mask = SIDE / 2; mask > 0; mask /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, mask));
        const float shrink = exp2f((largest - top) * factor), share = exp2f((score - top) * factor);
        largest = top;
        float all = share;
#pragma unroll
        for (int mask = SIDE / 2; mask > 0; mask /= 2) all += __shfl_xor_sync(ALL_LANES, all, mask);
        sum = sum * shrink + all;
        shares[row * (SIDE + 1) + column] = share;
        __syncthreads();  // the keys are read
        copy(kv_rows, o.v, h.kv_stride, first, h.key_tokens);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < D / SIDE; ++i) sums[i] *= shrink;
        for (int k = 0; k < SIDE; ++k) {
            const float p = shares[row * (SIDE + 1) + k];
#pragma unroll
            for (int i = 0; i < D / SIDE; ++i) sums[i] = fmaf(p, kv_rows[k * PITCH + i * SIDE + column], sums[i]);
        }
        __syncthreads();  // the values and shares are read
    }
    if (query >= h.tokens) return;
#pragma unroll
    for (int i = 0; i < D / SIDE; ++i) {
        const int d = i * SIDE + column;
        if (d < h.head_dim) o.out[static_cast<size_t>(query) * h.out_stride + d] = sums[i] / sum;
    }
}

// ----------------------------------------------------------------------------------------------------------- entry points

#define PARAMETERS(T)                                                                                                                   \
    const T *q, const T *k, const T *v, T *out, int tokens, int key_tokens, int head_dim, int q_stride, int kv_stride, int out_stride, \
        float scale, int causal
#define RUN(T, FUNCTION)                                                                            \
    const Heads heads{tokens, key_tokens, head_dim, q_stride, kv_stride, out_stride, scale, causal}; \
    FUNCTION(Operands<T>(q, k, v, out, heads), heads)

#define ATTENTION(T)                                                           \
    KERNEL(128) attention_64_##T(PARAMETERS(T)) { RUN(T, (flash<64, 2, T>)); }   \
    KERNEL(128) attention_128_##T(PARAMETERS(T)) { RUN(T, (flash<128, 1, T>)); } \
    KERNEL(256) attention_512_##T(PARAMETERS(T)) { RUN(T, flash_512); }
FOR_16_BIT(ATTENTION)

KERNEL(256) attention_64_f32(PARAMETERS(f32)) { RUN(f32, flash_f32<64>); }
KERNEL(256) attention_128_f32(PARAMETERS(f32)) { RUN(f32, flash_f32<128>); }
KERNEL(256) attention_512_f32(PARAMETERS(f32)) { RUN(f32, flash_f32<512>); }
