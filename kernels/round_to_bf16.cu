// round_to_bf16: out[i] = x[i] rounded once to bfloat16, i < count.
//
// FLOAT64   x is float64 (0: float32)
// mode      a RoundingMode of bf16.cuh
// random    STOCHASTIC alone: one uint16 (float32) or uint32 (float64) for each element
// Values are read and written as bits; every step is integer arithmetic. 1-D grid, grid-stride loop, any count.
#include "bf16.cuh"

#if FLOAT64
typedef u64 Input;
typedef u32 Random;
#define ROUND round_float64
#else
typedef u32 Input;
typedef u16 Random;
#define ROUND round_float32
#endif

struct Arguments {
    const Input* x;
    const Random* random;
    u16* out;
    long long count;
    int mode;
};

extern "C" __global__ void __launch_bounds__(256) round_to_bf16(const __grid_constant__ Arguments a) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < a.count; i += stride)
        a.out[i] = ROUND(a.x[i], a.mode, a.mode == STOCHASTIC ? (u32)a.random[i] : 0u);
}
