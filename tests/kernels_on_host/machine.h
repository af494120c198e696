// The machine on which a kernel's own source runs on the CPU: every CUDA thread is a fiber of one host thread, and a scheduler
// picks the next one at random. Copies of the copy engine and products of a warpgroup happen at a random later time, as on
// the GPU, so that a missing wait or a stage freed too early shows as wrong results. Functional, exact in its arithmetic, slow.
#pragma once
#include "kernel.h"
#include "loads.h"

#include <array>
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <vector>
#include <sys/mman.h>
#include <ucontext.h>

namespace host {

using Work = std::vector<std::function<void()>>;
struct Job { int due; std::function<void()> run; };
struct Groups { Work open; std::deque<Work> committed; };  // asynchronous operations that are waited for by groups

struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool started = false, done = false;
    int block = 0;  // in the cluster
    Index thread;
    void* stack = nullptr;
    Groups copies, stores;  // cp.async; stores of the copy engine
    unsigned arrived_at = 0;  // the cluster's generation when it arrived there
    const char* waits_for = "";
    long waited_for = -1;     // the last barrier (pipeline.cuh)
};

struct Barrier { int count = 0, pending = 0; long bytes = 0; unsigned phase = 0; bool valid = false; Known arriving, completed; };

struct Rendezvous {  // of the lanes of a warp or warpgroup at one collective operation
    unsigned arrived = 0, generation = 0;
    const char* operation = nullptr;
    std::vector<const void*> inputs;
    std::vector<void*> outputs;
    Known arriving, completed;
};

struct Block {
    Index index;
    std::map<int, Groups> products;  // of a warpgroup
    int running = 0;                 // threads that have not ended
    std::vector<unsigned char> shared;
    std::map<uint32_t, Barrier> barriers;
    std::vector<Rendezvous> warps, warpgroups;
    std::map<int, Rendezvous> named;
    std::set<std::array<long, 4>> prefetched;  // boxes asked for into the cache, and not yet copied
};


struct Machine {
    std::vector<Block> blocks;  // of the cluster that runs
    std::vector<Fiber> fibers;
    std::vector<Job> jobs;      // copies under way
    std::mt19937 random{1};
    Fiber* current = nullptr;
    jmp_buf scheduler, failed;
    char message[400];
    Index grid, block_size;
    int threads = 0;
    long progress = 0;
    Rendezvous cluster;
    std::vector<WarpLoads> loads;  // by warp of the cluster
};

inline Machine machine;

inline Fiber& self() { return *machine.current; }
inline Block& my_block() { return machine.blocks[self().block]; }

// Ends the run; run_grid returns the message.
[[noreturn]] inline void fail(const char* what, long a = 0, long b = 0) {
    const Fiber* f = machine.current;
    std::snprintf(machine.message, sizeof machine.message, "%s (%ld, %ld) in block %d thread %u", what, a, b, f ? f->block : -1,
                  f ? f->thread.x : 0);
    _longjmp(machine.failed, 1);
}

// The oldest groups until only `pending` are left.
inline void finish(Groups& groups, size_t pending) {
    while (groups.committed.size() > pending) {
        for (auto& operation : groups.committed.front()) operation();
        groups.committed.pop_front();
    }
}
inline void commit(Groups& groups) {
    groups.committed.push_back(std::move(groups.open));
    groups.open.clear();
}

inline void yield() {
    if (_setjmp(self().at) == 0) _longjmp(machine.scheduler, 1);
}

template <class Condition>
inline void wait_until(const char* what, Condition condition) {
    self().waits_for = what;
    while (!condition()) yield();
    machine.progress++;
}

inline void later(std::function<void()> run) {
    machine.jobs.push_back({(int)(machine.random() % 600), std::move(run)});
}

// All `size` lanes of `r` bring an input and an output; the last to come runs `action` for everybody, and those that wait go on.
template <class Action>
inline void collective(Rendezvous& r, unsigned size, unsigned lane, const char* name, const void* input, void* output, Action action,
                       bool waits = true) {
    if (r.arrived > 0 && r.inputs.size() != size) fail("threads give a barrier different counts", (long)size);
    if (r.inputs.size() != size) r.inputs.resize(size), r.outputs.resize(size);
    if (r.arrived == 0) r.operation = name;
    if (std::strcmp(r.operation, name) != 0) fail("lanes of a warp meet at different operations");
    r.inputs[lane] = input, r.outputs[lane] = output;
    const unsigned generation = r.generation;
    if (++r.arrived == size) {
        action(r);
        r.arrived = 0;
        r.generation++;
        machine.progress++;
    } else if (waits) {
        wait_until(name, [&] { return r.generation != generation; });
    }
}

// At a barrier of whole warps, where what they know of loads goes round.
inline void meet(Rendezvous& r, unsigned size, unsigned lane, const char* name, bool waits = true) {
    tell(r.arriving);
    collective(r, size, lane, name, nullptr, nullptr, [](Rendezvous& all) { all.completed = all.arriving; }, waits);
    if (waits) learn(r.completed);
}

template <class Action>
inline void warp_collective(const char* name, const void* input, void* output, Action action) {
    collective(my_block().warps[self().thread.x / 32], 32, self().thread.x % 32, name, input, output, action);
}

// Shared memory is gone once its last thread has ended.
inline Block& living_block(int block) {
    Block& b = machine.blocks[block < 0 ? self().block : block];
    if (b.running == 0) fail("shared memory of a CTA that has ended is accessed");
    return b;
}

inline unsigned char* shared_at(uint32_t address, uint32_t bytes, int block = -1) {
    auto& memory = living_block(block).shared;
    if ((size_t)address + bytes > memory.size()) fail("shared memory accessed out of bounds", address, bytes);
    return memory.data() + address;
}

inline Barrier& barrier_at(uint32_t address, int block = -1) {
    Barrier& b = living_block(block).barriers[address];
    if (!b.valid) fail("barrier was not initialised", address);
    return b;
}

inline void settle(Barrier& b) {
    if (b.pending < 0) fail("more arrivals than a barrier counts", b.count);
    if (b.pending == 0 && b.bytes == 0) b.phase++, b.pending = b.count, b.completed = b.arriving, machine.progress++;
}

}  // namespace host
