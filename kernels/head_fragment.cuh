// Head norm and rotation of a head of 128 that lies in a warp's accumulator registers, rounded to bfloat16: 16 rows of 128
// columns. Lane 4 g + t holds, for every eight columns j, rows g and g + 8 at columns 8 j + 2 t and 8 j + 2 t + 1, as
// pairs[2 j] and pairs[2 j + 1].
//
// Sum of squares: 32 simulated threads with four neighbouring columns each, whose squares are added in order; then thread
// i += i + 16, 8, 4, 2, 1. That is sums.cuh's TREE_HALVE with one chain or with chains by position (a thread has one vector, so
// that the chains' join adds the same four squares in the same order), contracted or not: the square of a bfloat16 is exact in
// float32 from 2^-67 on, and a fused multiply-add then rounds what the addition alone would round. Smaller elements may change a
// sum below 2^-99 and no other, which is lost in m + eps where eps is 2^-80 or more.
//
// Norm: norm.cuh's macros; one bfloat16 weight for each column. Rotation: rotation.cuh with PRODUCTS_ROUNDED, bfloat16 tables.
#pragma once
#include "norm.cuh"

constexpr int HEAD = 128, HEAD_PAIRS = 32;
static_assert(COLUMNS == HEAD && SUM_THREADS == 32 && SUM_VECTOR == 4 && SUM_TREE == TREE_HALVE, "a vector is two lanes' pairs");
static_assert(SUM_CHAINS == CHAIN_ONE || SUM_CHAINS == CHAIN_BY_POSITION, "four squares in order");

// Of two lanes that hold four neighbouring columns between them, t even finishes row g and t odd row g + 8: one exchange for both.
struct OwnRow {
    bool odd;

    __device__ __forceinline__ OwnRow() : odd(threadIdx.x & 1) {}
    // Vector j's squares, in order. Columns 8 j ... 8 j + 7 are simulated threads 2 j and 2 j + 1, in lanes t = 0, 1 and 2, 3.
    __device__ __forceinline__ float squares(const u32 (&pairs)[HEAD_PAIRS], int j) const {
        const u32 kept = odd ? pairs[2 * j + 1] : pairs[2 * j];
        const u32 got = shuffle_xor(Pack<u16, 2>{{odd ? pairs[2 * j] : pairs[2 * j + 1]}}, 1).pairs[0];
        const u32 first = odd ? got : kept, second = odd ? kept : got;
        float sum = __fmul_rn(low_of(first), low_of(first));
        sum = __fmaf_rn(high_of(first), high_of(first), sum);
        sum = __fmaf_rn(low_of(second), low_of(second), sum);
        return __fmaf_rn(high_of(second), high_of(second), sum);
    }
    // Vectors j, j + STEP, j + 2 STEP, ...: depth first, so that few sums wait for others.
    template <int J, int STEP>
    __device__ __forceinline__ float tree(const u32 (&pairs)[HEAD_PAIRS]) const {
        if constexpr (STEP == HEAD / 8)
            return squares(pairs, J);
        else
            return __fadd_rn(tree<J, 2 * STEP>(pairs), tree<J + STEP, 2 * STEP>(pairs));
    }
    // Of this lane's row, from the sums of its even and its odd vectors.
    static __device__ __forceinline__ float joined(float even, float odd) {
        const float sum = __fadd_rn(even, odd);
        return __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 2));
    }
};

// Columns 64 half ... 64 half + 63 of both rows, by the norm's factor of this lane's own row, in the order of OwnRow. weights: the
// 128 weights in shared memory, aligned to 16 bytes.
__device__ __forceinline__ void weigh_columns(u32 (&pairs)[HEAD_PAIRS], int half, u32 weights, float own_factor) {
    const float other = __shfl_xor_sync(0xffffffffu, own_factor, 1);
    const bool odd = threadIdx.x & 1;
    const float factors[2] = {odd ? other : own_factor, odd ? own_factor : other};
#pragma unroll
    for (int four = 2 * half; four < 2 * half + 2; ++four) {
        u32 w[4];  // matrices whose eight rows are the same eight weights
        load_matrices(w, weights + (4 * four + (threadIdx.x & 31) / 8) * 16);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            u32& pair = pairs[8 * four + i];
            pair = weighted<u16>(Pack<u16, 2>{{pair}}, Pack<u16, 2>{{w[i / 2]}}, factors[i % 2]).pairs[0];
        }
    }
}

// own, other: the same rows and columns of a half of the head and of the other half; upper: own is the second half.
__device__ __forceinline__ u32 rotated_pair(u32 own, u32 other, u32 cos, u32 sin, bool upper) {
    return add_pairs(multiply_pairs(own, cos), multiply_pairs(other, upper ? sin : sin ^ 0x80008000u));
}
