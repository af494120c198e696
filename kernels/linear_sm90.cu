// linear on Hopper's warpgroup products (sm_90a): tiles of 64 or 128 rows of x by TILE_N rows of the weight, a persistent grid.
//
// out[m, n] = sum over k of x[m, k] * weight[n, k], any M and N; rows of x and weight are multiples of 16 bytes apart.
// Order: each output has one float32 accumulator that starts at +0 and walks k upward, one wgmma m64nNk16 for each sixteen;
// past K both operands are zero, which leaves an accumulator as it is. With slices, slice s covers k_per_slice values of k
// (a multiple of 64) and writes its accumulators to out + s * M * N, as float32.
// Output: the accumulator, or the accumulator rounded once to bfloat16 (nearest even).
//
// Warpgroup 0 brings TILE_K of both operands at a time into a ring of `depth` stages in dynamic shared memory, each operand by a
// thread of its own: one for both would take longer for a narrow tile's stage than its products; CONSUMERS more warpgroups multiply 64
// rows of the tile each. Where M is smaller than a tile only x_rows rows of it have room; of the last tiles only rows that exist are
// brought (zeros for others come slowly: some 8 cycles a line on an H200), but where a cluster shares them or an operand's stage is one
// box: the products read whatever lies behind them, which reaches outputs that do not exist and no others.
// A cluster is CLUSTER_M tiles high and CLUSTER_N wide: each CTA fetches its share of the x that its row of tiles needs and of
// the weight that its column of tiles needs, and sends it to all who need it.
// With CONSUMERS = 1 an operand's stage is one copy of a 3-D box, the matrix seen as [K/64][rows][64], and K a multiple of 64.
// BOX_STORE 1: out is bfloat16 and leaves through staging buffers and the copy engine (N a multiple of 8, out aligned to 16): a
// finished tile is rounded, which halves the registers that it takes, and its boxes of 64 or 32 columns are stored during the next
// tile's first stages, one box each, while the tensor cores work; tiles have at least that many stages.
// BOX_STORE 0: every thread stores its own values, bfloat16 or float32.
#include "wgmma.cuh"
#include "cluster_stores.cuh"
#include "outputs.cuh"
#include "ring.cuh"

constexpr int TILE_M = 64 * CONSUMERS, LINE = 64;  // k in a line of 128 bytes
constexpr int LINES = TILE_K / LINE;
constexpr bool DEEP = CONSUMERS == 1;
constexpr int CLUSTER = CLUSTER_M * CLUSTER_N, SENDERS = CLUSTER_M + CLUSTER_N - 1;
constexpr int THREADS = 128 * (1 + CONSUMERS);
constexpr u32 WEIGHT_THREAD = 0, X_THREAD = 32;  // that ask for the operands
constexpr u32 WEIGHT_LINE_BYTES = TILE_N * 128;  // one line of each of the tile's weight rows
constexpr u32 SHARE_N = TILE_N / CLUSTER_M;      // rows of the weight that a CTA fetches
constexpr int BOX_COLUMNS = TILE_N % 64 == 0 ? 64 : 32, BOXES = BOX_STORE ? TILE_N / BOX_COLUMNS : 0;
constexpr u32 BUFFER_BYTES = 16 * BOX_COLUMNS * 2, BUFFERS = 4096 / BUFFER_BYTES;  // 16 rows of a box; a warp has 4 KB
constexpr int BOX_PAIRS = BOX_COLUMNS / 4;
static_assert(SHARE_N % 8 == 0, "a share begins at a period of the swizzle");
static_assert(!DEEP || (CLUSTER_M == 1 && LINES % CLUSTER_N == 0), "CTAs of a cluster fetch the same number of lines of x");
static_assert(!BOX_STORE || TILE_N % BOX_COLUMNS == 0, "boxes cover a tile");

