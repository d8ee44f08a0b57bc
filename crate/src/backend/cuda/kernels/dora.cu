// What DoRA (arXiv:2402.09353) adds to LoRA: the lengths of the rows of W + s B A, and columns scaled by them.
// Oracle: backend/cpu/dora.rs.
#include "common.cuh"

// gram[i][j] = A_i . A_j; a block an entry.
extern "C" __global__ void __launch_bounds__(256) dora_gram(const float *a, float *gram, int k) {
    begin();
    const float *x = a + int64_t(blockIdx.x) * k, *y = a + int64_t(blockIdx.y) * k;
    float sum[1] = {};
    for (int i = threadIdx.x; i < k; i += blockDim.x) sum[0] += x[i] * y[i];
    block_sum(sum);
    if (threadIdx.x == 0) gram[blockIdx.x * gridDim.y + blockIdx.y] = sum[0];
}

// norms[j] = |W_j + s B_j A| of |W_j|^2, wa [r][columns >= n] = A W^T, and gram; a thread a row of W.
extern "C" __global__ void __launch_bounds__(256)
    dora_norms(const float *norms2, const float *wa, const float *gram, const float *b, float *norms, float s, int n, int columns, int r) {
    begin();
    const int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= n) return;
    const float *own = b + int64_t(j) * r;
    float mixed = 0, update = 0;
    for (int i = 0; i < r; i++) {
        mixed += own[i] * wa[int64_t(i) * columns + j];
        float row = 0;
        for (int l = 0; l < r; l++) row += own[l] * gram[i * r + l];
        update += own[i] * row;
    }
    norms[j] = sqrtf(norms2[j] + 2 * s * mixed + s * s * update);
}

// y = z * magnitude / norms + bias + c, the last two where they are not null.
template <typename T>
__device__ __forceinline__ void scale(const T *z, const float *magnitude, const float *norms, const T *bias, const T *c, T *y,
                                      long long count, int n) {
    begin();
    const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    const int j = at % n;
    float x = to_f32(z[at]) * (magnitude[j] / norms[j]);
    if (bias != nullptr) x += to_f32(bias[j]);
    if (c != nullptr) x += to_f32(c[at]);
    y[at] = from_f32<T>(x);
}

// dz = dy * magnitude / norms; grad += by * the column sums of dy * z / norms. A block has COLUMNS columns, every row.
constexpr int COLUMNS = 32, LANES = 8;
TELL(COLUMNS, COLUMNS)
template <typename T>
__device__ __forceinline__ void scale_backward(const T *dy, const T *z, const float *magnitude, const float *norms, T *dz,
                                               float *grad, const float *by, int m, int n) {
    begin();
    __shared__ float sums[LANES][COLUMNS];
    const int c = threadIdx.x % COLUMNS, lane = threadIdx.x / COLUMNS, j = blockIdx.x * COLUMNS + c;
    float sum = 0;
    if (j < n) {
        const float factor = magnitude[j] / norms[j];
        for (int i = lane; i < m; i += LANES) {
            const long long at = (long long)i * n + j;
            const float d = to_f32(dy[at]);
            sum += d * to_f32(z[at]);
            dz[at] = from_f32<T>(d * factor);
        }
    }
    sums[lane][c] = sum;
    __syncthreads();
    if (lane == 0 && j < n) {
        float all = 0;
        for (int l = 0; l < LANES; l++) all += sums[l][c];
        grad[j] += all / norms[j] * *by;
    }
}

#define DEFINE(NAME, T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        scale_columns_##NAME(const T *z, const float *magnitude, const float *norms, const T *bias, const T *c, T *y,  \
                             long long count, int n) {                                                                 \
        scale(z, magnitude, norms, bias, c, y, count, n);                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        scale_columns_backward_##NAME(const T *dy, const T *z, const float *magnitude, const float *norms, T *dz,      \
                                      float *grad, const float *by, int m, int n) {                                    \
        scale_backward(dy, z, magnitude, norms, dz, grad, by, m, n);                                                   \
    }
FOR_DTYPES(DEFINE)
