// Causal attention over packed sequences, with ALiBi and grouped queries, forward and backward.
// Scores and probabilities exist a tile at a time (FlashAttention-2, arXiv:2307.08691).
//
// Two families: `flash_*` on the tensor cores for f16 and bf16 with heads of 32, 64 or 128, and `rows_*`
// for anything else and for a cache of keys, which also are the plain version to compare with.
//
// Logarithms are to base 2: lse[head][row] = log2(sum of 2^(score * log2(e))).
#include "common.cuh"
#include "mma.cuh"
#include <type_traits>

// Where the heads of one kind lie in a row: first element of head 0, and from head to head.
struct Place {
    int offset, stride;
};

struct Layout {
    int row;      // elements of a row of the projection
    Place q, k, v;
    int heads, kv_heads, tokens;
    float scale;  // 1 / sqrt(head_dim)
    int window;   // keys that a query sees at the most, its own the last of them
};
TELL(LAYOUT, sizeof(Layout))

constexpr float LOG2E = 1.4426950408889634f;

// ---------------------------------------------------------------------------------- tensor cores

// 2^x; what is under 2^-126 becomes zero.
__device__ __forceinline__ float power(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// TILE rows of D elements to shared memory, rows of D + 8; rows from `valid` on become zeros.
constexpr int TILE = 64;
TELL(TILE, TILE)
template <int D, typename T> __device__ __forceinline__ void load_tile(T *to, const T *from, int64_t row, int valid) {
    constexpr int CHUNKS = D / 8, STEP = 128 / CHUNKS;
    const int r = threadIdx.x / CHUNKS, c = threadIdx.x % CHUNKS * 8;
    from += r * row + c, to += r * (D + 8) + c;
#pragma unroll
    for (int i = 0; i < TILE; i += STEP) send<16>(to + i * (D + 8), r + i < valid ? from + i * row : from - r * row, r + i < valid);
}
// Waits until all but the `behind` groups sent last are there, for every thread of the block.
template <int BEHIND> __device__ __forceinline__ void loaded() {
    landed<BEHIND>();
    __syncthreads();
}

// The 16 columns from k on of the warp's 16 rows.
template <int D, typename T> __device__ __forceinline__ void rows(uint32_t (&to)[4], const T *a, int k) {
    const int lane = threadIdx.x % 32;
    ldmatrix<false>(to, a + (lane % 16) * (D + 8) + k + lane / 16 * 8);
}

// acc[16 x TILE] += A[16 x D] B[TILE x D]^T; B is rows in shared memory, A too (already at the warp's rows) or kept in
// registers.
template <int D, typename T, typename A>
__device__ __forceinline__ void product(float (&acc)[TILE / 8][4], const A &a, const T *b) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < D; k += 16) {
        uint32_t fa[4];
        if constexpr (std::is_array_v<A>)
#pragma unroll
            for (int i = 0; i < 4; i++) fa[i] = a[k / 16][i];
        else rows<D>(fa, a, k);
#pragma unroll
        for (int n = 0; n < TILE / 8; n += 2) {
            uint32_t fb[4];
            ldmatrix<false>(fb, b + (n * 8 + lane % 8 + lane / 16 * 8) * (D + 8) + k + lane / 8 % 2 * 8);
            Mma<T>::run(acc[n], fa, fb[0], fb[1]);
            Mma<T>::run(acc[n + 1], fa, fb[2], fb[3]);
        }
    }
}

// acc[16 x D] += P[16 x TILE] B[TILE x D]; P in registers as a product left it, B rows in shared memory.
template <int D, typename T>
__device__ __forceinline__ void spread(float (&acc)[D / 8][4], const float (&p)[TILE / 8][4], const T *b) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < TILE / 8; k += 2) {
        const uint32_t fa[4] = {Mma<T>::pack(p[k][0], p[k][1]), Mma<T>::pack(p[k][2], p[k][3]),
                                Mma<T>::pack(p[k + 1][0], p[k + 1][1]), Mma<T>::pack(p[k + 1][2], p[k + 1][3])};
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            uint32_t fb[4];
            ldmatrix<true>(fb, b + (k * 8 + lane % 16) * (D + 8) + n * 8 + lane / 16 * 8);
            Mma<T>::run(acc[n], fa, fb[0], fb[1]);
            Mma<T>::run(acc[n + 1], fa, fb[2], fb[3]);
        }
    }
}

// The warp's 16 rows of `acc` times `by[row half]` to memory; rows from `valid` on are left alone. They go by way of 16
// rows of shared memory that no other warp reads, so that 16 bytes are written at a time.
template <int D, typename T>
__device__ __forceinline__ void put(T *to, int64_t row, T *by_way, const float (&acc)[D / 8][4], float by0, float by1, int valid) {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4 * 2;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        *reinterpret_cast<uint32_t *>(by_way + r * (D + 8) + n * 8 + c) = Mma<T>::pack(acc[n][0] * by0, acc[n][1] * by0);
        *reinterpret_cast<uint32_t *>(by_way + (r + 8) * (D + 8) + n * 8 + c) = Mma<T>::pack(acc[n][2] * by1, acc[n][3] * by1);
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * D / 8; i += 32) {
        const int r = i / (D / 8), c = i % (D / 8) * 8;
        if (r < valid) *reinterpret_cast<uint4 *>(to + r * row + c) = *reinterpret_cast<const uint4 *>(by_way + r * (D + 8) + c);
    }
}

