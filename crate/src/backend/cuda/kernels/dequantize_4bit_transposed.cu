// The transpose of a 4-bit weight [n, k] as a matrix product of the backward likes it: [k, n], 16-bit. The values are
// those of dequantize_4bit.cu. n and k are multiples of 64. A block takes 64 x 64 elements through shared memory.
#include "common.cuh"
#include "quantized.cuh"

template <typename T, typename Via>
__device__ void transposed(const uint8_t *packed, const Absmax &a, const Code &code, T *out, int n, int k) {
    __shared__ float table[16];
    __shared__ uint32_t tile[64][33]; // [column][pair of rows]
    const int pair = threadIdx.x / 8, eighth = threadIdx.x % 8;
    const int row = blockIdx.y * 64 + pair * 2, column = blockIdx.x * 64 + eighth * 8;
    uint32_t q[2];
    float top[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int64_t at = int64_t(row + i) * k + column, block = at >> a.log_block;
        q[i] = __ldcs(reinterpret_cast<const uint32_t *>(packed + at / 2));
        if (a.absmax2) {
            const float c = a.code2[static_cast<const uint8_t *>(a.at)[block]];
            top[i] = __fadd_rn(__fmul_rn(c, a.absmax2[block >> a.log_block2]), a.offset);
        } else {
            top[i] = static_cast<const float *>(a.at)[block];
        }
    }
    if (threadIdx.x < 16) table[threadIdx.x] = code.v[threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const int shift = j / 2 * 8 + (j % 2 ? 0 : 4); // the first element of a byte is in its high half
        Vec<T, 2> v;
#pragma unroll
        for (int i = 0; i < 2; i++) v.v[i] = from_f32<T>(to_f32(from_f32<Via>(__fmul_rn(table[q[i] >> shift & 15], top[i]))));
        tile[eighth * 8 + j][pair] = reinterpret_cast<const uint32_t &>(v);
    }
    __syncthreads();
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int c = threadIdx.x / 32; c < 64; c += 8)
        reinterpret_cast<uint32_t *>(out + int64_t(blockIdx.x * 64 + c) * n + blockIdx.y * 64)[lane] = tile[c][lane];
}

#define DEFINE(NAME, T, VIA, V)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        dequantize_4bit_transposed_##NAME##_via_##VIA(const uint8_t *packed, const void *absmax, const float *absmax2,     \
                                                      const float *code2, float offset, int log_block, int log_block2,     \
                                                      Code code, T *out, int n, int k) {                                   \
        begin();                                                                                                           \
        transposed<T, V>(packed, {absmax, absmax2, code2, offset, log_block, log_block2}, code, out, n, k);                \
    }
DEFINE(f16, f16, f16, f16) DEFINE(f16, f16, bf16, bf16) DEFINE(f16, f16, f32, float)
DEFINE(bf16, bf16, f16, f16) DEFINE(bf16, bf16, bf16, bf16) DEFINE(bf16, bf16, f32, float)
