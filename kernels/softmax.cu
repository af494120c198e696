// softmax: y[r] = exp(x[r] - max) / sum over the last axis, float32, rounded to bfloat16 once; the sum in PyTorch's order.
//
// Order of the sum (K columns; ATen PersistentSoftmax.cuh, SoftMax.cu):
//   K <= 2048   lane i of a warp adds elements i, i + 32, ...; then lanes 16, 8, 4, 2, 1 apart
//   K <= 9216   thread t of 1024 adds elements t, t + 1024, ...
//   beyond      thread t adds vectors of four t, t + 1024, ...; where 4 does not divide K or K >= 12256, the elements up to the
//               first 16-byte boundary of the row and those behind the last whole 4096 go to threads one by one
//   then, from 2049 on, lanes 16, 8, 4, 2, 1 apart and the 32 warps likewise
// The exponential is that of exponential.cuh, the division is rounded correctly. Subnormals are kept.
//
// Layouts: x [rows, K] bfloat16 or float32 (X_FLOAT32), y [rows, K] bfloat16, both with rows `row` elements apart; y may be x
// where x is bfloat16. K is `columns`, or, where `before` is given, *before + columns.
// Schedule: BLOCK 0: a warp a row, four to a block, K <= 2048 only; 1: 1024 threads a row, any K.
// Grid: rows / 4 (BLOCK 0), rounded up, or rows.
#include "elements.cuh"
#include "exponential.cuh"
#include "launches.cuh"
#include "row_sums.cuh"

typedef Element<X_FLOAT32 != 0>::type X;

struct Arguments {
    const X* x;
    u16* y;
    const int* before;
    long long rows, row;
    int columns;
};

// Sum of exp(x - most) over the elements of one thread of `threads`, in steps of that many.
__device__ __forceinline__ float strided_sum(const X* x, int columns, int thread, int threads, float most) {
    float sum = 0.0f;
#pragma unroll 4
    for (int i = thread; i < columns; i += threads) sum = __fadd_rn(sum, exponential(__fsub_rn(widen(x[i]), most)));
    return sum;
}

// The same for rows of more than 9216: by vectors of four, `shift` elements of the row's first vector lie before the row.
__device__ __forceinline__ float vector_sum(const X* x, int columns, int thread, int shift, float most) {
    float sum = 0.0f;
    int start = 0;
    const bool shared_memory = columns % 4 == 0 && columns < 12256;
    if (shift) {
        if (thread >= shift) sum = exponential(__fsub_rn(widen(x[thread - shift]), most));
        start = 1024 - shift;
    }
    const int whole = shared_memory ? columns : (columns - start) / 4096 * 4096;
#pragma unroll 2
    for (int i = thread * 4; i < whole; i += 4096)
        for (int j = 0; j < 4; ++j) sum = __fadd_rn(sum, exponential(__fsub_rn(widen(x[start + i + j]), most)));
    for (int i = start + whole + thread; i < columns; i += 1024)
        sum = __fadd_rn(sum, exponential(__fsub_rn(widen(x[i]), most)));
    return sum;
}

// y may be x: a thread writes what it alone has read; four elements are read before the first is written.
__device__ __forceinline__ void write(const X* x, u16* y, int columns, int thread, int threads, float most, float sum) {
    for (int first = thread; first < columns; first += 4 * threads) {
        float of_x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) of_x[i] = first + i * threads < columns ? widen(x[first + i * threads]) : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (first + i * threads < columns)
                y[first + i * threads] = (u16)round_pair(__fdiv_rn(exponential(__fsub_rn(of_x[i], most)), sum), 0.0f);
    }
}

#if BLOCK
extern "C" __global__ void __launch_bounds__(1024, 1) softmax(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    float* of_warps = (float*)memory;
    let_next_kernel_begin();
    wait_for_previous_kernel();
    const int columns = a.before ? *a.before + a.columns : a.columns;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const X* x = a.x + (long long)blockIdx.x * a.row;
    float most = -__uint_as_float(0x7F800000u);
#pragma unroll 4
    for (int i = thread; i < columns; i += 1024) most = larger(widen(x[i]), most);
    most = warp_max(most);
    if (lane == 0) of_warps[warp] = most;
    __syncthreads();
    most = warp_max(of_warps[lane]);
    __syncthreads();
    float sum = 0.0f;
    if (columns <= 2048) {
        if (warp == 0) sum = warp_sum(strided_sum(x, columns, lane, 32, most));
        if (thread == 0) of_warps[0] = sum;
        __syncthreads();
        sum = of_warps[0];
    } else {
        const int shift = (int)((long long)blockIdx.x * columns % 4);
        sum = columns <= 9216 ? strided_sum(x, columns, thread, 1024, most) : vector_sum(x, columns, thread, shift, most);
        sum = warp_sum(sum);
        if (lane == 0) of_warps[warp] = sum;
        __syncthreads();
        sum = warp_sum(of_warps[lane]);
    }
    // where y is x, nobody may write before all have read: every element is read by the thread that writes it
    write(x, a.y + (long long)blockIdx.x * a.row, columns, thread, 1024, most, sum);
}
#else
extern "C" __global__ void __launch_bounds__(128) softmax(const __grid_constant__ Arguments a) {
    let_next_kernel_begin();
    wait_for_previous_kernel();
    const int columns = a.before ? *a.before + a.columns : a.columns;
    const int lane = threadIdx.x % 32;
    const long long row = (long long)blockIdx.x * 4 + threadIdx.x / 32;
    if (row >= a.rows) return;
    const X* x = a.x + row * a.row;
    float most = -__uint_as_float(0x7F800000u);
#pragma unroll 8
    for (int i = lane; i < columns; i += 32) most = larger(widen(x[i]), most);
    most = warp_max(most);
    const float sum = warp_sum(strided_sum(x, columns, lane, 32, most));
    write(x, a.y + row * a.row, columns, lane, 32, most, sum);
}
#endif
