// Products with one to eight rows, as decoding makes them: the weight is read once, so the bytes of the
// weight are the time. A warp takes a row of the weight; lanes go along it.
//
// y[m, n] = x W^T + bias + alpha u B^T + c, then gelu when asked. u [m, r] f32 is A x of a LoRA adapter, B
// [n, r] f32 its other half; any of bias, u, c may be null. c is y's dtype.
#include "common.cuh"

template <typename T, typename Out> struct Epilogue {
    const T *bias;
    const float *u, *b;
    float alpha;
    int rank;
    const Out *c;
    int gelu;
};

__device__ __forceinline__ float gelu_of(float x) {
    const float e = __expf(2.f * fminf(fabsf(0.79788456f * x * (1.f + 0.044715f * x * x)), 10.f));
    return isnan(x) ? x : 0.5f * x * (1.f + copysignf(1.f - 2.f / (e + 1.f), x));
}

// Lane m writes row m.
template <typename T, typename Out, int M>
__device__ __forceinline__ void finish(float (&sum)[M], Out *y, int row, int m, int n, int64_t ld, const Epilogue<T, Out> &e) {
    const int lane = threadIdx.x % 32;
    float own = 0;
#pragma unroll
    for (int i = 0; i < M; i++) {
        const float s = warp_sum(sum[i]);
        if (lane == i) own = s;
    }
    if (lane >= m || row >= n) return;
    if (e.bias) own += to_f32(e.bias[row]);
    if (e.u) {
        float lora = 0;
        for (int r = 0; r < e.rank; r++) lora += e.u[lane * e.rank + r] * e.b[int64_t(row) * e.rank + r];
        own += e.alpha * lora;
    }
    if (e.c) own += to_f32(e.c[lane * ld + row]);
    if (e.gelu) own = gelu_of(own);
    y[lane * ld + row] = from_f32<Out>(own);
}

// How the maximum of a block of weights is found: see dequantize_4bit.cu.
struct Absmax {
    const void *absmax;
    const float *absmax2, *code2;
    float offset;
    int log_block, log_block2;
};

