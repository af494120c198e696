// The exponential of a recipe. EXACT_EXPONENTIAL 0: CUDA's expf (compiled without fast math: a range reduction by fused
// multiply-adds around ex2.approx); 1: that of float64, rounded to float32.
#pragma once

__device__ __forceinline__ float exponential(float x) {
#if EXACT_EXPONENTIAL
    return (float)exp((double)x);
#else
    return expf(x);
#endif
}
