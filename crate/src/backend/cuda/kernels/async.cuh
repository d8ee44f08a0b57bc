// Copies to shared memory that go on while the thread does, in groups.
#pragma once
#include <cstdint>

__device__ __forceinline__ uint32_t shared_address(const void *p) { return uint32_t(__cvta_generic_to_shared(p)); }

// BYTES, 4 or 16.
template <int BYTES> __device__ __forceinline__ void send(void *to, const void *from) {
    if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from));
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from));
}
// The same, or zeros; `from` must be an address that may be read.
template <int BYTES> __device__ __forceinline__ void send(void *to, const void *from, bool there) {
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 4 : 0));
}
// What was sent since the last time is a group.
__device__ __forceinline__ void sent() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the `BEHIND` groups sent last are there, for what this thread has sent.
template <int BEHIND> __device__ __forceinline__ void landed() { asm volatile("cp.async.wait_group %0;" ::"n"(BEHIND) : "memory"); }
