// LoRA's thin products: one side is the rank r, so each is one pass over the wide matrix.
// Adapters are f32; sums are f32. The rank is taken eight at a time.
//
// A product with a matrix of 16-bit numbers is the tensor cores' (`_mma`): those numbers are tf32 as they are, and the
// others are split into two tf32, the upper and the lower half, which stand below each other as the 16 rows of an mma's
// first operand: eight ranks twice. With a matrix in f32 it is plain arithmetic (`_plain`).
#include "common.cuh"
#include "mma.cuh"

// The dropout of backend/dropout.rs: the same mask from the same key.
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
    // A bit for each of `rows` x `columns` elements that is dropped, the first one at i. A loop: unrolled it would take
    // the registers of what waits for it.
    __device__ __forceinline__ uint32_t drops(uint64_t k, int64_t i, int columns, int rows = 1, int64_t step = 0) const {
        uint32_t bits = 0;
        if (key)
#pragma unroll 1
            for (int e = 0; e < rows * columns; e++)
                bits |= uint32_t((*this)(k, i + e / columns * step + e % columns) == 0.f) << e;
        return bits;
    }
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
TELL(UP_ROWS, UP_ROWS)
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

// The upper and the lower half of a number. Cut off, not rounded, which would take nine instructions; the tensor cores
// do not read the 13 bits that the lower one has too many, 2^-21 of x.
__device__ __forceinline__ void split(uint32_t &upper, uint32_t &lower, float x) {
    upper = __float_as_uint(x) & 0xffffe000u;
    lower = __float_as_uint(x - __uint_as_float(upper));
}

template <typename T> __device__ __forceinline__ uint32_t as_tf32(T x) { return __float_as_uint(to_f32(x)); }

// d[16 x 8] += a[16 x 8] b[8 x 8].
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Eight neighbours, of which `left` are there; the others are zeros. `aligned`: all or none are there.
template <typename T> __device__ __forceinline__ Vec<T, 8> eight(const T *from, int left, bool aligned) {
    Vec<T, 8> v;
    if (aligned) {
        const uint4 all = left > 0 ? *reinterpret_cast<const uint4 *>(from) : uint4{};
        return reinterpret_cast<const Vec<T, 8> &>(all);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) v.v[j] = j < left ? from[j] : from_f32<T>(0.f);
    return v;
}

// As `eight`.
template <typename T> __device__ __forceinline__ Vec<T, 2> pair(const T *from, int left, bool aligned) {
    if (aligned) {
        const uint32_t v = left > 0 ? *reinterpret_cast<const uint32_t *>(from) : 0;
        return reinterpret_cast<const Vec<T, 2> &>(v);
    }
    Vec<T, 2> v;
#pragma unroll
    for (int j = 0; j < 2; j++) v.v[j] = j < left ? from[j] : from_f32<T>(0.f);
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
            const uint32_t dropped = dropout.drops(key, own + i, 8);
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (dropped >> j & 1) v.v[j] = from_f32<T>(0.f);
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                uint32_t fa[4];
                split(fa[0], fa[1], a[j]), split(fa[2], fa[3], a[j + 1]);
                mma_tf32(d, fa, as_tf32(v.v[j]), as_tf32(v.v[j + 1]));
            }
        }
        // Rank g, rows 2 t and 2 t + 1.
        part[warp][2 * t * R + g] = d[0] + d[2], part[warp][(2 * t + 1) * R + g] = d[1] + d[3];
        __syncthreads();
        write_u(part, u, alpha * dropout.scale(), first, r0, m, r);
        __syncthreads();
    }
}

