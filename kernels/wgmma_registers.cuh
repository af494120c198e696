// Warpgroup products of Hopper (sm_90a) whose first operand comes from registers: m64 nN k16, float32 accumulators.
#pragma once
#include "wgmma.cuh"

// c = a b + (accumulate ? c : 0), a: 64 lines, of which warp w of the warpgroup holds 16 w to 16 w + 15 as a fragment of
// mma.m16n8k16; b, c: as for multiply_tiles. The registers of a and c are the product's until it has been waited for.
template <int N>
static __device__ __forceinline__ void multiply_fragments(float (&c)[N / 2], const u32 (&a)[4], u64 b, bool accumulate);

#define DEFINE_MULTIPLY_FRAGMENTS(N, HALF, A0, A1, A2, A3, B, P)                                                            \
    template <>                                                                                                             \
    __device__ __forceinline__ void multiply_fragments<N>(float (&c)[HALF], const u32 (&a)[4], u64 b, bool accumulate) {    \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #P ", 0;\n\t"                                                 \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGS_##HALF "}, "                         \
                     "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, 0;\n\t}"                                  \
                     : ACC_##HALF                                                                                           \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate));                           \
    }

DEFINE_MULTIPLY_FRAGMENTS(8, 4, 4, 5, 6, 7, 8, 9)
DEFINE_MULTIPLY_FRAGMENTS(16, 8, 8, 9, 10, 11, 12, 13)
DEFINE_MULTIPLY_FRAGMENTS(32, 16, 16, 17, 18, 19, 20, 21)
DEFINE_MULTIPLY_FRAGMENTS(64, 32, 32, 33, 34, 35, 36, 37)
