// rope: rotates the heads of q and k by the angles of their tokens, halves rotated.
//
//   c, s = cos, sin of the token           ROUND_TABLES: rounded to bfloat16 first
//   y = x rotated as rotation.cuh has it   ROUND_PRODUCTS: its products rounded; CONTRACT: its sum fused
//
// Subnormals are kept (-ftz=false, -fmad=false). y is rounded to bfloat16 unless OUT_FLOAT32. A NaN that is rounded to bfloat16
// becomes 0x7FFF.
//
// Layouts: q and q_out [tokens, heads_q, D], k and k_out [tokens, heads_k, D], cos and sin [tokens, D], D = DIMENSIONS even;
// unit stride along D; strides in elements of heads, of tokens and of groups of `inner` tokens. No output may overlap another
// array. Types: float32 where Q_FLOAT32, K_FLOAT32, COS_FLOAT32, SIN_FLOAT32, OUT_FLOAT32 are 1, else bfloat16.
// CHUNK: elements of an access: 8, 4, 2 or 1. It divides D / 2 and all strides, and every pointer is aligned to CHUNK elements
// or to 16 bytes, whichever is less.
//
// Schedule: a thread rotates CHUNK pairs of one head. `parts` blocks share a token: block b has token b / parts; together
// they have at least (heads_q + heads_k) * D / 2 / CHUNK threads. Grid: tokens * parts. Tables of a token stay in the L1 cache.
#include "rotation.cuh"

typedef Element<Q_FLOAT32 != 0>::type Q;
typedef Element<K_FLOAT32 != 0>::type K;
typedef Element<COS_FLOAT32 != 0>::type Cos;
typedef Element<SIN_FLOAT32 != 0>::type Sin;
typedef Element<OUT_FLOAT32 != 0>::type Y;

constexpr int CHUNKS = DIMENSIONS / 2 / CHUNK;  // of half a head
static_assert(DIMENSIONS % 2 == 0 && DIMENSIONS / 2 % CHUNK == 0, "CHUNK divides half a head");

struct Strides {
    long long q, k, q_out, k_out, cos, sin;
};

struct Arguments {
    const Q* q;
    const K* k;
    const Cos* cos;
    const Sin* sin;
    Y* q_out;
    Y* k_out;
    int heads_q, heads_k, inner, parts;
    Strides head, token, group;  // of heads: cos and sin unused
};

template <class T>
__device__ __forceinline__ void rotate(const T* x, Y* y, const Cos* cos, const Sin* sin, int chunk) {
    const Pack<T, CHUNK> first = load<CHUNK>(x, chunk), second = load<CHUNK>(x, chunk + CHUNKS);
    float c[2][CHUNK], s[2][CHUNK], low[CHUNK], high[CHUNK];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        read_table<ROUND_TABLES != 0>(c[half], load<CHUNK>(cos, chunk + half * CHUNKS));
        read_table<ROUND_TABLES != 0>(s[half], load<CHUNK>(sin, chunk + half * CHUNKS));
    }
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
        low[i] = rotated<ROUND_PRODUCTS != 0, CONTRACT != 0>(first.at(i), -second.at(i), c[0][i], s[0][i]);
        high[i] = rotated<ROUND_PRODUCTS != 0, CONTRACT != 0>(second.at(i), first.at(i), c[1][i], s[1][i]);
    }
    store(y, chunk, pack(low, Y()));
    store(y, chunk + CHUNKS, pack(high, Y()));
}

extern "C" __global__ void __launch_bounds__(512) rope(const __grid_constant__ Arguments a) {
    const u32 token = blockIdx.x / (u32)a.parts, part = blockIdx.x - token * (u32)a.parts;
    const int unit = part * blockDim.x + threadIdx.x;
    int head = unit / CHUNKS;
    const int chunk = unit - head * CHUNKS;
    if (head >= a.heads_q + a.heads_k) return;
    const long long group = token / (u32)a.inner, member = token - (u32)group * (u32)a.inner;
    const Cos* cos = a.cos + group * a.group.cos + member * a.token.cos;
    const Sin* sin = a.sin + group * a.group.sin + member * a.token.sin;
    if (head < a.heads_q) {
        const Q* x = a.q + group * a.group.q + member * a.token.q + head * a.head.q;
        rotate(x, a.q_out + group * a.group.q_out + member * a.token.q_out + head * a.head.q_out, cos, sin, chunk);
    } else {
        head -= a.heads_q;
        const K* x = a.k + group * a.group.k + member * a.token.k + head * a.head.k;
        rotate(x, a.k_out + group * a.group.k_out + member * a.token.k_out + head * a.head.k_out, cos, sin, chunk);
    }
}