// Blocks go head by head through the tiles, the longest work first, so that the SMs end together.
// A tile of 64 rows: (first row of its sequence, length of the sequence, first row of the tile within it).
// Tiles beyond the batch's have length 0.

// WINDOW: a query may see fewer keys than there are before it; otherwise nobody looks.
template <typename T, int D, bool WINDOW>
__device__ void flash_forward(const T *qkv, const int4 *tiles, const float *slopes, T *out, float *lse, Layout l) {
    constexpr int ROW = D + 8;
    extern __shared__ __align__(16) unsigned char memory[];
    T *const stages = reinterpret_cast<T *>(memory);
    const int4 tile = tiles[gridDim.y - 1 - blockIdx.y];
    if (tile.y == 0) return;
    const int head = blockIdx.x, kv = head * l.kv_heads / l.heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const T *base = qkv + int64_t(tile.x) * l.row;
    const float slope = slopes ? slopes[head] * LOG2E : 0.f, scale = l.scale * LOG2E;

    // Two stages of keys and values: one is multiplied while the other arrives. The queries come first, where the
    // second stage will be.
    auto fetch = [&](int j, int stage) {
        T *ks = stages + stage * 2 * TILE * ROW;
        load_tile<D>(ks, base + int64_t(j) * l.row + l.k.offset + kv * l.k.stride, l.row, tile.y - j);
        load_tile<D>(ks + TILE * ROW, base + int64_t(j) * l.row + l.v.offset + kv * l.v.stride, l.row, tile.y - j);
        sent();
    };
    T *const qs = stages + 2 * TILE * ROW;
    load_tile<D>(qs, base + int64_t(tile.z) * l.row + l.q.offset + head * l.q.stride, l.row, tile.y - tile.z);
    sent();
    const int first_key = WINDOW ? max(tile.z - l.window + 1, 0) / TILE * TILE : 0;
    fetch(first_key, 0);
    loaded<1>();
    uint32_t q[D / 16][4];
#pragma unroll
    for (int k = 0; k < D / 16; k++) rows<D>(q[k], qs + warp * 16 * ROW, k * 16);

    // With a window a row may see nothing of the first tile: its maximum must be a number all the same.
    const float lowest = WINDOW ? -1e30f : -INFINITY;
    float acc[D / 8][4] = {}, top[2] = {lowest, lowest}, sum[2] = {0, 0};
    const int i0 = tile.z + warp * 16 + lane / 4;
    for (int j0 = first_key, stage = 0; j0 <= tile.z; j0 += TILE, stage ^= 1) {
        loaded<0>(); // and everyone is done with the other stage
        if (j0 < tile.z) fetch(j0 + TILE, stage ^ 1);
        const T *ks = stages + stage * 2 * TILE * ROW, *vs = ks + TILE * ROW;
        float s[TILE / 8][4] = {};
        product<D>(s, q, ks);
        const int own = j0 + lane % 4 * 2 - i0; // j - i of the first
        const float old_top[2] = {top[0], top[1]};
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[n][e] = s[n][e] * scale + slope * float(own + n * 8 + e % 2 - e / 2 * 8);
                if (j0 == tile.z && own + n * 8 + e % 2 - e / 2 * 8 > 0) s[n][e] = -INFINITY;
                if (WINDOW && own + n * 8 + e % 2 - e / 2 * 8 <= -l.window) s[n][e] = -INFINITY;
                top[e / 2] = fmaxf(top[e / 2], s[n][e]);
            }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
            top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
            const float shrink = power(old_top[h] - top[h]); // 0 at first: the maximum is finite by then
            sum[h] *= shrink;
#pragma unroll
            for (int n = 0; n < D / 8; n++) acc[n][h * 2] *= shrink, acc[n][h * 2 + 1] *= shrink;
        }
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[n][e] = power(s[n][e] - top[e / 2]);
                sum[e / 2] += s[n][e];
            }
        spread<D>(acc, s, vs);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
        sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
        const int i = i0 + h * 8;
        if (lse && lane % 4 == 0 && i < tile.y) lse[int64_t(head) * l.tokens + tile.x + i] = top[h] + log2f(sum[h]);
    }
    __syncthreads();
    const int width = l.heads * D;
    put<D>(out + (int64_t(tile.x) + tile.z + warp * 16) * width + head * D, width, stages + warp * 16 * ROW, acc, 1.f / sum[0],
           1.f / sum[1], tile.y - tile.z - warp * 16);
}

