// linear for few rows of x (M <= TOKENS): the weight is the tensor core's M operand and is read once (sm_90 on).
//
// out[m, n] = sum over k of x[m, k] * weight[n, k], K a multiple of 64.
// Order: each output has one float32 accumulator that starts at +0 and walks k upward, one mma.m16n8k16 for each sixteen.
// With slices (slice_k < K) each slice of K has an accumulator of its own and they are added in float32, first to last:
// by one warp that walks all of K (slice_warps = 1), or by slice_warps = slices neighbouring warps, one slice each.
// Output: the sum, or the sum rounded once to bfloat16 (nearest even).
//
// A warp owns ROWS rows of the weight at a time and streams them through a ring of its own in shared memory, `depth` stages of
// STAGE_K each; it refills a stage itself as soon as it has read it. Warps share nothing but x.
//   TENSOR_COPY 1: a stage is one copy of a 3-D box of the weight seen as [K/64][N][64]: STAGE_K/64 pieces of ROWS lines of
//                  128 bytes, swizzled.
//   TENSOR_COPY 0: a stage is ROWS contiguous copies, each into a line 16 bytes longer than its content.
//   RESIDENT 1:    x lies in shared memory as a whole, M lines 16 bytes longer than K values; TOKENS is 8.
//   RESIDENT 0:    one more warp brings x, stage by stage, into a ring of x_depth stages for all warps, by boxes as above; each
//                  CTA of a cluster (CLUSTER of them) fetches its share of the pieces and sends it to all.
//
// x [M, x_stride], weight [N, weight_stride], out [M, N]: bfloat16 bits; out is float32 if out_float32
#include "pipeline.cuh"
#include "ring.cuh"

constexpr int TOKEN_STEPS = TOKENS / 8;
constexpr int PIECE = 64;  // k whose values fill a line of 128 bytes
constexpr int PIECES = STAGE_K / PIECE;
constexpr u32 ROW_PITCH = STAGE_K * 2 + 16;
constexpr u32 WEIGHT_PIECE_BYTES = ROWS * 128, X_PIECE_BYTES = TOKENS * 128;
constexpr u32 WEIGHT_STAGE_BYTES = TENSOR_COPY ? PIECES * WEIGHT_PIECE_BYTES : ROWS * ROW_PITCH;
constexpr u32 X_STAGE_BYTES = PIECES * X_PIECE_BYTES;
constexpr int MAX_X_DEPTH = 16;
static_assert(ROWS == 8 || ROWS == 16, "a tile is half or the whole of an instruction's M");
static_assert(PIECES % CLUSTER == 0, "every CTA of a cluster fetches the same number of pieces");
static_assert(!RESIDENT || (TOKENS == 8 && CLUSTER == 1), "x is resident for at most eight rows");

struct Arguments {
    int m, n, k;
    int slice_k, slice_warps;
    int warps;                    // that multiply: a multiple of slice_warps
    int rounds;                   // tiles of a warp, one after the other
    int depth, x_depth;           // stages of a warp's ring, of x's ring
    int rings_at, x_at, sums_at;  // bytes from the start of dynamic shared memory; barriers come first
    int out_float32;
    int pairs;                    // two neighbouring outputs may be stored at once
    int weights_ready;            // weights, and they alone, may be touched before the previous kernel ends
    const u16* x;
    const u16* weight;
    void* out;
    long long x_stride, weight_stride;  // in elements
    TensorMap weight_map, x_map;
};

// Addresses in a stage that do not change: where this lane's line begins, and its unit of 16 bytes at step 0.
struct Lane {
    u32 weight_line, weight_unit, x_line, x_unit;

