// Products with one to eight rows, as decoding makes them: the weight is read once, so the bytes of the
// weight are the time. A warp takes a row of the weight; lanes go along it.
#include "epilogue.cuh"
#include "quantized.cuh"

// Lane m writes row m.
template <typename T, typename Out, int M>
__device__ __forceinline__ void finish(float (&sum)[M], Out *y, int row, int m, int n, const Epilogue<T, Out> &e) {
    const int lane = threadIdx.x % 32;
    float own = 0;
#pragma unroll
    for (int i = 0; i < M; i++) {
        const float s = warp_sum(sum[i]);
        if (lane == i) own = s;
    }
    if (lane < m && row < n) y[int64_t(lane) * n + row] = e.done(own + e.beside(lane, row, n));
}

// Eight words of a row for each lane, and the maxima of their blocks: loaded together, used later.
constexpr int AHEAD = 8;
struct Piece {
    uint32_t q[AHEAD];
    float top[AHEAD]; // the maximum, or its second-level one where `c` is the code of the first
    uint8_t c[AHEAD];
    __device__ __forceinline__ void fetch(const uint32_t *w, const Absmax &a, int row, int words, int i0) {
        const uint32_t *from = w + int64_t(row) * words;
#pragma unroll
        for (int s = 0; s < AHEAD; s++) {
            const int i = i0 + 32 * s;
            if (i >= words) break;
            const int64_t block = (int64_t(row) * words + i) * 8 >> a.log_block;
            q[s] = __ldcs(from + i);
            if (a.absmax2) {
                c[s] = static_cast<const uint8_t *>(a.at)[block];
                top[s] = a.absmax2[block >> a.log_block2];
            } else {
                top[s] = static_cast<const float *>(a.at)[block];
            }
        }
    }
};

// k is a multiple of 8. x is held in shared memory; a warp takes a row of the weight after another, the next one's
// loads under way while it multiplies.
template <typename T, int M>
__device__ void gemv_4bit(const T *x, const uint32_t *w, Absmax a, Code code, T *y, int m, int n, int k, Epilogue<T, T> e) {
    extern __shared__ __align__(16) unsigned char memory[];
    T *xs = reinterpret_cast<T *>(memory);
    __shared__ float table[16], table2[256];
    const int lane = threadIdx.x % 32, words = k / 8, warps = gridDim.x * (blockDim.x / 32);
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, i0 = lane;
    Piece piece;
    if (row < n) piece.fetch(w, a, row, words, i0);
    for (int i = threadIdx.x * 8; i < m * k; i += blockDim.x * 8)
        *reinterpret_cast<Vec<T, 8> *>(xs + i) = *reinterpret_cast<const Vec<T, 8> *>(x + i);
    if (threadIdx.x < 16) table[threadIdx.x] = code.v[threadIdx.x];
    if (a.absmax2 && threadIdx.x < 256) table2[threadIdx.x] = a.code2[threadIdx.x];
    __syncthreads();
    float sum[M] = {};
    while (row < n) {
        const int at = i0, now = row;
        const bool ends = i0 - lane + 32 * AHEAD >= words;
        Piece next;
        if (ends) row += warps, i0 = lane;
        else i0 += 32 * AHEAD;
        if (row < n) next.fetch(w, a, row, words, i0);
#pragma unroll
        for (int s = 0; s < AHEAD; s++) {
            const int i = at + 32 * s;
            if (i >= words) break;
            const float top = a.absmax2 ? table2[piece.c[s]] * piece.top[s] + a.offset : piece.top[s];
            // The first element of each byte is in its high half.
            float v[8];
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] = table[piece.q[s] >> (j / 2 * 8 + (j % 2 ? 0 : 4)) & 15];
#pragma unroll
            for (int r = 0; r < M; r++) {
                if (r >= m) break;
                float p[8], part = 0;
                load(p, xs + r * k + i * 8);
#pragma unroll
                for (int j = 0; j < 8; j++) part += v[j] * p[j];
                sum[r] += top * part;
            }
        }
        if (ends) {
            finish(sum, y, now, m, n, e);
#pragma unroll
            for (int r = 0; r < M; r++) sum[r] = 0;
        }
        piece = next;
    }
}