// delta[head][row] = sum over the head of dout * out. Sixteen lanes a head's row.
template <typename T, int D>
__device__ void flash_delta(const T *out, const T *dout, float *delta, Layout l) {
    constexpr int LANES = 16, N = D / LANES;
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / LANES;
    const bool there = at < int64_t(l.tokens) * l.heads;
    float a[N] = {}, b[N] = {}, sum = 0;
    const int64_t first = at * D + threadIdx.x % LANES * N;
    if (there) load(a, out + first), load(b, dout + first);
#pragma unroll
    for (int j = 0; j < N; j++) sum += a[j] * b[j];
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (there && threadIdx.x % LANES == 0) delta[at % l.heads * l.tokens + at / l.heads] = sum;
}

// The gradient of the queries of a head's tile.
template <typename T, int D, bool WINDOW>
__device__ void flash_dq(const T *qkv, const int4 tile, const float *slopes, const T *dout, const float *lse,
                         const float *delta, T *grad, Layout l, int head) {
    constexpr int ROW = D + 8;
    extern __shared__ __align__(16) unsigned char memory[];
    T *const stages = reinterpret_cast<T *>(memory);
    const int kv = head * l.kv_heads / l.heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int valid = tile.y - tile.z, width = l.heads * D;
    const T *base = qkv + int64_t(tile.x) * l.row;
    const int64_t first = int64_t(tile.x) + tile.z;
    const float slope = slopes ? slopes[head] * LOG2E : 0.f, scale = l.scale * LOG2E;

    // As in flash_forward.
    auto fetch = [&](int j, int stage) {
        T *ks = stages + stage * 2 * TILE * ROW;
        load_tile<D>(ks, base + int64_t(j) * l.row + l.k.offset + kv * l.k.stride, l.row, tile.y - j);
        load_tile<D>(ks + TILE * ROW, base + int64_t(j) * l.row + l.v.offset + kv * l.v.stride, l.row, tile.y - j);
        sent();
    };
    T *const qs = stages + 2 * TILE * ROW, *const ds = qs + TILE * ROW;
    load_tile<D>(qs, base + int64_t(tile.z) * l.row + l.q.offset + head * l.q.stride, l.row, valid);
    load_tile<D>(ds, dout + first * width + head * D, width, valid);
    sent();
    const int first_key = WINDOW ? max(tile.z - l.window + 1, 0) / TILE * TILE : 0;
    fetch(first_key, 0);
    float acc[D / 8][4] = {}, log[2], del[2];
    const int i0 = tile.z + warp * 16 + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int i = i0 + h * 8;
        log[h] = i < tile.y ? lse[int64_t(head) * l.tokens + tile.x + i] : 0.f;
        del[h] = i < tile.y ? delta[int64_t(head) * l.tokens + tile.x + i] : 0.f;
    }
    loaded<1>();
    uint32_t q[D / 16][4], d[D / 16][4];
#pragma unroll
    for (int k = 0; k < D / 16; k++) rows<D>(q[k], qs + warp * 16 * ROW, k * 16), rows<D>(d[k], ds + warp * 16 * ROW, k * 16);
    for (int j0 = first_key, stage = 0; j0 <= tile.z; j0 += TILE, stage ^= 1) {
        loaded<0>();
        if (j0 < tile.z) fetch(j0 + TILE, stage ^ 1);
        const T *ks = stages + stage * 2 * TILE * ROW, *vs = ks + TILE * ROW;
        float s[TILE / 8][4] = {}, dp[TILE / 8][4] = {};
        product<D>(s, q, ks);
        product<D>(dp, d, vs);
        const int own = j0 + lane % 4 * 2 - i0; // j - i of the first
        const float from[2] = {slope * float(own) - log[0], slope * float(own - 8) - log[1]};
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float x = s[n][e] * scale + (from[e / 2] + slope * float(n * 8 + e % 2));
                if (j0 == tile.z && own + n * 8 + e % 2 - e / 2 * 8 > 0) x = -INFINITY;
                if (WINDOW && own + n * 8 + e % 2 - e / 2 * 8 <= -l.window) x = -INFINITY;
                s[n][e] = power(x) * (dp[n][e] - del[e / 2]);
            }
        spread<D>(acc, s, ks);
    }
    __syncthreads();
    put<D>(grad + (first + warp * 16) * l.row + l.q.offset + head * l.q.stride, l.row, stages + warp * 16 * ROW, acc, l.scale,
           l.scale, valid - warp * 16);
}

