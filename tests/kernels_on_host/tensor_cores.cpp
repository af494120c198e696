// The functions of mma.cuh and wgmma.cuh that compute, and cp.async: the arithmetic of Hopper's tensor cores, exactly.
#include "machine.h"
#include "wgmma_registers.cuh"

u32 shared_address(const void* pointer) { return (u32)((const unsigned char*)pointer - host::my_block().shared.data()); }

void load_matrices(u32 (&r)[4], u32 address) {
    struct Lane { u32 address; } in{address};
    host::warp_collective("ldmatrix", &in, r, [](host::Rendezvous& w) {
        for (int matrix = 0; matrix < 4; ++matrix)
            for (int lane = 0; lane < 32; ++lane) {
                const u32 row = ((const Lane*)w.inputs[matrix * 8 + lane / 4])->address;
                if (row % 16) host::fail("ldmatrix address is not a multiple of 16", row);
                std::memcpy((u32*)w.outputs[lane] + matrix, host::shared_at(row, 16) + lane % 4 * 4, 4);
            }
        host::note_load(w.inputs.data(), w.outputs.data());
    });
}

// One step of Hopper's tensor core: terms truncated to multiples of 2^(e_max - 25), exact sum, truncated to float32.
static float host_step(float c, const u16* a, const u16* b, int terms = 16) {
    struct Part { long long significand; int exponent; };
    const auto decode = [](u32 bits, int fraction) -> Part {
        const int field = bits >> fraction & 0xFF;
        const long long s = (bits & ((1u << fraction) - 1)) | (field ? 1u << fraction : 0);
        return {bits >> (fraction + 8) & 1 ? -s : s, (field ? field : 1) - 127};
    };
    Part parts[17];
    int e_max = -133;
    for (int i = 0; i < terms; ++i) {
        const Part x = decode(a[i], 7), y = decode(b[i], 7);
        parts[i] = {x.significand * y.significand * 512, x.exponent + y.exponent};  // 14 fraction bits -> 23
        if (parts[i].significand && parts[i].exponent > e_max) e_max = parts[i].exponent;
        if ((a[i] & 0x7F80) == 0x7F80 || (b[i] & 0x7F80) == 0x7F80) {  // not finite: only that it is so matters here
            float sum = c;
            for (int j = 0; j < terms; ++j) sum += __uint_as_float((u32)a[j] << 16) * __uint_as_float((u32)b[j] << 16);
            return sum != sum ? __uint_as_float(0x7FFFFFFFu) : sum;
        }
    }
    if ((__float_as_uint(c) & 0x7F800000u) == 0x7F800000u) return c;
    parts[terms] = decode(__float_as_uint(c), 23);
    if (parts[terms].significand && parts[terms].exponent > e_max) e_max = parts[terms].exponent;
    long long sum = 0;  // in units of 2^(e_max - 25)
    for (int i = 0; i <= terms; ++i) {
        const int shift = parts[i].exponent - e_max + 2;
        const long long m = std::llabs(parts[i].significand);
        const long long cut = shift >= 0 ? m << shift : shift > -63 ? m >> -shift : 0;
        sum += parts[i].significand < 0 ? -cut : cut;
    }
    if (sum == 0) return 0.0f;
    int unit = e_max - 25, length = 64 - __builtin_clzll(std::llabs(sum));
    int drop = length - 24;
    if (unit + drop < -149) drop = -149 - unit;
    const long long kept = drop > 0 ? std::llabs(sum) >> (drop < 63 ? drop : 63) << drop : std::llabs(sum);
    return (float)std::ldexp(sum < 0 ? -(double)kept : (double)kept, unit);
}

