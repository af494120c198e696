// Activations in the form that products with quantised weights read: rows padded with zeros, float32 split into three parts.
//
// bfloat16: out[m, k] = x[m, k]. float32 (FLOAT32 1): for each sixteen of k hi[16], mid[16], lo[16], whose sum is x
// (float32_parts.cuh).
//
// x    [m, x_stride] bfloat16 bits or float32, k values a row used
// out  [m, padded] bfloat16 bits, or [m, 3 * padded]; padded is a multiple of 16; zeros from k on
#include "float32_parts.cuh"

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

extern "C" __global__ void __launch_bounds__(256) quantised_activations(const __grid_constant__ Arguments a) {
    const long long count = (long long)a.padded * a.m;
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
        const long long row = i / a.padded;
        const int k = (int)(i % a.padded);
        const Input x = k < a.k ? a.x[row * a.x_stride + k] : (Input)0;
#if FLOAT32
        const Parts parts = parts_of(x);
        u16* sixteen = a.out + (row * a.padded + k / 16 * 16) * 3 + k % 16;
        sixteen[0] = parts.hi, sixteen[16] = parts.mid, sixteen[32] = parts.lo;
#else
        a.out[i] = x;
#endif
    }
}