    __device__ __forceinline__ Lane(const Arguments& a, u32 lane) {
        // matrices of the weight: rows 0-7 and 8-15 at k 0-7, then both at k 8-15; with eight rows: k 0-7, 8-15, 16-23, 24-31
        const u32 row = ROWS == 16 ? (lane & 7) + (lane & 8) : lane & 7, weight_half = ROWS == 16 ? lane >> 4 : lane >> 3;
        weight_line = row * (TENSOR_COPY ? 128 : ROW_PITCH);
        weight_unit = TENSOR_COPY ? swizzled_unit(weight_half, row) : weight_half;
        // of x: tokens 0-7 at both halves of k, then tokens 8-15; with eight tokens: four halves of two steps
        const u32 token = TOKENS == 8 ? lane & 7 : (lane & 7) + (lane >> 4) * 8, x_half = TOKENS == 8 ? lane >> 3 : (lane >> 3) & 1;
        // tokens that do not exist repeat the last: their products are never stored
        x_line = RESIDENT ? min(token, (u32)a.m - 1) * (a.k * 2 + 16) : token * 128;
        x_unit = RESIDENT ? x_half : swizzled_unit(x_half, token);
    }

    __device__ __forceinline__ u32 weight(u32 stage, int piece, int step) const {
        if (TENSOR_COPY) return stage + piece * WEIGHT_PIECE_BYTES + weight_line + (weight_unit ^ (2 * step)) * 16;
        return stage + weight_line + piece * 128 + (weight_unit + 2 * step) * 16;
    }
    // stage: of the ring, or the place of the stage's first k in the resident first row
    __device__ __forceinline__ u32 x(u32 stage, int piece, int step) const {
        if (RESIDENT) return stage + x_line + piece * 128 + (x_unit + 2 * step) * 16;
        return stage + piece * X_PIECE_BYTES + x_line + (x_unit ^ (2 * step)) * 16;
    }
};

typedef float Accumulators[TOKEN_STEPS][4];

// Four steps of sixteen k, upward, for every accumulator of the warp.
static __device__ __forceinline__ void multiply_piece(Accumulators& c, const Lane& lane, u32 weight, u32 x, int piece) {
    u32 x_pair[4], weight_pair[4];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        u32 a[4];
        if (ROWS == 16) {
            load_matrices(a, lane.weight(weight, piece, step));
        } else {
            if (step % 2 == 0) load_matrices(weight_pair, lane.weight(weight, piece, step));
            a[0] = weight_pair[step % 2 * 2], a[1] = 0, a[2] = weight_pair[step % 2 * 2 + 1], a[3] = 0;
        }
        if (TOKENS == 8) {
            if (step % 2 == 0) load_matrices(x_pair, lane.x(x, piece, step));
            multiply_accumulate(c[0], a, x_pair[step % 2 * 2], x_pair[step % 2 * 2 + 1]);
        } else {
#pragma unroll
            for (int j = 0; j < TOKEN_STEPS / 2; ++j) {
                u32 b[4];
                load_matrices(b, lane.x(x, piece, step) + j * 16 * 128);
                multiply_accumulate(c[2 * j], a, b[0], b[1]);
                multiply_accumulate(c[2 * j + 1], a, b[2], b[3]);
            }
        }
    }
}

// total = total + c and c = 0; the first slice is the total as it stands.
static __device__ __forceinline__ void end_slice(Accumulators& total, Accumulators& c, bool first) {
#pragma unroll
    for (int j = 0; j < TOKEN_STEPS; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            total[j][i] = first ? c[j][i] : __fadd_rn(total[j][i], c[j][i]);
            c[j][i] = 0.0f;
        }
}

