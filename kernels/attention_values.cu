// attention_values: o = w v for grouped heads, one float32 accumulator for each output; rounded to bfloat16 unless OUT_FLOAT32.
// Keys ascend in tensor-core blocks of 16 (or 8), the first S mod tile of them in blocks of their own, as `order` says
// (lanes.cuh; no lanes).
//
// Layouts: w [batch, heads, T, row] bfloat16, row even; v [batch, S, kv_heads, D] bfloat16, strides in elements, unit stride along
// D; out [batch, T, heads, D], contiguous. S is `keys`; nothing behind it is read.
// Schedule: a warp takes 16 rows (of heads * T of one key head) and 8 of D, four warps a block.
// Grid: batch * kv_heads * ceil(heads / kv_heads * T / 16), ceil(D / 32).
#include "lanes.cuh"
#include "mma.cuh"

constexpr int AHEAD = 4;  // blocks whose operands are under way

struct Arguments {
    const u16* w;
    const u16* v;
    void* out;
    long long v_batch, v_token, v_head;
    int queries, heads, kv_heads, keys, row, dimensions, order;
};

// Two neighbouring weights of a row (null: none), zeros from `end` on.
__device__ __forceinline__ u32 weights(const u16* row, int key, int end) {
    if (row == nullptr || key >= end) return 0u;
    return (u32)row[key] | (key + 1 < end ? (u32)row[key + 1] << 16 : 0u);
}

// The same where both exist: one access where they are aligned.
__device__ __forceinline__ u32 two_weights(const u16* row, int key) {
    if (row == nullptr) return 0u;
    return key % 2 ? (u32)row[key] | (u32)row[key + 1] << 16 : *(const u32*)(row + key);
}

__device__ __forceinline__ void store(void* out, long long at, float v) {
#if OUT_FLOAT32
    ((float*)out)[at] = v;
#else
    ((u16*)out)[at] = round_nearest_even(__float_as_uint(v));
#endif
}

extern "C" __global__ void __launch_bounds__(128) attention_values(const __grid_constant__ Arguments a) {
    const int keys = a.keys;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.y * 32 + threadIdx.x / 32 * 8;
    if (first >= a.dimensions) return;
    const int group = a.heads / a.kv_heads, rows = group * a.queries, tiles = (rows + 15) / 16;
    const int tile = blockIdx.x % tiles, kv = blockIdx.x / tiles % a.kv_heads, entry = blockIdx.x / tiles / a.kv_heads;
    const Order order(a.order);
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
    const auto multiply = [&](const u32 (&of_w)[4], const u32 (&of_v)[2]) {
        if (order.halves) {
            const u32 low[4] = {of_w[0], of_w[1], 0u, 0u}, high[4] = {0u, 0u, of_w[2], of_w[3]};
            multiply_accumulate(c, low, of_v[0], 0u);
            multiply_accumulate(c, high, 0u, of_v[1]);
        } else {
            multiply_accumulate(c, of_w, of_v[0], of_v[1]);
        }
    };
    const auto part = [&](int key, int end) {
        // whole blocks, loads of several before the first product
        for (; key + 16 * AHEAD <= end; key += 16 * AHEAD) {
            u32 of_w[AHEAD][4], of_v[AHEAD][2];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const int at = key + 16 * i + 2 * t;
#pragma unroll
                for (int j = 0; j < 4; ++j) of_w[i][j] = two_weights(w[j % 2], at + j / 2 * 8);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const u16* of_key = v + (at + 8 * half) * a.v_token;
                    of_v[i][half] = inside ? (u32)of_key[0] | (u32)of_key[a.v_token] << 16 : 0u;
                }
            }
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) multiply(of_w[i], of_v[i]);
        }
        for (; key < end; key += 16) {
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
            multiply(of_w, of_v);
        }
    };
    const int of_first_tile = order.tile ? keys % order.tile : 0;
    part(0, of_first_tile);
    part(of_first_tile, keys);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (w[i / 2] == nullptr || first + 2 * t + i % 2 >= a.dimensions) continue;
        store(a.out, out[i / 2] + i % 2, c[i]);
    }
}