void multiply_accumulate(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    struct Lane { u32 a[4], b[2]; } in{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    host::warp_collective("mma", &in, c, [](host::Rendezvous& w) {
        host::note_product((int)threadIdx.x / 32, w.inputs.data(), 6);
        u16 x[16][16], y[8][16];
        for (int lane = 0; lane < 32; ++lane) {
            const Lane& l = *(const Lane*)w.inputs[lane];
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; ++i)
                for (int h = 0; h < 2; ++h) x[g + i % 2 * 8][t * 2 + h + i / 2 * 8] = (u16)(l.a[i] >> 16 * h);
            for (int i = 0; i < 2; ++i)
                for (int h = 0; h < 2; ++h) y[g][t * 2 + h + i * 8] = (u16)(l.b[i] >> 16 * h);
        }
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                float& d = ((float*)w.outputs[lane])[i];
                d = host_step(d, x[lane / 4 + i / 2 * 8], y[lane % 4 * 2 + i % 2]);
            }
    });
}

// Each lane names the lane whose value it gets.
static float host_shuffle(const char* name, float v, int from) {
    struct Lane { float value; int from; } in{v, from & 31};
    float result;
    host::warp_collective(name, &in, &result, [](host::Rendezvous& w) {
        for (int lane = 0; lane < 32; ++lane)
            *(float*)w.outputs[lane] = ((const Lane*)w.inputs[((const Lane*)w.inputs[lane])->from])->value;
    });
    return result;
}
static int host_lane() { return (int)(threadIdx.x % 32); }
float __shfl_sync(unsigned, float v, int from) { return host_shuffle("shuffle", v, from); }
float __shfl_xor_sync(unsigned, float v, int offset) { return host_shuffle("shuffle xor", v, host_lane() ^ offset); }
float __shfl_down_sync(unsigned, float v, int offset) {
    return host_shuffle("shuffle down", v, host_lane() + offset < 32 ? host_lane() + offset : host_lane());
}

int __any_sync(unsigned, int predicate) {
    int any;
    host::warp_collective("any", &predicate, &any, [](host::Rendezvous& w) {
        int found = 0;
        for (int lane = 0; lane < 32; ++lane) found |= *(const int*)w.inputs[lane] != 0;
        for (int lane = 0; lane < 32; ++lane) *(int*)w.outputs[lane] = found;
    });
    return any;
}

u32 transpose_matrix(u32 r) {
    u32 d;
    struct Lane { u32 word; } in{r};
    host::warp_collective("movmatrix", &in, &d, [](host::Rendezvous& w) {
        for (int lane = 0; lane < 32; ++lane) {
            u32 word = 0;
            for (int h = 0; h < 2; ++h) {
                const int row = lane % 4 * 2 + h, column = lane / 4;  // of the source
                word |= (((const Lane*)w.inputs[row * 4 + column / 2])->word >> 16 * (column % 2) & 0xFFFFu) << 16 * h;
            }
            *(u32*)w.outputs[lane] = word;
        }
    });
    return d;
}

void copy_16_async(u32 shared, const void* global, u32 bytes) {
    if (shared % 16) host::fail("cp.async target is not a multiple of 16", shared);
    if (bytes && (uintptr_t)global % 16) host::fail("cp.async source is not a multiple of 16");
    const int block = host::self().block;
    const auto copy = [=] {
        unsigned char* target = host::shared_at(shared, 16, block);
        std::memset(target, 0, 16);
        std::memcpy(target, global, bytes);
    };
    if (host::machine.random() % 2)
        copy();  // at once, or as late as can be
    else
        host::self().copies.open.push_back(copy);
}
void commit_copies() { host::commit(host::self().copies); }
void store_16(u32 address, const u32 (&words)[4]) { std::memcpy(host::shared_at(address, 16), words, 16); }

static int host_warpgroup() { return (int)host::self().thread.x / 128; }
static host::Groups& my_products() { return host::my_block().products[host_warpgroup()]; }

template <class Action>
static void warpgroup_collective(const char* name, const void* input, void* output, Action action) {
    host::collective(host::my_block().warpgroups[host_warpgroup()], 128, threadIdx.x % 128, name, input, output, action);
}

u64 operand_descriptor(u32 shared) {
    if (shared % 1024) host::fail("operand does not begin at a period of the swizzle", shared);
    return shared >> 4;
}
u64 row_descriptor(u32 shared) {
    if (shared % 16) host::fail("line does not begin at a multiple of 16", shared);
    return shared >> 4 | 1ull << 63;
}
void commit_products() {
    warpgroup_collective("commit", nullptr, nullptr, [](auto&) {
        host::commit(my_products());
        if (host::machine.random() % 2) host::finish(my_products(), 0);
    });
}
void host::wait_for_products(int pending) {
    warpgroup_collective("wait", nullptr, nullptr, [=](auto&) { host::finish(my_products(), pending); });
}

