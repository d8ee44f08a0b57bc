// Weights to 4-bit codes (or 8-bit ones) and block maxima; the mean of the maxima in PyTorch's order, and their own
// 8-bit codes (double quantization). Oracle: quant/oracle.rs and quant/mean.rs; equal bit for bit, so nothing may
// fuse a product with a sum.
#include "common.cuh"

constexpr int MAX_THREADS = 512;   // of 8 elements: 4096, a multiple of every blocksize
constexpr float MIN_ABSMAX = 1e-38f; // what is smaller is not divided by
constexpr uint32_t INFINITE = 0x7f800000; // the bits of infinity; those of NaN lie above

struct Thresholds {
    float above[16]; // ascending; the last is infinity
};

// ---------------------------------------------------------------------- codes of eight values in [-1, 1]
// A code book prepares itself once a block (`begin`), then gives the code of one value.

// 4 bits: the number of thresholds below the value, found by halving; for IN_ORDER types that is the code.
template <bool IN_ORDER> struct Ranked {
    static constexpr int BITS = 4;
    const Thresholds &thresholds;
    uint64_t codes; // the code of each rank, four bits each

    struct Table {
        float above[16]; // in 16 banks: any 32 look-ups are one access
        uint32_t code[16];
    };
    __device__ __forceinline__ void begin(Table &table) const {
        if (threadIdx.x < 16) {
            table.above[threadIdx.x] = thresholds.above[threadIdx.x];
            table.code[threadIdx.x] = codes >> 4 * threadIdx.x & 15;
        }
    }
    __device__ __forceinline__ uint32_t operator()(float v, const Table &table, uint32_t) const {
        const bool upper = v > thresholds.above[7];
        int rank = upper ? 8 : 0;
        rank += v > (upper ? thresholds.above[11] : thresholds.above[3]) ? 4 : 0;
        rank += v > table.above[rank + 1] ? 2 : 0;
        rank += v > table.above[rank] ? 1 : 0;
        return IN_ORDER ? rank : table.code[rank];
    }
};

struct Int8 {
    static constexpr int BITS = 8;
    struct Table {};
    __device__ __forceinline__ void begin(Table &) const {}
    __device__ __forceinline__ uint32_t operator()(float v, const Table &, uint32_t) const {
        return static_cast<uint8_t>(static_cast<int8_t>(__float2int_rn(__fmul_rn(v, 127.f))));
    }
};

// The sorted 8-bit map: a code is the number of entries of `above` below the value. A block of zeros gets code 0.
struct Dynamic {
    static constexpr int BITS = 8;
    const float *above;
    struct Table {
        float above[256];
    };
    __device__ __forceinline__ void begin(Table &table) const {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) table.above[i] = above[i];
    }
    __device__ __forceinline__ uint32_t operator()(float v, const Table &table, uint32_t absmax) const {
        int code = 0;
#pragma unroll
        for (int step = 128; step > 0; step /= 2) code += v > table.above[code + step - 1] ? step : 0;
        return absmax == 0 ? 0 : code;
    }
};

// ------------------------------------------------------------------------------------------- the maxima

// What is subtracted before: the mean of the maxima, from the partial sums of `absmax_sums`. All threads get it.
struct Mean {
    const float *sums; // nullptr: nothing is subtracted
    int count;
    float inverse; // 1 / number of maxima
    float *out;

    __device__ __forceinline__ float operator()() const {
        __shared__ float part[MAX_THREADS];
        if (sums == nullptr) return 0.f;
        float sum = sums[0];
        if (count > 1) { // then blockDim.x is 512, as in PyTorch's last block
            sum = 0.f;
            for (int i = threadIdx.x; i < count; i += MAX_THREADS) sum = __fadd_rn(sum, sums[i]);
            part[threadIdx.x] = sum;
            for (int half = MAX_THREADS / 2; half > 0; half /= 2) {
                __syncthreads();
                if (threadIdx.x < half) part[threadIdx.x] = __fadd_rn(part[threadIdx.x], part[threadIdx.x + half]);
            }
            __syncthreads();
            sum = part[0];
        }
        const float mean = __fmul_rn(sum, inverse);
        if (blockIdx.x == 0 && threadIdx.x == 0) *out = mean;
        return mean;
    }
};