// The gradients of the keys and values of a tile of 64 rows, over all queries that see them.
template <typename T, int D, bool WINDOW>
__device__ void flash_dkv(const T *qkv, const int4 tile, const float *slopes, const T *dout, const float *lse,
                          const float *delta, T *grad, Layout l, int kv) {
    constexpr int ROW = D + 8;
    extern __shared__ __align__(16) unsigned char memory[];
    T *ks = reinterpret_cast<T *>(memory), *vs = ks + TILE * ROW, *const stages = vs + TILE * ROW;
    __shared__ __align__(8) float all_logs[2][TILE], all_deltas[2][TILE];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = l.heads / l.kv_heads;
    const int valid = tile.y - tile.z, width = l.heads * D;
    const T *base = qkv + int64_t(tile.x) * l.row;
    const float scale = l.scale * LOG2E;

    load_tile<D>(ks, base + int64_t(tile.z) * l.row + l.k.offset + kv * l.k.stride, l.row, valid);
    load_tile<D>(vs, base + int64_t(tile.z) * l.row + l.v.offset + kv * l.v.stride, l.row, valid);
    // Steps go over the heads of the group and, within one, over the queries from this tile on. Beyond the last query all
    // is zeros: they add nothing.
    const int seen_by = WINDOW && l.window < valid ? min(valid, l.window + TILE - 1) : valid;
    const int per_head = (seen_by + TILE - 1) / TILE, steps = per_head * group;
    auto fetch = [&](int step) {
        const int head = kv * group + step / per_head, i = step % per_head * TILE, stage = step % 2;
        T *qs = stages + stage * 2 * TILE * ROW;
        load_tile<D>(qs, base + int64_t(tile.z + i) * l.row + l.q.offset + head * l.q.stride, l.row, valid - i);
        load_tile<D>(qs + TILE * ROW, dout + (int64_t(tile.x) + tile.z + i) * width + head * D, width, valid - i);
        const int q = threadIdx.x % TILE;
        const bool there = i + q < valid;
        const int64_t at = int64_t(head) * l.tokens + tile.x + tile.z + (there ? i + q : 0);
        if (threadIdx.x < TILE) send<4>(all_logs[stage] + q, lse + at, there);
        else send<4>(all_deltas[stage] + q, delta + at, there);
        sent();
    };
    fetch(0);
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    for (int step = 0; step < steps; step++) {
        loaded<0>();
        if (step + 1 < steps) fetch(step + 1);
        const int i0 = step % per_head * TILE, stage = step % 2;
        const float slope = slopes ? slopes[kv * group + step / per_head] * LOG2E : 0.f;
        const T *qs = stages + stage * 2 * TILE * ROW, *ds = qs + TILE * ROW;
        float s[TILE / 8][4] = {}, dp[TILE / 8][4] = {};
        product<D>(s, ks + warp * 16 * ROW, qs);
        product<D>(dp, vs + warp * 16 * ROW, ds);
        const int own = warp * 16 + lane / 4 - i0 - lane % 4 * 2; // j - i of the first
        const float from = slope * float(own);
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
            const int at = n * 8 + lane % 4 * 2;
            const float2 log = *reinterpret_cast<const float2 *>(all_logs[stage] + at);
            const float2 del = *reinterpret_cast<const float2 *>(all_deltas[stage] + at);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int further = e / 2 * 8 - n * 8 - e % 2;
                float x = s[n][e] * scale + (from + slope * float(further) - (e % 2 ? log.y : log.x));
                if (i0 == 0 && own + further > 0) x = -INFINITY;
                if (WINDOW && own + further <= -l.window) x = -INFINITY;
                s[n][e] = power(x);
                dp[n][e] = s[n][e] * (dp[n][e] - (e % 2 ? del.y : del.x));
            }
        }
        spread<D>(dv, s, ds);
        spread<D>(dk, dp, qs);
    }
    T *to = grad + (int64_t(tile.x) + tile.z + warp * 16) * l.row;
    put<D>(to + l.k.offset + kv * l.k.stride, l.row, ks + warp * 16 * ROW, dk, l.scale, l.scale, valid - warp * 16);
    put<D>(to + l.v.offset + kv * l.v.stride, l.row, vs + warp * 16 * ROW, dv, 1.f, 1.f, valid - warp * 16);
}

#define DEFINE_DELTA(NAME, T, D)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                                                     \
        flash_delta_##NAME##_##D(const T *out, const T *dout, float *delta, Layout l) {                                   \
        begin();                                                                                                          \
        flash_delta<T, D>(out, dout, delta, l);                                                                           \
    }
#define DEFINE(KIND, WINDOW, NAME, T, D)                                                                                  \
    extern "C" __global__ void __launch_bounds__(128, D == 128 ? 2 : 3)                                                   \
        KIND##_##NAME##_##D(const T *qkv, const int4 *tiles, const float *slopes, T *out, float *lse, Layout l) {         \
        begin();                                                                                                          \
        flash_forward<T, D, WINDOW>(qkv, tiles, slopes, out, lse, l);                                                     \
    }                                                                                                                     \
    /* The gradients of keys and values, and of queries, neither of which keeps the card busy: blocks of both, those     \
       with the longest work first. x: the kv heads, then the heads. */                                                  \
    extern "C" __global__ void __launch_bounds__(128, D == 128 ? 2 : 3)                                                   \
        KIND##_backward_##NAME##_##D(const T *qkv, const int4 *tiles, const float *slopes, const T *dout,                 \
                                     const float *lse, const float *delta, T *grad, Layout l) {                           \
        begin();                                                                                                          \
        const int head = int(blockIdx.x) - l.kv_heads;                                                                    \
        const int4 tile = tiles[head < 0 ? blockIdx.y : gridDim.y - 1 - blockIdx.y];                                      \
        if (tile.y == 0) return;                                                                                          \
        if (head < 0) flash_dkv<T, D, WINDOW>(qkv, tile, slopes, dout, lse, delta, grad, l, blockIdx.x);                  \
        else flash_dq<T, D, WINDOW>(qkv, tile, slopes, dout, lse, delta, grad, l, head);                                  \
    }
