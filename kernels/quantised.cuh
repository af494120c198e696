// Quantised weights as fragments of the tensor core: tiles of 16 rows in the order of cufuse/quantised/tiles.py. To be included
// after mma.cuh or pipeline.cuh. FORMAT: 0 Q4_0, 1 Q8_0, 2 Q4_K, 3 Q6_K; PARTS: bfloat16 parts of an activation;
// TOKENS: 1, or a multiple of 8.
//
// Order, for an accumulator acc of one output: per group of k that shares a scale (32; Q6_K: 16), upward:
//     c = +0;  for each sixteen of the group, for each part: c += x * integer by one mma.m16n8k16;  acc = fma(scale, c, acc)
//     Q4_K: s = +0, likewise with ones for the integers;  acc = fma(-minimum, s, acc)
// Integers are exact in bfloat16, scales (float16 times a byte) in float32. Slices' accumulators are added first to last.
//
// Decoding: a code of up to seven bits under 0x4300 is the bfloat16 128 + code; one fused multiply-add takes off 128 and the
// format's offset, exactly. A signed byte b is (128 + low seven bits) - (128 + (b & 0x80)).
#pragma once

constexpr int PIECE_K = FORMAT >= 2 ? 256 : 64;
constexpr int CHUNKS = PIECE_K / 64;  // of a piece, 64 k each
constexpr u32 CODE_BYTES = FORMAT == 1 ? 1024 : FORMAT == 3 ? 768 : 512;
constexpr u32 CHUNK_BYTES = CODE_BYTES + 64;
constexpr u32 PIECE_BYTES = CHUNK_BYTES * CHUNKS + (FORMAT == 2 ? 64 : FORMAT == 3 ? 32 : 0);
constexpr int GROUP_STEPS = FORMAT == 3 ? 1 : 2;  // sixteens that share a scale
constexpr int TOKEN_STEPS = (TOKENS + 7) / 8;

struct alignas(16) Words4 { u32 w[4]; };
struct alignas(8) Words2 { u32 w[2]; };

// a * b + c of two bfloat16 at once; the host's version for what occurs here, where nothing is rounded
CUFUSE_INLINE u32 fma_bf16x2(u32 a, u32 b, u32 c) {
#ifdef __CUDA_ARCH__
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    const float low = __uint_as_float(a << 16) * __uint_as_float(b << 16) + __uint_as_float(c << 16);
    const float high = __uint_as_float(a & 0xFFFF0000u) * __uint_as_float(b & 0xFFFF0000u) + __uint_as_float(c & 0xFFFF0000u);
    return __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xFFFF0000u);
#endif
}

// float16 code in the low half -> float32, exactly
CUFUSE_INLINE float widen_half(u32 code) {
#ifdef __CUDA_ARCH__
    float f;
    asm("{\n\t.reg .b16 h;\n\tcvt.u16.u32 h, %1;\n\tcvt.f32.f16 %0, h;\n\t}" : "=f"(f) : "r"(code));
    return f;
#else
    const u32 sign = (code & 0x8000u) << 16, exponent = code >> 10 & 31, fraction = code & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7F800000u | fraction << 13);
    if (exponent == 0) return __uint_as_float(sign | __float_as_uint((float)fraction / 16777216.0f));
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
#endif
}

// integers below 2^23 under the exponent of 2^23
CUFUSE_INLINE float widen_byte(u32 byte) { return __uint_as_float(0x4B000000u | (byte & 0xFFu)) - 8388608.0f; }
CUFUSE_INLINE float widen_signed_byte(u32 byte) { return __uint_as_float(0x4B000000u | ((byte & 0xFFu) ^ 0x80u)) - 8388736.0f; }

// What one lane reads of 64 k: codes, and the scales of rows g and g + 8.
struct Chunk {
    u32 codes[CODE_BYTES / 128];
    Words2 scales;
};

