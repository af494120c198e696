// Stands in for kernels/wgmma_registers.cuh.
#pragma once
#include "kernel.h"
namespace host {
void multiply_fragments(float* c, int columns, const u32 (&a)[4], u64 b, int accumulate);
}
template <int N>
inline void multiply_fragments(float (&c)[N / 2], const u32 (&a)[4], u64 b, bool accumulate) {
    host::multiply_fragments(c, N, a, b, accumulate);
}
