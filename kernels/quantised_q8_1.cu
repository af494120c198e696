// llama.cpp's products with quantised weights for up to eight tokens: activations in blocks of 32 bytes, integer dot products.
//
// What is computed, and where it was read: cufuse/emulation/q8_1.py. STEP 0 quantises activations, STEP 1 multiplies.
// FORMAT: 0 Q4_0, 1 Q8_0, 2 Q4_K, 3 Q6_K. THREADS: 128 for 1 to 4 tokens, 64 for 5 to 8; they decide the order of the sum.
//
// x       [m, x_stride] float32, or bfloat16 bits if bfloat16, k values a row used
// q       [m, k] signed bytes; scales [m, k / 32] pairs d, s: float32 with the values of float16
// blocks  [n, bytes of a row], raw blocks
// out     [m, n] float32, or bfloat16 bits if out_bfloat16 (rounded once, to nearest even)
#include "bf16.cuh"

constexpr int VALUES = FORMAT >= 2 ? 256 : 32;
constexpr int SIZE = FORMAT == 0 ? 18 : FORMAT == 1 ? 34 : FORMAT == 2 ? 144 : 210;
constexpr int PER_BLOCK = FORMAT == 0 ? 2 : FORMAT == 1 ? 4 : FORMAT == 2 ? 16 : 32;  // threads that share a block
constexpr int MOST_TOKENS = 8;

struct alignas(8) Scale { float d, s; };

struct Arguments {
    const void* x;
    const unsigned char* blocks;
    signed char* q;
    Scale* scales;
    void* out;
    long long x_stride;
    int m, n, k;
    int bfloat16, out_bfloat16;
};

// float32 rounded to float16, to nearest even, as float32
CUFUSE_INLINE float round_to_half(float x) {
#ifdef __CUDA_ARCH__
    float f;
    asm("{\n\t.reg .b16 h;\n\tcvt.rn.f16.f32 h, %1;\n\tcvt.f32.f16 %0, h;\n\t}" : "=f"(f) : "f"(x));
    return f;
#else
    return (float)(_Float16)x;
#endif
}

CUFUSE_INLINE float half_at(const unsigned char* at) {
    const u32 code = at[0] | at[1] << 8;
    const u32 sign = (code & 0x8000u) << 16, exponent = code >> 10 & 31, fraction = code & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7F800000u | fraction << 13);
    if (exponent == 0) return __uint_as_float(sign | __float_as_uint((float)fraction * 5.9604644775390625e-08f));  // 2^-24
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

CUFUSE_INLINE bool is_nan(float x) { return (__float_as_uint(x) & 0x7FFFFFFFu) > FLOAT32_INFINITY; }

// The 32 values of one block.
static __device__ __forceinline__ void quantise(const Arguments& a, long long block) {
    const long long row = block / (a.k / 32);
    const int first = (int)(block % (a.k / 32)) * 32;
    float v[32], total[32];
    float amax = 0.0f;
    bool any = false;
    for (int i = 0; i < 32; ++i) {
        const long long at = row * a.x_stride + first + i;
        v[i] = a.bfloat16 ? __uint_as_float((u32)((const u16*)a.x)[at] << 16) : ((const float*)a.x)[at];
        const float magnitude = __uint_as_float(__float_as_uint(v[i]) & 0x7FFFFFFFu);
        any |= !is_nan(v[i]);
        if (magnitude > amax) amax = magnitude;  // passes over NaN
        total[i] = v[i];
    }
    if (!any) amax = __uint_as_float(0x7FFFFFFFu);
    for (int lanes = 16; lanes > 0; lanes /= 2)
        for (int i = 0; i < lanes; ++i) total[i] = total[i] + total[i + lanes];
    const float d = amax * (1.0f / 127.0f), inverse = 1.0f / d;
    for (int i = 0; i < 32; ++i) {
        const float scaled = v[i] * inverse;
        const float magnitude = __uint_as_float(__float_as_uint(scaled) & 0x7FFFFFFFu);
        int integer = 0;
        if (amax != 0.0f && magnitude < 1024.0f) {
            integer = (int)magnitude;
            integer += magnitude - (float)integer >= 0.5f;
        }
        a.q[row * a.k + first + i] = (signed char)(scaled < 0.0f ? -integer : integer);
    }
    a.scales[block] = {round_to_half(d), round_to_half(total[0])};
}

static __device__ __forceinline__ int signed_byte(const unsigned char* at) { return (int)(signed char)*at; }

