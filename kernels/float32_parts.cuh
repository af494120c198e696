// A float32 as three bfloat16 whose exact sum it is.
//
// hi = bf16(x), mid = bf16(x - hi), lo = bf16(x - hi - mid), to nearest even; both subtractions are exact in float32. Where
// rounding would overflow, hi is the largest finite bfloat16. NaN (as 0x7FFF) and infinities go to hi, with mid = lo = +0.
// Exact for multiples of 2^-133, so for every |x| >= 2^-110; elsewhere the nearest multiple of 2^-133.
#pragma once
#include "bf16.cuh"

CUFUSE_INLINE u16 nearest_finite(float x) {
    const u16 code = round_nearest_even(__float_as_uint(x));
    return (code & 0x7FFF) == 0x7F80 ? code - 1 : code;
}

CUFUSE_INLINE float widen(u16 code) { return __uint_as_float((u32)code << 16); }

struct Parts {
    u16 hi, mid, lo;
};

CUFUSE_INLINE Parts parts_of(float x) {
    const u32 bits = __float_as_uint(x);
    u16 hi, mid = 0, lo = 0;
    if ((bits & 0x7FFFFFFFu) >= FLOAT32_INFINITY) {
        hi = round_nearest_even(bits);
    } else {
        hi = nearest_finite(x);
        const float after_hi = x - widen(hi);
        mid = nearest_finite(after_hi);
        lo = nearest_finite(after_hi - widen(mid));
    }
    return {hi, mid, lo};
}
