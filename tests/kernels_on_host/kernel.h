// What a kernel's source sees when it runs on the CPU: the language's words, and the functions of kernels/mma.cuh, pipeline.cuh
// and wgmma.cuh, which machine.cpp carries out. The headers of those names here include this one and nothing else.
#pragma once
#include <cmath>
#include <cstring>

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n)

#include "floats.h"
#include "launches.cuh"

namespace host {

struct Index { unsigned x = 0, y = 0, z = 0; };
const Index& thread_index();
const Index& block_index();
const Index& grid_size();
const Index& block_size();
unsigned char* shared_memory();  // of this CTA

// Runs a grid, `cluster` CTAs at a time. Null, or what went wrong; a deadlock names what the first thread waits for.
const char* run_grid(void (*kernel)(const void*), const void* arguments, unsigned grid_x, unsigned grid_y, int cluster,
                     int threads, unsigned long shared_bytes, unsigned seed);

void wait_for_copies(int pending);
void wait_for_store_reads(int pending);
void wait_for_products(int pending);
void multiply_tiles(float* c, int columns, u64 a, u64 b, int accumulate);

}  // namespace host

#define threadIdx (host::thread_index())
#define blockIdx (host::block_index())
#define gridDim (host::grid_size())
#define blockDim (host::block_size())

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
template <class A, class B>
inline auto min(A a, B b) -> decltype(a + b) { return (decltype(a + b))a < (decltype(a + b))b ? a : b; }
template <class A, class B>
inline auto max(A a, B b) -> decltype(a + b) { return (decltype(a + b))a < (decltype(a + b))b ? b : a; }
float __shfl_sync(unsigned mask, float v, int lane);
float __shfl_xor_sync(unsigned mask, float v, int offset);
float __shfl_down_sync(unsigned mask, float v, int offset);
int __any_sync(unsigned mask, int predicate);
void __syncwarp();
void __syncthreads();

// mma.cuh
u32 shared_address(const void* pointer);
inline u32 swizzled_unit(u32 unit, u32 row) { return unit ^ (row & 7u); }
void load_matrices(u32 (&r)[4], u32 address);
void multiply_accumulate(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
u32 transpose_matrix(u32 r);
void copy_16_async(u32 shared, const void* global, u32 bytes);
void commit_copies();
template <int PENDING>
inline void wait_for_copies() { host::wait_for_copies(PENDING); }
void store_16(u32 shared, const u32 (&words)[4]);
inline u32 pack_bf16(float low, float high) {
    return round_nearest_even(__float_as_uint(low)) | (u32)round_nearest_even(__float_as_uint(high)) << 16;
}

// pipeline.cuh; a tensor map is words[] = {pointer, rank, 3 extents, 2 strides in bytes, 3 box extents}
struct alignas(64) TensorMap { u64 words[16]; };
#define EVICT_NORMAL 0
#define EVICT_FIRST 1
void barrier_init(u32 barrier, u32 arrivals);
inline void barrier_init_fence() {}
void barrier_arrive_expecting(u32 barrier, u32 bytes);
void barrier_arrive(u32 barrier);
void barrier_arrive_at(u32 barrier, u32 rank);
void barrier_wait(u32 barrier, u32 parity);
bool barrier_completed(u32 barrier, u32 parity);
void copy_bytes(u32 shared, const void* global, u32 bytes, u32 barrier, u64 policy);
void prefetch_box(const TensorMap* map, int c0, int c1, int c2 = 0);
void copy_box(u32 shared, const TensorMap* map, int c0, int c1, u32 barrier, u64 policy);
void copy_box(u32 shared, const TensorMap* map, int c0, int c1, int c2, u32 barrier, u64 policy);
void copy_box_to_all(u32 shared, const TensorMap* map, int c0, int c1, u32 barrier, u64 policy, u32 mask);
void copy_box_to_all(u32 shared, const TensorMap* map, int c0, int c1, int c2, u32 barrier, u64 policy, u32 mask);
void store_matrices(u32 address, u32 r0, u32 r1, u32 r2, u32 r3);
void store_box(const TensorMap* map, int c0, int c1, u32 shared);
void commit_stores();
template <int PENDING>
inline void wait_for_store_reads() { host::wait_for_store_reads(PENDING); }
inline void wait_for_stores() { host::wait_for_store_reads(0); }
inline void fence_shared_for_copies() {}
inline void fence_global_for_copies() {}
// CTAs run one after the other: what one has published the next one sees
inline void publish_bits(u64* word, u64 bits) { *word |= bits; }
inline u64 read_published(const u64* word) { return *word; }
inline u64 count_published(u64* word) { return (*word)++; }
inline void fetch_tensor_map(const TensorMap*) {}
void sync_threads(u32 id, u32 threads);
void arrive_threads(u32 id, u32 threads);
u32 cluster_rank();
void sync_cluster();

// wgmma.cuh
u64 operand_descriptor(u32 shared);
u64 row_descriptor(u32 shared);
inline void products_fence() {}
void commit_products();
template <int PENDING>
inline void wait_for_products() { host::wait_for_products(PENDING); }
template <int REGISTERS>
inline void give_registers_back() {}
template <int REGISTERS>
inline void take_registers() {}
template <int N>
inline void multiply_tiles(float (&c)[N / 2], u64 a, u64 b, int accumulate) { host::multiply_tiles(c, N, a, b, accumulate); }
