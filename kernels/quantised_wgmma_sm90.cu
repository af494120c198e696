// Products with quantised weights for 9 rows of x and more (sm_90a): a CTA makes 64 columns of the output for TOKENS rows of x,
// with SHARES warpgroups and one more whose warps bring x and the weights.
//
// Order and decoding: quantised.cuh, wgmma m64nNk16 in place of mma.m16n8k16, which gives the same bits. SHARES warpgroups take the
// slices of K in turn: each hands over its slices' accumulators, one at a time, in shared memory to the first of them, which adds
// them first to last; at the end each adds, rounds and stores a part of the tokens. A warp has sixteen of the columns.
//
// Each share has a ring of `depth` stages: STAGE_PIECES pieces of x and of its four tiles' weights (cufuse/quantised/tiles.py),
// which one barrier says are there. The last stage of a slice may have fewer pieces of the weight; x is brought as a whole, and not
// all of it read.
//
// Products and instructions take turns rather than overlap: H200, 64 k of a block and 64 rows take 355 cycles of a multiprocessor
// whether two, three or four warpgroups share the slices and whether each has one or two products under way; products alone would
// take 128, and with the scaling of their sums, nothing else, 181.
//
// x       [m, k] bfloat16 bits in whole pieces, as a tensor map with boxes of STAGE_PIECES pieces: for each 64 k of them TOKENS
//         lines of 128 bytes, swizzled
// weight  [tiles, pieces, PIECE_BYTES]
// out     [m, n] bfloat16 bits (rounded once, to nearest even), or float32
// Grid: a CTA for each 64 columns by ceil(m / TOKENS). Slices of `slice_pieces` pieces, the last one shorter, none empty.
#include "wgmma_registers.cuh"
#include "quantised.cuh"
#include "ring.cuh"

constexpr int WARPS = 4 * SHARES, THREADS = (WARPS + 4) * 32;
constexpr bool SCARCE = TOKENS == 64 && THREADS > 512;  // registers
constexpr int PER_GROUP = FORMAT == 2 ? 2 : 1, PRODUCTS = 4 / GROUP_STEPS * PER_GROUP;  // of 64 k: of codes, and of ones for the minima
constexpr int STAGE_CHUNKS = STAGE_PIECES * CHUNKS;
constexpr u32 X_BYTES = TOKENS * 128, TILE_BYTES = STAGE_PIECES * PIECE_BYTES;  // of 64 k; of a stage
constexpr u32 WEIGHT_AT = STAGE_CHUNKS * X_BYTES, STAGE_BYTES = (WEIGHT_AT + 4 * TILE_BYTES + 1023) / 1024 * 1024;
constexpr int MAX_DEPTH = 16;
// barriers, in bytes from the start of dynamic shared memory
constexpr u32 FULL = 0, EMPTY = FULL + SHARES * MAX_DEPTH * 8, SUM_FULL = EMPTY + SHARES * MAX_DEPTH * 8;
constexpr u32 SUM_EMPTY = SUM_FULL + WARPS * 8;

struct Arguments {
    int m, n, pieces, slice_pieces, slices;
    int depth;
    int rings_at, sums_at;  // bytes from the start of dynamic shared memory; barriers come first
    int out_float32, pairs;
    const unsigned char* weight;
    void* out;
    TensorMap x_map;
};

// The stages of a share, one after the other.
struct Cursor {
    const Arguments& a;
    int slice, piece, end;
    Place place;

    __device__ __forceinline__ Cursor(const Arguments& a, int share)
        : a(a), slice(share), piece(share * a.slice_pieces), end(min(a.pieces, piece + a.slice_pieces)), place{0, 1} {}
    __device__ __forceinline__ bool exists() const { return slice < a.slices; }
    __device__ __forceinline__ int pieces() const { return min(STAGE_PIECES, end - piece); }
    __device__ __forceinline__ void advance() {
        place.advance(a.depth);
        piece += STAGE_PIECES;
        if (piece >= end) {
            slice += SHARES;
            piece = slice * a.slice_pieces;
            end = min(a.pieces, piece + a.slice_pieces);
        }
    }
};

// The warp that brings a share's stages. A lane of the first four copies a tile's weights; lane 0 also x.
struct Bringer {
    const Arguments& a;
    u32 ring, barriers;
    int lane;
    const unsigned char* tile;  // null: not this lane's, or does not exist
    int tiles;                  // of the four that exist

