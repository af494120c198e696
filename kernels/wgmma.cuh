// Warpgroup products of Hopper (sm_90a): m64 nN k16 with both operands in shared memory and float32 accumulators.
#pragma once
#include "pipeline.cuh"

// Descriptor of a K-major operand in lines of 128 bytes, 128-byte swizzle: address / 16; the leading offset is not used with
// this layout; 1024 bytes from one group of eight lines to the next; swizzle mode 1 in the top bits. The operand begins at a
// multiple of 1024 bytes; the next sixteen k lie 32 bytes, so two units of the address, further on.
CUFUSE_INLINE u64 operand_descriptor(u32 shared) {
    return (u64)((shared & 0x3FFFFu) >> 4) | (1ull << 16) | ((u64)(1024 >> 4) << 32) | (1ull << 62);
}

// Descriptor of a single line of K-major values that lie one behind the other, without swizzle, from a multiple of 16 bytes on: the
// core matrices, eight lines of 16 bytes, overlap by all but their first line, so that line 0 of the operand is the line and the
// others are what follows it, up to 1024 bytes behind. The next sixteen k lie two units further on.
CUFUSE_INLINE u64 row_descriptor(u32 shared) {
    return (u64)((shared & 0x3FFFFu) >> 4) | ((u64)(16 >> 4) << 16) | ((u64)(128 >> 4) << 32);
}

// Before the first product and after other instructions have touched the accumulators.
CUFUSE_INLINE void products_fence() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
CUFUSE_INLINE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }

// Until at most PENDING groups of products are unfinished.
template <int PENDING>
static __device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(PENDING) : "memory");
}

template <int REGISTERS>
static __device__ __forceinline__ void give_registers_back() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(REGISTERS));
}
template <int REGISTERS>
static __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(REGISTERS));
}

// The instruction text needs its registers by number; longer lists begin with the shorter ones.
#define REGS_4 "%0,%1,%2,%3"
#define REGS_8 REGS_4 ",%4,%5,%6,%7"
#define REGS_12 REGS_8 ",%8,%9,%10,%11"
#define REGS_16 REGS_12 ",%12,%13,%14,%15"
#define REGS_20 REGS_16 ",%16,%17,%18,%19"
#define REGS_24 REGS_20 ",%20,%21,%22,%23"
#define REGS_32 REGS_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define REGS_40 REGS_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define REGS_48 REGS_40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define REGS_64 REGS_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define REGS_80 REGS_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define REGS_96 REGS_80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define REGS_112 REGS_96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define REGS_128 REGS_112 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
#define ACC_4 FOUR(0)
#define ACC_8 ACC_4, FOUR(4)
#define ACC_12 ACC_8, FOUR(8)
#define ACC_16 ACC_12, FOUR(12)
#define ACC_20 ACC_16, FOUR(16)
#define ACC_24 ACC_20, FOUR(20)
#define ACC_32 ACC_24, FOUR(24), FOUR(28)
#define ACC_40 ACC_32, FOUR(32), FOUR(36)
#define ACC_48 ACC_40, FOUR(40), FOUR(44)
#define ACC_64 ACC_48, SIXTEEN(48)
#define ACC_80 ACC_64, SIXTEEN(64)
#define ACC_96 ACC_80, SIXTEEN(80)
#define ACC_112 ACC_96, SIXTEEN(96)
#define ACC_128 ACC_112, SIXTEEN(112)

// c = a b + (accumulate ? c : 0), a: 64 lines, b: N lines. Zero adds nothing to a sum that starts at +0: without
// `accumulate` the result is that of an accumulator of +0.
// Thread 32 w + 4 g + t of the warpgroup holds c[4 j + i] = row 16 w + g + (i / 2) * 8, column 8 j + 2 t + i % 2.
template <int N>
static __device__ __forceinline__ void multiply_tiles(float (&c)[N / 2], u64 a, u64 b, int accumulate);

#define DEFINE_MULTIPLY_TILES(N, HALF, A, B, P)                                                                             \
    template <>                                                                                                             \
    __device__ __forceinline__ void multiply_tiles<N>(float (&c)[HALF], u64 a, u64 b, int accumulate) {                     \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #P ", 0;\n\t"                                                 \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGS_##HALF "}, %" #A ", %" #B            \
                     ", p, 1, 1, 0, 0;\n\t}"                                                                                \
                     : ACC_##HALF                                                                                           \
                     : "l"(a), "l"(b), "r"(accumulate));                                                                    \
    }

DEFINE_MULTIPLY_TILES(8, 4, 4, 5, 6)
DEFINE_MULTIPLY_TILES(16, 8, 8, 9, 10)
DEFINE_MULTIPLY_TILES(24, 12, 12, 13, 14)
DEFINE_MULTIPLY_TILES(32, 16, 16, 17, 18)
DEFINE_MULTIPLY_TILES(40, 20, 20, 21, 22)
DEFINE_MULTIPLY_TILES(48, 24, 24, 25, 26)
DEFINE_MULTIPLY_TILES(64, 32, 32, 33, 34)
DEFINE_MULTIPLY_TILES(80, 40, 40, 41, 42)
DEFINE_MULTIPLY_TILES(96, 48, 48, 49, 50)
DEFINE_MULTIPLY_TILES(128, 64, 64, 65, 66)
DEFINE_MULTIPLY_TILES(160, 80, 80, 81, 82)
DEFINE_MULTIPLY_TILES(192, 96, 96, 97, 98)
DEFINE_MULTIPLY_TILES(224, 112, 112, 113, 114)
DEFINE_MULTIPLY_TILES(256, 128, 128, 129, 130)
