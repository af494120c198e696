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

// Four neighbouring columns' squares, in the lane that has the last two (t odd).
__device__ __forceinline__ float vector_squares(u32 pair) {
    const float low = low_of(pair), high = high_of(pair);
    const float first = __fmaf_rn(high, high, __fmul_rn(low, low));
    return __fmaf_rn(high, high, __fmaf_rn(low, low, __shfl_xor_sync(0xffffffffu, first, 1)));
}

// Vectors j, j + STEP, j + 2 STEP, ...: depth first, so that few sums wait for others.
template <int J, int STEP>
__device__ __forceinline__ float tree_of_squares(const u32 (&pairs)[HEAD_PAIRS], int half) {
    if constexpr (STEP == HEAD / 8)
        return vector_squares(pairs[2 * J + half]);
    else
        return __fadd_rn(tree_of_squares<J, 2 * STEP>(pairs, half), tree_of_squares<J + STEP, 2 * STEP>(pairs, half));
}

// Of row g (half 0) or g + 8 (half 1); every lane returns its row's. Columns 8 j ... 8 j + 7 are simulated threads 2 j and 2 j + 1,
// in lanes t = 0, 1 and 2, 3.
__device__ __forceinline__ float sum_of_squares(const u32 (&pairs)[HEAD_PAIRS], int half) {
    float sum = tree_of_squares<0, 1>(pairs, half);
    sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 2));
    const float other = __shfl_xor_sync(0xffffffffu, sum, 1);
    return threadIdx.x & 1 ? sum : other;
}

// Rows g (half 0) or g + 8 (half 1), by the factor r of the norm. weights: the 128 weights in shared memory, aligned to 16 bytes.
__device__ __forceinline__ void weigh_rows(u32 (&pairs)[HEAD_PAIRS], int half, u32 weights, float r) {
#pragma unroll
    for (int four = 0; four < 4; ++four) {
        u32 w[4];  // matrices whose eight rows are the same eight weights
        load_matrices(w, weights + (4 * four + (threadIdx.x & 31) / 8) * 16);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            u32& pair = pairs[8 * four + 2 * j + half];
            pair = weighted<u16>(Pack<u16, 2>{{pair}}, Pack<u16, 2>{{w[j]}}, r).pairs[0];
        }
    }
}

// own, other: the same rows and columns of a half of the head and of the other half; upper: own is the second half.
__device__ __forceinline__ u32 rotated_pair(u32 own, u32 other, u32 cos, u32 sin, bool upper) {
    return add_pairs(multiply_pairs(own, cos), multiply_pairs(other, upper ? sin : sin ^ 0x80008000u));
}
