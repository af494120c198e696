// The sum that a row is normalised after: z = x, or x + residual with the new residual stored on the way.
//
//   RESIDUAL 0      z = x
//            1      z = bf16(x + residual), stored to total as bfloat16
//            2, 3   z = x + residual; total = bf16(z), or z as float32
//
// Types: x and residual float32 where X_FLOAT32, RESIDUAL_FLOAT32 are 1, else bfloat16.
#pragma once
#include "elements.cuh"

typedef Element<X_FLOAT32 != 0>::type X;
typedef Element<RESIDUAL_FLOAT32 != 0>::type R;
typedef Element<RESIDUAL == 3>::type Total;
typedef Element<RESIDUAL == 0 ? X_FLOAT32 != 0 : RESIDUAL != 1>::type Z;

// z of pack number `index` of a row. total may be null: another block stores it.
template <int N>
__device__ __forceinline__ Pack<Z, N> add_residual(const Pack<X, N>& x, const Pack<R, N>& residual, Total* total, int index) {
    if constexpr (RESIDUAL == 0) {
        return x;
    } else {
        float z[N];
#pragma unroll
        for (int i = 0; i < N; ++i) z[i] = __fadd_rn(x.at(i), residual.at(i));
        if (total != nullptr) store(total, index, pack(z, Total()));
        return pack(z, Z());
    }
}
