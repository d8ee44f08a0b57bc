// Weights as a file holds them to the dtype of the model, and whether all are finite. Oracle: the loop in
// models/weights.rs.
#include "common.cuh"

constexpr int EACH = 8; // neighbours that a thread converts

// `bad` becomes ~index of the first element that is NaN or infinite, if that is more; `first` is the index of from[0].
// `to` may be nullptr: then they are only looked at.
template <typename From, typename To>
__device__ __forceinline__ void convert(const From *from, To *to, long long n, long long first,
                                        unsigned long long *bad) {
    const long long at = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * EACH;
    if (at >= n) return;
    const bool vectors = at + EACH <= n && (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % 16 == 0;
    float x[EACH];
    if (vectors) {
        load<EACH>(x, from + at);
    } else {
#pragma unroll
        for (int i = 0; i < EACH; i++) x[i] = at + i < n ? to_f32(from[at + i]) : 0.f;
    }
#pragma unroll
    for (int i = EACH - 1; i >= 0; i--)
        if (!isfinite(to_f32(from_f32<To>(x[i])))) atomicMax(bad, ~static_cast<unsigned long long>(first + at + i));
    if (to == nullptr) return;
    if (vectors) {
        store<EACH>(to + at, x);
    } else {
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (at + i < n) to[at + i] = from_f32<To>(x[i]);
    }
}

#define DEFINE(FROM, F, TO, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        convert_##FROM##_##TO(const F *from, T *to, long long n, long long first, unsigned long long *bad) {           \
        convert(from, to, n, first, bad);                                                                              \
    }
#define TO_ALL(FROM, F) DEFINE(FROM, F, f32, float) DEFINE(FROM, F, f16, f16) DEFINE(FROM, F, bf16, bf16)
FOR_DTYPES(TO_ALL)
