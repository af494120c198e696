// A packed projection and what an attention layer does with its heads, in one launch, on Hopper's warpgroup products (sm_90a).
//
// p[m, n] = sum over k of x[m, k] * weight[n, k], rounded to bfloat16 (nearest even): one float32 accumulator an output that
// starts at +0 and walks k upward, one wgmma m64nNk16 for each sixteen. The weight's rows are heads of 128: `heads` of q, then
// `kv_heads` each of k and of v.
// v = p. q and k: head norm where HEAD_NORM, with q_weight and k_weight [128]; then rotation where ROTATE, with cos and sin
// [tokens, 128]; head_fragment.cuh has the roundings. All arrays are bfloat16; rows of x, weight, cos, sin, q, k and v are
// multiples of 16 bytes apart, a token's heads of q, k or v lie one behind the other.
//
// Schedule: a persistent grid, tiles of 128 tokens by TILE_N rows of the weight. Warpgroup 0 brings 64 k of both operands at a
// time into a ring of `depth` stages in dynamic shared memory, a thread each; warpgroups 1 and 2 multiply 64 tokens each. A finished tile is
// rounded, which halves the registers that it takes, and stays there: norm, rotation and stores are done in parts during the first
// STEPS stages of the next tile, while the tensor cores work; a part that takes longer than a stage's products leaves them idle.
// Tiles have at least STEPS stages.
// A part of the norm: half the squares of a head, or the norm of half its columns; of the stores: a quarter of the columns of all
// heads, which share what they read of the tables. What counts is shared memory: products and copies need almost all that it can
// do, and every access of the heads takes its time from them.
// The tables have a buffer of their own, for a quarter of a head's columns: in the ring they would hold slots that products wait
// for. The next quarter is asked for when all have used the one before, and quarters are PART_STAGES stages apart, so that it comes in
// time (H200, a block of 2048 rows of 4B: 105.4 us with three stages, 107.2 with two). Behind the last tile nothing covers that wait:
// its other quarters come into the ring, where no stages follow, and leave from there.
#include "wgmma.cuh"
#include "head_fragment.cuh"
#include "ring.cuh"

constexpr int TILE_M = 128, LINE = 64;  // k, or columns of a head, in a line of 128 bytes
constexpr int TILE_HEADS = TILE_N / HEAD;
constexpr int FIRST_SEND = 4 * TILE_HEADS, STEPS = FIRST_SEND + 3 * PART_STAGES + 1;
constexpr int THREADS = 384, CONSUMER_WARPS = 8;
constexpr u32 WEIGHT_THREAD = 0, X_THREAD = 32, TABLES_THREAD = 64;  // that ask for them
constexpr u32 X_BYTES = TILE_M * 128, STAGE_BYTES = X_BYTES + TILE_N * 128;
constexpr u32 TABLE_BYTES = TILE_M * 64, TABLES_BYTES = 2 * TABLE_BYTES;  // a quarter of the columns of cos, then of sin
constexpr u32 BOX_BYTES = 16 * 64, BUFFER_BYTES = 2 * BOX_BYTES;          // 16 rows of a quarter of each head
constexpr u32 WEIGHT_BYTES = HEAD * 2;
static_assert(TILE_HEADS <= 2, "tiles of one or two heads");
static_assert(TABLES_BYTES + CONSUMER_WARPS * BUFFER_BYTES <= STAGE_BYTES, "a quarter's tables and outputs behind the last stage");

struct Arguments {
    int stages;  // of a tile
    int tiles_m, tiles_n;
    int group_m;  // tiles one above the other that run together, for the L2 cache
    int depth, weights_ready;  // weights_ready: they alone may be touched before the previous kernel ends
    int heads, kv_heads;
    float q_mean_operand, k_mean_operand, eps;
    int last_rows;  // of the last tiles
    int tables_at, buffers_at, weights_at, barriers_at;  // bytes from the start of dynamic shared memory
    const u32 *q_weight, *k_weight;
    TensorMap x_map, weight_map, cos_map, sin_map, out_map[3];
    TensorMap last_x_map;  // boxes of the rows of x that the last tiles have: zeros for others come slowly
};

