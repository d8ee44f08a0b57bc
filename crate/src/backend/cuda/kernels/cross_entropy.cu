// Masked cross-entropy of rows of logits: the loss of each row, and its gradient as the matrix
// product that follows wants it. The logits are read twice and never written.
#include "common.cuh"

// losses[row] = logsumexp(logits) - logits[target]; grad = (softmax - onehot) * scale[0], zero in the
// padding. A row with a negative target gets loss 0 and gradient 0. One block a row.
template <typename T>
__device__ void loss_and_grad(const float *logits, const int *targets, float *losses, T *grad, const float *scale,
                              int vocab, int ld) {
    const int64_t row = blockIdx.x;
    const int target = targets[row];
    logits += row * ld;
    const int step = blockDim.x * 4, first = threadIdx.x * 4;
    if (target < 0) {
        if (threadIdx.x == 0) losses[row] = 0;
        if (grad)
            for (int i = first; i < ld; i += step) store(grad + row * ld + i, {0.f, 0.f, 0.f, 0.f});
        return;
    }
    // Each thread keeps the maximum of what it saw and the sum relative to it.
    float top = -INFINITY, sum = 0;
    for (int i = first; i < vocab; i += step) {
        float v[4];
        load(v, logits + i);
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (i + j < vocab) {
                if (v[j] > top) sum *= __expf(top - v[j]), top = v[j];
                sum += __expf(v[j] - top);
                if (isnan(v[j])) sum = NAN;
            }
    }
    __shared__ float tops[32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    float all = warp_max(top);
    if (lane == 0) tops[warp] = all;
    __syncthreads();
    all = warp_max(lane < warps ? tops[lane] : -INFINITY);
    float total[1] = {top == -INFINITY && !isnan(sum) ? 0.f : sum * __expf(top - all)};
    block_sum(total);
    if (threadIdx.x == 0) losses[row] = all + logf(total[0]) - logits[target];
    if (!grad) return;
    const float s = scale[0], by = s / total[0];
    for (int i = first; i < ld; i += step) {
        float v[4];
        load(v, logits + i);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            v[j] = i + j < vocab ? __expf(v[j] - all) * by : 0.f;
            if (i + j == target) v[j] -= s;
        }
        store(grad + row * ld + i, v);
    }
}

#define DEFINE(NAME, T)                                                                                               \
    extern "C" __global__ void cross_entropy_##NAME(const float *logits, const int *targets, float *losses, T *grad,  \
                                                    const float *scale, int vocab, int ld) {                          \
        begin();                                                                                                      \
        loss_and_grad(logits, targets, losses, grad, scale, vocab, ld);                                               \
    }
FOR_DTYPES(DEFINE)

// out[0] = the sum of n numbers, in f64 and always in the same order. One block of 256.
extern "C" __global__ void sum_f64(const float *x, double *out, int n) {
    begin();
    __shared__ double part[256];
    double sum = 0;
    for (int i = threadIdx.x; i < n; i += 256) sum += x[i];
    part[threadIdx.x] = sum;
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    }
    if (threadIdx.x == 0) out[0] = part[0];
}
