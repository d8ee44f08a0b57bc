// The gradients of all adapters at once, through a table of where they are.
#include "common.cuh"

struct Entry {
    float *grad;
    int64_t offset, count; // its place in the backup
};

extern "C" __global__ void grads_save(const Entry *table, float *backup) {
    begin();
    const Entry e = table[blockIdx.y];
    for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < e.count; i += gridDim.x * blockDim.x)
        backup[e.offset + i] = e.grad[i];
}

extern "C" __global__ void grads_restore(const Entry *table, const float *backup) {
    begin();
    const Entry e = table[blockIdx.y];
    for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < e.count; i += gridDim.x * blockDim.x)
        e.grad[i] = backup[e.offset + i];
}

// flag[0] becomes 1 where a gradient is NaN or infinite.
extern "C" __global__ void grads_check(const Entry *table, int *flag) {
    begin();
    const Entry e = table[blockIdx.y];
    bool bad = false;
    for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < e.count; i += gridDim.x * blockDim.x)
        bad |= !isfinite(e.grad[i]);
    if (bad) flag[0] = 1;
}