enum Which { Q, K, V, NONE };

// First row and column of tile number `index`.
struct Tile {
    int m, n;

    __device__ __forceinline__ Tile(const Arguments& a, int index) {
        const int group = index / (a.group_m * a.tiles_n), inside = index - group * a.group_m * a.tiles_n;
        const int height = min(a.group_m, a.tiles_m - group * a.group_m);
        m = (group * a.group_m + inside % height) * TILE_M;
        n = inside / height * TILE_N;
    }
    __device__ __forceinline__ int head(int i) const { return n / HEAD + i; }
    __device__ __forceinline__ int which(const Arguments& a, int i) const {
        const int first_v = a.heads + a.kv_heads;
        return head(i) < a.heads ? Q : head(i) < first_v ? K : head(i) < first_v + a.kv_heads ? V : NONE;
    }
    __device__ __forceinline__ bool takes_tables(const Arguments& a) const { return ROTATE && head(0) < a.heads + a.kv_heads; }
    __device__ __forceinline__ bool whole(const Arguments& a) const {
        return a.last_rows == TILE_M || m + TILE_M < a.tiles_m * TILE_M;
    }
    static __device__ __forceinline__ int count(const Arguments& a) { return a.tiles_m * a.tiles_n; }
};

// A stage: 128 lines of x, then TILE_N of the weight. Behind the ring the tables, and two barriers behind its own.
struct Ring {
    u32 first, full, empty, tables, tables_full, tables_empty;
    int depth;

    __device__ __forceinline__ Ring(const Arguments& a, u32 shared)
        : first(shared), full(shared + a.barriers_at), empty(full + a.depth * 8), tables(shared + a.tables_at),
          tables_full(empty + a.depth * 8), tables_empty(tables_full + 8), depth(a.depth) {}
    __device__ __forceinline__ u32 stage(int slot) const { return first + slot * STAGE_BYTES; }
};

// What the copy engine is asked for.
struct Bringer {
    const Arguments& a;
    const Ring& ring;

