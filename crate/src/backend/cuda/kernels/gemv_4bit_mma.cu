// gemv.cu's product with a 4-bit weight on the tensor cores, for 16-bit activations.
//
// An mma's A is 16 rows of the weight by 16 along k, its B up to 8 rows of x. A byte holds two neighbours along k, which
// is what a register of A holds, so a byte is one look-up in a table of 256 pairs; the table is there once a lane, so
// that look-ups never meet in a bank. The sum along k may be taken in any order as long as x is read in the same: lane
// t of a row's four takes the elements 16 t .. 16 t + 15 of a block of 64, two of them an mma and register.
//
// What is slow about a product of few rows is waiting, so all that does not depend on the previous kernel is under way
// before that has ended: the weights in a queue in shared memory, deep enough for a layer of two thousand; the table; an
// adapter. And what comes before the product is part of it: the norm of x, and an adapter's A x, which every block of
// threads makes for itself. Loops stay loops, without divisions: instructions that run once are waited for as well.
#include "epilogue.cuh"
#include "mma.cuh"
#include "quantized.cuh"

// Warps of a block of threads: few, each with much to do, since what a warp does besides looking up and multiplying it
// does however little it has. A warp takes BLOCKS blocks of 64 weights of each of 16 rows at a time: a piece. Up to
// four pieces of each warp are in the queue.
constexpr int WARPS = 8, BLOCKS = 4, THREADS = 32 * WARPS;
constexpr int ALONG = WARPS * BLOCKS * 64; // elements along k that the warps' pieces cover
TELL(WARPS, WARPS) TELL(ALONG, ALONG)
constexpr int HELD = 16;                   // loads of an adapter's A that a lane has made before x is there

// A piece in the queue: the codes, 128 bytes a row; of its 64 blocks (row i / 4, block i % 4) the maximum or, where that
// is a byte, the second-level one and the word with the byte. `once_a_row`: a row's four bytes are one word and have
// one second-level maximum, which are there once a row, and a piece ends after 16 of each.
struct Codes {
    unsigned char codes[16 * 32 * BLOCKS];
    uint32_t tops[2 * 16 * BLOCKS];
};
constexpr int LONG = sizeof(Codes), SHORT = LONG - 4 * 2 * 16 * (BLOCKS - 1);
TELL(LONG, LONG) TELL(SHORT, SHORT)

// Shared memory: this, the queue [places][WARPS] of pieces, x [m][k + 8], sums [tiles of the block][WARPS][16][m],
// B [tiles of the block][16][rank].
struct Fixed {
    uint32_t pairs[256][32];
    float2 stats[8][WARPS];
    float table[16], table2[256], u_parts[64];
};
TELL(FIXED, sizeof(Fixed))

// The norm that x goes through first, unless w is null; b null: no centering.
struct NormOf {
    const float *w, *b;
    float eps;
};

// x [m, k] to shared memory.
template <typename T> __device__ __forceinline__ void fetch_x(T *xs, int stride, const T *x, int m, int k) {
#pragma unroll 1
    for (int r = 0; r < m; r++, x += k, xs += stride)
#pragma unroll 2
        for (int i = threadIdx.x * 8; i < k; i += THREADS * 8)
            *reinterpret_cast<Vec<T, 8> *>(xs + i) = *reinterpret_cast<const Vec<T, 8> *>(x + i);
}

