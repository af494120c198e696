// Sum of squares of a row, float32, added in the order of another project's kernel, by a group of GROUP threads.
//
// An order is a kernel imitated: T simulated threads share a row, thread t takes vectors t, t + T, t + 2T, ... of V elements,
// and the threads' sums are joined by a tree over lines of W threads. Which physical thread does an addition is free, which
// two numbers it adds is not: idle threads hold +0, and v + 0 == v for every sum of squares, so padding changes no bit.
//
//   SUM_THREADS   T
//   SUM_WIDTH     W, simulated threads of a line; ceil(T / W) lines. A multiple of 32, or T where that is below 32 (with
//                 CHAIN_ONE and CHAIN_PAIRS always 32)
//   SUM_VECTOR    V: 1, 2, 4 or 8
//   SUM_CHAINS    CHAIN_ONE          one accumulator, a vector's elements in order
//                 CHAIN_PAIRS        the same, but the squares of a vector are added first: in pairs, and these in order
//                 CHAIN_BY_POSITION  V accumulators by the position in the vector, joined ((a0 + a1) + a2) + a3; V = 4
//                 CHAIN_BY_STEP      four accumulators by the number of the step modulo 4, joined alike; V = 1
//                 CHAIN_MOMENTS      no sum: mean, squared deviations and count of 512 threads, Welford's; T, W, V unused
//   SUM_EDGES     1: ATen's vectors start on 16-byte boundaries of its float32 copy. Elements before the first boundary go to
//                 accumulator 0 of threads misplaced ... 3, before all else; elements behind the last whole vector go to
//                 accumulator 0 of threads 0, 1, 2, after all else. Only with CHAIN_BY_POSITION
//   SUM_TREE      TREE_HALVE        a line: thread i += i + W/2, W/4, ..., 1; then the lines alike (their number filled up with
//                                   zeros to a power of two)
//                 TREE_LINES_FIRST  lines halved first, then W halved down to 32, then thread i += i + 1, 2, 4, 8, 16
//                 TREE_PAIRS        a line of 32: thread i += i + 1, 2, 4, 8, 16; then the lines one after the other
//   CONTRACT      1: accumulator + x * x is one fused multiply-add; 0: the square is rounded first
//   GROUP         physical threads of a row, a multiple of 32; threadIdx.x counts them. More than 32: one row a block
//   COLUMNS       K
//   SUM_BARRIER   a barrier of the group where it is more than a warp: __syncthreads, unless defined
//
// cufuse/emulation/sums_kernel.py has these macros for each named order; cufuse/emulation/sums.py says where each comes from.
#pragma once
#include "elements.cuh"

#ifndef SUM_BARRIER
#define SUM_BARRIER __syncthreads
#endif

#define CHAIN_ONE 0
#define CHAIN_PAIRS 1
#define CHAIN_BY_POSITION 2
#define CHAIN_BY_STEP 3
#define CHAIN_MOMENTS 4
#define TREE_HALVE 0
#define TREE_LINES_FIRST 1
#define TREE_PAIRS 2

constexpr int SUM_LINES = (SUM_THREADS + SUM_WIDTH - 1) / SUM_WIDTH;
// values of a line that one lane of a warp looks after
constexpr int SUM_REGISTERS = SUM_WIDTH < 32 ? 1 : SUM_WIDTH / 32;
// floats of shared memory: the simulated threads' sums, where their line is not a warp's registers, and the lines' sums
constexpr bool SUM_ONE_CHAIN = SUM_CHAINS == CHAIN_ONE || SUM_CHAINS == CHAIN_PAIRS;
constexpr int SUM_PARTIALS = SUM_CHAINS == CHAIN_MOMENTS || SUM_ONE_CHAIN ? 0 : (SUM_THREADS + 31) / 32 * 32;
constexpr int SUM_SCRATCH = SUM_PARTIALS + (SUM_CHAINS == CHAIN_MOMENTS ? 48 : 32);

static_assert(GROUP % 32 == 0, "a group is whole warps");
static_assert(SUM_WIDTH % 32 == 0 || (SUM_WIDTH == SUM_THREADS && SUM_THREADS < 32), "lines are whole warps, or one short one");
static_assert(SUM_LINES <= 32, "one lane a line");
static_assert(!SUM_ONE_CHAIN || (SUM_WIDTH == 32 && SUM_TREE != TREE_LINES_FIRST), "one chain: a line is a warp");
static_assert(SUM_TREE != TREE_PAIRS || SUM_WIDTH == 32, "pairs are taken inside a warp");
static_assert(SUM_CHAINS != CHAIN_BY_POSITION || SUM_VECTOR == 4, "four accumulators by position");
static_assert(SUM_CHAINS != CHAIN_BY_STEP || (SUM_VECTOR == 1 && SUM_LINES == 1), "four accumulators by step");
static_assert(!SUM_EDGES || SUM_CHAINS == CHAIN_BY_POSITION, "edges belong to ATen's vectors");

