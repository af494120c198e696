// RMSNorm over rows, alone or of a residual sum.
//
//   z = x, or x + residual                 RESIDUAL, residual.cuh
//   s = sum of z * z over the row          order and contraction: sums.cuh
//   m, r, h = z * r, y = h * w             norm.cuh
//
// Every operation is float32 and rounded to nearest even; subnormals are kept (-ftz=false). y is rounded to bfloat16 unless
// OUT_FLOAT32. A NaN that is rounded to bfloat16 becomes 0x7FFF.
//
// Layouts: x, residual, y, total [rows / inner, inner, K] with unit stride in a row and two strides in elements, so that heads
// are normalised where they lie in a packed projection (inner == rows: one stride is enough); weight [K].
// Types: x, residual, weight float32 where X_FLOAT32, RESIDUAL_FLOAT32, WEIGHT_FLOAT32 are 1, else bfloat16. No array may
// overlap another. residual and total may be null for RESIDUAL 0.
// CHUNK: elements of a global access: 8, 4, 2 or 1. It divides K and all strides, and every pointer is aligned to CHUNK
// elements or to 16 bytes, whichever is less.
//
// Schedules (block GROUP * ROWS threads, grid ceil(rows / ROWS)):
//   DIRECT 1   each thread is one simulated thread and keeps its vectors in registers: GROUP is SUM_THREADS rounded up to
//              32, CHUNK == SUM_VECTOR, no SUM_EDGES, chains CHAIN_ONE, _PAIRS or _BY_POSITION.
//              GROUP == 32: ROWS rows a block (4 to 8), no barrier, no shared memory.
//              GROUP > 32: ROWS == 1, dynamic shared memory of 4 * SUM_SCRATCH bytes, rounded up to 16.
//   DIRECT 0   the row goes through shared memory, any GROUP (not above K / CHUNK rounded up to 32), ROWS == 1: dynamic
//              shared memory as above and K * 2 bytes more, or K * 4 where z is float32 (X_FLOAT32 alone, RESIDUAL 2 or 3).
//   SUM_SCRATCH is 48 for CHAIN_MOMENTS, 32 for CHAIN_ONE and _PAIRS, else 32 + SUM_THREADS rounded up to 32.
// FEW_ROWS 1: less latency for more instructions and registers. BLOCKS: for this many on a multiprocessor registers shall suffice.
//
// Which to take, K a multiple of 8 and bfloat16 throughout (CHUNK 8 with DIRECT 0):
//   torch-mean, 1 to 7 rows (T = 128 to 512), or K >= 8161     DIRECT 1, GROUP = T, CHUNK 4
//   torch-mean, 8 rows or more (T = 64, 32), K > 1024          DIRECT 0, GROUP 128 to 256: two chunks a thread
//   torch-mean, 16 rows or more, K <= 1024, so head norms      DIRECT 1, GROUP 32, ROWS 4 or 8, CHUNK 4
//   torch-rms-norm, vllm, flashinfer                           DIRECT 1, GROUP = T, CHUNK = V; one warp: ROWS 4 or 8
//   all others (vllm-add: half its threads idle), other K      DIRECT 0, GROUP 256; CHUNK as large as K allows
#include "launches.cuh"
#include "norm.cuh"
#include "residual.cuh"

typedef Element<WEIGHT_FLOAT32 != 0>::type W;
typedef Element<OUT_FLOAT32 != 0>::type Y;

constexpr int CHUNKS = COLUMNS / CHUNK;
constexpr int STEPS = (CHUNKS + GROUP - 1) / GROUP;
// loads that a thread has under way before it waits for the first
constexpr int BATCH = DIRECT ? STEPS : (STEPS < 4 ? STEPS : 4);
// few enough weights to be fetched beside x, so that their latency hides behind the sum
constexpr bool WEIGHT_AHEAD = BATCH == STEPS && STEPS * CHUNK * sizeof(W) <= (DIRECT && GROUP > 32 ? 80 : 32);