// The largest of the threads that share a block of weights, `lanes` neighbours (a power of two).
__device__ __forceinline__ uint32_t group_max(uint32_t x, int lanes) {
    __shared__ uint32_t part[MAX_THREADS / 32];
    for (int step = min(lanes, 32) / 2; step > 0; step /= 2) x = max(x, __shfl_xor_sync(~0u, x, step));
    if (lanes <= 32) return x; // the same in all threads of the grid
    __syncthreads();           // an earlier maximum may still be read
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    const int warps = lanes / 32, first = threadIdx.x / lanes * warps;
#pragma unroll 1
    for (int i = 0; i < warps; i++) x = max(x, part[first + i]);
    return x;
}

// Thread t of a block takes units t, t + blockDim.x, ... of eight elements.
template <bool WHOLE, int UNITS, typename T, typename Book>
__device__ __forceinline__ void quantize_units(const T *x, uint8_t *codes, float *absmax, long long n, int log_block,
                                               unsigned long long *bad, const Book &book,
                                               const typename Book::Table &table, const Mean &subtract) {
    const long long first = static_cast<long long>(blockIdx.x) * (UNITS * blockDim.x) + threadIdx.x;
    const int lanes = 1 << (log_block - 3);
    Vec<T, 8> unit[UNITS];
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
        const long long at = (first + k * blockDim.x) * 8;
        if constexpr (WHOLE) {
            constexpr int WIDTH = 16 / sizeof(T);
            const Vec<T, WIDTH> *from = reinterpret_cast<const Vec<T, WIDTH> *>(x + at);
#pragma unroll
            for (int j = 0; j < 8 / WIDTH; j++) {
                const int4 raw = __ldcs(reinterpret_cast<const int4 *>(from + j));
                reinterpret_cast<int4 *>(&unit[k])[j] = raw;
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) unit[k].v[i] = at + i < n ? x[at + i] : from_f32<T>(0.f);
        }
    }
    const float offset = subtract();
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
        const long long at = (first + k * blockDim.x) * 8;
        float v[8];
        uint32_t largest = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            v[i] = to_f32(unit[k].v[i]);
            if (subtract.sums && (WHOLE || at + i < n)) v[i] = __fsub_rn(v[i], offset);
            largest = max(largest, __float_as_uint(v[i]) & 0x7fffffff);
        }
        largest = group_max(largest, lanes);
        if (largest >= INFINITE) {
            for (int i = 0; i < 8; i++) { // the flag is 0 or the least index, negated
                if ((__float_as_uint(v[i]) & 0x7fffffff) < INFINITE) continue;
                atomicMax(bad, ~static_cast<unsigned long long>(at + i));
                break;
            }
        }
        if (!WHOLE && at >= n) continue; // after the shuffles, which need the whole warp
        if ((threadIdx.x & (lanes - 1)) == 0) absmax[at >> log_block] = __uint_as_float(largest);
        const float inverse = __frcp_rn(fmaxf(__uint_as_float(largest), MIN_ABSMAX));
        uint32_t code[8];
#pragma unroll
        for (int i = 0; i < 8; i++) code[i] = book(__fmul_rn(v[i], inverse), table, largest);
        if constexpr (Book::BITS == 4) { // the first of two codes is a byte's high nibble
            uint32_t word = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) word |= code[i] << (8 * (i / 2) + (i % 2 ? 0 : 4));
            if (WHOLE || at + 7 <= n) { // an odd count is padded
                reinterpret_cast<uint32_t *>(codes)[at / 8] = word;
            } else {
                for (int i = 0; i < 8 && at + i < n; i += 2) codes[(at + i) / 2] = word >> 4 * i;
            }
        } else {
            uint32_t low = 0, high = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) low |= code[i] << 8 * i, high |= code[4 + i] << 8 * i;
            if (WHOLE || at + 8 <= n) {
                reinterpret_cast<uint2 *>(codes)[at / 8] = make_uint2(low, high);
            } else {
#pragma unroll
                for (int i = 0; i < 8; i++)
                    if (at + i < n) codes[at + i] = code[i];
            }
        }
    }
}

