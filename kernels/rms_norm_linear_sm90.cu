// RMSNorm of a few rows and their projection in one launch, for Hopper (sm_90a): at most 64 rows, K = COLUMNS a multiple of 64.
//
//   z = x, or x + residual                 RESIDUAL, residual.cuh
//   y = bf16(norm of z)                    norm.cuh; order of the sum: sums.cuh
//   out[m, n] = sum over k of y[m, k] * weight[n, k]
// Order of the product: one float32 accumulator an output that starts at +0 and walks k upward, one wgmma m64nNk16 for each
// sixteen; rounded once to bfloat16, to nearest even.
//
// Warp 8 brings the weight, TILE_K at a time, into a ring of `depth` stages in shared memory, while warps 0 to 7 normalise; then
// warps 0 to 3 multiply. The few loads of x go ahead of the queue of weights, which is kept short until y is there: what is asked
// for later waits behind it.
//   ROWS 1: one row, which every CTA normalises for itself into its shared memory.
//   ROWS 8, 16, ..., 64: all rows (m rounded up) in every CTA's shared memory, where a warp normalises a row in place.
//   ROWS 0: row r is normalised by CTA r modulo their number, which writes it to `normalised` and sets bit r of *ready; all CTAs
//           wait for all rows and bring them into the ring beside the weight. A CTA that has waited long normalises what is missing
//           itself: the bits are the same whoever does it, and no order in which CTAs begin can make them wait for ever.
//
// CLUSTER 2, 4 or 8: what an attention layer does with the heads follows in the same launch, head_parts.cuh; there are as many tiles
// as CTAs, and `out` is not written. CLUSTER 0: not so.
//
// Layouts: x, residual, total [m, K] with unit stride in a row; weight of the norm [K]; normalised [m, K]; weight [n, K], rows a
// multiple of 16 bytes apart; out [m, n]. Rows are read 16 bytes at a time. Types: x, residual bfloat16 (RESIDUAL_FLOAT32: float32);
// the norm's weight float32 where WEIGHT_FLOAT32. ready: two words that are zero before the first launch, and after each.
//
// Dynamic shared memory: with ROWS > 1 y, PIECES * PIECE_BYTES; the ring; 64-bit barriers, two a stage, and PIECES; at row_at the
// norm's weight (ROWS > 1) or the sum's scratch and z; with ROWS 1 y at y_at, with 2048 bytes behind it. Block: 288 threads. Grid: one
// CTA a multiprocessor at most, which take `tiles` tiles of TILE_N rows in turn.
#define SUM_BARRIER() sync_threads(1, GROUP)
#include "wgmma.cuh"
#include "outputs.cuh"
#include "one_row.cuh"
#include "ring.cuh"
#if CLUSTER > 0
#include "cluster_stores.cuh"
#include "head_parts.cuh"
#endif

constexpr int LINE = 64, LINES = TILE_K / LINE;  // k in a line of 128 bytes
constexpr int STAGES = (COLUMNS + TILE_K - 1) / TILE_K;
constexpr bool LOCAL = ROWS > 0, RESIDENT = ROWS > 1;
// 64 k of the weight, of y wherever it is, and all of a stage
constexpr u32 WEIGHT_LINE_BYTES = TILE_N * 128, X_LINE_BYTES = (LOCAL ? ROWS : X_ROWS) * 128;
constexpr u32 STAGE_BYTES = LINES * (WEIGHT_LINE_BYTES + (LOCAL ? 0 : X_LINE_BYTES));
// rows come in pieces, so that sums begin before all is there
constexpr int PIECE_LINES = (COLUMNS / LINE + 3) / 4, PIECES = RESIDENT ? (COLUMNS / LINE + PIECE_LINES - 1) / PIECE_LINES : 0;
constexpr u32 PIECE_BYTES = PIECE_LINES * ROWS * 128;
constexpr int CONSUMERS = 128, WARPS = GROUP / 32, THREADS = GROUP + 32;
// Named barriers, beside SUM_BARRIER's. None has all threads of the block: tools take such a one for __syncthreads, which no branch
// may part.
constexpr int ROWS_ASKED_FOR = 2, ROWS_THERE = 3;  // warp 0 says so to warp 8
constexpr int BARRIERS_THERE = 4;                  // warp 8 to warps 0 to 3; 5: to warps 4 to 7
constexpr int PATIENCE = 1 << 14;  // looks at *ready before a CTA helps itself
static_assert(GROUP == 256 && COLUMNS % LINE == 0, "warps 0 to 7 normalise whole lines");