// Value at line, k of an operand whose address, advanced by 2 for each 16 k, is `operand`.
static u16 host_operand(u64 operand, u32 line, u32 k, int block) {
    u32 address = (u32)(operand << 4) + line * 128 + k * 2;
    u16 value;
    if (operand >> 63) {  // a single line: core matrices of eight lines of 16 bytes, each 16 bytes behind the other
        address += line % 8 * 16 - line * 128 + line / 8 * 128;
        std::memcpy(&value, host::shared_at(address, 2, block), 2);
        return value;
    }
    std::memcpy(&value, host::shared_at(address ^ (address >> 7 & 7) << 4, 2, block), 2);
    return value;
}

void host::multiply_tiles(float* accumulators, int columns, u64 a, u64 b, int accumulate) {
    struct In { u64 a, b, accumulate; } in{a, b, (u64)accumulate};
    warpgroup_collective("wgmma", &in, accumulators, [=](host::Rendezvous& r) {
        const In first = *(const In*)r.inputs[0];
        for (auto* p : r.inputs)
            if (std::memcmp(p, &first, sizeof first)) host::fail("operands differ inside a warpgroup");
        std::vector<float*> c;
        for (auto* p : r.outputs) c.push_back((float*)p);
        const int block = host::self().block;
        my_products().open.push_back([=] {
            static u16 x[64][16], w[256][16];
            for (u32 k = 0; k < 16; ++k) {
                for (u32 i = 0; i < 64; ++i) x[i][k] = host_operand(first.a, i, k, block);
                for (u32 i = 0; i < (u32)columns; ++i) w[i][k] = host_operand(first.b, i, k, block);
            }
            for (int lane = 0; lane < 128; ++lane)
                for (int i = 0; i < columns / 2; ++i) {
                    const int row = lane / 32 * 16 + lane % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
                    c[lane][i] = host_step(first.accumulate ? c[lane][i] : 0.0f, x[row], w[column]);
                }
        });
    });
}

// wgmma_registers.cuh
void host::multiply_fragments(float* accumulators, int columns, const u32 (&a)[4], u64 b, int accumulate) {
    struct In { u32 a[4]; u64 b, accumulate; } in{{a[0], a[1], a[2], a[3]}, b, (u64)accumulate};
    warpgroup_collective("wgmma", &in, accumulators, [=](host::Rendezvous& r) {
        for (int warp = 0; warp < 4; ++warp) host::note_product(host_warpgroup() * 4 + warp, r.inputs.data() + warp * 32, 4);
        std::vector<In> lanes;
        for (auto* p : r.inputs) {
            lanes.push_back(*(const In*)p);
            if (lanes.back().b != lanes[0].b || lanes.back().accumulate != lanes[0].accumulate)
                host::fail("operands differ inside a warpgroup");
        }
        std::vector<float*> c;
        for (auto* p : r.outputs) c.push_back((float*)p);
        const int block = host::self().block;
        my_products().open.push_back([=] {
            static u16 x[64][16], w[256][16];
            for (int lane = 0; lane < 128; ++lane)
                for (int i = 0; i < 4; ++i)
                    for (int h = 0; h < 2; ++h)
                        x[lane / 32 * 16 + lane % 32 / 4 + i % 2 * 8][lane % 4 * 2 + h + i / 2 * 8] = (u16)(lanes[lane].a[i] >> 16 * h);
            for (u32 k = 0; k < 16; ++k)
                for (u32 i = 0; i < (u32)columns; ++i) w[i][k] = host_operand(lanes[0].b, i, k, block);
            for (int lane = 0; lane < 128; ++lane)
                for (int i = 0; i < columns / 2; ++i) {
                    const int row = lane / 32 * 16 + lane % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
                    c[lane][i] = host_step(lanes[0].accumulate ? c[lane][i] : 0.0f, x[row], w[column]);
                }
        });
    });
}
