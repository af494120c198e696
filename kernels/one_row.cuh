// RMSNorm of one row by threads 0 to GROUP - 1 (256 or 512) of a CTA: residual.cuh, norm.cuh, sums.cuh. SUM_BARRIER is to be a
// barrier of theirs.
//
// Where each simulated thread of the sum takes only what one physical thread has loaded (SUM_IN_REGISTERS) the row stays in
// registers and the sum's partials alone go through shared memory; otherwise z does.
#pragma once
#include "norm.cuh"
#include "residual.cuh"

typedef Element<WEIGHT_FLOAT32 != 0>::type W;

// Elements of a load, and of all simulated threads' vectors in one step.
constexpr int SUM_STEP = SUM_THREADS * SUM_VECTOR;
constexpr int ROW_PACK = (SUM_ONE_CHAIN && SUM_VECTOR == 4) || (!SUM_ONE_CHAIN && SUM_STEP == GROUP * 4) ? 4 : 8;
constexpr int ROW_PACKS = COLUMNS / ROW_PACK, VECTORS_OF_PACK = ROW_PACK / SUM_VECTOR;
// no simulated thread takes a second vector
constexpr bool ONE_VECTOR_EACH = COLUMNS <= SUM_STEP;
// threads that the row is dealt out to: pack p to thread p modulo ROW_THREADS
constexpr int ROW_THREADS = SUM_STEP == GROUP / 2 * ROW_PACK ? GROUP / 2 : GROUP;
constexpr int ROW_STEPS = (ROW_PACKS + ROW_THREADS - 1) / ROW_THREADS;
constexpr bool SUM_IN_REGISTERS = (SUM_ONE_CHAIN || SUM_CHAINS == CHAIN_BY_POSITION) && !SUM_EDGES && SUM_VECTOR >= 4 &&
                                  (!SUM_ONE_CHAIN || VECTORS_OF_PACK == 1) &&
                                  (SUM_STEP % (ROW_THREADS * ROW_PACK) == 0 || ONE_VECTOR_EACH);
// simulated threads of a physical one: neighbours, and others at a distance of all threads' neighbours
constexpr int SUM_SETS = SUM_STEP % (ROW_THREADS * ROW_PACK) == 0 ? SUM_STEP / (ROW_THREADS * ROW_PACK) : ROW_STEPS;
static_assert(SUM_ONE_CHAIN || !SUM_IN_REGISTERS || SUM_SETS * ROW_THREADS * VECTORS_OF_PACK >= SUM_PARTIALS, "all have a place");
// The tree's first two steps are taken inside a warp: its lanes hold eight neighbours in each quarter of the simulated threads.
constexpr bool IN_QUARTERS = SUM_IN_REGISTERS && SUM_CHAINS == CHAIN_BY_POSITION && SUM_TREE == TREE_HALVE && SUM_LINES == 1 &&
                             SUM_STEP == GROUP * ROW_PACK && SUM_THREADS >= 256;
static_assert((GROUP == 256 || GROUP == 512) && COLUMNS % 8 == 0, "whole packs");

// Which pack of each step is this thread's.
static __device__ __forceinline__ int own_pack() {
    const int thread = threadIdx.x;
    return IN_QUARTERS ? thread % 32 / 8 * (GROUP / 4) + thread / 32 * 8 + thread % 8 : thread;
}

// Vector s of a pack.
template <int V, int N>
static __device__ __forceinline__ Pack<u16, V> vector_of(const Pack<u16, N>& pack, int s) {
    Pack<u16, V> found;
#pragma unroll
    for (int i = 0; i < V / 2; ++i) found.pairs[i] = pack.pairs[V / 2 * s + i];
    return found;
}

template <int V, int N>
static __device__ __forceinline__ Pack<float, V> vector_of(const Pack<float, N>& pack, int s) {
    Pack<float, V> found;
#pragma unroll
    for (int i = 0; i < V; ++i) found.e[i] = pack.e[V * s + i];
    return found;
}

// Pack number i of this thread, or none.
static __device__ __forceinline__ bool has_pack(int i) {
    return (ROW_THREADS == GROUP || threadIdx.x < ROW_THREADS) && own_pack() + i * ROW_THREADS < ROW_PACKS;
}

