// LoRA's thin products: one side is the rank r, so each is one pass over the wide matrix.
// Adapters are f32; sums are f32. The rank is taken eight at a time.
#include "common.cuh"

// The dropout of layers/dropout.rs: the same mask from the same key.
__device__ __forceinline__ uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// What element i is multiplied by: 0 or 1 / (1 - p). `key` is null when nothing is dropped.
struct Dropout {
    const uint64_t *key;
    uint64_t id;
    double p;
    __device__ __forceinline__ float operator()(uint64_t k, int64_t i) const {
        const uint64_t bits = mix(k ^ mix(uint64_t(i))) >> 11;
        return double(bits) / double(1ull << 53) < p ? 0.f : float(1.0 / (1.0 - p));
    }
    __device__ __forceinline__ uint64_t layer_key() const { return key ? mix(key[0] ^ id) : 0; }
};

constexpr int R = 8;

// u[m, r] = alpha * dropout(x)[m, k] W[r, k]^T, W's element (r, k) at w[r * wr + k * wk].
// A warp takes ROWS rows; lanes go along k.
template <typename T, int ROWS>
__device__ void down(const T *x, const float *w, int64_t wr, int64_t wk, float *u, float alpha, int m, int k, int r,
                     Dropout dropout) {
    const int lane = threadIdx.x % 32, first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * ROWS;
    if (first >= m) return;
    const uint64_t key = dropout.layer_key();
    for (int r0 = 0; r0 < r; r0 += R) {
        const int some = min(R, r - r0);
        float sum[ROWS][R] = {};
        for (int i = lane * 8; i < k; i += 256) {
            float v[ROWS][8];
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                const int at = min(first + row, m - 1);
                if (k % 8 == 0) load(v[row], x + int64_t(at) * k + i);
                else
#pragma unroll
                    for (int j = 0; j < 8; j++) v[row][j] = i + j < k ? to_f32(x[int64_t(at) * k + i + j]) : 0.f;
                if (dropout.key)
#pragma unroll
                    for (int j = 0; j < 8; j++) v[row][j] *= dropout(key, int64_t(at) * k + i + j);
            }
#pragma unroll
            for (int q = 0; q < R; q++) {
                if (q >= some) break;
                const float *from = w + (r0 + q) * wr;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float a = i + j < k ? from[(i + j) * wk] : 0.f;
#pragma unroll
                    for (int row = 0; row < ROWS; row++) sum[row][q] += v[row][j] * a;
                }
            }
        }
#pragma unroll
        for (int row = 0; row < ROWS; row++)
#pragma unroll
            for (int q = 0; q < R; q++) {
                const float s = warp_sum(sum[row][q]);
                if (lane == q && q < some && first + row < m) u[int64_t(first + row) * r + r0 + q] = alpha * s;
            }
    }
}

// y[m, n] += alpha * dropout(u[m, r] W[n, r]^T), W's element (n, r) at w[n * wn + r * wr].
// A thread takes 8 columns of ROWS rows.
template <typename T>
__device__ void up(const float *u, const float *w, int64_t wn, int64_t wr, T *y, float alpha, int m, int n, int r,
                   Dropout dropout) {
    constexpr int ROWS = 8;
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * 8, first = blockIdx.y * ROWS;
    if (column >= n) return;
    const uint64_t key = dropout.layer_key();
    for (int r0 = 0; r0 < r; r0 += R) {
        float b[R][8];
#pragma unroll
        for (int q = 0; q < R; q++)
#pragma unroll
            for (int j = 0; j < 8; j++) b[q][j] = r0 + q < r && column + j < n ? w[(column + j) * wn + (r0 + q) * wr] : 0.f;
        for (int row = first; row < min(first + ROWS, m); row++) {
            float v[8] = {}, s[R];
#pragma unroll
            for (int q = 0; q < R; q++) s[q] = r0 + q < r ? alpha * u[int64_t(row) * r + r0 + q] : 0.f;
#pragma unroll
            for (int q = 0; q < R; q++)
#pragma unroll
                for (int j = 0; j < 8; j++) v[j] += s[q] * b[q][j];
            if (dropout.key)
#pragma unroll
                for (int j = 0; j < 8; j++) v[j] *= dropout(key, int64_t(row) * n + column + j);
            T *to = y + int64_t(row) * n + column;
            if (n % 8 == 0) {
                float old[8];
                load(old, to);
#pragma unroll
                for (int j = 0; j < 8; j++) v[j] += old[j];
                store(to, v);
            } else {
                for (int j = 0; j < 8; j++)
                    if (column + j < n) to[j] = from_f32<T>(to_f32(to[j]) + v[j]);
            }
        }
    }
}

