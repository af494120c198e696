// CUDA's float32 intrinsics on the host, each rounded once. To be compiled with -ffp-contract=off.
#pragma once
#include <cmath>
#include <cstring>

static_assert(sizeof(float) == 4 && __FLT_EVAL_METHOD__ == 0, "float32 operations must round to float32");

inline float __uint_as_float(unsigned bits) { float v; std::memcpy(&v, &bits, 4); return v; }
inline unsigned __float_as_uint(float v) { unsigned bits; std::memcpy(&bits, &v, 4); return bits; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frsqrt_rn(float v) { return (float)(1.0 / std::sqrt((double)v)); }
inline float rsqrtf(float v) { return __frsqrt_rn(v); }  // rsqrt.approx of a GPU differs by an ulp now and then