struct Arguments {
    const X* x;
    const R* residual;
    const W* norm_weight;
    u16* normalised;
    Total* total;
    u64* ready;  // bits of rows; then CTAs that have seen them all
    void* out;
    long long x_stride, residual_stride, total_stride;
    float mean_operand, eps;
    int m, n, tiles;
    int depth;    // stages of the ring
    int pairs;    // two neighbouring outputs may be stored at once
    int early_stages;  // whose weights are fetched before the kernels in front of this one have ended
    int cached_stages;  // from early_stages to before this one: by then only asked for into the L2 cache, whoever still writes them
    int first_stages;  // and before y is there: no fewer, no more than the ring has
    int ahead_stages;  // RESIDENT: of these, asked for before the rows
    int barriers_at, row_at, y_at;  // bytes from the start of dynamic shared memory
    TensorMap weight_map, x_map;    // x_map: of x (RESIDENT) or of normalised
#if CLUSTER > 0
    HeadArguments heads;
#endif
};

// The ring: a stage has LINES pieces of y (unless LOCAL), then LINES pieces of the weight.
struct Ring {
    u32 first, full, empty, pieces;

    __device__ __forceinline__ Ring(const Arguments& a, u32 shared)
        : first(shared + PIECES * PIECE_BYTES), full(shared + a.barriers_at), empty(full + a.depth * 8),
          pieces(empty + a.depth * 8) {}
    __device__ __forceinline__ u32 x(int slot) const { return first + slot * STAGE_BYTES; }
    __device__ __forceinline__ u32 weight(int slot) const { return x(slot) + (LOCAL ? 0 : LINES * X_LINE_BYTES); }
};

// Warps 0 to 7: row r into registers.
static __device__ __forceinline__ void read_row(Row& row, const Arguments& a, int r) {
    row.read(a.x + r * a.x_stride, RESIDUAL != 0 ? a.residual + r * a.residual_stride : nullptr);
    row.read_weight(a.norm_weight);
}

static __device__ __forceinline__ Total* total_of(const Arguments& a, int row) {
    return RESIDUAL != 0 ? a.total + row * a.total_stride : nullptr;
}

// Warps 0 to 7: this CTA's rows, of which `row` has the first, and all rows seen. `seen`: a word of shared memory.
static __device__ __forceinline__ void share_rows(const Arguments& a, Row& row, unsigned char* shared_row, volatile u64* seen) {
#pragma unroll 1
    for (int own = blockIdx.x; own < a.m; own += gridDim.x) {
        if (own >= gridDim.x) read_row(row, a, own);
        row.normalise(a.mean_operand, a.eps, shared_row, total_of(a, own), a.normalised + (long long)own * COLUMNS);
        fence_global_for_copies();
        SUM_BARRIER();
        if (threadIdx.x == 0) publish_bits(a.ready, 1ull << own);
    }
    const u64 all = ~0ull >> (64 - a.m);
    if (threadIdx.x == 0) {
        u64 found = 0;
        for (int look = 0; look < PATIENCE && (found & all) != all; ++look) found = read_published(a.ready);
        *seen = found;
    }
    SUM_BARRIER();
    const u64 missing = all & ~*seen;
    if (missing != 0) {
        for (int r = 0; r < a.m; ++r) {
            if (!(missing >> r & 1)) continue;
            read_row(row, a, r);
            SUM_BARRIER();  // the row before has been read
            row.normalise(a.mean_operand, a.eps, shared_row, total_of(a, r), a.normalised + (long long)r * COLUMNS);
            fence_global_for_copies();
        }
        SUM_BARRIER();
    }
}

// By one thread, once its CTA has seen all rows: when all CTAs have, the words go back to zero for the next launch.
static __device__ __forceinline__ void clear_words(u64* ready) {
    if (count_published(ready + 1) == gridDim.x - 1) ready[0] = 0, ready[1] = 0;
}

