// What the CTAs of a cluster send each other (sm_90 on).
#pragma once
#include "bf16.cuh"

// Until all threads of the cluster are here. Unlike sync_cluster it orders no writes but barriers' initialisation behind
// barrier_init_fence, and so is no fence of the whole GPU.
CUFUSE_INLINE void meet_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" : : : "memory");
}

// meet_cluster in two parts, each by all threads of the cluster: what lies between them need not wait for the other CTAs.
CUFUSE_INLINE void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" : : : "memory"); }
CUFUSE_INLINE void wait_for_cluster() { asm volatile("barrier.cluster.wait.aligned;" : : : "memory"); }

// The address in CTA `rank` of what lies at `shared` in this one.
CUFUSE_INLINE u32 address_in(u32 shared, u32 rank) {
    u32 address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
    return address;
}

// Four bytes to a place in a CTA of the cluster; its barrier, as address_in gives both, counts them as it counts a copy's.
CUFUSE_INLINE void send_4(u32 address, u32 word, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
                 : : "r"(address), "r"(word), "r"(barrier) : "memory");
}