// As grad_plain. The first operand is u, eight ranks twice, along the rows; of two second ones each has every other
// column, so that a lane's two are side by side in memory. Warps share the rows, and what a lane reads of 64 of them is on
// its way before the first is used.
constexpr int GRAD_COLUMNS = 16;
TELL(GRAD_COLUMNS, GRAD_COLUMNS)
template <int THREADS, typename T>
__device__ void grad_mma(const T *x, const float *u, float *to, int64_t gn, int64_t gr, const float *scale, float alpha, int m,
                         int n, int r, Dropout dropout, int bx) {
    constexpr int WARPS = THREADS / 32, AHEAD = 8;
    __shared__ float part[WARPS][GRAD_COLUMNS * R];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int column = bx * GRAD_COLUMNS + 2 * g;
    const uint64_t key = dropout.layer_key();
    const float by = alpha * dropout.scale() * scale[0];
    for (int r0 = 0; r0 < r; r0 += R) {
        // What a thread adds to.
        const int col = bx * GRAD_COLUMNS + threadIdx.x / R, q = r0 + threadIdx.x % R;
        const bool adds = threadIdx.x < GRAD_COLUMNS * R && col < n && q < r;
        const float old = adds ? to[col * gn + q * gr] : 0.f;
        float d[2][4] = {};
        for (int row0 = warp * 8 * AHEAD; row0 < m; row0 += WARPS * 8 * AHEAD) {
            Vec<T, 2> v[2 * AHEAD];
            float a[2 * AHEAD];
            const int row = row0 + t;
            const T *from = x + int64_t(row) * n + column;
            const bool even = n % 2 == 0; // asked once, for the loads between branches would wait for one another
            if (even)
#pragma unroll
                for (int i = 0; i < 2 * AHEAD; i++)
                    v[i] = pair(from + int64_t(4 * i) * n, row + 4 * i < m ? n - column : 0, true);
            else
#pragma unroll
                for (int i = 0; i < 2 * AHEAD; i++)
                    v[i] = pair(from + int64_t(4 * i) * n, row + 4 * i < m ? n - column : 0, false);
#pragma unroll
            for (int i = 0; i < 2 * AHEAD; i++)
                a[i] = row + 4 * i < m && r0 + g < r ? u[int64_t(row + 4 * i) * r + r0 + g] : 0.f;
            const uint32_t dropped = dropout.drops(key, int64_t(row) * n + column, 2, 2 * AHEAD, int64_t(4) * n);
#pragma unroll
            for (int i = 0; i < 2 * AHEAD; i++)
#pragma unroll
                for (int j = 0; j < 2; j++)
                    if (dropped >> (2 * i + j) & 1) v[i].v[j] = from_f32<T>(0.f);
#pragma unroll
            for (int i = 0; i < 2 * AHEAD; i += 2) {
                uint32_t fa[4];
                split(fa[0], fa[1], a[i]), split(fa[2], fa[3], a[i + 1]);
#pragma unroll
                for (int j = 0; j < 2; j++) mma_tf32(d[j], fa, as_tf32(v[i].v[j]), as_tf32(v[i + 1].v[j]));
            }
        }
        // Of the j-th: rank g, columns 2 (2 t) + j and 2 (2 t + 1) + j.
#pragma unroll
        for (int j = 0; j < 2; j++) {
            part[warp][(4 * t + j) * R + g] = d[j][0] + d[j][2];
            part[warp][(4 * t + 2 + j) * R + g] = d[j][1] + d[j][3];
        }
        __syncthreads();
        if (adds) {
            float s = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) s += part[w][threadIdx.x];
            to[col * gn + q * gr] = old + by * s;
        }
        __syncthreads();
    }
}

