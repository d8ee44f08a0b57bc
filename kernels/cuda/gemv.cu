// Products with one to eight rows, as decoding makes them: the weight is read once, so the bytes of the
// weight are the time. A warp takes a row of the weight; lanes go along it.
//
// y[m, n] = x W^T + bias + alpha u B^T + c, then gelu when asked. u [m, r] f32 is A x of a LoRA adapter, B
// [n, r] f32 its other half; any of bias, u, c may be null. c is y's dtype.
#include "common.cuh"
#include "gelu.cuh"
#include "mma.cuh"
#include "quantized.cuh"

template <typename T, typename Out> struct Epilogue {
    const T *bias;
    const float *u, *b;
    float alpha;
    int rank;
    const Out *c;
    int gelu;
    // What is added to the sum of row `m` of y, column `n`; `ld` numbers from row to row.
    __device__ __forceinline__ float beside(const float *u, int m, int n, int64_t ld) const {
        float own = bias ? to_f32(bias[n]) : 0.f;
        if (u) {
            float lora = 0;
            for (int r = 0; r < rank; r++) lora += u[m * rank + r] * b[int64_t(n) * rank + r];
            own += alpha * lora;
        }
        return c ? own + to_f32(c[m * ld + n]) : own;
    }
    __device__ __forceinline__ Out done(float y) const { return from_f32<Out>(gelu ? gelu_of(y) : y); }
};

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
    if (lane < m && row < n) y[int64_t(lane) * n + row] = e.done(own + e.beside(e.u, lane, row, n));
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

// ---- The same on the tensor cores, for 16-bit activations.
//
// An mma's A is 16 rows of the weight by 16 along k, its B up to 8 rows of x. A byte holds two neighbours along k, which
// is what a register of A holds, so a byte is one look-up in a table of 256 pairs; the table is there once a lane, so
// that look-ups never meet in a bank. The sum along k may be taken in any order as long as x is read in the same: lane
// t of a row's four takes the elements 16 t .. 16 t + 15 of a block of 64, two of them an mma and register.

// Shared memory: the table (32 KiB), x [m][k + 8], the warps' sums [2][WARPS][16][m], what is added to them
// [tiles of the block][16][m], A [rank][k] where it fits.
constexpr int TABLE = 256 * 32;

// Warps of a block; blocks of 64 weights that a warp has under way at a time.
constexpr int WARPS = 16, FLIGHT = 2;

// Codes and maxima of blocks b, b + WARPS, ... of rows `row` and `row + 8` (of the last row, where there are fewer).
template <bool NESTED> struct Flight {
    uint2 q[FLIGHT][2];
    float top[FLIGHT][2]; // as in Piece
    uint8_t c[FLIGHT][2];
    __device__ __forceinline__ void fetch(const uint8_t *w, const Absmax &a, int row, int n, int k, int b, int blocks, int t) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int own = min(row + 8 * h, n - 1);
            const uint2 *from = reinterpret_cast<const uint2 *>(w + int64_t(own) * (k / 2)) + b * 4 + t;
            const uint32_t first = own * blocks + b;
#pragma unroll
            for (int f = 0; f < FLIGHT; f++) {
                if (b + WARPS * f >= blocks) break;
                q[f][h] = __ldcs(from + 4 * WARPS * f);
                const uint32_t block = first + WARPS * f >> a.log_block - 6;
                if constexpr (NESTED) {
                    c[f][h] = static_cast<const uint8_t *>(a.at)[block];
                    top[f][h] = a.absmax2[block >> a.log_block2];
                } else {
                    top[f][h] = static_cast<const float *>(a.at)[block];
                }
            }
        }
    }
};

// n rows of the weight in tiles of 16; a block of threads takes a tile after another, the next one's weights on their
// way while it multiplies. Its warps share k, a block of 64 each in turn. k is a multiple of 64, and so is a block of
// the quantization; there are less than 2^32 of those. What depends on nothing (weights, table, A) is fetched before
// the previous kernel has ended. With A, the [rank, k] half of an adapter, each block makes u for itself.
template <bool NESTED, typename T>
__device__ void gemv_4bit_mma(const T *x, const uint8_t *w, const Absmax &a, const Code &code, T *y, int m, int n, int k,
                              const Epilogue<T, T> &e, const float *lora_a) {
    extern __shared__ __align__(16) unsigned char memory[];
    const int stride = k + 8, blocks = k / 64, tiles = (n + 15) / 16, own_tiles = (tiles + gridDim.x - 1) / gridDim.x;
    uint32_t *table = reinterpret_cast<uint32_t *>(memory);
    T *xs = reinterpret_cast<T *>(table + TABLE);
    float *sums = reinterpret_cast<float *>(xs + m * stride), *added = sums + 2 * WARPS * 16 * m, *as = added + own_tiles * 16 * m;
    __shared__ float table1[16], table2[256], us[64];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    let_next_start();
    int tile = blockIdx.x, b0 = 0;
    Flight<NESTED> flight;
    flight.fetch(w, a, tile * 16 + g, n, k, warp, blocks, t);
    if (lora_a)
        for (int i = threadIdx.x * 4; i < e.rank * k; i += 32 * WARPS * 4)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(as + i)), "l"(lora_a + i));
    if (NESTED && threadIdx.x < 256) table2[threadIdx.x] = a.code2[threadIdx.x];
    // By way of shared memory: an index that is not constant into an argument is a chain of comparisons.
    if (threadIdx.x < 16) table1[threadIdx.x] = code.v[threadIdx.x];
    __syncthreads();
