// gather: y[r] = table[ids[r]], rows of `columns` 16-bit elements (an even number); ids are checked by the caller.
// Layouts: table [any, columns], y [rows, columns], contiguous, aligned to 4 bytes. Grid: rows; a block copies a row.
#include "launches.cuh"

struct Arguments {
    const u32* table;
    const long long* ids;
    u32* y;
    int columns;
};

extern "C" __global__ void __launch_bounds__(256) gather(const __grid_constant__ Arguments a) {
    let_next_kernel_begin();
    wait_for_previous_kernel();
    const int words = a.columns / 2;
    const u32* from = a.table + a.ids[blockIdx.x] * words;
    u32* to = a.y + (long long)blockIdx.x * words;
    for (int i = threadIdx.x; i < words; i += blockDim.x) to[i] = from[i];
}
