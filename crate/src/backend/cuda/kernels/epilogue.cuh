// What stands behind a product of few rows.
#pragma once
#include "common.cuh"
#include "gelu.cuh"

// y[m, n] = x W^T + bias + alpha u B^T + c, then gelu when asked. u [m, r] f32 is A x of a LoRA adapter, B
// [n, r] f32 its other half; any of bias, u, c may be null. c is y's dtype.
template <typename T, typename Out> struct Epilogue {
    const T *bias;
    const float *u, *b;
    float alpha;
    int rank;
    const Out *c;
    int gelu;
    // What is added to the sum of row `m` of y, column `n`; `ld` numbers from row to row.
    __device__ __forceinline__ float beside(int m, int n, int64_t ld) const {
        float own = bias ? to_f32(bias[n]) : 0.f;
        if (u) {
            float lora = 0;
            for (int r = 0; r < rank; r++) lora += u[m * rank + r] * b[int64_t(n) * rank + r];
            own += alpha * lora;
        }
        return c ? own + to_f32(c[m * ld + n]) : own;
    }
    __device__ __forceinline__ Out done(float y) const { return from_f32<Out>(gelu ? gelu_of(y) : y); }
};
