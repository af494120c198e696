// sum_slices: out[i] = slices[0][i] + slices[1][i] + ... in float32, first to last, i < count; then rounded once to bfloat16
// (nearest even) unless out_float32. Each addition rounds to nearest even.
//
// slices [S, count] float32, out [count]
#include "bf16.cuh"

struct Arguments {
    const float* slices;
    void* out;
    long long count;
    int slice_count;
    int out_float32;
};

extern "C" __global__ void __launch_bounds__(256) sum_slices(const __grid_constant__ Arguments a) {
    const long long stride = gridDim.x * 256ll;
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < a.count; i += stride) {
        float sum = a.slices[i];
        for (int s = 1; s < a.slice_count; ++s) sum = __fadd_rn(sum, a.slices[s * a.count + i]);
        if (a.out_float32)
            ((float*)a.out)[i] = sum;
        else
            ((u16*)a.out)[i] = round_nearest_even(__float_as_uint(sum));
    }
}
