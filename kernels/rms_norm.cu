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
//
// Which to take, K a multiple of 8 and bfloat16 throughout (CHUNK 8 with DIRECT 0):
//   torch-mean, 1 to 7 rows (T = 128 to 512), or K >= 8161     DIRECT 1, GROUP = T, CHUNK 4
//   torch-mean, 8 rows or more (T = 64, 32), K > 2048          DIRECT 0, GROUP 256 (512 for few rows)
//   torch-mean, 16 rows or more, K <= 2048, so head norms      DIRECT 1, GROUP 32, ROWS 4 or 8, CHUNK 4
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
constexpr bool WEIGHT_AHEAD = STEPS * CHUNK <= 16;

static_assert(COLUMNS % CHUNK == 0, "CHUNK divides the columns");
static_assert(!DIRECT || GROUP == (SUM_THREADS + 31) / 32 * 32, "a thread is a simulated one");
static_assert(!DIRECT || (CHUNK == SUM_VECTOR && !SUM_EDGES), "its accesses are the simulated ones");
static_assert(!DIRECT || STEPS * CHUNK * sizeof(Z) <= 320, "registers hold the row; take DIRECT 0");
static_assert(!DIRECT || SUM_ONE_CHAIN || SUM_CHAINS == CHAIN_BY_POSITION, "chains over whole vectors");
static_assert(ROWS == 1 || (DIRECT && GROUP == 32), "several rows a block: a warp each, without barriers");

__device__ __forceinline__ void finish_chunk(const Pack<Z, CHUNK>& z, const Pack<W, CHUNK>& weight, float r, Y* y, int chunk) {
    store(y, chunk, weighted<Y>(z, weight, r));
}

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
    int padding;
};

// the 1: without it ptxas keeps to 64 registers, whatever spills
extern "C" __global__ void __launch_bounds__(GROUP * ROWS, 1) rms_norm(const __grid_constant__ Arguments a) {
    const int thread = ROWS > 1 ? threadIdx.x % GROUP : threadIdx.x;
    const long long row = (long long)blockIdx.x * ROWS + (ROWS > 1 ? threadIdx.x / GROUP : 0);
    if (a.next_begins_early) let_next_kernel_begin();
    wait_for_previous_kernel();
    if (!a.next_begins_early) let_next_kernel_begin();
    if (row >= a.rows) return;  // whole warps, and no barrier where a block has several rows
    // 32-bit division: the grid ends before 2^31 rows
    const long long group = a.inner == a.rows ? 0 : (u32)row / (u32)a.inner;
    const long long member = row - group * a.inner;
    const X* __restrict__ x = a.x + group * a.x_outer + member * a.x_stride;
    const R* __restrict__ residual = RESIDUAL != 0 ? a.residual + group * a.residual_outer + member * a.residual_stride : nullptr;
    const W* __restrict__ weight = a.weight;
    Y* __restrict__ y = a.y + group * a.y_outer + member * a.y_stride;
    Total* __restrict__ total = RESIDUAL != 0 ? a.total + group * a.total_outer + member * a.total_stride : nullptr;
    float* scratch = reinterpret_cast<float*>(shared_memory);
    Z* stage = reinterpret_cast<Z*>(shared_memory + (SUM_SCRATCH + 3) / 4);

    Pack<Z, CHUNK> own[DIRECT ? STEPS : 1];
    Pack<W, CHUNK> weights[WEIGHT_AHEAD ? STEPS : 1];
    for (int base = 0; base < STEPS; base += BATCH) {
        Pack<X, CHUNK> x_in[BATCH];
        Pack<R, CHUNK> residual_in[RESIDUAL != 0 ? BATCH : 1];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int chunk = thread + (base + i) * GROUP;
            if (chunk < CHUNKS) {
                x_in[i] = load<CHUNK>(x, chunk);
                if (RESIDUAL != 0) residual_in[RESIDUAL != 0 ? i : 0] = load<CHUNK>(residual, chunk);
                if (WEIGHT_AHEAD && BATCH == STEPS) weights[WEIGHT_AHEAD ? i : 0] = load<CHUNK>(weight, chunk);
            }
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int chunk = thread + (base + i) * GROUP;
            Pack<Z, CHUNK> z = {};
            if (chunk < CHUNKS) z = add_residual<CHUNK>(x_in[i], residual_in[RESIDUAL != 0 ? i : 0], total, chunk);
            if (DIRECT) own[DIRECT ? i : 0] = z;
            if (!DIRECT && chunk < CHUNKS) store(stage, chunk, z);
        }
    }

    float m;
    if (!DIRECT) __syncthreads();
#if DIRECT
    m = sum_of_own_vectors(own, scratch);
#elif SUM_CHAINS == CHAIN_MOMENTS
    m = mean_of_squares_by_moments(stage, scratch);
#else
    m = sum_of_row(stage, SUM_EDGES ? (int)(row * COLUMNS & 3) : 0, scratch);
#endif
    const float r = reciprocal_root(m, a.mean_operand, a.eps);

#pragma unroll BATCH
    for (int i = 0; i < STEPS; ++i) {
        const int chunk = thread + i * GROUP;
        if (chunk < CHUNKS) {
            const Pack<Z, CHUNK> z = DIRECT ? own[DIRECT ? i : 0] : load<CHUNK>(stage, chunk);
            const bool ahead = WEIGHT_AHEAD && BATCH == STEPS;
            finish_chunk(z, ahead ? weights[WEIGHT_AHEAD ? i : 0] : load<CHUNK>(weight, chunk), r, y, chunk);
        }
    }
}
