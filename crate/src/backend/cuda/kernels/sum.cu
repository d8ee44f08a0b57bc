// Sums of matrices in one dtype, of a product that may be in another; with nothing to add a conversion.
// Oracle: the CPU's layers, and PyTorch's `to`.
#include "common.cuh"

constexpr int EACH = 8;

// y = from + bias (one row for all) + c, each where it is not null; c may be y.
template <typename From, typename T>
__device__ __forceinline__ void sum(const From *from, const T *bias, const T *c, T *y, long long n, int columns) {
    begin();
    const long long at = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * EACH;
    if (at >= n) return;
    const bool vectors = at + EACH <= n && (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(c) |
                                            reinterpret_cast<uintptr_t>(y)) % 16 == 0;
    float x[EACH], more[EACH];
    if (vectors) {
        load<EACH>(x, from + at);
        if (c != nullptr) load<EACH>(more, c + at);
    } else {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            x[i] = at + i < n ? to_f32(from[at + i]) : 0.f;
            more[i] = at + i < n && c != nullptr ? to_f32(c[at + i]) : 0.f;
        }
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (bias != nullptr && at + i < n) x[i] += to_f32(bias[(at + i) % columns]);
        if (c != nullptr) x[i] += more[i];
    }
    if (vectors) {
        store<EACH>(y + at, x);
    } else {
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (at + i < n) y[at + i] = from_f32<T>(x[i]);
    }
}

#define DEFINE(FROM, F, TO, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        sum_##FROM##_##TO(const F *from, const T *bias, const T *c, T *y, long long n, int columns) {                  \
        sum(from, bias, c, y, n, columns);                                                                             \
    }
#define TO_ALL(FROM, F) DEFINE(FROM, F, f32, float) DEFINE(FROM, F, f16, f16) DEFINE(FROM, F, bf16, bf16)
FOR_DTYPES(TO_ALL)
