// add: y[i] = x[i] + residual[i] in float32, rounded to bfloat16 unless Y_FLOAT32. x and residual are float32 where X_FLOAT32,
// RESIDUAL_FLOAT32, else bfloat16; all contiguous. 1-D grid, grid-stride loop, any count.
#include "elements.cuh"
#include "launches.cuh"

typedef Element<X_FLOAT32 != 0>::type X;
typedef Element<RESIDUAL_FLOAT32 != 0>::type Residual;
typedef Element<Y_FLOAT32 != 0>::type Y;

struct Arguments {
    const X* x;
    const Residual* residual;
    Y* y;
    long long count;
};

__device__ __forceinline__ void store_one(u16* y, float v) { *y = (u16)round_pair(v, 0.0f); }
__device__ __forceinline__ void store_one(float* y, float v) { *y = v; }

extern "C" __global__ void __launch_bounds__(256) add(const __grid_constant__ Arguments a) {
    let_next_kernel_begin();
    wait_for_previous_kernel();
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < a.count; i += stride)
        store_one(a.y + i, __fadd_rn(widen(a.x[i]), widen(a.residual[i])));
}
