// Rotary position embedding: q, k and v side by side in one row, q and k turned to their positions; and
// back. Element i of a head is paired with element i + d / 2. Swiglu: silu(gate) * up.
#include "common.cuh"

// One block a row: [heads * d | kv_heads * d | kv_heads * d].
template <typename T, bool BACK>
__device__ void turn(const int *positions, const float *inv_freq, T *q, T *k, T *v, T *joined, int heads, int kv_heads, int d) {
    const int64_t row = blockIdx.x;
    const int half = d / 2, wide = heads * d, narrow = kv_heads * d;
    const float position = float(positions[row]);
    T *j = joined + row * (wide + 2 * narrow);
    q += row * wide, k += row * narrow, v += row * narrow;
    for (int i = threadIdx.x; i < (heads + kv_heads) * half; i += blockDim.x) {
        const int head = i / half, e = i % half, at = head * d + e;
        T *own = head < heads ? q + at : k + (at - wide);
        float sine, cosine;
        sincosf(position * inv_freq[e], &sine, &cosine);
        if (BACK) sine = -sine;
        T *from = BACK ? j + at : own, *to = BACK ? own : j + at;
        const float a = to_f32(from[0]), b = to_f32(from[half]);
        to[0] = from_f32<T>(a * cosine - b * sine);
        to[half] = from_f32<T>(b * cosine + a * sine);
    }
    for (int i = threadIdx.x; i < narrow; i += blockDim.x) {
        if (BACK) v[i] = j[wide + narrow + i];
        else j[wide + narrow + i] = v[i];
    }
}

template <typename T> __device__ void swiglu(const T *gate, const T *up, T *y, int64_t n) {
    const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (i >= n) return;
    float g[8], u[8];
    load(g, gate + i), load(u, up + i);
#pragma unroll
    for (int j = 0; j < 8; j++) u[j] *= g[j] / (1.f + __expf(-g[j]));
    store(y + i, u);
}

template <typename T> __device__ void swiglu_backward(const T *dy, const T *gate, const T *up, T *dgate, T *dup, int64_t n) {
    const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (i >= n) return;
    float d[8], g[8], u[8];
    load(d, dy + i), load(g, gate + i), load(u, up + i);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float s = 1.f / (1.f + __expf(-g[j])), silu = g[j] * s;
        const float dg = d[j] * u[j] * s * (1.f + g[j] * (1.f - s));
        u[j] = d[j] * silu;
        g[j] = dg;
    }
    store(dgate + i, g), store(dup + i, u);
}

#define DEFINE(NAME, T)                                                                                                  \
    extern "C" __global__ void rope_join_##NAME(const int *positions, const float *inv_freq, T *q, T *k, T *v, T *joined, \
                                                int heads, int kv_heads, int d) {                                        \
        begin();                                                                                                         \
        turn<T, false>(positions, inv_freq, q, k, v, joined, heads, kv_heads, d);                                        \
    }                                                                                                                    \
    extern "C" __global__ void rope_split_##NAME(const int *positions, const float *inv_freq, T *q, T *k, T *v,          \
                                                 T *joined, int heads, int kv_heads, int d) {                            \
        begin();                                                                                                         \
        turn<T, true>(positions, inv_freq, q, k, v, joined, heads, kv_heads, d);                                         \
    }                                                                                                                    \
    extern "C" __global__ void swiglu_##NAME(const T *gate, const T *up, T *y, int64_t n) { begin(); swiglu(gate, up, y, n); }    \
    extern "C" __global__ void swiglu_backward_##NAME(const T *dy, const T *gate, const T *up, T *dgate, T *dup,         \
                                                      int64_t n) {                                                       \
        begin();                                                                                                         \
        swiglu_backward(dy, gate, up, dgate, dup, n);                                                                    \
    }
FOR_DTYPES(DEFINE)