static_assert(COLUMNS % CHUNK == 0, "CHUNK divides the columns");
static_assert(!DIRECT || GROUP == (SUM_THREADS + 31) / 32 * 32, "a thread is a simulated one");
static_assert(!DIRECT || (CHUNK == SUM_VECTOR && !SUM_EDGES), "its accesses are the simulated ones");
static_assert(!DIRECT || STEPS * CHUNK * sizeof(Z) <= 320, "registers hold the row; take DIRECT 0");
static_assert(!DIRECT || SUM_ONE_CHAIN || SUM_CHAINS == CHAIN_BY_POSITION, "chains over whole vectors");
static_assert(ROWS == 1 || (DIRECT && GROUP == 32), "several rows a block: a warp each, without barriers");

extern __shared__ float4 shared_memory[];

struct Arguments {
    const X* x;
    const R* residual;
    const W* weight;
    Y* y;
    Total* total;
    long long rows, inner;
    long long x_stride, residual_stride, y_stride, total_stride;  // between neighbouring rows of an inner group
    long long x_outer, residual_outer, y_outer, total_outer;      // between groups
    float mean_operand, eps;
    int next_begins_early;  // the next kernel of a chain may begin before the kernels in front of this one have ended
    int first_blocks;       // that run at once: only they may have to wait, and ask for their rows before
};

// where a row begins
struct Place {
    const X* x;
    const R* residual;
    Y* y;
    Total* total;

    __device__ __forceinline__ Place(const Arguments& a, u32 row) : x(a.x), residual(a.residual), y(a.y), total(a.total) {
        u32 group = 0, member = row;
        if (a.inner != a.rows) {  // apart, for a division is long, and what is loaded waits for its address
            group = row / (u32)a.inner;
            member = row - group * (u32)a.inner;
            x += group * a.x_outer;
            y += group * a.y_outer;
            if (RESIDUAL != 0) residual += group * a.residual_outer, total += group * a.total_outer;
        }
        x += member * a.x_stride;
        y += member * a.y_stride;
        if (RESIDUAL != 0) residual += member * a.residual_stride, total += member * a.total_stride;
    }
};

// Whether the row has a chunk that a thread comes to. Known beforehand where all steps of all batches are whole.
__device__ __forceinline__ bool inside(int chunk) { return (STEPS * GROUP == CHUNKS && STEPS % BATCH == 0) || chunk < CHUNKS; }

// BATCH chunks of a row, from step `base` on
struct Loaded {
    Pack<X, CHUNK> x[BATCH];
    Pack<R, CHUNK> residual[RESIDUAL != 0 ? BATCH : 1];

    __device__ __forceinline__ void fetch(const Place& at, int thread, int base) {
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int chunk = thread + (base + i) * GROUP;
            if (!inside(chunk)) continue;
            x[i] = load<CHUNK>(at.x, chunk);
            if (RESIDUAL != 0) residual[RESIDUAL != 0 ? i : 0] = load<CHUNK>(at.residual, chunk);
        }
    }
    // The first of them into the L2 cache.
    static __device__ __forceinline__ void prefetch(const Place& at, int thread) {
        constexpr int X_SHARE = 128 / (CHUNK * sizeof(X)), R_SHARE = 128 / (CHUNK * sizeof(R));  // threads of a line
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int chunk = thread + i * GROUP;
            if (!inside(chunk)) continue;
            if (chunk % X_SHARE == 0) prefetch_line(at.x + chunk * CHUNK);
            if (RESIDUAL != 0 && chunk % R_SHARE == 0) prefetch_line(at.residual + chunk * CHUNK);
        }
    }
    // z, zeros behind the row's end; stores the residual sum
    __device__ __forceinline__ Pack<Z, CHUNK> z(const Place& at, int thread, int base, int i) const {
        const int chunk = thread + (base + i) * GROUP;
        Pack<Z, CHUNK> z = {};
        if (inside(chunk)) z = add_residual<CHUNK>(x[i], residual[RESIDUAL != 0 ? i : 0], at.total, chunk);
        return z;
    }
};

// The row's norm weights that a thread needs, where they fit beside the row.
struct Weights {
    Pack<W, CHUNK> held[WEIGHT_AHEAD ? STEPS : 1];

