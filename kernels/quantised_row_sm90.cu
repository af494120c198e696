// RMSNorm of a few rows (ROWS, 1 to 16) and their product with a quantised weight in one launch (sm_90 on).
//
//   z = x, or x + residual                 RESIDUAL, residual.cuh: the new residual is stored by the first CTA
//   y = bf16(norm of z)                    norm.cuh; order of the sum: sums.cuh
//   out[m, n] = sum over k of y[m, k] * weight[n, k], rounded once to bfloat16, to nearest even, or float32
// Order of the product and decoding: quantised.cuh. K is cut into SLICES, whose accumulators are added first to last.
//
// Every CTA normalises the rows for itself: one by its first GROUP threads (one_row.cuh), more as few_rows.cuh says. It has TILES
// times SLICES warps that multiply: a slice of K each for TILES tiles of 16 columns at a time, ROUNDS times. A warp's share of a
// tile is contiguous in memory (cufuse/quantised/tiles.py); it comes by bulk copies into a ring of the warp's own, DEPTH stages of
// STAGE_PIECES pieces, which the warp refills itself as soon as it has read one.
//
// PACED 0: each warp fills its own ring, the last stages behind the loads of x. 1 (several rows): the warps that do not normalise
// fill all rings, with one stage of each under way until x has come, which waits behind what was asked for before.
// CLUSTER 2, 4 or 8 (ROWS 1): a CTA has EACH tiles beside each other, the last ones fewer or none, a cluster whole heads, which it
// finishes instead of writing `out` (head_parts.cuh). 0: tiles are dealt out in turn.
//
// x, residual, total [ROWS, K] with unit stride in a row, weight of the norm [K]: 16 bytes at a time.
// weight [ceil(n / 16), K / PIECE_K, PIECE_BYTES]. out [ROWS, n].
// Types: x bfloat16, residual too (RESIDUAL_FLOAT32: float32); the norm's weight float32 where WEIGHT_FLOAT32.
#define PARTS 1
#if ROWS == 1
#define SUM_BARRIER() sync_threads(14, GROUP)
#define TOKENS 1
#else
#define SUM_BARRIER __syncthreads
#define TOKENS (ROWS <= 8 ? 8 : 16)
#endif
#include "pipeline.cuh"
#include "quantised.cuh"
#include "ring.cuh"
#if ROWS == 1
#include "one_row.cuh"
constexpr int READERS = GROUP;  // threads that normalise
static_assert(SUM_IN_REGISTERS || Z_IN_MEMORY, "room for z behind the sum's scratch");
#else
#include "few_rows.cuh"
constexpr int READERS = ROWS * ROW_THREADS;
#endif

constexpr int PIECES = COLUMNS / PIECE_K, STAGES = (SLICE_PIECES + STAGE_PIECES - 1) / STAGE_PIECES;
constexpr u32 STAGE_BYTES = STAGE_PIECES * PIECE_BYTES, PIECE_X_BYTES = PIECE_K * 2;
#if CLUSTER > 0
constexpr int TILE_N = 16 * EACH;
#include "cluster_stores.cuh"
#include "head_parts.cuh"
#endif

constexpr int MULTIPLIERS = 32 * TILES * SLICES, OTHERS = CLUSTER > 0 ? 128 : 0;
constexpr int THREADS = READERS + OTHERS > MULTIPLIERS ? READERS + OTHERS : MULTIPLIERS;
constexpr u32 Y_PITCH = COLUMNS * 2 + 16;  // bytes from row to row: eight rows' units of 16 bytes cover all banks
constexpr u32 X_HAS_COME_AT = 2024, HEADS_AT = 2032, NORM_WEIGHT_AT = 2040;  // barriers behind those of the rings
constexpr bool REFILLED = ROUNDS * STAGES > DEPTH;
// Named barriers; 1 + tile: of the warps of a tile. Where one has all threads of the block they all wait there: tools take it for
// __syncthreads, which no branch may part.
constexpr int WEIGHTS_MAY_COME = 15;
constexpr int REGISTERS_LEFT = CLUSTER > 0 ? 0 : 128;  // threads of the kernel that follows for which registers are left
static_assert(COLUMNS % PIECE_K == 0 && (SLICES == 1 || TILES < 14), "whole pieces; barriers");
static_assert(MULTIPLIERS / 32 * DEPTH * 8 <= X_HAS_COME_AT && NORM_WEIGHT_AT + 8 <= 2048, "barriers");
static_assert(CLUSTER == 0 || ROWS == 1, "heads of one row");
static_assert(!PACED || (ROWS > 1 && THREADS > READERS && !REFILLED), "somebody fills all rings, once");

