// Whether a copy may overtake an ldmatrix. On the GPU nothing waits for a load in flight but the first instruction that reads one
// of its registers: an arrival at a barrier does not, so that a copy which the arrival lets go may write what is still to be read.
// Here a load reads at once, and bits alone would never show that. So the machine keeps account, for each warp, of its loads and of
// what others know of them, as threads tell each other at barriers: a copy into rows that were loaded is allowed once its thread
// knows, by way of barriers, that the load was used before. That does not depend on the order in which threads happen to run.
//
// A load counts as used when its warp
// - stores matrices, whatever their values are; or
// - gives a tensor core one of its words as loaded, the same one in all lanes (multiply_accumulate, multiply_fragments).
// What touches registers alone, such as a shuffle, is no use: a compiler may move it behind the arrival. Products are one although
// they may be moved too (ptxas does so in straight code), because kernels have no other: what becomes of them only the machine code
// shows. Nor is a fence, which reads no register.
// Not seen: arithmetic and ordinary stores, so that a use must show in one of these calls; whether stored matrices were made of the
// load; products of what was changed after the load (they are no use) or equals its words by chance, as zeros do (they are one).
// Ordinary loads are not looked at, nor are copies by cp.async.
#pragma once
#include "bf16.cuh"

#include <vector>

namespace host {

// How far somebody knows what each warp of the cluster has done: the number of its uses. Empty: nothing.
using Known = std::vector<unsigned>;

struct Load { u32 rows[32], words[32][4]; };  // by lane
struct WarpLoads {
    Known known;                    // the warp's own uses are counted at its own place
    std::vector<Load> unused;
    std::vector<unsigned> used_at;  // for each 16 bytes of shared memory: the use that showed their last load; empty without loads
};

void forget_loads(int warps);  // and begin with so many
void note_load(const void* const* rows, void* const* registers);
void note_use();
void note_product(int warp, const void* const* operands, int words);  // operands: for each lane, beginning with these words

// What this thread's warp knows, to a barrier, and from there to a thread that has waited.
void tell(Known& barrier);
void learn(const Known& barrier);

// barrier: which the copy completes.
void demand_loads_used(u32 shared, u32 bytes, int block, u32 barrier);

}  // namespace host
