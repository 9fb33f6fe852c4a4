// Runs CUDA C++ on the CPU, lane by lane, for tests without a GPU: what a kernel uses of CUDA's built-ins and
// the PTX instructions that emulate.py finds in its inline assembly. fibers.cpp has the scheduler, compiled
// once: with it and the standard headers that it needs, every kernel would take twice as long to compile.
//
// Every thread of a block is a fiber; blocks run one after the other, those of a cluster together. Warps take turns in a random order, some
// lag, and asynchronous copies land late, so that a missing barrier shows as a wrong or a varying result. What a
// warp does together (shuffles, matrix instructions) waits for its 32 lanes. Shared memory starts as NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static
#define __CUDA_ARCH__ 900
#define __expf expf
#define __logf logf
#define __sinf sinf
#define __cosf cosf
#define rsqrtf(x) (1.f / sqrtf(x))

template <class T> static T max(T x, T y) { return x < y ? y : x; }
template <class T> static T min(T x, T y) { return y < x ? y : x; }

struct dim3 { int x, y, z; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { uint32_t x, y; };
static float2 make_float2(float x, float y) { return {x, y}; }
static uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

template <class To, class From> static To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static int __float_as_int(float x) { return bits<int>(x); }
static int __ffs(uint32_t x) { return __builtin_ffs(x); }
static int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
static float __fdividef(float x, float y) { return x / y; }
static void sincospif(float x, float *sine, float *cosine) {
    *sine = (float)sin(M_PI * x), *cosine = (float)cos(M_PI * x);
}
static void __threadfence_system() {}
static long long __double_as_longlong(double x) { return bits<long long>(x); }
static float __uint_as_float(uint32_t x) { return bits<float>(x); }
static uint32_t __float_as_uint(float x) { return bits<uint32_t>(x); }
static uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    const uint64_t bytes = x | uint64_t(y) << 32;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}

// ---------------------------------------------------------------------------------- threads

constexpr int MAX_THREADS = 1024, MAX_CLUSTER = 2, SHARED = 1 << 18;
extern dim3 threadIdx, blockIdx, blockDim;
extern int cluster;  // blocks that run together; in it this is block
static int block_rank() { return blockIdx.x % cluster; }

struct Meeting { int waiting = 0; unsigned times = 0; };
// to null: an arrival; from null: zeros, or with `sent` that number
// `end`: of a group of copies that has no barrier
struct Copy { char *to; const char *from; int bytes; uint32_t barrier; bool counted; bool sent = false; float number = 0; bool end = false; };

extern Meeting block_meetings[MAX_CLUSTER], some_meetings[MAX_CLUSTER], warps_meetings[MAX_CLUSTER][MAX_THREADS / 32], cluster_meeting;
#define block_meeting (block_meetings[block_rank()])
#define some_meeting (some_meetings[block_rank()])  // of the threads that name this barrier
#define warp_meetings (warps_meetings[block_rank()])
extern uint32_t posted_of[MAX_CLUSTER][MAX_THREADS / 32][2][32][4];
#define posted (posted_of[block_rank()])
extern unsigned exchanges_of[MAX_CLUSTER][MAX_THREADS];
#define exchanges (exchanges_of[block_rank()])

void yield();
void meet(Meeting &meeting, int threads);
void later(const Copy &copy);  // of this thread
void land_all();
void land_groups(int but);  // all but the last so many
// Of the barrier in shared memory at that address.
void new_barrier(uint32_t address, int count);
void count(uint32_t address, int arrivals, long bytes);
bool passed(uint32_t address, uint32_t parity);

static void fail(const char *what) {
    fprintf(stderr, "emulated kernel: %s\n", what);
    abort();
}
static void __syncthreads() { meet(block_meeting, blockDim.x); }
static void __syncwarp() { meet(warp_meetings[threadIdx.x / 32], 32); }

