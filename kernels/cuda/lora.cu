// LoRA's thin products: one side is the rank r, so each is one pass over the wide matrix.
// Adapters are f32; sums are f32. The rank is taken eight at a time.
//
// A product with a matrix of 16-bit numbers is the tensor cores' (`_mma`): those numbers are tf32 as they are, and the
// others are split into two tf32, the upper and the lower half, which stand below each other as the 16 rows of an mma's
// first operand: eight ranks twice. With a matrix in f32 it is plain arithmetic (`_plain`).
#include "common.cuh"
#include "mma.cuh"

// The dropout of layers/dropout.rs: the same mask from the same key.
__device__ __forceinline__ uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// What element i is multiplied by: 0 or 1 / (1 - p). `key` is null when nothing is dropped.
struct Dropout {
    const uint64_t *key = nullptr;
    uint64_t id = 0;
    double p = 0;
    __device__ __forceinline__ float operator()(uint64_t k, int64_t i) const {
        const uint64_t bits = mix(k ^ mix(uint64_t(i))) >> 11;
        return double(bits) / double(1ull << 53) < p ? 0.f : float(1.0 / (1.0 - p));
    }
    __device__ __forceinline__ bool drops(uint64_t k, int64_t i) const { return key && (*this)(k, i) == 0.f; }
    // What all that is not dropped is multiplied by.
    __device__ __forceinline__ float scale() const { return key ? float(1.0 / (1.0 - p)) : 1.f; }
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

// W's elements for a pair of neighbours along the wide side, all of eight ranks. Side by side in memory lie those of the
// wide side (A, [r, k]) or the ranks (B, [n, r]).
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

// u from what 16 warps have of the sums of eight rows and eight ranks.
__device__ __forceinline__ void write_u(const float (&part)[16][64], float *u, float alpha, int first, int r0, int m, int r) {
    if (threadIdx.x >= 64) return;
    float s = 0;
#pragma unroll
    for (int v = 0; v < 16; v++) s += part[v][threadIdx.x];
    const int row = first + threadIdx.x / R, q = r0 + threadIdx.x % R;
    if (row < m && q < r) u[int64_t(row) * r + q] = alpha * s;
}

// u[m, r] = alpha * dropout(x)[m, k] W[r, k]^T, W's element (r, k) at w[r * wr + k * wk].
// A block of 512 takes 8 rows; each of its 16 warps takes a part of k. Block bx.
__device__ void down_plain(const float *x, const float *w, int64_t wr, int64_t wk, float *u, float alpha, int m, int k, int r,
                     Dropout dropout, int bx) {
    __shared__ float part[16][64];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = bx * 8;
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
                v[row] = k % 2 == 0 ? *reinterpret_cast<const float2 *>(x + at) : make_float2(x[at], i + 1 < k ? x[at + 1] : 0.f);
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
        write_u(part, u, alpha, first, r0, m, r);
        __syncthreads();
    }
}

// y[m, n] = c + alpha * dropout(u[m, r] W[n, r]^T), W's element (n, r) at w[n * wn + r * wr]; c: null or y itself.
// A thread takes 8 columns of 16 rows.
constexpr int UP_ROWS = 16;
template <int THREADS>
__device__ void up_plain(const float *u, const float *w, int64_t wn, int64_t wr, const float *c, float *y, float alpha, int m,
                         int n, int r, Dropout dropout, int block) {
    constexpr int AHEAD = 4;
    const int wide = (n + 7) / 8;
    const int64_t place = int64_t(block) * THREADS + threadIdx.x;
    const int column = int(place % wide) * 8, begin = int(place / wide) * UP_ROWS, end = min(m, begin + UP_ROWS);
    const uint64_t key = dropout.layer_key();
    const bool whole = n % 8 == 0;
    for (int r0 = 0; r0 < r && begin < end; r0 += R) {
        // What later eights of ranks add to.
        const float *from_y = r0 ? y : c;
        float b[4][2][R];
#pragma unroll
        for (int j = 0; j < 4; j++) pair_of(b[j], w, wn, wr, column + 2 * j, n, r0, r);
#pragma unroll 1
        for (int first = begin; first < end; first += AHEAD) {
            Vec<float, 8> old[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (from_y && whole && first + i < end)
                    old[i] = *reinterpret_cast<const Vec<float, 8> *>(from_y + int64_t(first + i) * n + column);
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int row = first + i;
                if (row >= end) break;
                float v[8] = {}, s[R];
                const float *from = u + int64_t(row) * r + r0;
                if (r % 4 == 0 && r0 + R <= r) load(s, from);
                else
#pragma unroll
                    for (int q = 0; q < R; q++) s[q] = r0 + q < r ? from[q] : 0.f;
#pragma unroll
                for (int q = 0; q < R; q++)
#pragma unroll
                    for (int j = 0; j < 8; j++) v[j] += s[q] * b[j / 2][j % 2][q];
                const int64_t at = int64_t(row) * n + column;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    if (dropout.key) v[j] *= dropout(key, at + j);
                    v[j] *= alpha;
                    if (from_y) v[j] += whole ? old[i].v[j] : column + j < n ? from_y[at + j] : 0.f;
                }
                if (whole) store(y + at, v);
                else
                    for (int j = 0; j < 8; j++)
                        if (column + j < n) y[at + j] = v[j];
            }
        }
    }
}