// The same through the norm, as norm.cu makes it, with a row's statistics put together of those of its warps (Chan et
// al.: means, and squares about them). `w` and `b` are the norm's for the thread's first eight elements.
template <typename T>
__device__ __forceinline__ void fetch_normed(T *xs, int stride, const T *x, int m, int k, const NormOf &norm,
                                             const float (&w)[8], const float (&b)[8], float2 (&stats)[8][WARPS]) {
    const int warp = threadIdx.x / 32, first = threadIdx.x * 8;
    const bool center = norm.b;
    auto elements_of = [&](int warp) { return float(k / ALONG * 256 + min(max(k % ALONG - warp * 256, 0), 256)); };
    const float per_own = 1.f / fmaxf(elements_of(warp), 1.f), per_row = 1.f / k;
#pragma unroll 1
    for (int r = 0; r < m; r++) {
        float sum = 0, square = 0;
#pragma unroll 1
        for (int i = first; i < k; i += ALONG) {
            const Vec<T, 8> v = *reinterpret_cast<const Vec<T, 8> *>(x + int64_t(r) * k + i);
            *reinterpret_cast<Vec<T, 8> *>(xs + r * stride + i) = v;
#pragma unroll
            for (int j = 0; j < 8; j++) sum += to_f32(v.v[j]);
        }
        const float mean = center ? warp_sum(sum) * per_own : 0.f;
#pragma unroll 1
        for (int i = first; i < k; i += ALONG) {
            float v[8];
            load(v, xs + r * stride + i);
#pragma unroll
            for (int j = 0; j < 8; j++) square += (v[j] - mean) * (v[j] - mean);
        }
        square = warp_sum(square);
        if (threadIdx.x % 32 == 0) stats[r][warp] = make_float2(mean, square);
    }
    __syncthreads();
#pragma unroll 1
    for (int r = 0; r < m; r++) {
        float mean = 0, square = 0;
#pragma unroll
        for (int v = 0; v < WARPS; v++) mean += stats[r][v].x * elements_of(v);
        mean *= per_row;
#pragma unroll
        for (int v = 0; v < WARPS; v++) {
            const float off = stats[r][v].x - mean;
            square += stats[r][v].y + elements_of(v) * off * off;
        }
        const float rstd = rsqrtf(square * per_row + norm.eps);
#pragma unroll 1
        for (int i = first; i < k; i += ALONG) {
            float v[8], scale[8], shift[8] = {};
            load(v, xs + r * stride + i);
            if (i == first) {
#pragma unroll
                for (int j = 0; j < 8; j++) scale[j] = w[j], shift[j] = b[j];
            } else {
                load(scale, norm.w + i);
                if (center) load(shift, norm.b + i);
            }
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] = (v[j] - mean) * rstd * scale[j] + shift[j];
            store(xs + r * stride + i, v);
        }
    }
}

// n rows of the weight in tiles of 16; a block of threads takes every gridDim.x-th tile, `own_tiles` of them at most. Its
// warps share k. k is a multiple of 64, and so is a block of the quantization; there are less than 2^32 of those.
template <typename T>
__device__ void gemv_4bit_mma(const T *x, const uint8_t *w, const Absmax &a, const Code &code, T *y, int m, int n, int k,
                              const Epilogue<T, T> &e, const float *lora_a, const NormOf &norm, int own_tiles, int places,
                              bool once_a_row) {
    extern __shared__ __align__(16) unsigned char memory[];
    const int stride = k + 8, blocks = k / 64, tiles = (n + 15) / 16;
    Fixed &fixed = *reinterpret_cast<Fixed *>(memory);
    const bool nested = a.absmax2;
    const int piece_bytes = once_a_row ? SHORT : LONG;
    auto piece_at = [&](int place) {
        return reinterpret_cast<Codes *>(memory + sizeof(Fixed) + (place * WARPS + threadIdx.x / 32) * piece_bytes);
    };
    T *xs = reinterpret_cast<T *>(memory + sizeof(Fixed) + places * WARPS * piece_bytes);
    float *sums = reinterpret_cast<float *>(xs + m * stride), *bs = sums + own_tiles * WARPS * 16 * m;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    let_next_start();

    // The block's tiles, and its pieces: `turns` along k for each tile.
    const int here = int(blockIdx.x + (own_tiles - 1) * gridDim.x) < tiles ? own_tiles : own_tiles - 1;
    const int turns = (k + ALONG - 1) / ALONG;
    // A piece on its way to its place in the queue. Of a row's eight times 16 bytes a lane brings two; a row has its blocks
    // in an order of its own, so that what is read together lies in different banks.
    struct Place {
        int tile, turn, place;
    } next = {int(blockIdx.x), 0, 0};
    int unsent = here * turns;
    auto send_next = [&] {
        const int first = (next.turn * WARPS + warp) * BLOCKS;
        Codes &piece = *piece_at(next.place);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = min(next.tile * 16 + g + 8 * h, n - 1), b = first + t;
            const uint8_t *from = w + int64_t(row) * (k / 2) + (first * 2 + t) * 16;
            unsigned char *to = piece.codes + (g + 8 * h) * 128;
            if (first + t / 2 < blocks) send<16>(to + (t ^ g % 4 * 2) * 16, from);
            if (first + t / 2 + 2 < blocks) send<16>(to + ((t + 4) ^ g % 4 * 2) * 16, from + 64);
            const uint32_t block = uint32_t(row) * blocks + b >> a.log_block - 6;
            // Two arrays behind each other: of 16 rows, or of 64 blocks.
            const int at = once_a_row ? g + 8 * h : lane + 32 * h;
            if (b < blocks && !nested) send<4>(&piece.tops[at], static_cast<const float *>(a.at) + block);
            else if (b < blocks && (!once_a_row || t == 0)) {
                send<4>(&piece.tops[at], a.absmax2 + (block >> a.log_block2));
                send<4>(&piece.tops[at + (once_a_row ? 16 : 64)], static_cast<const uint32_t *>(a.at) + block / 4);
            }
        }
        next.place = next.place + 1 == places ? 0 : next.place + 1;
        if (++next.turn == turns) next.turn = 0, next.tile += gridDim.x;
        unsent--;
    };