// s + x * x, in one rounding or in two whatever flags the compiler is given
__device__ __forceinline__ float add_square(float s, float x) {
    return CONTRACT ? __fmaf_rn(x, x, s) : __fadd_rn(s, __fmul_rn(x, x));
}

__device__ __forceinline__ float in_order(float a0, float a1, float a2, float a3) {
    return __fadd_rn(__fadd_rn(__fadd_rn(a0, a1), a2), a3);
}

// one simulated thread takes one more vector
template <class T, int V>
__device__ __forceinline__ void take(float (&chains)[4], const Pack<T, V>& vector) {
    if constexpr (SUM_CHAINS == CHAIN_PAIRS) {
        static_assert(V == 8, "four pairs");
        float pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float odd = vector.at(2 * i + 1);
            pairs[i] = add_square(__fmul_rn(odd, odd), vector.at(2 * i));
        }
        chains[0] = __fadd_rn(chains[0], in_order(pairs[0], pairs[1], pairs[2], pairs[3]));
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) {
            float& chain = chains[SUM_CHAINS == CHAIN_BY_POSITION ? i % 4 : 0];
            chain = add_square(chain, vector.at(i));
        }
    }
}

__device__ __forceinline__ float join(const float (&chains)[4]) {
    const bool four = SUM_CHAINS == CHAIN_BY_POSITION || SUM_CHAINS == CHAIN_BY_STEP;
    return four ? in_order(chains[0], chains[1], chains[2], chains[3]) : chains[0];
}

// a warp's tree; xor shuffles pair what shuffles down pair for lane 0, and every lane ends with lane 0's bits
// of several sums, whose shuffles do not wait for each other
template <int N>
__device__ __forceinline__ void halve_lanes(float (&v)[N]) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = __fadd_rn(v[i], __shfl_xor_sync(0xffffffffu, v[i], offset));
    }
}

__device__ __forceinline__ float halve_lanes(float v) {
    float sums[1] = {v};
    halve_lanes(sums);
    return sums[0];
}

__device__ __forceinline__ float pair_lanes(float v) {
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) v = __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, offset));
    return v;
}

template <int N>
__device__ __forceinline__ float halve_registers(const float (&v)[N]) {
    if constexpr (N == 1) {
        return v[0];
    } else {
        float half[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) half[i] = __fadd_rn(v[i], v[i + N / 2]);
        return halve_registers(half);
    }
}

// simulated thread 32 i + lane of a line in shared memory
__device__ __forceinline__ float lane_of_line(const float* partials, int i) {
    const int lane = threadIdx.x & 31;
    return SUM_WIDTH >= 32 || lane < SUM_WIDTH ? partials[32 * i + lane] : 0.0f;
}

// a line of W simulated threads in shared memory, down to 32 lanes of a warp
__device__ __forceinline__ float halve_line_to_lanes(const float* partials) {
    float v[SUM_REGISTERS];
#pragma unroll
    for (int i = 0; i < SUM_REGISTERS; ++i) v[i] = lane_of_line(partials, i);
    return halve_registers(v);
}

// the lines' sums, complete in shared memory, to the row's: every thread computes and returns it
__device__ __forceinline__ float join_lines(const float* lines) {
    float total = lines[0];
    if constexpr (SUM_LINES > 1 && SUM_TREE == TREE_PAIRS) {
#pragma unroll
        for (int i = 1; i < SUM_LINES; ++i) total = __fadd_rn(total, lines[i]);
    } else if constexpr (SUM_LINES > 1) {
        const int lane = threadIdx.x & 31;
        total = halve_lanes(lane < SUM_LINES ? lines[lane] : 0.0f);
    }
    return total;
}

// the simulated threads' sums, complete in shared memory behind a barrier, to the row's: every thread returns it
__device__ __forceinline__ float join_partials(const float* partials, float* lines) {
    if constexpr (SUM_TREE == TREE_LINES_FIRST) {
        float v[SUM_REGISTERS], column[SUM_LINES];
#pragma unroll
        for (int i = 0; i < SUM_REGISTERS; ++i) {
#pragma unroll
            for (int y = 0; y < SUM_LINES; ++y) column[y] = lane_of_line(partials + y * SUM_WIDTH, i);
            v[i] = halve_registers(column);
        }
        return pair_lanes(halve_registers(v));
    } else if constexpr (SUM_LINES == 1) {
        return halve_lanes(halve_line_to_lanes(partials));
    } else {
        for (int line = threadIdx.x / 32; line < SUM_LINES; line += GROUP / 32) {
            const float v = halve_lanes(halve_line_to_lanes(partials + line * SUM_WIDTH));
            if ((threadIdx.x & 31) == 0) lines[line] = v;
        }
        SUM_BARRIER();
        return join_lines(lines);
    }
}