#define DEFINE_ALL(NAME, T, D)                                                                                            \
    DEFINE_DELTA(NAME, T, D) DEFINE(flash, false, NAME, T, D) DEFINE(flash_window, true, NAME, T, D)
DEFINE_ALL(f16, f16, 32) DEFINE_ALL(f16, f16, 64) DEFINE_ALL(f16, f16, 128)
DEFINE_ALL(bf16, bf16, 32) DEFINE_ALL(bf16, bf16, 64) DEFINE_ALL(bf16, bf16, 128)
#undef DEFINE

// ---------------------------------------------------------------------------------- row by row

// Eight lanes share a vector of d <= 256 elements: lane c of them has elements 64 t + 8 c + (0..8).
constexpr int MAX_CHUNKS = 4;
using Part = float[MAX_CHUNKS][8];

template <typename T> __device__ __forceinline__ void read(Part &to, const T *from, int d, int c) {
#pragma unroll
    for (int t = 0; t < MAX_CHUNKS; t++) {
        const int at = t * 64 + c * 8;
        if (d % 8 == 0 && at < d) load(to[t], from + at);
        else
#pragma unroll
            for (int j = 0; j < 8; j++) to[t][j] = at + j < d ? to_f32(from[at + j]) : 0.f;
    }
}

__device__ __forceinline__ float dot(const Part &a, const Part &b) {
    float sum = 0;
#pragma unroll
    for (int t = 0; t < MAX_CHUNKS; t++)
#pragma unroll
        for (int j = 0; j < 8; j++) sum += a[t][j] * b[t][j];
#pragma unroll
    for (int step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
}

__device__ __forceinline__ void add(Part &to, const Part &x, float by) {
#pragma unroll
    for (int t = 0; t < MAX_CHUNKS; t++)
#pragma unroll
        for (int j = 0; j < 8; j++) to[t][j] += by * x[t][j];
}

// The sum of what the 16 groups of a block hold, written by the first `d` threads.
template <typename T> __device__ void reduce_and_write(const Part &x, T *to, int d, float by) {
    __shared__ float part[16][256];
    const int group = threadIdx.x / 8, c = threadIdx.x % 8;
    __syncthreads();
#pragma unroll
    for (int t = 0; t < MAX_CHUNKS; t++)
#pragma unroll
        for (int j = 0; j < 8; j++) part[group][t * 64 + c * 8 + j] = x[t][j];
    __syncthreads();
    for (int i = threadIdx.x; i < d; i += 128) {
        float sum = 0;
        for (int g = 0; g < 16; g++) sum += part[g][i];
        to[i] = from_f32<T>(sum * by);
    }
}

// Of keys (row of the first, number), those that a query sees: the last ones.
__device__ __forceinline__ int2 seen(int2 keys, int window) {
    const int hidden = max(keys.y - window, 0);
    return make_int2(keys.x + hidden, keys.y - hidden);
}

// One block of 128 a (row, head). keys[row] = (row of the first key, number of keys): the last one is the
// row itself. Keys and values are rows of `k_row` elements: the projection's own, or a cache's.
template <typename T>
__device__ void rows_forward(const T *qkv, const T *k, const T *v, int64_t k_row, Place kp, Place vp, const int2 *keys,
                             const float *slopes, T *out, float *lse, Layout l, int d) {
    const int64_t row = blockIdx.x;
    const int head = blockIdx.y, kv = head * l.kv_heads / l.heads, group = threadIdx.x / 8, c = threadIdx.x % 8;
    const int2 range = seen(keys[row], l.window);
    const float slope = slopes ? slopes[head] * LOG2E : 0.f, scale = l.scale * LOG2E;
    k += kp.offset + kv * kp.stride, v += vp.offset + kv * vp.stride;
    Part q, x, acc = {};
    read(q, qkv + row * l.row + l.q.offset + head * l.q.stride, d, c);
    float top = -INFINITY, sum = 0;
    // All groups go round equally often: they shuffle together.
    for (int j0 = 0; j0 < range.y; j0 += 16) {
        const int j = j0 + group, at = min(j, range.y - 1);
        read(x, k + (int64_t(range.x) + at) * k_row, d, c);
        float s = dot(q, x) * scale + slope * float(at - (range.y - 1));
        if (j >= range.y) s = -INFINITY;
        const float new_top = fmaxf(top, s);
        const float shrink = new_top == -INFINITY ? 1.f : exp2f(top - new_top), p = j < range.y ? exp2f(s - new_top) : 0.f;
        read(x, v + (int64_t(range.x) + at) * k_row, d, c);
#pragma unroll
        for (int t = 0; t < MAX_CHUNKS; t++)
#pragma unroll
            for (int e = 0; e < 8; e++) acc[t][e] = acc[t][e] * shrink + p * x[t][e];
        sum = sum * shrink + p, top = new_top;
    }
    __shared__ float tops[16], sums[16];
    if (c == 0) tops[group] = top, sums[group] = sum;
    __syncthreads();
    float all = -INFINITY, total = 0;
    for (int g = 0; g < 16; g++) all = fmaxf(all, tops[g]);
    for (int g = 0; g < 16; g++) total += tops[g] == -INFINITY ? 0.f : sums[g] * exp2f(tops[g] - all);
    const float by = top == -INFINITY ? 0.f : exp2f(top - all);
    Part scaled = {};
    add(scaled, acc, by);
    reduce_and_write(scaled, out + (row * l.heads + head) * d, d, 1.f / total);
    if (lse && threadIdx.x == 0) lse[int64_t(head) * l.tokens + row] = all + log2f(total);
}

template <typename T>
__device__ void rows_dq(const T *qkv, const int2 *keys, const float *slopes, const T *out, const T *dout, const float *lse,
                        float *delta, T *grad, Layout l, int d) {
    const int64_t row = blockIdx.x;
    const int head = blockIdx.y, kv = head * l.kv_heads / l.heads, group = threadIdx.x / 8, c = threadIdx.x % 8;
    const int2 range = seen(keys[row], l.window);
    const float slope = slopes ? slopes[head] * LOG2E : 0.f, scale = l.scale * LOG2E;
    Part q, dy, x, acc = {};
    read(q, out + (row * l.heads + head) * d, d, c), read(dy, dout + (row * l.heads + head) * d, d, c);
    const float del = dot(q, dy), log = lse[int64_t(head) * l.tokens + row];
    if (threadIdx.x == 0) delta[int64_t(head) * l.tokens + row] = del;
    read(q, qkv + row * l.row + l.q.offset + head * l.q.stride, d, c);
    for (int j0 = 0; j0 < range.y; j0 += 16) {
        const int j = j0 + group, at = min(j, range.y - 1);
        const T *from = qkv + (int64_t(range.x) + at) * l.row;
        read(x, from + l.v.offset + kv * l.v.stride, d, c);
        const float dp = dot(dy, x);
        read(x, from + l.k.offset + kv * l.k.stride, d, c);
        const float p = exp2f(dot(q, x) * scale + slope * float(at - (range.y - 1)) - log);
        add(acc, x, j < range.y ? p * (dp - del) : 0.f);
    }
    reduce_and_write(acc, grad + row * l.row + l.q.offset + head * l.q.stride, d, l.scale);
}

// One block a (row, kv head); after[row] = number of rows from this one to the end of its sequence.
template <typename T>
__device__ void rows_dkv(const T *qkv, const int *after, const float *slopes, const T *dout, const float *lse,
                         const float *delta, T *grad, Layout l, int d) {
    const int64_t row = blockIdx.x;
    const int kv = blockIdx.y, heads = l.heads / l.kv_heads, group = threadIdx.x / 8, c = threadIdx.x % 8;
    const int count = min(after[row], l.window);
    const float scale = l.scale * LOG2E;
    Part k, v, q, dy, dk = {}, dv = {};
    read(k, qkv + row * l.row + l.k.offset + kv * l.k.stride, d, c);
    read(v, qkv + row * l.row + l.v.offset + kv * l.v.stride, d, c);
    for (int head = kv * heads; head < (kv + 1) * heads; head++) {
        const float slope = slopes ? slopes[head] * LOG2E : 0.f;
        for (int i0 = 0; i0 < count; i0 += 16) {
            const int i = min(i0 + group, count - 1);
            const int64_t at = row + i;
            read(q, qkv + at * l.row + l.q.offset + head * l.q.stride, d, c);
            read(dy, dout + (at * l.heads + head) * d, d, c);
            const float s = dot(q, k) * scale - slope * float(i), dp = dot(dy, v);
            const float p = i0 + group < count ? exp2f(s - lse[int64_t(head) * l.tokens + at]) : 0.f;
            add(dv, dy, p);
            add(dk, q, p * (dp - delta[int64_t(head) * l.tokens + at]));
        }
    }
    reduce_and_write(dk, grad + row * l.row + l.k.offset + kv * l.k.stride, d, l.scale);
    reduce_and_write(dv, grad + row * l.row + l.v.offset + kv * l.v.stride, d, 1.f);
}

// One query a sequence over a cache, as decoding has it. SPLITS blocks of 256, a cluster where there are such, share a
// (sequence, head); D / 8 lanes, a group, share a key. The first ROUNDS keys and values of each group are all under way
// before the previous kernel has ended.
#if __CUDA_ARCH__ >= 900
constexpr int SPLITS = 8;
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// To where `own`, a place in shared memory, is in another block of the cluster.
__device__ __forceinline__ void put_in(int block, float *own, float x) {
    uint32_t at;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(own)), "r"(block));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory");
}
#define CLUSTER __cluster_dims__(1, 1, SPLITS)
#else
constexpr int SPLITS = 1;
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() { __syncthreads(); }
__device__ __forceinline__ void put_in(int, float *own, float x) { *own = x; }
#define CLUSTER
#endif

