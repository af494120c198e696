// Products with quantised weights for 9 rows of x and more (sm_90a): a CTA makes BLOCKS blocks of 64 columns of the output for TOKENS
// rows of x, with SHARES * BLOCKS warpgroups and one more whose warps bring x.
//
// Order and decoding: quantised.cuh, wgmma m64nNk16 in place of mma.m16n8k16, which gives the same bits. SHARES warpgroups take a
// block's slices of K in turn: each hands over its slices' accumulators, one at a time, in shared memory to the first of them,
// which adds them first to last; at the end each adds, rounds and stores a part of the tokens. A warp has sixteen of the columns.
//
// Weights come by bulk copies into a ring of each warp's own, `depth` stages of STAGE_PIECES pieces (cufuse/quantised/tiles.py). x
// comes into a ring for each share, `x_depth` stages of 64 k; the CTAs of a cluster (CLUSTER of them) walk the same k for other
// columns, and each fetches its part of the rows for all.
//
// x       [m, k] bfloat16 bits in whole pieces, as a tensor map with boxes of TOKENS / CLUSTER lines of 128 bytes, swizzled
// weight  [tiles, pieces, PIECE_BYTES]
// out     [m, n] bfloat16 bits (rounded once, to nearest even), or float32
// Grid: a CTA for each BLOCKS * 64 columns, in whole clusters, by ceil(m / TOKENS). Slices of `slice_pieces` pieces, the last one
// shorter, none empty.
#include "wgmma_registers.cuh"
#include "cluster_stores.cuh"
#include "quantised.cuh"
#include "ring.cuh"

constexpr int WARPS = 4 * SHARES * BLOCKS, THREADS = (WARPS + 4) * 32;
constexpr int PER_GROUP = FORMAT == 2 ? 2 : 1, PRODUCTS = 4 / GROUP_STEPS * PER_GROUP;  // of 64 k: of codes, and of ones for the minima
constexpr int LINES = TOKENS / CLUSTER;
constexpr u32 X_STAGE_BYTES = TOKENS * 128, STAGE_BYTES = STAGE_PIECES * PIECE_BYTES;
constexpr int STAGE_CHUNKS = STAGE_PIECES * CHUNKS;
constexpr int MAX_X_DEPTH = 16;
// barriers, in bytes from the start of dynamic shared memory
constexpr u32 X_FULL = 0, X_EMPTY = X_FULL + SHARES * MAX_X_DEPTH * 8, SUM_FULL = X_EMPTY + SHARES * MAX_X_DEPTH * 8;
constexpr u32 SUM_EMPTY = SUM_FULL + WARPS * 8, RINGS_FULL = SUM_EMPTY + WARPS * 8;

struct Arguments {
    int m, n, pieces, slice_pieces, slices;
    int depth, x_depth;
    int rings_at, x_at, sums_at;  // bytes from the start of dynamic shared memory; barriers come first
    int out_float32, pairs;
    const unsigned char* weight;
    void* out;
    TensorMap x_map;
};

// The warp that brings a share's weights and x. A lane of the first 4 * BLOCKS copies a tile's weights, a stage at a time; lane 0 also x.
// Room for weights is known by x's: when a slot of x has been read, so have been the weights of the same k.
struct Bringer {
    const Arguments& a;
    u32 shared;
    int share, lane;
    const unsigned char* tile;  // null: not this lane's, or does not exist
    u32 ring, barriers;         // of the warp that has the tile
    int slice, piece, end;      // the next stage of weights
    Place place;                // where it goes

    __device__ __forceinline__ Bringer(const Arguments& a, u32 shared, int share, int lane)
        : a(a), shared(shared), share(share), lane(lane), slice(share), piece(share * a.slice_pieces),
          end(min(a.pieces, piece + a.slice_pieces)), place{0, 0} {
        const int number = blockIdx.x * 4 * BLOCKS + lane, warp = share * 4 * BLOCKS + lane;
        tile = lane < 4 * BLOCKS && number * 16 < a.n ? a.weight + (long long)number * a.pieces * PIECE_BYTES : nullptr;
        ring = shared + a.rings_at + warp * a.depth * STAGE_BYTES;
        barriers = shared + RINGS_FULL + warp * a.depth * 8;
    }

