// Products with quantised weights for few rows of x: the weight streams through shared memory and is read once (sm_90 on).
//
// Order and decoding: quantised.cuh; slices of K lie in neighbouring warps, whose accumulators are added first to last.
//
// A CTA has `groups` times `slices` warps; a group makes 16 columns of the output at a time, for TOKENS rows of x from
// blockIdx.y * TOKENS on. A warp's share of a tile is contiguous in memory (cufuse/quantised/tiles.py); it comes by bulk copies
// into a ring of the warp's own, `depth` stages of STAGE_PIECES pieces, which the warp refills itself as soon as it has read one.
//   RESIDENT 1: x lies in shared memory as a whole, rows 16 bytes longer than their values.
//   RESIDENT 0: one more warp brings x into a ring of x_depth stages for all warps: 64 k of every slice, as boxes of TOKENS lines of
//               128 bytes, swizzled; the CTAs of a cluster (CLUSTER of them) fetch boxes in turn and send them to all.
//
// x       [m, x_stride] bfloat16 bits: for each sixteen of k its PARTS parts; rows of PARTS * pieces * PIECE_K values
// weight  [tiles, pieces, PIECE_BYTES]
// out     [m, n] bfloat16 bits (rounded once, to nearest even), or float32
#include "pipeline.cuh"
#include "quantised.cuh"
#include "quantised_stream.cuh"

constexpr u32 X_LINE_BYTES = TOKENS * 128;           // 64 values of every token
constexpr u32 X_SLICE_BYTES = PARTS * X_LINE_BYTES;  // of a stage
constexpr u32 PIECE_X_BYTES = PIECE_K * PARTS * 2;   // of a resident row
constexpr int MAX_X_DEPTH = 16;
// threads of the kernel that follows for which registers are left, where there is no other use for them
constexpr int REGISTERS_LEFT = TOKENS == 8 && PARTS == 1 && FORMAT < 2 ? 128 : 0;

struct Arguments {
    int m, n, pieces, slice_pieces;
    int slices, groups, rounds;
    int depth, x_depth;
    int rings_at, x_at, sums_at;  // bytes from the start of dynamic shared memory; barriers come first
    int out_float32, pairs;
    int programmatic;             // launched as a dependent: only weights may be touched before the previous kernel ends
    const u16* x;
    const unsigned char* weight;
    void* out;
    long long x_stride;           // in elements
    TensorMap x_map;
};

// x of all rounds into its ring, by one thread: 64 k of each slice a stage.
static __device__ __forceinline__ void stream_x(const Arguments& a, u32 ring, u32 full, u32 empty) {
    const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
    const int slice_chunks = a.slice_pieces * CHUNKS, boxes = a.slices * PARTS;
    Place place = {0, 1};  // every slot is empty at first
    for (int round = 0; round < a.rounds; ++round)
#pragma unroll 1
        for (int chunk = 0; chunk < slice_chunks; ++chunk, place.advance(a.x_depth)) {
            barrier_wait(empty + place.slot * 8, place.parity);
            barrier_arrive_expecting(full + place.slot * 8, a.slices * X_SLICE_BYTES);
            for (int box = (int)rank; box < boxes; box += CLUSTER) {
                const int line = (box / PARTS * slice_chunks + chunk) * PARTS + box % PARTS;
                const u32 target = ring + (place.slot * boxes + box) * X_LINE_BYTES;
                if (CLUSTER > 1)
                    copy_box_to_all(target, &a.x_map, 0, blockIdx.y * TOKENS, line, full + place.slot * 8, EVICT_NORMAL,
                                    (1u << CLUSTER) - 1);
                else
                    copy_box(target, &a.x_map, 0, blockIdx.y * TOKENS, line, full + place.slot * 8, EVICT_NORMAL);
            }
        }
}