    __device__ __forceinline__ Bringer(const Arguments& a, u32 shared, int share, int lane)
        : a(a), ring(shared + a.rings_at + share * a.depth * STAGE_BYTES), barriers(shared + FULL + share * MAX_DEPTH * 8), lane(lane) {
        const int first = blockIdx.x * 4, number = first + lane;
        tiles = min(4, (a.n + 15) / 16 - first);
        tile = lane < tiles ? a.weight + (long long)number * a.pieces * PIECE_BYTES : nullptr;
    }
    __device__ __forceinline__ void begin_barriers() const {
        if (lane < a.depth) {
            barrier_init(barriers + lane * 8, 1);
            barrier_init(barriers + (EMPTY - FULL) + lane * 8, 4);
        }
    }
    // Also says how many bytes the whole stage will have.
    __device__ __forceinline__ void bring_weights(const Cursor& at) const {
        const u32 full = barriers + at.place.slot * 8, bytes = at.pieces() * PIECE_BYTES;
        if (lane == 0) barrier_arrive_expecting(full, WEIGHT_AT + tiles * bytes);
        __syncwarp();
        if (tile)
            copy_bytes(ring + at.place.slot * STAGE_BYTES + WEIGHT_AT + lane * TILE_BYTES, tile + (long long)at.piece * PIECE_BYTES, bytes,
                       full, EVICT_FIRST);
    }
    __device__ __forceinline__ void bring_x(const Cursor& at) const {
        if (lane == 0)
            copy_box(ring + at.place.slot * STAGE_BYTES, &a.x_map, 0, blockIdx.y * TOKENS, at.piece * CHUNKS, barriers + at.place.slot * 8,
                     EVICT_NORMAL);
    }
};

// Until these have been made, and with them the loads that they are made of.
static __device__ __forceinline__ void need(Accumulators& acc) {
#ifdef __CUDA_ARCH__
#pragma unroll
    for (int j = 0; j < TOKEN_STEPS; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(acc[j][i]));
#endif
}

// A warp that multiplies.
struct Consumer {
    const Arguments& a;
    u32 shared;
    int share, lane;
    u32 exponents;
    // stages to be loaded: the next one's barrier and the parity of its phase, its slot, where its weights are
    u32 full, parity;
    int slot;
    const unsigned char* stage;
    int left, left_of_slice;  // chunks of stages to come, in all and of their slice
    const unsigned char* at;  // the chunk to be loaded next
    int unloaded;             // chunks of the stage
    // the stage that products read: slot, barrier, descriptor of x
    int read;
    u32 empty;
    u64 x_operand;
    Chunk chunk;              // loaded last
    Words2 ends;

    __device__ __forceinline__ int slice_chunks(int slice) const {
        return min(a.slice_pieces, a.pieces - slice * a.slice_pieces) * CHUNKS;
    }
    // Goes on to the next stage, if there is one, when it has come.
    __device__ __forceinline__ bool next_stage() {
        unloaded = min(STAGE_CHUNKS, STAGE_CHUNKS == 1 ? left : left_of_slice);
        if (unloaded == 0) return false;
        barrier_wait(full, parity);
        at = stage;
        full += 8;
        stage += STAGE_BYTES;
        if (++slot == a.depth) {
            slot = 0;
            full -= a.depth * 8;
            stage -= a.depth * STAGE_BYTES;
            parity ^= 1;
        }
        left -= unloaded;
        if (STAGE_CHUNKS > 1) {
            left_of_slice -= unloaded;
            if (left_of_slice == 0) left_of_slice = min(left, a.slice_pieces * CHUNKS);
        }
        return true;
    }
    __device__ __forceinline__ void load() {
        if (unloaded == 0 && !next_stage()) return;
        chunk = load_chunk(at, lane);
        ends = load_ends(at - (CHUNKS - 1 - (unloaded - 1) % CHUNKS) * CHUNK_BYTES, lane);
        at += --unloaded % CHUNKS == 0 ? PIECE_BYTES - (CHUNKS - 1) * CHUNK_BYTES : CHUNK_BYTES;
    }
    // Before the first slice.
    __device__ __forceinline__ void begin_loading() {
        for (int next = share; next < a.slices; next += SHARES) left += slice_chunks(next);
        left_of_slice = min(left, a.slice_pieces * CHUNKS);
        load();
    }
    // The stage that has been read.
    __device__ __forceinline__ void release() {
        if (lane == 0) barrier_arrive(empty);
        empty += 8;
        x_operand += STAGE_BYTES / 16;
        if (++read == a.depth) {
            read = 0;
            empty -= a.depth * 8;
            x_operand -= a.depth * (STAGE_BYTES / 16);
        }
    }

