// Rows of a table, and rows of a batch gathered and scattered back.
#include "common.cuh"

// out[i] = table[index[i]]; a negative index gives zeros. One block a row.
template <typename T> __device__ void rows(const T *table, const int *index, T *out, int c) {
    const int64_t row = blockIdx.x;
    const int from = index[row];
    const T *source = table + int64_t(from) * c;
    out += row * c;
    if (c % 8 == 0) {
        for (int i = threadIdx.x * 8; i < c; i += blockDim.x * 8) {
            Vec<T, 8> v = {};
            if (from >= 0) v = *reinterpret_cast<const Vec<T, 8> *>(source + i);
            *reinterpret_cast<Vec<T, 8> *>(out + i) = v;
        }
    } else {
        for (int i = threadIdx.x; i < c; i += blockDim.x) out[i] = from >= 0 ? source[i] : from_f32<T>(0.f);
    }
}

#define DEFINE(NAME, T)                                                                                  \
    extern "C" __global__ void rows_##NAME(const T *table, const int *index, T *out, int c) { begin(); rows(table, index, out, c); }
FOR_DTYPES(DEFINE)

// grad[ids[i]] += scale[0] * dx[i], for every row i whose id is not `padding`. A block takes the first row of an id and all
// the later ones of it, in their order, so that the sum is the same each time; a block of another row has nothing to do.
template <typename T>
__device__ void embedding_backward(const T *dx, const int *ids, float *grad, const float *scale, int rows, int c, int padding) {
    const int row = blockIdx.x, id = ids[row];
    bool again = id == padding;
    for (int i = threadIdx.x; i < row; i += blockDim.x) again |= ids[i] == id;
    if (__syncthreads_or(again)) return;
    grad += int64_t(id) * c;
    for (int i = row; i < rows; i++) {
        if (ids[i] != id) continue;
        const T *from = dx + int64_t(i) * c;
        for (int j = threadIdx.x; j < c; j += blockDim.x) grad[j] += scale[0] * to_f32(from[j]);
    }
}

#undef DEFINE
#define DEFINE(NAME, T)                                                                                            \
    extern "C" __global__ void embedding_backward_##NAME(const T *dx, const int *ids, float *grad, const float *scale, \
                                                         int rows, int c, int padding) {                              \
        begin();                                                                                                      \
        embedding_backward(dx, ids, grad, scale, rows, c, padding);                                                   \
    }
FOR_DTYPES(DEFINE)

// to[i] = from[i] for the first `count` of `all` numbers, then zeros: a table in another dtype, with rows of padding.
#undef DEFINE
#define DEFINE(NAME, T)                                                                                                \
    extern "C" __global__ void cast_table_##NAME(const float *from, T *to, long long count, long long all) {           \
        begin();                                                                                                      \
        const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;                                         \
        if (i < all) to[i] = from_f32<T>(i < count ? from[i] : 0.f);                                                   \
    }
FOR_DTYPES(DEFINE)

// The first `narrow` columns of rows of `wide`. A block takes 1024 of them.
extern "C" __global__ void copy_columns(const float *from, float *to, int wide, int narrow) {
    begin();
    const int64_t row = blockIdx.y;
    for (int i = blockIdx.x * 1024 + threadIdx.x; i < min(narrow, int(blockIdx.x + 1) * 1024); i += blockDim.x)
        to[row * narrow + i] = from[row * wide + i];
}