// g[n, r] += scale[0] * alpha * dropout(x)[m, n]^T u[m, r], g's element at g[n * gn + r * gr].
// A block takes 16 columns and all rows: four lanes side by side read a row's 16, THREADS / 4 rows at a time. Block bx.
template <int THREADS>
__device__ void grad_plain(const float *x, const float *u, float *g, int64_t gn, int64_t gr, const float *scale, float alpha,
                           int m, int n, int r, Dropout dropout, int bx) {
    constexpr int PLACES = THREADS / 4, WARPS = THREADS / 32;
    __shared__ float part[WARPS][16][R]; // [warp][column][rank]
    const int place = threadIdx.x / 4, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int column = bx * 16 + threadIdx.x % 4 * 4;
    const uint64_t key = dropout.layer_key();
    for (int r0 = 0; r0 < r; r0 += R) {
        float sum[4 * R] = {}; // [rank][column]
        if (column < n)
#pragma unroll 8
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
                    for (int j = 0; j < 4; j++) v[j] = column + j < n ? x[int64_t(row) * n + column + j] : 0.f;
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
            const int col = bx * 16 + threadIdx.x / R, q = threadIdx.x % R;
            float s = 0;
            for (int w = 0; w < WARPS; w++) s += part[w][threadIdx.x / R][q];
            if (col < n && r0 + q < r) g[col * gn + (r0 + q) * gr] += scale[0] * alpha * s;
        }
        __syncthreads();
    }
}

// The upper and the lower half of a number.
__device__ __forceinline__ void split(uint32_t &upper, uint32_t &lower, float x) {
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(upper) : "f"(x));
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(lower) : "f"(x - __uint_as_float(upper)));
}

// d[16 x 8] += a[16 x 8] b[8 x 8].
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], float b0, float b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// Eight neighbours, of which `left` are there; the others are zeros.
template <typename T> __device__ __forceinline__ Vec<T, 8> eight(const T *from, int left, bool aligned) {
    Vec<T, 8> v;
    if (aligned && left >= 8) return *reinterpret_cast<const Vec<T, 8> *>(from);
#pragma unroll
    for (int j = 0; j < 8; j++) v.v[j] = j < left ? from[j] : from_f32<T>(0.f);
    return v;
}

// As down_plain. The first operand is W, eight ranks twice; the second x, eight rows. Of a warp's 32 neighbours along k a
// lane has eight.
template <typename T>
__device__ void down_mma(const T *x, const float *w, int64_t wr, int64_t wk, float *u, float alpha, int m, int k, int r,
                         Dropout dropout, int bx) {
    __shared__ float part[16][64];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, first = bx * 8;
    const uint64_t key = dropout.layer_key();
    const int64_t own = int64_t(min(first + g, m - 1)) * k;
    for (int r0 = 0; r0 < r; r0 += R) {
        float d[4] = {};
        const bool ranked = r0 + g < r;
        const float *wg = w + (r0 + g) * wr;
#pragma unroll 2
        for (int i = warp * 32 + t * 8; i < (k + 31) / 32 * 32; i += 16 * 32) {
            Vec<T, 8> v = eight(x + own + i, k - i, k % 8 == 0);
            float a[8] = {};
            if (ranked && wk == 1 && k % 4 == 0 && i + 8 <= k) load(a, wg + i);
            else if (ranked)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    if (i + j < k) a[j] = wg[(i + j) * wk];
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (dropout.drops(key, own + i + j)) v.v[j] = from_f32<T>(0.f);
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                uint32_t fa[4];
                split(fa[0], fa[1], a[j]), split(fa[2], fa[3], a[j + 1]);
                mma_tf32(d, fa, to_f32(v.v[j]), to_f32(v.v[j + 1]));
            }
        }
        // Rank g, rows 2 t and 2 t + 1.
        part[warp][2 * t * R + g] = d[0] + d[2], part[warp][(2 * t + 1) * R + g] = d[1] + d[3];
        __syncthreads();
        write_u(part, u, alpha * dropout.scale(), first, r0, m, r);
        __syncthreads();
    }
}

