// What kernels share whose blocks have a chunk of T steps of a head, in tiles of shared memory. Follows
// types.cu and mma.cu.

constexpr int T = 64, WARPS = 4, THREADS = 32 * WARPS;  // steps of a chunk
// A log-decay below LEAST counts as LEAST, a factor of 9e-27: sums over a chunk stay so small that
// their differences are good to 3e-4. One of -inf, where a document starts, is a factor of exactly 0:
// NOTHING is the exponent of no float32.
constexpr float LEAST = -60.f, NOTHING = -128.f;
constexpr unsigned ALL = ~0u;

inline float at_least(float log_decay) {
    if (log_decay < -3.4e38f) return NOTHING;
    return log_decay < LEAST ? LEAST : log_decay;  // a nan stays one
}

struct Strides {
    int64 batch, time, head;
};

// Rows of COLUMNS elements from device memory into a tile, whose rows are 16 bytes longer so
// that eight of them lie in different banks; rows from `rows` on are zero.
template <int COLUMNS, int COUNT = THREADS>
inline void load_tile(bfloat16 *tile, const bfloat16 *from, int64 stride, int rows) {
    constexpr int PACKS = COLUMNS / 8;
    for (int k = threadIdx.x; k < T * PACKS; k += COUNT) {
        int row = k / PACKS, column = k % PACKS * 8;
        float4 pack = {0.f, 0.f, 0.f, 0.f};
        if (row < rows) pack = *(const float4 *)(from + row * stride + column);
        *(float4 *)(tile + row * (COLUMNS + 8) + column) = pack;
    }
}

// The number of a thread's warp, so that the compiler knows that all lanes have the same.
inline int warp_of_thread() { return __shfl_sync(ALL, threadIdx.x / 32, 0); }

// Which 16 of a chunk's 64 rows a warp has. Where the rows of a triangle differ in length, the warps of
// a multiprocessor's blocks that share an issue slot have different ones.
inline int block_of_warp(int warp) { return (warp + (blockIdx.x * 0x9e3779b9u >> 30)) % WARPS; }
inline int block_of_warp() { return block_of_warp(threadIdx.x / 32); }

// The sum over lanes up to and with this one.
inline float cumulated(float x) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int far = 1; far < 32; far *= 2) {
        float other = __shfl_sync(ALL, x, lane - far);
        if (lane >= far) x += other;
    }
    return x;
}

inline float sum_of_warp(float x) {
#pragma unroll
    for (int far = 16; far; far /= 2) x += __shfl_xor_sync(ALL, x, far);
    return x;
}

// Sums of COUNT numbers over the lanes that differ in the bits from FAR on: a lane gives one half of what it
// has for the other half, as long as there are two. The first of x are then sums of COUNT FAR / 32 numbers, of
// one at least, from that on which comes back; the lanes below COUNT FAR have all of them.
template <int FAR, int COUNT> inline int sums_in_turn(float (&x)[COUNT]) {
    int lane = threadIdx.x % 32, left = COUNT, from = 0;
#pragma unroll
    for (int far = FAR; far < 32; far *= 2) {
        bool halves = left > 1, high = halves && lane & far;
        left = halves ? left / 2 : 1;
#pragma unroll
        for (int e = 0; e < (COUNT + 1) / 2; e++) {
            if (e >= left) break;
            float kept = high ? x[e + left] : x[e], given = halves && !high ? x[e + left] : x[e];
            x[e] = kept + __shfl_xor_sync(ALL, given, far);
        }
        from += high ? left : 0;
    }
    return from;
}

// Over the four lanes that hold one row of a product's sums.
inline float sum_of_row(float x) {
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}

// Which chunk of which head a block has.
struct Place {
    int head, chunk, rows;
    int64 batch, first;  // first: row of the chunk's first step in (B L)
    inline Place(int length, int heads) {
        int chunks = (length + T - 1) / T;
        head = blockIdx.x % heads;
        int rest = blockIdx.x / heads;
        chunk = rest % chunks;
        batch = rest / chunks;
        rows = min(T, length - chunk * T);
        first = batch * length + chunk * T;
    }
    inline int64 at(const Strides &s, int unit) const {
        return batch * s.batch + chunk * T * s.time + unit * s.head;
    }
};

// Starts a copy of 16 bytes to shared memory, of zeros unless valid.
inline void copy_async(bfloat16 *to, const bfloat16 *from, bool valid) {
    u32 address = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(address), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

// Until the copies that this thread has started are done.
inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// load_tile by such copies: to be waited for, and to be followed by a barrier.
template <int COLUMNS, int COUNT>
inline void copy_tile(bfloat16 *tile, const bfloat16 *from, int64 stride, int rows) {
    constexpr int PACKS = COLUMNS / 8;
#pragma unroll
    for (int first = 0; first < T * PACKS; first += COUNT) {
        int k = first + threadIdx.x, row = k / PACKS, column = k % PACKS * 8;
        if (T * PACKS % COUNT && k >= T * PACKS) break;
        copy_async(tile + row * (COLUMNS + 8) + column, from + (row < rows ? row : 0) * stride + column,
                   row < rows);
    }
}

// A tile in shared memory, behind a barrier, to rows of device memory, 16 bytes at a time.
template <int COLUMNS, int COUNT>
inline void store_tile(bfloat16 *to, const bfloat16 *tile, int64 stride, int rows) {
    constexpr int PACKS = COLUMNS / 8, APART = COUNT / PACKS;
    int row = threadIdx.x / PACKS, column = threadIdx.x % PACKS * 8;
    to += row * stride + column;
#pragma unroll
    for (int first = 0; first < T; first += APART) {
        if (first + row < rows) *(float4 *)to = *(const float4 *)(tile + (first + row) * (COLUMNS + 8) + column);
        to += APART * stride;
    }
}
