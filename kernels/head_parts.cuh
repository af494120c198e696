// Heads of 128 that the CTAs of a cluster have made in parts of TILE_N columns, for a few tokens: head norm, rotation, and the way
// to their places, without another launch.
//
// CLUSTER neighbouring CTAs have whole heads between them. CTA t % CLUSTER of these finishes their heads of token t: each CTA sends
// it its part, rounded to bfloat16, into shared memory, where a barrier counts the bytes, and there a warp takes a head, four
// neighbouring columns a lane. Until then four other warps bring weights, tables and slots.
//
// y = x                                HEAD_NORM 0
//     h * w, rounded to bfloat16       1: norm.cuh's macros
// z = y                                ROTATE 0
//     y rotated, rotation.cuh          1: PRODUCTS_ROUNDED, bfloat16 tables
// Sum of squares: as in head_fragment.cuh, which says of which orders these are the bits.
//
// Layouts: q_weight, k_weight [128]; cos, sin [tokens, 128]; q, k, v [tokens, heads, 128], in multiples of four elements; slots
// [tokens], or null: token t's rows of k and v are rows slots[t], and nothing is written there where that is negative or `capacity`
// or more. q's heads come first in the projection, then `kv_heads` of k and as many of v.
// Shared memory, in units of HEAD_BYTES: both weights; cos and sin of each own token; their rows of k and v; products.
// To be included after pipeline.cuh and cluster_stores.cuh.
#pragma once
#include "norm.cuh"

constexpr int HEAD = 128, HEAD_LANES = 16;  // lanes of 16 bytes
constexpr u32 HEAD_BYTES = 2 * HEAD;
constexpr int CLUSTER_HEADS = CLUSTER * TILE_N / HEAD;
static_assert(CLUSTER * TILE_N % HEAD == 0 && CLUSTER >= 2 && CLUSTER <= 8, "whole heads; a lane an own token");

struct HeadPlaces {
    u16* base;
    int head, token;  // elements from one to the next
};

struct HeadArguments {
    HeadPlaces to[3];  // q, k, v
    const u16 *cos, *sin, *q_weight, *k_weight;
    const long long* slots;
    int cos_stride, sin_stride;
    int capacity, heads, kv_heads;
    float q_mean_operand, k_mean_operand;
    int at;  // bytes from the start of dynamic shared memory
};

typedef Pack<u16, 4> HeadVector;
typedef Pack<u16, 8> HeadLine;

// WORKERS: warps that finish heads. MOST_TOKENS: of the call, so that no registers are kept for more. WHOLE: the last cluster has as
// many heads as the others.
template <int WORKERS, int MOST_TOKENS, bool WHOLE>
struct HeadParts {
    static constexpr int MOST_OWN = (MOST_TOKENS + CLUSTER - 1) / CLUSTER;
    static constexpr int MOST_EACH = (MOST_OWN * CLUSTER_HEADS + WORKERS - 1) / WORKERS;  // heads of a warp
    const HeadArguments& a;
    unsigned char* memory;  // at `at`
    u32 barrier;
    int tokens;
    float eps;

    static __device__ __forceinline__ int rank() { return blockIdx.x % CLUSTER; }
    __device__ __forceinline__ int most_own() const { return (tokens + CLUSTER - 1) / CLUSTER; }
    __device__ __forceinline__ int own() const { return (tokens - rank() + CLUSTER - 1) / CLUSTER; }
    // Heads of this cluster.
    __device__ __forceinline__ int heads_here() const {
        const int left = a.heads + 2 * a.kv_heads - (int)blockIdx.x / CLUSTER * CLUSTER_HEADS;
        return WHOLE ? CLUSTER_HEADS : min(CLUSTER_HEADS, left);
    }
    __device__ __forceinline__ u16* weight(int which) const { return (u16*)(memory + which * HEAD_BYTES); }
    __device__ __forceinline__ u16* table(int which, int slot) const { return (u16*)(memory + (2 + 2 * slot + which) * HEAD_BYTES); }
    __device__ __forceinline__ int* rows() const { return (int*)(memory + (2 + 2 * most_own()) * HEAD_BYTES); }
    __device__ __forceinline__ unsigned char* products() const { return memory + (3 + 2 * most_own()) * HEAD_BYTES; }

    // By one thread, before the cluster meets.
    __device__ __forceinline__ void begin() const {
        barrier_init(barrier, 4 * 32 + 1);
        barrier_init_fence();
        barrier_arrive_expecting(barrier, own() * heads_here() * HEAD_BYTES);
    }

    // Four warps, `warp` 0 to 3; `brought` follows.
    __device__ __forceinline__ void bring(int warp) const {
        const int lane = threadIdx.x % 32, which = lane / HEAD_LANES, line = lane % HEAD_LANES;
        if (HEAD_NORM && warp == 0) store(weight(which), line, load<8>(which ? a.k_weight : a.q_weight, line));
        if (warp == 1 && lane < own()) {
            const int token = lane * CLUSTER + rank();
            const long long slot = a.slots != nullptr ? a.slots[token] : token;
            rows()[lane] = a.slots == nullptr || (slot >= 0 && slot < a.capacity) ? (int)slot : -1;
        }
        if (ROTATE) {
            const u16* from = (which ? a.sin : a.cos) + (long long)rank() * (which ? a.sin_stride : a.cos_stride);
            const long long step = (long long)CLUSTER * (which ? a.sin_stride : a.cos_stride);
            constexpr int MOST = (MOST_OWN + 3) / 4;
            HeadLine lines[MOST];
#pragma unroll
            for (int i = 0; i < MOST; ++i)
                if (warp + 4 * i < own()) lines[i] = load<8>(from + (warp + 4 * i) * step, line);
#pragma unroll
            for (int i = 0; i < MOST; ++i)
                if (warp + 4 * i < own()) store(table(which, warp + 4 * i), line, lines[i]);
        }
    }
    // The same warps, once the cluster has met, for only then is the barrier there; every lane for what it has written itself.
    __device__ __forceinline__ void brought() const { barrier_arrive(barrier); }