// Both products of a backward with dy[m, n], which is read once: a block takes 256 columns of a band of rows, 64 at a
// time. What it has of dy B (over its columns) goes to `du_parts` [m / 64][n / 256][64, r], of dy^T u (over its rows) to
// `grad_parts` [bands][n, r], already scaled. The last block of a band to come adds up du, always in the same order; the
// gradient is added up by the next kernel.
constexpr int TILE_ROWS = 64, TILE_COLUMNS = 256;
constexpr int MAX_BANDS = 16;
TELL(TILE_ROWS, TILE_ROWS) TELL(TILE_COLUMNS, TILE_COLUMNS) TELL(MAX_BANDS, MAX_BANDS)
// Blocks of a band that have been here; 0 again after each launch.
__device__ unsigned arrived[MAX_BANDS];
// A part of a gradient begins at 16 bytes.
__device__ __forceinline__ int64_t padded(int64_t size) { return (size + 3) / 4 * 4; }
template <typename T>
__device__ void backward_b_mma(const T *dy, const float *b, float *du, const float *u, float *du_parts, float *grad_parts,
                               const float *scale, float alpha, int m, int n, int r) {
    constexpr int ROW = TILE_COLUMNS + 8, WARPS = TILE_COLUMNS / 32, GROUPS = TILE_ROWS / 8, STAGES = 2;
    __shared__ __align__(16) T tile[TILE_ROWS * ROW];
    __shared__ bool last;
    float *const sums = reinterpret_cast<float *>(tile); // [warp][row][rank], when the tile is no longer needed
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * TILE_COLUMNS, column = first + warp * 32;
    const int band = (m + TILE_ROWS * gridDim.y - 1) / (TILE_ROWS * gridDim.y) * TILE_ROWS;
    const int begin = blockIdx.y * band, end = min(m, begin + band);
    const float by = alpha * scale[0];
    for (int r0 = 0; r0 < r; r0 += R) {
        float d[4][4] = {};
        float w[4][2]; // of the s-th eight columns
        for (int row0 = begin; row0 < end; row0 += TILE_ROWS) {
            __syncthreads();
            if (n % 8 == 0)
#pragma unroll
                for (int stage = 0; stage < STAGES; stage++) {
#pragma unroll
                    for (int i = 0; i < TILE_ROWS / STAGES; i += 8) {
                        const int row = stage * (TILE_ROWS / STAGES) + i + warp, c = lane * 8;
                        const bool there = row0 + row < end && first + c < n;
                        const T *from = dy + (there ? int64_t(row0 + row) * n + first + c : 0);
                        send<16>(tile + row * ROW + c, from, there);
                    }
                    sent();
                }
            else
                for (int i = threadIdx.x; i < TILE_ROWS * TILE_COLUMNS; i += 32 * WARPS) {
                    const int row = i / TILE_COLUMNS, c = i % TILE_COLUMNS;
                    const bool there = row0 + row < end && first + c < n;
                    tile[row * ROW + c] = there ? dy[int64_t(row0 + row) * n + first + c] : from_f32<T>(0.f);
                }
            float a[GROUPS][2];
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int row = row0 + 8 * i + 2 * t + h;
                    a[i][h] = row < end && r0 + g < r ? u[int64_t(row) * r + r0 + g] : 0.f;
                }
            if (row0 == begin)
#pragma unroll
                for (int s = 0; s < 4; s++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const int c = column + 8 * s + 2 * t + h;
                        w[s][h] = c < n && r0 + g < r ? b[int64_t(c) * r + r0 + g] : 0.f;
                    }
            float2 sum[GROUPS];
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
                if (i % (GROUPS / STAGES) == 0) {
                    if (i == 0) landed<1>();
                    else landed<0>();
                    __syncthreads();
                }
                const T *at = tile + (8 * i + lane % 8) * ROW + warp * 32 + lane / 8 * 8;
                uint32_t x[4], y[4], fa[4];
                ldmatrix<false>(x, at), ldmatrix<true>(y, at);
                split(fa[0], fa[1], a[i][0]), split(fa[2], fa[3], a[i][1]);
                float e[4] = {};
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    const auto &row = reinterpret_cast<const Vec<T, 2> &>(x[s]);
                    const auto &col = reinterpret_cast<const Vec<T, 2> &>(y[s]);
                    uint32_t fw[4];
                    split(fw[0], fw[1], w[s][0]), split(fw[2], fw[3], w[s][1]);
                    mma_tf32(e, fw, as_tf32(row.v[0]), as_tf32(row.v[1]));
                    mma_tf32(d[s], fa, as_tf32(col.v[0]), as_tf32(col.v[1]));
                }
                sum[i] = make_float2(e[0] + e[2], e[1] + e[3]); // rank g, rows 2 t and 2 t + 1
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
                float *to = sums + (warp * TILE_ROWS + 8 * i + 2 * t) * R + g;
                to[0] = sum[i].x, to[R] = sum[i].y;
            }
            __syncthreads();
            for (int i = threadIdx.x; i < TILE_ROWS * R; i += 32 * WARPS) {
                const int row = row0 + i / R, q = r0 + i % R;
                float s = 0;
#pragma unroll
                for (int v = 0; v < WARPS; v++) s += sums[v * TILE_ROWS * R + i];
                const int64_t at = int64_t(row0) * gridDim.x + TILE_ROWS * blockIdx.x + i / R;
                if (row < end && q < r) du_parts[at * r + q] = s;
            }
        }
        if (r0 + R >= r) { // all of du is written: who is last can be asked while the rest is
            __threadfence();
            __syncthreads();
            if (threadIdx.x == 0) last = atomicInc(arrived + blockIdx.y, gridDim.x - 1) == gridDim.x - 1;
        }
        float *const part = grad_parts + blockIdx.y * padded(int64_t(n) * r);
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int c = column + 8 * s + 2 * t + h;
                if (c < n && r0 + g < r) part[int64_t(c) * r + r0 + g] = by * (d[s][h] + d[s][2 + h]);
            }
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    const int size = TILE_ROWS * r / 2; // pairs
    for (int row0 = begin; row0 < end; row0 += TILE_ROWS)
        for (int i = threadIdx.x; i < size; i += 32 * WARPS) {
            const float2 *from = reinterpret_cast<const float2 *>(du_parts + int64_t(row0) * gridDim.x * r) + i;
            float2 s = {};
#pragma unroll 12
            for (int p = 0; p < gridDim.x; p++) {
                const float2 v = __ldcg(from + int64_t(p) * size);
                s.x += v.x, s.y += v.y;
            }
            const int64_t at = int64_t(row0) * r + 2 * i;
            if (at < int64_t(end) * r) du[at] = alpha * s.x;
            if (at + 1 < int64_t(end) * r) du[at + 1] = alpha * s.y;
        }
}

