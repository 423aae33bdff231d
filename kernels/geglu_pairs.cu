// Gating of a product whose weight rows are interleaved (value 0, gate 0, value 1, gate 1, ...): what a library's product of a GEGLU
// layer leaves undone. The weight has one layout, that of the fused epilogue in `gemm.cu`.
//
//   geglu_pairs_T(const T* x, T* out, long long count)      T: bf16, f16, f32; any grid, block 256
//
// x [count][2], out [count]: out = value * gelu(gate), gelu exact (erf), in f32, rounded once. A thread reads four pairs with two
// loads of 8 bytes (f32: 16) and writes four values. Floor: 3 * count values moved once.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

__device__ inline float gated(float value, float gate) {
    return value * 0.5f * gate * (1.0f + erff(gate * 0.70710678118654752f));
}

__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(float x) { return x; }
template <typename T> __device__ T from_float(float x);
template <> __device__ inline __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }
template <> __device__ inline __half from_float(float x) { return __float2half_rn(x); }
template <> __device__ inline float from_float(float x) { return x; }

// Four values in one load or store.
template <typename T> struct alignas(4 * sizeof(T)) Four {
    T at[4];
};

template <typename T> __device__ void geglu_pairs(const T* x, T* out, long long count) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (long long i = first; i < count / 4; i += stride) {
        const Four<T> low = reinterpret_cast<const Four<T>*>(x)[2 * i];
        const Four<T> high = reinterpret_cast<const Four<T>*>(x)[2 * i + 1];
        Four<T> y;
        y.at[0] = from_float<T>(gated(to_float(low.at[0]), to_float(low.at[1])));
        y.at[1] = from_float<T>(gated(to_float(low.at[2]), to_float(low.at[3])));
        y.at[2] = from_float<T>(gated(to_float(high.at[0]), to_float(high.at[1])));
        y.at[3] = from_float<T>(gated(to_float(high.at[2]), to_float(high.at[3])));
        reinterpret_cast<Four<T>*>(out)[i] = y;
    }
    for (long long i = count / 4 * 4 + first; i < count; i += stride) {
        out[i] = from_float<T>(gated(to_float(x[2 * i]), to_float(x[2 * i + 1])));
    }
}

extern "C" __global__ void geglu_pairs_bf16(const __nv_bfloat16* x, __nv_bfloat16* out, long long count) {
    geglu_pairs(x, out, count);
}
extern "C" __global__ void geglu_pairs_f16(const __half* x, __half* out, long long count) { geglu_pairs(x, out, count); }
extern "C" __global__ void geglu_pairs_f32(const float* x, float* out, long long count) { geglu_pairs(x, out, count); }
