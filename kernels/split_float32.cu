// split_float32: every float32 of x[M, K] as three bfloat16 whose exact sum it is (float32_parts.cuh), laid out for linear_sm80's
// PARTS = 3.
//
// x      [M, x_stride] float32, K values a row used
// parts  [M, 48 * ceil(K / 16)] bfloat16 bits: for each 16 k hi[16], mid[16], lo[16]; zeros past K
#include "float32_parts.cuh"

struct Arguments {
    const float* x;
    u16* parts;
    long long x_stride;
    int m, k;
};

extern "C" __global__ void __launch_bounds__(256) split_float32(const __grid_constant__ Arguments a) {
    const long long row_length = (a.k + 15) / 16 * 16, count = row_length * a.m;
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
        const long long row = i / row_length;
        const int k = (int)(i % row_length);
        const float x = k < a.k ? a.x[row * a.x_stride + k] : 0.0f;
        const Parts parts = parts_of(x);
        u16* sixteen = a.parts + (row * row_length + k / 16 * 16) * 3 + k % 16;
        sixteen[0] = parts.hi, sixteen[16] = parts.mid, sixteen[32] = parts.lo;
    }
}
