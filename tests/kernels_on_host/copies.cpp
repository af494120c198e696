// The functions of pipeline.cuh: barriers, the copy engine, clusters.
#include "machine.h"
#include "cluster_stores.cuh"

void barrier_init(u32 barrier, u32 arrivals) {
    if (barrier % 8) host::fail("barrier is not aligned", barrier);
    host::my_block().barriers[barrier] = {(int)arrivals, (int)arrivals, 0, 0, true};
}

void barrier_arrive_expecting(u32 barrier, u32 bytes) {
    auto& b = host::barrier_at(barrier);
    host::tell(b.arriving);
    b.bytes += bytes, b.pending--;
    host::settle(b);
}
void barrier_arrive(u32 barrier) {
    auto& b = host::barrier_at(barrier);
    host::tell(b.arriving);
    b.pending--;
    host::settle(b);
}
void barrier_arrive_at(u32 barrier, u32 rank) {
    auto& b = host::barrier_at(barrier, (int)rank);
    host::tell(b.arriving);
    b.pending--;
    host::settle(b);
}
static bool host_completed(u32 barrier, u32 parity) {
    const auto& b = host::barrier_at(barrier);
    if ((b.phase & 1) == parity) return false;
    host::learn(b.completed);
    host::self().waited_for = barrier;
    return true;
}
void barrier_wait(u32 barrier, u32 parity) {
    host::wait_until("barrier", [=] { return host_completed(barrier, parity); });
}

// Others go on before the answer is given: whoever asks again and again waits for them.
bool barrier_completed(u32 barrier, u32 parity) {
    host::yield();
    return host_completed(barrier, parity);
}

static void host_arrived(u32 barrier, int block, u32 bytes) {
    auto& b = host::barrier_at(barrier, block);
    b.bytes -= bytes;
    host::settle(b);
}

void copy_bytes(u32 shared, const void* global, u32 bytes, u32 barrier, u64) {
    if (shared % 16 || bytes % 16 || (uintptr_t)global % 16) host::fail("bulk copy is not aligned to 16 bytes", shared, bytes);
    const int block = host::self().block;
    host::demand_loads_used(shared, bytes, block, barrier);
    host::later([=] {
        std::memcpy(host::shared_at(shared, bytes, block), global, bytes);
        host_arrived(barrier, block, bytes);
    });
}

// Visits the box's lines: place in shared memory (before swizzling), address in global memory, values inside the tensor.
template <class Visit>
static u32 host_for_box(const TensorMap& map, const int (&at)[3], Visit visit) {
    const auto* w = map.words;
    const int rank = (int)w[1];
    u32 place = 0;
    for (u64 z = 0; z < (rank > 2 ? w[9] : 1); ++z)
        for (u64 y = 0; y < w[8]; ++y, place += (u32)w[7] * 2) {
            const long long line = at[1] + (long long)y, plane = rank > 2 ? at[2] + (long long)z : 0;
            const bool inside = line >= 0 && line < (long long)w[3] && (rank < 3 || (plane >= 0 && plane < (long long)w[4]));
            const long long left = inside ? (long long)w[2] - at[0] : 0;
            visit(place, (unsigned char*)w[0] + line * w[5] + plane * w[6] + at[0] * 2, (u32)(left < 0 ? 0 : left < (long long)w[7] ? left : w[7]));
        }
    return place;
}

// Boxes lie swizzled: lines of 128 bytes or of 64.
static u32 host_swizzled(const TensorMap& map, u32 address) { return address ^ (address >> 7 & (map.words[7] * 2 == 128 ? 7 : 3)) << 4; }
static void host_check_box(const TensorMap& map, u32 shared) {
    const u32 line = map.words[7] * 2;
    if (line != 128 && line != 64) host::fail("a swizzled line has 128 bytes or 64");
    if (shared % (8 * line)) host::fail("box is not aligned in shared memory", shared);
}

static void host_copy_box(u32 shared, const TensorMap* map, int c0, int c1, int c2, u32 barrier, u32 mask) {
    host_check_box(*map, shared);
    const TensorMap copy = *map;
    const int at[3] = {c0, c1, c2};
    host::my_block().prefetched.erase({(long)map->words[0], c0, c1, c2});
    const u32 size = (u32)(map->words[7] * 2 * map->words[8] * (map->words[1] > 2 ? map->words[9] : 1));
    for (int block = 0; block < (int)host::machine.blocks.size(); ++block)
        if (mask >> block & 1) {
            host::demand_loads_used(shared, size, block, barrier);
            host::later([=] {
                const u32 bytes = host_for_box(copy, at, [&](u32 place, const unsigned char* from, u32 values) {
                    for (u32 i = 0; i < copy.words[7]; ++i) {
                        unsigned char* to = host::shared_at(host_swizzled(copy, shared + place + i * 2), 2, block);
                        if (i < values) std::memcpy(to, from + i * 2, 2); else std::memset(to, 0, 2);
                    }
                });
                host_arrived(barrier, block, bytes);
            });
        }
}

