// The scheduler of lanes.h: threads as fibers, copies that land late, barriers in shared memory.

#undef _FORTIFY_SOURCE  // it takes a jump to another stack for a fault
#include "lanes.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <random>
#include <unordered_map>
#include <vector>

constexpr int STACK = 1 << 17;

dim3 threadIdx, blockIdx, blockDim;
int cluster = 1;
Meeting block_meetings[MAX_CLUSTER], some_meetings[MAX_CLUSTER], warps_meetings[MAX_CLUSTER][MAX_THREADS / 32], cluster_meeting;
uint32_t posted_of[MAX_CLUSTER][MAX_THREADS / 32][2][32][4];
unsigned exchanges_of[MAX_CLUSTER][MAX_THREADS];
__align__(128) char shared_of[MAX_CLUSTER][SHARED];

struct Barrier { int count, pending; uint32_t phase; long bytes; };  // bytes: still to be copied
struct Fiber {
    jmp_buf context;
    std::vector<char> stack;  // empty until the fiber has begun
    std::deque<Copy> copies;
    bool done;
};

static Fiber fibers_of[MAX_CLUSTER][MAX_THREADS];
#define fibers (fibers_of[block_rank()])
static jmp_buf scheduler;
static std::unordered_map<uint32_t, Barrier> barriers;
static void (*kernel_call)(const void *);
static const void *kernel_arguments;

// Lanes change by the million. swapcontext would set the signal mask every time, which is a system call.
__attribute__((noinline)) static void change(jmp_buf &from, jmp_buf &to) {
    if (_setjmp(from) == 0) _longjmp(to, 1);
}
void yield() { change(fibers[threadIdx.x].context, scheduler); }
void meet(Meeting &meeting, int threads) {
    const unsigned times = meeting.times;
    if (++meeting.waiting == threads) {
        meeting.waiting = 0;
        ++meeting.times;
    }
    while (meeting.times == times) yield();
}

void new_barrier(uint32_t address, int count) { barriers[address] = {count, count, 0, 0}; }
bool passed(uint32_t address, uint32_t parity) { return barriers.at(address).phase != parity; }
void count(uint32_t address, int arrivals, long bytes) {
    Barrier &barrier = barriers.at(address);
    barrier.pending -= arrivals;
    barrier.bytes += bytes;
    if (barrier.pending == 0 && barrier.bytes == 0) {
        barrier.phase ^= 1;
        barrier.pending = barrier.count;
    }
}
static void land(Fiber &fiber) {
    const Copy copy = fiber.copies.front();
    fiber.copies.pop_front();
    if (copy.end) return;
    if (copy.to == nullptr) return count(copy.barrier, 1, 0);
    if (copy.counted) {
        if (copy.sent) memcpy(copy.to, &copy.number, sizeof copy.number);
        else if (copy.from) memcpy(copy.to, copy.from, copy.bytes);
        else memset(copy.to, 0, copy.bytes);
        return count(copy.barrier, 0, -copy.bytes);
    }
    memset(copy.to, 0, 16);
    memcpy(copy.to, copy.from, copy.bytes);
}
void later(const Copy &copy) { fibers[threadIdx.x].copies.push_back(copy); }
void land_all() {
    while (!fibers[threadIdx.x].copies.empty()) land(fibers[threadIdx.x]);
}

void land_groups(int but) {
    std::deque<Copy> &copies = fibers[threadIdx.x].copies;
    auto groups = [&] { return std::count_if(copies.begin(), copies.end(), [](const Copy &c) { return c.end; }); };
    while (groups() > but) land(fibers[threadIdx.x]);
}

// A fiber serves one block after the other: only its beginning needs system calls.
static void fiber_main() {
    for (;;) {
        kernel_call(kernel_arguments);
        fibers[threadIdx.x].done = true;
        yield();
    }
}
__attribute__((noinline)) static void begin(Fiber &fiber) {
    fiber.stack.resize(STACK);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack = {fiber.stack.data(), 0, STACK};
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    if (_setjmp(scheduler) == 0) setcontext(&context);
}

// Runs the blocks of a cluster together, from block `base` on.
static void run_blocks(int base, int threads, std::mt19937 &random) {
    barriers.clear();
    cluster_meeting = {};
    for (int rank = 0; rank < cluster; ++rank) {
        blockIdx = {base + rank, 0, 0};
        memset(shared, 0xff, SHARED);
        block_meeting = some_meeting = {};
        for (Meeting &meeting : warp_meetings) meeting = {};
        for (int t = 0; t < threads; ++t) {
            Fiber &fiber = fibers[t];
            fiber.copies.clear();
            exchanges[t] = 0;
            fiber.done = false;
        }
    }
    std::vector<int> order(cluster * threads / 32);
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    const unsigned delay = 1 << random() % 10;  // of copies, in rounds
    int left = cluster * threads;
    for (long rounds = 0; left > 0; ++rounds) {
        if (rounds > 10000000) fail("no end");
        if (random() % 8 == 0) std::shuffle(order.begin(), order.end(), random);
        for (int warp : order) {
            if (random() % 4 == 0) continue;
            const int first = random() % 32;
            blockIdx = {base + warp * 32 / threads, 0, 0};
            for (int i = 0; i < 32; ++i) {
                Fiber &fiber = fibers[threadIdx.x = 32 * warp % threads + (first + i) % 32];
                if (fiber.done) continue;
                fiber.stack.empty() ? begin(fiber) : change(scheduler, fiber.context);
                left -= fiber.done;
            }
        }
        for (int rank = 0; rank < cluster; ++rank) {
            blockIdx = {base + rank, 0, 0};
            for (int t = 0; t < threads; ++t)
                if (!fibers[t].copies.empty() && random() % delay == 0)
                    for (size_t copies = fibers[t].copies.size(); copies > 0; --copies) land(fibers[t]);
        }
    }
}

void run(void (*call)(const void *), const void *arguments, int blocks, int threads, unsigned seed, int together) {
    std::mt19937 random(seed);
    kernel_call = call;
    kernel_arguments = arguments;
    blockDim = {threads, 1, 1};
    cluster = together;
    for (int block = 0; block < blocks; block += cluster) run_blocks(block, threads, random);
}
