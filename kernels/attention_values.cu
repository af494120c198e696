// attention_values: o = w v for grouped heads, one float32 accumulator for each output; rounded to bfloat16 unless OUT_FLOAT32.
// Keys ascend in tensor-core blocks of 16 (or 8), the first S mod tile of them in blocks of their own, or lanes add them, as
// `order` says (lanes.cuh).
//
// Layouts: w [batch, heads, T, row] bfloat16, row even; v [batch, S, kv_heads, D] bfloat16, strides in elements, unit stride along
// D; out [batch, T, heads, D], contiguous. S is `keys`, or, where `before` is given, *before + T. Nothing behind S is read.
// The order is `order`, or, where `orders` is given, orders[2 S + 1].
// Schedule: a warp takes 16 rows (of heads * T of one key head) and 8 of D, four warps a block.
// Grid: batch * kv_heads * ceil(heads / kv_heads * T / 16), ceil(D / 32).
#include "lanes.cuh"
#include "mma.cuh"

struct Arguments {
    const u16* w;
    const u16* v;
    void* out;
    const int* before;
    const int* orders;
    long long v_batch, v_token, v_head;
    int queries, heads, kv_heads, keys, row, dimensions, order;
};

// Two neighbouring weights of a row (null: none), zeros from `end` on.
__device__ __forceinline__ u32 weights(const u16* row, int key, int end) {
    if (row == nullptr || key >= end) return 0u;
    return (u32)row[key] | (key + 1 < end ? (u32)row[key + 1] << 16 : 0u);
}

__device__ __forceinline__ float wide(u16 code) { return __uint_as_float((u32)code << 16); }

__device__ __forceinline__ void store(void* out, long long at, float v) {
#if OUT_FLOAT32
    ((float*)out)[at] = v;
#else
    ((u16*)out)[at] = round_nearest_even(__float_as_uint(v));
#endif
}

extern "C" __global__ void __launch_bounds__(128) attention_values(const __grid_constant__ Arguments a) {
    const int keys = a.before ? *a.before + a.queries : a.keys;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.y * 32 + threadIdx.x / 32 * 8;
    if (first >= a.dimensions) return;
    const int group = a.heads / a.kv_heads, rows = group * a.queries, tiles = (rows + 15) / 16;
    const int tile = blockIdx.x % tiles, kv = blockIdx.x / tiles % a.kv_heads, entry = blockIdx.x / tiles / a.kv_heads;
    const Order order(a.orders ? a.orders[2 * keys + 1] : a.order);
    if (order.lanes) {
        const int d = first + lane % 8;
        const u16* v = a.v + entry * a.v_batch + kv * a.v_head + d;
        for (int row = tile * 16 + lane / 8; row < tile * 16 + 16 && row < rows && d < a.dimensions; row += 4) {
            const long long head = kv * group + row / a.queries, token = row % a.queries;
            const u16* w = a.w + ((entry * (long long)a.heads + head) * a.queries + token) * a.row;
            const long long step = a.v_token;
            const auto value = [v, step](int s) { return wide(v[s * step]); };
            const float o = sum_by_lanes(order, keys, [w](int s) { return wide(w[s]); }, value);
            store(a.out, ((entry * (long long)a.queries + token) * a.heads + head) * a.dimensions + d, o);
        }
        return;
    }

    const u16* w[2];
    long long out[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = tile * 16 + g + 8 * half;
        const long long head = kv * group + row / a.queries, token = row % a.queries;
        w[half] = row < rows ? a.w + ((entry * (long long)a.heads + head) * a.queries + token) * a.row : nullptr;
        out[half] = ((entry * (long long)a.queries + token) * a.heads + head) * a.dimensions + first + 2 * t;
    }
    const bool inside = first + g < a.dimensions;
    const u16* v = a.v + entry * a.v_batch + kv * a.v_head + (inside ? first + g : 0);
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const int of_first_tile = order.tile ? keys % order.tile : 0;
    int end = of_first_tile ? of_first_tile : keys;
    for (int key = 0; key < keys; key += 16) {
        if (key >= end) key = end, end = keys;  // behind the first tile
        u32 of_v[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = key + 8 * half + 2 * t;
            const u32 low = inside && at < end ? v[at * a.v_token] : 0u;
            const u32 high = inside && at + 1 < end ? v[(at + 1) * a.v_token] : 0u;
            of_v[half] = low | high << 16;
        }
        const u32 of_w[4] = {
            weights(w[0], key + 2 * t, end), weights(w[1], key + 2 * t, end),
            weights(w[0], key + 8 + 2 * t, end), weights(w[1], key + 8 + 2 * t, end),
        };
        if (order.halves) {
            const u32 low[4] = {of_w[0], of_w[1], 0u, 0u}, high[4] = {0u, 0u, of_w[2], of_w[3]};
            multiply_accumulate(c, low, of_v[0], 0u);
            multiply_accumulate(c, high, 0u, of_v[1]);
        } else {
            multiply_accumulate(c, of_w, of_v[0], of_v[1]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (w[i / 2] == nullptr || first + 2 * t + i % 2 >= a.dimensions) continue;
        store(a.out, out[i / 2] + i % 2, c[i]);
    }
}