template <typename T, typename Book>
__device__ __forceinline__ void quantize(const T *x, uint8_t *codes, float *absmax, long long n, int log_block,
                                         unsigned long long *bad, int aligned, const Book &book, const Mean &mean) {
    constexpr int UNITS = sizeof(T) == 2 ? 4 : 2;
    __shared__ typename Book::Table table;
    book.begin(table);
    __syncthreads();
    const long long end = static_cast<long long>(blockIdx.x + 1ll) * (UNITS * blockDim.x) * 8;
    if (aligned && end <= n) quantize_units<true, UNITS>(x, codes, absmax, n, log_block, bad, book, table, mean);
    else quantize_units<false, UNITS>(x, codes, absmax, n, log_block, bad, book, table, mean);
}

#define DEFINE(NAME, T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(512)                                                                  \
        quantize_in_order_##NAME(const T *x, uint8_t *codes, float *absmax, long long n, int log_block,                \
                                 unsigned long long *bad, int aligned,                                                 \
                                 const __grid_constant__ Thresholds thresholds, uint64_t rank_codes) {                 \
        const Ranked<true> book{thresholds, rank_codes};                                                               \
        quantize(x, codes, absmax, n, log_block, bad, aligned, book, Mean{});                                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512)                                                                  \
        quantize_permuted_##NAME(const T *x, uint8_t *codes, float *absmax, long long n, int log_block,                \
                                 unsigned long long *bad, int aligned,                                                 \
                                 const __grid_constant__ Thresholds thresholds, uint64_t rank_codes) {                 \
        const Ranked<false> book{thresholds, rank_codes};                                                              \
        quantize(x, codes, absmax, n, log_block, bad, aligned, book, Mean{});                                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512)                                                                  \
        quantize_int8_##NAME(const T *x, uint8_t *codes, float *absmax, long long n, int log_block,                    \
                             unsigned long long *bad, int aligned) {                                                   \
        quantize(x, codes, absmax, n, log_block, bad, aligned, Int8{}, Mean{});                                        \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512)                                                                  \
        quantize_dynamic_##NAME(const T *x, uint8_t *codes, float *absmax, long long n, int log_block,                 \
                                unsigned long long *bad, int aligned, const float *above, const float *sums,           \
                                int count, float inverse, float *mean) {                                               \
        quantize(x, codes, absmax, n, log_block, bad, aligned, Dynamic{above}, Mean{sums, count, inverse, mean});      \
    }                                                                                                                  \
    /* code[byte] * absmax of its block */                                                                             \
    extern "C" __global__ void dequantize_blockwise_##NAME(const uint8_t *codes, const float *absmax,                  \
                                                           const float *code, T *out, long long n, int log_block) {    \
        const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;                             \
        if (i < n) out[i] = from_f32<T>(__fmul_rn(__ldg(code + codes[i]), __ldg(absmax + (i >> log_block))));          \
    }
FOR_DTYPES(DEFINE)

// One sum a block, in the order that PyTorch adds them: four running sums a thread, then a tree over the block's
// threads (a power of two of them). `vectorized`: the four take neighbours; otherwise values a grid apart.
extern "C" __global__ void __launch_bounds__(512) absmax_sums(const float *values, long long n, int vectorized,
                                                              float *sums) {
    __shared__ float part[MAX_THREADS];
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long me = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    float sum[4] = {};
    if (vectorized) {
        for (long long i = me; i < n / 4; i += stride) {
            const float4 v = reinterpret_cast<const float4 *>(values)[i];
            sum[0] = __fadd_rn(sum[0], v.x), sum[1] = __fadd_rn(sum[1], v.y);
            sum[2] = __fadd_rn(sum[2], v.z), sum[3] = __fadd_rn(sum[3], v.w);
        }
        if (me < n % 4) sum[0] = __fadd_rn(sum[0], values[n / 4 * 4 + me]);
    } else {
        for (long long row = 0; row < n; row += 4 * stride) {
#pragma unroll
            for (int lane = 0; lane < 4; lane++) {
                const long long i = row + lane * stride + me;
                if (i < n) sum[lane] = __fadd_rn(sum[lane], values[i]);
            }
        }
    }
    part[threadIdx.x] = __fadd_rn(__fadd_rn(__fadd_rn(sum[0], sum[1]), sum[2]), sum[3]);
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) part[threadIdx.x] = __fadd_rn(part[threadIdx.x], part[threadIdx.x + half]);
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = part[0]; // which this thread wrote last
}
