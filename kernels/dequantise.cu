// dequantise: the values of raw blocks (FORMAT: 0 Q4_0, 1 Q8_0, 2 Q4_K, 3 Q6_K; layouts: cufuse/quantised/formats.py).
//
// w = scale * integer, or scale * integer - minimum, each operation rounded to float32; as bfloat16 rounded once more, to nearest
// even. A NaN in float32 has the bits that x86 gives: those of the scale, quiet; 0xFFC00000 where an operation makes it.
//
// blocks  [count of blocks, SIZE] bytes
// out     [count of blocks * VALUES] float32, or bfloat16 bits if bfloat16
// A thread takes eight values in a row. 1-D grid, grid-stride loop.
#include "bf16.cuh"

constexpr int VALUES = FORMAT >= 2 ? 256 : 32;
constexpr int SIZE = FORMAT == 0 ? 18 : FORMAT == 1 ? 34 : FORMAT == 2 ? 144 : 210;

struct Arguments {
    const unsigned char* blocks;
    void* out;
    long long eights;
    int bfloat16;
};

struct alignas(16) Four { u32 words[4]; };

static __device__ __forceinline__ float half_at(const unsigned char* at) {
    const u32 code = at[0] | at[1] << 8;
    const u32 sign = (code & 0x8000u) << 16, exponent = code >> 10 & 31, fraction = code & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7F800000u | (fraction ? 0x400000u : 0) | fraction << 13);
    if (exponent == 0) return __uint_as_float(sign | __float_as_uint((float)fraction * 5.9604644775390625e-08f));  // 2^-24
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

static __device__ __forceinline__ bool is_nan(float x) { return (__float_as_uint(x) & 0x7FFFFFFFu) > FLOAT32_INFINITY; }

// a * b and a - b; a NaN operand comes through (b of a product is none), a new one is x86's
static __device__ __forceinline__ float times(float a, float b) {
    if (is_nan(a)) return a;
    const float product = a * b;
    return is_nan(product) ? __uint_as_float(0xFFC00000u) : product;
}
static __device__ __forceinline__ float minus(float a, float b) {
    if (is_nan(a)) return a;
    if (is_nan(b)) return b;
    const float difference = a - b;
    return is_nan(difference) ? __uint_as_float(0xFFC00000u) : difference;
}

// Scale and minimum number `group` of a Q4_K block's twelve bytes.
static __device__ __forceinline__ void six_bits(const unsigned char* packed, int group, int& scale, int& minimum) {
    if (group < 4) {
        scale = packed[group] & 63, minimum = packed[group + 4] & 63;
    } else {
        scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6) << 4;
        minimum = packed[group + 4] >> 4 | (packed[group] >> 6) << 4;
    }
}

static __device__ __forceinline__ void decode(const unsigned char* block, int k, float (&w)[8]) {
    float scale = half_at(block + (FORMAT == 3 ? 208 : 0)), minimum = 0.0f;
    const unsigned char* codes = block;
    int shift = 0, high_shift = 0;
    if (FORMAT == 0) codes += 2 + k % 16, shift = k / 16 * 4;
    if (FORMAT == 1) codes += 2 + k;
    if (FORMAT == 2) {
        codes += 16 + k / 64 * 32 + k % 32, shift = k % 64 / 32 * 4;
        int s, m;
        six_bits(block + 4, k / 32, s, m);
        scale = times(scale, (float)s), minimum = times(half_at(block + 2), (float)m);
    }
    const unsigned char* high = block + 128 + k / 128 * 32 + k % 32;
    if (FORMAT == 3) {
        codes += k / 128 * 64 + k % 64, shift = k % 128 / 64 * 4, high_shift = k % 128 / 32 * 2;
        scale = times(scale, (float)(signed char)block[192 + k / 16]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        int code = FORMAT == 1 ? (int)(signed char)codes[i] : codes[i] >> shift & 15;
        if (FORMAT == 0) code -= 8;
        if (FORMAT == 3) code = (code | (high[i] >> high_shift & 3) << 4) - 32;
        w[i] = times(scale, (float)code);
        if (FORMAT == 2) w[i] = minus(w[i], minimum);
    }
}

extern "C" __global__ void __launch_bounds__(256) dequantise(const __grid_constant__ Arguments a) {
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < a.eights; i += gridDim.x * 256ll) {
        float w[8];
        decode(a.blocks + i / (VALUES / 8) * SIZE, (int)(i % (VALUES / 8)) * 8, w);
        Four out[2];
        if (a.bfloat16) {
#pragma unroll
            for (int pair = 0; pair < 4; ++pair)
                out[0].words[pair] = (u32)round_nearest_even(__float_as_uint(w[2 * pair])) |
                                     (u32)round_nearest_even(__float_as_uint(w[2 * pair + 1])) << 16;
            ((Four*)a.out)[i] = out[0];
        } else {
#pragma unroll
            for (int value = 0; value < 8; ++value) out[value / 4].words[value % 4] = __float_as_uint(w[value]);
            ((Four*)a.out)[2 * i] = out[0];
            ((Four*)a.out)[2 * i + 1] = out[1];
        }
    }
}