// g[n, r] += scale[0] * alpha * dropout(x)[m, n]^T u[m, r], g's element at g[n * gn + r * gr].
// A block takes 16 columns and all rows: two lanes side by side read a row's 16, 128 rows at a time.
template <typename T>
__device__ void grad(const T *x, const float *u, float *g, int64_t gn, int64_t gr, const float *scale, float alpha, int m,
                     int n, int r, Dropout dropout) {
    constexpr int PLACES = 128;
    __shared__ float part[8][2][R * 8];
    const int half = threadIdx.x % 2, place = threadIdx.x / 2, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int column = blockIdx.x * 16 + half * 8;
    const uint64_t key = dropout.layer_key();
    for (int r0 = 0; r0 < r; r0 += R) {
        float sum[R][8] = {};
        if (column < n)
            for (int row = place; row < m; row += PLACES) {
                float v[8];
                if (n % 8 == 0) load(v, x + int64_t(row) * n + column);
                else
#pragma unroll
                    for (int j = 0; j < 8; j++) v[j] = column + j < n ? to_f32(x[int64_t(row) * n + column + j]) : 0.f;
                if (dropout.key)
#pragma unroll
                    for (int j = 0; j < 8; j++) v[j] *= dropout(key, int64_t(row) * n + column + j);
#pragma unroll
                for (int q = 0; q < R; q++) {
                    const float s = r0 + q < r ? u[int64_t(row) * r + r0 + q] : 0.f;
#pragma unroll
                    for (int j = 0; j < 8; j++) sum[q][j] += s * v[j];
                }
            }
        // Over the 16 rows of a warp, then over the warps.
#pragma unroll
        for (int q = 0; q < R; q++)
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float s = sum[q][j];
#pragma unroll
                for (int step = 16; step > 1; step /= 2) s += __shfl_xor_sync(~0u, s, step);
                if (lane / 2 == 0) part[warp][half][q * 8 + j] = s;
            }
        __syncthreads();
        if (threadIdx.x < 2 * R * 8) {
            const int which = threadIdx.x / (R * 8), at = threadIdx.x % (R * 8), q = at / 8;
            const int col = blockIdx.x * 16 + which * 8 + at % 8;
            float s = 0;
            for (int w = 0; w < 8; w++) s += part[w][which][at];
            if (col < n && r0 + q < r) g[col * gn + (r0 + q) * gr] += scale[0] * alpha * s;
        }
        __syncthreads();
    }
}

#define DEFINE(NAME, T)                                                                                                 \
    extern "C" __global__ void lora_down_##NAME(const T *x, const float *w, int64_t wr, int64_t wk, float *u,           \
                                                float alpha, int m, int k, int r, const uint64_t *key, uint64_t id,     \
                                                double p) {                                                             \
        down<T, 2>(x, w, wr, wk, u, alpha, m, k, r, {key, id, p});                                                      \
    }                                                                                                                   \
    extern "C" __global__ void lora_up_##NAME(const float *u, const float *w, int64_t wn, int64_t wr, T *y, float alpha, \
                                              int m, int n, int r, const uint64_t *key, uint64_t id, double p) {        \
        up(u, w, wn, wr, y, alpha, m, n, r, {key, id, p});                                                              \
    }                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(256)                                                                   \
        lora_grad_##NAME(const T *x, const float *u, float *g, int64_t gn, int64_t gr, const float *scale, float alpha, \
                         int m, int n, int r, const uint64_t *key, uint64_t id, double p) {                             \
        grad(x, u, g, gn, gr, scale, alpha, m, n, r, {key, id, p});                                                     \
    }
FOR_DTYPES(DEFINE)