// sums of the physical threads, each of which was one simulated thread (GROUP == T), to the row's: every thread returns it
__device__ __forceinline__ float join_threads(float v, float* scratch) {
    if constexpr (SUM_THREADS <= 32) {
        return SUM_TREE == TREE_HALVE ? halve_lanes(v) : pair_lanes(v);
    } else if constexpr (SUM_WIDTH == 32 && SUM_TREE != TREE_LINES_FIRST) {
        v = SUM_TREE == TREE_PAIRS ? pair_lanes(v) : halve_lanes(v);
        if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / 32] = v;
        SUM_BARRIER();
        return join_lines(scratch);
    } else {
        scratch[threadIdx.x] = v;
        SUM_BARRIER();
        return join_partials(scratch, scratch + SUM_PARTIALS);
    }
}

// Row's sum where each physical thread holds the vectors of one simulated thread: vector i is t + T * i, zeros where there is
// none; GROUP is T rounded up to 32. scratch: SUM_SCRATCH floats of shared memory, unused where T <= 32.
template <class T, int V, int N>
__device__ __forceinline__ float sum_of_own_vectors(const Pack<T, V> (&vectors)[N], float* scratch) {
    float chains[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < N; ++i) take(chains, vectors[i]);
    return join_threads(join(chains), scratch);
}

__device__ constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }

// Row's sum by one warp without shared memory, whatever GROUP is: its lanes take whole vectors lane, lane + 32, ... in this order.
// T is a multiple of 32, or no less than the number of vectors; no SUM_EDGES; CHAIN_ONE, _PAIRS or _BY_POSITION.
struct SumByWarp {
    static constexpr int SETS = SUM_LINES * SUM_REGISTERS;  // simulated threads of a lane: lane, lane + 32, ...
    float chains[SETS][4] = {};

    template <class T, int V>
    __device__ __forceinline__ void add(const Pack<T, V>& vector, int step) {
        static_assert(V == SUM_VECTOR && !SUM_EDGES && (SUM_ONE_CHAIN || SUM_CHAINS == CHAIN_BY_POSITION), "whole vectors");
        static_assert(SUM_THREADS % 32 == 0 || COLUMNS <= SUM_THREADS * V, "lanes take what simulated threads take");
        take(chains[step % SETS], vector);
    }
    // every lane returns it
    __device__ __forceinline__ float total() const {
        float v[SUM_REGISTERS];
        if constexpr (SUM_TREE == TREE_LINES_FIRST) {
            float column[SUM_LINES];
#pragma unroll
            for (int i = 0; i < SUM_REGISTERS; ++i) {
#pragma unroll
                for (int y = 0; y < SUM_LINES; ++y) column[y] = join(chains[y * SUM_REGISTERS + i]);
                v[i] = halve_registers(column);
            }
            return pair_lanes(halve_registers(v));
        } else {
            float lines[power_of_two_from(SUM_LINES)] = {};
#pragma unroll
            for (int y = 0; y < SUM_LINES; ++y) {
#pragma unroll
                for (int i = 0; i < SUM_REGISTERS; ++i) v[i] = join(chains[y * SUM_REGISTERS + i]);
                lines[y] = SUM_TREE == TREE_PAIRS ? pair_lanes(halve_registers(v)) : halve_lanes(halve_registers(v));
            }
            if constexpr (SUM_TREE == TREE_PAIRS) {
                float total = lines[0];
#pragma unroll
                for (int y = 1; y < SUM_LINES; ++y) total = __fadd_rn(total, lines[y]);
                return total;
            } else {
                return halve_registers(lines);
            }
        }
    }
};

// one accumulator of a simulated thread with four by position, from the row in shared memory
template <class T>
__device__ __forceinline__ float chain_by_position(const T* row, int unit, int misplaced) {
    const int t = unit / 4;
    const int head = SUM_EDGES ? (4 - misplaced) & 3 : 0;
    const int end = SUM_EDGES ? head + (COLUMNS - head) / 4 * 4 : COLUMNS;
    const bool first = (unit & 3) == 0;
    float s = 0.0f;
    if (SUM_EDGES && first && head > 0 && t >= misplaced && t < 4) s = add_square(s, widen(row[t - misplaced]));
#pragma unroll 8
    for (int k = head + unit; k < end; k += 4 * SUM_THREADS) s = add_square(s, widen(row[k]));
    if (SUM_EDGES && first && end + t < COLUMNS) s = add_square(s, widen(row[end + t]));
    return s;
}

