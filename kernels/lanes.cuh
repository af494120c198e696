// Sums in the orders of cuBLAS's matrix-vector kernels, and what an order's number says.
//
// An order (cufuse.emulation.attention_products.Order) is one int: bits 0-7 lanes T (0: tensor-core blocks), 8-15 vector (0: T
// contiguous parts), 16 ascending, 17 blocks of 8, 18-31 tile.
#pragma once

struct Order {
    int lanes, vector, ascending, halves, tile;
    __device__ __forceinline__ explicit Order(int code)
        : lanes(code & 255), vector(code >> 8 & 255), ascending(code >> 16 & 1), halves(code >> 17 & 1), tile(code >> 18) {}
};

// At one level of the tree: a sum that has not found a place yet is added to the one that waits, or waits itself.
__device__ __forceinline__ bool meet(float& waiting, float& sum, int second, bool placed) {
    if (placed) return true;
    if (second) {
        sum = __fadd_rn(waiting, sum);
        return false;
    }
    waiting = sum;
    return true;
}

// sum over i < count of left(i) right(i): lane t adds vectors t, t + T, ... in order by fused multiply-add, then the lanes are
// added, T/2, T/4, ... apart, or ascending.
template <class Left, class Right>
__device__ __forceinline__ float sum_by_lanes(const Order& order, int count, Left left, Right right) {
    const int vector = order.vector ? order.vector : (count + order.lanes - 1) / order.lanes;
    float total = 0.0f;
    // sums of 1, 2, 4, ... lanes that wait for their other half
    float one = 0.0f, two = 0.0f, four = 0.0f, eight = 0.0f, sixteen = 0.0f, many = 0.0f, most = 0.0f;
    for (int n = 0, lane = 0; n < order.lanes; ++n) {
        float sum = 0.0f;
        for (int start = lane * vector; start < count; start += order.lanes * vector) {
            const int end = start + vector < count ? start + vector : count;
            for (int i = start; i < end; ++i) sum = __fmaf_rn(left(i), right(i), sum);
        }
        if (order.ascending) {
            total = n ? __fadd_rn(total, sum) : sum;
            ++lane;
            continue;
        }
        // lanes come in bit-reversed order: T/2 apart first, so that neighbours in n are those to be added
        bool waits = meet(one, sum, n & 1, false);
        waits = meet(two, sum, n & 2, waits);
        waits = meet(four, sum, n & 4, waits);
        waits = meet(eight, sum, n & 8, waits);
        waits = meet(sixteen, sum, n & 16, waits);
        waits = meet(many, sum, n & 32, waits);
        meet(most, sum, n & 64, waits);
        total = sum;
        int bit = order.lanes / 2;
        for (; lane & bit; bit /= 2) lane ^= bit;
        lane |= bit;
    }
    return total;
}