#if ROWS > 1
// Warps 0 to 7: rows warp, warp + 8, ... of y. They lie one above the other in lines of 64 k, with the swizzle of 128 bytes.
static __device__ __forceinline__ void normalise_in_place(const Arguments& a, const Ring& ring, unsigned char* y, const W* weight) {
    constexpr int V = SUM_VECTOR, VECTORS = COLUMNS / V, STEPS = (VECTORS + 31) / 32;
    constexpr int STEP_LINES = 32 * V / LINE, STEP_BYTES = STEP_LINES * ROWS * 128;
    // a longer row does not fit into the registers beside the rest: it is read twice
    constexpr bool READ_TWICE = RESIDUAL == 0 && COLUMNS / 32 + SumByWarp::SETS * (SUM_ONE_CHAIN ? 1 : 4) > 160;
    const int lane = threadIdx.x % 32, line = lane * V / LINE, in_line = lane * V % LINE * 2;
#pragma unroll 1
    for (int row = threadIdx.x / 32; row < a.m; row += WARPS) {
        unsigned char* own = y + (line * ROWS + row) * 128 + (in_line ^ (row & 7) << 4);
        Total* total = blockIdx.x == 0 ? total_of(a, row) : nullptr;
        Pack<R, V> residual[RESIDUAL != 0 ? STEPS : 1];
#pragma unroll
        for (int i = 0; RESIDUAL != 0 && i < STEPS; ++i) {
            const int vector = lane + 32 * i;
            if (vector < VECTORS) residual[RESIDUAL != 0 ? i : 0] = load<V>(a.residual + row * a.residual_stride, vector);
        }
        Pack<Z, V> z[STEPS];
        SumByWarp sum;
        int there = 0;
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            for (; there < PIECES && there * PIECE_LINES < (i + 1) * STEP_LINES; ++there) barrier_wait(ring.pieces + there * 8, 0);
            z[i] = {};
            if (lane + 32 * i >= VECTORS) continue;
            const Pack<X, V> x = load<V>(reinterpret_cast<const X*>(own + i * STEP_BYTES), 0);
            z[i] = add_residual<V>(x, residual[RESIDUAL != 0 ? i : 0], total, lane + 32 * i);
            sum.add(z[i], i);
        }
        const float r = reciprocal_root(sum.total(), a.mean_operand, a.eps);
        if (READ_TWICE) __syncwarp();
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            if (lane + 32 * i >= VECTORS) continue;
            if (READ_TWICE) z[i] = load<V>(reinterpret_cast<const Z*>(own + i * STEP_BYTES), 0);
            store(reinterpret_cast<u16*>(own + i * STEP_BYTES), 0, weighted<u16>(z[i], load<V>(weight, lane + 32 * i), r));
        }
    }
    fence_shared_for_copies();
    SUM_BARRIER();
}
#endif

struct Bringer {
    const Arguments& a;
    const Ring& ring;

