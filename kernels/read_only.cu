// read_only: reads 16-byte units 0 .. units - 1 of data once each and does nothing with them: what it takes at the least to
// stream a weight from memory, the launch included.
//
// LOADS units are in flight for each thread; a wave of the grid reads THREADS * gridDim.x neighbouring units at a time.
// out: 0 where time is measured. Otherwise one word, into which all 32-bit words read are joined by exclusive or, so that a
// test can tell that none was left out.
#include "bf16.cuh"

struct Unit {
    u32 words[4];
};

struct Arguments {
    const Unit* data;
    long long units;
    u32* out;
};

// the unit at this address, or zeros; the load is neither left out nor waited for before the next one is issued
static __device__ __forceinline__ Unit load_if(bool inside, const Unit* address) {
    Unit u = {{0u, 0u, 0u, 0u}};
#ifdef __CUDA_ARCH__
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.u32 p, %4, 0;\n"
        "@p ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%5];\n"
        "}\n"
        : "+r"(u.words[0]), "+r"(u.words[1]), "+r"(u.words[2]), "+r"(u.words[3])
        : "r"((u32)inside), "l"(address));
#else
    if (inside) u = *address;
#endif
    return u;
}

static __device__ __forceinline__ void join(u32* out, u32 word) {
#ifdef __CUDA_ARCH__
    atomicXor(out, word);
#else
    *out ^= word;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) read_only(const __grid_constant__ Arguments a) {
    const long long stride = (long long)gridDim.x * THREADS;
    u32 joined = 0u;
    for (long long first = (long long)blockIdx.x * THREADS + threadIdx.x; first < a.units; first += LOADS * stride) {
        Unit loaded[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) loaded[i] = load_if(first + i * stride < a.units, a.data + first + i * stride);
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            joined ^= loaded[i].words[0] ^ loaded[i].words[1] ^ loaded[i].words[2] ^ loaded[i].words[3];
    }
    if (a.out != nullptr) join(a.out, joined);
}
