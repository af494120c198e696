// Rotation of a head's element by the angle of its token, halves rotated.
//
//   a = x * c                              element i of a head with its own c
//   b = -x[i + D/2] * s, x[i - D/2] * s    for the first and the second half, each with its own s
//   y = bf16(a) + bf16(b)                  PRODUCTS_ROUNDED
//       fma(x, c, b)                       FUSED: a is not rounded, b to float32
//       a + b                              neither
//
// Every operation is float32 and rounded to nearest even.
#pragma once
#include "elements.cuh"

// other: -x[i + D/2] in the first half, x[i - D/2] in the second; or the sign is s's
template <bool PRODUCTS_ROUNDED, bool FUSED>
__device__ __forceinline__ float rotated(float x, float other, float c, float s) {
    static_assert(!(PRODUCTS_ROUNDED && FUSED), "a fused multiply-add has no product to round");
    const float b = __fmul_rn(other, s);
    if (FUSED) return __fmaf_rn(x, c, b);
    const float a = __fmul_rn(x, c);
    if (!PRODUCTS_ROUNDED) return __fadd_rn(a, b);
    const u32 codes = round_pair(a, b);
    return __fadd_rn(low_of(codes), high_of(codes));
}

// N entries of a table, rounded to bfloat16 where ROUNDED and they are not that already
template <bool ROUNDED, class T, int N>
__device__ __forceinline__ void read_table(float (&v)[N], const Pack<T, N>& values) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = values.at(i);
    if (ROUNDED && sizeof(T) == 4) round_in_place(v);
}