struct Arguments {
    int m, n, k, k_per_slice;
    int tiles_m, tiles_n, slices;
    int group_m;  // clusters one above the other that run together, for the L2 cache
    int x_rows;   // rows of x in a stage: TILE_M, or fewer where M is; a multiple of 8
    int depth;    // stages of the ring
    int out_float32, pairs;
    int weights_ready;            // weights, and they alone, may be read before the previous kernel ends
    int buffers_at, barriers_at;  // bytes from the start of dynamic shared memory
    void* out;
    TensorMap x_map, weight_map, out_map;
    TensorMap last_x_map, last_weight_map;  // boxes of the rows that the last tiles have, where those are fewer
};

// This CTA's place in its cluster.
struct Rank {
    int m, n;

    __device__ __forceinline__ Rank() {
        const int rank = CLUSTER > 1 ? cluster_rank() : 0;
        m = rank % CLUSTER_M, n = rank / CLUSTER_M;
    }
    static __device__ __forceinline__ int at(int m, int n) { return m + n * CLUSTER_M; }
    // All who need the same rows of x, and the same rows of the weight.
    __device__ __forceinline__ u32 same_m() const {
        u32 mask = 0;
        for (int i = 0; i < CLUSTER_N; ++i) mask |= 1u << at(m, i);
        return mask;
    }
    __device__ __forceinline__ u32 same_n() const { return ((1u << CLUSTER_M) - 1) << at(0, n); }
    // Number i of the SENDERS CTAs that write to this one's shared memory, itself among them.
    __device__ __forceinline__ int sender(int i) const {
        if (i < CLUSTER_M) return at(i, n);
        const int other = i - CLUSTER_M;
        return at(m, other < n ? other : other + 1);
    }
};

// Piece of work number `index`: a cluster's tiles and a slice of K.
struct Work {
    int tile_m, tile_n, k, stages;  // first row, column and k; number of stages
    int slice;

    __device__ __forceinline__ Work(const Arguments& a, int index, const Rank& rank) {
        const int high = (a.tiles_m + CLUSTER_M - 1) / CLUSTER_M, wide = (a.tiles_n + CLUSTER_N - 1) / CLUSTER_N;
        int row = 0, column = index;
        slice = 0;
        if (high > 1 || a.slices > 1) {  // divisions, which a short launch would wait for
            slice = index / (high * wide);
            index -= slice * high * wide;
            const int group = index / (a.group_m * wide), inside = index - group * a.group_m * wide;
            const int height = min(a.group_m, high - group * a.group_m);
            row = group * a.group_m + inside % height;
            column = inside / height;
        }
        tile_m = (row * CLUSTER_M + rank.m) * TILE_M;
        tile_n = (column * CLUSTER_N + rank.n) * TILE_N;
        k = slice * a.k_per_slice;
        stages = (min(a.k - k, a.k_per_slice) + TILE_K - 1) / TILE_K;
    }
    static __device__ __forceinline__ int count(const Arguments& a) {
        return (a.tiles_m + CLUSTER_M - 1) / CLUSTER_M * ((a.tiles_n + CLUSTER_N - 1) / CLUSTER_N) * a.slices;
    }
};

// The ring: a stage has LINES pieces of x, then LINES pieces of the weight.
struct Ring {
    u32 first, full, empty, x_line_bytes, stage_bytes;
    int depth;

    __device__ __forceinline__ Ring(const Arguments& a, u32 shared)
        : first(shared), full(shared + a.barriers_at), empty(full + a.depth * 8), x_line_bytes(a.x_rows * 128),
          stage_bytes(LINES * (x_line_bytes + WEIGHT_LINE_BYTES)), depth(a.depth) {}
    __device__ __forceinline__ u32 x(int slot, int line) const { return first + slot * stage_bytes + line * x_line_bytes; }
    __device__ __forceinline__ u32 weight(int slot, int line) const { return x(slot, LINES) + line * WEIGHT_LINE_BYTES; }
};

// What the copy engine is asked for.
struct Bringer {
    const Arguments& a;
    const Ring& ring;
    const Rank& rank;
    // few rows: the weight is read once and not worth room in the L2 cache
    static constexpr u64 WEIGHT_POLICY = CONSUMERS == 1 ? EVICT_FIRST : EVICT_NORMAL;

