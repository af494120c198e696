// Products with quantised weights for 9 rows of x and more (sm_90a): a cluster makes 64 columns of the output at a time for TOKENS
// rows of x, each of its CTAs from one slice of K, whose x it keeps in shared memory.
//
// Order and decoding: quantised.cuh, wgmma m64nNk16 in place of mma.m16n8k16, which gives the same bits. The slices' accumulators
// go to the CTA of the cluster that adds them, first to last: accumulators come in units of sixteen columns and eight rows of x,
// in the order of rows, of which each CTA adds OWN. The CTAs begin with different receivers, so as not to crowd one.
//
// Four warpgroups take blocks of 64 columns in turn, a warp sixteen of the columns; its weights come by bulk copies into a ring of
// its own, `depth` stages of STAGE_PIECES pieces (cufuse/quantised/tiles.py). After every `batch` blocks of the cluster units are
// exchanged and added.
//
// x       [m, k] bfloat16 bits in whole pieces, as a tensor map with boxes of TOKENS lines of 128 bytes, swizzled
// weight  [tiles, pieces, PIECE_BYTES]
// out     [m, n] bfloat16 bits (rounded once, to nearest even), or float32
// Grid: CLUSTER times the clusters, by ceil(m / TOKENS). Slices of `slice_pieces` pieces, the last one shorter, none empty.
#include "wgmma_registers.cuh"
#include "cluster_stores.cuh"
#include "quantised.cuh"
#include "quantised_stream.cuh"

constexpr int WARPGROUPS = 4, WARPS = 4 * WARPGROUPS;
constexpr int UNITS = 4 * TOKEN_STEPS, OWN = (UNITS + CLUSTER - 1) / CLUSTER;
constexpr u32 UNIT_BYTES = CLUSTER * 512;   // of all slices
constexpr u32 X_CHUNK_BYTES = TOKENS * 128;  // 64 k

struct Arguments {
    int m, n, pieces, slice_pieces;
    int blocks, batch;            // of 64 columns; those of a cluster between two exchanges, a multiple of WARPGROUPS or all
    int depth;
    int rings_at, x_at, sums_at;  // bytes from the start of dynamic shared memory; barriers come first
    int out_float32, pairs;
    int programmatic;             // launched as a dependent: only weights may be touched before the previous kernel ends
    int padding;
    const unsigned char* weight;
    void* out;
    TensorMap x_map;
};