// The slices of a tile lie in neighbouring warps: the first of them adds the others' accumulators in order.
static __device__ __forceinline__ void add_slices(Accumulators& c, float4* sums, const Arguments& a, int warp, int lane) {
    const int slice = warp % a.slice_warps;
    float4* own = sums + (warp * TOKEN_STEPS) * 32 + lane;
    if (slice > 0)
#pragma unroll
        for (int j = 0; j < TOKEN_STEPS; ++j) own[j * 32] = make_float4(c[j][0], c[j][1], c[j][2], c[j][3]);
    sync_threads(1 + warp / a.slice_warps, a.slice_warps * 32);
    if (slice == 0)
        for (int s = 1; s < a.slice_warps; ++s)
#pragma unroll
            for (int j = 0; j < TOKEN_STEPS; ++j) {
                const float4 other = own[(s * TOKEN_STEPS + j) * 32];
                c[j][0] = __fadd_rn(c[j][0], other.x), c[j][1] = __fadd_rn(c[j][1], other.y);
                c[j][2] = __fadd_rn(c[j][2], other.z), c[j][3] = __fadd_rn(c[j][3], other.w);
            }
    sync_threads(1 + warp / a.slice_warps, a.slice_warps * 32);  // the next tile's accumulators go to the same place
}

static __device__ __forceinline__ void store_tile(const Arguments& a, const Accumulators& c, int first_row, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < TOKEN_STEPS; ++j)
#pragma unroll
        for (int half = 0; half < ROWS / 8; ++half) {
            if (a.out_float32) {
                const int row = first_row + half * 8 + g, token = j * 8 + t * 2;
                float* out = (float*)a.out + (long long)token * a.n + row;
                if (row < a.n && token < a.m) out[0] = c[j][half * 2];
                if (row < a.n && token + 1 < a.m) out[a.n] = c[j][half * 2 + 1];
            } else {
                // a lane holds one row of two tokens; transposed, two rows of one token, which are neighbours in memory
                const u32 word = transpose_matrix(pack_bf16(c[j][half * 2], c[j][half * 2 + 1]));
                const int row = first_row + half * 8 + t * 2, token = j * 8 + g;
                if (row >= a.n || token >= a.m) continue;
                u16* out = (u16*)a.out + (long long)token * a.n + row;
                if (a.pairs) {
                    *(u32*)out = word;
                } else {
                    out[0] = (u16)word;
                    if (row + 1 < a.n) out[1] = (u16)(word >> 16);
                }
            }
        }
}

// One warp's weights on their way into its ring.
struct Stream {
    u32 ring, barriers;
    int tile, tile_step, tiles;   // the next tile to copy, how far the one after it is, and the first that does not exist
    int k, k_begin, k_end;        // the next k to copy

    // The next stage into `slot`, if there is one. All lanes of the warp call it, after they have read what lies there.
    __device__ __forceinline__ void copy_stage(const Arguments& a, int slot, int lane) {
        if (tile >= tiles || k_begin >= k_end) return;
        const u32 target = ring + slot * WEIGHT_STAGE_BYTES, barrier = barriers + slot * 8;
        if (TENSOR_COPY) {
            if (lane == 0) {
                barrier_arrive_expecting(barrier, WEIGHT_STAGE_BYTES);  // zeros from outside the tensor count too
                copy_box(target, &a.weight_map, 0, tile * ROWS, k / PIECE, barrier, EVICT_FIRST);
            }
        } else {
            const u32 bytes = min(STAGE_K, k_end - k) * 2;
            const int rows = min(ROWS, a.n - tile * ROWS);
            if (lane == 0) barrier_arrive_expecting(barrier, bytes * rows);
            __syncwarp();
            const u16* row = a.weight + (tile * ROWS + lane) * a.weight_stride + k;
            if (lane < rows) copy_bytes(target + lane * ROW_PITCH, row, bytes, barrier, EVICT_FIRST);
        }
        k += STAGE_K;
        if (k >= k_end) {
            k = k_begin;
            tile += tile_step;
        }
    }
};

static __device__ __forceinline__ int stages_of_a_round(const Arguments& a) {
    return ((a.slice_warps > 1 ? a.slice_k : a.k) + STAGE_K - 1) / STAGE_K;
}

// x on its way into its ring: stage after stage, for every round again, each with the slices' pieces one after the other.
struct XStream {
    u32 ring, full, empty;
    int stages, left;  // of a round; to be brought in all
    int stage;
    Place place;

