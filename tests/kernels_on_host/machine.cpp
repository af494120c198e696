// The scheduler: clusters one after the other, threads in random order.
#include "machine.h"

namespace host {

static void run_cluster(const std::function<void()>& kernel, int cluster, int first, size_t shared_bytes) {
    Machine& m = machine;
    m.blocks.assign(cluster, {});
    for (int b = 0; b < cluster; ++b) {
        Block& block = m.blocks[b];
        const unsigned linear = first + b;
        block.index = {linear % m.grid.x, linear / m.grid.x, 0};
        block.running = m.threads;
        block.shared.assign(shared_bytes, 0xFF);  // NaN until written
        block.warps.resize((m.threads + 31) / 32), block.warpgroups.resize((m.threads + 127) / 128);
    }
    forget_loads(cluster * ((m.threads + 31) / 32));
    constexpr size_t STACK = 256 * 1024;
    if ((int)m.fibers.size() != cluster * m.threads) {
        for (auto& fiber : m.fibers) munmap(fiber.stack, STACK);
        m.fibers.assign(cluster * m.threads, {});
        for (auto& fiber : m.fibers) fiber.stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
    static std::function<void()> body;
    body = kernel;
    for (int i = 0; i < cluster * m.threads; ++i) {
        Fiber& f = m.fibers[i];
        f.started = f.done = false, f.block = i / m.threads, f.thread = {(unsigned)(i % m.threads), 0, 0}, f.copies = {}, f.stores = {};
        f.waited_for = -1;
        getcontext(&f.start);
        f.start.uc_stack.ss_sp = f.stack, f.start.uc_stack.ss_size = STACK, f.start.uc_link = nullptr;
        makecontext(&f.start, (void (*)()) + [] {
            body();
            machine.current->done = true;
            my_block().running--;
            machine.progress++;
            _longjmp(machine.scheduler, 1);
        }, 0);
    }
    std::vector<int> live(m.fibers.size());
    for (size_t i = 0; i < live.size(); ++i) live[i] = (int)i;
    long last = -1;
    int idle = 0;
    while (!live.empty()) {
        // warps in random order; a whole round is one tick of the clock
        const int offset = (int)(m.random() % live.size());
        for (size_t n = 0; n < live.size(); ++n) {
            m.current = &m.fibers[live[(n + offset) % live.size()]];
            if (m.current->done || (m.current->started && m.random() % 8 == 0)) continue;
            if (_setjmp(m.scheduler) == 0) {
                if (m.current->started) _longjmp(m.current->at, 1);
                m.current->started = true;
                setcontext(&m.current->start);
            }
        }
        m.current = nullptr;
        std::vector<int> still;
        for (int i : live)
            if (!m.fibers[i].done) still.push_back(i);
        live.swap(still);
        for (size_t j = 0; j < m.jobs.size();)
            if (--m.jobs[j].due <= 0) {
                auto run = std::move(m.jobs[j].run);
                m.jobs[j] = std::move(m.jobs.back()), m.jobs.pop_back();
                run();
                m.progress++;
            } else {
                ++j;
            }
        idle = m.progress == last && m.jobs.empty() ? idle + 1 : 0;
        last = m.progress;
        if (idle > 2000) {
            m.current = &m.fibers[live[0]];
            fail(m.current->waits_for);
        }
    }
    for (const Block& block : m.blocks)
        if (!block.prefetched.empty()) fail("a box was asked for into the cache and never copied", (long)block.prefetched.size());
    if (!m.jobs.empty()) fail("a CTA ended while copies to it were under way", (long)m.jobs.size());
}

const char* run_grid(void (*kernel)(const void*), const void* arguments, unsigned grid_x, unsigned grid_y, int cluster,
                     int threads, unsigned long shared_bytes, unsigned seed) {
    machine.grid = {grid_x, grid_y, 1}, machine.block_size = {(unsigned)threads, 1, 1}, machine.threads = threads;
    machine.random.seed(seed);
    machine.jobs.clear(), machine.cluster = {}, machine.current = nullptr;
    if (_setjmp(machine.failed)) {
        forget_loads(0);
        return machine.message;
    }
    for (unsigned first = 0; first < grid_x * grid_y; first += cluster)
        run_cluster([=] { kernel(arguments); }, cluster, (int)first, shared_bytes);
    forget_loads(0);
    return nullptr;
}

const Index& thread_index() { return self().thread; }
const Index& block_index() { return my_block().index; }
const Index& grid_size() { return machine.grid; }
const Index& block_size() { return machine.block_size; }
unsigned char* shared_memory() { return my_block().shared.data(); }

void wait_for_copies(int pending) { finish(self().copies, pending); }
void wait_for_store_reads(int pending) { finish(self().stores, pending); }

}  // namespace host

void __syncwarp() { host::warp_collective("syncwarp", nullptr, nullptr, [](auto&) {}); }
void __syncthreads() {
    host::meet(host::my_block().named[0], host::machine.threads, threadIdx.x, "syncthreads");
}
