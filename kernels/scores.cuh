// A score of attention from its accumulator on: ROUND_SCORES, ROUND_SCALED: rounding points; SCORES_FLOAT32: stored as float32.
#pragma once
#include "bf16.cuh"

__device__ __forceinline__ float wide(u16 code) { return __uint_as_float((u32)code << 16); }

__device__ __forceinline__ float rounded(float v) { return wide(round_nearest_even(__float_as_uint(v))); }

// Rounded, scaled, masked, stored.
__device__ __forceinline__ void finish(void* scores, float s, float scale, bool hidden, long long at) {
    if (ROUND_SCORES) s = rounded(s);
    s = __fmul_rn(s, scale);
    if (ROUND_SCALED) s = rounded(s);
    s = __fadd_rn(s, hidden ? __uint_as_float(0xFF7F0000u) : 0.0f);
#if SCORES_FLOAT32
    ((float*)scores)[at] = s;
#else
    ((u16*)scores)[at] = round_nearest_even(__float_as_uint(s));
#endif
}