    __device__ __forceinline__ XStream(const Arguments& a, u32 ring_, u32 full_, u32 empty_)
        : ring(ring_), full(full_), empty(empty_), stages(stages_of_a_round(a)), left(stages * a.rounds), stage(0),
          place({0, 1}) {}  // every slot is empty at first
    __device__ __forceinline__ void bring(const Arguments& a, int count) {
        constexpr int SHARE = PIECES / CLUSTER;
        const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
#pragma unroll 1
        for (count = min(count, left), left -= count; count > 0; --count) {
            const u32 barrier = full + place.slot * 8;
            barrier_wait(empty + place.slot * 8, place.parity);
            barrier_arrive_expecting(barrier, X_STAGE_BYTES * a.slice_warps);
            for (int slice = 0; slice < a.slice_warps; ++slice) {
                const u32 target = ring + (place.slot * a.slice_warps + slice) * X_STAGE_BYTES + rank * SHARE * X_PIECE_BYTES;
                const int piece = (slice * a.slice_k + stage * STAGE_K) / PIECE + rank * SHARE;
                if (CLUSTER > 1)
                    copy_box_to_all(target, &a.x_map, 0, 0, piece, barrier, EVICT_NORMAL, (1u << CLUSTER) - 1);
                else
                    copy_box(target, &a.x_map, 0, 0, piece, barrier, EVICT_NORMAL);
            }
            place.advance(a.x_depth);
            if (++stage == stages) stage = 0;
        }
    }
};

// A stage's pieces into the accumulators, ending slices on the way.
static __device__ __forceinline__ void multiply_stage(
    const Arguments& a, const Lane& lane, Accumulators& c, Accumulators& total, int& slice_end, u32 weight, u32 x, int k, int k_end
) {
    if (k == slice_end) {
        end_slice(total, c, slice_end == a.slice_k);
        slice_end += a.slice_k;
    }
    if (k + STAGE_K <= min(slice_end, k_end)) {
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) multiply_piece(c, lane, weight, x, piece);
        return;
    }
