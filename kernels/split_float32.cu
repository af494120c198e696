// split_float32: every float32 of x[M, K] as three bfloat16 whose exact sum it is, laid out for linear_sm80's PARTS = 3.
//
// hi = bf16(x), mid = bf16(x - hi), lo = bf16(x - hi - mid), to nearest even; both subtractions are exact in float32. Where
// rounding would overflow, hi is the largest finite bfloat16. NaN (as 0x7FFF) and infinities go to hi, with mid = lo = +0.
// Exact for multiples of 2^-133, so for every |x| >= 2^-110; elsewhere the nearest multiple of 2^-133.
//
// x      [M, x_stride] float32, K values a row used
// parts  [M, 48 * ceil(K / 16)] bfloat16 bits: for each 16 k hi[16], mid[16], lo[16]; zeros past K
#include "bf16.cuh"

struct Arguments {
    const float* x;
    u16* parts;
    long long x_stride;
    int m, k;
};

static __device__ __forceinline__ u16 nearest_finite(float x) {
    const u16 code = round_nearest_even(__float_as_uint(x));
    return (code & 0x7FFF) == 0x7F80 ? code - 1 : code;
}

static __device__ __forceinline__ float widen(u16 code) { return __uint_as_float((u32)code << 16); }

extern "C" __global__ void __launch_bounds__(256) split_float32(const __grid_constant__ Arguments a) {
    const long long row_length = (a.k + 15) / 16 * 16, count = row_length * a.m;
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
        const long long row = i / row_length;
        const int k = (int)(i % row_length);
        const float x = k < a.k ? a.x[row * a.x_stride + k] : 0.0f;
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
        u16* group = a.parts + (row * row_length + k / 16 * 16) * 3 + k % 16;
        group[0] = hi;
        group[16] = mid;
        group[32] = lo;
    }
}