    __device__ __forceinline__ void bring_weight(int tile, int stage, int slot) const {
        const u32 barrier = ring.full + slot * 8;
        barrier_arrive_expecting(barrier, STAGE_BYTES);  // zeros from outside the tensors count too
        copy_box(ring.weight(slot), &a.weight_map, 0, tile * TILE_N, stage * LINES, barrier, EVICT_FIRST);
    }
    __device__ __forceinline__ void bring_x(int stage, int slot) const {
        if (!LOCAL) copy_box(ring.x(slot), &a.x_map, 0, 0, stage * LINES, ring.full + slot * 8, EVICT_NORMAL);
    }
    // RESIDENT: all rows of x to where y will be, and the norm's weight with the last piece of them.
    __device__ __forceinline__ void bring_rows(u32 y, u32 norm_weight) const {
#pragma unroll 1
        for (int piece = 0; piece < PIECES; ++piece) {
            const u32 barrier = ring.pieces + piece * 8, more = piece == PIECES - 1 ? COLUMNS * sizeof(W) : 0;
            barrier_arrive_expecting(barrier, PIECE_BYTES + more);
            copy_box(y + piece * PIECE_BYTES, &a.x_map, 0, 0, piece * PIECE_LINES, barrier, EVICT_NORMAL);
            if (more > 0) copy_bytes(norm_weight, a.norm_weight, more, barrier, EVICT_NORMAL);
        }
    }
    __device__ __forceinline__ void fill(int begin, int end) const {
#pragma unroll 1
        for (int stage = begin; stage < min(end, STAGES); ++stage) bring_weight(blockIdx.x, stage, stage);
    }
    __device__ __forceinline__ void prefetch(int begin, int end) const {
#pragma unroll 1
        for (int stage = begin; stage < min(end, STAGES); ++stage) prefetch_box(&a.weight_map, 0, blockIdx.x * TILE_N, stage * LINES);
    }
    // All that follow the first stages of the CTA's first tile.
    __device__ __forceinline__ void go_on() const {
        int stage = min(a.first_stages, STAGES);
        Place place = {stage, 1};  // the ring was empty
        if (stage == a.depth) place = {0, 0};
        for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x, stage = 0)
            for (; stage < STAGES; ++stage) {
                barrier_wait(ring.empty + place.slot * 8, place.parity);
                bring_weight(tile, stage, place.slot);
                bring_x(stage, place.slot);
                place.advance(a.depth);
            }
    }
};

