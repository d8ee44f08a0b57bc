// Layer normalization and RMS normalization over rows of [m, c], forward and backward.
// One block a row. Sums are in f32; the variance is that of the differences, in a second pass over
// a row that the first left in the cache.
#include "common.cuh"

// y = (x - mean) / sqrt(var + eps) * w + b; stats[row] = (mean, 1 / std) unless null.
template <typename T, int N, bool CENTER>
__device__ void forward(const T *x, const float *w, const float *b, T *y, float2 *stats, int c, float eps) {
    const int64_t row = blockIdx.x;
    x += row * c, y += row * c;
    const int step = blockDim.x * N, first = threadIdx.x * N;
    float mean = 0;
    if constexpr (CENTER) {
        float sum[1] = {0};
        for (int i = first; i < c; i += step) {
            float v[N];
            load(v, x + i);
#pragma unroll
            for (int j = 0; j < N; j++) sum[0] += v[j];
        }
        block_sum(sum);
        mean = sum[0] / c;
    }
    float square[1] = {0};
    for (int i = first; i < c; i += step) {
        float v[N];
        load(v, x + i);
#pragma unroll
        for (int j = 0; j < N; j++) square[0] += (v[j] - mean) * (v[j] - mean);
    }
    block_sum(square);
    const float rstd = rsqrtf(square[0] / c + eps);
    if (stats && threadIdx.x == 0) stats[row] = make_float2(mean, rstd);
    for (int i = first; i < c; i += step) {
        float v[N], scale[N], shift[N];
        load(v, x + i);
        load(scale, w + i);
        if constexpr (CENTER) load(shift, b + i);
#pragma unroll
        for (int j = 0; j < N; j++) v[j] = (v[j] - mean) * rstd * scale[j] + (CENTER ? shift[j] : 0.f);
        store(y + i, v);
    }
}

// dx = residual + rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dy * w; residual may be null.
template <typename T, int N, bool CENTER>
__device__ void backward(const T *dy, const T *x, const float *w, const float2 *stats, const T *residual, T *dx, int c) {
    const int64_t row = blockIdx.x;
    dy += row * c, x += row * c, dx += row * c;
    const float2 s = stats[row];
    const int step = blockDim.x * N, first = threadIdx.x * N;
    float sum[2] = {0, 0};
    for (int i = first; i < c; i += step) {
        float v[N], g[N], scale[N];
        load(v, x + i), load(g, dy + i), load(scale, w + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float gj = g[j] * scale[j];
            sum[0] += gj;
            sum[1] += gj * (v[j] - s.x) * s.y;
        }
    }
    block_sum(sum);
    const float mean_g = CENTER ? sum[0] / c : 0.f, mean_gx = sum[1] / c;
    for (int i = first; i < c; i += step) {
        float v[N], g[N], scale[N], r[N] = {};
        load(v, x + i), load(g, dy + i), load(scale, w + i);
        if (residual) load(r, residual + row * c + i);
#pragma unroll
        for (int j = 0; j < N; j++) r[j] += s.y * (g[j] * scale[j] - mean_g - (v[j] - s.x) * s.y * mean_gx);
        store(dx + i, r);
    }
}

#define DEFINE(NAME, T)                                                                                               \
    extern "C" __global__ void layer_norm_##NAME(const T *x, const float *w, const float *b, T *y, float2 *stats,     \
                                                 int c, float eps) {                                                  \
        begin();                                                                                                      \
        if (c % 8 == 0) forward<T, 8, true>(x, w, b, y, stats, c, eps);                                               \
        else forward<T, 1, true>(x, w, b, y, stats, c, eps);                                                          \
    }                                                                                                                 \
    extern "C" __global__ void rms_norm_##NAME(const T *x, const float *w, T *y, float2 *stats, int c, float eps) {   \
        begin();                                                                                                      \
        if (c % 8 == 0) forward<T, 8, false>(x, w, nullptr, y, stats, c, eps);                                        \
        else forward<T, 1, false>(x, w, nullptr, y, stats, c, eps);                                                   \
    }                                                                                                                 \
    extern "C" __global__ void layer_norm_backward_##NAME(const T *dy, const T *x, const float *w,                    \
                                                          const float2 *stats, const T *residual, T *dx, int c) {     \
        begin();                                                                                                      \
        if (c % 8 == 0) backward<T, 8, true>(dy, x, w, stats, residual, dx, c);                                       \
        else backward<T, 1, true>(dy, x, w, stats, residual, dx, c);                                                  \
    }                                                                                                                 \
    extern "C" __global__ void rms_norm_backward_##NAME(const T *dy, const T *x, const float *w, const float2 *stats, \
                                                        const T *residual, T *dx, int c) {                            \
        begin();                                                                                                      \
        if (c % 8 == 0) backward<T, 8, false>(dy, x, w, stats, residual, dx, c);                                      \
        else backward<T, 1, false>(dy, x, w, stats, residual, dx, c);                                                 \
    }
FOR_DTYPES(DEFINE)
