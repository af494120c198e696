// What the CTAs of a cluster send each other (sm_90 on).
#pragma once
#include "bf16.cuh"

// 16 bytes to the place in CTA `rank` that has the address `shared` in this one; seen there behind sync_cluster.
CUFUSE_INLINE void store_16_at(u32 shared, u32 rank, const float (&v)[4]) {
    asm volatile("{\n\t.reg .b32 place;\n\tmapa.shared::cluster.u32 place, %0, %1;\n\t"
                 "st.shared::cluster.v4.f32 [place], {%2, %3, %4, %5};\n\t}"
                 : : "r"(shared), "r"(rank), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}

// Until all threads of the cluster are here. Unlike sync_cluster it orders no writes but barriers' initialisation behind
// barrier_init_fence, and so is no fence of the whole GPU.
CUFUSE_INLINE void meet_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" : : : "memory");
}