// As grad_plain, 64 columns a block. The first operand is u, eight ranks twice, along the rows; of eight second ones each
// has every eighth column, so that a lane's are side by side in memory. Warps share the rows.
constexpr int GRAD_COLUMNS = 64;
template <int THREADS, typename T>
__device__ void grad_mma(const T *x, const float *u, float *to, int64_t gn, int64_t gr, const float *scale, float alpha, int m,
                         int n, int r, Dropout dropout, int bx) {
    constexpr int WARPS = THREADS / 32;
    __shared__ float part[WARPS][GRAD_COLUMNS * R];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int column = bx * GRAD_COLUMNS + 8 * g;
    const uint64_t key = dropout.layer_key();
    const float by = alpha * dropout.scale() * scale[0];
    for (int r0 = 0; r0 < r; r0 += R) {
        float d[8][4] = {};
#pragma unroll 4
        for (int row0 = warp * 8; row0 < m; row0 += WARPS * 8) {
            Vec<T, 8> v[2];
            float a[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = row0 + t + 4 * h;
                const bool there = row < m;
                const int64_t at = int64_t(row) * n + column;
                v[h] = eight(x + at, there ? n - column : 0, n % 8 == 0);
                a[h] = there && r0 + g < r ? u[int64_t(row) * r + r0 + g] : 0.f;
#pragma unroll
                for (int j = 0; j < 8; j++)
                    if (dropout.drops(key, at + j)) v[h].v[j] = from_f32<T>(0.f);
            }
            uint32_t fa[4];
            split(fa[0], fa[1], a[0]), split(fa[2], fa[3], a[1]);
#pragma unroll
            for (int j = 0; j < 8; j++) mma_tf32(d[j], fa, to_f32(v[0].v[j]), to_f32(v[1].v[j]));
        }
        // Of the j-th: rank g, columns 8 (2 t) + j and 8 (2 t + 1) + j.
#pragma unroll
        for (int j = 0; j < 8; j++) {
            part[warp][(16 * t + j) * R + g] = d[j][0] + d[j][2];
            part[warp][(16 * t + 8 + j) * R + g] = d[j][1] + d[j][3];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < GRAD_COLUMNS * R; i += THREADS) {
            const int col = bx * GRAD_COLUMNS + i / R, q = r0 + i % R;
            float s = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) s += part[w][i];
            if (col < n && q < r) to[col * gn + q * gr] += by * s;
        }
        __syncthreads();
    }
}

// As up_plain. The first operand is u, 16 rows, its upper and lower half one after the other; the second W, of which each
// of four has two neighbours of every eight columns, so that a lane's eight are side by side in memory. A warp takes 32
// columns of UP_MMA_ROWS rows.
constexpr int UP_MMA_ROWS = 128;
template <int THREADS, typename T>
__device__ void up_mma(const float *u, const float *w, int64_t wn, int64_t wr, const T *c, T *y, float alpha, int m, int n,
                       int r, Dropout dropout, int block) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, wide = (n + 31) / 32;
    const int place = block * (THREADS / 32) + threadIdx.x / 32;
    const int first = place % wide * 32, begin = place / wide * UP_MMA_ROWS, end = min(m, begin + UP_MMA_ROWS);
    const uint64_t key = dropout.layer_key();
    const bool whole = n % 8 == 0;
    for (int r0 = 0; r0 < r && begin < end; r0 += R) {
        // What later eights of ranks add to.
        const T *from_y = r0 ? y : c;
        uint32_t upper[4][2], lower[4][2];
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int column = first + g / 2 * 8 + 2 * j + g % 2, q = r0 + t + 4 * h;
                split(upper[j][h], lower[j][h], column < n && q < r ? w[column * wn + q * wr] : 0.f);
            }
#pragma unroll 2
        for (int row0 = begin; row0 < end; row0 += 16) {
            uint32_t a[4], rest[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = row0 + g + i % 2 * 8, q = r0 + t + i / 2 * 4;
                split(a[i], rest[i], row < end && q < r ? u[int64_t(row) * r + q] : 0.f);
            }
            float d[4][4] = {};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float b0 = __uint_as_float(upper[j][0]), b1 = __uint_as_float(upper[j][1]);
                mma_tf32(d[j], rest, b0, b1);
                mma_tf32(d[j], a, __uint_as_float(lower[j][0]), __uint_as_float(lower[j][1]));
                mma_tf32(d[j], a, b0, b1);
            }
            // Rows g and g + 8, columns 8 t .. 8 t + 7.
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = row0 + g + 8 * h, column = first + 8 * t, left = n - column;
                if (row >= end || left <= 0) continue;
                const int64_t at = int64_t(row) * n + column;
                float v[8];
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    v[j] = alpha * d[j / 2][2 * h + j % 2];
                    if (dropout.key) v[j] *= dropout(key, at + j);
                }
                if (from_y) {
                    const Vec<T, 8> old = eight(from_y + at, left, whole);
#pragma unroll
                    for (int j = 0; j < 8; j++) v[j] += to_f32(old.v[j]);
                }
                if (whole) store(y + at, v);
                else
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        if (j < left) y[at + j] = from_f32<T>(v[j]);
            }
        }
    }
}

