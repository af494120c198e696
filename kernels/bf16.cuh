// bfloat16 as bits: casts in every rounding mode, integer arithmetic only.
//
// A bfloat16 is the upper half of a float32. Adding to the magnitude and cutting off the lower half rounds: the carry goes
// into the kept half exactly where the mode rounds away from zero, from the largest finite code into infinity too.
// No floating-point operation is used, so flags (ftz, fmad) and the processor's rounding mode cannot change anything.
// NaN of either sign and any payload becomes 0x7FFF, as CUDA's __float2bfloat16_rn gives.
//
// Compiles under NVRTC and under a C++ compiler: tests run the same text on the host.
#pragma once

#if defined(__CUDACC__)
#define CUFUSE_INLINE static __device__ __forceinline__
#else
#define CUFUSE_INLINE static inline
#endif

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// numbers as in cufuse.bf16.ROUNDING_MODES
enum RoundingMode { NEAREST_EVEN = 0, NEAREST_AWAY = 1, TOWARD_ZERO = 2, UP = 3, DOWN = 4, STOCHASTIC = 5 };

#define BF16_NAN 0x7FFFu
#define FLOAT32_INFINITY 0x7F800000u

// float32 bits -> bfloat16 bits. random: 16 bits, for STOCHASTIC alone.
CUFUSE_INLINE u16 round_float32(u32 bits, int mode, u32 random) {
    const u32 magnitude = bits & 0x7FFFFFFFu;
    const u32 negative = bits >> 31;
    u32 addend = 0;
    if (mode == NEAREST_EVEN) addend = 0x7FFFu + ((magnitude >> 16) & 1u);
    if (mode == NEAREST_AWAY) addend = 0x8000u;
    if (mode == UP) addend = negative ? 0u : 0xFFFFu;
    if (mode == DOWN) addend = negative ? 0xFFFFu : 0u;
    if (mode == STOCHASTIC) addend = random & 0xFFFFu;
    if (magnitude > FLOAT32_INFINITY) return (u16)BF16_NAN;
    return (u16)(((magnitude + addend) >> 16) | (negative << 15));
}

CUFUSE_INLINE u16 round_nearest_even(u32 bits) { return round_float32(bits, NEAREST_EVEN, 0); }

// float64 bits -> float32 bits, toward zero, with the last bit set where anything was cut off ("round to odd"). An odd last
// bit is neither a bfloat16 nor a tie between two, so that rounding the result once more equals rounding the float64 once
// (Boldo and Melquiond 2005: 24 >= 8 + 2 significand bits). Finite values beyond float32 give its largest (odd) one.
CUFUSE_INLINE u32 float64_to_odd_float32(u64 bits) {
    const u32 sign = (u32)(bits >> 63) << 31;
    const int exponent = (int)((bits >> 52) & 0x7FFu) - 1023;
    const u64 fraction = bits & 0xFFFFFFFFFFFFFull;
    if (exponent == 1024) return sign | (fraction ? 0x7FFFFFFFu : FLOAT32_INFINITY);
    if (exponent > 127) return sign | 0x7F7FFFFFu;
    if (exponent >= -126) {
        const u32 kept = ((u32)(exponent + 127) << 23) | (u32)(fraction >> 29);
        return sign | kept | ((fraction & 0x1FFFFFFFull) != 0);
    }
    if (exponent < -150) return sign | ((bits << 1) != 0);  // below half the smallest subnormal: only the sticky bit is left
    const u64 significand = fraction | (1ull << 52);
    const int shift = 29 + (-126 - exponent);  // 30 to 53
    return sign | (u32)(significand >> shift) | ((significand & ((1ull << shift) - 1)) != 0);
}

// float64 bits -> bfloat16 bits; random: 32 bits. The discarded fraction of an ulp is truncated to 32 bits and random added:
// a carry rounds the magnitude up. From 2^128 on the result is infinity.
CUFUSE_INLINE u16 round_float64_stochastic(u64 bits, u32 random) {
    const u16 sign = (u16)((bits >> 63) << 15);
    const int exponent = (int)((bits >> 52) & 0x7FFu) - 1023;
    const u64 fraction = bits & 0xFFFFFFFFFFFFFull;
    if (exponent == 1024 && fraction) return (u16)BF16_NAN;
    if (exponent > 127) return (u16)(sign | 0x7F80u);
    u64 kept, rest;  // magnitude in units of an ulp: integer part, and the first 32 bits after it
    if (exponent >= -126) {
        kept = ((u64)(exponent + 127) << 7) | (fraction >> 45);
        rest = (fraction >> 13) & 0xFFFFFFFFull;
    } else {
        const u64 significand = exponent == -1023 ? 0 : fraction | (1ull << 52);  // float64 subnormals are far below 2^-32 ulp
        const int shift = 45 + (-126 - exponent);
        kept = shift < 64 ? significand >> shift : 0;
        rest = shift - 32 < 64 ? (significand >> (shift - 32)) & 0xFFFFFFFFull : 0;
    }
    return (u16)(sign | (u16)(kept + ((rest + random) >> 32)));
}

// float64 bits -> bfloat16 bits with one rounding. random: 32 bits, for STOCHASTIC alone.
CUFUSE_INLINE u16 round_float64(u64 bits, int mode, u32 random) {
    if (mode == STOCHASTIC) return round_float64_stochastic(bits, random);
    return round_float32(float64_to_odd_float32(bits), mode, 0);
}
