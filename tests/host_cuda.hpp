// Runs a CUDA kernel's text on the host: one fiber a thread, one block after the other.
// A fiber gives way at every barrier and shuffle, so all threads of a warp pass them in step.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels_on_host/floats.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
struct alignas(16) float4 { float x, y, z, w; };
struct Index { unsigned x, y, z; };
inline Index threadIdx, blockIdx, blockDim, gridDim;
inline float4 shared_memory[1 << 15];


struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Index thread;
    bool done = false, at_barrier = false;
    int shuffles = 0;
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current;
inline float slots[2][1024];  // what each thread showed in its last two shuffles

inline void give_way() {
    swapcontext(&fibers[current].context, &scheduler);
    threadIdx = fibers[current].thread;
}
inline void __syncthreads() {
    fibers[current].at_barrier = true;
    give_way();
}
inline float exchange(float v, int lane) {
    const int me = current, turn = fibers[me].shuffles++ & 1;
    slots[turn][me] = v;
    give_way();
    return slots[turn][me / 32 * 32 + lane];
}
inline float __shfl_xor_sync(unsigned, float v, int offset) { return exchange(v, (current % 32) ^ offset); }
inline float __shfl_sync(unsigned, float v, int lane) { return exchange(v, lane); }
inline float __shfl_down_sync(unsigned, float v, int offset) {
    const int lane = current % 32 + offset;
    return exchange(v, lane < 32 ? lane : current % 32);
}

template <class Kernel>
void run_block(Kernel kernel) {
    const int threads = blockDim.x * blockDim.y;
    fibers = std::vector<Fiber>(threads);
    static Kernel* body;
    body = &kernel;
    for (int t = 0; t < threads; ++t) {
        Fiber& f = fibers[t];
        f.thread = {t % blockDim.x, t / blockDim.x, 0};
        f.stack.reset(new char[1 << 16]);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = 1 << 16;
        f.context.uc_link = &scheduler;
        makecontext(&f.context, +[] { (*body)(); fibers[current].done = true; }, 0);
    }
    for (bool alive = true; alive;) {
        alive = false;
        bool moved = false;
        for (int t = 0; t < threads; ++t) {
            Fiber& f = fibers[t];
            alive |= !f.done;
            if (f.done || f.at_barrier) continue;
            current = t;
            threadIdx = f.thread;
            swapcontext(&scheduler, &f.context);
            moved = true;
        }
        if (!moved)
            for (Fiber& f : fibers) f.at_barrier = false;
    }
}

template <class Kernel>
void run_grid(unsigned blocks, Index block, Kernel kernel, unsigned rows = 1) {
    gridDim = {blocks, rows, 1};
    blockDim = block;
    for (unsigned b = 0; b < blocks * rows; ++b) {
        blockIdx = {b % blocks, b / blocks, 0};
        std::memset(shared_memory, 0xff, sizeof shared_memory);  // NaN: nobody may rely on zeros
        run_block(kernel);
    }
}
