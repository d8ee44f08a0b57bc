// Layer normalization and RMS normalization over rows of [m, c], forward and backward.
// One block a row. Sums are in f32; the variance is that of the differences.
#include "common.cuh"

// A thread's part of a row: N neighbours at `first`, kept, and what is `step` further on, read again each time.
// A weight depends on no kernel, so its first N are read before the previous one has ended.
template <int N, typename T> struct Part {
    const T *x;
    int c, first = threadIdx.x * N, step = blockDim.x * N;
    float kept[N];
    __device__ __forceinline__ Part(const T *x, int c) : x(x), c(c) {}
    __device__ __forceinline__ void keep() {
        if (first < c) load(kept, x + first);
    }
    // f(place, numbers, whether these are the kept ones)
    template <typename F> __device__ __forceinline__ void each(F f) const {
        if (first < c) f(first, kept, true);
        for (int i = first + step; i < c; i += step) {
            float v[N];
            load(v, x + i);
            f(i, v, false);
        }
    }
};

// y = (x - mean) / sqrt(var + eps) * w + b; stats[row] = (mean, 1 / std) unless null.
template <typename T, int N, bool CENTER>
__device__ void forward(const T *x, const float *w, const float *b, T *y, float2 *stats, int c, float eps) {
    const int64_t row = blockIdx.x;
    y += row * c;
    Part<N, float> scale(w, c), shift(b, c);
    Part<N, T> part(x + row * c, c);
    let_next_start();
    scale.keep();
    if constexpr (CENTER) shift.keep();
    wait_for_previous();
    part.keep();
    float mean = 0;
    if constexpr (CENTER) {
        float sum[1] = {0};
        part.each([&](int, const float(&v)[N], bool) {
#pragma unroll
            for (int j = 0; j < N; j++) sum[0] += v[j];
        });
        block_sum(sum);
        mean = sum[0] / c;
    }
    float square[1] = {0};
    part.each([&](int, const float(&v)[N], bool) {
#pragma unroll
        for (int j = 0; j < N; j++) square[0] += (v[j] - mean) * (v[j] - mean);
    });
    block_sum(square);
    const float rstd = rsqrtf(square[0] / c + eps);
    if (stats && threadIdx.x == 0) stats[row] = make_float2(mean, rstd);
    part.each([&](int i, const float(&v)[N], bool kept) {
        float out[N], s[N], t[N];
        if (!kept) load(s, w + i);
        if (CENTER && !kept) load(t, b + i);
#pragma unroll
        for (int j = 0; j < N; j++)
            out[j] = (v[j] - mean) * rstd * (kept ? scale.kept[j] : s[j]) + (CENTER ? kept ? shift.kept[j] : t[j] : 0.f);
        store(y + i, out);
    });
}

// dx = residual + rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dy * w; residual may be null.
template <typename T, int N, bool CENTER>
__device__ void backward(const T *dy, const T *x, const float *w, const float2 *stats, const T *residual, T *dx, int c) {
    const int64_t row = blockIdx.x;
    dx += row * c;
    Part<N, float> scale(w, c);
    Part<N, T> part(x + row * c, c), grad(dy + row * c, c);
    let_next_start();
    scale.keep();
    wait_for_previous();
    part.keep(), grad.keep();
    const float2 s = stats[row];
    // g and xhat of a place.
    auto at = [&](int i, const float(&v)[N], bool kept, float(&g)[N], float(&xhat)[N]) {
        float d[N], f[N];
        if (!kept) load(d, grad.x + i), load(f, w + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            g[j] = kept ? grad.kept[j] * scale.kept[j] : d[j] * f[j];
            xhat[j] = (v[j] - s.x) * s.y;
        }
    };
    float sum[2] = {0, 0};
    part.each([&](int i, const float(&v)[N], bool kept) {
        float g[N], xhat[N];
        at(i, v, kept, g, xhat);
#pragma unroll
        for (int j = 0; j < N; j++) sum[0] += g[j], sum[1] += g[j] * xhat[j];
    });
    block_sum(sum);
    const float mean_g = CENTER ? sum[0] / c : 0.f, mean_gx = sum[1] / c;
    part.each([&](int i, const float(&v)[N], bool kept) {
        float g[N], xhat[N], r[N] = {};
        at(i, v, kept, g, xhat);
        if (residual) load(r, residual + row * c + i);
#pragma unroll
        for (int j = 0; j < N; j++) r[j] += s.y * (g[j] - mean_g - xhat[j] * mean_gx);
        store(dx + i, r);
    });
}

#define DEFINE(NAME, T)                                                                                               \
    extern "C" __global__ void layer_norm_##NAME(const T *x, const float *w, const float *b, T *y, float2 *stats,     \
                                                 int c, float eps) {                                                  \
        if (c % 8 == 0) forward<T, 8, true>(x, w, b, y, stats, c, eps);                                               \
        else forward<T, 1, true>(x, w, b, y, stats, c, eps);                                                          \
    }                                                                                                                 \
    extern "C" __global__ void rms_norm_##NAME(const T *x, const float *w, T *y, float2 *stats, int c, float eps) {   \
        if (c % 8 == 0) forward<T, 8, false>(x, w, nullptr, y, stats, c, eps);                                        \
        else forward<T, 1, false>(x, w, nullptr, y, stats, c, eps);                                                   \
    }                                                                                                                 \
    extern "C" __global__ void layer_norm_backward_##NAME(const T *dy, const T *x, const float *w,                    \
                                                          const float2 *stats, const T *residual, T *dx, int c) {     \
        if (c % 8 == 0) backward<T, 8, true>(dy, x, w, stats, residual, dx, c);                                       \
        else backward<T, 1, true>(dy, x, w, stats, residual, dx, c);                                                  \
    }                                                                                                                 \
    extern "C" __global__ void rms_norm_backward_##NAME(const T *dy, const T *x, const float *w, const float2 *stats, \
                                                        const T *residual, T *dx, int c) {                            \
        if (c % 8 == 0) backward<T, 8, false>(dy, x, w, stats, residual, dx, c);                                      \
        else backward<T, 1, false>(dy, x, w, stats, residual, dx, c);                                                 \
    }
FOR_DTYPES(DEFINE)