// 64 k upward for the warpgroup's 64 columns; x: descriptor of the chunk's first sixteen.
static __device__ __forceinline__ void multiply_chunk(Accumulators& acc, const Chunk& chunk, const Words2& ends, u64 x) {
    u32 ones[4] = {0x3F803F80u, 0x3F803F80u, 0x3F803F80u, 0x3F803F80u};
    const u32 exponents = exponents_of_codes();
#pragma unroll
    for (int group = 0; group < 4 / GROUP_STEPS; ++group) {
        u32 a[GROUP_STEPS][4];
#pragma unroll
        for (int step = 0; step < GROUP_STEPS; ++step) decode(a[step], chunk, group * GROUP_STEPS + step, exponents);
#pragma unroll
        for (int minima = 0; minima < (FORMAT == 2 ? 2 : 1); ++minima) {
            float factors[2];
#pragma unroll
            for (int half = 0; half < 2; ++half)
                factors[half] = minima ? negated_minimum(chunk, ends, half, group) : scale_of(chunk, ends, half, group);
            float c[TOKENS / 2];
            products_fence();
#pragma unroll
            for (int step = 0; step < GROUP_STEPS; ++step)
                multiply_fragments<TOKENS>(c, minima ? ones : a[step], x + 2 * (group * GROUP_STEPS + step), step > 0);
            commit_products();
            wait_for_products<0>();
#pragma unroll
            for (int j = 0; j < TOKEN_STEPS; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[j][i] = __fmaf_rn(factors[i / 2], c[4 * j + i], acc[j][i]);
        }
    }
}

// Accumulators j and j ^ rank change places.
static __device__ __forceinline__ void rotate(Accumulators& acc, int rank) {
#pragma unroll
    for (int bit = 1; bit < TOKEN_STEPS; bit *= 2) {
        if (!(rank & bit)) continue;
#pragma unroll
        for (int j = 0; j < TOKEN_STEPS; ++j)
#pragma unroll
            for (int i = 0; i < 4 && !(j & bit); ++i) {
                const float kept = acc[j][i];
                acc[j][i] = acc[j ^ bit][i];
                acc[j ^ bit][i] = kept;
            }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) quantised_cluster_sm90(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 shared = shared_address(memory), x_full = shared;
    // the first lane's, so that the compiler sees that the warp is of one mind
    const int warp = (int)__shfl_sync(0xffffffffu, (float)(threadIdx.x / 32), 0), lane = threadIdx.x % 32;
    const int slice = (int)cluster_rank(), cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    const int begin = slice * a.slice_pieces, end = min(a.pieces, begin + a.slice_pieces);
    const int first_token = blockIdx.y * TOKENS, tiles = (a.n + 15) / 16;
    int tile = (cluster + clusters * (warp / 4)) * 4 + warp % 4;
    const int tile_step = clusters * WARPGROUPS * 4;
    Stream stream = {shared + a.rings_at + warp * a.depth * STAGE_BYTES, shared + 8 + warp * a.depth * 8,
                     tile, tile_step, tiles, begin, begin, end};
    const auto copy_x = [&] {
        if (threadIdx.x != 0) return;
        const int chunks = (end - begin) * CHUNKS;
        barrier_arrive_expecting(x_full, chunks * X_CHUNK_BYTES);
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk)
            copy_box(shared + a.x_at + chunk * X_CHUNK_BYTES, &a.x_map, 0, first_token, begin * CHUNKS + chunk, x_full, EVICT_NORMAL);
    };

    // x first, ahead of the long queue of weights, unless the kernel before this one still has to write it
    let_next_kernel_begin();
    if (threadIdx.x == 0) {
        fetch_tensor_map(&a.x_map);
        barrier_init(x_full, 1);
        barrier_init_fence();
    }
    if (!a.programmatic) copy_x();
    __syncwarp();
    stream.begin_barriers(a.depth, lane);
    stream.fill(a, 0, a.depth, WARPS, lane);
    meet_cluster();
    wait_for_previous_kernel();
    if (a.programmatic) copy_x();
    __syncwarp();
    barrier_wait(x_full, 0);

    const u64 x = operand_descriptor(shared + a.x_at);
    const unsigned char* ring = memory + a.rings_at + warp * a.depth * STAGE_BYTES;
    const u32 to = shared + a.sums_at + slice * 512 + lane * 16;
    const int rank = TOKEN_STEPS == CLUSTER ? slice : slice * TOKEN_STEPS / CLUSTER;
    Place place = {0, 0};
    for (int first = 0; cluster + clusters * first < a.blocks; first += a.batch) {
        for (int i = first + warp / 4; i < first + a.batch && cluster + clusters * i < a.blocks; i += WARPGROUPS, tile += tile_step) {
            const bool exists = tile < tiles;  // what is made of other bytes is never stored
            Accumulators acc = {};
            u64 operand = x;
#pragma unroll 1
            for (int piece = begin; piece < end; piece += STAGE_PIECES) {
                const unsigned char* source = ring + place.slot * STAGE_BYTES;
                if (exists) barrier_wait(stream.barriers + place.slot * 8, place.parity);
#pragma unroll 1
                for (int j = 0; j < min(STAGE_PIECES, end - piece); ++j, source += PIECE_BYTES) {
                    const Words2 ends = load_ends(source, lane);
#pragma unroll 1
                    for (int chunk = 0; chunk < CHUNKS; ++chunk, operand += X_CHUNK_BYTES / 16)
                        multiply_chunk(acc, load_chunk(source + chunk * CHUNK_BYTES, lane), ends, operand);
                }
                if (exists) {
                    __syncwarp();
                    stream.copy_stage(a, place.slot, lane);
                    place.advance(a.depth);
                }
            }
            rotate(acc, rank);
#pragma unroll
            for (int j = 0; j < TOKEN_STEPS; ++j) {
                const int unit = (j ^ rank) * 4 + warp % 4;
                store_16_at(to + ((i - first) * OWN + unit % OWN) * UNIT_BYTES, unit / OWN, acc[j]);
            }
        }
        sync_cluster();
        for (int unit = warp; unit < a.batch * OWN; unit += WARPS) {
            const int block = cluster + clusters * (first + unit / OWN), own = slice * OWN + unit % OWN;
            if (block >= a.blocks || own >= UNITS) continue;
            const float4* kept = (const float4*)(memory + a.sums_at + unit * UNIT_BYTES) + lane;
            float4 sum = kept[0];
#pragma unroll
            for (int other = 1; other < CLUSTER; ++other) {
                const float4 next = kept[other * 32];
                sum.x = __fadd_rn(sum.x, next.x), sum.y = __fadd_rn(sum.y, next.y);
                sum.z = __fadd_rn(sum.z, next.z), sum.w = __fadd_rn(sum.w, next.w);
            }
            const float c[4] = {sum.x, sum.y, sum.z, sum.w};
            store_eight({a.out, a.m, a.n, a.out_float32, a.pairs}, c, block * 64 + own % 4 * 16, first_token + own / 4 * 8, lane);
        }
        // room for the next units
        if (cluster + clusters * (first + a.batch) < a.blocks) sync_cluster();
    }
}