#pragma unroll 4
    for (int b = warp; b < 256; b += WARPS) {
        // The first element of a byte is in its high half.
        Vec<T, 2> pair;
        pair.v[0] = from_f32<T>(table1[b >> 4]), pair.v[1] = from_f32<T>(table1[b & 15]);
        table[b * 32 + lane] = reinterpret_cast<const uint32_t &>(pair);
    }
    wait_for_previous();
    for (int r = 0; r < m; r++)
        for (int i = threadIdx.x * 8; i < k; i += 32 * WARPS * 8)
            *reinterpret_cast<Vec<T, 8> *>(xs + r * stride + i) = *reinterpret_cast<const Vec<T, 8> *>(x + int64_t(r) * k + i);
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    if (lora_a) {
        for (int i = warp; i < m * e.rank; i += WARPS) {
            const int row = i / e.rank, r = i % e.rank;
            float sum = 0;
#pragma unroll 4
            for (int j = lane * 4; j < k; j += 128) {
                float v[4], p[4];
                load(v, as + r * k + j), load(p, xs + row * stride + j);
#pragma unroll
                for (int q = 0; q < 4; q++) sum += v[q] * p[q];
            }
            sum = warp_sum(sum);
            if (lane == 0) us[i] = sum;
        }
        __syncthreads();
    }
    // What the sums of all tiles get, at once, so that no tile waits for it.
    for (int i = threadIdx.x; i < own_tiles * 16 * m; i += 32 * WARPS) {
        const int row = (blockIdx.x + i / (16 * m) * gridDim.x) * 16 + i / m % 16;
        if (row < n) added[i] = e.beside(lora_a ? us : e.u, i % m, row, n);
    }
    // The table's word for the byte at `shift` of a word of codes: its 128 bytes a byte, the lane's 4 of them.
    const char *own_table = reinterpret_cast<const char *>(table);
    const uint32_t own_word = lane * 4;
    auto table_at = [&](uint32_t word, int shift) {
        const uint32_t place = (shift > 7 ? word >> (shift - 7) : word << (7 - shift)) & (255u << 7) | own_word;
        return *reinterpret_cast<const uint32_t *>(own_table + place);
    };
    // Columns of B beyond m are never written out: they may read row 0.
    const T *own = xs + (g < m ? g : 0) * stride + t * 16;
    float total[4] = {};
    for (int number = 0; tile < tiles;) {
        const int now = tile, from_block = b0 + warp;
        const bool ends = b0 + WARPS * FLIGHT >= blocks;
        if (ends) tile += gridDim.x, b0 = 0;
        else b0 += WARPS * FLIGHT;
        Flight<NESTED> next;
        if (tile < tiles) next.fetch(w, a, tile * 16 + g, n, k, b0 + warp, blocks, t);
#pragma unroll
        for (int f = 0; f < FLIGHT; f++) {
            const int b = from_block + WARPS * f;
            if (b >= blocks) break;
            float part[4] = {};
            const uint4 *from = reinterpret_cast<const uint4 *>(own + b * 64);
            const uint4 lo = from[0], hi = from[1];
            const uint32_t xv[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
            for (int s = 0; s < 4; s++) {
                uint32_t fa[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const uint32_t word = s < 2 ? flight.q[f][i % 2].x : flight.q[f][i % 2].y;
                    fa[i] = table_at(word, (s % 2 * 2 + i / 2) * 8);
                }
                Mma<T>::run(part, fa, xv[2 * s], xv[2 * s + 1]);
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float top = NESTED ? table2[flight.c[f][h]] * flight.top[f][h] + a.offset : flight.top[f][h];
                total[2 * h] += top * part[2 * h], total[2 * h + 1] += top * part[2 * h + 1];
            }
        }
        flight = next;
        if (!ends) continue;
        // total: rows g and g + 8, columns 2 t and 2 t + 1. Two places in turn: one is read while the other is written.
        float *to = sums + number % 2 * (WARPS * 16 * m);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (2 * t + i % 2 < m) to[(warp * 16 + g + i / 2 * 8) * m + 2 * t + i % 2] = total[i];
            total[i] = 0;
        }
        __syncthreads();
        const int row = now * 16 + threadIdx.x / m;
        if (threadIdx.x < 16 * m && row < n) {
            float sum = added[number * 16 * m + threadIdx.x];
#pragma unroll
            for (int v = 0; v < WARPS; v++) sum += to[v * 16 * m + threadIdx.x];
            y[int64_t(threadIdx.x % m) * n + row] = e.done(sum);
        }
        number++;
    }
}

#define DEFINE(NAME, T)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)                                                           \
        gemv_4bit_mma_##NAME(const T *x, const uint8_t *w, const void *absmax, const float *absmax2, const float *code2,  \
                             float offset, int log_block, int log_block2, const __grid_constant__ Code code, T *y, int m, int n, int k,           \
                             const T *bias, const float *u, const float *b, float alpha, int rank, const T *c, int gelu,  \
                             const float *lora_a) {                                                                       \
        const Absmax a{absmax, absmax2, code2, offset, log_block, log_block2};                                            \
        const Epilogue<T, T> e{bias, u, b, alpha, rank, c, gelu};                                                         \
        if (absmax2) gemv_4bit_mma<true>(x, w, a, code, y, m, n, k, e, lora_a);                                           \
        else gemv_4bit_mma<false>(x, w, a, code, y, m, n, k, e, lora_a);                                                  \
    }
DEFINE(f16, f16) DEFINE(bf16, bf16)
#undef DEFINE

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