    // Accumulators of a warp's 16 rows from `row` on, as multiply_tiles leaves them, to the CTAs that finish them.
    __device__ __forceinline__ void send(int row, const float (&c)[TILE_N / 2], int lane) const {
        const u32 first = shared_address(products()) + (rank() * TILE_N + lane % 4 * 2) * 2;
        row += lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half, row += 8) {
            if (row >= tokens) break;
            const u32 to = address_in(first + row / CLUSTER * CLUSTER_HEADS * HEAD_BYTES, row % CLUSTER);
            const u32 counted = address_in(barrier, row % CLUSTER);
#pragma unroll
            for (int j = 0; j < TILE_N / 8; ++j) send_4(to + 16 * j, pack_bf16(c[4 * j + 2 * half], c[4 * j + 2 * half + 1]), counted);
        }
    }

    // One of the heads that this CTA finishes: of q, k or v, its number there, and which of the own tokens it belongs to.
    struct Head {
        int which, number, slot;
    };
    __device__ __forceinline__ Head head(int i) const {
        const int head = blockIdx.x / CLUSTER * CLUSTER_HEADS + i % CLUSTER_HEADS;
        const int which = head < a.heads ? 0 : head < a.heads + a.kv_heads ? 1 : 2;
        return {which, head - (which == 0 ? 0 : a.heads + (which - 1) * a.kv_heads), i / CLUSTER_HEADS};
    }

    // Of v's heads, which nobody takes, too: without branches the heads' steps do not wait for each other.
    template <int TOGETHER>
    __device__ __forceinline__ void normalise(HeadVector (&x)[TOGETHER], const Head (&heads)[TOGETHER], int lane) const {
        float sums[TOGETHER];
#pragma unroll
        for (int j = 0; j < TOGETHER; ++j) {
            sums[j] = __fmul_rn(x[j].at(0), x[j].at(0));
#pragma unroll
            for (int i = 1; i < 4; ++i) sums[j] = __fmaf_rn(x[j].at(i), x[j].at(i), sums[j]);
        }
        halve_lanes(sums);
#pragma unroll
        for (int j = 0; j < TOGETHER; ++j) {
            const bool of_q = heads[j].which == 0;
            const float r = reciprocal_root(sums[j], of_q ? a.q_mean_operand : a.k_mean_operand, eps);
            x[j] = weighted<u16>(x[j], load<4>(weight(of_q ? 0 : 1), lane), r);
        }
    }
    __device__ __forceinline__ HeadVector turned(const HeadVector& y, int slot, int lane) const {
        const HeadVector other = shuffle_xor(y, 16), cos = load<4>(table(0, slot), lane);
        const HeadVector sin = negated_if(lane < 16, load<4>(table(1, slot), lane));
        HeadVector z;
#pragma unroll
        for (int i = 0; i < 2; ++i)
            z.pairs[i] = add_pairs(multiply_pairs(y.pairs[i], cos.pairs[i]), multiply_pairs(other.pairs[i], sin.pairs[i]));
        return z;
    }
    // Warps 0 to WORKERS - 1. A head waits for its own steps most of the time: a warp with several takes up to four at once.
    __device__ __forceinline__ void finish() const {
        if (own() > 0) barrier_wait(barrier, 0);
        const int most = (own() * CLUSTER_HEADS + WORKERS - 1) / WORKERS;
        if (MOST_EACH > 2 && most > 2)
            finish_together<4>();
        else if (MOST_EACH > 1 && most > 1)
            finish_together<2>();
        else
            finish_together<1>();
    }
    template <int TOGETHER>
    __device__ __forceinline__ void finish_together() const {
        const int lane = threadIdx.x % 32, count = own() * CLUSTER_HEADS;
#pragma unroll 1
        for (int first = threadIdx.x / 32; first < count; first += WORKERS * TOGETHER) {
            Head heads[TOGETHER];
            HeadVector x[TOGETHER], z[TOGETHER];
#pragma unroll
            for (int j = 0; j < TOGETHER; ++j) {
                const int i = min(first + j * WORKERS, count - 1);
                heads[j] = head(i);
                x[j] = z[j] = load<4>((const u16*)(products() + i * HEAD_BYTES), lane);
            }
            if (HEAD_NORM) normalise(z, heads, lane);
#pragma unroll
            for (int j = 0; j < TOGETHER; ++j)
                if (ROTATE) z[j] = turned(z[j], heads[j].slot, lane);
#pragma unroll
            for (int j = 0; j < TOGETHER; ++j) {
                const HeadPlaces& to = a.to[heads[j].which];
                const int row = heads[j].which == 0 ? heads[j].slot * CLUSTER + rank() : rows()[heads[j].slot];
                u16* target = to.base + (long long)row * to.token + (long long)heads[j].number * to.head;
                // pair by pair: of two whole packs one would be chosen by its address, in local memory
#pragma unroll
                for (int i = 0; i < 2; ++i) z[j].pairs[i] = heads[j].which < 2 ? z[j].pairs[i] : x[j].pairs[i];
                const int i = first + j * WORKERS;
                if (i < count && row >= 0 && (WHOLE || i % CLUSTER_HEADS < heads_here())) store(target, lane, z[j]);
            }
        }
    }
};
