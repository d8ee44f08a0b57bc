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

// 64 sums over a warp, spread over its lanes: each step sends the half that the other lane keeps. v[0] and v[1] of a
// lane become the sums 2 * lane and 2 * lane + 1.
__device__ __forceinline__ void reduce(float (&v)[64]) {
    const int lane = threadIdx.x % 32;
    int held = 64;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        held /= 2;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            if (i >= held) break;
            const bool upper = lane & step;
            const float send = upper ? v[i] : v[i + held], keep = upper ? v[i + held] : v[i];
            v[i] = keep + __shfl_xor_sync(~0u, send, step);
        }
    }
}

// W's elements for a pair of neighbours along the wide side, all of eight ranks. `inner` is the side whose
// neighbours lie side by side in memory: the wide one (A, [r, k]) or the ranks (B, [n, r]).
__device__ __forceinline__ void pair_of(float (&w)[2][R], const float *from, int64_t wide_step, int64_t rank_step, int at,
                                        int end, int r0, int r) {
    if (rank_step == 1 && r % 4 == 0 && r0 + R <= r && at + 1 < end) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float v[8];
            load(v, from + (at + j) * wide_step + r0);
#pragma unroll
            for (int q = 0; q < R; q++) w[j][q] = v[q];
        }
    } else if (wide_step == 1 && rank_step % 2 == 0 && r0 + R <= r && at + 1 < end) {
#pragma unroll
        for (int q = 0; q < R; q++) {
            const float2 v = *reinterpret_cast<const float2 *>(from + (r0 + q) * rank_step + at);
            w[0][q] = v.x, w[1][q] = v.y;
        }
    } else {
#pragma unroll
        for (int q = 0; q < R; q++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                w[j][q] = r0 + q < r && at + j < end ? from[(at + j) * wide_step + (r0 + q) * rank_step] : 0.f;
    }
}

template <typename T> __device__ __forceinline__ float2 two(const T *from, bool both) {
    if (both) {
        const Vec<T, 2> v = *reinterpret_cast<const Vec<T, 2> *>(from);
        return make_float2(to_f32(v.v[0]), to_f32(v.v[1]));
    }
    return make_float2(to_f32(from[0]), 0.f);
}

// u[m, r] = alpha * dropout(x)[m, k] W[r, k]^T, W's element (r, k) at w[r * wr + k * wk].
// A block of 512 takes 8 rows; each of its 16 warps takes a part of k.
template <typename T>
__device__ void down(const T *x, const float *w, int64_t wr, int64_t wk, float *u, float alpha, int m, int k, int r,
                     Dropout dropout) {
    __shared__ float part[16][64];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = blockIdx.x * 8;
    const int share = (k + 1023) / 1024 * 64, begin = warp * share, end = min(k, begin + share);
    const uint64_t key = dropout.layer_key();
    for (int r0 = 0; r0 < r; r0 += R) {
        float sum[64] = {}; // [row][rank]
        for (int i = begin + lane * 2; i < end; i += 64) {
            float a[2][R];
            pair_of(a, w, wk, wr, i, k, r0, r);
            float2 v[8];
#pragma unroll
            for (int row = 0; row < 8; row++) {
                const int64_t at = int64_t(min(first + row, m - 1)) * k + i;
                v[row] = k % 2 == 0 ? two(x + at, true) : make_float2(to_f32(x[at]), i + 1 < k ? to_f32(x[at + 1]) : 0.f);
                if (dropout.key) v[row].x *= dropout(key, at), v[row].y *= dropout(key, at + 1);
            }
#pragma unroll
            for (int row = 0; row < 8; row++)
#pragma unroll
                for (int q = 0; q < R; q++) sum[row * R + q] += v[row].x * a[0][q] + v[row].y * a[1][q];
        }
        reduce(sum);
        part[warp][lane * 2] = sum[0], part[warp][lane * 2 + 1] = sum[1];
        __syncthreads();
        if (threadIdx.x < 64) {
            float s = 0;
            for (int v = 0; v < 16; v++) s += part[v][threadIdx.x];
            const int row = first + threadIdx.x / R, q = r0 + threadIdx.x % R;
            if (row < m && q < r) u[int64_t(row) * r + q] = alpha * s;
        }
        __syncthreads();
    }
}

