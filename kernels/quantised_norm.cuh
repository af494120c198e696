// RMSNorm of one row by warps 0 to 7 of a CTA, ahead of a product with quantised weights: residual.cuh, norm.cuh, sums.cuh.
#pragma once
#define SUM_BARRIER() sync_threads(14, GROUP)
#include "norm.cuh"
#include "residual.cuh"

typedef Element<WEIGHT_FLOAT32 != 0>::type W;

constexpr int NORM_VALUES = 8, NORM_PACKS = COLUMNS / NORM_VALUES, NORM_STEPS = (NORM_PACKS + GROUP - 1) / GROUP;
static_assert(GROUP == 256 && COLUMNS % NORM_VALUES == 0, "warps 0 to 7 normalise whole packs");

struct NormArguments {
    const X* x;
    const R* residual;
    const W* weight;
    Total* total;
    float mean_operand, eps;
    int early_stages;  // of the rings, whose weights are fetched before the kernels in front of this one have ended
    int scratch_at;    // the sum's scratch, then z: bytes from the start of dynamic shared memory
};

// The row's loads, all on their way at once.
struct Row {
    Pack<X, NORM_VALUES> x[NORM_STEPS];
    Pack<R, NORM_VALUES> residual[RESIDUAL != 0 ? NORM_STEPS : 1];
    Pack<W, NORM_VALUES> weight[NORM_STEPS];

    __device__ __forceinline__ void read(const NormArguments& a) {
#pragma unroll
        for (int i = 0; i < NORM_STEPS; ++i) {
            const int pack = threadIdx.x + i * GROUP;
            if (pack >= NORM_PACKS) break;
            x[i] = load<NORM_VALUES>(a.x, pack);
            if (RESIDUAL != 0) residual[RESIDUAL != 0 ? i : 0] = load<NORM_VALUES>(a.residual, pack);
            weight[i] = load<NORM_VALUES>(a.weight, pack);
        }
    }

    // y: COLUMNS bfloat16 in shared memory. The new residual is stored by the first CTA.
    __device__ __forceinline__ void normalise(const NormArguments& a, unsigned char* memory, u16* y) const {
        float* scratch = (float*)(memory + a.scratch_at);
        Z* z = (Z*)(memory + a.scratch_at + (SUM_SCRATCH * 4 + 15) / 16 * 16);
        Total* total = blockIdx.x == 0 ? a.total : nullptr;
#pragma unroll
        for (int i = 0; i < NORM_STEPS; ++i) {
            const int pack = threadIdx.x + i * GROUP;
            if (pack < NORM_PACKS) store(z, pack, add_residual<NORM_VALUES>(x[i], residual[RESIDUAL != 0 ? i : 0], total, pack));
        }
        SUM_BARRIER();
        const float r = reciprocal_root(sum_of_row(z, 0, scratch), a.mean_operand, a.eps);
#pragma unroll
        for (int i = 0; i < NORM_STEPS; ++i) {
            const int pack = threadIdx.x + i * GROUP;
            if (pack < NORM_PACKS) store(y, pack, weighted<u16>(load<NORM_VALUES>(z, pack), weight[i], r));
        }
    }
};
