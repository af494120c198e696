// swiglu: y = a * up with a = gate / (1 + exp(-gate)); without `up` y = a (silu).
//
// All in float32, the division rounded correctly, the exponential that of exponential.cuh; a is rounded to bfloat16 where
// ROUND_ACTIVATED, y unless Y_FLOAT32. Subnormals are kept.
// Layouts: gate, up [rows, columns] with rows gate_row and up_row elements apart, y [rows, columns] contiguous; gate and up
// float32 where X_FLOAT32, else bfloat16. 1-D grid, grid-stride loop, any count.
#include "elements.cuh"
#include "exponential.cuh"
#include "launches.cuh"

typedef Element<X_FLOAT32 != 0>::type X;
typedef Element<Y_FLOAT32 != 0>::type Y;

struct Arguments {
    const X* gate;
    const X* up;
    Y* y;
    long long count, gate_row, up_row;
    int columns;
};

__device__ __forceinline__ float rounded(float v) { return low_of(round_pair(v, 0.0f)); }
__device__ __forceinline__ void store_one(u16* y, float v) { *y = (u16)round_pair(v, 0.0f); }
__device__ __forceinline__ void store_one(float* y, float v) { *y = v; }

extern "C" __global__ void __launch_bounds__(256) swiglu(const __grid_constant__ Arguments a) {
    let_next_kernel_begin();
    wait_for_previous_kernel();
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < a.count; i += stride) {
        const long long row = i / a.columns;
        const int column = (int)(i - row * a.columns);
        const float gate = widen(a.gate[row * a.gate_row + column]);
        float y = __fdiv_rn(gate, __fadd_rn(1.0f, exponential(-gate)));
        if (ROUND_ACTIVATED) y = rounded(y);
        if (a.up) y = __fmul_rn(y, widen(a.up[row * a.up_row + column]));
        store_one(a.y + i, y);
    }
}