    // A stage of x, or of the weight. Each has an arrival of its own at the stage's barrier.
    template <bool X>
    __device__ __forceinline__ void bring(const Tile& tile, int stage, int slot) const {
        const u32 barrier = ring.full + slot * 8;
        if (X) {
            const bool whole = tile.whole(a);
            barrier_arrive_expecting(barrier, whole ? X_BYTES : a.last_rows * 128);
            copy_box(ring.stage(slot), whole ? &a.x_map : &a.last_x_map, stage * LINE, tile.m, barrier, EVICT_NORMAL);
        } else {
            barrier_arrive_expecting(barrier, TILE_N * 128);  // zeros from outside the tensors count too
            copy_box(ring.stage(slot) + X_BYTES, &a.weight_map, stage * LINE, tile.n, barrier, EVICT_NORMAL);
        }
    }
    __device__ __forceinline__ void bring_table(bool sin, const Tile& tile, int quarter, u32 tables, u32 barrier) const {
        copy_box(tables + (sin ? TABLE_BYTES : 0), sin ? &a.sin_map : &a.cos_map, quarter * 32, tile.m, barrier, EVICT_NORMAL);
    }
    // Everything for the tables' own buffer: of the last tile the first quarter alone.
    __device__ __forceinline__ void bring_tables() const {
        for (int index = blockIdx.x; index < Tile::count(a); index += gridDim.x) {
            const Tile tile(a, index);
            if (!tile.takes_tables(a)) continue;
            const int quarters = index + (int)gridDim.x < Tile::count(a) ? 4 : 1;
#pragma unroll 1
            for (int quarter = 0; quarter < quarters; ++quarter) {
                barrier_wait(ring.tables_empty, quarter & 1 ^ 1);  // four phases a tile; the buffer was empty
                barrier_arrive_expecting(ring.tables_full, TABLES_BYTES);
                bring_table(false, tile, quarter, ring.tables, ring.tables_full);
                bring_table(true, tile, quarter, ring.tables, ring.tables_full);
            }
        }
    }
    __device__ __forceinline__ int ahead() const { return min(a.stages, ring.depth); }
    // One operand of the stages that the empty ring takes.
    template <bool X>
    __device__ __forceinline__ void fill(const Tile& tile) const {
#pragma unroll 1
        for (int stage = 0; stage < ahead(); ++stage) bring<X>(tile, stage, stage);
    }
    // Of all that follow those stages of the CTA's first tile; behind the last tile the other quarters of cos, or of sin.
    template <bool X>
    __device__ __forceinline__ void go_on(Tile tile) const {
        int stage = ahead();
        Place place = {stage, 1};  // the ring was empty
        if (stage == ring.depth) place = {0, 0};
        for (int index = blockIdx.x;;) {
            for (; stage < a.stages; ++stage) {
                barrier_wait(ring.empty + place.slot * 8, place.parity);
                bring<X>(tile, stage, place.slot);
                place.advance(ring.depth);
            }
            index += gridDim.x;
            if (index >= Tile::count(a)) break;
            tile = Tile(a, index);
            stage = 0;
        }
        for (int quarter = 1; tile.takes_tables(a) && quarter < 4; ++quarter) {
            const u32 barrier = ring.full + place.slot * 8;
            barrier_wait(ring.empty + place.slot * 8, place.parity);
            barrier_arrive_expecting(barrier, TABLE_BYTES);
            bring_table(!X, tile, quarter, ring.stage(place.slot), barrier);
            place.advance(ring.depth);
        }
    }
};

// A warp of those that multiply. Registers are scarce: what can be computed from the thread's number is.
struct Consumer {
    const Arguments& a;
    const Ring& ring;
    Place place;
    int before;  // slot of the stage before
    float sum;   // between a head's parts: of half its squares, then the factor of this lane's row

    static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
    static __device__ __forceinline__ int warp() { return threadIdx.x / 32 - 4; }
    __device__ __forceinline__ void release(int slot) const {
        if (lane() == 0) barrier_arrive(ring.empty + slot * 8);
    }

    // One stage's products, under way on return.
    __device__ __forceinline__ void multiply(float (&c)[TILE_N / 2], bool first) {
        barrier_wait(ring.full + place.slot * 8, place.parity);
        products_fence();
        const u64 x = operand_descriptor(ring.stage(place.slot) + warp() / 4 * 64 * 128);
        const u64 weight = operand_descriptor(ring.stage(place.slot) + X_BYTES);
#pragma unroll
        for (int step = 0; step < LINE / 16; ++step) multiply_tiles<TILE_N>(c, x + 2 * step, weight + 2 * step, !first || step > 0);
        commit_products();
        if (!first) {
            wait_for_products<1>();  // the stage before has been read
            release(before);
        }
        before = place.slot;
        place.advance(ring.depth);
    }

    __device__ __forceinline__ void round(u32 (&pairs)[TILE_HEADS][HEAD_PAIRS], const float (&c)[TILE_N / 2]) const {
#pragma unroll
        for (int i = 0; i < TILE_N / 4; ++i) pairs[i / HEAD_PAIRS][i % HEAD_PAIRS] = pack_bf16(c[2 * i], c[2 * i + 1]);
    }

