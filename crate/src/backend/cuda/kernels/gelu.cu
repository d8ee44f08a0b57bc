// Gelu, forward and backward; n is a multiple of 8.
#include "common.cuh"
#include "gelu.cuh"

template <typename T> __device__ void forward(const T *x, T *y, int64_t n) {
    const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (i >= n) return;
    float v[8];
    load(v, x + i);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = gelu_of(v[j]);
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