static __device__ __forceinline__ Chunk load_chunk(const unsigned char* at, int lane) {
    Chunk chunk;
#pragma unroll
    for (int part = 0; part < (FORMAT == 1 ? 2 : 1); ++part) {
        const Words4 words = *(const Words4*)(at + part * 512 + lane * 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) chunk.codes[4 * part + i] = words.w[i];
    }
    if (FORMAT == 3) {
        const Words2 words = *(const Words2*)(at + 512 + lane * 8);
        chunk.codes[CODE_BYTES / 128 - 2] = words.w[0], chunk.codes[CODE_BYTES / 128 - 1] = words.w[1];
    }
    chunk.scales = *(const Words2*)(at + CODE_BYTES + lane / 4 * 8);
    return chunk;
}

// What rows g and g + 8 have once in 256 k: d, and dmin above it.
static __device__ __forceinline__ Words2 load_ends(const unsigned char* piece, int lane) {
    const unsigned char* ends = piece + CHUNK_BYTES * CHUNKS;
    if (FORMAT == 2) return *(const Words2*)(ends + lane / 4 * 8);
    if (FORMAT == 3) {
        const u32 both = *(const u32*)(ends + lane / 4 * 4);
        return {{both & 0xFFFFu, both >> 16}};
    }
    return {{0, 0}};
}

// 128 as a pair of bfloat16, unknown to the compiler and so from a register: an instruction takes one constant, and of two that are
// known one is fetched anew each time. Grids have a single layer.
static __device__ __forceinline__ u32 exponents_of_codes() {
    u32 pair = 0x43004300u | gridDim.z >> 16;
#ifdef __CUDA_ARCH__
    asm("mov.b32 %0, %0;" : "+r"(pair));
#endif
    return pair;
}

// The A fragment of sixteen k; exponents: as above.
static __device__ __forceinline__ void decode(u32 (&a)[4], const Chunk& chunk, int step, u32 exponents) {
    constexpr u32 ONE = 0x3F803F80u;
    // -136, -128, -160 as pairs of bfloat16
    constexpr u32 OFFSET = FORMAT == 0 ? 0xC308C308u : FORMAT == 2 ? 0xC300C300u : 0xC320C320u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (FORMAT == 1) {
            const u32 pair = chunk.codes[2 * step + i / 2] >> i % 2 * 8;
            a[i] = fma_bf16x2((pair & 0x00800080u) | exponents, 0xBF80BF80u, (pair & 0x007F007Fu) | exponents);
        } else {
            u32 pair = (chunk.codes[step] >> 4 * i & 0x000F000Fu) | exponents;
            if (FORMAT == 3) {
                const int place = 2 * (4 * (step % 2) + i) - 4;  // of the upper two bits, from where they belong
                const u32 high = chunk.codes[CODE_BYTES / 128 - 2 + step / 2];
                pair |= (place >= 0 ? high >> place : high << -place) & 0x00300030u;
            }
            a[i] = fma_bf16x2(pair, ONE, OFFSET);
        }
    }
}

// Scale and negated minimum of rows g (half 0) and g + 8 for a group of the chunk.
static __device__ __forceinline__ float scale_of(const Chunk& chunk, const Words2& ends, int half, int group) {
    const u32 word = chunk.scales.w[half];
    if (FORMAT == 2) return widen_half(ends.w[half] & 0xFFFFu) * widen_byte(word >> 16 * group);
    if (FORMAT == 3) return widen_half(ends.w[half]) * widen_signed_byte(word >> 8 * group);
    return widen_half(word >> 16 * group & 0xFFFFu);
}

static __device__ __forceinline__ float negated_minimum(const Chunk& chunk, const Words2& ends, int half, int group) {
    return -(widen_half(ends.w[half] >> 16) * widen_byte(chunk.scales.w[half] >> (16 * group + 8)));
}

typedef float Accumulators[TOKEN_STEPS][4];

// The B fragments of one group: sixteens of k, and their parts, for eight tokens.
struct Activations {
    u32 b[GROUP_STEPS * PARTS][2];
};