    // The next stage, if there is one; all that the ring held there has been read.
    __device__ __forceinline__ void bring_weights() {
        if (slice >= a.slices) return;
        if (tile) {
            const u32 bytes = min(STAGE_PIECES, end - piece) * PIECE_BYTES, barrier = barriers + place.slot * 8;
            barrier_arrive_expecting(barrier, bytes);
            copy_bytes(ring + place.slot * STAGE_BYTES, tile + piece * PIECE_BYTES, bytes, barrier, EVICT_FIRST);
        }
        place.advance(a.depth);
        piece += STAGE_PIECES;
        if (piece >= end) {
            slice += SHARES;
            piece = slice * a.slice_pieces;
            end = min(a.pieces, piece + a.slice_pieces);
        }
    }

    // Slot by slot, each as soon as it has been read; and the weights, a stage as soon as its last chunk has been.
    __device__ __forceinline__ void bring_all() {
        const int rank = CLUSTER > 1 ? (int)cluster_rank() : 0, slice_chunks = a.slice_pieces * CHUNKS;
        Place x_place = {0, 1};  // every slot is empty at first
        int read = -a.x_depth;  // chunks of their slice
        for (int slice = share; slice < a.slices; slice += SHARES) {
            const int first = slice * slice_chunks, chunks = min(slice_chunks, a.pieces * CHUNKS - first);
#pragma unroll 1
            for (int chunk = 0; chunk < chunks; ++chunk, x_place.advance(a.x_depth)) {
                const int slot = share * a.x_depth + x_place.slot;
                const u32 full = shared + X_FULL + slot * 8, target = shared + a.x_at + slot * X_STAGE_BYTES + rank * LINES * 128;
                barrier_wait(shared + X_EMPTY + slot * 8, x_place.parity);
                if (lane == 0) {
                    barrier_arrive_expecting(full, X_STAGE_BYTES);
                    if (CLUSTER > 1)
                        copy_box_to_all(target, &a.x_map, 0, blockIdx.y * TOKENS + rank * LINES, first + chunk, full, EVICT_NORMAL,
                                        (1u << CLUSTER) - 1);
                    else
                        copy_box(target, &a.x_map, 0, blockIdx.y * TOKENS, first + chunk, full, EVICT_NORMAL);
                }
                __syncwarp();
                if (++read <= 0) continue;
                if (read % STAGE_CHUNKS == 0 || read == slice_chunks) bring_weights();
                if (read == slice_chunks) read = 0;
            }
        }
    }
};

// 64 k as the tensor core takes them: codes, and what their products are to be multiplied by.
struct Operands {
    u32 codes[4][4];  // fragments of the sixteens
    float factors[PRODUCTS][2];

    __device__ __forceinline__ void decode_chunk(const Chunk& chunk, const Words2& ends, u32 exponents) {
#pragma unroll
        for (int step = 0; step < 4; ++step) decode(codes[step], chunk, step, exponents);
#pragma unroll
        for (int product = 0; product < PRODUCTS; ++product)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int group = product / PER_GROUP;
                factors[product][half] = product % PER_GROUP ? negated_minimum(chunk, ends, half, group) : scale_of(chunk, ends, half, group);
            }
    }
};

// A warp that multiplies.
struct Consumer {
    const Arguments& a;
    u32 shared;
    int share, lane;
    u32 exponents;
    bool exists;  // the warp's tile
    // weights: the ring; the next stage's barrier and slot; chunks of stages to come, in all and of their slice
    const unsigned char* ring;
    u32 full, parity;
    int slot, left, left_of_slice;
    const unsigned char* at;  // the chunk to be loaded next
    int unloaded;             // chunks of the stage
    u32 x_full, x_parity;     // barrier of x's next slot
    u64 x_operand;            // and its descriptor
    int unreleased;           // chunks
    Chunk chunk;              // loaded last
    Words2 ends;

    // The slot of x that has been read, unless nothing more comes into it: so no CTA is told anything that it does not wait for.
    __device__ __forceinline__ void release() {
        if (--unreleased >= a.x_depth && lane < CLUSTER) {
            if (CLUSTER > 1)
                barrier_arrive_at(x_full + (X_EMPTY - X_FULL), lane);
            else
                barrier_arrive(x_full + (X_EMPTY - X_FULL));
        }
    }
    __device__ __forceinline__ int slice_chunks(int slice) const {
        return min(a.slice_pieces, a.pieces - slice * a.slice_pieces) * CHUNKS;
    }
    __device__ __forceinline__ void first_slot() {
        x_full = shared + X_FULL + share * a.x_depth * 8;
        x_operand = operand_descriptor(shared + a.x_at + share * a.x_depth * X_STAGE_BYTES);
    }
    __device__ __forceinline__ void next_slot() {
        x_full += 8;
        x_operand += X_STAGE_BYTES / 16;
        if (x_full == shared + X_FULL + (share + 1) * a.x_depth * 8) {
            first_slot();
            x_parity ^= 1;
        }
    }