// Row's sum from the row in shared memory, complete behind a barrier. misplaced: where SUM_EDGES, (row * K) % 4.
template <class T>
__device__ __forceinline__ float sum_of_row(const T* row, int misplaced, float* scratch) {
    float* lines = scratch + SUM_PARTIALS;
    if constexpr (SUM_ONE_CHAIN) {
        const int lane = threadIdx.x & 31;
        const auto* vectors = reinterpret_cast<const Pack<T, SUM_VECTOR>*>(row);
        for (int t = threadIdx.x; t < SUM_LINES * 32; t += GROUP) {
            float chains[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (t < SUM_THREADS) {
#pragma unroll 4
                for (int i = t; i < COLUMNS / SUM_VECTOR; i += SUM_THREADS) take(chains, vectors[i]);
            }
            const float v = SUM_TREE == TREE_PAIRS ? pair_lanes(chains[0]) : halve_lanes(chains[0]);
            if (lane == 0) lines[t / 32] = v;
        }
        SUM_BARRIER();
        return join_lines(lines);
    } else if constexpr (SUM_CHAINS == CHAIN_BY_POSITION) {
        // four neighbouring lanes are the four accumulators of a simulated thread
        for (int unit = threadIdx.x; unit < (4 * SUM_THREADS + 31) / 32 * 32; unit += GROUP) {
            const float s = unit < 4 * SUM_THREADS ? chain_by_position(row, unit, misplaced) : 0.0f;
            float a[3];
#pragma unroll
            for (int i = 0; i < 3; ++i) a[i] = __shfl_down_sync(0xffffffffu, s, i + 1);
            if ((unit & 3) == 0 && unit < 4 * SUM_THREADS) scratch[unit / 4] = in_order(s, a[0], a[1], a[2]);
        }
        SUM_BARRIER();
        return join_partials(scratch, lines);
    } else {
        for (int t = threadIdx.x; t < SUM_THREADS; t += GROUP) {
            float chains[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            int step = 0;
            for (int k = t; k < COLUMNS; k += SUM_THREADS, step = (step + 1) & 3) {
                const float x = widen(row[k]);
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (i == step) chains[i] = add_square(chains[i], x);
            }
            scratch[t] = join(chains);
        }
        SUM_BARRIER();
        return join_partials(scratch, lines);
    }
}

struct Moments {
    float mean, m2, count;
};

__device__ __forceinline__ float multiply_add(float a, float b, float c) {
    return CONTRACT ? __fmaf_rn(a, b, c) : __fadd_rn(c, __fmul_rn(a, b));
}

__device__ __forceinline__ Moments combine(Moments a, Moments b) {
    if (a.count == 0.0f) return b;
    if (b.count == 0.0f) return a;
    const float delta = __fsub_rn(b.mean, a.mean), count = __fadd_rn(a.count, b.count);
    const float share = __fdiv_rn(b.count, count);
    const float weighted = __fmul_rn(__fmul_rn(delta, delta), a.count);
    return {multiply_add(delta, share, a.mean), multiply_add(weighted, share, __fadd_rn(a.m2, b.m2)), count};
}

__device__ __forceinline__ Moments combine_lanes(Moments v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1)
        v = combine(v, {__shfl_down_sync(0xffffffffu, v.mean, offset), __shfl_down_sync(0xffffffffu, v.m2, offset),
                        __shfl_down_sync(0xffffffffu, v.count, offset)});
    return v;
}

// Row's mean of squares as variance + mean * mean, from the row in shared memory: what F.rms_norm does where 4 does not
// divide K. 512 simulated threads, elements t, t + 512, ...; 16 warps of them, then the warps, by shuffles down 16 ... 1.
template <class T>
__device__ __forceinline__ float mean_of_squares_by_moments(const T* row, float* scratch) {
    const int lane = threadIdx.x & 31;
    for (int t = threadIdx.x; t < 512; t += GROUP) {
        Moments v = {0.0f, 0.0f, 0.0f};
        for (int k = t; k < COLUMNS; k += 512) {
            const float x = widen(row[k]), delta = __fsub_rn(x, v.mean);
            v.count = __fadd_rn(v.count, 1.0f);
            v.mean = __fadd_rn(v.mean, __fdiv_rn(delta, v.count));
            v.m2 = multiply_add(delta, __fsub_rn(x, v.mean), v.m2);
        }
        v = combine_lanes(v);
        if (lane == 0) {
            scratch[t / 32] = v.mean;
            scratch[16 + t / 32] = v.m2;
            scratch[32 + t / 32] = v.count;
        }
    }
    SUM_BARRIER();
    Moments v = {0.0f, 0.0f, 0.0f};
    if (lane < 16) v = {scratch[lane], scratch[16 + lane], scratch[32 + lane]};
    v = combine_lanes(v);
    const float mean = __shfl_sync(0xffffffffu, v.mean, 0), m2 = __shfl_sync(0xffffffffu, v.m2, 0);
    return multiply_add(mean, mean, __fdiv_rn(m2, __shfl_sync(0xffffffffu, v.count, 0)));
}
