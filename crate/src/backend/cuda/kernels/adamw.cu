// Optimizers that update each element by itself, and the norm of the gradients, for all parameters in one launch: a
// table says where they are.
// Oracle: optim/state.rs, and for the arithmetic optim/adamw.rs and lion.rs; equal bit for bit, so a product and a sum
// are one operation only where they are there. A new optimizer is a struct like AdamW or Lion, whose fields are those
// of its Rust struct, and a line OPTIMIZER.
#include "common.cuh"

constexpr int THREADS = 256;
// Elements of a block of threads, 8 neighbours a thread: a warp has 256, a block of the 8-bit states.
constexpr int CHUNK = 8 * THREADS;
constexpr float MIN_ABSMAX = 1e-38f; // what is smaller is not divided by

struct Entry {
    float *param;
    const float *grad;
    void *moment[2]; // f32, or uint8 codes of blocks whose maxima are:
    float *absmax[2]; // nullptr: the moments are f32
    long long count;
    long long first; // the first block of threads that works on it
};

// The 8-bit map of a moment: values by code, and what a value must be above to get the next code.
struct Map {
    float value[256], above[256];
};

// What the steps of optimizers have in common.
struct Scalars {
    float grad_scale, decay, beta1, one_minus_beta1, beta2, one_minus_beta2;
};

// A step; `update` changes a weight and its moments.
struct AdamW {
    static constexpr int MOMENTS = 2;
    enum Average { LERP = 0, LERP_FROM_END = 1, SUM = 2 };
    int average; // how the first moment is computed
    int fused_update; // the update's product and sum are one operation
    Scalars s;
    float correction2, eps, step_size;

    __device__ __forceinline__ void update(float &p, float g, float (&moment)[MOMENTS]) const {
        float &m = moment[0], &v = moment[1];
        g = __fmul_rn(g, s.grad_scale);
        if (average == LERP) m = __fmaf_rn(s.one_minus_beta1, __fsub_rn(g, m), m);
        else if (average == LERP_FROM_END) m = __fmaf_rn(__fsub_rn(s.one_minus_beta1, 1.f), __fsub_rn(g, m), g);
        else m = __fmaf_rn(g, s.one_minus_beta1, __fmul_rn(m, s.beta1));
        v = __fmaf_rn(__fmul_rn(s.one_minus_beta2, g), g, __fmul_rn(v, s.beta2));
        const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), correction2), eps);
        const float decayed = __fmul_rn(p, s.decay);
        if (fused_update) p = __fmaf_rn(__fdiv_rn(m, denominator), step_size, decayed);
        else p = __fadd_rn(decayed, __fdiv_rn(__fmul_rn(step_size, m), denominator));
    }
};

struct Lion {
    static constexpr int MOMENTS = 1;
    int fused_direction; // the direction's second product and sum are one operation
    Scalars s;
    float lr;

    __device__ __forceinline__ void update(float &p, float g, float (&moment)[MOMENTS]) const {
        float &m = moment[0];
        g = __fmul_rn(g, s.grad_scale);
        const float direction = fused_direction ? __fmaf_rn(g, s.one_minus_beta1, __fmul_rn(m, s.beta1))
                                                : __fadd_rn(__fmul_rn(m, s.beta1), __fmul_rn(g, s.one_minus_beta1));
        const float sign = static_cast<float>((direction > 0.f) - (direction < 0.f));
        p = __fsub_rn(__fmul_rn(p, s.decay), __fmul_rn(lr, sign));
        m = __fmaf_rn(g, s.one_minus_beta2, __fmul_rn(m, s.beta2));
    }
};

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

// `blocks`: the entry that each block of threads works on. `quantized` is the step for 8-bit moments, `maps` one map a
// moment.
template <class Optimizer>
__device__ __forceinline__ void step(const Entry *table, const uint32_t *blocks, const Optimizer &full,
                                     const Optimizer &quantized, const Map *maps) {
    constexpr int MOMENTS = Optimizer::MOMENTS;
    const Entry e = table[blocks[blockIdx.x]];
    const long long at = (blockIdx.x - e.first) * CHUNK + threadIdx.x * 8, rest = e.count - at;
    const bool vectors = rest >= 8 && (reinterpret_cast<uintptr_t>(e.param) | reinterpret_cast<uintptr_t>(e.grad)) % 16 == 0;
    float p[8], g[8], m[MOMENTS][8];
    get(p, e.param + at, rest, vectors), get(g, e.grad + at, rest, vectors);
    const auto update = [&](const Optimizer &optimizer) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float moment[MOMENTS];
#pragma unroll
            for (int k = 0; k < MOMENTS; k++) moment[k] = m[k][i];
            optimizer.update(p[i], g[i], moment);
#pragma unroll
            for (int k = 0; k < MOMENTS; k++) m[k][i] = moment[k];
        }
    };
    if (e.absmax[0] == nullptr) {
#pragma unroll
        for (int k = 0; k < MOMENTS; k++) get(m[k], static_cast<float *>(e.moment[k]) + at, rest, rest >= 8);
        update(full);
#pragma unroll
        for (int k = 0; k < MOMENTS; k++) put(static_cast<float *>(e.moment[k]) + at, m[k], rest, rest >= 8);
    } else {
        __shared__ Map map[MOMENTS];
        for (int i = threadIdx.x; i < sizeof(map) / 4; i += THREADS)
            reinterpret_cast<float *>(map)[i] = reinterpret_cast<const float *>(maps)[i];
        __syncthreads();
        const auto codes = [&](int k) { return static_cast<uint8_t *>(e.moment[k]) + at; };
        const auto absmax = [&](int k) { return e.absmax[k] + at / 256; };
#pragma unroll
        for (int k = 0; k < MOMENTS; k++) decode(m[k], codes(k), map[k].value, rest > 0 ? *absmax(k) : 0.f, rest);
        update(quantized);
        __syncwarp(); // the old maxima are read
#pragma unroll
        for (int k = 0; k < MOMENTS; k++) encode(codes(k), absmax(k), m[k], map[k].above, rest);
    }
    put(e.param + at, p, rest, vectors);
}

#define OPTIMIZER(name, Type) \
    extern "C" __global__ void __launch_bounds__(THREADS) \
        name(const Entry *table, const uint32_t *blocks, const __grid_constant__ Type full, \
             const __grid_constant__ Type quantized, const Map *maps) { \
        step(table, blocks, full, quantized, maps); \
    }

OPTIMIZER(adamw, AdamW)
OPTIMIZER(lion, Lion)

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