// What sums under the greatest score `own` count for under the greatest of all.
__device__ __forceinline__ float weight(float own, float all) { return own == -INFINITY ? 0.f : exp2f(own - all); }

template <typename T, int D>
__device__ void decode(const T *qkv, T *k, T *v, int64_t k_row, const int2 *keys, const float *slopes, T *out, Layout l) {
    constexpr int LANES = D / 8, GROUPS = 256 / LANES, ROUNDS = 4, STEP = GROUPS * SPLITS, OWN = D / SPLITS;
    __shared__ float part[8][D], tops[8], sums[8];
    __shared__ float of_split[SPLITS][OWN], split_tops[SPLITS], split_sums[SPLITS];
    const int64_t row = blockIdx.x;
    const int head = blockIdx.y, kv = head * l.kv_heads / l.heads, c = threadIdx.x % LANES * 8, split = blockIdx.z;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = split * GROUPS + threadIdx.x / LANES;
    let_next_start();
    cluster_arrive();
    const int2 range = keys[row];
    const float slope = slopes ? slopes[head] * LOG2E : 0.f, scale = l.scale * LOG2E;
    const T *own = qkv + row * l.row, *own_k = own + l.k.offset + kv * l.k.stride, *own_v = own + l.v.offset + kv * l.v.stride;
    k += int64_t(range.x) * k_row + kv * D, v += int64_t(range.x) * k_row + kv * D;
    const int last = range.y - 1;
    using Eight = Vec<T, sizeof(T) == 4 ? 4 : 8>;
    constexpr int WORDS = 8 * sizeof(T) / 16;
    Eight ks[ROUNDS][WORDS], vs[ROUNDS][WORDS];
    auto read = [&](Eight (&to)[WORDS], const T *from) {
#pragma unroll
        for (int w = 0; w < WORDS; w++) to[w] = reinterpret_cast<const Eight *>(from + c)[w];
    };
    // What the cache holds does not depend on the previous kernel; the newest key and value do: they are in the
    // projection, not yet in the cache.
#pragma unroll
    for (int t = 0; t < ROUNDS; t++)
        if (const int j = first + t * STEP; j < last) read(ks[t], k + j * k_row), read(vs[t], v + j * k_row);
    wait_for_previous();
    float q[8];
    load(q, own + l.q.offset + head * l.q.stride + c);
    float top = -INFINITY, sum = 0, acc[8] = {};
    auto take = [&](const Eight (&key)[WORDS], const Eight (&value)[WORDS], int j) {
        float s = 0;
#pragma unroll
        for (int e = 0; e < 8; e++) s += q[e] * to_f32(key[e / (8 / WORDS)].v[e % (8 / WORDS)]);
#pragma unroll
        for (int step = 1; step < LANES; step *= 2) s += __shfl_xor_sync(~0u, s, step);
        s = j <= last && last - j < l.window ? s * scale + slope * float(j - last) : -INFINITY;
        const float new_top = fmaxf(top, s), shrink = weight(top, new_top), p = weight(s, new_top);
        sum = sum * shrink + p, top = new_top;
#pragma unroll
        for (int e = 0; e < 8; e++) acc[e] = acc[e] * shrink + p * to_f32(value[e / (8 / WORDS)].v[e % (8 / WORDS)]);
    };
    // All groups of a warp go round equally often: they shuffle together.
#pragma unroll
    for (int t = 0; t < ROUNDS; t++) {
        const int j = first + t * STEP;
        if (split * GROUPS + t * STEP > last) break; // no group has any
        if (j == last) {
            read(ks[t], own_k), read(vs[t], own_v);
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                reinterpret_cast<Eight *>(k + last * k_row + c)[w] = ks[t][w];
                reinterpret_cast<Eight *>(v + last * k_row + c)[w] = vs[t][w];
            }
        }
        if (j > last)
#pragma unroll
            for (int w = 0; w < WORDS; w++) vs[t][w] = {}; // zero times what happens to be there might not be zero
        take(ks[t], vs[t], j);
    }
    for (int j = first + ROUNDS * STEP; j - threadIdx.x / LANES <= last; j += STEP) {
        const bool newest = j == last;
        const int at = min(j, max(last - 1, 0));
        read(ks[0], newest ? own_k : k + at * k_row), read(vs[0], newest ? own_v : v + at * k_row);
        if (newest)
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                reinterpret_cast<Eight *>(k + last * k_row + c)[w] = ks[0][w];
                reinterpret_cast<Eight *>(v + last * k_row + c)[w] = vs[0][w];
            }
        take(ks[0], vs[0], j);
    }
    // Over the groups of a warp, the warps of a block, the blocks of a cluster, each of which makes OWN elements.