    // Rows of a tile's operands that are brought.
    __device__ __forceinline__ int x_rows(const Work& work) const {
        return DEEP || CLUSTER_N > 1 ? a.x_rows : max(0, min(a.m - work.tile_m, a.x_rows));
    }
    __device__ __forceinline__ int weight_rows(const Work& work) const {
        return DEEP || CLUSTER_M > 1 ? TILE_N : max(0, min(a.n - work.tile_n, TILE_N));
    }
    __device__ __forceinline__ const TensorMap* x_map(const Work& work) const {
        return x_rows(work) < a.x_rows ? &a.last_x_map : &a.x_map;
    }
    __device__ __forceinline__ const TensorMap* weight_map(const Work& work) const {
        return weight_rows(work) < TILE_N ? &a.last_weight_map : &a.weight_map;
    }
    __device__ __forceinline__ void bring_x(const Work& work, int stage, int slot) const {
        const u32 barrier = ring.full + slot * 8;
        const int k = work.k + stage * TILE_K;
        barrier_arrive_expecting(barrier, LINES * 128 * x_rows(work));  // zeros from outside the tensors count too
        if (DEEP) {
            const int first = rank.n * (LINES / CLUSTER_N);
            const u32 target = ring.x(slot, first);
            if (CLUSTER_N > 1)
                copy_box_to_all(target, &a.x_map, 0, work.tile_m, k / LINE + first, barrier, EVICT_NORMAL, rank.same_m());
            else
                copy_box(target, &a.x_map, 0, work.tile_m, k / LINE, barrier, EVICT_NORMAL);
            return;
        }
        const int share = a.x_rows / CLUSTER_N, row = work.tile_m + rank.n * share;
        if (x_rows(work) == 0) return;  // a cluster's lower tile where there is none
#pragma unroll
        for (int line = 0; line < LINES; ++line) {
            const u32 target = ring.x(slot, line) + rank.n * share * 128;
            if (CLUSTER_N > 1)
                copy_box_to_all(target, &a.x_map, k + line * LINE, row, barrier, EVICT_NORMAL, rank.same_m());
            else
                copy_box(target, x_map(work), k + line * LINE, row, barrier, EVICT_NORMAL);
        }
    }
    __device__ __forceinline__ void bring_weight(const Work& work, int stage, int slot) const {
        const u32 barrier = ring.full + slot * 8;
        const int k = work.k + stage * TILE_K, row = work.tile_n + rank.m * SHARE_N;
        barrier_arrive_expecting(barrier, LINES * 128 * weight_rows(work));
        if (DEEP) {
            copy_box(ring.weight(slot, 0), &a.weight_map, 0, row, k / LINE, barrier, WEIGHT_POLICY);
            return;
        }
        if (weight_rows(work) == 0) return;
#pragma unroll
        for (int line = 0; line < LINES; ++line) {
            const u32 target = ring.weight(slot, line) + rank.m * SHARE_N * 128;
            if (CLUSTER_M > 1)
                copy_box_to_all(target, &a.weight_map, k + line * LINE, row, barrier, WEIGHT_POLICY, rank.same_n());
            else
                copy_box(target, weight_map(work), k + line * LINE, row, barrier, WEIGHT_POLICY);
        }
    }
    // The first stage's weights into the L2 cache, whoever still writes them.
    __device__ __forceinline__ void prefetch_weight(const Work& work) const {
        const int row = work.tile_n + rank.m * SHARE_N;
        if (DEEP) return prefetch_box(&a.weight_map, 0, row, work.k / LINE);
#pragma unroll
        for (int line = 0; line < LINES; ++line) prefetch_box(weight_map(work), work.k + line * LINE, row);
    }
    __device__ __forceinline__ int ahead(const Work& work) const { return min(work.stages, ring.depth); }
    // One operand of the stages that the empty ring takes, those from `stage` to before `end`.
    template <bool X>
    __device__ __forceinline__ void fill(const Work& work, int stage, int end) const {
#pragma unroll 1
        for (; stage < end; ++stage) bring<X>(work, stage, stage);
    }
    template <bool X>
    __device__ __forceinline__ void bring(const Work& work, int stage, int slot) const {
        if (X)
            bring_x(work, stage, slot);
        else
            bring_weight(work, stage, slot);
    }
    // Of all that follow the first `stage` stages of the CTA's first piece of work.
    template <bool X>
    __device__ __forceinline__ void go_on(Work work, int stage) const {
        Place place = {stage, 1};  // the ring was empty
        if (stage == ring.depth) place = {0, 0};
        for (int index = blockIdx.x / CLUSTER;;) {
            for (; stage < work.stages; ++stage) {
                barrier_wait(ring.empty + place.slot * 8, place.parity);
                bring<X>(work, stage, place.slot);
                place.advance(ring.depth);
            }
            index += gridDim.x / CLUSTER;
            if (index >= Work::count(a)) break;
            work = Work(a, index, rank);
            stage = 0;
        }
        // a CTA of a cluster stays until the others have told it, in its memory, that they have read what it sent
        for (int slot = 0; CLUSTER > 1 && slot < ring.depth; ++slot) {
            barrier_wait(ring.empty + place.slot * 8, place.parity);
            place.advance(ring.depth);
        }
    }
};