// Up to four words of every lane of the warp.
struct Words {
    uint32_t of[32][4];
    explicit Words(uint32_t a, uint32_t b = 0, uint32_t c = 0, uint32_t d = 0) {
        auto &table = posted[threadIdx.x / 32][exchanges[threadIdx.x]++ & 1];
        const uint32_t words[4] = {a, b, c, d};
        memcpy(table[threadIdx.x % 32], words, sizeof words);
        __syncwarp();
        memcpy(of, table, sizeof of);
    }
};
template <class T> static T __shfl_sync(uint32_t, T x, int lane) {
    return bits<T>(Words(bits<uint32_t>(x)).of[lane & 31][0]);
}
template <class T> static T __shfl_xor_sync(uint32_t all, T x, int mask) {
    return __shfl_sync(all, x, threadIdx.x % 32 ^ mask);
}
template <class T> static T __shfl_up_sync(uint32_t all, T x, int step) {
    return __shfl_sync(all, x, max(0, threadIdx.x % 32 - step));
}
static uint32_t __ballot_sync(uint32_t, bool x) {
    const Words words(x);
    uint32_t mask = 0;
    for (int i = 0; i < 32; ++i) mask |= words.of[i][0] << i;
    return mask;
}
static int __reduce_max_sync(uint32_t, int x) {
    const Words words(bits<uint32_t>(x));
    int most = x;
    for (int i = 0; i < 32; ++i) most = max(most, bits<int>(words.of[i][0]));
    return most;
}
static bool __all_sync(uint32_t, bool x) {
    const Words words(x);
    for (const auto &word : words.of)
        if (!word[0]) return false;
    return true;
}

// ---------------------------------------------------------------------------- shared memory

// Dynamic shared memory. Addresses are distances from a point far below it, so that static arrays, which lie
// near, have one too.
extern char shared_of[MAX_CLUSTER][SHARED];
#define shared (shared_of[block_rank()])
static char *at(uint32_t address) { return shared_of[0] - (1 << 30) + address; }
static size_t __cvta_generic_to_shared(const void *p) {
    return static_cast<const char *>(p) - (shared_of[0] - (1 << 30));
}
template <class T> static T read_at(uint32_t address) {
    T x;
    if (address % sizeof x) fail("a misaligned read of shared memory");
    memcpy(&x, at(address), sizeof x);
    return x;
}
template <class T> static void write_at(uint32_t address, T x) {
    if (address % sizeof x) fail("a misaligned write to shared memory");
    memcpy(at(address), &x, sizeof x);
}

// ------------------------------------------------------------------------------ instructions