#pragma unroll
    for (int step = LANES; step < 32; step *= 2) {
        const float other = __shfl_xor_sync(~0u, top, step), all = fmaxf(top, other);
        const float by = weight(top, all);
        top = all, sum *= by;
        sum += __shfl_xor_sync(~0u, sum, step);
#pragma unroll
        for (int e = 0; e < 8; e++) acc[e] *= by, acc[e] += __shfl_xor_sync(~0u, acc[e], step);
    }
    if (lane < LANES)
#pragma unroll
        for (int e = 0; e < 8; e++) part[warp][c + e] = acc[e];
    if (lane == 0) tops[warp] = top, sums[warp] = sum;
    __syncthreads();
    cluster_wait(); // the other blocks have begun: their shared memory is there
    if (threadIdx.x < D) {
        float all = -INFINITY, s = 0, x = 0;
#pragma unroll
        for (int w = 0; w < 8; w++) all = fmaxf(all, tops[w]);
#pragma unroll
        for (int w = 0; w < 8; w++) s += sums[w] * weight(tops[w], all), x += part[w][threadIdx.x] * weight(tops[w], all);
        const int to = threadIdx.x / OWN;
        put_in(to, &of_split[split][threadIdx.x % OWN], x);
        if (threadIdx.x % OWN == 0) put_in(to, &split_tops[split], all), put_in(to, &split_sums[split], s);
    }
    cluster_arrive();
    cluster_wait();
    if (threadIdx.x < OWN) {
        float all = -INFINITY, s = 0, x = 0;
#pragma unroll
        for (int i = 0; i < SPLITS; i++) all = fmaxf(all, split_tops[i]);
#pragma unroll
        for (int i = 0; i < SPLITS; i++)
            s += split_sums[i] * weight(split_tops[i], all), x += of_split[i][threadIdx.x] * weight(split_tops[i], all);
        out[(row * l.heads + head) * D + split * OWN + threadIdx.x] = from_f32<T>(x / s);
    }
}

