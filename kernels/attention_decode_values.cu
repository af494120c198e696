// attention_decode_values: softmax of one query's scores (SOFTMAX 1; 0: the weights are given) and o = w v, for grouped heads.
//
// w: exp(x - max) / sum, float32, rounded to bfloat16 once; lane i of a warp adds elements i, i + 32, ..., then lanes 16, 8, 4, 2, 1
// apart (softmax.cu, K <= 2048). o: one sum over the keys for each output, in lanes or in tensor-core blocks of 16, keys
// ascending, as the order says (lanes.cuh; no tile, no blocks of 8); rounded to bfloat16 unless OUT_FLOAT32.
//
// Layouts: w [batch, heads, 1, row]: scores, float32 where X_FLOAT32 or else bfloat16, or bfloat16 weights; v [batch, S, kv_heads, D]
// bfloat16, strides in elements, unit stride along D (a multiple of 16), aligned to 16 bytes; out [batch, 1, heads, D], contiguous.
// S is `keys`, or, where `before` is given, *before + 1; the order is `order`, or, where `orders` is given, orders[2 S + 1].
// As a dependent launch: *before, the orders and all values but those of the last key are read before the kernels in front have
// ended.
// Schedule: a block takes up to 4 heads of one key head and WIDTH (16 or 32) of D; values come through shared memory, 512 keys at a time, two
// such chunks under way. w_pitch: floats of shared memory for a row of weights (SOFTMAX 0: 520).
// Grid: batch * kv_heads * ceil(heads / kv_heads / 4), D / WIDTH.
#include "elements.cuh"
#include "exponential.cuh"
#include "lanes.cuh"
#include "launches.cuh"
#include "mma.cuh"
#include "row_sums.cuh"

typedef Element<X_FLOAT32 != 0>::type X;

constexpr int ROWS = 4, CHUNK = 512, PAIRS = WIDTH / 2, UNITS = WIDTH / 8;

struct Arguments {
    const X* w;
    const u16* v;
    void* out;
    const int* before;
    const int* orders;
    long long v_batch, v_token, v_head;
    int heads, kv_heads, keys, row, dimensions, order, w_pitch;
};

// exp(x - max) / sum of `rows` rows of scores (global) into w (shared), zeros behind the last key; a warp a row where rows are one.
__device__ __forceinline__ void softmax_rows(const X* x, long long row, float* w, int pitch, int rows, int keys, float* of_rows) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int padded = (keys + 15) / 16 * 16;
    for (int r = 0; r < rows; ++r)
#pragma unroll 4
        for (int i = thread; i < padded; i += blockDim.x) w[r * pitch + i] = i < keys ? widen(x[r * row + i]) : 0.0f;
    __syncthreads();
    float* own = w + warp * pitch;
    if (warp < rows) {
        float most = -__uint_as_float(0x7F800000u);
#pragma unroll 8
        for (int i = lane; i < keys; i += 32) most = larger(own[i], most);
        most = warp_max(most);
        if (lane == 0) of_rows[warp] = most;
    }
    __syncthreads();
    for (int r = 0; r < rows; ++r) {
        const float most = of_rows[r];
#pragma unroll 4
        for (int i = thread; i < keys; i += blockDim.x) w[r * pitch + i] = exponential(__fsub_rn(w[r * pitch + i], most));
    }
    __syncthreads();
    if (warp < rows) {
        float sum = 0.0f;
#pragma unroll 8
        for (int i = lane; i < keys; i += 32) sum = __fadd_rn(sum, own[i]);
        sum = warp_sum(sum);
        if (lane == 0) of_rows[warp] = sum;
    }
    __syncthreads();
    for (int r = 0; r < rows; ++r) {
        const float sum = of_rows[r];
#pragma unroll 4
        for (int i = thread; i < keys; i += blockDim.x) w[r * pitch + i] = low_of(round_pair(__fdiv_rn(w[r * pitch + i], sum), 0.0f));
    }
}

// What keys first ... last - 1 add to one lane's sums of two rows and two neighbouring d.
__device__ __forceinline__ void sum_terms(
    const LaneTerms& terms, int first, int last, const float* w0, const float* w1, const u16* v, float (&s)[4]
) {
    const auto add = [&](float of_w0, float of_w1, u32 of_v) {
        s[0] = __fmaf_rn(of_w0, low_of(of_v), s[0]), s[1] = __fmaf_rn(of_w0, high_of(of_v), s[1]);
        s[2] = __fmaf_rn(of_w1, low_of(of_v), s[2]), s[3] = __fmaf_rn(of_w1, high_of(of_v), s[3]);
    };
    const int end = terms.before(last);
    int n = terms.before(first);
    for (; n + 8 <= end; n += 8) {
        float of_w[2][8];
        u32 of_v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int key = terms.place(n + i) - first;
            of_w[0][i] = w0[key], of_w[1][i] = w1[key], of_v[i] = *(const u32*)(v + key * WIDTH);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) add(of_w[0][i], of_w[1][i], of_v[i]);
    }
    for (; n < end; ++n) {
        const int key = terms.place(n) - first;
        add(w0[key], w1[key], *(const u32*)(v + key * WIDTH));
    }
}

// Two bfloat16 values that are held as float32.
__device__ __forceinline__ u32 pair(const float* at) { return __float_as_uint(at[0]) >> 16 | (__float_as_uint(at[1]) & 0xFFFF0000u); }