struct Code {
    float v[16];
};

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
                c[s] = static_cast<const uint8_t *>(a.absmax)[block];
                top[s] = a.absmax2[block >> a.log_block2];
            } else {
                top[s] = static_cast<const float *>(a.absmax)[block];
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
            finish(sum, y, now, m, n, int64_t(n), e);
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
// t of a row's four takes eight neighbours at 8 t + 32 i of a block of 64, two of them an mma and register.

template <typename T> struct Mma;
template <> struct Mma<f16> {
    static __device__ __forceinline__ void run(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};
template <> struct Mma<bf16> {
    static __device__ __forceinline__ void run(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

// Shared memory: the table (32 KiB), x [m][k + 8], the warps' sums [8][16][8].
constexpr int TABLE = 256 * 32;

// Blocks of 64 weights that a warp has under way at a time.
constexpr int FLIGHT = 4;

template <typename T> struct Flight {
    uint2 q[FLIGHT][2];
    float top[FLIGHT][2]; // as in Piece
    uint8_t c[FLIGHT][2];
    // Blocks b0, b0 + 8, ... of rows `row` and `row + 8`.
    __device__ __forceinline__ void fetch(const uint8_t *w, const Absmax &a, int row, int n, int k, int b0, int blocks, int t) {
#pragma unroll
        for (int f = 0; f < FLIGHT; f++) {
            const int b = b0 + 8 * f;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const bool there = b < blocks && row + 8 * h < n;
                const int64_t at = int64_t(there ? row + 8 * h : 0) * k + (there ? b : 0) * 64;
                q[f][h] = __ldcs(reinterpret_cast<const uint2 *>(w + at / 2 + t * 8));
                const int64_t block = at >> a.log_block;
                if (a.absmax2) {
                    c[f][h] = static_cast<const uint8_t *>(a.absmax)[block];
                    top[f][h] = a.absmax2[block >> a.log_block2];
                } else {
                    top[f][h] = static_cast<const float *>(a.absmax)[block];
                }
            }
        }
    }
};

// n rows of the weight in tiles of 16, a block of 256 a tile; its warps share k, a block of 64 each in turn. k is a
// multiple of 64, and so is a block of the quantization.
template <typename T>
__device__ void gemv_4bit_mma(const T *x, const uint8_t *w, Absmax a, const Code &code, T *y, int m, int n, int k,
                              const Epilogue<T, T> &e) {
    extern __shared__ __align__(16) unsigned char memory[];
    uint32_t *table = reinterpret_cast<uint32_t *>(memory);
    T *xs = reinterpret_cast<T *>(table + TABLE);
    const int stride = k + 8;
    float *sums = reinterpret_cast<float *>(xs + m * stride);
    __shared__ float table1[16], table2[256];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int row = blockIdx.x * 16 + g, blocks = k / 64;
    let_next_start();
    Flight<T> flight;
    flight.fetch(w, a, row, n, k, warp, blocks, t);
    if (a.absmax2) table2[threadIdx.x] = a.code2[threadIdx.x];
    // By way of shared memory: an index that is not constant into an argument is a chain of comparisons.
    if (threadIdx.x < 16) table1[threadIdx.x] = code.v[threadIdx.x];
    __syncthreads();
#pragma unroll 4
    for (int b = warp; b < 256; b += 8) {
        // The first element of a byte is in its high half.
        Vec<T, 2> pair;
        pair.v[0] = from_f32<T>(table1[b >> 4]), pair.v[1] = from_f32<T>(table1[b & 15]);
        table[b * 32 + lane] = reinterpret_cast<const uint32_t &>(pair);
    }
    // The weight depends on nothing: only now is the previous kernel's result needed.
    wait_for_previous();
    for (int r = 0; r < m; r++)
        for (int i = threadIdx.x * 8; i < k; i += 256 * 8)
            *reinterpret_cast<Vec<T, 8> *>(xs + r * stride + i) = *reinterpret_cast<const Vec<T, 8> *>(x + int64_t(r) * k + i);
    __syncthreads();
    float total[4] = {};
    // Columns of B beyond m are never written out: they may read row 0.
    const T *own = xs + (g < m ? g : 0) * stride;
    for (int b0 = warp; b0 < blocks; b0 += 8 * FLIGHT) {
        Flight<T> next;
        if (b0 + 8 * FLIGHT < blocks) next.fetch(w, a, row, n, k, b0 + 8 * FLIGHT, blocks, t);
#pragma unroll
        for (int f = 0; f < FLIGHT; f++) {
            const int b = b0 + 8 * f;
            if (b >= blocks) break;
            float part[4] = {};
            // Lane t has the elements 16 t .. 16 t + 15 of the block.
            const uint4 *from = reinterpret_cast<const uint4 *>(own + b * 64 + t * 16);
            const uint4 lo = from[0], hi = from[1];
            const uint32_t xv[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
            for (int s = 0; s < 4; s++) {
                uint32_t fa[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const uint32_t word = s < 2 ? flight.q[f][i % 2].x : flight.q[f][i % 2].y;
                    const int shift = (s % 2 * 2 + i / 2) * 8;
                    fa[i] = table[(word >> shift & 255) * 32 + lane];
                }
                Mma<T>::run(part, fa, xv[2 * s], xv[2 * s + 1]);
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float top = a.absmax2 ? table2[flight.c[f][h]] * flight.top[f][h] + a.offset : flight.top[f][h];
                total[2 * h] += top * part[2 * h], total[2 * h + 1] += top * part[2 * h + 1];
            }
        }
        flight = next;
    }
    // total: rows g and g + 8, columns 2 t and 2 t + 1.
#pragma unroll
    for (int i = 0; i < 4; i++) sums[(warp * 16 + g + i / 2 * 8) * 8 + 2 * t + i % 2] = total[i];
    __syncthreads();
    if (threadIdx.x < 128) {
        const int column = threadIdx.x / 16, own_row = blockIdx.x * 16 + threadIdx.x % 16;
        if (column >= m || own_row >= n) return;
        float sum = 0;
#pragma unroll
        for (int v = 0; v < 8; v++) sum += sums[(v * 16 + threadIdx.x % 16) * 8 + column];
        if (e.bias) sum += to_f32(e.bias[own_row]);
        if (e.u) {
            float lora = 0;
            for (int r = 0; r < e.rank; r++) lora += e.u[column * e.rank + r] * e.b[int64_t(own_row) * e.rank + r];
            sum += e.alpha * lora;
        }
        if (e.c) sum += to_f32(e.c[int64_t(column) * n + own_row]);
        if (e.gelu) sum = gelu_of(sum);
        y[int64_t(column) * n + own_row] = from_f32<T>(sum);
    }
}

#define DEFINE(NAME, T)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                                  \
        gemv_4bit_mma_##NAME(const T *x, const uint8_t *w, const void *absmax, const float *absmax2, const float *code2,  \
                             float offset, int log_block, int log_block2, Code code, T *y, int m, int n, int k,           \
                             const T *bias, const float *u, const float *b, float alpha, int rank, const T *c, int gelu) { \
        gemv_4bit_mma<T>(x, w, {absmax, absmax2, code2, offset, log_block, log_block2}, code, y, m, n, k,                 \
                         {bias, u, b, alpha, rank, c, gelu});                                                             \
    }
DEFINE(f16, f16) DEFINE(bf16, bf16)
#undef DEFINE

// The same for a weight that is not quantized; `Out` f32 for the logits.
template <typename T, typename Out, int M>
__device__ void gemv(const T *x, const T *w, Out *y, int m, int n, int k, int64_t ld, Epilogue<T, Out> e) {
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
    finish(sum, y, row, m, n, ld, e);
}

// u[m, r] = alpha * x[m, k] W[r, k]^T for a few rows: a block a (row, rank).
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
                               float offset, int log_block, int log_block2, Code code, T *y, int m, int n, int k,         \
                               const T *bias, const float *u, const float *b, float alpha, int rank, const T *c,          \
                               int gelu) {                                                                                \
        begin();                                                                                                          \
        gemv_4bit<T, M>(x, w, {absmax, absmax2, code2, offset, log_block, log_block2}, code, y, m, n, k,                  \
                        {bias, u, b, alpha, rank, c, gelu});                                                              \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                                                     \
        gemv_##NAME##_##M(const T *x, const T *w, T *y, int m, int n, int k, int64_t ld, const T *bias, const float *u,   \
                          const float *b, float alpha, int rank, const T *c, int gelu) {                                  \
        begin();                                                                                                          \
        gemv<T, T, M>(x, w, y, m, n, k, ld, {bias, u, b, alpha, rank, c, gelu});                                          \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                                                     \
        gemv_logits_##NAME##_##M(const T *x, const T *w, float *y, int m, int n, int k, int64_t ld, const T *bias,        \
                                 const float *u, const float *b, float alpha, int rank, const float *c, int gelu) {       \
        begin();                                                                                                          \
        gemv<T, float, M>(x, w, y, m, n, k, ld, {bias, u, b, alpha, rank, c, gelu});                                      \
    }
#define DEFINE(NAME, T)                                                                                                   \
    DEFINE_M(NAME, T, 1) DEFINE_M(NAME, T, 8)                                                                             \
    extern "C" __global__ void down_few_##NAME(const T *x, const float *w, float *u, int k, int r) { begin(); down_few(x, w, u, k, r); }
FOR_DTYPES(DEFINE)
