// BLOOM's gelu, 0.5 x (1 + tanh(0.79788456 x (1 + 0.044715 x^2))), forward and backward; n is a
// multiple of 8.
#include "common.cuh"

__device__ __forceinline__ float inner(float x) { return 0.79788456f * x * (1.f + 0.044715f * x * x); }

// tanh by exp: within 2 ulp of f32 where it matters, and NaN stays NaN.
__device__ __forceinline__ float tanh_fast(float x) {
    const float e = __expf(2.f * fminf(fabsf(x), 10.f));
    return isnan(x) ? x : copysignf(1.f - 2.f / (e + 1.f), x);
}

template <typename T> __device__ void forward(const T *x, T *y, int64_t n) {
    const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (i >= n) return;
    float v[8];
    load(v, x + i);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = 0.5f * v[j] * (1.f + tanh_fast(inner(v[j])));
    store(y + i, v);
}

template <typename T> __device__ void backward(const T *dy, const T *x, T *dx, int64_t n) {
    const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (i >= n) return;
    float v[8], d[8];
    load(v, x + i), load(d, dy + i);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float t = tanh_fast(inner(v[j])), slope = 0.79788456f + 0.1070322243f * v[j] * v[j];
        d[j] *= 0.5f * (1.f + t) + 0.5f * v[j] * (1.f - t * t) * slope;
    }
    store(dx + i, d);
}

#define DEFINE(NAME, T)                                                                                              \
    extern "C" __global__ void gelu_##NAME(const T *x, T *y, int64_t n) { begin(); forward(x, y, n); }                        \
    extern "C" __global__ void gelu_backward_##NAME(const T *dy, const T *x, T *dx, int64_t n) { begin(); backward(dy, x, dx, n); }
FOR_DTYPES(DEFINE)
