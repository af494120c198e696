// Where a thread is in a ring of stages: which slot comes next, and the parity of the phase that it waits for there.
#pragma once
#include "bf16.cuh"

struct Place {
    int slot;
    u32 parity;

    __device__ __forceinline__ void advance(int depth) {
        if (++slot == depth) {
            slot = 0;
            parity ^= 1;
        }
    }
};
