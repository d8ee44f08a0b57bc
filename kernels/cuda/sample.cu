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

// Sorts n keys, a power of two up to ROOM, the largest first.
__device__ void sort(uint64_t *keys, int n) {
    for (int size = 2; size <= n; size *= 2)
        for (int step = size / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < n / 2; i += THREADS) {
                const int low = i / step * step * 2 + i % step, high = low + step;
                const uint64_t a = keys[low], b = keys[high];
                if ((low & size) == 0 ? a < b : a > b) keys[low] = b, keys[high] = a;
            }
        }
    __syncthreads();
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

// chosen[i] = the token of draw i, or -1 where the host must look: a logit that is NaN or +inf, no token at all, more
// equal logits than there is room for.
extern "C" __global__ void __launch_bounds__(THREADS)
    sample(const float *logits, const Draw *draws, int *chosen, int vocab) {
    begin();
    __shared__ uint64_t keys[ROOM];
    __shared__ float p[ROOM];
    __shared__ int count, kept;
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
    if (bad || greedy) {
        if (threadIdx.x == 0) chosen[blockIdx.x] = bad ? -1 : id_of(first);
        return;
    }
    keys[threadIdx.x] = top;
    sort(keys, THREADS);
    const float bound = value_of(keys[k - 1]);
    __syncthreads();
    if (threadIdx.x == 0) count = 0;
    keys[threadIdx.x] = keys[threadIdx.x + THREADS] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < vocab; i += THREADS) {
        const float x = logits[i] / draw.temperature;
        if (x >= bound && x > -INFINITY) {
            const int at = atomicAdd(&count, 1);
            if (at < ROOM) keys[at] = key_of(x, i);
        }
    }
    __syncthreads();
    if (count > ROOM) {
        if (threadIdx.x == 0) chosen[blockIdx.x] = -1;
        return;
    }
    int n = 32;
    while (n < count) n *= 2;
    sort(keys, n);
    // The k largest and those equal to the last of them.
    const float last = value_of(keys[min(k, count) - 1]);
    if (threadIdx.x == 0) kept = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS) {
        if (value_of(keys[i]) >= last) atomicMax(&kept, i + 1);
        p[i] = expf(value_of(keys[i]) - value_of(keys[0]));
    }
    __syncthreads();
    n = kept;
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
    if (threadIdx.x == 0) chosen[blockIdx.x] = int(best) - 1;
}