struct Arguments {
    const unsigned char* weight;
    const X* x;
    const R* residual;
    const W* norm_weight;
    Total* total;
    void* out;
    long long x_stride, residual_stride, total_stride;  // in elements
    float mean_operand, eps;
    int n;
    int weights_ready;  // they may be fetched before the kernels in front of this one have ended:
    int early_stages;   // these, where PACED is 0
    int out_float32;
    int rings_at, y_at, row_at, sums_at;  // bytes from the start of dynamic shared memory; barriers come first. row_at: of the
                                          // sum's scratch, then z (Z_IN_MEMORY), or with more rows the norm's weight
#if CLUSTER > 0
    HeadArguments heads;
#endif
};

// The weight's way into one ring.
struct Share {
    const unsigned char* next;
    u32 ring, barriers;
    int tile, step, tiles;  // tiles: one behind the last
    int count, left;        // pieces of the slice, and how many of the next tile's have not been asked for

    // The next stage into `slot`, if there is one, after it has been read what lies there. sends: this lane, of those that call it.
    __device__ __forceinline__ void copy_stage(int slot, bool sends) {
        if (tile >= tiles) return;
        const int pieces = PIECES % SLICE_PIECES == 0 && SLICE_PIECES % STAGE_PIECES == 0 ? STAGE_PIECES : min(STAGE_PIECES, left);
        if (sends) {
            barrier_arrive_expecting(barriers + slot * 8, pieces * PIECE_BYTES);
            copy_bytes(ring + slot * STAGE_BYTES, next, pieces * PIECE_BYTES, barriers + slot * 8, EVICT_FIRST);
        }
        next += pieces * PIECE_BYTES;
        left -= pieces;
        if (left == 0) {
            next += ((long long)step * PIECES - count) * PIECE_BYTES;
            tile += step;
            left = count;
        }
    }
    __device__ __forceinline__ void fill(int slot, int last, bool sends) {
#pragma unroll 1
        for (; slot < last; ++slot) copy_stage(slot, sends);
    }
    __device__ __forceinline__ void begin_barriers() const {
#pragma unroll
        for (int slot = 0; slot < DEPTH; ++slot) barrier_init(barriers + slot * 8, 1);
        barrier_init_fence();
    }
};

#if PACED
// Until a load has come.
static __device__ __forceinline__ void need(u32 loaded) {
#ifdef __CUDA_ARCH__
    asm volatile("" : : "r"(loaded) : "memory");
#endif
}

// By each lane that has a ring of its own to fill, and the others of its warp.
static __device__ __forceinline__ void keep_pace(Share& share, bool exists, u32 x_has_come) {
    int stage = 0;
    if (exists) share.copy_stage(stage++, true);
    __syncwarp();
    while (!__any_sync(0xffffffffu, barrier_completed(x_has_come, 0))) {  // the warp leaves as one
        if (exists && stage < DEPTH && barrier_completed(share.barriers + (stage - 1) * 8, 0)) share.copy_stage(stage++, true);
        __syncwarp();
    }
    if (exists) share.fill(stage, DEPTH, true);
    __syncwarp();
}
#endif

// y from shared memory: this lane's line of the matrices for two sixteens of k. Tokens that do not exist repeat the
// last, or beyond eight are whatever lies there.
struct FromRow {
    u32 base;

    __device__ __forceinline__ Activations operator()(int group, int j) const {
        u32 matrices[4];
        load_matrices(matrices, base + j * 8 * Y_PITCH + group * GROUP_STEPS * 32);
        Activations found;
#pragma unroll
        for (int i = 0; i < GROUP_STEPS; ++i) found.b[i][0] = matrices[2 * i], found.b[i][1] = matrices[2 * i + 1];
        return found;
    }
};

// The chunks of a piece; x goes on behind them.
static __device__ __forceinline__ void multiply_piece(Accumulators& acc, const unsigned char* piece, FromRow& x, int lane) {
    const Words2 ends = load_ends(piece, lane);
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk, x.base += PIECE_X_BYTES / CHUNKS)
        multiply_chunk(acc, load_chunk(piece + chunk * CHUNK_BYTES, lane), ends, x);
}

// Until the slices of a tile have left their sums. Those that `leave` need not wait: nothing more comes for them.
static __device__ __forceinline__ void meet_slices(u32 barrier, bool leave) {
    if (SLICES == 1)
        __syncwarp();
    else if (leave && SLICES * 32 < THREADS)
        arrive_threads(barrier, SLICES * 32);
    else
        sync_threads(barrier, SLICES * 32);
}