#pragma unroll 1
    for (int piece = 0; piece < PIECES && k + piece * PIECE < k_end; ++piece) {
        if (k + piece * PIECE == slice_end) {
            end_slice(total, c, slice_end == a.slice_k);
            slice_end += a.slice_k;
        }
        multiply_piece(c, lane, weight, x, piece);
    }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1) linear_small_m(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 shared = shared_address(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 x_full = shared, x_empty = shared + MAX_X_DEPTH * 8, ring_barriers = shared + 2 * MAX_X_DEPTH * 8;
    const bool multiplies = warp < a.warps;

    // divisions, which a short launch would wait for, only where there is something to divide
    const int group = a.slice_warps > 1 ? warp / a.slice_warps : warp, slice = a.slice_warps > 1 ? warp % a.slice_warps : 0;
    const int tiles_at_once = a.slice_warps > 1 ? a.warps / a.slice_warps : a.warps;
    const int k_begin = a.slice_warps > 1 ? slice * a.slice_k : 0;
    const int k_end = a.slice_warps > 1 ? min(a.k, k_begin + a.slice_k) : a.k;
    const int tiles = (a.n + ROWS - 1) / ROWS, tile_step = gridDim.x * tiles_at_once;
    const int first_tile = blockIdx.x * tiles_at_once + group;
    Stream stream = {shared + a.rings_at + warp * a.depth * WEIGHT_STAGE_BYTES, ring_barriers + warp * a.depth * 8,
                     first_tile, tile_step, tiles, k_begin, k_begin, k_end};
    XStream x_stream(a, shared + a.x_at, x_full, x_empty);
    const auto copy_resident_x = [&] {  // by warp 0
        if (lane == 0) barrier_arrive_expecting(x_full, a.m * a.k * 2);
        __syncwarp();
        if (lane < a.m)
            copy_bytes(shared + a.x_at + lane * (a.k * 2 + 16), a.x + lane * a.x_stride, a.k * 2, x_full, EVICT_NORMAL);
    };

    // x first, ahead of the long queue of weights, unless the kernel before this one still has to write it. A ring's barriers are
    // its warp's alone, and x's are not waited for before the CTA meets: copies need not wait either.
    if (TENSOR_COPY && threadIdx.x == 0) fetch_tensor_map(&a.weight_map);
    begin_as_dependent(a.weights_ready);
    if (multiplies) {
        if (RESIDENT && warp == 0) {
            if (lane == 0) {
                barrier_init(x_full, 1);
                barrier_init_fence();
            }
            __syncwarp();
            if (!a.weights_ready) copy_resident_x();
        }
#pragma unroll 1
        for (int slot = 0; slot < a.depth; ++slot) {
            if (lane == 0) {
                barrier_init(stream.barriers + slot * 8, 1);
                barrier_init_fence();
            }
            __syncwarp();
            stream.copy_stage(a, slot, lane);
        }
    } else if (!RESIDENT && lane == 0) {
#pragma unroll 1
        for (int slot = 0; slot < a.x_depth; ++slot) {
            barrier_init(x_full + slot * 8, 1);
            barrier_init(x_empty + slot * 8, a.warps * CLUSTER);
        }
        barrier_init_fence();
        if (CLUSTER == 1 && !a.weights_ready) x_stream.bring(a, a.x_depth);
    }
    __syncwarp();
    if (CLUSTER > 1)
        sync_cluster();
    else
        __syncthreads();
    wait_for_previous_kernel();
    if (RESIDENT && warp == 0 && a.weights_ready) copy_resident_x();

    if (!multiplies) {
        if (!RESIDENT && lane == 0) x_stream.bring(a, x_stream.left);
        __syncwarp();
    } else {
        const Lane lanes(a, lane);
        const int stages = stages_of_a_round(a);
        Place place = {0, 0}, x_place = {0, 0};
        if (RESIDENT) barrier_wait(x_full, 0);
        for (int round = 0; round < a.rounds; ++round) {
            const int tile = first_tile + round * tile_step;
            Accumulators c = {}, total = {};
            int slice_end = a.slice_warps > 1 ? a.k : a.slice_k;
            for (int stage = 0; stage < stages; ++stage) {
                const int k = k_begin + stage * STAGE_K;
                const u32 x = shared + a.x_at + (RESIDENT ? k * 2 : (x_place.slot * a.slice_warps + slice) * X_STAGE_BYTES);
                if (!RESIDENT) barrier_wait(x_full + x_place.slot * 8, x_place.parity);
                if (tile < tiles && k < k_end) {
                    barrier_wait(stream.barriers + place.slot * 8, place.parity);
                    multiply_stage(a, lanes, c, total, slice_end, stream.ring + place.slot * WEIGHT_STAGE_BYTES, x, k, k_end);
                    __syncwarp();
                    stream.copy_stage(a, place.slot, lane);
                    place.advance(a.depth);
                }
                if (!RESIDENT) {
                    __syncwarp();
                    if (lane < CLUSTER) {
                        if (CLUSTER > 1)
                            barrier_arrive_at(x_empty + x_place.slot * 8, lane);
                        else
                            barrier_arrive(x_empty + x_place.slot * 8);
                    }
                    x_place.advance(a.x_depth);
                }
            }
            if (slice_end > a.slice_k && a.slice_warps == 1) {
                end_slice(total, c, false);
                store_tile(a, total, tile * ROWS, lane);
            } else {
                if (a.slice_warps > 1) add_slices(c, (float4*)(memory + a.sums_at), a, warp, lane);
                if (slice == 0) store_tile(a, c, tile * ROWS, lane);
            }
        }
    }
    if (CLUSTER > 1) sync_cluster();  // nobody leaves while others still send to its shared memory
}
