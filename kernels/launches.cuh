// Programmatic dependent launch: kernels of a stream that begin before the one in front of them has ended (sm_90 on; nothing
// on older targets). An ordinary launch waits for nothing here; but it, too, may let a dependent behind it begin.
//
// A kernel of a chain waits before it touches what others write (but to ask for it into the L2 cache), in every block, also in one
// that has nothing to do: then a kernel that has ended says that all before it have.
#pragma once
#include "bf16.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// Until the kernels before this one have ended and their writes can be seen.
CUFUSE_INLINE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" : : : "memory"); }
// This block's leave for the next kernel to begin.
CUFUSE_INLINE void let_next_kernel_begin() { asm volatile("griddepcontrol.launch_dependents;" : : : "memory"); }
// The line of an address into the L2 cache alone, through which all accesses go whoever makes them: no result depends on it, so
// that it may be asked for before what lies there has been written.
CUFUSE_INLINE void prefetch_line(const void* global) { asm volatile("prefetch.global.L2 [%0];" : : "l"(global) : "memory"); }
#else
CUFUSE_INLINE void prefetch_line(const void*) {}
CUFUSE_INLINE void wait_for_previous_kernel() {}
CUFUSE_INLINE void let_next_kernel_begin() {}
#endif

// The beginning of a kernel that may be such a launch. With weights that may be read early the next kernel's may be as well. Without,
// the next one begins when all before this one have ended, so that what they wrote is there for it, whatever it reads early.
CUFUSE_INLINE void begin_as_dependent(bool weights_ready) {
    if (!weights_ready) wait_for_previous_kernel();
    let_next_kernel_begin();
}