// Activations from shared memory: eight tokens and two sixteens at once.
struct FromShared {
    u32 base;   // of this lane's line: of the chunk's first sixteen
    u32 pitch;  // of eight tokens
    u32 token;  // this lane's line, for the swizzle
    u32 second, half;

    __device__ __forceinline__ Activations operator()(int group, int j) const {
        constexpr int COUNT = GROUP_STEPS * PARTS;
        Activations found;
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) {
            const u32 sixteen = group * COUNT + i + (i + 1 < COUNT ? second : 0);
            u32 matrices[4];
            if (RESIDENT)
                load_matrices(matrices, base + j * pitch + sixteen * 32 + half * 16);
            else
                load_matrices(matrices, base + j * pitch + sixteen / 4 * X_LINE_BYTES +
                                            swizzled_unit(sixteen % 4 * 2 + half, token) * 16);
            found.b[i][0] = matrices[0], found.b[i][1] = matrices[1];
            if (i + 1 < COUNT) found.b[(i + 1) % COUNT][0] = matrices[2], found.b[(i + 1) % COUNT][1] = matrices[3];
        }
        return found;
    }
};

// The chunks of a piece; x.base goes on behind them.
static __device__ __forceinline__ void multiply_piece(Accumulators& acc, const unsigned char* piece, FromShared& x, int lane) {
    const Words2 ends = load_ends(piece, lane);
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk, x.base += PIECE_X_BYTES / CHUNKS)
        multiply_chunk(acc, load_chunk(piece + chunk * CHUNK_BYTES, lane), ends, x);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS + REGISTERS_LEFT, 1) quantised_linear_sm90(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 shared = shared_address(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = a.groups * a.slices;
    const u32 x_full = shared, x_empty = shared + MAX_X_DEPTH * 8, ring_barriers = shared + 2 * MAX_X_DEPTH * 8;
    // eight slices are the rule; a division would delay the first copy
    const int group = a.slices == 8 ? warp >> 3 : warp / a.slices, slice = warp - group * a.slices;
    const int begin = slice * a.slice_pieces, end = min(a.pieces, begin + a.slice_pieces);
    const int tiles = (a.n + 15) / 16, tile_step = gridDim.x * a.groups, first_tile = blockIdx.x + gridDim.x * group;
    const int first_token = blockIdx.y * TOKENS, tokens = min(TOKENS, a.m - first_token);
    const u32 row_bytes = (u32)a.pieces * PIECE_K * PARTS * 2;
    Stream stream = {shared + a.rings_at + warp * a.depth * STAGE_BYTES, ring_barriers + warp * a.depth * 8,
                     first_tile, tile_step, tiles, begin, begin, end};
    const auto copy_resident_x = [&] {  // by warp 0
        if (lane == 0) barrier_arrive_expecting(x_full, tokens * row_bytes);
        __syncwarp();
        if (lane < tokens)
            copy_bytes(shared + a.x_at + lane * (row_bytes + 16), a.x + (first_token + lane) * a.x_stride, row_bytes, x_full,
                       EVICT_NORMAL);
    };

    let_next_kernel_begin();
    // x first, unless the kernel before this one still has to write it
    if (warp < warps) {
        if (RESIDENT && warp == 0) {
            if (lane == 0) {
                barrier_init(x_full, 1);
                barrier_init_fence();
            }
            __syncwarp();
            if (!a.programmatic) copy_resident_x();
        }
        stream.begin_barriers(a.depth, lane);
        stream.fill(a, 0, a.depth, warps, lane);
    } else if (!RESIDENT && lane == 0) {
#pragma unroll 1
        for (int slot = 0; slot < a.x_depth; ++slot) {
            barrier_init(x_full + slot * 8, 1);
            barrier_init(x_empty + slot * 8, warps * CLUSTER);
        }
        barrier_init_fence();
    }
    __syncwarp();
    if (CLUSTER > 1)
        sync_cluster();
    else
        __syncthreads();
    wait_for_previous_kernel();
    if (RESIDENT && warp == 0 && a.programmatic) copy_resident_x();

    if (warp >= warps) {
        if (!RESIDENT && lane == 0) stream_x(a, shared + a.x_at, x_full, x_empty);
        __syncwarp();
    } else {
        const u32 line = lane & 7;
        // tokens that do not exist repeat the last, or are zeros: their products are never stored
        FromShared x = {0, RESIDENT ? 8 * (row_bytes + 16) : 1024, line, (u32)lane >> 4, (u32)lane >> 3 & 1};
        const u32 own_line = shared + a.x_at + (RESIDENT ? min(line, (u32)tokens - 1) * (row_bytes + 16) : line * 128);
        const unsigned char* ring = memory + a.rings_at + warp * a.depth * STAGE_BYTES;
        Place place = {0, 0}, x_place = {0, 0};
        if (RESIDENT) barrier_wait(x_full, 0);
        for (int round = 0; round < a.rounds; ++round) {
            const int tile = first_tile + round * tile_step;
            Accumulators acc = {};
            for (int offset = 0; offset < a.slice_pieces; offset += STAGE_PIECES) {
                // where x is streamed, warps without weights still take their turn at its ring
                const int count = tile < tiles ? min(STAGE_PIECES, end - begin - offset) : 0;
                if (count <= 0 && RESIDENT) break;
                const unsigned char* source = ring + place.slot * STAGE_BYTES;
                if (count > 0) barrier_wait(stream.barriers + place.slot * 8, place.parity);
                if (RESIDENT) {
                    x.base = own_line + (begin + offset) * PIECE_X_BYTES;
                    if (count == STAGE_PIECES) {
#pragma unroll 2
                        for (int i = 0; i < STAGE_PIECES; ++i) multiply_piece(acc, source + i * PIECE_BYTES, x, lane);
                    } else {
#pragma unroll 1
                        for (int i = 0; i < count; ++i) multiply_piece(acc, source + i * PIECE_BYTES, x, lane);
                    }
                } else {
                    const int pieces = min(STAGE_PIECES, a.slice_pieces - offset);
#pragma unroll 1
                    for (int i = 0; i < pieces * CHUNKS; ++i) {
                        const unsigned char* piece = source + i / CHUNKS * PIECE_BYTES;
                        x.base = own_line + (x_place.slot * a.slices + slice) * X_SLICE_BYTES;
                        barrier_wait(x_full + x_place.slot * 8, x_place.parity);
                        if (i < count * CHUNKS)
                            multiply_chunk(acc, load_chunk(piece + i % CHUNKS * CHUNK_BYTES, lane), load_ends(piece, lane), x);
                        __syncwarp();
                        if (lane < CLUSTER) {
                            if (CLUSTER > 1)
                                barrier_arrive_at(x_empty + x_place.slot * 8, lane);
                            else
                                barrier_arrive(x_empty + x_place.slot * 8);
                        }
                        x_place.advance(a.x_depth);
                    }
                }
                if (count > 0) {
                    __syncwarp();
                    stream.copy_stage(a, place.slot, lane);
                    place.advance(a.depth);
                }
            }
            float4* sums = (float4*)(memory + a.sums_at) + (long long)warp * TOKEN_STEPS * 32;
            if (a.slices > 1) {
                if (slice > 0) keep(sums, acc, lane);
                sync_threads(1 + group, a.slices * 32);
                if (slice == 0)
                    for (int other = 1; other < a.slices; ++other) add_kept(acc, sums + other * TOKEN_STEPS * 32, lane);
                if (round + 1 < a.rounds) sync_threads(1 + group, a.slices * 32);  // the next tile's go to the same place
            }
            if (slice == 0 && tile < tiles)
                store_tile({a.out, a.m, a.n, a.out_float32, a.pairs}, acc, tile * 16, first_token, lane);
        }
    }
    if (CLUSTER > 1) sync_cluster();  // nobody leaves while others still send to its shared memory
}