// y[m, n] += alpha * dropout(u[m, r] W[n, r]^T), W's element (n, r) at w[n * wn + r * wr].
// A thread takes 4 columns of 16 rows.
template <typename T>
__device__ void up(const float *u, const float *w, int64_t wn, int64_t wr, T *y, float alpha, int m, int n, int r,
                   Dropout dropout) {
    constexpr int ROWS = 16;
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * 4, first = blockIdx.y * ROWS;
    if (column >= n) return;
    const uint64_t key = dropout.layer_key();
    for (int r0 = 0; r0 < r; r0 += R) {
        float b[2][2][R];
#pragma unroll
        for (int j = 0; j < 2; j++) pair_of(b[j], w, wn, wr, column + 2 * j, n, r0, r);
#pragma unroll 4
        for (int row = first; row < min(first + ROWS, m); row++) {
            float v[4] = {}, s[R], old[4];
            T *to = y + int64_t(row) * n + column;
            if (n % 4 == 0) load(old, to);
            const float *from = u + int64_t(row) * r + r0;
            if (r % 4 == 0 && r0 + R <= r) load(s, from);
            else
#pragma unroll
                for (int q = 0; q < R; q++) s[q] = r0 + q < r ? from[q] : 0.f;
#pragma unroll
            for (int q = 0; q < R; q++)
#pragma unroll
                for (int j = 0; j < 4; j++) v[j] += s[q] * b[j / 2][j % 2][q];
            if (dropout.key)
#pragma unroll
                for (int j = 0; j < 4; j++) v[j] *= dropout(key, int64_t(row) * n + column + j);
            if (n % 4 == 0) {
#pragma unroll
                for (int j = 0; j < 4; j++) v[j] = alpha * v[j] + old[j];
                store(to, v);
            } else {
                for (int j = 0; j < 4; j++)
                    if (column + j < n) to[j] = from_f32<T>(to_f32(to[j]) + alpha * v[j]);
            }
        }
    }
}

// g[n, r] += scale[0] * alpha * dropout(x)[m, n]^T u[m, r], g's element at g[n * gn + r * gr].
// A block of 256 takes 16 columns and all rows: four lanes side by side read a row's 16, 64 rows at a time.
template <typename T>
__device__ void grad(const T *x, const float *u, float *g, int64_t gn, int64_t gr, const float *scale, float alpha, int m,
                     int n, int r, Dropout dropout) {
    constexpr int PLACES = 64;
    __shared__ float part[8][16][R]; // [warp][column][rank]
    const int place = threadIdx.x / 4, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int column = blockIdx.x * 16 + threadIdx.x % 4 * 4;
    const uint64_t key = dropout.layer_key();
    for (int r0 = 0; r0 < r; r0 += R) {
        float sum[4 * R] = {}; // [rank][column]
        if (column < n)
#pragma unroll 4
            for (int row = place; row < m; row += PLACES) {
                float v[4], s[R];
                const float *from = u + int64_t(row) * r + r0;
                if (r % 4 == 0 && r0 + R <= r) load(s, from);
                else
#pragma unroll
                    for (int q = 0; q < R; q++) s[q] = r0 + q < r ? from[q] : 0.f;
                if (n % 4 == 0) load(v, x + int64_t(row) * n + column);
                else
#pragma unroll
                    for (int j = 0; j < 4; j++) v[j] = column + j < n ? to_f32(x[int64_t(row) * n + column + j]) : 0.f;
                if (dropout.key)
#pragma unroll
                    for (int j = 0; j < 4; j++) v[j] *= dropout(key, int64_t(row) * n + column + j);
#pragma unroll
                for (int q = 0; q < R; q++)
#pragma unroll
                    for (int j = 0; j < 4; j++) sum[q * 4 + j] += s[q] * v[j];
            }
        // Over the 8 rows of a warp, whose lanes differ in their upper three bits, then over the warps.
        int held = 4 * R;
#pragma unroll
        for (int step = 16; step >= 4; step /= 2) {
            held /= 2;
#pragma unroll
            for (int i = 0; i < 2 * R; i++) {
                if (i >= held) break;
                const bool upper = lane & step;
                const float send = upper ? sum[i] : sum[i + held], keep = upper ? sum[i + held] : sum[i];
                sum[i] = keep + __shfl_xor_sync(~0u, send, step);
            }
        }
        // Four sums a lane: those of one rank.
        const int rank = lane / 4;
#pragma unroll
        for (int j = 0; j < 4; j++) part[warp][lane % 4 * 4 + j][rank] = sum[j];
        __syncthreads();
        if (threadIdx.x < 16 * R) {
            const int col = blockIdx.x * 16 + threadIdx.x / R, q = threadIdx.x % R;
            float s = 0;
            for (int w = 0; w < 8; w++) s += part[w][threadIdx.x / R][q];
            if (col < n && r0 + q < r) g[col * gn + (r0 + q) * gr] += scale[0] * alpha * s;
        }
        __syncthreads();
    }
}

#define DEFINE(NAME, T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(512) lora_down_##NAME(const T *x, const float *w, int64_t wr, int64_t wk, float *u,           \
                                                float alpha, int m, int k, int r, const uint64_t *key, uint64_t id,     \
                                                double p) {                                                             \
        begin();                                                                                                        \
        down(x, w, wr, wk, u, alpha, m, k, r, {key, id, p});                                                      \
    }                                                                                                                   \
    extern "C" __global__ void lora_up_##NAME(const float *u, const float *w, int64_t wn, int64_t wr, T *y, float alpha, \
                                              int m, int n, int r, const uint64_t *key, uint64_t id, double p) {        \
        begin();                                                                                                        \
        up(u, w, wn, wr, y, alpha, m, n, r, {key, id, p});                                                              \
    }                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(256)                                                                   \
        lora_grad_##NAME(const T *x, const float *u, float *g, int64_t gn, int64_t gr, const float *scale, float alpha, \
                         int m, int n, int r, const uint64_t *key, uint64_t id, double p) {                             \
        begin();                                                                                                        \
        grad(x, u, g, gn, gr, scale, alpha, m, n, r, {key, id, p});                                                     \
    }
FOR_DTYPES(DEFINE)