// By warps 0 to 3; store(first row, tile, accumulators) gets what each warp has made.
template <class Store>
static __device__ __forceinline__ void multiply(const Arguments& a, const Ring& ring, u32 y, Store store) {
    const int warp = threadIdx.x / 32;
    Place place = {0, 0};
    // descriptors go on by additions alone: what they are made of costs more instructions than the products
    const u64 first_weight = operand_descriptor(ring.weight(0));
    const u64 first_y = ROWS == 1 ? row_descriptor(y) : operand_descriptor(RESIDENT ? y : ring.x(0));
    u64 weight = first_weight, resident = first_y;
    u32 full = ring.full, empty = ring.empty;
    asm volatile("" : "+r"(full), "+r"(empty));  // or they are computed again for every stage
    for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
        float c[TILE_N / 2];
        int before = 0;
        resident = first_y;
#pragma unroll 1
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_wait(full + place.slot * 8, place.parity);
            products_fence();
            const u64 x = LOCAL ? resident : weight - LINES * X_LINE_BYTES / 16;
#pragma unroll
            for (int line = 0; line < LINES; ++line) {
                // y ends with K, and the weight of the stage's rest is zero
                if (LOCAL && COLUMNS % TILE_K != 0 && stage * LINES + line >= COLUMNS / LINE) break;
#pragma unroll
                for (int step = 0; step < LINE / 16; ++step)
                    multiply_tiles<TILE_N>(c, x + (line * X_LINE_BYTES / 16 + 2 * step), weight + (line * WEIGHT_LINE_BYTES / 16 + 2 * step),
                                           stage > 0 || line > 0 || step > 0);
            }
            commit_products();
            wait_for_products<1>();  // the stage before has been read
            if (stage > 0 && threadIdx.x == 0) barrier_arrive(empty + before * 8);
            before = place.slot;
            place.advance(a.depth);
            weight = place.slot == 0 ? first_weight : weight + STAGE_BYTES / 16;
            resident += LINES * X_LINE_BYTES / 16;
        }
        wait_for_products<0>();
        if (threadIdx.x == 0) barrier_arrive(empty + before * 8);
        store(warp * 16, tile, c);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) rms_norm_linear_sm90(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 shared = shared_address(memory);
    const Ring ring(a, shared);
    const Bringer bringer = {a, ring};
    // the first lane's, so that the compiler sees that the warp is of one mind
    const int warp = (int)__shfl_sync(0xffffffffu, (float)(threadIdx.x / 32), 0), lane = threadIdx.x % 32;
#if CLUSTER > 0
    const HeadParts<WARPS, LOCAL ? ROWS : X_ROWS, true> parts = {a.heads, memory + a.heads.at, ring.pieces + PIECES * 8, a.m, a.eps};
    if (threadIdx.x == GROUP) parts.begin();
    __syncwarp();
    arrive_at_cluster();
#endif

    // With weights that are read so early the next kernel's may be read as early. Without, it begins when all before this one have
    // ended, so that what they wrote is there for it.
    const bool next_begins_early = a.early_stages > 0;
    if (next_begins_early) let_next_kernel_begin();
    unsigned char* row_memory = memory + a.row_at;
    if (warp == WARPS) {
        const bool sends = threadIdx.x == GROUP;
        if (sends) {
            fetch_tensor_map(&a.weight_map);
            if (ROWS != 1) fetch_tensor_map(&a.x_map);
        }
        for (int i = lane; i < 2 * a.depth + PIECES; i += 32) barrier_init(ring.full + i * 8, 1);
        barrier_init_fence();
        __syncwarp();
        if (sends) {
            bringer.fill(0, a.early_stages);
            bringer.prefetch(a.early_stages, a.cached_stages);
        }
        __syncwarp();
        arrive_threads(BARRIERS_THERE, 32 + CONSUMERS);
        if (RESIDENT) arrive_threads(BARRIERS_THERE + 1, 32 + CONSUMERS);
        wait_for_previous_kernel();
        if (!next_begins_early) let_next_kernel_begin();
        if (RESIDENT) {
            if (sends) {
                bringer.fill(a.early_stages, a.ahead_stages);
                bringer.bring_rows(shared + a.y_at, shared + a.row_at);
                bringer.fill(max(a.early_stages, a.ahead_stages), a.first_stages);
                for (int piece = 0; piece < PIECES; ++piece) barrier_wait(ring.pieces + piece * 8, 0);
            }
        } else {
            sync_threads(ROWS_ASKED_FOR, 64);
            if (sends) bringer.fill(a.early_stages, a.first_stages);
            __syncwarp();
            sync_threads(ROWS_THERE, 64);
        }
#if CLUSTER > 0
        wait_for_cluster();
#endif
        if (sends) {
            if (ROWS == 0) {
                fence_global_for_copies();
#pragma unroll 1
                for (int stage = 0; stage < min(a.first_stages, STAGES); ++stage) bringer.bring_x(stage, stage);
            }
            bringer.go_on();
        }
        return;
    }
    if (RESIDENT) sync_threads(BARRIERS_THERE + warp / 4, 32 + CONSUMERS);
    wait_for_previous_kernel();
#if ROWS > 1
    normalise_in_place(a, ring, memory + a.y_at, reinterpret_cast<const W*>(row_memory));
#else
    Row row;
    if (LOCAL || blockIdx.x < a.m) read_row(row, a, LOCAL ? 0 : blockIdx.x);
    if (warp == 0) arrive_threads(ROWS_ASKED_FOR, 64);
    if (LOCAL) {
        row.normalise(a.mean_operand, a.eps, row_memory, blockIdx.x == 0 ? total_of(a, 0) : nullptr,
                      reinterpret_cast<u16*>(memory + a.y_at));
        fence_shared_for_copies();
        SUM_BARRIER();
    } else {
        share_rows(a, row, row_memory, reinterpret_cast<u64*>(memory + a.y_at));
    }
    if (warp == 0) arrive_threads(ROWS_THERE, 64);
    if (ROWS == 0 && threadIdx.x == GROUP - 1) clear_words(a.ready);  // a thread that nobody waits for
    if (warp < CONSUMERS / 32) sync_threads(BARRIERS_THERE, 32 + CONSUMERS);
#endif
#if CLUSTER > 0
    if (warp / 4 == 1) parts.bring(warp - 4);
    wait_for_cluster();
    if (warp / 4 == 1) parts.brought();
    if (warp < CONSUMERS / 32)
        multiply(a, ring, shared + a.y_at, [&](int row, int, const float (&c)[TILE_N / 2]) { parts.send(row, c, lane); });
    __syncwarp();
    parts.finish();
#else
    const Output output = {a.out, a.m, a.n, false, a.pairs != 0};
    if (warp < CONSUMERS / 32)
        multiply(a, ring, shared + a.y_at, [&](int row, int tile, const float (&c)[TILE_N / 2]) {
            output.store_rows<TILE_N>(0, row, tile * TILE_N, c, lane);
        });
#endif
}
