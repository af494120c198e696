// A head of q or k on its way from the projection to its place: head norm, rotation, rounding; a warp to a head of one token.
//
//   y = x                                  HEAD_NORM 0
//       h * w, rounded to bfloat16 where ROUND_WEIGHTED       1: norm.cuh, sum of squares as sums.cuh's macros say
//   z = y rotated, rotation.cuh            ROTATE 1: ROUND_TABLES, ROUND_PRODUCTS, CONTRACT_ROTATION
//   z is rounded to bfloat16 unless OUT_FLOAT32.
//
// Every operation is float32 and rounded to nearest even; subnormals are kept (-ftz=false, -fmad=false).
//
// COLUMNS is D, a power of two; lane l holds vectors l, l + 32, ... of SUM_VECTOR elements, which are those of simulated thread l of
// the sum: GROUP 32, SUM_THREADS at most 32, whole vectors. Types: x, the norm's weight, the tables and z are float32 where
// X_FLOAT32, WEIGHT_FLOAT32, COS_FLOAT32, SIN_FLOAT32 and OUT_FLOAT32 are 1, else bfloat16.
#pragma once
#include "norm.cuh"
#include "rotation.cuh"

typedef Element<X_FLOAT32 != 0>::type HeadX;
typedef Element<WEIGHT_FLOAT32 != 0>::type HeadWeight;
typedef Element<COS_FLOAT32 != 0>::type Cos;
typedef Element<SIN_FLOAT32 != 0>::type Sin;
typedef Element<OUT_FLOAT32 != 0>::type HeadY;

constexpr int HEAD_CHUNKS = COLUMNS / SUM_VECTOR, HEAD_STEPS = (HEAD_CHUNKS + 31) / 32;
static_assert(GROUP == 32 && SUM_THREADS <= 32 && COLUMNS % SUM_VECTOR == 0, "a lane is a simulated thread");
static_assert(HEAD_STEPS == 1 || SUM_THREADS == 32, "a lane takes a second vector only where all do");
static_assert((COLUMNS & (COLUMNS - 1)) == 0 && HEAD_CHUNKS >= 2, "halves are whole vectors, a power of two of them");

// One of the rows that a head's lanes share: T elements of each of a lane's vectors.
template <class T>
struct HeadRow {
    Pack<T, SUM_VECTOR> vectors[HEAD_STEPS];

    // lanes behind the row's end hold zeros
    __device__ __forceinline__ void read(const T* row) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int i = 0; i < HEAD_STEPS; ++i) {
            vectors[i] = {};
            if (lane + 32 * i < HEAD_CHUNKS) vectors[i] = load<SUM_VECTOR>(row, lane + 32 * i);
        }
    }
    __device__ __forceinline__ void write(T* row) const {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int i = 0; i < HEAD_STEPS; ++i)
            if (lane + 32 * i < HEAD_CHUNKS) store(row, lane + 32 * i, vectors[i]);
    }
};

// Between head norm and rotation: bfloat16 where the norm rounds at its end, or where there is none and x is bfloat16.
constexpr bool MIDDLE_FLOAT32 = HEAD_NORM ? !ROUND_WEIGHTED : X_FLOAT32;
typedef Element<MIDDLE_FLOAT32>::type HeadMiddle;
// the rotation of eager PyTorch: two elements an instruction
constexpr bool ROTATION_IN_PAIRS =
    ROUND_PRODUCTS && !MIDDLE_FLOAT32 && !COS_FLOAT32 && !SIN_FLOAT32 && !OUT_FLOAT32 && SUM_VECTOR > 1;

// Sine with the sign that the other half's element gets in a rotation: negative in the first half.
__device__ __forceinline__ HeadRow<Sin> signed_sine(const HeadRow<Sin>& sin) {
    HeadRow<Sin> result;
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < HEAD_STEPS; ++i) result.vectors[i] = negated_if(lane + 32 * i < HEAD_CHUNKS / 2, sin.vectors[i]);
    return result;
}

template <class M, class C, class S, int N>
__device__ __forceinline__ Pack<HeadY, N> rotated_vector(
    const Pack<M, N>& own, const Pack<M, N>& other, const Pack<C, N>& cos, const Pack<S, N>& sin
) {
    if constexpr (ROTATION_IN_PAIRS) {
        Pack<HeadY, N> z;
#pragma unroll
        for (int j = 0; j < N / 2; ++j)
            z.pairs[j] = add_pairs(multiply_pairs(own.pairs[j], cos.pairs[j]), multiply_pairs(other.pairs[j], sin.pairs[j]));
        return z;
    } else {
        float c[N], s[N], v[N];
        read_table<ROUND_TABLES != 0>(c, cos);
        read_table<ROUND_TABLES != 0>(s, sin);
#pragma unroll
        for (int j = 0; j < N; ++j)
            v[j] = rotated<ROUND_PRODUCTS != 0, CONTRACT_ROTATION != 0>(own.at(j), other.at(j), c[j], s[j]);
        return pack(v, HeadY());
    }
}

// The whole warp calls it, with one head; sin as signed_sine gives it.
__device__ __forceinline__ HeadRow<HeadY> finish_head(
    const HeadRow<HeadX>& x, const HeadRow<HeadWeight>& weight, const HeadRow<Cos>& cos, const HeadRow<Sin>& sin,
    float mean_operand, float eps
) {
    constexpr int HALF = HEAD_CHUNKS / 2;
    HeadRow<HeadMiddle> y;
    if constexpr (HEAD_NORM) {
        const float r = reciprocal_root(sum_of_own_vectors(x.vectors, nullptr), mean_operand, eps);
#pragma unroll
        for (int i = 0; i < HEAD_STEPS; ++i) y.vectors[i] = weighted<HeadMiddle>(x.vectors[i], weight.vectors[i], r);
    } else {
#pragma unroll
        for (int i = 0; i < HEAD_STEPS; ++i) y.vectors[i] = converted<HeadMiddle>(x.vectors[i]);
    }
    HeadRow<HeadY> z;
#pragma unroll
    for (int i = 0; i < HEAD_STEPS; ++i) {
        const Pack<HeadMiddle, SUM_VECTOR> own = y.vectors[i];
        if constexpr (!ROTATE) {
            z.vectors[i] = converted<HeadY>(own);
            continue;
        }
        Pack<HeadMiddle, SUM_VECTOR> other;
        if constexpr (HALF >= 32)
            other = y.vectors[i ^ (HALF / 32)];
        else
            other = shuffle_xor(own, HALF);
        z.vectors[i] = rotated_vector(own, other, cos.vectors[i], sin.vectors[i]);
    }
    return z;
}

// Where the heads of q, k or v lie: [tokens, heads, D] with unit stride along D. Strides in elements, of heads, of tokens and
// of groups of `inner` tokens.
struct HeadArray {
    void* base;
    int head, token, group;
    int unused;
};

// A token's place in the arrays that have a row for each.
struct Token {
    int group, member;

    __device__ __forceinline__ long long place(const HeadArray& array) const {
        return (long long)group * array.group + (long long)member * array.token;
    }
};
