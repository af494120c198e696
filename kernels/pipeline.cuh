// Copies by the copy engine into shared memory and the barriers that say when they have arrived (sm_90 on).
//
// A barrier (mbarrier, 8 bytes of shared memory) completes a phase when its arrivals have come and the bytes expected have been
// written; phases alternate between parity 0 and 1. wait(barrier, p) returns when the phase of parity p is complete, so that
// a barrier of which no phase has completed lets wait(.., 1) pass: an empty ring is free to be filled.
#pragma once
#include "launches.cuh"
#include "mma.cuh"

// CUtensorMap as the driver encodes it; a kernel gets it inside its arguments.
struct alignas(64) TensorMap {
    u64 words[16];
};

// What the L2 cache should do with a copy's lines: the codes that createpolicy.fractional gives for a fraction of 1
// (CUTLASS, include/cute/arch/copy_sm90_desc.hpp, CacheHintSm90).
#define EVICT_NORMAL 0x1000000000000000ull
#define EVICT_FIRST 0x12F0000000000000ull

CUFUSE_INLINE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine and to the other CTAs of the cluster.
CUFUSE_INLINE void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" : : : "memory");
}

// One arrival, and `bytes` more to be written by copies in this phase.
CUFUSE_INLINE void barrier_arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(barrier), "r"(bytes) : "memory");
}

CUFUSE_INLINE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(barrier) : "memory");
}

// Arrival at the barrier that lies at the same place in CTA `rank` of the cluster. Without a scope: `.release.cluster` becomes
// a fence of the whole GPU (MEMBAR.ALL.GPU) and `.acquire.cluster` below an invalidation of the L1 cache, for every stage. What
// is handed over here is room in shared memory that has been read; nothing that was written has to be seen.
CUFUSE_INLINE void barrier_arrive_at(u32 barrier, u32 rank) {
    asm volatile("{\n\t.reg .b32 remote;\n\tmapa.shared::cluster.u32 remote, %0, %1;\n\t"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t}"
                 : : "r"(barrier), "r"(rank) : "memory");
}

CUFUSE_INLINE bool barrier_test(u32 barrier, u32 parity) {
    u32 done;
    asm volatile("{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                 "selp.u32 %0, 1, 0, p;\n\t}"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    return done != 0;
}

// The same question without waiting for the answer to change (try_wait may do so for a while).
CUFUSE_INLINE bool barrier_completed(u32 barrier, u32 parity) {
    u32 done;
    asm volatile("{\n\t.reg .pred p;\n\tmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                 "selp.u32 %0, 1, 0, p;\n\t}"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    return done != 0;
}

CUFUSE_INLINE void barrier_wait(u32 barrier, u32 parity) {
    while (!barrier_test(barrier, parity)) {
    }
}

// `bytes` (a multiple of 16, both addresses too) of contiguous global memory. Into this CTA's own memory the target is written
// shared::cta: for shared::cluster ptxas adds a call and a stack for targets elsewhere on sm_120.
CUFUSE_INLINE void copy_bytes(u32 shared, const void* global, u32 bytes, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 : : "r"(shared), "l"(global), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}

// A box of a tensor at coordinates (c0, c1[, c2]), the first the fastest.
CUFUSE_INLINE void copy_box(u32 shared, const TensorMap* map, int c0, int c1, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3}], [%4], %5;"
                 : : "r"(shared), "l"(map), "r"(c0), "r"(c1), "r"(barrier), "l"(policy) : "memory");
}

CUFUSE_INLINE void copy_box(u32 shared, const TensorMap* map, int c0, int c1, int c2, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cta.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3, %4}], [%5], %6;"
                 : : "r"(shared), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier), "l"(policy) : "memory");
}

// The box into the L2 cache alone, as with prefetch_line.
CUFUSE_INLINE void prefetch_box(const TensorMap* map, int c0, int c1) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" : : "l"(map), "r"(c0), "r"(c1) : "memory");
}

CUFUSE_INLINE void prefetch_box(const TensorMap* map, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];"
                 : : "l"(map), "r"(c0), "r"(c1), "r"(c2) : "memory");
}

// The same box to the same place in every CTA of `mask`; each one's own barrier hears of it.
CUFUSE_INLINE void copy_box_to_all(u32 shared, const TensorMap* map, int c0, int c1, u32 barrier, u64 policy, u32 mask) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
                 "[%0], [%1, {%2, %3}], [%4], %5, %6;"
                 : : "r"(shared), "l"(map), "r"(c0), "r"(c1), "r"(barrier), "h"((u16)mask), "l"(policy) : "memory");
}

CUFUSE_INLINE void copy_box_to_all(u32 shared, const TensorMap* map, int c0, int c1, int c2, u32 barrier, u64 policy, u32 mask) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
                 "[%0], [%1, {%2, %3, %4}], [%5], %6, %7;"
                 : : "r"(shared), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier), "h"((u16)mask), "l"(policy) : "memory");
}

// Four 8x8 matrices of bfloat16 to shared memory; lane l gives the address of row l % 8 of matrix l / 8.
CUFUSE_INLINE void store_matrices(u32 address, u32 r0, u32 r1, u32 r2, u32 r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 : : "r"(address), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}

// A box from shared to global memory; what lies outside the tensor is not written.
CUFUSE_INLINE void store_box(const TensorMap* map, int c0, int c1, u32 shared) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                 : : "l"(map), "r"(c0), "r"(c1), "r"(shared) : "memory");
}

CUFUSE_INLINE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" : : : "memory"); }

// Until at most PENDING of this thread's groups of stores still read shared memory.
template <int PENDING>
static __device__ __forceinline__ void wait_for_store_reads() {
    asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(PENDING) : "memory");
}

// Until this thread's stores have been written.
CUFUSE_INLINE void wait_for_stores() { asm volatile("cp.async.bulk.wait_group 0;" : : : "memory"); }

// Orders this thread's ordinary writes to shared memory before later accesses of it by the copy engine or tensor cores.
CUFUSE_INLINE void fence_shared_for_copies() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

// The same for ordinary writes to global memory, this thread's or others' that it has seen.
CUFUSE_INLINE void fence_global_for_copies() { asm volatile("fence.proxy.async.global;" : : : "memory"); }

// Bits set in a word that other CTAs watch: whoever sees them sees all that this CTA wrote before (behind a barrier of its threads).
CUFUSE_INLINE void publish_bits(u64* word, u64 bits) {
    asm volatile("fence.acq_rel.gpu;\n\tred.relaxed.gpu.global.or.b64 [%0], %1;" : : "l"(word), "l"(bits) : "memory");
}

CUFUSE_INLINE u64 read_published(const u64* word) {
    u64 bits;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(bits) : "l"(word) : "memory");
    return bits;
}

// Adds one; what was there before.
CUFUSE_INLINE u64 count_published(u64* word) {
    u64 before;
    asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], 1;" : "=l"(before) : "l"(word) : "memory");
    return before;
}

CUFUSE_INLINE void fetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
}

// Barrier number `id` (1 to 15) among `threads` threads of the CTA, whole warps.
CUFUSE_INLINE void sync_threads(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

// Arrival there for threads that do not wait.
CUFUSE_INLINE void arrive_threads(u32 id, u32 threads) {
    asm volatile("bar.arrive %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

CUFUSE_INLINE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

CUFUSE_INLINE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" : : : "memory");
}