__device__ __forceinline__ void store_one(void* out, long long at, float v) {
#if OUT_FLOAT32
    ((float*)out)[at] = v;
#else
    ((u16*)out)[at] = (u16)round_pair(v, 0.0f);
#endif
}

extern "C" __global__ void __launch_bounds__(256, 3) attention_decode_values(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    const int group = a.heads / a.kv_heads, tiles = (group + ROWS - 1) / ROWS;
    const int tile = blockIdx.x % tiles, kv = blockIdx.x / tiles % a.kv_heads, entry = blockIdx.x / tiles / a.kv_heads;
    const int rows = group - tile * ROWS < ROWS ? group - tile * ROWS : ROWS;
    const long long first_head = entry * (long long)a.heads + kv * group + tile * ROWS;
    u16* ring = (u16*)memory;  // two chunks of [CHUNK][WIDTH]
    float* w = (float*)(ring + 2 * CHUNK * WIDTH);
    float* of_rows = w + rows * a.w_pitch;
    float* sums = of_rows + ROWS;
    const int columns = rows * WIDTH, pitch = columns + 1;
    const u16* v = a.v + entry * a.v_batch + kv * a.v_head + blockIdx.y * WIDTH;
    const X* x = a.w + first_head * a.row;

    let_next_kernel_begin();
    const int keys = a.before ? *a.before + 1 : a.keys;
    const Order order(a.orders ? a.orders[2 * keys + 1] : a.order);
    const u32 ring_at = shared_address(ring);
    const auto copy = [&](int from, int to) {  // values of these keys, zeros for those that do not exist
        for (int i = from * UNITS + thread; i < to * UNITS; i += blockDim.x) {
            const int key = i / UNITS, there = key < keys;
            copy_16_async(ring_at + i % (2 * CHUNK * UNITS) * 16, v + (there ? key : 0) * a.v_token + i % UNITS * 8, there ? 16 : 0);
        }
    };
    const auto chunk_end = [&](int start) { return start + CHUNK < keys ? start + CHUNK : (keys + 15) / 16 * 16; };
    const int last = keys - 1, ahead = chunk_end(keys > CHUNK ? CHUNK : 0);  // both chunks
    copy(0, ahead < last ? ahead : last);
    wait_for_previous_kernel();
    if (last < ahead) copy(last, ahead);
    commit_copies();
    if (SOFTMAX) softmax_rows(x, a.row, w, a.w_pitch, rows, keys, of_rows);

    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int start = 0; start < keys; start += CHUNK) {
        const int end = start + CHUNK < keys ? start + CHUNK : keys, padded = chunk_end(start);
        if (start >= CHUNK && start + CHUNK < keys) copy(start + CHUNK, chunk_end(start + CHUNK));
        commit_copies();
        wait_for_copies<1>();  // all but those of the next chunk
        if (!SOFTMAX)
            for (int r = 0; r < rows; ++r)
#pragma unroll 4
                for (int i = start + thread; i < padded; i += blockDim.x)
                    w[r * a.w_pitch + i - start] = i < keys ? widen(x[r * a.row + i]) : 0.0f;
        __syncthreads();
        const float* weights = w + (SOFTMAX ? start : 0);
        const u16* values = ring + start / CHUNK % 2 * CHUNK * WIDTH;
        if (order.lanes) {
            for (int i = thread; i < PAIRS * order.lanes; i += blockDim.x) {
                const int of = i / PAIRS, d = i % PAIRS * 2;
                const LaneTerms terms(order, of, keys);
                for (int r = 0; r < rows; r += 2) {
                    float* to = sums + of * pitch + r * WIDTH + d;
                    const bool both = r + 1 < rows;
                    float s[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                    if (start > 0) {
                        s[0] = to[0], s[1] = to[1];
                        if (both) s[2] = to[WIDTH], s[3] = to[WIDTH + 1];
                    }
                    const float* w0 = weights + r * a.w_pitch;
                    sum_terms(terms, start, end, w0, both ? w0 + a.w_pitch : w0, values + d, s);
                    to[0] = s[0], to[1] = s[1];
                    if (both) to[WIDTH] = s[2], to[WIDTH + 1] = s[3];
                }
            }
        } else if (warp < WIDTH / 8) {
            const float* of_row = weights + g * a.w_pitch + 2 * t;
            const u16* of_key = values + 2 * t * WIDTH + warp * 8 + g;
#pragma unroll 4
            for (int key = 0; key < padded - start; key += 16) {
                const u32 of_w[4] = {g < rows ? pair(of_row + key) : 0u, 0u, g < rows ? pair(of_row + key + 8) : 0u, 0u};
                u32 of_v[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const u16* at = of_key + (key + 8 * half) * WIDTH;
                    of_v[half] = (u32)at[0] | (u32)at[WIDTH] << 16;
                }
                multiply_accumulate(c, of_w, of_v[0], of_v[1]);
            }
        }
        __syncthreads();  // the chunk has been read
    }
    if (order.lanes) {
        add_lanes(order, sums, columns, pitch);
        for (int i = thread; i < columns; i += blockDim.x)
            store_one(a.out, (first_head + i / WIDTH) * a.dimensions + blockIdx.y * WIDTH + i % WIDTH, sums[i]);
    } else if (warp < WIDTH / 8 && g < rows) {
        for (int i = 0; i < 2; ++i)
            store_one(a.out, (first_head + g) * a.dimensions + blockIdx.y * WIDTH + warp * 8 + 2 * t + i, c[i]);
    }
}
