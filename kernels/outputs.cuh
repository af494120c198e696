// How a tensor-core fragment reaches a row-major output. To be included after mma.cuh.
#pragma once

// out [slices, m, n]: float32, or bfloat16 bits; pairs: two neighbours may be stored at once (n is even, out aligned to them).
struct Output {
    void* out;
    int m, n;
    bool float32, pairs;

    // Accumulators of `row` at `column` (even) and its right neighbour, rounded once, to nearest even, unless float32.
    __device__ __forceinline__ void store(int slice, int row, int column, float first, float second) const {
        if (row >= m || column >= n) return;
        const long long at = ((long long)slice * m + row) * n + column;
        if (float32) {
            float* target = (float*)out + at;
            if (pairs) {
                *(float2*)target = make_float2(first, second);
            } else {
                target[0] = first;
                if (column + 1 < n) target[1] = second;
            }
        } else {
            u16* target = (u16*)out + at;
            const u32 word = pack_bf16(first, second);
            if (pairs) {
                *(u32*)target = word;
            } else {
                target[0] = (u16)word;
                if (column + 1 < n) target[1] = (u16)(word >> 16);
            }
        }
    }

    // WIDTH columns of one warp's 16 rows from `row` on: lane 4 g + t holds, for every eight columns, rows g and g + 8 at
    // columns 2 t and 2 t + 1.
    template <int WIDTH>
    __device__ __forceinline__ void store_rows(int slice, int row, int column, const float* c, int lane) const {
        row += lane / 4, column += lane % 4 * 2;
        if (pairs && !float32) {  // the usual case, without a branch for each pair
            u16* target = (u16*)out + ((long long)slice * m + row) * n + column;
#pragma unroll
            for (int j = 0; j < WIDTH / 8; ++j) {
                if (column + j * 8 >= n) break;
                if (row < m) *(u32*)(target + j * 8) = pack_bf16(c[4 * j], c[4 * j + 1]);
                if (row + 8 < m) *(u32*)(target + 8ll * n + j * 8) = pack_bf16(c[4 * j + 2], c[4 * j + 3]);
            }
            return;
        }
#pragma unroll
        for (int j = 0; j < WIDTH / 8; ++j) {
            store(slice, row, column + j * 8, c[4 * j], c[4 * j + 1]);
            store(slice, row + 8, column + j * 8, c[4 * j + 2], c[4 * j + 3]);
        }
    }
};
