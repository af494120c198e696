// What an RMSNorm does after the sum of squares, in the recipe's roundings. To be included with sums.cuh's macros and
//
//   MEAN_DIVIDE 0       m = s * mean_operand: PyTorch's factor, or float32(1 / K)
//   MEAN_DIVIDE 1       m = s / mean_operand: K as float32; rounded to nearest
//                       (CHAIN_MOMENTS: what comes is the mean already; mean_operand unused)
//   RSQRT_CORRECT       r = rsqrt(m + eps): 0 rsqrt.approx.f32; 1 rounded to nearest
//   ROUND_NORMALISED    h = x * r: 1 rounded to bfloat16
//   WEIGHT_OFFSET       y = h * (w + WEIGHT_OFFSET), the sum rounded to float32; where it is not defined y = h * w
#pragma once
#include "sums.cuh"

__device__ __forceinline__ float reciprocal_root(float sum, float mean_operand, float eps) {
    float m = sum;
    if (SUM_CHAINS != CHAIN_MOMENTS) m = MEAN_DIVIDE ? __fdiv_rn(m, mean_operand) : __fmul_rn(m, mean_operand);
    const float variance = __fadd_rn(m, eps);
    return RSQRT_CORRECT ? __frsqrt_rn(variance) : rsqrtf(variance);
}

#ifdef WEIGHT_OFFSET
constexpr bool WEIGHT_AS_IT_IS = false;
#else
constexpr bool WEIGHT_AS_IT_IS = true;
#define WEIGHT_OFFSET 0.0f
#endif

// y of N neighbouring elements, rounded if Y is bfloat16
template <class Y, class Z, class W, int N>
__device__ __forceinline__ Pack<Y, N> weighted(const Pack<Z, N>& z, const Pack<W, N>& weight, float r) {
    float v[N];
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __fmul_rn(z.at(i), r);
    if constexpr (ROUND_NORMALISED && WEIGHT_AS_IT_IS && sizeof(W) == 2 && sizeof(Y) == 2 && N > 1) {
        Pack<Y, N> y = pack(v, Y());
#pragma unroll
        for (int i = 0; i < N / 2; ++i) y.pairs[i] = multiply_pairs(y.pairs[i], weight.pairs[i]);
        return y;
    } else {
        if (ROUND_NORMALISED) round_in_place(v);
#pragma unroll
        for (int i = 0; i < N; ++i)
            v[i] = __fmul_rn(v[i], WEIGHT_AS_IT_IS ? weight.at(i) : __fadd_rn(weight.at(i), WEIGHT_OFFSET));
        return pack(v, Y());
    }
}