// Sum of the row whose packs thread, thread + ROW_THREADS, ... are z: every thread of the group returns it.
static __device__ __forceinline__ float sum_of_packs(const Pack<Z, ROW_PACK> (&z)[ROW_STEPS], float* scratch) {
    constexpr int V = SUM_IN_REGISTERS ? SUM_VECTOR : ROW_PACK, S = ROW_PACK / V;
    const int thread = threadIdx.x;
    float chains[SUM_SETS][S][4] = {};
#pragma unroll
    for (int i = 0; i < ROW_STEPS; ++i)
        if (has_pack(i)) {
#pragma unroll
            for (int s = 0; s < S; ++s) take(chains[i % SUM_SETS][s], vector_of<V>(z[i], s));
        }
    if constexpr (SUM_ONE_CHAIN) {
#pragma unroll
        for (int set = 0; set < SUM_SETS; ++set) {
            const int line = (thread + set * ROW_THREADS) / 32;
            const float v = chains[set][0][0], sum = SUM_TREE == TREE_PAIRS ? pair_lanes(v) : halve_lanes(v);
            if (thread < ROW_THREADS && line < SUM_LINES && thread % 32 == 0) scratch[line] = sum;
        }
        SUM_BARRIER();
        return join_lines(scratch);
    } else if constexpr (IN_QUARTERS) {
        Pack<float, S> partials;
#pragma unroll
        for (int s = 0; s < S; ++s) {
            float v = join(chains[0][s]);
            v = __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, 16));
            partials.e[s] = __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, 8));
        }
        if (thread % 32 < 8) store(scratch, thread / 32 * 8 + thread % 8, partials);
        SUM_BARRIER();
        constexpr int LEFT = SUM_THREADS < 256 ? 1 : SUM_THREADS / 128;
        float v[LEFT];
#pragma unroll
        for (int i = 0; i < LEFT; ++i) v[i] = scratch[32 * i + thread % 32];
        return halve_lanes(halve_registers(v));
    } else {
#pragma unroll
        for (int set = 0; set < SUM_SETS; ++set) {
            const int neighbours = thread + set * ROW_THREADS;
            Pack<float, S> partials;
#pragma unroll
            for (int s = 0; s < S; ++s) partials.e[s] = join(chains[set][s]);
            if (neighbours * S < SUM_PARTIALS) store(scratch, neighbours, partials);
        }
        SUM_BARRIER();
        return join_partials(scratch, scratch + SUM_PARTIALS);
    }
}

// A row's loads, all on their way at once.
struct Row {
    Pack<X, ROW_PACK> x[ROW_STEPS];
    Pack<R, ROW_PACK> residual[RESIDUAL != 0 ? ROW_STEPS : 1];
    Pack<W, ROW_PACK> weight[ROW_STEPS];

    __device__ __forceinline__ void read(const X* row, const R* added) {
#pragma unroll
        for (int i = 0; i < ROW_STEPS; ++i) {
            const int pack = own_pack() + i * ROW_THREADS;
            if (!has_pack(i)) break;
            x[i] = load<ROW_PACK>(row, pack);
            if (RESIDUAL != 0) residual[RESIDUAL != 0 ? i : 0] = load<ROW_PACK>(added, pack);
        }
    }
    __device__ __forceinline__ void read_weight(const W* norm_weight) {
#pragma unroll
        for (int i = 0; i < ROW_STEPS; ++i) {
            if (!has_pack(i)) break;
            weight[i] = load<ROW_PACK>(norm_weight, own_pack() + i * ROW_THREADS);
        }
    }

    // y: K bfloat16 in global or shared memory. memory: SUM_SCRATCH floats of shared memory, up to a multiple of 16 bytes, then z
    // unless SUM_IN_REGISTERS. total: null if another CTA stores it.
    __device__ __forceinline__ void normalise(float mean_operand, float eps, unsigned char* memory, Total* total, u16* y) const {
        float* scratch = reinterpret_cast<float*>(memory);
        Z* row = reinterpret_cast<Z*>(memory + (SUM_SCRATCH * 4 + 15) / 16 * 16);
        Pack<Z, ROW_PACK> z[ROW_STEPS];
#pragma unroll
        for (int i = 0; i < ROW_STEPS; ++i) {
            const int pack = own_pack() + i * ROW_THREADS;
            if (!has_pack(i)) break;
            z[i] = add_residual<ROW_PACK>(x[i], residual[RESIDUAL != 0 ? i : 0], total, pack);
            if (!SUM_IN_REGISTERS) store(row, pack, z[i]);
        }
        float sum;
        if constexpr (SUM_IN_REGISTERS) {
            sum = sum_of_packs(z, scratch);
        } else {
            SUM_BARRIER();
            sum = sum_of_row(row, 0, scratch);
        }
        const float r = reciprocal_root(sum, mean_operand, eps);
#pragma unroll
        for (int i = 0; i < ROW_STEPS; ++i) {
            const int pack = own_pack() + i * ROW_THREADS;
            if (!has_pack(i)) break;
            store(y, pack, weighted<u16>(z[i], weight[i], r));
        }
    }
};