    // What is left to do with a tile, during stage `step` of the next one, or behind the LAST.
    template <bool LAST>
    __device__ __forceinline__ void finish(int step, const Tile& tile, u32 (&pairs)[TILE_HEADS][HEAD_PAIRS]) {
        if (step >= FIRST_SEND) {
            if ((step - FIRST_SEND) % PART_STAGES == 0) send<LAST>((step - FIRST_SEND) / PART_STAGES, tile, pairs);
        } else if (HEAD_NORM) {
            normalise(step % 4, tile.which(a, step / 4), pairs[step / 4 % TILE_HEADS]);
        }
    }
    __device__ __forceinline__ void normalise(int part, int which, u32 (&pairs)[HEAD_PAIRS]) {
        if (which > K) return;
        const OwnRow own;
        if (part == 0)
            sum = own.tree<0, 2>(pairs);
        else if (part == 1)
            sum = reciprocal_root(own.joined(sum, own.tree<1, 2>(pairs)), which == Q ? a.q_mean_operand : a.k_mean_operand, a.eps);
        else
            weigh_columns(pairs, part - 2, ring.first + a.weights_at + which * WEIGHT_BYTES, sum);
    }

    // Columns 32 quarter ... 32 quarter + 31 of a head into a buffer. target: this lane's address for the first sixteen columns; the
    // next sixteen lie two units of the swizzle further on.
    template <bool ROTATED>
    static __device__ __forceinline__ void write_quarter(
        u32 target, int quarter, const u32 (&cos)[2][4], const u32 (&sin)[2][4], const u32 (&pairs)[HEAD_PAIRS]
    ) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32* own = pairs + quarter * 8 + i * 4;
            u32 out[4] = {own[0], own[1], own[2], own[3]};
            if (ROTATED) {
                const u32* other = pairs + (quarter + 2) % 4 * 8 + i * 4;
#pragma unroll
                for (int j = 0; j < 4; ++j) out[j] = rotated_pair(own[j], other[j], cos[i][j], sin[i][j], quarter >= 2);
            }
            store_matrices(target ^ (32 * i), out[0], out[1], out[2], out[3]);
        }
    }
    // A quarter of the columns of all heads, to their places.
    template <bool LAST>
    __device__ __forceinline__ void send(int quarter, const Tile& tile, const u32 (&pairs)[TILE_HEADS][HEAD_PAIRS]) {
        const bool takes_tables = tile.takes_tables(a);
        // matrices: rows 0-7 and 8-15 of eight columns, then of the next eight
        const u32 line = lane() & 15, unit = lane() >> 4;
        u32 cos[2][4] = {}, sin[2][4] = {};
        u32 buffer = ring.first + a.buffers_at + warp() * BUFFER_BYTES;
        if (takes_tables) {
            u32 table = ring.tables;
            if (LAST && quarter > 0) {
                barrier_wait(ring.full + place.slot * 8, place.parity);
                table = ring.stage(place.slot);
                buffer = table + TABLES_BYTES + warp() * BUFFER_BYTES;  // where nothing has to leave before
                place.advance(ring.depth);
            } else {
                barrier_wait(ring.tables_full, quarter & 1);
            }
            table += (warp() * 16 + line) * 64 + (unit ^ (line / 2 & 3)) * 16;
            // all at once: they wait long while the tensor cores read shared memory
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                load_matrices(cos[i], table ^ (32 * i));
                load_matrices(sin[i], (table ^ (32 * i)) + TABLE_BYTES);
            }
        }
        if (lane() == 0 && !(LAST && takes_tables && quarter > 0)) wait_for_store_reads<0>();
        __syncwarp();
