// The next token from a row of logits: the most likely one, or one drawn from the `top_k` most likely, after temperature
// and `top_p`. Oracle: generation/processors.rs and sampling.rs. A block of 1024 a draw.
#include "common.cuh"

struct Draw {
    int row, top_k; // top_k 1: greedy
    float temperature, unused;
    double top_p, u; // u: uniform in [0, 1)
};

constexpr int THREADS = 1024, ROOM = 2048;

// Larger floats are larger keys; of equal ones the lower id is.
__device__ __forceinline__ uint64_t key_of(float x, int id) {
    const uint32_t bits = __float_as_uint(x == 0.f ? 0.f : x);
    return uint64_t(bits & 0x80000000u ? ~bits : bits | 0x80000000u) << 32 | uint32_t(~id);
}
__device__ __forceinline__ float value_of(uint64_t key) {
    const uint32_t bits = uint32_t(key >> 32);
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}
__device__ __forceinline__ int id_of(uint64_t key) { return int(~uint32_t(key)); }

// The k-th largest of the upper halves of the block's keys: bit by bit, the largest that k of them reach.
__device__ uint32_t kth_largest(uint32_t x, int k) {
    uint32_t bound = 0;
#pragma unroll 1
    for (uint32_t bit = 1u << 31; bit; bit /= 2)
        if (__syncthreads_count(x >= (bound | bit)) >= k) bound |= bit;
    return bound;
}

__device__ __forceinline__ uint64_t block_max(uint64_t x) {
    __shared__ uint64_t part[32];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = max(x, __shfl_xor_sync(~0u, x, step));
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    x = part[threadIdx.x % 32];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = max(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// chosen[i], and ids[i] unless ids is null, = the token of draw i; or chosen[i] is -1 where the host must look: a logit that is NaN or +inf, no token at all, more
// equal logits than there is room for.
extern "C" __global__ void __launch_bounds__(THREADS)
    sample(const float *logits, const Draw *draws, int *chosen, int *ids, int vocab) {
    begin();
    auto choose = [&](int id) {
        if (threadIdx.x) return;
        chosen[blockIdx.x] = id;
        if (ids && id >= 0) ids[blockIdx.x] = id;
    };
    __shared__ uint64_t found[ROOM], keys[ROOM];
    __shared__ float p[ROOM];
    __shared__ int owner[THREADS], owners, count, kept;
    const Draw draw = draws[blockIdx.x];
    logits += int64_t(draw.row) * vocab;
    const bool greedy = draw.top_k == 1;
    const int k = min(draw.top_k, vocab);
    // The largest of each thread's; the k-th largest of those is no larger than the k-th largest of all.
    uint64_t top = 0;
    bool bad = false;
#pragma unroll 8
    for (int i = threadIdx.x; i < vocab; i += THREADS) {
        const float x = logits[i];
        bad |= !(x < INFINITY);
        top = max(top, key_of(greedy ? x : x / draw.temperature, i));
    }
    const uint64_t first = block_max(top);
    bad = __syncthreads_or(bad) || !(value_of(first) > -INFINITY);
    if (bad || greedy) return choose(bad ? -1 : id_of(first));
    // Threads whose largest may be among the k; a warp looks at all that such a thread has seen.
    const uint32_t bound = kth_largest(uint32_t(top >> 32), k);
    if (threadIdx.x == 0) count = 0, owners = 0;
    __syncthreads();
    if (uint32_t(top >> 32) >= bound) owner[atomicAdd(&owners, 1)] = threadIdx.x;
    __syncthreads();
    for (int o = threadIdx.x / 32; o < owners; o += THREADS / 32)
        for (int i = owner[o] + threadIdx.x % 32 * THREADS; i < vocab; i += 32 * THREADS) {
            const float x = logits[i] / draw.temperature;
            const uint64_t key = key_of(x, i);
            if (uint32_t(key >> 32) >= bound && x > -INFINITY)
                if (const int at = atomicAdd(&count, 1); at < ROOM) found[at] = key;
        }
    __syncthreads();
    if (count > ROOM) return choose(-1);
    // In order: no two keys are equal.
    for (int i = threadIdx.x; i < count; i += THREADS) {
        int rank = 0;
        for (int j = 0; j < count; j++) rank += found[j] > found[i];
        keys[rank] = found[i];
    }
    if (threadIdx.x == 0) kept = 0;
    __syncthreads();
    // The k largest and those equal to the last of them.
    const float last = value_of(keys[min(k, count) - 1]);
    for (int i = threadIdx.x; i < count; i += THREADS) {
        if (value_of(keys[i]) >= last) atomicMax(&kept, i + 1);
        p[i] = expf(value_of(keys[i]) - value_of(keys[0]));
    }
    __syncthreads();
    int n = kept;
    __syncthreads();
    double total = 0;
    for (int j = 0; j < n; j++) total += p[j];
    // The likeliest that together reach top_p; the first stays.
    if (draw.top_p < 1.0) {
        for (int i = threadIdx.x; i < n; i += THREADS) {
            double above = 0;
            for (int j = 0; j < i; j++) above += p[j];
            if (i > 0 && float((total - above) / total) <= float(1.0 - draw.top_p)) atomicMin(&kept, i);
        }
        __syncthreads();
        n = kept;
        total = 0;
        for (int j = 0; j < n; j++) total += p[j];
    }
    // In the order of ids, the last whose predecessors have no more than u together.
    uint64_t best = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        const int id = id_of(keys[i]);
        double before = 0;
        for (int j = 0; j < n; j++)
            if (id_of(keys[j]) < id) before += p[j];
        if (before <= draw.u * total) best = max(best, uint64_t(uint32_t(id)) + 1);
    }
    best = block_max(best);
    choose(int(best) - 1);
}