    // 64 k; loads the next 64. x: descriptor of the first sixteen.
    __device__ __forceinline__ void multiply_chunk(Accumulators& acc, u64 x) {
#pragma unroll
        for (int product = 0; product < PRODUCTS; ++product) {
            const int group = product / PER_GROUP;
            const bool minimum = product % PER_GROUP;
            const u32 ones[4] = {0x3F803F80u, 0x3F803F80u, 0x3F803F80u, 0x3F803F80u};
            u32 codes[GROUP_STEPS][4];
            float factors[2], c[TOKENS / 2];
            if (!minimum) {
#pragma unroll
                for (int step = 0; step < GROUP_STEPS; ++step) decode(codes[step], chunk, group * GROUP_STEPS + step, exponents);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half)
                factors[half] = minimum ? negated_minimum(chunk, ends, half, group) : scale_of(chunk, ends, half, group);
            products_fence();
#pragma unroll
            for (int step = 0; step < GROUP_STEPS; ++step) {
                const u64 sixteen = x + 2 * (group * GROUP_STEPS + step);
                if (minimum)
                    multiply_fragments<TOKENS>(c, ones, sixteen, step > 0);
                else
                    multiply_fragments<TOKENS>(c, codes[step], sixteen, step > 0);
            }
            commit_products();
            if (product + 1 == PRODUCTS) load();
            wait_for_products<0>();
#pragma unroll
            for (int j = 0; j < TOKEN_STEPS; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[j][i] = __fmaf_rn(factors[i / 2], c[4 * j + i], acc[j][i]);
        }
    }

    // The accumulators of one slice.
    __device__ __forceinline__ void multiply_slice(Accumulators& acc, int chunks) {
#pragma unroll
        for (int j = 0; j < TOKEN_STEPS; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[j][i] = 0.0f;
#pragma unroll 1
        for (; chunks > 0; chunks -= STAGE_CHUNKS) {
            u64 x = x_operand;
#pragma unroll 1
            for (int i = min(STAGE_CHUNKS, chunks); i > 0; --i, x += X_BYTES / 16) multiply_chunk(acc, x);
            release();
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) quantised_wgmma_sm90(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 shared = shared_address(memory);
    // the first lane's, so that the compiler sees that the warp is of one mind
    const int warp = (int)__shfl_sync(0xffffffffu, (float)(threadIdx.x / 32), 0), lane = threadIdx.x % 32;
    const int share = warp / 4, row = warp % 4;  // of sixteens of columns
    const int tile = blockIdx.x * 4 + row, tiles = (a.n + 15) / 16;
    const bool brings = warp >= WARPS && warp - WARPS < SHARES;
    const Bringer bringer(a, shared, warp - WARPS, lane);
    Cursor weights(a, warp - WARPS);

    let_next_kernel_begin();
    if (brings) {
        if (lane == 0) fetch_tensor_map(&a.x_map);
        bringer.begin_barriers();
        if (lane < 4) {
            barrier_init(shared + SUM_FULL + ((warp - WARPS) * 4 + lane) * 8, 32);
            barrier_init(shared + SUM_EMPTY + ((warp - WARPS) * 4 + lane) * 8, 32);
        }
        barrier_init_fence();
        __syncwarp();
    }
    if (warp >= WARPS) arrive_threads(1, THREADS);
    if (brings) {
#pragma unroll 1
        for (int i = 0; i < a.depth && weights.exists(); ++i, weights.advance()) bringer.bring_weights(weights);
        __syncwarp();
    }
    if (warp < WARPS) sync_threads(1, THREADS);
    wait_for_previous_kernel();

    if (warp >= WARPS) {
        if (SCARCE) give_registers_back<24>();
        if (brings) {
            Cursor x(a, warp - WARPS);
#pragma unroll 1
            for (int i = 0; i < a.depth && x.exists(); ++i, x.advance()) bringer.bring_x(x);
#pragma unroll 1
            for (; weights.exists(); weights.advance()) {
                barrier_wait(bringer.barriers + (EMPTY - FULL) + weights.place.slot * 8, weights.place.parity);
                bringer.bring_weights(weights);
                bringer.bring_x(weights);
            }
        }
        __syncwarp();
    } else {
        if (SCARCE) take_registers<112>();
        Consumer consumer = {a, shared, share, lane, exponents_of_codes()};
        consumer.full = shared + FULL + share * MAX_DEPTH * 8;
        consumer.empty = consumer.full + (EMPTY - FULL);
        consumer.stage = memory + a.rings_at + share * a.depth * STAGE_BYTES + WEIGHT_AT + row * TILE_BYTES;
        consumer.x_operand = operand_descriptor(shared + a.rings_at + share * a.depth * STAGE_BYTES);
        // of each warp the accumulators that wait: for the first share's, or there the sum so far
        float4* sums = (float4*)(memory + a.sums_at) + row * TOKEN_STEPS * 32;
        constexpr int SHARE_UNITS = 4 * TOKEN_STEPS * 32;
        const int last = (a.slices - 1) / SHARES;  // round: the slices of all shares
        if (share < a.slices) consumer.begin_loading();
        Accumulators acc;
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
                const int from = other * 4 + row;
                barrier_wait(shared + SUM_FULL + from * 8, round & 1);
                add_kept(acc, sums + other * SHARE_UNITS, lane);
                need(acc);
                barrier_arrive(shared + SUM_EMPTY + from * 8);
            }
            keep(sums, acc, lane);
        }
        // the last round's by all, each share for its part of the tokens
        sync_threads(2, WARPS * 32);
#pragma unroll
        for (int i = 0; i < (TOKEN_STEPS + SHARES - 1) / SHARES; ++i) {
            const int step = share + i * SHARES;
            if (step >= TOKEN_STEPS) break;
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