    // Product number `product` of 64 k, under way on return. x: descriptor of the first sixteen.
    static __device__ __forceinline__ void begin(float (&c)[TOKENS / 2], const Operands& operands, int product, u64 x) {
        const u32 ones[4] = {0x3F803F80u, 0x3F803F80u, 0x3F803F80u, 0x3F803F80u};
        products_fence();
#pragma unroll
        for (int step = 0; step < GROUP_STEPS; ++step) {
            const int sixteen = product / PER_GROUP * GROUP_STEPS + step;
            multiply_fragments<TOKENS>(c, product % PER_GROUP ? ones : operands.codes[sixteen], x + 2 * sixteen, step > 0);
        }
        commit_products();
    }

    // Goes on to the next stage of weights. Behind the last there is none: the first slot is loaded again, and not used; the one
    // that follows may be another warp's, and on its way.
    __device__ __forceinline__ void next_stage() {
        unloaded = min(STAGE_CHUNKS, left_of_slice);
        if (unloaded == 0) {
            unloaded = STAGE_CHUNKS;
            at = ring;
            return;
        }
        if (exists) barrier_wait(full, parity);  // what is made of other bytes is never stored
        at = ring + slot * STAGE_BYTES;
        full += 8;
        if (++slot == a.depth) {
            slot = 0;
            full -= a.depth * 8;
            parity ^= 1;
        }
        left -= unloaded;
        left_of_slice -= unloaded;
        if (left_of_slice == 0) left_of_slice = min(left, a.slice_pieces * CHUNKS);
    }
    __device__ __forceinline__ void load() {
        chunk = load_chunk(at, lane);
        ends = load_ends(at - (CHUNKS - 1 - (unloaded - 1) % CHUNKS) * CHUNK_BYTES, lane);
        at += --unloaded % CHUNKS == 0 ? PIECE_BYTES - (CHUNKS - 1) * CHUNK_BYTES : CHUNK_BYTES;
    }

    // Before the first slice.
    __device__ __forceinline__ void begin_loading() {
        for (int next = share; next < a.slices; next += SHARES) left += slice_chunks(next);
        unreleased = left;
        left_of_slice = min(left, a.slice_pieces * CHUNKS);
        next_stage();
        load();
        first_slot();
    }