static float from_bf16(uint32_t x) { return __uint_as_float(x << 16); }
static uint32_t to_bf16(float x) {
    const uint32_t u = __float_as_uint(x);
    return x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
static float tf32(uint32_t x) { return __uint_as_float(x & 0xffffe000u); }
static uint32_t half(uint32_t x, int which) { return which ? x >> 16 : x & 0xffff; }

namespace ptx {
static void nothing() {}
template <class T> static void mad_wide(T &d, int a, int b, T c) { d = T(a) * b + c; }
static void cvt_f32_f16(float &y, uint16_t x) { y = bits<_Float16>(x); }
static void cvt_f16_f32(uint16_t &y, float x) { y = bits<uint16_t>(_Float16(x)); }
static void cvt_bf16_f32(uint16_t &y, float x) { y = to_bf16(x); }
static void cvt_bf16x2_f32(uint32_t &y, float high, float low) { y = to_bf16(high) << 16 | to_bf16(low); }
static void ex2(float &y, float x) {
    y = exp2f(x);
    if (y < 1.17549435e-38f) y = 0.f;
}
static void rcp(float &y, float x) { y = 1.f / x; }
static void fma_bf16x2(uint32_t &d, uint32_t a, uint32_t b) {
    float sum[2];
    for (int i = 0; i < 2; ++i)
        sum[i] = fmaf(from_bf16(half(a, i)), from_bf16(half(b, i)), from_bf16(half(d, i)));
    cvt_bf16x2_f32(d, sum[1], sum[0]);
}
static void max_nan_bf16x2(uint32_t &d, uint32_t a, uint32_t b) {
    float most[2];
    for (int i = 0; i < 2; ++i) {
        const float x = from_bf16(half(a, i)), y = from_bf16(half(b, i));
        most[i] = x != x || y != y ? NAN : max(x, y);
    }
    cvt_bf16x2_f32(d, most[1], most[0]);
}

// Accumulator and operand layouts of mma: lane 4 g + t, register i. K products, PACK to a register.
template <int K, int PACK, class Value>
static void multiply(float *(&&d)[4], const Words &a, const Words &b, Value value) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, step = 4 * PACK;
    for (int i = 0; i < 4; ++i) {
        const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        for (int k = 0; k < K; ++k) {
            const int from = k % step / PACK;
            const uint32_t x = a.of[row % 8 * 4 + from][row / 8 + 2 * (k / step)];
            const uint32_t y = b.of[column * 4 + from][k / step];
            *d[i] += value(x, k % PACK) * value(y, k % PACK);
        }
    }
}
static void mma_bf16(float &d0, float &d1, float &d2, float &d3, uint32_t a0, uint32_t a1, uint32_t a2,
                     uint32_t a3, uint32_t b0, uint32_t b1) {
    multiply<16, 2>({&d0, &d1, &d2, &d3}, Words(a0, a1, a2, a3), Words(b0, b1),
                    [](uint32_t x, int i) { return from_bf16(half(x, i)); });
}
static void mma_tf32_k8(float &d0, float &d1, float &d2, float &d3, uint32_t a0, uint32_t a1, uint32_t a2,
                        uint32_t a3, uint32_t b0, uint32_t b1) {
    multiply<8, 1>({&d0, &d1, &d2, &d3}, Words(a0, a1, a2, a3), Words(b0, b1),
                   [](uint32_t x, int) { return tf32(x); });
}
static void mma_tf32_k4(float &d0, float &d1, float &d2, float &d3, uint32_t a0, uint32_t a1, uint32_t b0) {
    multiply<4, 1>({&d0, &d1, &d2, &d3}, Words(a0, a1), Words(b0), [](uint32_t x, int) { return tf32(x); });
}
static void movmatrix(uint32_t &y, uint32_t x) {
    const Words words(x);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    y = half(words.of[8 * t + g / 2][0], g % 2) | half(words.of[8 * t + 4 + g / 2][0], g % 2) << 16;
}
template <bool TRANSPOSED, int N> static void ldmatrix(uint32_t *(&&y)[N], uint32_t address) {
    const Words rows(address);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (int matrix = 0; matrix < N; ++matrix) {
        *y[matrix] = 0;
        for (int i = 0; i < 2; ++i) {
            const int row = TRANSPOSED ? 2 * t + i : g, column = TRANSPOSED ? g : 2 * t + i;
            const uint32_t start = rows.of[8 * matrix + row][0];
            if (start % 16) fail("a misaligned row of a matrix");
            *y[matrix] |= uint32_t(read_at<uint16_t>(start + 2 * column)) << 16 * i;
        }
    }
}
static void ldmatrix_x2(uint32_t &a, uint32_t &b, uint32_t address) { ldmatrix<false, 2>({&a, &b}, address); }
static void ldmatrix_x4(uint32_t &a, uint32_t &b, uint32_t &c, uint32_t &d, uint32_t address) {
    ldmatrix<false, 4>({&a, &b, &c, &d}, address);
}
static void ldmatrix_x4_trans(uint32_t &a, uint32_t &b, uint32_t &c, uint32_t &d, uint32_t address) {
    ldmatrix<true, 4>({&a, &b, &c, &d}, address);
}
static void ld_shared_v4(float &x, float &y, float &z, float &w, uint32_t address) {
    const auto v = read_at<float4>(address);
    x = v.x, y = v.y, z = v.z, w = v.w;
}
static void ld_shared_v2(uint32_t &x, uint32_t &y, uint32_t address) {
    const auto v = read_at<uint2>(address);
    x = v.x, y = v.y;
}
static void st_shared_v4(uint32_t address, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    write_at(address, float4{bits<float>(x), bits<float>(y), bits<float>(z), bits<float>(w)});
}
static void st_global_v4(void *to, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    if (size_t(to) % 16) fail("a misaligned write of 16 bytes");
    const uint32_t all[4] = {x, y, z, w};
    memcpy(to, all, 16);
}
static void st_shared_v2(uint32_t address, float x, float y) { write_at(address, float2{x, y}); }
static void st_global_if(uint32_t valid, char *to, uint32_t x) {
    if (valid) memcpy(to, &x, 4);
}
static void st_relaxed_b128(void *to, uint64_t low, uint64_t high) {
    if (size_t(to) % 16) fail("a misaligned write of 16 bytes");
    const uint64_t both[2] = {low, high};
    memcpy(to, both, sizeof both);
}
// Whoever looks again and again lets the others go on.
static void ld_relaxed_b128(unsigned long long &low, unsigned long long &high, const void *from) {
    memcpy(&low, from, 8);
    memcpy(&high, static_cast<const char *>(from) + 8, 8);
    yield();
}
static void ld_volatile_v2(uint32_t &x, uint32_t &y, const void *from) {
    memcpy(&x, from, 4);
    memcpy(&y, static_cast<const char *>(from) + 4, 4);
    yield();
}
static void cp_async(uint32_t to, const void *from, int bytes, uint32_t wanted = 1) {
    if (to % 16 || size_t(from) % 16) fail("a misaligned copy");
    if (wanted) later({at(to), static_cast<const char *>(from), bytes, 0, false});
}
static void cp_async_wait_all() { land_all(); }
static void cp_async_commit() { later({nullptr, nullptr, 0, 0, false, false, 0, true}); }
static void cp_async_wait_group(int but) { land_groups(but); }
static void cp_async_arrive(uint32_t barrier) {
    later({nullptr, nullptr, 0, barrier, false});
}
static void mbarrier_init(uint32_t address, int count) { new_barrier(address, count); }
static void mbarrier_arrive(uint32_t address) { count(address, 1, 0); }
static void mbarrier_arrive_expect(uint32_t address, uint32_t bytes) { count(address, 1, bytes); }
static void mapa(uint32_t &there, uint32_t base, int block) {
    there = base + (block - block_rank()) * SHARED;
}
static void st_async(uint32_t to, float value, uint32_t barrier) {
    if (to % 4) fail("a misaligned send");
    later({at(to), nullptr, 4, barrier, true, true, value});
}
static void bar_sync(int threads) { meet(some_meeting, threads); }
static void cluster_barrier() { meet(cluster_meeting, cluster * blockDim.x); }
static void elect(uint32_t &chosen) { chosen = threadIdx.x % 32 == 0; }
static void copy_bulk(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier) {
    if (to % 16 || bytes % 16 || size_t(from) % 16) fail("a misaligned copy");
    later({at(to), static_cast<const char *>(from), int(bytes), barrier, true});
}
// What stands for a tensor map: an array of 16-byte rows in three dimensions, steps in bytes.
struct Box { const char *base; uint64_t sizes[4], steps[3]; uint32_t box[4]; };
static void copy_box(uint32_t to, const void *map, int first, int time, int group, int batch, uint32_t barrier) {
    Box b;
    memcpy(&b, map, sizeof b);
    if (to % 128 || first != 0 || b.sizes[0] != 8 || b.box[0] != 8) fail("a box of another kind");
    for (uint32_t k = 0; k < b.box[2]; ++k)
        for (uint32_t i = 0; i < b.box[1]; ++i, to += 16) {
            const bool valid = time + i < b.sizes[1] && group + k < b.sizes[2] && uint64_t(batch) < b.sizes[3];
            const char *from = b.base + (time + i) * b.steps[0] + (group + k) * b.steps[1] + batch * b.steps[2];
            later({at(to), valid ? from : nullptr, 16, barrier, true});
        }
}
static void mbarrier_try_wait(uint32_t &done, uint32_t address, uint32_t parity) {
    done = passed(address, parity);
    if (!done) yield();
}
}  // namespace ptx

// ------------------------------------------------------------------------------------ launch

// Runs `call(arguments)` in every thread of every block, `together` of them as a cluster.
void run(void (*call)(const void *), const void *arguments, int blocks, int threads, unsigned seed, int together);

template <class T> static T next_argument(const char *&from) {
    static_assert(sizeof(T) % 4 == 0);
    T x;
    memcpy(&x, from, sizeof x);
    from += sizeof x;
    return x;
}
template <class... Arguments> struct Call {
    void (*kernel)(Arguments...);
    std::tuple<Arguments...> arguments;
};
template <class... Arguments>
static void launch(void (*kernel)(Arguments...), int blocks, int threads, const char *packed, unsigned seed,
                   int together = 1) {
    const Call<Arguments...> call{kernel, {next_argument<Arguments>(packed)...}};
    run([](const void *given) {
        const auto &call = *static_cast<const Call<Arguments...> *>(given);
        std::apply(call.kernel, call.arguments);
    }, &call, blocks, threads, seed, together);
}
