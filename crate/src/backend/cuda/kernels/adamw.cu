// AdamW and the norm of the gradients, for all parameters in one launch: a table says where they are.
// Oracle: optim/kernel.rs and optim/state.rs; equal bit for bit, so a product and a sum are one operation
// only where they are there.
#include "common.cuh"

constexpr int THREADS = 256;
// Elements of a block of threads, 8 neighbours a thread: a warp has 256, a block of the 8-bit states.
constexpr int CHUNK = 8 * THREADS;
constexpr float MIN_ABSMAX = 1e-38f; // what is smaller is not divided by

struct Entry {
    float *param;
    const float *grad;
    void *moment1, *moment2; // f32, or uint8 codes of blocks whose maxima are:
    float *absmax1, *absmax2; // nullptr: the moments are f32
    long long count;
    long long first; // the first block of threads that works on it
};

// How the first moment is computed.
enum { LERP = 0, LERP_FROM_END = 1, AVERAGE = 2 };

struct Step {
    int moment;
    int fused_update; // the update's product and sum are one operation
    float grad_scale, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, correction2, eps, step_size;
};

// The 8-bit maps: values by code, and what a value must be above to get the next code.
struct Maps {
    float signed_value[256], signed_above[256], unsigned_value[256], unsigned_above[256];
};

__device__ __forceinline__ void update(const Step &s, float &p, float g, float &m, float &v) {
    g = __fmul_rn(g, s.grad_scale);
    if (s.moment == LERP) m = __fmaf_rn(s.one_minus_beta1, __fsub_rn(g, m), m);
    else if (s.moment == LERP_FROM_END) m = __fmaf_rn(__fsub_rn(s.one_minus_beta1, 1.f), __fsub_rn(g, m), g);
    else m = __fmaf_rn(g, s.one_minus_beta1, __fmul_rn(m, s.beta1));
    v = __fmaf_rn(__fmul_rn(s.one_minus_beta2, g), g, __fmul_rn(v, s.beta2));
    const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), s.correction2), s.eps);
    const float decayed = __fmul_rn(p, s.decay);
    if (s.fused_update) p = __fmaf_rn(__fdiv_rn(m, denominator), s.step_size, decayed);
    else p = __fadd_rn(decayed, __fdiv_rn(__fmul_rn(s.step_size, m), denominator));
}

// `rest` of 8 numbers; those that are not there are 0.
__device__ __forceinline__ void get(float (&x)[8], const float *from, long long rest, bool vectors) {
    if (vectors) return load<8>(x, from);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = i < rest ? from[i] : 0.f;
}

__device__ __forceinline__ void put(float *to, const float (&x)[8], long long rest, bool vectors) {
    if (vectors) return store<8>(to, x);
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < rest) to[i] = x[i];
}

__device__ __forceinline__ void decode(float (&x)[8], const uint8_t *codes, const float *value, float absmax,
                                       long long rest) {
    Vec<uint8_t, 8> code; // the codes' part of the state is aligned, so whole vectors are, too
    if (rest >= 8) {
        code = *reinterpret_cast<const Vec<uint8_t, 8> *>(codes);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) code.v[i] = i < rest ? codes[i] : 0;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = i < rest ? __fmul_rn(value[code.v[i]], absmax) : 0.f;
}

// The codes of a warp's 256 numbers, and their maximum.
__device__ __forceinline__ void encode(uint8_t *codes, float *absmax, const float (&x)[8], const float *above,
                                       long long rest) {
    uint32_t largest = 0; // magnitudes order like integers
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < rest) largest = max(largest, __float_as_uint(x[i]) & 0x7fffffff);
    largest = __reduce_max_sync(~0u, largest);
    if (threadIdx.x % 32 == 0 && rest > 0) *absmax = __uint_as_float(largest);
    const float inverse = __frcp_rn(fmaxf(__uint_as_float(largest), MIN_ABSMAX));
    Vec<uint8_t, 8> code;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float v = __fmul_rn(x[i], inverse);
        int c = 0;
