// Activations in the form that products with quantised weights read: rows padded with zeros, float32 split into three parts.
//
// bfloat16: out[m, k] = x[m, k]. float32 (FLOAT32 1): for each sixteen of k hi[16], mid[16], lo[16], whose exact sum is x:
// hi = bf16(x), mid = bf16(x - hi), lo = bf16(x - hi - mid), to nearest even; both subtractions are exact in float32. Where rounding
// would overflow, hi is the largest finite bfloat16. NaN (as 0x7FFF) and infinities go to hi, with mid = lo = +0.
//
// x    [m, x_stride] bfloat16 bits or float32, k values a row used
// out  [m, padded] bfloat16 bits, or [m, 3 * padded]; padded is a multiple of 16; zeros from k on
#include "bf16.cuh"

#if FLOAT32
typedef float Input;
#else
typedef u16 Input;
#endif

struct Arguments {
    const Input* x;
    u16* out;
    long long x_stride;
    int m, k, padded;
};

static __device__ __forceinline__ u16 nearest_finite(float x) {
    const u16 code = round_nearest_even(__float_as_uint(x));
    return (code & 0x7FFF) == 0x7F80 ? code - 1 : code;
}

static __device__ __forceinline__ float widen(u16 code) { return __uint_as_float((u32)code << 16); }

extern "C" __global__ void __launch_bounds__(256) quantised_activations(const __grid_constant__ Arguments a) {
    const long long count = (long long)a.padded * a.m;
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
        const long long row = i / a.padded;
        const int k = (int)(i % a.padded);
        const Input x = k < a.k ? a.x[row * a.x_stride + k] : (Input)0;
#if FLOAT32
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
        u16* sixteen = a.out + (row * a.padded + k / 16 * 16) * 3 + k % 16;
        sixteen[0] = hi, sixteen[16] = mid, sixteen[32] = lo;
#else
        a.out[i] = x;
#endif
    }
}
