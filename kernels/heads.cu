// heads: what follows the projection of an attention layer. Each head of q and k of each token goes through head norm and
// rotation (heads.cuh), each of v only through the last rounding, and all of them to their places, a cache's slots among them.
//
// Layouts: from[0..2] and to[0..2] are q, k and v [tokens, heads, D]; an array may be its own target. cos, sin [tokens, D] with
// strides of tokens and groups as HeadArray has them. slots [tokens], or null: token t's rows of to[1] and to[2] are rows
// slots[t], and nothing is written there where that is negative or `capacity` or more. Accesses are packs of SUM_VECTOR elements,
// of 16 bytes at most: all strides are multiples of SUM_VECTOR, all pointers aligned to a pack.
// MOVE_V 1: v is copied, or rounded where X_FLOAT32 and not OUT_FLOAT32; 0: v is there already.
//
// Schedule: a warp takes BATCH neighbouring heads of one array and one token (BATCH divides both numbers of heads), WARPS warps a
// block. Grid: tokens, and blocks for the heads of one of them.
#include "heads.cuh"
#include "launches.cuh"

struct Arguments {
    HeadArray from[3], to[3];
    HeadArray cos, sin;
    const HeadWeight *q_weight, *k_weight;
    const long long* slots;
    int capacity, inner, tokens;  // inner: tokens of a group
    int heads, kv_heads;
    float q_mean_operand, k_mean_operand, eps;
    int weights_ready, tables_ready;  // whether they may be read before the kernels in front of this one have ended
};

extern "C" __global__ void __launch_bounds__(32 * WARPS) heads(const __grid_constant__ Arguments a) {
    // the first lane's, so that the compiler sees that the warp is of one mind
    const int warp = (int)__shfl_sync(0xffffffffu, (float)(threadIdx.x / 32), 0);
    int head = (blockIdx.y * WARPS + warp) * BATCH;
    const int which = head < a.heads ? 0 : head < a.heads + a.kv_heads ? 1 : 2;
    const bool works = head < a.heads + (MOVE_V ? 2 : 1) * a.kv_heads;
    head -= which == 0 ? 0 : which == 1 ? a.heads : a.heads + a.kv_heads;
    Token token = {0, (int)blockIdx.x};
    if (a.inner != a.tokens) {
        token.group = blockIdx.x / (u32)a.inner;
        token.member -= token.group * a.inner;
    }
    const HeadArray from = a.from[which], to = a.to[which];
    HeadRow<HeadWeight> weight;
    HeadRow<Cos> cos;
    HeadRow<Sin> sin;
    const auto read_weights = [&] {
        if (HEAD_NORM) weight.read(which == 0 ? a.q_weight : a.k_weight);
    };
    const auto read_tables = [&] {
        if (!ROTATE) return;
        cos.read((const Cos*)a.cos.base + token.place(a.cos));
        sin.read((const Sin*)a.sin.base + token.place(a.sin));
    };

    let_next_kernel_begin();
    if (which < 2 && a.weights_ready) read_weights();
    if (which < 2 && a.tables_ready) read_tables();
    wait_for_previous_kernel();
    if (!works) return;
    HeadRow<HeadX> x[BATCH];
    const HeadX* source = (const HeadX*)from.base + token.place(from) + (long long)head * from.head;
#pragma unroll
    for (int i = 0; i < BATCH; ++i) x[i].read(source + i * from.head);

    bool stored = true;
    long long at = token.place(to);
    if (which > 0 && a.slots != nullptr) {
        const long long slot = a.slots[blockIdx.x];
        stored = slot >= 0 && slot < a.capacity;
        at = slot * to.token;
    }
    if (!stored) return;
    HeadY* target = (HeadY*)to.base + at + (long long)head * to.head;
    if (which == 2) {
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            HeadRow<HeadY> y;
#pragma unroll
            for (int step = 0; step < HEAD_STEPS; ++step) y.vectors[step] = converted<HeadY>(x[i].vectors[step]);
            y.write(target + i * to.head);
        }
        return;
    }
    if (!a.weights_ready) read_weights();
    if (!a.tables_ready) read_tables();
    sin = signed_sine(sin);
    const float mean_operand = which == 0 ? a.q_mean_operand : a.k_mean_operand;
#pragma unroll
    for (int i = 0; i < BATCH; ++i) finish_head(x[i], weight, cos, sin, mean_operand, a.eps).write(target + i * to.head);
}