// The same for a weight that is not quantized; `Out` f32 for the logits.
template <typename T, typename Out, int M>
__device__ void gemv(const T *x, const T *w, Out *y, int m, int n, int k, Epilogue<T, Out> e) {
    extern __shared__ __align__(16) unsigned char memory[];
    T *xs = reinterpret_cast<T *>(memory);
    for (int i = threadIdx.x * 8; i < m * k; i += blockDim.x * 8)
        *reinterpret_cast<Vec<T, 8> *>(xs + i) = *reinterpret_cast<const Vec<T, 8> *>(x + i);
    __syncthreads();
    const int lane = threadIdx.x % 32, row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= n) return;
    const T *from = w + int64_t(row) * k;
    float sum[M] = {};
#pragma unroll 8
    for (int i = lane * 8; i < k; i += 256) {
        float v[8];
        load(v, from + i);
#pragma unroll
        for (int r = 0; r < M; r++) {
            if (r >= m) break;
            float p[8];
            load(p, xs + r * k + i);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[r] += v[j] * p[j];
        }
    }
    finish(sum, y, row, m, n, e);
}

// u[m, r] = x[m, k] W[r, k]^T for a few rows: a block a (row, rank).
template <typename T> __device__ void down_few(const T *x, const float *w, float *u, int k, int r) {
    const int row = blockIdx.x, q = blockIdx.y;
    float sum[1] = {0};
    for (int i = threadIdx.x * 8; i < k; i += blockDim.x * 8) {
        float v[8], a[8];
        load(v, x + int64_t(row) * k + i), load(a, w + int64_t(q) * k + i);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[0] += v[j] * a[j];
    }
    block_sum(sum);
    if (threadIdx.x == 0) u[row * r + q] = sum[0];
}

#define DEFINE_M(NAME, T, M)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                     \
        gemv_4bit_##NAME##_##M(const T *x, const uint32_t *w, const void *absmax, const float *absmax2, const float *code2, \
                               float offset, int log_block, int log_block2, const __grid_constant__ Code code, T *y, int m, int n, int k,         \
                               const T *bias, const float *u, const float *b, float alpha, int rank, const T *c,          \
                               int gelu) {                                                                                \
        begin();                                                                                                          \
        gemv_4bit<T, M>(x, w, {absmax, absmax2, code2, offset, log_block, log_block2}, code, y, m, n, k,                  \
                        {bias, u, b, alpha, rank, c, gelu});                                                              \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                                                     \
        gemv_##NAME##_##M(const T *x, const T *w, T *y, int m, int n, int k, const T *bias, const float *u,   \
                          const float *b, float alpha, int rank, const T *c, int gelu) {                                  \
        begin();                                                                                                          \
        gemv<T, T, M>(x, w, y, m, n, k, {bias, u, b, alpha, rank, c, gelu});                                          \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                                                     \
        gemv_logits_##NAME##_##M(const T *x, const T *w, float *y, int m, int n, int k, const T *bias,        \
                                 const float *u, const float *b, float alpha, int rank, const float *c, int gelu) {       \
        begin();                                                                                                          \
        gemv<T, float, M>(x, w, y, m, n, k, {bias, u, b, alpha, rank, c, gelu});                                      \
    }
#define DEFINE(NAME, T)                                                                                                   \
    DEFINE_M(NAME, T, 1) DEFINE_M(NAME, T, 8)                                                                             \
    extern "C" __global__ void down_few_##NAME(const T *x, const float *w, float *u, int k, int r) { begin(); down_few(x, w, u, k, r); }
FOR_DTYPES(DEFINE)