    __device__ __forceinline__ void fetch(const W* weight, int thread) {
#pragma unroll
        for (int i = 0; WEIGHT_AHEAD && i < STEPS; ++i)
            if (inside(thread + i * GROUP)) held[WEIGHT_AHEAD ? i : 0] = load<CHUNK>(weight, thread + i * GROUP);
    }
    __device__ __forceinline__ Pack<W, CHUNK> at(const W* weight, int thread, int i) const {
        return WEIGHT_AHEAD ? held[WEIGHT_AHEAD ? i : 0] : load<CHUNK>(weight, thread + i * GROUP);
    }
};

// N sums in shared memory, added by halves in the registers of each thread: shuffles would take twice as long
template <int N>
__device__ __forceinline__ float halve_shared(const float* sums) {
    float v[N];
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
        const float4 four = reinterpret_cast<const float4*>(sums)[i];
        v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
    }
    return halve_registers(v);
}

// The simulated threads' sums, one line of them complete in shared memory, to the row's: every thread returns it.
__device__ __forceinline__ float join_line(float* scratch) {
    if constexpr (SUM_TREE != TREE_HALVE) {
        return join_partials(scratch, scratch + SUM_PARTIALS);
    } else if constexpr (SUM_REGISTERS >= 8) {
        // each warp for itself would keep shared memory busy for longer than a second barrier takes
        if (threadIdx.x < 32) {
            const float sum = halve_lanes(halve_line_to_lanes(scratch));
            if (threadIdx.x == 0) scratch[SUM_PARTIALS] = sum;
        }
        SUM_BARRIER();
        return scratch[SUM_PARTIALS];
    } else if constexpr (SUM_WIDTH == 32 && FEW_ROWS) {
        return halve_shared<32>(scratch);
    } else {
        return join_partials(scratch, scratch + SUM_PARTIALS);
    }
}

// The sums of the simulated threads, each in the physical one of its number (0 in those behind them), to the row's.
__device__ __forceinline__ float join_simulated(float sum, float* scratch) {
    const bool simulated = GROUP <= SUM_LINES * 32 || threadIdx.x < SUM_LINES * 32;
    if constexpr (SUM_LINES == 1 && SUM_THREADS > 32) {
        scratch[threadIdx.x] = sum;
        SUM_BARRIER();
        return join_line(scratch);
    } else if constexpr (SUM_WIDTH == 32 && SUM_TREE == TREE_HALVE && (SUM_LINES == 4 || SUM_LINES == 8 || SUM_LINES == 16)) {
        if (simulated) {
            sum = halve_lanes(sum);
            if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / 32] = sum;
        }
        SUM_BARRIER();
        return halve_shared<SUM_LINES>(scratch);
    } else {
        return join_threads(sum, scratch);
    }
}

// sum of squares of a row in registers
template <int N>
__device__ __forceinline__ float sum_of_registers(const Pack<Z, CHUNK> (&own)[N], float* scratch) {
    float chains[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < N; ++i) take(chains, own[i]);
    return join_simulated(join(chains), scratch);
}