    // The accumulators of one slice.
    __device__ __forceinline__ void multiply_slice(Accumulators& acc, int chunks) {
#pragma unroll
        for (int j = 0; j < TOKEN_STEPS; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[j][i] = 0.0f;
#pragma unroll 1
        for (; chunks > 0; --chunks) {
            if (unloaded == 0) next_stage();
            barrier_wait(x_full, x_parity);
            Operands operands;
            operands.decode_chunk(chunk, ends, exponents);
            float c[TOKENS / 2];
#pragma unroll
            for (int product = 0; product < PRODUCTS; ++product) {
                begin(c, operands, product, x_operand);
                if (product == 0) load();
                wait_for_products<0>();
                if (product + 1 == PRODUCTS) release();
#pragma unroll
                for (int j = 0; j < TOKEN_STEPS; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        acc[j][i] = __fmaf_rn(operands.factors[product][i / 2], c[4 * j + i], acc[j][i]);
            }
            next_slot();
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) quantised_wgmma_sm90(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 shared = shared_address(memory);
    // the first lane's, so that the compiler sees that the warp is of one mind
    const int warp = (int)__shfl_sync(0xffffffffu, (float)(threadIdx.x / 32), 0), lane = threadIdx.x % 32;
    const int share = warp / (4 * BLOCKS), row = warp % (4 * BLOCKS);  // of sixteens of columns
    const int tile = blockIdx.x * 4 * BLOCKS + row, tiles = (a.n + 15) / 16;
    const u32 ring_at = a.rings_at + warp * a.depth * STAGE_BYTES, ring_barriers = shared + RINGS_FULL + warp * a.depth * 8;
    const bool brings = warp >= WARPS && warp - WARPS < SHARES;
    Bringer bringer(a, shared, warp - WARPS, lane);

    let_next_kernel_begin();
    if (brings) {
        // all of the share's
        if (lane < 4 * BLOCKS) {
#pragma unroll 1
            for (int slot = 0; slot < a.depth; ++slot) barrier_init(bringer.barriers + slot * 8, 1);
        }
        if (lane == 0) {
            fetch_tensor_map(&a.x_map);
#pragma unroll 1
            for (int slot = bringer.share * a.x_depth; slot < (bringer.share + 1) * a.x_depth; ++slot) {
                barrier_init(shared + X_FULL + slot * 8, 1);
                barrier_init(shared + X_EMPTY + slot * 8, 4 * BLOCKS * CLUSTER);
            }
#pragma unroll 1
            for (int i = bringer.share * 4 * BLOCKS; i < (bringer.share + 1) * 4 * BLOCKS; ++i) {
                barrier_init(shared + SUM_FULL + i * 8, 32);
                barrier_init(shared + SUM_EMPTY + i * 8, 32);
            }
        }
        barrier_init_fence();
        __syncwarp();
    }
    if (CLUSTER > 1)
        arrive_at_cluster();
    else if (warp >= WARPS)
        arrive_threads(1, THREADS);
    if (brings) {
#pragma unroll 1
        for (int slot = 0; slot < a.depth; ++slot) bringer.bring_weights();
        __syncwarp();
    }
    if (CLUSTER > 1)
        wait_for_cluster();
    else if (warp < WARPS)
        sync_threads(1, THREADS);
    wait_for_previous_kernel();

    if (warp >= WARPS) {
        if (TOKENS == 64) give_registers_back<24>();
        if (brings) bringer.bring_all();
        __syncwarp();
    } else {
        if (TOKENS == 64) take_registers<112>();
        Consumer consumer = {a, shared, share, lane, exponents_of_codes(), tile < tiles, memory + ring_at, ring_barriers};
        if (share < a.slices) consumer.begin_loading();
        // of each warp the accumulators that wait: for the first share's, or there the sum so far
        float4* sums = (float4*)(memory + a.sums_at) + row * TOKEN_STEPS * 32;
        constexpr int SHARE_UNITS = 4 * BLOCKS * TOKEN_STEPS * 32;
        Accumulators acc;
        const int last = (a.slices - 1) / SHARES;  // round: the slices of all shares
        for (int slice = share, round = 0; slice < a.slices; slice += SHARES, ++round) {
            consumer.multiply_slice(acc, consumer.slice_chunks(slice));
            if (share > 0) {
                if (round > 0) barrier_wait(shared + SUM_EMPTY + warp * 8, round - 1 & 1);
                keep(sums + share * SHARE_UNITS, acc, lane);
                barrier_arrive(shared + SUM_FULL + warp * 8);
                continue;
            }
            if (round > 0) add_kept(acc, sums, lane);
#pragma unroll 1
            for (int other = 1; other < SHARES && round < last; ++other) {
                const int from = other * 4 * BLOCKS + row;
                barrier_wait(shared + SUM_FULL + from * 8, round & 1);
                add_kept(acc, sums + other * SHARE_UNITS, lane);
                barrier_arrive(shared + SUM_EMPTY + from * 8);
            }
            keep(sums, acc, lane);
        }
        // the last round's by all, each share for its part of the tokens
        sync_threads(2, WARPS * 32);
        constexpr int OWN = TOKEN_STEPS / SHARES;
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int step = share * OWN + i;
            const float4* kept = sums + step * 32 + lane;
            float4 sum = kept[0];
            for (int other = 1; other < a.slices - last * SHARES; ++other) {
                const float4 next = kept[other * SHARE_UNITS];
                sum.x = __fadd_rn(sum.x, next.x), sum.y = __fadd_rn(sum.y, next.y);
                sum.z = __fadd_rn(sum.z, next.z), sum.w = __fadd_rn(sum.w, next.w);
            }
            const float c[4] = {sum.x, sum.y, sum.z, sum.w};
            const int token = blockIdx.y * TOKENS + step * 8;
            if (tile < tiles && token < a.m) store_eight({a.out, a.m, a.n, a.out_float32, a.pairs}, c, tile * 16, token, lane);
        }
    }
}