void prefetch_box(const TensorMap* map, int c0, int c1, int c2) {
    host::my_block().prefetched.insert({(long)map->words[0], c0, c1, c2});
}
void copy_box(u32 s, const TensorMap* m, int c0, int c1, u32 b, u64) { host_copy_box(s, m, c0, c1, 0, b, 1u << host::self().block); }
void copy_box(u32 s, const TensorMap* m, int c0, int c1, int c2, u32 b, u64) {
    host_copy_box(s, m, c0, c1, c2, b, 1u << host::self().block);
}
void copy_box_to_all(u32 s, const TensorMap* m, int c0, int c1, u32 b, u64, u32 mask) { host_copy_box(s, m, c0, c1, 0, b, mask); }
void copy_box_to_all(u32 s, const TensorMap* m, int c0, int c1, int c2, u32 b, u64, u32 mask) {
    host_copy_box(s, m, c0, c1, c2, b, mask);
}

void store_matrices(u32 address, u32 r0, u32 r1, u32 r2, u32 r3) {
    struct Lane { u32 address, r[4]; } in{address, {r0, r1, r2, r3}};
    host::warp_collective("stmatrix", &in, nullptr, [](host::Rendezvous& w) {
        for (int matrix = 0; matrix < 4; ++matrix)
            for (int lane = 0; lane < 32; ++lane) {
                const u32 row = ((const Lane*)w.inputs[matrix * 8 + lane / 4])->address;
                if (row % 16) host::fail("stmatrix address is not a multiple of 16", row);
                std::memcpy(host::shared_at(row, 16) + lane % 4 * 4, &((const Lane*)w.inputs[lane])->r[matrix], 4);
            }
        host::note_use();
    });
}

// Stores read shared memory as late as when they are waited for.
void store_box(const TensorMap* map, int c0, int c1, u32 shared) {
    const TensorMap copy = *map;
    const int block = host::self().block;
    const int at[3] = {c0, c1, 0};
    host_check_box(copy, shared);
    host::self().stores.open.push_back([=] {
        host_for_box(copy, at, [&](u32 place, unsigned char* to, u32 values) {
            for (u32 i = 0; i < values; ++i) std::memcpy(to + i * 2, host::shared_at(host_swizzled(copy, shared + place + i * 2), 2, block), 2);
        });
    });
}
void commit_stores() { host::commit(host::self().stores); }
void sync_threads(u32 id, u32 threads) {
    // lanes of the same barrier number are told apart by order of arrival: any numbering will do
    auto& r = host::my_block().named[(int)id];
    host::meet(r, threads, r.arrived, "named barrier");
}
void arrive_threads(u32 id, u32 threads) {
    auto& r = host::my_block().named[(int)id];
    host::meet(r, threads, r.arrived, "named barrier", false);
}
u32 cluster_rank() { return (u32)host::self().block; }
void sync_cluster() {
    auto& m = host::machine;
    host::meet(m.cluster, (unsigned)m.fibers.size(), (unsigned)(&host::self() - m.fibers.data()), "cluster barrier");
}

// cluster_stores.cuh
void arrive_at_cluster() {
    auto& m = host::machine;
    host::self().arrived_at = m.cluster.generation;
    host::meet(m.cluster, (unsigned)m.fibers.size(), (unsigned)(&host::self() - m.fibers.data()), "cluster arrival", false);
}
void wait_for_cluster() {
    const unsigned arrived_at = host::self().arrived_at;
    host::wait_until("cluster barrier", [=] { return host::machine.cluster.generation != arrived_at; });
    host::learn(host::machine.cluster.completed);
}

// addresses as address_in has them: the CTA's number from bit 24 on
void send_4(u32 address, u32 word, u32 barrier) {
    if (address % 4) host::fail("store is not aligned to 4 bytes", address);
    const int block = (int)(address >> 24);
    if (block != (int)(barrier >> 24)) host::fail("place and barrier are not in the same CTA");
    if (host::machine.cluster.generation == host::self().arrived_at) host::fail("sent before the cluster has met");
    host::later([=] {
        std::memcpy(host::shared_at(address & 0xFFFFFF, 4, block), &word, 4);
        host_arrived(barrier & 0xFFFFFF, block, 4);
    });
}
