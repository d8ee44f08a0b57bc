// 4-bit codes (or 8-bit integers) back to weights: code * absmax of the block, absmax plain or
// double-quantized. Oracle: quant/oracle.rs; equal bit for bit, so nothing may fuse a product with a sum.
#include "common.cuh"
#include "quantized.cuh"

// Words of eight codes that a thread has in flight.
constexpr int WORDS = 4;

// The maxima of the blocks of N elements; what does not depend on each other is loaded together.
template <bool NESTED, int N>
__device__ __forceinline__ void load_absmax(float (&out)[N], const Absmax &a, const long long (&element)[N]) {
    if constexpr (NESTED) {
        uint8_t byte[N];
        float absmax2[N];
#pragma unroll
        for (int k = 0; k < N; k++) {
            const long long block = element[k] >> a.log_block;
            byte[k] = __ldg(static_cast<const uint8_t *>(a.at) + block);
            absmax2[k] = __ldg(a.absmax2 + (block >> a.log_block2));
        }
#pragma unroll
        for (int k = 0; k < N; k++) out[k] = __fadd_rn(__fmul_rn(__ldg(a.code2 + byte[k]), absmax2[k]), a.offset);
    } else {
#pragma unroll
        for (int k = 0; k < N; k++) out[k] = __ldg(static_cast<const float *>(a.at) + (element[k] >> a.log_block));
    }
}

__device__ __forceinline__ float absmax_of(const Absmax &a, long long element) {
    float out[1];
    const long long at[1] = {element};
    if (a.absmax2) load_absmax<true>(out, a, at);
    else load_absmax<false>(out, a, at);
    return out[0];
}

// The weight's own dtype, which values are rounded to before they become T: 0 f32 or T itself, 1 f16, 2 bf16.
__device__ __forceinline__ float round_through(float x, int via) {
    return via == 1 ? to_f32(from_f32<f16>(x)) : via == 2 ? to_f32(from_f32<bf16>(x)) : x;
}

// Where the code of element i of eight lies in a word; the first of two codes is a byte's high nibble.
__device__ __forceinline__ constexpr int shift_of(int i) { return 8 * (i / 2) + (i % 2 ? 0 : 4); }

// All words of a block lie inside the weight.
template <bool NESTED, bool VIA, typename T>
__device__ __forceinline__ void whole_block(const uint8_t *packed, const Absmax &absmax, const float *table, T *out,
                                            long long first, int via) {
    uint32_t word[WORDS];
    float scale[WORDS];
    long long at[WORDS];
#pragma unroll
    for (int k = 0; k < WORDS; k++) {
        at[k] = (first + k * blockDim.x) * 8;
        word[k] = __ldcs(reinterpret_cast<const uint32_t *>(packed) + (first + k * blockDim.x));
    }
    load_absmax<NESTED>(scale, absmax, at);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < WORDS; k++) {
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            x[i] = __fmul_rn(table[word[k] >> shift_of(i) & 15], scale[k]);
            if (VIA) x[i] = round_through(x[i], via);
        }
        store<8>(out + at[k], x);
    }
}

// Thread t of a block takes words t, t + blockDim.x, ...: a warp reads 128 and writes 512 neighbouring bytes (f16).
template <bool VIA, typename T>
__device__ __forceinline__ void dequantize_4bit(const uint8_t *packed, const Absmax &absmax, const Code &code, T *out,
                                                long long n, int via, int aligned) {
    __shared__ float table[16]; // in 16 banks: any 32 look-ups are one access
    if (threadIdx.x < 16) table[threadIdx.x] = code.v[threadIdx.x];
    const long long block = static_cast<long long>(blockIdx.x) * (WORDS * blockDim.x), first = block + threadIdx.x;
    if (aligned && (block + WORDS * blockDim.x) * 8 <= n) {
        if (absmax.absmax2) whole_block<true, VIA>(packed, absmax, table, out, first, via);
        else whole_block<false, VIA>(packed, absmax, table, out, first, via);
        return;
    }
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < WORDS; k++) {
#pragma unroll 1
        for (long long at = (first + k * blockDim.x) * 8, end = min(at + 8, n); at < end; at++) {
            const int q = packed[at / 2] >> shift_of(at % 2) & 15;
            out[at] = from_f32<T>(round_through(__fmul_rn(table[q], absmax_of(absmax, at)), via));
        }
    }
}

// One byte an element: an integer in two's complement, over 127.
template <typename T>
__device__ __forceinline__ void dequantize_int8(const uint8_t *packed, const Absmax &absmax, T *out, long long n,
                                                int via, int aligned) {
    const long long at = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (at >= n) return;
    const bool whole = aligned && at + 8 <= n;
    Vec<uint8_t, 8> byte;
    if (whole) {
        byte = *reinterpret_cast<const Vec<uint8_t, 8> *>(packed + at);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) byte.v[i] = at + i < n ? packed[at + i] : 0;
    }
    const float scale = absmax_of(absmax, at);
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = round_through(__fmul_rn(__fdiv_rn(float(int8_t(byte.v[i])), 127.f), scale), via);
    if (whole) {
        store<8>(out + at, x);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (at + i < n) out[at + i] = from_f32<T>(x[i]);
    }
}

#define PARAMS(T)                                                                                                      \
    const uint8_t *packed, const void *absmax, const float *absmax2, const float *code2, float offset, int log_block,  \
        int log_block2, const __grid_constant__ Code code, T *out, long long n, int via, int aligned
#define DEFINE(NAME, T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) dequantize_4bit_##NAME(PARAMS(T)) {                              \
        begin();                                                                                                       \
        const Absmax a{absmax, absmax2, code2, offset, log_block, log_block2};                                         \
        dequantize_4bit<false>(packed, a, code, out, n, 0, aligned);                                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) dequantize_4bit_via_##NAME(PARAMS(T)) {                          \
        begin();                                                                                                       \
        const Absmax a{absmax, absmax2, code2, offset, log_block, log_block2};                                         \
        dequantize_4bit<true>(packed, a, code, out, n, via, aligned);                                                  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) dequantize_int8_##NAME(PARAMS(T)) {                              \
        begin();                                                                                                       \
        const Absmax a{absmax, absmax2, code2, offset, log_block, log_block2};                                         \
        dequantize_int8(packed, a, out, n, via, aligned);                                                              \
    }
FOR_DTYPES(DEFINE)