#pragma unroll 1
    for (int p = 0; p < places; p++) {
        if (unsent > 0) send_next();
        sent();
    }
    // B of the rows to come.
    if (e.b)
#pragma unroll 1
        for (int i = threadIdx.x; i < own_tiles * 16 * e.rank; i += THREADS) {
            const int row = min((blockIdx.x + i / (16 * e.rank) * gridDim.x) * 16 + i / e.rank % 16, n - 1);
            bs[i] = e.b[int64_t(row) * e.rank + i % e.rank];
        }
    // What is small or read by every block comes from the second-level cache later on.
    auto prefetch = [&](const float *from, int count) {
        if (from)
#pragma unroll 1
            for (int i = threadIdx.x * 32; i < count; i += THREADS * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
    };
    if (k > ALONG) prefetch(norm.w, k), prefetch(norm.b, k);
    float norm_w[8] = {}, norm_b[8] = {};
    if (norm.w && threadIdx.x * 8 < k) load(norm_w, norm.w + threadIdx.x * 8);
    if (norm.b && threadIdx.x * 8 < k) load(norm_b, norm.b + threadIdx.x * 8);
    // The thread's first sum: its place in y, the bias.
    auto place_of = [&](int i, int &row, int &r) {
        row = (blockIdx.x + i / (16 * m) * gridDim.x) * 16 + i / m % 16, r = i % m;
        return i < own_tiles * 16 * m && row < n;
    };
    int own_row, own_r;
    const bool has_own = place_of(threadIdx.x, own_row, own_r);
    float own_sum = has_own && e.bias ? to_f32(e.bias[own_row]) : 0.f;
    // An adapter's A x: `parts` warps share a row of A, or a warp takes several.
    const int parts = lora_a ? max(1, WARPS / e.rank) : 1, part_of = warp % parts, share = (k / parts + 127) / 128 * 128;
    const int a_begin = part_of * share + lane * 4, a_end = lora_a ? min(k, (part_of + 1) * share) : 0;
    auto a_at = [&](int q, int i) { return *reinterpret_cast<const Vec<float, 4> *>(lora_a + int64_t(q) * k + i); };
    Vec<float, 4> held[HELD];
    if (lora_a && warp / parts < e.rank)
#pragma unroll
        for (int s = 0; s < HELD; s++)
            if (a_begin + s * 128 < a_end) held[s] = a_at(warp / parts, a_begin + s * 128);
    static_assert(THREADS == 256);
    if (nested) fixed.table2[threadIdx.x] = a.code2[threadIdx.x];
    // By way of shared memory: an index that is not constant into an argument is a chain of comparisons.
    if (threadIdx.x < 16) fixed.table[threadIdx.x] = code.v[threadIdx.x];
    __syncthreads();
#pragma unroll 2
    for (int b = threadIdx.x / 8; b < 256; b += THREADS / 8) {
        // The first element of a byte is in its high half.
        Vec<T, 2> pair;
        pair.v[0] = from_f32<T>(fixed.table[b >> 4]), pair.v[1] = from_f32<T>(fixed.table[b & 15]);
        const uint32_t word = reinterpret_cast<const uint32_t &>(pair);
        *reinterpret_cast<uint4 *>(&fixed.pairs[b][threadIdx.x % 8 * 4]) = make_uint4(word, word, word, word);
    }

    wait_for_previous();
    if (has_own && e.c) own_sum += to_f32(e.c[int64_t(own_r) * n + own_row]);
    if (norm.w) fetch_normed(xs, stride, x, m, k, norm, norm_w, norm_b, fixed.stats);
    else fetch_x(xs, stride, x, m, k);
    __syncthreads();
    if (lora_a)
#pragma unroll 1
        for (int r = 0; r < m; r++) {
            auto dot = [&](const Vec<float, 4> &v, int i) {
                float p[4];
                load(p, xs + r * stride + i);
                return v.v[0] * p[0] + v.v[1] * p[1] + v.v[2] * p[2] + v.v[3] * p[3];
            };
            float sum = 0;
#pragma unroll
            for (int s = 0; s < HELD; s++)
                if (a_begin + s * 128 < a_end) sum += dot(held[s], a_begin + s * 128);
#pragma unroll 1
            for (int q = warp / parts, i = a_begin + HELD * 128; q < e.rank; q += WARPS / parts, i = a_begin, sum = 0) {
#pragma unroll 1
                for (; i < a_end; i += 128) sum += dot(a_at(q, i), i);
                sum = warp_sum(sum);
                if (lane == 0) fixed.u_parts[(q * parts + part_of) * m + r] = sum;
            }
        }
    // The table's word for the byte at `shift` of a word of codes: its 128 bytes a byte, the lane's 4 of them.
    const char *own_table = reinterpret_cast<const char *>(fixed.pairs);
    const uint32_t own_word = lane * 4;
    auto table_at = [&](uint32_t word, int shift) {
        const uint32_t place = (shift > 7 ? word >> (shift - 7) : word << (7 - shift)) & (255u << 7) | own_word;
        return *reinterpret_cast<const uint32_t *>(own_table + place);
    };
    const T *own = xs + g * stride + t * 16;
    float *to = sums + warp * 16 * m;
    // The bits of a row's block in the piece that make it lie elsewhere are those of the block's number.
    const uint32_t own_code = g * 128 + g % 4 * 32 + t * 8;
    int place = 0;
#pragma unroll 1
    for (int i = 0, tile = blockIdx.x; i < here; i++, tile += gridDim.x) {
        float total[4] = {};
#pragma unroll 1
        for (int turn = 0; turn < turns; turn++) {
            if (places == 4) landed<3>();
            else if (places == 3) landed<2>();
            else if (places == 2) landed<1>();
            else landed<0>();
            __syncwarp();
            const int first = (turn * WARPS + warp) * BLOCKS;
            const Codes &piece = *piece_at(place);
            float top[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int at = once_a_row ? g + 8 * h : lane + 32 * h;
                top[h] = __uint_as_float(piece.tops[at]);
                if (!nested) continue;
                int byte = t;
                if (!once_a_row) byte = (uint32_t(min(tile * 16 + g + 8 * h, n - 1)) * blocks + first + t >> a.log_block - 6) % 4;
                const uint32_t word = piece.tops[at + (once_a_row ? 16 : 64)];
                top[h] = fixed.table2[word >> byte * 8 & 255] * top[h] + a.offset;
            }
            // A block that is not there has the codes of an earlier one, and no weight.
            if (first + t >= blocks) top[0] = top[1] = 0;
            uint4 lo = {}, hi = {}; // what stands in columns of B beyond m is never written out
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                const uint4 *from_x = reinterpret_cast<const uint4 *>(own + (first + b < blocks ? first + b : 0) * 64);
                const unsigned char *from = piece.codes + (own_code ^ b * 32);
                const uint2 words[2] = {*reinterpret_cast<const uint2 *>(from), *reinterpret_cast<const uint2 *>(from + 8 * 128)};
                if (g < m) lo = from_x[0], hi = from_x[1];
                const uint32_t xv[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
                float part[4] = {};
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    uint32_t fa[4];
#pragma unroll
                    for (int j = 0; j < 4; j++) fa[j] = table_at(s < 2 ? words[j % 2].x : words[j % 2].y, (s % 2 * 2 + j / 2) * 8);
                    Mma<T>::run(part, fa, xv[2 * s], xv[2 * s + 1]);
                }
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float by = __shfl_sync(~0u, top[h], 4 * g + b);
                    total[2 * h] += by * part[2 * h], total[2 * h + 1] += by * part[2 * h + 1];
                }
            }
            place = place + 1 == places ? 0 : place + 1;
            if (unsent > 0) {
                __syncwarp();
                send_next();
            }
            sent(); // so that the groups behind a piece stay as many
        }
        // Rows g and g + 8, columns 2 t and 2 t + 1.
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (2 * t + j % 2 < m) to[(g + j / 2 * 8) * m + 2 * t + j % 2] = total[j];
        to += WARPS * 16 * m;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < own_tiles * 16 * m; i += THREADS) {
        if (i != threadIdx.x) {
            if (!place_of(i, own_row, own_r)) continue;
            own_sum = e.bias ? to_f32(e.bias[own_row]) : 0.f;
            if (e.c) own_sum += to_f32(e.c[int64_t(own_r) * n + own_row]);
        } else if (!has_own) {
            continue;
        }
        float lora = 0;
        const float *from = sums + i / (16 * m) * (WARPS * 16 * m) + i % (16 * m), *b = bs + i / m * e.rank;
#pragma unroll
        for (int v = 0; v < WARPS; v++) own_sum += from[v * 16 * m];
#pragma unroll 8
        for (int j = 0; j < e.rank; j++) {
            float u = lora_a ? fixed.u_parts[j * parts * m + own_r] : e.u[own_r * e.rank + j];
            for (int p = 1; p < parts; p++) u += fixed.u_parts[(j * parts + p) * m + own_r];
            lora += u * b[j];
        }
        y[int64_t(own_r) * n + own_row] = e.done(own_sum + e.alpha * lora);
    }
}

#define DEFINE(NAME, T)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                              \
        gemv_4bit_mma_##NAME(const T *x, const uint8_t *w, const void *absmax, const float *absmax2, const float *code2,  \
                             float offset, int log_block, int log_block2, const __grid_constant__ Code code, T *y, int m, \
                             int n, int k, const T *bias, const float *u, const float *b, float alpha, int rank,          \
                             const T *c, int gelu, const float *lora_a, const float *norm_w, const float *norm_b,         \
                             float eps, int own_tiles, int places, int once_a_row) {                                      \
        const Absmax a{absmax, absmax2, code2, offset, log_block, log_block2};                                            \
        gemv_4bit_mma<T>(x, w, a, code, y, m, n, k, {bias, u, b, alpha, rank, c, gelu}, lora_a, {norm_w, norm_b, eps},    \
                         own_tiles, places, once_a_row);                                                                  \
    }
DEFINE(f16, f16) DEFINE(bf16, bf16)
