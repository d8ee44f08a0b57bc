// BLOOM's gelu, 0.5 x (1 + tanh(0.79788456 x (1 + 0.044715 x^2))).
#pragma once
#include "common.cuh"

__device__ __forceinline__ float inner(float x) { return 0.79788456f * x * (1.f + 0.044715f * x * x); }

// tanh by exp: within 2 ulp of f32 where it matters, and NaN stays NaN.
__device__ __forceinline__ float tanh_fast(float x) {
    const float e = __expf(2.f * fminf(fabsf(x), 10.f));
    return isnan(x) ? x : copysignf(1.f - 2.f / (e + 1.f), x);
}

__device__ __forceinline__ float gelu_of(float x) { return 0.5f * x * (1.f + tanh_fast(inner(x))); }