#pragma unroll
        for (int i = 0; i < TILE_HEADS; ++i) {
            // 64-byte swizzle: pairs of lines of 64 bytes
            const u32 target = buffer + i * BOX_BYTES + line * 64 + (unit ^ (line / 2 & 3)) * 16;
            if (ROTATE && tile.which(a, i) < V)
                write_quarter<ROTATE != 0>(target, quarter, cos, sin, pairs[i]);
            else
                write_quarter<false>(target, quarter, cos, sin, pairs[i]);
        }
        fence_shared_for_copies();
        __syncwarp();  // and all lanes have used what they read of the tables: an arrival alone waits for no load
        if (takes_tables && !LAST && lane() == 0) barrier_arrive(ring.tables_empty);
        if (lane() == 0) {
#pragma unroll
            for (int i = 0; i < TILE_HEADS; ++i) {
                const int which = tile.which(a, i), head = tile.head(i) - (which == Q ? 0 : which == K ? a.heads : a.heads + a.kv_heads);
                if (which != NONE)
                    store_box(&a.out_map[which], head * HEAD + quarter * 32, tile.m + warp() * 16, buffer + i * BOX_BYTES);
            }
            commit_stores();
        }
    }

    __device__ __forceinline__ void run() {
        u32 pairs[TILE_HEADS][HEAD_PAIRS];
        Tile last(a, blockIdx.x);
        bool left = false;  // whether `last` has parts left to do
        float c[TILE_N / 2];
        for (int index = blockIdx.x; index < Tile::count(a); index += gridDim.x) {
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                multiply(c, step == 0);
                if (left) finish<false>(step, last, pairs);
            }
            last = Tile(a, index);
            left = true;
#pragma unroll 1
            for (int stage = STEPS; stage < a.stages; ++stage) multiply(c, false);
            wait_for_products<0>();
            release(before);
            round(pairs, c);
        }
#pragma unroll
        for (int step = 0; step < STEPS; ++step) finish<true>(step, last, pairs);
        if (lane() == 0) wait_for_stores();
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_heads_sm90(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 shared = shared_address(memory);
    const Ring ring(a, shared);
    const Bringer bringer = {a, ring};
    const Tile first(a, blockIdx.x);

    begin_as_dependent(a.weights_ready);
    if (threadIdx.x == WEIGHT_THREAD) {
        fetch_tensor_map(&a.weight_map);
#pragma unroll 1
        for (int slot = 0; slot < ring.depth; ++slot) barrier_init(ring.full + slot * 8, 2);
        barrier_init(ring.tables_full, 1);
        barrier_init_fence();
        bringer.fill<false>(first);  // a dependent launch fetches them while the kernel before it still runs
    } else if (threadIdx.x == X_THREAD) {
        fetch_tensor_map(first.whole(a) ? &a.x_map : &a.last_x_map);
#pragma unroll 1
        for (int slot = 0; slot < ring.depth; ++slot) barrier_init(ring.empty + slot * 8, CONSUMER_WARPS);
        barrier_init(ring.tables_empty, CONSUMER_WARPS);
        barrier_init_fence();
    } else if (threadIdx.x == TABLES_THREAD) {
        for (int which = Q; which <= V; ++which) fetch_tensor_map(&a.out_map[which]);
        if (ROTATE) {
            fetch_tensor_map(&a.cos_map);
            fetch_tensor_map(&a.sin_map);
        }
    } else if (HEAD_NORM && threadIdx.x >= 128 && threadIdx.x < 256) {
        const u32 i = threadIdx.x - 128;
        reinterpret_cast<u32*>(memory + a.weights_at)[i] = i < HEAD / 2 ? a.q_weight[i] : a.k_weight[i - HEAD / 2];
    }
    __syncwarp();
    __syncthreads();

    // those that multiply need more registers than an even share
    if (threadIdx.x < 128) {
        give_registers_back<40>();
        if (threadIdx.x == WEIGHT_THREAD) {
            bringer.go_on<false>(first);
        } else if (threadIdx.x == X_THREAD) {
            wait_for_previous_kernel();
            bringer.fill<true>(first);
            bringer.go_on<true>(first);
        } else if (ROTATE && threadIdx.x == TABLES_THREAD) {
            wait_for_previous_kernel();
            bringer.bring_tables();
        }
    } else {
        take_registers<232>();
        wait_for_previous_kernel();
        Consumer{a, ring, {0, 0}, 0, 0.0f}.run();
    }
}
