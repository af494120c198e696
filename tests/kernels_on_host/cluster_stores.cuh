// Stands in for kernels/cluster_stores.cuh.
#pragma once
#include "kernel.h"
inline void meet_cluster() { sync_cluster(); }
void arrive_at_cluster();
void wait_for_cluster();
inline u32 address_in(u32 shared, u32 rank) { return shared | rank << 24; }
void send_4(u32 address, u32 word, u32 barrier);