// A warp of those that multiply.
struct Consumer {
    const Arguments& a;
    const Ring& ring;
    const Rank& rank;
    Place place;
    int before;  // slot of the stage before
    u32 turn;    // which of the buffers comes next; goes on from tile to tile: a tile may have an odd number of boxes

    static __device__ __forceinline__ int group() { return threadIdx.x / 128 - 1; }
    static __device__ __forceinline__ int warp() { return threadIdx.x / 32 - 4; }
    static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

    // Tells every CTA that sends here that this warpgroup has read the slot.
    __device__ __forceinline__ void release(int slot) const {
        const int thread = threadIdx.x % 128;
        if (CLUSTER > 1) {
            if (thread < SENDERS) barrier_arrive_at(ring.empty + slot * 8, rank.sender(thread));
        } else if (thread == 0) {
            barrier_arrive(ring.empty + slot * 8);
        }
    }

    // One stage's products, under way on return.
    __device__ __forceinline__ void multiply(float (&c)[TILE_N / 2], bool first) {
        barrier_wait(ring.full + place.slot * 8, place.parity);
        products_fence();
#pragma unroll
        for (int line = 0; line < LINES; ++line) {
            const u64 x = operand_descriptor(ring.x(place.slot, line) + group() * 64 * 128);
            const u64 weight = operand_descriptor(ring.weight(place.slot, line));
#pragma unroll
            for (int step = 0; step < LINE / 16; ++step)
                multiply_tiles<TILE_N>(c, x + 2 * step, weight + 2 * step, !first || line > 0 || step > 0);
        }
        commit_products();
        if (!first) {
            wait_for_products<1>();  // the stage before has been read
            release(before);
        }
        before = place.slot;
        place.advance(ring.depth);
    }

