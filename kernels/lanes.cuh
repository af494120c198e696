// Sums in the orders of cuBLAS's matrix-vector kernels, and what an order's number says.
//
// An order (cufuse.emulation.attention_products.Order) is one int: bits 0-7 lanes T (0: tensor-core blocks), 8-15 vector (0: T
// contiguous parts), 16 ascending, 17 blocks of 8, 18-31 tile. T and the vector are powers of two.
#pragma once

constexpr int MOST_LANES = 128;

struct Order {
    int lanes, vector, ascending, halves, tile;
    __device__ __forceinline__ explicit Order(int code)
        : lanes(code & 255), vector(code >> 8 & 255), ascending(code >> 16 & 1), halves(code >> 17 & 1), tile(code >> 18) {}
};

// The terms of one lane of a sum over `count` terms: vectors lane, lane + T, ..., or the lane-th of T contiguous parts.
struct LaneTerms {
    int first, lanes, vector, mask;  // mask: of a place within a vector

    __device__ __forceinline__ LaneTerms(const Order& order, int lane, int count)
        : lanes(order.lanes), vector(order.vector ? order.vector : (count + order.lanes - 1) / order.lanes),
          mask(order.vector ? order.vector - 1 : 0x7FFFFFFF) {
        first = lane * vector;
    }

    // where its n-th term is
    __device__ __forceinline__ int place(int n) const { return first + n + (n & ~mask) * (lanes - 1); }

    // how many of its terms are before `end`
    __device__ __forceinline__ int before(int end) const {
        const int round = lanes * vector, rounds = end / round, rest = end - rounds * round - first;
        return rounds * vector + (rest < 0 ? 0 : rest < vector ? rest : vector);
    }
};

// sums[lane * pitch + column] of all lanes added, into sums[column] (shared memory, all threads of the block): T/2, T/4, ...
// lanes apart, or ascending. Begins and ends with a barrier.
__device__ __forceinline__ void add_lanes(const Order& order, float* sums, int columns, int pitch) {
    const int thread = threadIdx.x, threads = blockDim.x;
    __syncthreads();
    if (order.ascending) {
        for (int column = thread; column < columns; column += threads) {
            float total = sums[column];
#pragma unroll 8
            for (int lane = 1; lane < order.lanes; ++lane) total = __fadd_rn(total, sums[lane * pitch + column]);
            sums[column] = total;
        }
        __syncthreads();
        return;
    }
    for (int half = order.lanes / 2; half > 0; half /= 2) {
        for (int i = thread; i < half * columns; i += threads) {
            const int at = i / columns * pitch + i % columns;
            sums[at] = __fadd_rn(sums[at], sums[at + half * pitch]);
        }
        __syncthreads();
    }
}