#define DEFINE_D(NAME, T, D)                                                                                             \
    extern "C" __global__ void CLUSTER __launch_bounds__(256)                                                            \
        decode_attention_##NAME##_##D(const T *qkv, T *k, T *v, int64_t k_row, const int2 *keys, const float *slopes,    \
                                      T *out, Layout l) {                                                                \
        decode<T, D>(qkv, k, v, k_row, keys, slopes, out, l);                                                            \
    }
#define DEFINE(NAME, T) DEFINE_D(NAME, T, 32) DEFINE_D(NAME, T, 64) DEFINE_D(NAME, T, 128)
FOR_DTYPES(DEFINE)
#undef DEFINE

// Keys and values of new rows to a cache [sequences, capacity, width]: places[row] = row of the cache.
template <typename T>
__device__ void append(const T *qkv, const int *places, T *k, T *v, Layout l, int d) {
    const int64_t row = blockIdx.x, to = places[row];
    const int width = l.kv_heads * d;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const int head = i / d, e = i % d;
        k[to * width + i] = qkv[row * l.row + l.k.offset + head * l.k.stride + e];
        v[to * width + i] = qkv[row * l.row + l.v.offset + head * l.v.stride + e];
    }
}

#define DEFINE(NAME, T)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128)                                                                    \
        rows_attention_##NAME(const T *qkv, T *k, T *v, int64_t k_row, Place kp, Place vp, const int2 *keys,             \
                              const float *slopes, T *out, float *lse, Layout l, int d) {                    \
        begin();                                                                                             \
        rows_forward(qkv, k, v, k_row, kp, vp, keys, slopes, out, lse, l, d);                                            \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(128)                                                                    \
        rows_attention_dq_##NAME(const T *qkv, const int2 *keys, const float *slopes, const T *out, const T *dout,       \
                                 const float *lse, float *delta, T *grad, Layout l, int d) {                             \
        begin();                                                                                                         \
        rows_dq(qkv, keys, slopes, out, dout, lse, delta, grad, l, d);                                                   \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(128)                                                                    \
        rows_attention_dkv_##NAME(const T *qkv, const int *after, const float *slopes, const T *dout, const float *lse,  \
                                  const float *delta, T *grad, Layout l, int d) {                                        \
        begin();                                                                                                         \
        rows_dkv(qkv, after, slopes, dout, lse, delta, grad, l, d);                                                      \
    }                                                                                                                    \
    extern "C" __global__ void append_##NAME(const T *qkv, const int *places, T *k, T *v, Layout l, int d) {             \
        begin();                                                                                                         \
        append(qkv, places, k, v, l, d);                                                                                 \
    }
FOR_DTYPES(DEFINE)
