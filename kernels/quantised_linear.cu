// Products with quantised weights for any number of rows of x (sm_80 on): out[m, n] = sum over k of x[m, k] w[n, k].
//
// Order and decoding: quantised.cuh. A CTA makes 16 columns of the output for TOKENS rows of x; each of its warps walks one slice
// of K, reading weights and activations from global memory, and the first warp adds the slices' accumulators, first to last.
//
// x       [m, x_stride] bfloat16 bits: for each sixteen of k its PARTS parts, 16 values each; rows of PARTS * pieces * PIECE_K
// weight  [tiles, pieces, PIECE_BYTES] as cufuse/quantised/tiles.py has it
// out     [m, n] bfloat16 bits (the sum rounded once, to nearest even), or float32
// Grid: tiles x ceil(m / TOKENS); a warp a slice; 512 bytes of shared memory for each slice and eight tokens.
#include "mma.cuh"
#include "quantised.cuh"

struct Arguments {
    const u16* x;
    const unsigned char* weight;
    void* out;
    long long x_stride;  // in elements, even
    int m, n, pieces, slice_pieces;
    int out_float32, pairs;
};

// Activations straight from rows of x: this lane's token is g, its k 2 t and 2 t + 8.
struct FromRows {
    const u16* x;  // at the chunk's first sixteen
    long long stride;
    int m, first, g, t;

    __device__ __forceinline__ Activations operator()(int group, int j) const {
        // tokens that do not exist repeat the last: their products are never stored
        const u16* row = x + min(first + j * 8 + g, m - 1) * stride + group * GROUP_STEPS * PARTS * 16 + 2 * t;
        Activations found;
#pragma unroll
        for (int i = 0; i < GROUP_STEPS * PARTS; ++i) {
            found.b[i][0] = *(const u32*)(row + 16 * i);
            found.b[i][1] = *(const u32*)(row + 16 * i + 8);
        }
        return found;
    }
};

extern "C" __global__ void __launch_bounds__(MAX_THREADS) quantised_linear(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) unsigned char memory[];
    float4* sums = (float4*)memory;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slices = blockDim.x / 32;
    const int first = blockIdx.y * TOKENS;
    const int begin = warp * a.slice_pieces, end = min(a.pieces, begin + a.slice_pieces);
    const unsigned char* weight = a.weight + ((long long)blockIdx.x * a.pieces + begin) * PIECE_BYTES;
    FromRows x = {a.x + (long long)begin * PIECE_K * PARTS, a.x_stride, a.m, first, lane / 4, lane % 4};

    Accumulators acc = {};
#pragma unroll 1
    for (int piece = begin; piece < end; ++piece, weight += PIECE_BYTES) {
        const Words2 ends = load_ends(weight, lane);
#pragma unroll 1
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            multiply_chunk(acc, load_chunk(weight + chunk * CHUNK_BYTES, lane), ends, x);
            x.x += 64 * PARTS;
        }
    }

    if (warp > 0) keep(sums + warp * TOKEN_STEPS * 32, acc, lane);
    __syncthreads();
    if (warp > 0) return;
    for (int slice = 1; slice < slices; ++slice) add_kept(acc, sums + slice * TOKEN_STEPS * 32, lane);
    store_tile({a.out, a.m, a.n, a.out_float32, a.pairs}, acc, blockIdx.x * 16, first, lane);
}
