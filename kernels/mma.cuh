// Warp-level pieces of a tensor-core product: shared-memory addresses, ldmatrix, mma.sync, asynchronous copies (sm_80 on).
#pragma once
#include "bf16.cuh"

CUFUSE_INLINE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// Rows of shared memory are 128 bytes wide (or a multiple): 16-byte unit u of row r lies at u ^ (r & 7) within its 128 bytes.
// Eight rows at one u then cover all 32 banks, for ldmatrix as for copies; TMA's 128-byte swizzle is the same pattern.
CUFUSE_INLINE u32 swizzled_unit(u32 unit, u32 row) { return unit ^ (row & 7u); }

// Four 8x8 matrices of bfloat16; lane l gives the address of row l % 8 of matrix l / 8.
CUFUSE_INLINE void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// c += a b: one tensor-core step over 16 values of k. a: 16 rows of m; b: 8 columns of n; lane = 4 g + t holds
// c[g][2t], c[g][2t+1], c[g+8][2t], c[g+8][2t+1].
CUFUSE_INLINE void multiply_accumulate(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Transpose an 8x8 matrix of bfloat16 that lies across the warp as one register of a fragment.
CUFUSE_INLINE u32 transpose_matrix(u32 r) {
    u32 d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(r));
    return d;
}

// 16 bytes from global to shared memory, past the L1 cache; bytes = 0 writes zeros and reads nothing.
CUFUSE_INLINE void copy_16_async(u32 shared, const void* global, u32 bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" : : "r"(shared), "l"(global), "r"(bytes) : "memory");
}

// 16 bytes from registers to shared memory.
CUFUSE_INLINE void store_16(u32 shared, const u32 (&words)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                 : : "r"(shared), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory");
}

CUFUSE_INLINE void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Until at most PENDING of this thread's groups of copies are unfinished.
template <int PENDING>
static __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

// Two accumulators rounded to bfloat16, to nearest even, the first in the lower half. One instruction; it gives the bits of
// pack_nearest_even, NaN as 0x7FFF included, which tests/test_gpu_linear.py checks for all 2^32 float32.
CUFUSE_INLINE u32 pack_bf16(float low, float high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