extern "C" __global__ void __launch_bounds__(THREADS + REGISTERS_LEFT, 1)
    quantised_row_sm90(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 shared = shared_address(memory);
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;  // known to be the same in all lanes
    const int tile_of_cta = warp / SLICES, slice = warp % SLICES, begin = slice * SLICE_PIECES;
    const int count = min(SLICE_PIECES, PIECES - begin);
    // tiles of the CTA, from the first to before the last, and the distance of two of them
    const int first = CLUSTER > 0 ? blockIdx.x * EACH : blockIdx.x, next = CLUSTER > 0 ? 1 : gridDim.x, step = next * TILES;
    const int tiles = CLUSTER > 0 ? min(first + EACH, a.n / 16) : (a.n + 15) / 16;
    const bool multiplies = MULTIPLIERS == THREADS || warp < MULTIPLIERS / 32, reads = READERS == THREADS || warp < READERS / 32;
    int tile = multiplies ? first + next * tile_of_cta : tiles;
    const auto share_of = [&](int ring) -> Share {
        const int from = first + next * (ring / SLICES), begin = ring % SLICES * SLICE_PIECES;
        const int pieces = min(SLICE_PIECES, PIECES - begin);
        return {a.weight + ((long long)from * PIECES + begin) * PIECE_BYTES, shared + a.rings_at + ring * DEPTH * STAGE_BYTES,
                shared + ring * DEPTH * 8, ring < MULTIPLIERS / 32 ? from : tiles, step, tiles, pieces, pieces};
    };
    const bool sends = lane == 0;
    const u32 x_has_come = shared + X_HAS_COME_AT;
    Share share = share_of(warp);

#if CLUSTER > 0
    const HeadParts<MULTIPLIERS / 32, 1, false> parts = {a.heads, memory + a.heads.at, shared + HEADS_AT, ROWS, a.eps};
    if (threadIdx.x == 0) parts.begin();
    __syncwarp();
    arrive_at_cluster();
#endif
    begin_as_dependent(a.weights_ready);
    if (PACED && threadIdx.x == 0) barrier_init(x_has_come, 1);
#if ROWS == 1
    Row row;
    if (reads) row.read_weight(a.norm_weight);
#else
    FewRows rows;
    if (threadIdx.x == 0) {
        barrier_init(shared + NORM_WEIGHT_AT, 1);
        barrier_init_fence();
        barrier_arrive_expecting(shared + NORM_WEIGHT_AT, COLUMNS * sizeof(W));
        copy_bytes(shared + a.row_at + ROWS_SCRATCH * 4, a.norm_weight, COLUMNS * sizeof(W), shared + NORM_WEIGHT_AT, EVICT_NORMAL);
    }
    __syncwarp();
#endif
    const auto read = [&] {
        wait_for_previous_kernel();
#if ROWS == 1
        row.read(a.x, a.residual);
#else
        rows.read(a.x, a.x_stride, a.residual, a.residual_stride);
#endif
    };
#if PACED
    // x goes ahead of the weight, unless it still has to be written
    constexpr int MEETING = THREADS - READERS + 32;
    if (reads) {
        if (warp == 0 && a.weights_ready) arrive_threads(WEIGHTS_MAY_COME, MEETING);
        read();
        if (warp == 0) {
            if (!a.weights_ready) arrive_threads(WEIGHTS_MAY_COME, MEETING);
            if (sends) {
                need(rows.x[0].pairs[0]);
                barrier_arrive(x_has_come);
            }
            __syncwarp();
        }
    } else {
        const int ring = warp - READERS / 32 + lane * ((THREADS - READERS) / 32);
        const bool exists = ring < MULTIPLIERS / 32;
        Share other = share_of(ring);
        if (exists) other.begin_barriers();
        __syncwarp();
        sync_threads(WEIGHTS_MAY_COME, MEETING);
        keep_pace(other, exists && other.tile < tiles, x_has_come);
    }
#else
    if (!a.weights_ready && reads) read();
    if (multiplies && sends) share.begin_barriers();
    __syncwarp();
    share.fill(0, a.early_stages, sends);
    if (a.weights_ready && reads) read();
    // the few loads of x go ahead of the rest of the weight
    if (a.early_stages < DEPTH) {
        if (warp == READERS / 32 - 1 && READERS < THREADS) arrive_threads(WEIGHTS_MAY_COME, THREADS - READERS + 32);
        if (!reads) sync_threads(WEIGHTS_MAY_COME, THREADS - READERS + 32);
        share.fill(a.early_stages, DEPTH, sends);
    }
#endif
#if CLUSTER > 0
    const bool brings = !reads && warp < READERS / 32 + 4;
    if (brings) {
        wait_for_previous_kernel();
        parts.bring(warp - READERS / 32);
    }
#endif
    Total* total = blockIdx.x == 0 ? a.total : nullptr;
#if ROWS == 1
    if (reads) row.normalise(a.mean_operand, a.eps, memory + a.row_at, total, (u16*)(memory + a.y_at));
#else
    rows.normalise(a.x, a.x_stride, a.residual, a.residual_stride, total, a.total_stride, a.mean_operand, a.eps,
                   (float*)(memory + a.row_at), (const W*)(memory + a.row_at + ROWS_SCRATCH * 4), shared + NORM_WEIGHT_AT,
                   memory + a.y_at, Y_PITCH);
#endif
    __syncthreads();
#if CLUSTER > 0
    wait_for_cluster();
    if (brings) parts.brought();
#endif

    const u32 line = ROWS == 1 ? 0 : ROWS < 8 ? min(lane % 8, ROWS - 1) : lane % 8;
    const u32 own_y = shared + a.y_at + line * Y_PITCH + begin * PIECE_X_BYTES + lane / 8 * 16;
    const unsigned char* ring = memory + a.rings_at + warp * DEPTH * STAGE_BYTES;
    Place place = {0, 0};
#pragma unroll 1
    for (int round = 0; round < ROUNDS && tile < tiles; ++round, tile += step) {
        Accumulators acc = {};
        FromRow x = {own_y};
#pragma unroll 1
        for (int left = count; left > 0; left -= STAGE_PIECES) {
            const unsigned char* stage = ring + place.slot * STAGE_BYTES;
            barrier_wait(share.barriers + place.slot * 8, place.parity);
            if (left >= STAGE_PIECES) {
#pragma unroll 2
                for (int i = 0; i < STAGE_PIECES; ++i) multiply_piece(acc, stage + i * PIECE_BYTES, x, lane);
            } else {
#pragma unroll 1
                for (int i = 0; i < left; ++i) multiply_piece(acc, stage + i * PIECE_BYTES, x, lane);
            }
            if (REFILLED) {
                __syncwarp();
                share.copy_stage(place.slot, sends);
            }
            place.advance(DEPTH);
        }
        // two places in turn, so that slices go on while the first one adds
        const int turn = round % 2 * TILES + tile_of_cta;
        const bool last = ROUNDS == 1 || tile + step >= tiles;
#if ROWS == 1
        // lanes with t = 0 hold the row's sums
        float* sums = (float*)(memory + a.sums_at) + turn * SLICES * 16;
        if (lane % 4 == 0) {
            sums[slice * 16 + lane / 4] = acc[0][0];
            sums[slice * 16 + 8 + lane / 4] = acc[0][2];
        }
        meet_slices(1 + tile_of_cta, slice > 0 && last);
        if (slice > 0) continue;
        float sum = sums[lane % 16];
#pragma unroll
        for (int other = 1; other < SLICES; ++other) sum = __fadd_rn(sum, sums[other * 16 + lane % 16]);
#if CLUSTER > 0
        const u32 word = pack_bf16(sum, __shfl_down_sync(0xffffffffu, sum, 1));
        // two neighbouring columns to the CTA that finishes the row's heads
        const u32 to = shared_address(parts.products()) + (parts.rank() * TILE_N + (tile - first) * 16 + lane) * 2;
        if (lane < 16 && lane % 2 == 0) send_4(address_in(to, 0), word, address_in(parts.barrier, 0));
        continue;
#endif
        if (lane >= 16) continue;
        const int at = tile * 16 + lane;
        if (at >= a.n) continue;
        if (a.out_float32)
            ((float*)a.out)[at] = sum;
        else
            ((u16*)a.out)[at] = (u16)pack_bf16(sum, 0.0f);
#else
        float4* sums = (float4*)(memory + a.sums_at) + turn * SLICES * TOKEN_STEPS * 32;
        if (slice > 0) keep(sums + slice * TOKEN_STEPS * 32, acc, lane);
        meet_slices(1 + tile_of_cta, slice > 0 && last);
        if (slice > 0) continue;
#pragma unroll
        for (int other = 1; other < SLICES; ++other) add_kept(acc, sums + other * TOKEN_STEPS * 32, lane);
        store_tile({a.out, ROWS, a.n, a.out_float32, a.n % 2 == 0}, acc, tile * 16, 0, lane);
#endif
    }
#if CLUSTER > 0
    if (multiplies) parts.finish();
#endif
}