template <int THREADS, typename T>
__device__ __forceinline__ void up(const float *u, const float *w, int64_t wn, int64_t wr, const T *c, T *y, float alpha,
                                   int m, int n, int r, Dropout dropout, int block) {
    if constexpr (sizeof(T) == 2) up_mma<THREADS>(u, w, wn, wr, c, y, alpha, m, n, r, dropout, block);
    else up_plain<THREADS>(u, w, wn, wr, c, y, alpha, m, n, r, dropout, block);
}

template <typename T>
__device__ __forceinline__ void down(const T *x, const float *w, int64_t wr, int64_t wk, float *u, float alpha, int m, int k,
                                     int r, Dropout dropout, int block) {
    if constexpr (sizeof(T) == 2) down_mma(x, w, wr, wk, u, alpha, m, k, r, dropout, block);
    else down_plain(x, w, wr, wk, u, alpha, m, k, r, dropout, block);
}

// 64 columns a block.
template <int THREADS, typename T>
__device__ __forceinline__ void grad(const T *x, const float *u, float *to, int64_t gn, int64_t gr, const float *scale,
                                     float alpha, int m, int n, int r, Dropout dropout, int block) {
    if constexpr (sizeof(T) == 2) grad_mma<THREADS>(x, u, to, gn, gr, scale, alpha, m, n, r, dropout, block);
    else
        for (int i = 0; i < GRAD_COLUMNS / 16; i++)
            grad_plain<THREADS>(x, u, to, gn, gr, scale, alpha, m, n, r, dropout, block * (GRAD_COLUMNS / 16) + i);
}

// A backward's products come two by two: those that do not wait for each other.
#define DEFINE(NAME, T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(512)                                                                   \
        lora_down_##NAME(const T *x, const float *a, float *u, int m, int k, int r, const uint64_t *key, uint64_t id,   \
                         double p) {                                                                                    \
        begin();                                                                                                        \
        down(x, a, k, 1, u, 1.f, m, k, r, {key, id, p}, blockIdx.x);                                                    \
    }                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                                \
        lora_up_##NAME(const float *u, const float *b, const T *c, T *y, float alpha, int m, int n, int r) {            \
        begin();                                                                                                        \
        up<256>(u, b, r, 1, c, y, alpha, m, n, r, {}, blockIdx.x);                                                      \
    }                                                                                                                   \
    /* du = alpha dy B; gB += scale alpha dy^T u. The first `grads` blocks make gB: they take longer. */                \
    extern "C" __global__ void __launch_bounds__(512)                                                                   \
        lora_backward_b_##NAME(const T *dy, const float *b, float *du, const float *u, float *grad_b,                   \
                               const float *scale, float alpha, int m, int n, int r, int grads) {                       \
        begin();                                                                                                        \
        const int block = blockIdx.x;                                                                                   \
        if (block < grads) grad<512>(dy, u, grad_b, r, 1, scale, alpha, m, n, r, {}, block);                            \
        else down(dy, b, 1, r, du, alpha, m, n, r, {}, block - grads);                                                  \
    }                                                                                                                   \
    /* gA += scale dropout(x)^T du; dx = dropout(du A), unless dx is null. The first `grads` blocks make gA. */         \
    extern "C" __global__ void __launch_bounds__(256)                                                                   \
        lora_backward_a_##NAME(const T *x, const float *a, T *dx, const float *du, float *grad_a, const float *scale,   \
                               int m, int k, int r, int grads, const uint64_t *key, uint64_t id, double p) {            \
        begin();                                                                                                        \
        const Dropout dropout{key, id, p};                                                                              \
        const int block = blockIdx.x;                                                                                   \
        if (block < grads) grad<256>(x, du, grad_a, 1, k, scale, 1.f, m, k, r, dropout, block);                         \
        else up<256>(du, a, 1, k, static_cast<const T *>(nullptr), dx, 1.f, m, k, r, dropout, block - grads);           \
    }
FOR_DTYPES(DEFINE)
