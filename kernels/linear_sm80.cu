// linear: out[m, n] = sum over k of x[m, k] * weight[n, k], for any M, N, K >= 1 and any alignment (sm_80 on).
//
// Order: each output has one float32 accumulator that starts at +0 and walks k upward, sixteen at a time, one mma.m16n8k16
// each; past K both operands are zero, which leaves an accumulator as it is. With slices, blockIdx.y is the slice: it covers
// k_per_slice values (a multiple of 64) and writes its accumulators to out + slice * M * N, as float32.
// With PARTS = 3 x holds float32 activations split into three bfloat16 parts, for each 16 k: high[16], middle[16], low[16]
// (kernels/split_float32.cu); the three enter the accumulator in this order, each with the same weights.
// Output: the accumulator, or the accumulator rounded once to bfloat16 (nearest even).
//
// x      [M, x_stride]      bfloat16 bits, K (or 3 * 16 * ceil(K / 16)) values a row used
// weight [N, weight_stride] bfloat16 bits
// out    [M, N]             bfloat16 bits, or float32 if out_float32
// VECTOR: pointers and row strides are multiples of 16 bytes and K of 8; without it values are loaded one by one.
// TILE_M x TILE_N outputs a CTA, WARPS_M x WARPS_N warps, STAGES of 64 k in dynamic shared memory.
#include "mma.cuh"
#include "outputs.cuh"

#define TILE_K 64
constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N;
constexpr int M_STEPS = WARP_M / 16, N_STEPS = WARP_N / 8;
constexpr int X_ROW = PARTS * TILE_K * 2, WEIGHT_ROW = TILE_K * 2;  // bytes of a row in shared memory
constexpr int X_BYTES = TILE_M * X_ROW, STAGE_BYTES = X_BYTES + TILE_N * WEIGHT_ROW;
constexpr int GROUP_M = 8;  // m tiles that share weights in the L2 cache
static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0, "a warp's tile is made of 16 x 16 pieces");

struct Arguments {
    const u16* x;
    const u16* weight;
    void* out;
    long long x_stride, weight_stride;  // in elements
    int m, n, k, k_per_slice;
    int tiles_m, tiles_n;
    int out_float32;
    int pairs;  // two neighbouring outputs may be stored at once: n is even and out aligned to them
};

// ROWS x UNITS 16-byte units from row-major global memory; rows past `rows` and columns past `columns` become zeros.
template <int ROWS, int UNITS>
static __device__ __forceinline__ void load_tile(u32 shared, const u16* base, long long stride, int rows, int columns) {
    static_assert(ROWS * UNITS % THREADS == 0, "every thread copies the same number of units");
#pragma unroll(VECTOR ? ROWS * UNITS / THREADS : 1)
    for (int i = 0; i < ROWS * UNITS / THREADS; ++i) {
        const int index = i * THREADS + (int)threadIdx.x;
        const int row = index / UNITS, unit = index % UNITS, column = unit * 8;
        const u32 target = shared + (row * UNITS + swizzled_unit(unit, row)) * 16;
        const u16* source = base + row * stride + column;
#if VECTOR
        const bool inside = row < rows && column < columns;
        copy_16_async(target, inside ? source : base, inside ? 16 : 0);
#else
        u32 words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const u32 low = row < rows && column + 2 * w < columns ? source[2 * w] : 0;
            const u32 high = row < rows && column + 2 * w + 1 < columns ? source[2 * w + 1] : 0;
            words[w] = low | high << 16;
        }
        store_16(target, words);
#endif
    }
}

// The 64 k of one stage: four steps for every accumulator of the warp, times PARTS.
static __device__ __forceinline__ void multiply_stage(float (&c)[M_STEPS][N_STEPS][4], u32 x, u32 weight) {
    const u32 lane = threadIdx.x & 31;
    // matrices of x: rows 0-7 and 8-15 at k 0-7, then both at k 8-15; of the weight: n 0-7 at both k, then n 8-15
    const u32 x_row = (lane & 7) + (lane & 8), x_half = lane >> 4;
    const u32 weight_row = (lane & 7) + (lane >> 4) * 8, weight_half = (lane >> 3) & 1;
#pragma unroll
    for (int step = 0; step < TILE_K / 16; ++step) {
        u32 b[N_STEPS / 2][4];
#pragma unroll
        for (int j = 0; j < N_STEPS / 2; ++j) {
            const u32 unit = swizzled_unit(2 * step + weight_half, weight_row);
            load_matrices(b[j], weight + (weight_row + j * 16) * WEIGHT_ROW + unit * 16);
        }
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const u32 unit = 2 * (step * PARTS + part) + x_half;
#pragma unroll
            for (int i = 0; i < M_STEPS; ++i) {
                u32 a[4];
                load_matrices(a, x + (x_row + i * 16) * X_ROW + swizzled_unit(unit, x_row) * 16);
#pragma unroll
                for (int j = 0; j < N_STEPS; ++j) multiply_accumulate(c[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm80(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) unsigned char memory[];
    const u32 shared = shared_address(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_m = warp / WARPS_N * WARP_M, warp_n = warp % WARPS_N * WARP_N;

    // tiles in groups of GROUP_M rows of tiles, n outside m: CTAs that run together share operands
    const int per_group = GROUP_M * a.tiles_n, group = blockIdx.x / per_group, inside = blockIdx.x % per_group;
    const int rows_in_group = min(GROUP_M, a.tiles_m - group * GROUP_M);
    const int tile_m = (group * GROUP_M + inside % rows_in_group) * TILE_M, tile_n = inside / rows_in_group * TILE_N;

    const int k_begin = blockIdx.y * a.k_per_slice, k_end = min(a.k, k_begin + a.k_per_slice);
    const int stages = (k_end - k_begin + TILE_K - 1) / TILE_K;
    const int x_columns = PARTS == 1 ? a.k : (a.k + 15) / 16 * 48;
    const u16* x = a.x + tile_m * a.x_stride;
    const u16* weight = a.weight + tile_n * a.weight_stride;

    const auto load_stage = [&](int stage) {
        if (stage < stages) {
            const u32 target = shared + stage % STAGES * STAGE_BYTES;
            const int k = k_begin + stage * TILE_K;
            load_tile<TILE_M, X_ROW / 16>(target, x + PARTS * k, a.x_stride, a.m - tile_m, x_columns - PARTS * k);
            load_tile<TILE_N, WEIGHT_ROW / 16>(target + X_BYTES, weight + k, a.weight_stride, a.n - tile_n, a.k - k);
        }
        commit_copies();  // an empty group too: waiting counts groups
    };

    float c[M_STEPS][N_STEPS][4] = {};
    for (int stage = 0; stage < STAGES - 1; ++stage) load_stage(stage);
    for (int stage = 0; stage < stages; ++stage) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();  // this stage is there for everybody, and nobody reads the one before it any more
        load_stage(stage + STAGES - 1);
        const u32 source = shared + stage % STAGES * STAGE_BYTES;
        multiply_stage(c, source + warp_m * X_ROW, source + X_BYTES + warp_n * WEIGHT_ROW);
    }

    const Output output = {a.out, a.m, a.n, a.out_float32 != 0, a.pairs != 0};
#pragma unroll
    for (int i = 0; i < M_STEPS; ++i)
        output.store_rows<WARP_N>(blockIdx.y, tile_m + warp_m + i * 16, tile_n + warp_n, &c[i][0][0], lane);
}