// One thread's share of one block: what its accumulator becomes. q, scales: of the block's first value.
static __device__ __forceinline__ float dot(const unsigned char* block, const signed char* q, const Scale* scales, int place, float acc) {
    int total = 0;
    if (FORMAT == 0) {
        for (int i = 8 * place; i < 8 * place + 8; ++i) total += (block[2 + i] & 15) * q[i] + (block[2 + i] >> 4) * q[16 + i];
        return __fmaf_rn(half_at(block), __fmaf_rn((float)total, scales->d, -(4.0f * scales->s)), acc);
    }
    if (FORMAT == 1) {
        for (int i = 8 * place; i < 8 * place + 8; ++i) total += signed_byte(block + 2 + i) * q[i];
        return __fmaf_rn(half_at(block) * scales->d, (float)total, acc);
    }
    if (FORMAT == 2) {
        float sums_d = 0.0f, sums_m = 0.0f;
        const int first = place / 4 * 2, byte = place % 4 * 4;
        for (int half = 0; half < 2; ++half) {
            const int group = first + half;
            int dot_of = 0, sum_of = 0;
            for (int i = 0; i < 8; ++i) {
                const int at = byte + i % 4 + i / 4 * 16, value = q[32 * group + at];
                dot_of += (block[16 + 16 * first + at] >> 4 * half & 15) * value;
                sum_of += value;
            }
            const unsigned char* s = block + 4;
            const int scale = group < 4 ? s[group] & 63 : (s[group + 4] & 15) | (s[group - 4] >> 6) << 4;
            const int minimum = group < 4 ? s[group + 4] & 63 : s[group + 4] >> 4 | (s[group] >> 6) << 4;
            sums_d = __fmaf_rn(scales[group].d, (float)(dot_of * scale), sums_d);
            sums_m = __fmaf_rn(scales[group].d, (float)(sum_of * minimum), sums_m);
        }
        return acc + __fmaf_rn(half_at(block), sums_d, -(half_at(block + 2) * sums_m));
    }
    float sums = 0.0f;
    const int start = 128 * (place / 16) + 32 * (place % 16 / 8) + 4 * (place % 8);
    for (int half = 0; half < 2; ++half) {
        const int k = start + 64 * half;
        int dot_of = 0;
        for (int i = 0; i < 4; ++i) {
            const int low = block[4 * place + i] >> 4 * half & 15;
            const int high = block[128 + k / 128 * 32 + (k + i) % 32] >> k % 128 / 32 * 2 & 3;
            dot_of += ((low | high << 4) - 32) * q[k + i];
        }
        sums = __fmaf_rn(scales[k / 32].d, (float)(dot_of * signed_byte(block + 192 + k / 16)), sums);
    }
    return __fmaf_rn(half_at(block + 208), sums, acc);
}

// One row of the weight for all tokens.
static __device__ __forceinline__ void multiply(const Arguments& a, float* partial) {
    const int thread = threadIdx.x, lane = thread % 32, blocks = a.k / VALUES;
    const unsigned char* row = a.blocks + (long long)blockIdx.x * blocks * SIZE;
    float acc[MOST_TOKENS] = {};
    for (int block = thread / PER_BLOCK; block < blocks; block += THREADS / PER_BLOCK)
#pragma unroll
        for (int token = 0; token < MOST_TOKENS; ++token)
            if (token < a.m)
                acc[token] = dot(row + block * SIZE, a.q + (long long)token * a.k + block * VALUES,
                                 a.scales + (long long)token * (a.k / 32) + block * (VALUES / 32), thread % PER_BLOCK, acc[token]);
#pragma unroll
    for (int token = 0; token < MOST_TOKENS; ++token)
        if (token < a.m) partial[token * THREADS + thread] = acc[token];
    __syncthreads();
    if (thread >= 32) return;
    for (int token = 0; token < a.m; ++token) {
        float* lanes = partial + token * THREADS;
        float total = lanes[lane];
        for (int warp = 1; warp < THREADS / 32; ++warp) total = total + lanes[32 * warp + lane];
        for (int offset = 16; offset > 0; offset /= 2) {
            __syncwarp();
            lanes[lane] = total;
            __syncwarp();
            total = total + lanes[lane ^ offset];
        }
        if (lane == 0) {
            const long long at = (long long)token * a.n + blockIdx.x;
            if (is_nan(total)) total = __uint_as_float(0x7FFFFFFFu);
            if (a.out_bfloat16)
                ((u16*)a.out)[at] = round_nearest_even(__float_as_uint(total));
            else
                ((float*)a.out)[at] = total;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) quantised_q8_1(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    if (STEP == 1) {
        multiply(a, (float*)memory);
    } else {
        const long long block = blockIdx.x * (long long)THREADS + threadIdx.x;
        if (block < (long long)a.m * (a.k / 32)) quantise(a, block);
    }
}
