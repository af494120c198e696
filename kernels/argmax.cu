// argmax: the place of the largest logit of each row: of equal ones the first, NaN before everything (torch.argmax); and the move
// to the next position of a decoder that runs without the host. Two launches, of PARTS 1 and 0:
//
// largest_of_parts  value and place of the largest of each of the parts into which gridDim.y divides a row; 256 threads.
//                   Grid: rows, parts.
// argmax            ids[r] = place of the largest of row r's parts. Where `log` is given also log[r * log_row + steps[r]] = place,
//                   and adds 1 to steps[r], positions[r], slots[r], and (row 0) to *before. Grid: rows; 32 threads.
// Layouts: x [rows, columns] bfloat16 or float32 (X_FLOAT32), contiguous; parts [rows, parts].
#include "elements.cuh"
#include "launches.cuh"

typedef Element<X_FLOAT32 != 0>::type X;

struct Candidate {
    float value;
    int place;
};

struct Arguments {
    const X* x;
    Candidate* parts;
    long long* ids;
    long long* log;
    long long* steps;
    long long* positions;
    long long* slots;
    int* before;
    long long log_row;
    int columns, part_count;
};

// What no element is worse than.
__device__ __forceinline__ Candidate none() { return {-__uint_as_float(0x7F800000u), 0x7FFFFFFF}; }

// Whether b is to be taken rather than a.
__device__ __forceinline__ bool better(const Candidate& b, const Candidate& a) {
    const bool nan_a = a.value != a.value, nan_b = b.value != b.value;
    if (nan_a || nan_b) return nan_b && (!nan_a || b.place < a.place);
    return b.value > a.value || (b.value == a.value && b.place < a.place);
}

// The best of a warp, in its first lane.
__device__ __forceinline__ Candidate best_of_warp(Candidate best) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        // places travel as the bits of floats
        const Candidate other = {
            __shfl_xor_sync(0xffffffffu, best.value, offset),
            (int)__float_as_uint(__shfl_xor_sync(0xffffffffu, __uint_as_float((u32)best.place), offset)),
        };
        if (better(other, best)) best = other;
    }
    return best;
}

#if PARTS
extern "C" __global__ void __launch_bounds__(256) largest_of_parts(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Candidate* of_warps = (Candidate*)memory;
    let_next_kernel_begin();
    wait_for_previous_kernel();
    const X* x = a.x + (long long)blockIdx.x * a.columns;
    const int length = (a.columns + gridDim.y - 1) / gridDim.y, first = blockIdx.y * length;
    const int end = first + length < a.columns ? first + length : a.columns;
    Candidate best = none();
    for (int start = first + threadIdx.x; start < end; start += 8 * 256) {
        float values[8];  // under way together
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = start + i * 256 < end ? widen(x[start + i * 256]) : 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const Candidate next = {values[i], start + i * 256};
            if (next.place < end && better(next, best)) best = next;
        }
    }
    best = best_of_warp(best);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < 8; ++warp)
        if (better(of_warps[warp], best)) best = of_warps[warp];
    a.parts[blockIdx.x * gridDim.y + blockIdx.y] = best;
}

#else
extern "C" __global__ void __launch_bounds__(32) argmax(const __grid_constant__ Arguments a) {
    let_next_kernel_begin();
    wait_for_previous_kernel();
    const int row = blockIdx.x;
    Candidate best = none();
#pragma unroll 4
    for (int part = threadIdx.x; part < a.part_count; part += 32) {
        const Candidate next = a.parts[row * a.part_count + part];
        if (better(next, best)) best = next;
    }
    best = best_of_warp(best);
    if (threadIdx.x != 0) return;
    a.ids[row] = best.place;
    if (a.log == nullptr) return;
    a.log[row * a.log_row + a.steps[row]] = best.place;
    a.steps[row] += 1, a.positions[row] += 1, a.slots[row] += 1;
    if (row == 0) *a.before += 1;
}
#endif