#pragma unroll
        for (int step = 128; step > 0; step /= 2) c += v > above[c + step - 1] ? step : 0;
        code.v[i] = largest == 0 ? 0 : c;
    }
    if (rest >= 8) {
        *reinterpret_cast<Vec<uint8_t, 8> *>(codes) = code;
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < rest) codes[i] = code.v[i];
    }
}

// `blocks`: the entry that each block of threads works on. `quantized` is the step for 8-bit moments.
extern "C" __global__ void __launch_bounds__(THREADS)
    adamw(const Entry *table, const uint32_t *blocks, const __grid_constant__ Step full,
          const __grid_constant__ Step quantized, const Maps *maps) {
    const Entry e = table[blocks[blockIdx.x]];
    const long long at = (blockIdx.x - e.first) * CHUNK + threadIdx.x * 8, rest = e.count - at;
    const bool vectors = rest >= 8 && (reinterpret_cast<uintptr_t>(e.param) | reinterpret_cast<uintptr_t>(e.grad)) % 16 == 0;
    float p[8], g[8], m[8], v[8];
    get(p, e.param + at, rest, vectors), get(g, e.grad + at, rest, vectors);
    if (e.absmax1 == nullptr) {
        float *const moment1 = static_cast<float *>(e.moment1) + at, *const moment2 = static_cast<float *>(e.moment2) + at;
        get(m, moment1, rest, rest >= 8), get(v, moment2, rest, rest >= 8);
#pragma unroll
        for (int i = 0; i < 8; i++) update(full, p[i], g[i], m[i], v[i]);
        put(moment1, m, rest, rest >= 8), put(moment2, v, rest, rest >= 8);
    } else {
        __shared__ Maps table8;
        for (int i = threadIdx.x; i < sizeof(Maps) / 4; i += THREADS)
            reinterpret_cast<float *>(&table8)[i] = reinterpret_cast<const float *>(maps)[i];
        __syncthreads();
        uint8_t *const codes1 = static_cast<uint8_t *>(e.moment1) + at, *const codes2 = static_cast<uint8_t *>(e.moment2) + at;
        float *const absmax1 = e.absmax1 + at / 256, *const absmax2 = e.absmax2 + at / 256;
        decode(m, codes1, table8.signed_value, rest > 0 ? *absmax1 : 0.f, rest);
        decode(v, codes2, table8.unsigned_value, rest > 0 ? *absmax2 : 0.f, rest);
#pragma unroll
        for (int i = 0; i < 8; i++) update(quantized, p[i], g[i], m[i], v[i]);
        __syncwarp(); // the old maxima are read
        encode(codes1, absmax1, m, table8.signed_above, rest);
        encode(codes2, absmax2, v, table8.unsigned_above, rest);
    }
    put(e.param + at, p, rest, vectors);
}

// The sum over a block of threads, in an order that never changes; thread 0 gets it.
__device__ __forceinline__ double block_sum(double x) {
    __shared__ double part[THREADS / 32];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    if (threadIdx.x == 0)
        for (int i = 0; i < THREADS / 32; i++) x += part[i];
    return x;
}

// One sum of squares a block of threads, over its chunk.
extern "C" __global__ void __launch_bounds__(THREADS)
    square_sums(const Entry *table, const uint32_t *blocks, double *sums) {
    const Entry e = table[blocks[blockIdx.x]];
    const long long at = (blockIdx.x - e.first) * CHUNK;
    double sum = 0;
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const long long i = at + k * THREADS + threadIdx.x;
        const double g = i < e.count ? e.grad[i] : 0.f;
        sum += g * g;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// The sum of the sums, by one block of threads.
extern "C" __global__ void __launch_bounds__(THREADS) sum_of_sums(const double *sums, int count, double *out) {
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) sum += sums[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *out = sum;
}