// to += the sum of `bands` parts of `size` numbers each. A thread takes four.
template <int THREADS> __device__ void add_parts(float *to, const float *parts, int bands, int size, int block) {
    const int at = 4 * (block * THREADS + threadIdx.x);
    if (at >= size) return;
    float old[4], s[4] = {};
#pragma unroll
    for (int j = 0; j < 4; j++) old[j] = at + j < size ? to[at + j] : 0.f;
#pragma unroll 16
    for (int p = 0; p < bands; p++) {
        float v[4];
        load(v, parts + p * padded(size) + at);
#pragma unroll
        for (int j = 0; j < 4; j++) s[j] += v[j];
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (at + j < size) to[at + j] = old[j] + s[j];
}

// As up_plain. The first operand is u, 16 rows, its upper and lower half one after the other; the second W, of which each
// of four has two neighbours of every eight columns, so that a lane's eight are side by side in memory. A warp takes 32
// columns of UP_MMA_ROWS rows.
constexpr int UP_MMA_ROWS = 32;
TELL(UP_MMA_ROWS, UP_MMA_ROWS)
template <int THREADS, typename T>
__device__ void up_mma(const float *u, const float *w, int64_t wn, int64_t wr, const T *c, T *y, float alpha, int m, int n,
                       int r, Dropout dropout, int block) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, wide = (n + 31) / 32;
    const int place = block * (THREADS / 32) + threadIdx.x / 32;
    const int first = place % wide * 32, begin = place / wide * UP_MMA_ROWS, end = min(m, begin + UP_MMA_ROWS);
    const uint64_t key = dropout.layer_key();
    const float by = alpha * dropout.scale();
    const bool whole = n % 8 == 0;
    for (int r0 = 0; r0 < r && begin < end; r0 += R) {
        // What later eights of ranks add to.
        const T *from_y = r0 ? y : c;
        float b[4][2];
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int column = first + g / 2 * 8 + 2 * j + g % 2, q = r0 + t + 4 * h;
                b[j][h] = column < n && q < r ? w[column * wn + q * wr] : 0.f;
            }
#pragma unroll 2
        for (int row0 = begin; row0 < end; row0 += 16) {
            // Rows g and g + 8, columns 8 t .. 8 t + 7.
            const int column = first + 8 * t, left = n - column;
            const int64_t at = int64_t(row0 + g) * n + column, next = at + int64_t(8) * n;
            const int left0 = row0 + g < end ? left : 0, left1 = row0 + g + 8 < end ? left : 0;
            Vec<T, 8> old[2];
            if (from_y && whole) old[0] = eight(from_y + at, left0, true), old[1] = eight(from_y + next, left1, true);
            else if (from_y) old[0] = eight(from_y + at, left0, false), old[1] = eight(from_y + next, left1, false);
            uint32_t a[4], rest[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = row0 + g + i % 2 * 8, q = r0 + t + i / 2 * 4;
                split(a[i], rest[i], row < end && q < r ? u[int64_t(row) * r + q] : 0.f);
            }
            float d[4][4] = {};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t upper[2], lower[2];
                split(upper[0], lower[0], b[j][0]), split(upper[1], lower[1], b[j][1]);
                mma_tf32(d[j], rest, upper[0], upper[1]);
                mma_tf32(d[j], a, lower[0], lower[1]);
                mma_tf32(d[j], a, upper[0], upper[1]);
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int there = h ? left1 : left0;
                T *to = y + (h ? next : at);
                const uint32_t dropped = there > 0 ? dropout.drops(key, h ? next : at, 8) : 0;
                float v[8];
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    v[j] = dropped >> j & 1 ? 0.f : by * d[j / 2][2 * h + j % 2];
                    if (from_y) v[j] += to_f32(old[h].v[j]);
                }
                if (there > 0 && whole) store(to, v);
                else
                    for (int j = 0; j < 8; j++)
                        if (j < there) to[j] = from_f32<T>(v[j]);
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

// 16 columns a block.
template <int THREADS, typename T>
__device__ __forceinline__ void grad(const T *x, const float *u, float *to, int64_t gn, int64_t gr, const float *scale,
                                     float alpha, int m, int n, int r, Dropout dropout, int block) {
    if constexpr (sizeof(T) == 2) grad_mma<THREADS>(x, u, to, gn, gr, scale, alpha, m, n, r, dropout, block);
    else grad_plain<THREADS>(x, u, to, gn, gr, scale, alpha, m, n, r, dropout, block);
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
    /* du = alpha dy B; gB += scale alpha dy^T u. In f32 the first `grads` blocks make gB: they take longer. */         \
    extern "C" __global__ void __launch_bounds__(sizeof(T) == 2 ? 256 : 512, sizeof(T) == 2 ? 3 : 1)                    \
        lora_backward_b_##NAME(const T *dy, const float *b, float *du, const float *u, float *grad_b, float *du_parts,  \
                               float *grad_parts, const float *scale, float alpha, int m, int n, int r, int grads) {    \
        begin();                                                                                                        \
        const int block = blockIdx.x;                                                                                   \
        if constexpr (sizeof(T) == 2) backward_b_mma(dy, b, du, u, du_parts, grad_parts, scale, alpha, m, n, r);        \
        else if (block < grads) grad<512>(dy, u, grad_b, r, 1, scale, alpha, m, n, r, {}, block);                       \
        else down(dy, b, 1, r, du, alpha, m, n, r, {}, block - grads);                                                  \
    }                                                                                                                   \
    /* gA += scale dropout(x)^T du; dx = dropout(du A), unless dx is null; gB += its parts, `size` numbers in each of   \
       `bands`. The first `grads` blocks make gA, the next `adds` gB. */                                                \
    extern "C" __global__ void __launch_bounds__(256, sizeof(T) == 2 ? 2 : 1)                                            \
        lora_backward_a_##NAME(const T *x, const float *a, T *dx, const float *du, float *grad_a, float *grad_b,        \
                               const float *grad_parts, const float *scale, int m, int k, int r, int grads, int adds,   \
                               int bands, int size, const uint64_t *key, uint64_t id, double p) {                       \
        begin();                                                                                                        \
        const Dropout dropout{key, id, p};                                                                              \
        const int block = blockIdx.x;                                                                                   \
        if (block < grads) grad<256>(x, du, grad_a, 1, k, scale, 1.f, m, k, r, dropout, block);                         \
        else if (block < grads + adds) add_parts<256>(grad_b, grad_parts, bands, size, block - grads);                  \
        else up<256>(du, a, 1, k, static_cast<const T *>(nullptr), dx, 1.f, m, k, r, dropout, block - grads - adds);    \
    }
FOR_DTYPES(DEFINE)
