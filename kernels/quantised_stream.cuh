// One warp's share of quantised weights on its way into a ring in shared memory. To be included after quantised.cuh, by kernels
// whose Arguments have `weight` and `pieces`.
#pragma once
#include "ring.cuh"

constexpr u32 STAGE_BYTES = STAGE_PIECES * PIECE_BYTES;
constexpr u32 RING_BARRIER = 15;  // of the named barriers

struct Stream {
    u32 ring, barriers;
    int tile, tile_step, tiles;  // the next tile to copy, how far the one after it is, and the first that does not exist
    int piece, begin, end;       // the next piece to copy, and those of the slice

    // The next stage into `slot`, if there is one. All lanes of the warp call it, after they have read what lies there.
    template <class A>
    __device__ __forceinline__ void copy_stage(const A& a, int slot, int lane) {
        if (tile >= tiles || begin >= end) return;
        if (lane == 0) {
            const u32 bytes = min(STAGE_PIECES, end - piece) * PIECE_BYTES;
            barrier_arrive_expecting(barriers + slot * 8, bytes);
            copy_bytes(ring + slot * STAGE_BYTES, a.weight + ((long long)tile * a.pieces + piece) * PIECE_BYTES, bytes,
                       barriers + slot * 8, EVICT_FIRST);
        }
        piece += STAGE_PIECES;
        if (piece >= end) {
            piece = begin;
            tile += tile_step;
        }
    }

    // The warp's barriers.
    __device__ __forceinline__ void begin_barriers(int depth, int lane) const {
        if (lane == 0) {
#pragma unroll 1
            for (int slot = 0; slot < depth; ++slot) barrier_init(barriers + slot * 8, 1);
            barrier_init_fence();
        }
        __syncwarp();
    }

    // Stages `slot` to `last` - 1 on their way: the first ones of all `warps` warps ahead of the second ones, so that they come at
    // about the same pace and none has all to do at the end.
    template <class A>
    __device__ __forceinline__ void fill(const A& a, int slot, int last, int warps, int lane) {
#pragma unroll 1
        for (; slot < last; ++slot) {
            copy_stage(a, slot, lane);
            sync_threads(RING_BARRIER, warps * 32);
        }
    }
};