#if DIRECT
// A row from memory to memory through registers.
__device__ __forceinline__ void normalise_in_registers(const Arguments& a, int thread, const Place& at) {
    const W* __restrict__ weight = a.weight;
    Y* __restrict__ y = at.y;
    Weights weights;
    Loaded loaded;
    loaded.fetch(at, thread, 0);
    weights.fetch(weight, thread);
    Pack<Z, CHUNK> own[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) own[i] = loaded.z(at, thread, 0, i);
    const float m = sum_of_registers(own, reinterpret_cast<float*>(shared_memory));
    const float r = reciprocal_root(m, a.mean_operand, a.eps);
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        const int chunk = thread + i * GROUP;
        if (inside(chunk)) store(y, chunk, weighted<Y>(own[i], weights.at(weight, thread, i), r));
    }
}
#else
// Sum of squares of the row in shared memory. Where every thread has one chain at most, their length is known here, so that ptxas
// has all loads of a chain under way at once.
__device__ __forceinline__ float sum_of_stage(const Z* stage, u32 row, float* scratch) {
    constexpr int UNITS = 4 * SUM_THREADS, LENGTH = (COLUMNS + UNITS - 1) / UNITS;
    if constexpr (SUM_CHAINS == CHAIN_MOMENTS) {
        return mean_of_squares_by_moments(stage, scratch);
    } else if constexpr (SUM_CHAINS == CHAIN_BY_POSITION && !SUM_EDGES && SUM_LINES == 1 && UNITS <= GROUP && UNITS % 32 == 0 &&
                         LENGTH <= 64) {
        const int unit = threadIdx.x;
        if (unit < UNITS) {
            float sum = 0.0f, others[3];
#pragma unroll
            for (int i = 0; i < LENGTH; ++i)
                if (COLUMNS % UNITS == 0 || unit + i * UNITS < COLUMNS) sum = add_square(sum, widen(stage[unit + i * UNITS]));
#pragma unroll
            for (int i = 0; i < 3; ++i) others[i] = __shfl_down_sync(0xffffffffu, sum, i + 1);
            if ((unit & 3) == 0) scratch[unit / 4] = in_order(sum, others[0], others[1], others[2]);
        }
        SUM_BARRIER();
        return join_line(scratch);
    } else if constexpr (SUM_CHAINS == CHAIN_ONE && SUM_TREE == TREE_HALVE && SUM_LINES == 4 && SUM_LINES * 32 <= GROUP) {
        float chains[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (threadIdx.x < SUM_THREADS) {
            constexpr int VECTORS = COLUMNS / SUM_VECTOR;
#pragma unroll
            for (int i = 0; i < (VECTORS + SUM_THREADS - 1) / SUM_THREADS; ++i)
                if (VECTORS % SUM_THREADS == 0 || (int)threadIdx.x + i * SUM_THREADS < VECTORS)
                    take(chains, load<SUM_VECTOR>(stage, threadIdx.x + i * SUM_THREADS));
        }
        return join_simulated(chains[0], scratch);
    } else {
        return sum_of_row(stage, SUM_EDGES ? (int)(row * (u32)COLUMNS & 3) : 0, scratch);
    }
}

// A block's row through shared memory.
__device__ __forceinline__ void normalise_in_shared_memory(const Arguments& a, int thread, u32 row, const Place& at) {
    float* scratch = reinterpret_cast<float*>(shared_memory);
    Z* stage = reinterpret_cast<Z*>(shared_memory + (SUM_SCRATCH + 3) / 4);
    const W* __restrict__ weight = a.weight;
    Y* __restrict__ y = at.y;
    Weights weights;
    for (int base = 0; base < STEPS; base += BATCH) {
        Loaded loaded;
        loaded.fetch(at, thread, base);
        if (base == 0) weights.fetch(weight, thread);
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int chunk = thread + (base + i) * GROUP;
            if (inside(chunk)) store(stage, chunk, loaded.z(at, thread, base, i));
        }
    }
    __syncthreads();
    const float r = reciprocal_root(sum_of_stage(stage, row, scratch), a.mean_operand, a.eps);
#pragma unroll BATCH
    for (int i = 0; i < STEPS; ++i) {
        const int chunk = thread + i * GROUP;
        if (inside(chunk)) store(y, chunk, weighted<Y>(load<CHUNK>(stage, chunk), weights.at(weight, thread, i), r));
    }
}
#endif

// BLOCKS: without a number ptxas keeps to 64 registers, whatever spills
extern "C" __global__ void __launch_bounds__(GROUP * ROWS, BLOCKS) rms_norm(const __grid_constant__ Arguments a) {
    const int thread = ROWS > 1 ? threadIdx.x % GROUP : threadIdx.x;
    const u32 row = blockIdx.x * ROWS + (ROWS > 1 ? threadIdx.x / GROUP : 0);  // there are fewer than 2^31
    const Place place(a, row);  // before it waits: addresses alone, and what lies there into the L2 cache
    if (blockIdx.x < a.first_blocks && row < (u32)a.rows) Loaded::prefetch(place, thread);
    if (a.next_begins_early) let_next_kernel_begin();
    wait_for_previous_kernel();
    if (!a.next_begins_early) let_next_kernel_begin();
    if (row >= (u32)a.rows) return;  // whole warps, and no barrier where a block has several rows
#if DIRECT
    normalise_in_registers(a, thread, place);
#else
    normalise_in_shared_memory(a, thread, row, place);
#endif
}
