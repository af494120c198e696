// Elements of rows in registers: bfloat16 (as its code) or float32, accesses of up to 16 bytes, rounding to bfloat16 in pairs.
#pragma once
#include "bf16.cuh"

template <bool FLOAT32> struct Element { typedef u16 type; };
template <> struct Element<true> { typedef float type; };

__device__ __forceinline__ float widen(u16 code) { return __uint_as_float((u32)code << 16); }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float low_of(u32 codes) { return __uint_as_float(codes << 16); }
__device__ __forceinline__ float high_of(u32 codes) { return __uint_as_float(codes & 0xffff0000u); }

// N elements that an access of at most 16 bytes brings, or two such; bfloat16 stays in pairs, so that registers hold two
template <class T, int N>
struct Pack;

template <int N>
struct alignas(N < 4 ? 4 * N : 16) Pack<float, N> {
    float e[N];
    __device__ __forceinline__ float at(int i) const { return e[i]; }
};

template <int N>
struct alignas(2 * N) Pack<u16, N> {
    u32 pairs[N / 2];
    __device__ __forceinline__ float at(int i) const { return i % 2 ? high_of(pairs[i / 2]) : low_of(pairs[i / 2]); }
};

template <>
struct Pack<u16, 1> {
    u16 code;
    __device__ __forceinline__ float at(int) const { return widen(code); }
};

// Pack number `index` of a row that is aligned to packs
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* row, int index) {
    return reinterpret_cast<const Pack<T, N>*>(row)[index];
}

template <int N, class T>
__device__ __forceinline__ void store(T* row, int index, const Pack<T, N>& values) {
    reinterpret_cast<Pack<T, N>*>(row)[index] = values;
}

// two floats to two bfloat16 codes, the first in the low half; NaN becomes 0x7FFF
__device__ __forceinline__ u32 round_pair(float low, float high) {
#ifdef __CUDA_ARCH__
    u32 codes;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(codes) : "f"(high), "f"(low));
    return codes;
#else
    return (u32)round_nearest_even(__float_as_uint(low)) | (u32)round_nearest_even(__float_as_uint(high)) << 16;
#endif
}

// Products and sums of two pairs of bfloat16, each rounded once to nearest even: the bits of the float32 operation rounded to
// bfloat16, for a product of two bfloat16 is exact in float32, and a sum rounded to 24 bits and then to 8 is the sum rounded to 8
// (24 >= 2 * 8 + 2). Subnormals are kept; NaN becomes 0x7FFF.
__device__ __forceinline__ u32 multiply_pairs(u32 a, u32 b) {
#ifdef __CUDA_ARCH__
    u32 codes;
    // less zero, which keeps the sign of a product that is zero
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(codes) : "r"(a), "r"(b), "r"(0x80008000u));
    return codes;
#else
    return round_pair(__fmul_rn(low_of(a), low_of(b)), __fmul_rn(high_of(a), high_of(b)));
#endif
}

__device__ __forceinline__ u32 add_pairs(u32 a, u32 b) {
#ifdef __CUDA_ARCH__
    u32 codes;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(codes) : "r"(a), "r"(0x3F803F80u), "r"(b));
    return codes;
#else
    return round_pair(__fadd_rn(low_of(a), low_of(b)), __fadd_rn(high_of(a), high_of(b)));
#endif
}

template <int N>
__device__ __forceinline__ void round_in_place(float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        const u32 codes = round_pair(v[i], N > 1 ? v[(i + 1) % N] : 0.0f);
        v[i] = low_of(codes);
        if (N > 1) v[(i + 1) % N] = high_of(codes);
    }
}

template <int N>
__device__ __forceinline__ Pack<float, N> pack(const float (&v)[N], float) {
    Pack<float, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) result.e[i] = v[i];
    return result;
}

template <int N>
__device__ __forceinline__ Pack<u16, N> pack(const float (&v)[N], u16) {
    Pack<u16, N> result;
    if constexpr (N == 1) {
        result.code = (u16)round_pair(v[0], 0.0f);
    } else {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) result.pairs[i] = round_pair(v[2 * i], v[2 * i + 1]);
    }
    return result;
}

// the same elements as another type, rounded where that is bfloat16
template <class T, class S, int N>
__device__ __forceinline__ Pack<T, N> converted(const Pack<S, N>& values) {
    float v[N];
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = values.at(i);
    return pack(v, T());
}

// elements of the lane whose number differs in these bits
template <int N>
__device__ __forceinline__ Pack<float, N> shuffle_xor(const Pack<float, N>& values, int bits) {
    Pack<float, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) result.e[i] = __shfl_xor_sync(0xffffffffu, values.e[i], bits);
    return result;
}

template <int N>
__device__ __forceinline__ Pack<u16, N> shuffle_xor(const Pack<u16, N>& values, int bits) {
    Pack<u16, N> result;
    if constexpr (N == 1) {
        result.code = (u16)__float_as_uint(__shfl_xor_sync(0xffffffffu, __uint_as_float(values.code), bits));
    } else {
#pragma unroll
        for (int i = 0; i < N / 2; ++i)
            result.pairs[i] = __float_as_uint(__shfl_xor_sync(0xffffffffu, __uint_as_float(values.pairs[i]), bits));
    }
    return result;
}

template <int N>
__device__ __forceinline__ Pack<float, N> negated_if(bool negative, const Pack<float, N>& values) {
    Pack<float, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) result.e[i] = negative ? -values.e[i] : values.e[i];
    return result;
}

template <int N>
__device__ __forceinline__ Pack<u16, N> negated_if(bool negative, const Pack<u16, N>& values) {
    Pack<u16, N> result;
    if constexpr (N == 1) {
        result.code = values.code ^ (negative ? 0x8000 : 0);
    } else {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) result.pairs[i] = values.pairs[i] ^ (negative ? 0x80008000u : 0u);
    }
    return result;
}
