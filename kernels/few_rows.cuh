// RMSNorm of ROWS rows by a CTA, each thread of a row one simulated thread of its sum: residual.cuh, norm.cuh, sums.cuh. All
// threads of the CTA take part in its barriers.
#pragma once
#define SUM_BARRIER __syncthreads
#include "norm.cuh"
#include "residual.cuh"

typedef Element<WEIGHT_FLOAT32 != 0>::type W;

constexpr int ROW_THREADS = (SUM_THREADS + 31) / 32 * 32, VECTORS = COLUMNS / SUM_VECTOR;
constexpr int VECTOR_STEPS = (VECTORS + SUM_THREADS - 1) / SUM_THREADS;
// vectors whose loads are on their way at once
constexpr int BATCH = VECTOR_STEPS <= (RESIDUAL != 0 ? 10 : 20) ? VECTOR_STEPS : RESIDUAL != 0 ? 10 : 20;
constexpr bool LINES_OF_WARPS = SUM_WIDTH == 32 && SUM_TREE != TREE_LINES_FIRST;
static_assert(!SUM_EDGES && (SUM_ONE_CHAIN || SUM_CHAINS == CHAIN_BY_POSITION) && SUM_VECTOR >= 4, "whole vectors");
static_assert(SUM_THREADS % 32 == 0 || VECTORS <= SUM_THREADS, "threads that do not exist have no vectors");
static_assert(LINES_OF_WARPS || SUM_LINES == 1, "two steps of a tree");
static_assert(sizeof(Z) == 2, "a row lies where its result will");

// Floats of shared memory.
constexpr int ROWS_SCRATCH = ROWS * ROW_THREADS;

struct FewRows {
    Pack<X, SUM_VECTOR> x[BATCH];
    Pack<R, SUM_VECTOR> residual[RESIDUAL != 0 ? BATCH : 1];
    int row, thread;

    __device__ __forceinline__ FewRows() : row(threadIdx.x / ROW_THREADS), thread(threadIdx.x % ROW_THREADS) {}
    __device__ __forceinline__ bool has_vector(int step) const {
        const bool exists = row < ROWS && (SUM_THREADS % 32 == 0 || thread < SUM_THREADS);
        return exists && step < VECTOR_STEPS && thread + step * SUM_THREADS < VECTORS;
    }
    // The first vectors' loads. added: the residual.
    __device__ __forceinline__ void read(const X* from, long long stride, const R* added, long long added_stride, int first = 0) {
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (!has_vector(first + i)) continue;
            const int vector = thread + (first + i) * SUM_THREADS;
            x[i] = load<SUM_VECTOR>(from + row * stride, vector);
            if (RESIDUAL != 0) residual[RESIDUAL != 0 ? i : 0] = load<SUM_VECTOR>(added + row * added_stride, vector);
        }
    }
    __device__ __forceinline__ float sum(const float (&chains)[4], float* scratch) const {
        const int own = min(row, ROWS - 1);
        float v = join(chains);
        if constexpr (LINES_OF_WARPS) {
            v = SUM_TREE == TREE_PAIRS ? pair_lanes(v) : halve_lanes(v);
            if (row < ROWS && threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
            SUM_BARRIER();
            return join_lines(scratch + own * (ROW_THREADS / 32));
        } else {
            if (row < ROWS) scratch[threadIdx.x] = v;
            SUM_BARRIER();
            return join_partials(scratch + own * ROW_THREADS, nullptr);
        }
    }

    // y: rows of bfloat16 in shared memory, `pitch` bytes apart. weight: of the norm, in shared memory as soon as the barrier `there`
    // has completed a phase.
    // scratch: ROWS_SCRATCH floats of shared memory. total: null if another CTA stores it.
    __device__ __forceinline__ void normalise(const X* from, long long stride, const R* added, long long added_stride, Total* total,
                                              long long total_stride, float mean_operand, float eps, float* scratch,
                                              const W* weight, u32 there, unsigned char* y, u32 pitch) {
        u16* own = reinterpret_cast<u16*>(y + row * pitch);
        Total* own_total = total == nullptr ? nullptr : total + row * total_stride;
        float chains[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int first = 0; first < VECTOR_STEPS; first += BATCH) {
            if (first > 0) read(from, stride, added, added_stride, first);
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                if (!has_vector(first + i)) continue;
                const int vector = thread + (first + i) * SUM_THREADS;
                const Pack<Z, SUM_VECTOR> z = add_residual<SUM_VECTOR>(x[i], residual[RESIDUAL != 0 ? i : 0], own_total, vector);
                take(chains, z);
                store(own, vector, z);
            }
        }
        const float r = reciprocal_root(sum(chains, scratch), mean_operand, eps);
        barrier_wait(there, 0);
#pragma unroll
        for (int step = 0; step < VECTOR_STEPS; ++step) {
            if (!has_vector(step)) continue;
            const int vector = thread + step * SUM_THREADS;
            store(own, vector, weighted<u16>(load<SUM_VECTOR>(own, vector), load<SUM_VECTOR>(weight, vector), r));
        }
    }
};
