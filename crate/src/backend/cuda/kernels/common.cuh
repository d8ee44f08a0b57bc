// What all kernels share: numbers of three widths, vectors of 16 bytes, sums over a block.
#pragma once
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using f16 = __half;
using bf16 = __nv_bfloat16;

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_f32(bf16 x) { return __bfloat162float(x); }
template <typename T> __device__ __forceinline__ T from_f32(float x);
template <> __device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <> __device__ __forceinline__ f16 from_f32<f16>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bf16 from_f32<bf16>(float x) { return __float2bfloat16_rn(x); }

// Tells the host a number: build.rs reads it from the compiled file, as a constant of the file's name in Rust. So tile
// sizes and the sizes of shared structs stand in one place.
#define TELL(NAME, VALUE) extern "C" { __device__ int tell_##NAME = VALUE; }

// A kernel may be launched before the one in front of it has ended (programmatic dependent launch): it lets the next one
// come as early, and waits here for what the one in front has written. A kernel that begins with this, or with its two
// halves around what depends on nothing, is launched so: build.rs finds it in the compiled file.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void begin() {
    let_next_start();
    wait_for_previous();
}

// N neighbours, read and written at once.
template <typename T, int N> struct alignas(sizeof(T) * N) Vec {
    T v[N];
};

template <int N, typename T> __device__ __forceinline__ void load(float (&out)[N], const T *from) {
    if constexpr (N == 8 && sizeof(T) == 4) {
        const Vec<T, 4> a = reinterpret_cast<const Vec<T, 4> *>(from)[0], b = reinterpret_cast<const Vec<T, 4> *>(from)[1];
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = to_f32(a.v[i]), out[4 + i] = to_f32(b.v[i]);
    } else {
        const Vec<T, N> a = *reinterpret_cast<const Vec<T, N> *>(from);
#pragma unroll
        for (int i = 0; i < N; i++) out[i] = to_f32(a.v[i]);
    }
}

template <int N, typename T> __device__ __forceinline__ void store(T *to, const float (&x)[N]) {
    if constexpr (N == 8 && sizeof(T) == 4) {
        Vec<T, 4> a, b;
#pragma unroll
        for (int i = 0; i < 4; i++) a.v[i] = from_f32<T>(x[i]), b.v[i] = from_f32<T>(x[4 + i]);
        reinterpret_cast<Vec<T, 4> *>(to)[0] = a, reinterpret_cast<Vec<T, 4> *>(to)[1] = b;
    } else {
        Vec<T, N> a;
#pragma unroll
        for (int i = 0; i < N; i++) a.v[i] = from_f32<T>(x[i]);
        *reinterpret_cast<Vec<T, N> *>(to) = a;
    }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// The sums of N values over all threads of a block of at most 1024; every thread gets them.
template <int N> __device__ __forceinline__ void block_sum(float (&x)[N]) {
    __shared__ float part[32][N];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = warp_sum(x[i]);
    __syncthreads(); // an earlier sum may still be read
    if (lane == 0)
#pragma unroll
        for (int i = 0; i < N; i++) part[warp][i] = x[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = warp_sum(lane < warps ? part[lane][i] : 0.f);
}

// One name a dtype: `name_f32`, `name_f16`, `name_bf16`.
#define FOR_DTYPES(DEFINE) DEFINE(f32, float) DEFINE(f16, f16) DEFINE(bf16, bf16)
