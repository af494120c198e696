// loads.h
#include "machine.h"

namespace host {

static int warps_of_block() { return (machine.threads + 31) / 32; }
static int own_warp() { return self().block * warps_of_block() + (int)self().thread.x / 32; }

static void take_up(Known& to, const Known& from) {
    if (to.size() < from.size()) to.resize(from.size());
    for (size_t i = 0; i < from.size(); ++i)
        if (to[i] < from[i]) to[i] = from[i];
}

// All loads of the warp for which `shown` holds have been used.
template <class Shown>
static void use(int warp, Shown shown) {
    WarpLoads& own = machine.loads[warp];
    if (own.unused.empty()) return;
    const unsigned now = ++own.known[warp];
    std::vector<Load> left;
    for (const Load& load : own.unused)
        if (shown(load))
            for (u32 row : load.rows) own.used_at[row / 16] = now;
        else
            left.push_back(load);
    own.unused.swap(left);
}

void forget_loads(int warps) {
    machine.loads.assign(warps, {});
    for (auto& warp : machine.loads) warp.known.resize(warps);
}

void note_load(const void* const* rows, void* const* registers) {
    WarpLoads& own = machine.loads[own_warp()];
    if (own.used_at.empty()) own.used_at.resize(my_block().shared.size() / 16 + 1);
    Load load;
    for (int lane = 0; lane < 32; ++lane) {
        load.rows[lane] = *(const u32*)rows[lane];
        std::memcpy(load.words[lane], registers[lane], 16);
    }
    // the same rows once more: of loads that come one after the other the last one counts
    for (size_t i = 0; i < own.unused.size(); ++i)
        if (std::memcmp(own.unused[i].rows, load.rows, sizeof load.rows) == 0) own.unused.erase(own.unused.begin() + i--);
    own.unused.push_back(load);
}

void note_use() {
    use(own_warp(), [](const Load&) { return true; });
}

void note_product(int warp, const void* const* operands, int words) {
    use(self().block * warps_of_block() + warp, [=](const Load& load) {
        for (int of_load = 0; of_load < 4; ++of_load)
            for (int word = 0; word < words; ++word) {
                int lane = 0;
                while (lane < 32 && load.words[lane][of_load] == ((const u32*)operands[lane])[word]) ++lane;
                if (lane == 32) return true;
            }
        return false;
    });
}

void tell(Known& barrier) { take_up(barrier, machine.loads[own_warp()].known); }
void learn(const Known& barrier) { take_up(machine.loads[own_warp()].known, barrier); }

void demand_loads_used(u32 shared, u32 bytes, int block, u32 barrier) {
    const Known& known = machine.loads[own_warp()].known;
    for (int i = 0; i < warps_of_block(); ++i) {
        const int warp = block * warps_of_block() + i;
        const auto refuse = [&](u32 row) {
            char text[300];
            std::snprintf(text, sizeof text,
                          "a copy for barrier %u may overtake an ldmatrix of row %u by warp %d of block %d: no use of its result "
                          "is known to come before the arrivals at barrier %ld, waited for last; bytes",
                          barrier, row, i, block, self().waited_for);
            fail(text, shared, (long)shared + bytes - 1);
        };
        const WarpLoads& its = machine.loads[warp];
        for (const Load& load : its.unused)
            for (u32 row : load.rows)
                if (row >= shared && row - shared < bytes) refuse(row);
        for (u32 unit = shared / 16; unit < (shared + bytes) / 16 && unit < its.used_at.size(); ++unit)
            if (its.used_at[unit] > known[warp]) refuse(unit * 16);
    }
}

}  // namespace host
