// attention_decode_scores: what attention_scores computes, for one query a sequence, which sees every key.
//
// The sum over d is in lanes or in tensor-core blocks of 16, as the order says (lanes.cuh; no tile, no blocks of 8). Rounding
// points ROUND_SCORES, ROUND_SCALED, SCORES_FLOAT32 as there.
// Layouts: q [batch, 1, heads, D], k [batch, S, kv_heads, D] bfloat16, strides in elements, unit stride along D = DIMENSIONS, all
// aligned to 16 bytes; scores [batch, heads, 1, row], the first S of each row written.
// S is `keys`, or, where `before` is given, *before + 1; the order is `order`, or, where `orders` is given, orders[2 S].
// As a dependent launch: *before, the orders and all keys but the last are read before the kernels in front have ended.
// Schedule: a block takes up to 8 heads of one key head and 32 keys at a time, through shared memory.
// Grid: batch * kv_heads * ceil(heads / kv_heads / 8), blocks for the keys (any number).
#include "lanes.cuh"
#include "launches.cuh"
#include "mma.cuh"
#include "scores.cuh"

constexpr int KEYS = 32, ROWS = 8, PITCH = DIMENSIONS + 8, UNITS = DIMENSIONS / 8;
constexpr int COLUMNS = 2 * KEYS, SUMS_PITCH = COLUMNS + 1;  // of the lanes' sums: two rows at a time

struct Arguments {
    const u16* q;
    const u16* k;
    void* scores;
    const int* before;
    const int* orders;
    long long q_batch, q_head, k_batch, k_token, k_head;
    int heads, kv_heads, keys, row, order;
    float scale;
};

// Both rows' sums of one lane for one key.
__device__ __forceinline__ void sum_terms(const LaneTerms& terms, const float* q0, const float* q1, const u16* k, float& s0, float& s1) {
    const int count = terms.before(DIMENSIONS);
    s0 = s1 = 0.0f;
    int n = 0;
    for (; n + 4 <= count; n += 4) {
        float of_k[4], of_q[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int d = terms.place(n + i);
            of_k[i] = wide(k[d]), of_q[0][i] = q0[d], of_q[1][i] = q1[d];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) s0 = __fmaf_rn(of_q[0][i], of_k[i], s0), s1 = __fmaf_rn(of_q[1][i], of_k[i], s1);
    }
    for (; n < count; ++n) {
        const int d = terms.place(n);
        s0 = __fmaf_rn(q0[d], wide(k[d]), s0), s1 = __fmaf_rn(q1[d], wide(k[d]), s1);
    }
}

// Two bfloat16 values that are held as float32.
__device__ __forceinline__ u32 pair(const float* at) { return __float_as_uint(at[0]) >> 16 | (__float_as_uint(at[1]) & 0xFFFF0000u); }

extern "C" __global__ void __launch_bounds__(256, 3) attention_decode_scores(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    u16* k_tile = (u16*)memory;
    float* q_rows = (float*)(k_tile + KEYS * PITCH);
    float* sums = q_rows + ROWS * DIMENSIONS;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int group = a.heads / a.kv_heads, tiles = (group + ROWS - 1) / ROWS;
    const int tile = blockIdx.x % tiles, kv = blockIdx.x / tiles % a.kv_heads, entry = blockIdx.x / tiles / a.kv_heads;
    const int first_head = kv * group + tile * ROWS, rows = group - tile * ROWS < ROWS ? group - tile * ROWS : ROWS;
    const u16* k = a.k + entry * a.k_batch + kv * a.k_head;

    let_next_kernel_begin();
    const int keys = a.before ? *a.before + 1 : a.keys;
    const Order order(a.orders ? a.orders[2 * keys] : a.order);
    const u32 tile_at = shared_address(k_tile);
    const auto copy = [&](int first, int from, int to) {  // keys from ... to - 1, of the tile that begins with the first
        for (int i = (from - first) * UNITS + thread; i < (to - first) * UNITS; i += blockDim.x) {
            const int key = i / UNITS, unit = i % UNITS;
            copy_16_async(tile_at + (key * PITCH + unit * 8) * 2, k + (first + key) * a.k_token + unit * 8, 16);
        }
    };
    int first = blockIdx.y * KEYS, end = first + KEYS < keys ? first + KEYS : keys;
    copy(first, first, end < keys ? end : keys - 1);
    wait_for_previous_kernel();
    if (first >= keys) return;
    if (end == keys) copy(first, keys - 1, keys);
    for (int i = thread; i < rows * DIMENSIONS; i += blockDim.x)
        q_rows[i] = wide(a.q[entry * a.q_batch + (first_head + i / DIMENSIONS) * a.q_head + i % DIMENSIONS]);

    while (true) {
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
        if (order.lanes) {
            for (int row = 0; row < rows; row += 2) {
                const float* q0 = q_rows + row * DIMENSIONS;
                const float* q1 = row + 1 < rows ? q0 + DIMENSIONS : q0;
                for (int i = thread; i < KEYS * order.lanes; i += blockDim.x) {
                    const int key = i / (u32)order.lanes, of = i - key * order.lanes;
                    if (first + key >= keys) break;
                    float* to = sums + of * SUMS_PITCH + key;
                    sum_terms(LaneTerms(order, of, DIMENSIONS), q0, q1, k_tile + key * PITCH, to[0], to[KEYS]);
                }
                add_lanes(order, sums, COLUMNS, SUMS_PITCH);
                const int half = thread / KEYS, key = first + thread % KEYS;
                if (half < 2 && row + half < rows && key < keys)
                    finish(a.scores, sums[thread], a.scale, false, (entry * (long long)a.heads + first_head + row + half) * a.row + key);
                __syncthreads();
            }
        } else if (warp < KEYS / 8) {
            const int g = lane / 4, t = lane % 4;
            const float* q = q_rows + g * DIMENSIONS + 2 * t;
            const u16* of_key = k_tile + (warp * 8 + g) * PITCH + 2 * t;
            float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int d = 0; d < DIMENSIONS; d += 16) {
                const u32 of_q[4] = {g < rows ? pair(q + d) : 0u, 0u, g < rows ? pair(q + d + 8) : 0u, 0u};
                multiply_accumulate(c, of_q, *(const u32*)(of_key + d), *(const u32*)(of_key + d + 8));
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int key = first + warp * 8 + 2 * t + i;
                if (g < rows && key < keys)
                    finish(a.scores, c[i], a.scale, false, (entry * (long long)a.heads + first_head + g) * a.row + key);
            }
        }
        first += gridDim.y * KEYS, end = first + KEYS < keys ? first + KEYS : keys;
        if (first >= keys) return;
        __syncthreads();  // the tile has been read
        copy(first, first, end);
    }
}
