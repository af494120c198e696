// attention_scores: masked, scaled scores of queries against keys, for grouped heads.
//
//   s = sum over d of q[d] k[d]       one float32 accumulator: tensor-core blocks of 16 (or 8), d ascending, as `order` says
//                                     (lanes.cuh; no lanes); ROUND_SCORES: rounded to bfloat16
//   s = s * scale                     ROUND_SCALED: rounded
//   s = s + (seen ? 0 : lowest)       lowest = bfloat16's lowest finite value; ROUND_SCALED: rounded
// With `causal`, query t of T sees keys 0 ... S - T + t of S; all otherwise.
//
// Layouts: q [batch, T, heads, D], k [batch, S, kv_heads, D] bfloat16, strides in elements, unit stride along D = DIMENSIONS (a
// multiple of 16), rows aligned to 4 bytes; scores [batch, heads, T, row], bfloat16 or float32 (SCORES_FLOAT32), the first S of
// each row written.
// Schedule: a warp takes 16 rows (of heads * T of one key head) and 8 keys, four warps a block.
// Grid: batch * kv_heads * ceil(heads / kv_heads * T / 16), ceil(S / 32).
#include "lanes.cuh"
#include "mma.cuh"
#include "scores.cuh"

struct Arguments {
    const u16* q;
    const u16* k;
    void* scores;
    long long q_batch, q_token, q_head, k_batch, k_token, k_head;
    int queries, heads, kv_heads, keys, row, causal, order;
    float scale;
};

__device__ __forceinline__ u32 pair(const u16* row, int at) { return row ? *(const u32*)(row + at) : 0u; }

extern "C" __global__ void __launch_bounds__(128) attention_scores(const __grid_constant__ Arguments a) {
    const int keys = a.keys;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first_key = blockIdx.y * 32 + threadIdx.x / 32 * 8;
    if (first_key >= keys) return;
    const int group = a.heads / a.kv_heads, rows = group * a.queries, tiles = (rows + 15) / 16;
    const int tile = blockIdx.x % tiles, kv = blockIdx.x / tiles % a.kv_heads, entry = blockIdx.x / tiles / a.kv_heads;
    const Order order(a.order);
    int head[2], token[2];
    const u16* q[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = tile * 16 + g + 8 * half;
        head[half] = kv * group + row / a.queries, token[half] = row % a.queries;
        q[half] = row < rows ? a.q + entry * a.q_batch + token[half] * a.q_token + head[half] * a.q_head : nullptr;
    }
    const u16* k = first_key + g < keys ? a.k + entry * a.k_batch + (first_key + g) * a.k_token + kv * a.k_head : nullptr;

    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int d = 0; d < DIMENSIONS; d += 16) {
        const int low = d + 2 * t, high = low + 8;
        const u32 of_q[4] = {pair(q[0], low), pair(q[1], low), pair(q[0], high), pair(q[1], high)};
        if (order.halves) {
            const u32 first[4] = {of_q[0], of_q[1], 0u, 0u}, second[4] = {0u, 0u, of_q[2], of_q[3]};
            multiply_accumulate(c, first, pair(k, low), 0u);
            multiply_accumulate(c, second, 0u, pair(k, high));
        } else {
            multiply_accumulate(c, of_q, pair(k, low), pair(k, high));
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int half = i / 2, key = first_key + 2 * t + i % 2;
        const bool hidden = a.causal && key > keys - a.queries + token[half];
        const long long at = (((long long)entry * a.heads + head[half]) * a.queries + token[half]) * a.row + key;
        if (q[half] != nullptr && key < keys) finish(a.scores, c[i], a.scale, hidden, at);
    }
}