    // This warp's 16 rows of a box, from (row, column) on, through a buffer: while the copy engine reads one, others are written. They
    // lie swizzled there, lines of 128 bytes or 64. v: the pairs of eight columns j are rows g and g + 8, as v[2 j] and v[2 j + 1].
    __device__ __forceinline__ void store(const u32* v, int row, int column) {
        const u32 target = ring.first + a.buffers_at + (warp() * BUFFERS + turn) * BUFFER_BYTES;
        // matrices: rows 0-7 and 8-15 of eight columns, then of the next eight
        const u32 line = lane() & 15, unit = lane() >> 4, swizzled = unit ^ (BOX_COLUMNS == 64 ? line & 7 : line / 2 & 3);
        turn = (turn + 1) % BUFFERS;
        if (lane() == 0) wait_for_store_reads<BUFFERS - 1>();
        __syncwarp();
#pragma unroll
        for (int i = 0; i < BOX_COLUMNS / 16; ++i) {
            store_matrices(target + line * (BOX_COLUMNS * 2) + (swizzled ^ 2 * i) * 16, v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
        }
        fence_shared_for_copies();
        __syncwarp();
        if (lane() == 0) {
            store_box(&a.out_map, column, row, target);
            commit_stores();
        }
    }

    __device__ __forceinline__ void run() {
        u32 pairs[BOXES > 0 ? BOXES * BOX_PAIRS : 1];
        int row = 0, column = 0;
        bool left = false;  // whether the pairs are still to be stored, at row and column
        for (int index = blockIdx.x / CLUSTER; index < Work::count(a); index += gridDim.x / CLUSTER) {
            const Work work(a, index, rank);
            float c[TILE_N / 2];
#pragma unroll
            for (int box = 0; box < BOXES; ++box) {
                multiply(c, box == 0);
                if (left) store(pairs + box * BOX_PAIRS, row, column + box * BOX_COLUMNS);
            }
#pragma unroll 1
            for (int stage = BOXES; stage < work.stages; ++stage) multiply(c, stage == 0);
            wait_for_products<0>();
            release(before);

            row = work.tile_m + warp() * 16, column = work.tile_n;
            if (BOX_STORE) {
#pragma unroll
                for (int i = 0; i < BOXES * BOX_PAIRS; ++i) pairs[i] = pack_bf16(c[2 * i], c[2 * i + 1]);
                left = true;
            } else {
                const Output output = {a.out, a.m, a.n, a.out_float32 != 0, a.pairs != 0};
                output.store_rows<TILE_N>(work.slice, row, column, c, lane());
            }
        }
#pragma unroll
        for (int box = 0; box < BOXES; ++box) store(pairs + box * BOX_PAIRS, row, column + box * BOX_COLUMNS);
        if (BOX_STORE && lane() == 0) wait_for_stores();
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 shared = shared_address(memory);
    const Ring ring(a, shared);
    const Rank rank;
    const Bringer bringer = {a, ring, rank};
    const Work first(a, blockIdx.x / CLUSTER, rank);
    const int early = min(bringer.ahead(first), 2);

    if (threadIdx.x == WEIGHT_THREAD) {
        fetch_tensor_map(bringer.weight_map(first));
        if (!a.weights_ready) bringer.prefetch_weight(first);
    }
    __syncwarp();
    begin_as_dependent(a.weights_ready);
    if (threadIdx.x == WEIGHT_THREAD) {
#pragma unroll 1
        for (int slot = 0; slot < ring.depth; ++slot) barrier_init(ring.full + slot * 8, 2);
        barrier_init_fence();
        // in a cluster others have to know the barriers first; all of the ring before the CTA meets would let it wait
        if (CLUSTER == 1) bringer.fill<false>(first, 0, early);
    } else if (threadIdx.x == X_THREAD) {
        fetch_tensor_map(bringer.x_map(first));
#pragma unroll 1
        for (int slot = 0; slot < ring.depth; ++slot) barrier_init(ring.empty + slot * 8, CONSUMERS * SENDERS);
        barrier_init_fence();
    }
    __syncwarp();
    if (CLUSTER > 1)
        meet_cluster();
    else
        __syncthreads();

    if (threadIdx.x < 128) {
        // two consumers need more registers for their accumulators than an even share
        if (CONSUMERS > 1) give_registers_back<40>();
        if (threadIdx.x == WEIGHT_THREAD) {
            bringer.fill<false>(first, CLUSTER > 1 ? 0 : early, bringer.ahead(first));
            bringer.go_on<false>(first, bringer.ahead(first));
        } else if (threadIdx.x == X_THREAD) {
            wait_for_previous_kernel();
            bringer.fill<true>(first, 0, bringer.ahead(first));
            bringer.go_on<true>(first, bringer.ahead(first));
        }
    } else {
        if (CONSUMERS > 1) take_registers<232>();
        wait_for_previous_kernel();
        Consumer{a, ring, rank, {0, 0}, 0, 0}.run();
    }
}