// 64 k upward for every accumulator of the warp; x(group, j) gives the group's activations for tokens 8 j to 8 j + 7.
template <class X>
static __device__ __forceinline__ void multiply_chunk(Accumulators& acc, const Chunk& chunk, const Words2& ends, const X& x) {
    constexpr int GROUPS = 4 / GROUP_STEPS;
    const u32 ones[4] = {0x3F803F80u, 0x3F803F80u, 0x3F803F80u, 0x3F803F80u};
    const u32 exponents = TOKENS < 32 ? exponents_of_codes() : 0x43004300u;  // with so many accumulators no register is left
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        u32 a[GROUP_STEPS][4];
#pragma unroll
        for (int step = 0; step < GROUP_STEPS; ++step) decode(a[step], chunk, group * GROUP_STEPS + step, exponents);
        const float scales[2] = {scale_of(chunk, ends, 0, group), scale_of(chunk, ends, 1, group)};
        const float minima[2] = {FORMAT == 2 ? negated_minimum(chunk, ends, 0, group) : 0.0f,
                                 FORMAT == 2 ? negated_minimum(chunk, ends, 1, group) : 0.0f};
#pragma unroll
        for (int j = 0; j < TOKEN_STEPS; ++j) {
            const Activations given = x(group, j);
            float c[4] = {}, s[4] = {};
#pragma unroll
            for (int i = 0; i < GROUP_STEPS * PARTS; ++i) {
                multiply_accumulate(c, a[i / PARTS], given.b[i][0], given.b[i][1]);
                if (FORMAT == 2) multiply_accumulate(s, ones, given.b[i][0], given.b[i][1]);
            }
#pragma unroll
            for (int i = 0; i < 4; i += TOKENS == 1 ? 2 : 1) {
                acc[j][i] = __fmaf_rn(scales[i / 2], c[i], acc[j][i]);
                if (FORMAT == 2) acc[j][i] = __fmaf_rn(minima[i / 2], s[i], acc[j][i]);
            }
        }
    }
}

// Where products go: out [m, n], float32 or bfloat16 bits; pairs: two neighbours may be stored at once.
struct Target {
    void* out;
    int m, n, float32, pairs;
};

// Sixteen rows of the weight from `row` on, for eight tokens from `first` on.
static __device__ __forceinline__ void store_eight(const Target& to, const float (&c)[4], int row, int first, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (to.float32) {
            const int at = row + half * 8 + g, token = first + t * 2;
            float* out = (float*)to.out + (long long)token * to.n + at;
            if (at < to.n && token < to.m) out[0] = c[half * 2];
            if (at < to.n && token + 1 < to.m) out[to.n] = c[half * 2 + 1];
        } else {
            // a lane holds one row for two tokens; transposed, two rows for one token, which are neighbours in memory
            const u32 word = transpose_matrix(pack_bf16(c[half * 2], c[half * 2 + 1]));
            const int at = row + half * 8 + t * 2, token = first + g;
            if (at >= to.n || token >= to.m) continue;
            u16* out = (u16*)to.out + (long long)token * to.n + at;
            if (to.pairs) {
                *(u32*)out = word;
            } else {
                out[0] = (u16)word;
                if (at + 1 < to.n) out[1] = (u16)(word >> 16);
            }
        }
    }
}

static __device__ __forceinline__ void store_tile(const Target& to, const Accumulators& c, int row, int first, int lane) {
#pragma unroll
    for (int j = 0; j < TOKEN_STEPS; ++j) {
        if (first + j * 8 >= to.m) break;
        store_eight(to, c[j], row, first + j * 8, lane);
    }
}

// Accumulators of one slice, into or out of shared memory: TOKEN_STEPS units of 16 bytes a lane.
static __device__ __forceinline__ void keep(float4* place, const Accumulators& c, int lane) {
#pragma unroll
    for (int j = 0; j < TOKEN_STEPS; ++j) place[j * 32 + lane] = make_float4(c[j][0], c[j][1], c[j][2], c[j][3]);
}

static __device__ __forceinline__ void add_kept(Accumulators& c, const float4* place, int lane) {
#pragma unroll
    for (int j = 0; j < TOKEN_STEPS; ++j) {
        const float4 other = place[j * 32 + lane];
        c[j][0] = __fadd_rn(c[j][0], other.x), c[j][1] = __fadd_rn(c[j][1], other.y);
        c[j][2] = __fadd_rn(c[j][2], other.z), c[j][3] = __fadd_rn(c[j][3], other.w);
    }
}
