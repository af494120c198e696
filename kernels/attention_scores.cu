// attention_scores: masked, scaled scores of queries against keys, for grouped heads.
//
//   s = sum over d of q[d] k[d]       one float32 accumulator: tensor-core blocks of 16 (or 8), d ascending; or fused
//                                     multiply-adds in lanes; as `order` says (lanes.cuh; no tile).
//                                     ROUND_SCORES: rounded to bfloat16
//   s = s * scale                     ROUND_SCALED: rounded
//   s = s + (seen ? 0 : lowest)       lowest = bfloat16's lowest finite value; ROUND_SCALED: rounded
// With `causal`, query t of T sees keys 0 ... S - T + t of S; all otherwise.
//
// Layouts: q [batch, T, heads, D], k [batch, S, kv_heads, D] bfloat16, strides in elements, unit stride along D = DIMENSIONS (a
// multiple of 16), rows aligned to 4 bytes; scores [batch, heads, T, row], bfloat16 or float32 (SCORES_FLOAT32), the first S of
// each row written.
// Schedule: a warp takes 16 rows (of heads * T of one key head) and 8 keys, four warps a block; in lanes a block takes one row
// after the other, its sums in shared memory: 4 * lanes * 33 bytes.
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

constexpr int ROWS = 16, KEYS = 32, SUMS_PITCH = KEYS + 1;

__device__ __forceinline__ u32 pair(const u16* row, int at) { return row ? *(const u32*)(row + at) : 0u; }

// A lane's sum.
__device__ __forceinline__ float sum_terms(const LaneTerms& terms, const u16* q, const u16* k) {
    const int count = terms.before(DIMENSIONS);
    float sum = 0.0f;
#pragma unroll 1  // unrolled by 4 the kernel takes 48 registers instead of 39 on sm_80
    for (int n = 0; n < count; ++n) {
        const int d = terms.place(n);
        sum = __fmaf_rn(wide(q[d]), wide(k[d]), sum);
    }
    return sum;
}

// The scores of some rows of q against a block's keys, in lanes.
__device__ __forceinline__ void scores_in_lanes(const Arguments& a, const Order& order, int first, int end, int kv, int entry) {
    extern __shared__ __align__(16) unsigned char memory[];
    float* sums = (float*)memory;
    const int first_key = blockIdx.y * KEYS, group = a.heads / a.kv_heads;
    const u16* k = a.k + entry * a.k_batch + kv * a.k_head;
    for (int row = first; row < end; ++row) {
        const int head = kv * group + row / a.queries, token = row % a.queries;
        const u16* q = a.q + entry * a.q_batch + token * a.q_token + head * a.q_head;
        for (int i = threadIdx.x; i < KEYS * order.lanes; i += blockDim.x) {
            const int key = i % KEYS, lane = i / KEYS;
            const bool exists = first_key + key < a.keys;
            const u16* of_key = k + (first_key + key) * a.k_token;
            sums[lane * SUMS_PITCH + key] = exists ? sum_terms(LaneTerms(order, lane, DIMENSIONS), q, of_key) : 0.0f;
        }
        add_lanes(order, sums, KEYS, SUMS_PITCH);
        const int key = first_key + threadIdx.x;
        if (threadIdx.x < KEYS && key < a.keys) {
            const bool hidden = a.causal && key > a.keys - a.queries + token;
            const long long at = (((long long)entry * a.heads + head) * a.queries + token) * a.row + key;
            // lane 0's sum, which this same thread writes for the next row: no barrier between
            finish(a.scores, sums[threadIdx.x], a.scale, hidden, at);
        }
    }
}

// four blocks a multiprocessor: without the number ptxas allows 32 registers on sm_100 and spills
extern "C" __global__ void __launch_bounds__(128, 4) attention_scores(const __grid_constant__ Arguments a) {
    const int keys = a.keys;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int group = a.heads / a.kv_heads, rows = group * a.queries, tiles = (rows + ROWS - 1) / ROWS;
    const int tile = blockIdx.x % tiles, kv = blockIdx.x / tiles % a.kv_heads, entry = blockIdx.x / tiles / a.kv_heads;
    const Order order(a.order);
    if (order.lanes) {
        const int end = tile * ROWS + ROWS;
        scores_in_lanes(a, order, tile * ROWS, end < rows ? end : rows, kv, entry);
        return;
    }
    const int first_key = blockIdx.y * KEYS + threadIdx.x / 32 * 8;
    if (first_key >= keys) return;
    int head[2], token[2];
    const u16* q[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = tile * ROWS + g + 8 * half;
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
