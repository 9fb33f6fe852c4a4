// What the kernels that stream a whole model share: exchanges between the blocks of a cluster, sums in
// a warp, and how a byte is drawn.
//
// SIZES are compile-time constants given by the Python beside each kernel. Here are read: CL (blocks of
// a cluster), S (streams of a cluster), T (threads of a block), ACTIVATION (of the MLP).

SIZES
constexpr int V = 256;
constexpr int WARPS = T / 32;
constexpr unsigned ALL = 0xffffffffu;

constexpr int parts(int n, int size) { return (n + size - 1) / size; }
constexpr int up4(int n) { return parts(n, 4) * 4; }
constexpr int power(int n) { return n <= 1 ? 1 : 2 * power(parts(n, 2)); }

// ------------------------------------------------------------------------------- between blocks

inline unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

// Where this block's address 0 of shared memory is seen in another block of the cluster.
inline unsigned window(unsigned base, int block) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(base), "r"(block));
    return there - base;
}

inline void send(unsigned to, unsigned bar, float v) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to),
        "f"(v), "r"(bar) : "memory");
}

inline void expect(unsigned bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}

inline void wait(unsigned bar, unsigned parity) {
    unsigned done;
    do {
        asm volatile(
            "{\n .reg .pred p;\n"
            " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            " selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    } while (!done);
}

inline void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;"
                 ::: "memory");
}

// ------------------------------------------------------------------------------- from the host

// Flags beside the byte of an order to a kernel that stays: the state before it is that of the byte
// before; there is no byte, and the kernel is to leave.
constexpr unsigned GO_ON = 1 << 8, LEAVE = 1 << 9;

// A warp looks into the host's memory until each of `words` words there (at most 32) has the number
// `ticket` beside it: lane i gets word i, or LEAVE where `patience` looks have been in vain.
inline unsigned look_for_order(const uint2 *orders, int words, unsigned ticket, int patience) {
    const int lane = threadIdx.x % 32;
    unsigned word = 0, number = ticket;
    for (int looks = 0;; looks++) {
        if (lane < words)  // word and number are read as one
            asm volatile("ld.volatile.global.v2.u32 {%0, %1}, [%2];"
                         : "=r"(word), "=r"(number) : "l"(orders + lane) : "memory");
        if (__all_sync(ALL, number == ticket)) return word;
        if (looks == patience) return LEAVE;
    }
}

inline unsigned next_ticket(unsigned ticket) { return ticket == 0xffffffffu ? 1 : ticket + 1; }

// ------------------------------------------------------------------------------- in a block

// The block's first T threads meet; whoever is behind them has other work.
inline void meet() { asm volatile("bar.sync 1, %0;" ::"n"(T) : "memory"); }

// ------------------------------------------------------------------------------------ in a warp

// Sums of each of VALUES (a power of 2, at most COUNT) over COUNT lanes: lane l has l % VALUES.
template <int VALUES, int COUNT, int MASK = 1> inline float sums_over(const float (&a)[VALUES]) {
    if constexpr (VALUES > 1) {
        bool odd = threadIdx.x & MASK;
        float half[VALUES / 2];
#pragma unroll
        for (int i = 0; i < VALUES / 2; i++) {
            float give = odd ? a[2 * i] : a[2 * i + 1], keep = odd ? a[2 * i + 1] : a[2 * i];
            half[i] = keep + __shfl_xor_sync(ALL, give, MASK);
        }
        return sums_over<VALUES / 2, COUNT, MASK * 2>(half);
    } else {
        float sum = a[0];
#pragma unroll
        for (int mask = MASK; mask < COUNT; mask *= 2) sum += __shfl_xor_sync(ALL, sum, mask);
        return sum;
    }
}

template <int COUNT> inline float sum_over(float x) {
    float a[1] = {x};
    return sums_over<1, COUNT>(a);
}

// max(x, 0) + log(1 + e), e = exp(-|x|), by the series of 2 artanh(e / (2 + e)).
inline float softplus(float x) {
    float e = __expf(-fabsf(x)), r = __fdividef(e, 2.f + e), q = r * r;
    float sum = fmaf(q, 1.f / 13.f, 1.f / 11.f);
    sum = fmaf(q, fmaf(q, fmaf(q, fmaf(q, sum, 1.f / 9.f), 1.f / 7.f), 1.f / 5.f), 1.f / 3.f);
    return fmaxf(x, 0.f) + 2.f * fmaf(r * q, sum, r);
}

inline float activate(float x) {
    if (ACTIVATION == 0) return x > 0.f ? x * x : 0.f;
    if (ACTIVATION == 1) return 0.5f * x * (1.f + erff(x * 0.70710678f));
    return x * sigmoid(x);
}

// Philox 4x32-10 (Salmon et al. 2011): uniform in [0, 1) from (seed, position, stream).
inline float uniform(unsigned long long seed, unsigned long long position, unsigned stream) {
    unsigned c[4] = {(unsigned)position, (unsigned)(position >> 32), stream, 0u};
    unsigned k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        unsigned long long a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
        unsigned n0 = (unsigned)(b >> 32) ^ c[1] ^ k0, n2 = (unsigned)(a >> 32) ^ c[3] ^ k1;
        c[1] = (unsigned)b, c[3] = (unsigned)a, c[0] = n0, c[2] = n2;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return (c[0] >> 8) * 5.9604644775390625e-8f;
}

// Lane l has entries 8 l to 8 l + 7.
inline void eight(float (&to)[8], const float *row) {
    const float4 *from = (const float4 *)row + threadIdx.x % 32 * 2;
    float4 a = from[0], b = from[1];
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
    to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

inline float largest(const float (&a)[8]) {
    float m = a[0];
#pragma unroll
    for (int i = 1; i < 8; i++) m = fmaxf(m, a[i]);
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) m = fmaxf(m, __shfl_xor_sync(ALL, m, mask));
    return m;
}

// The first of the largest entries.
inline int first_largest(const float *row) {
    float a[8];
    eight(a, row);
    int key[8], most = -0x7fffffff;  // integers in the order of the floats
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int bits = __float_as_int(a[i]);
        key[i] = bits ^ (bits >> 31 & 0x7fffffff);
        most = max(most, key[i]);
    }
    int m = __reduce_max_sync(ALL, most), mine = 0;
#pragma unroll
    for (int i = 7; i >= 0; i--)
        if (key[i] == m) mine = i;
    int lane = __ffs(__ballot_sync(ALL, most == m)) - 1;
    return 8 * lane + __shfl_sync(ALL, mine, lane);
}

// Draws entry i with probability row[i] / sum of row; u is uniform in [0, 1).
inline int draw(const float *row, float u) {
    int lane = threadIdx.x % 32;
    float a[8], before = 0.f;
    eight(a, row);
    float mine = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) mine += a[i];
    float through = mine;  // sum over this lane's entries and all before
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        float other = __shfl_up_sync(ALL, through, step);
        if (lane >= step) through += other;
    }
    before = __shfl_up_sync(ALL, through, 1);
    if (lane == 0) before = 0.f;
    float target = u * __shfl_sync(ALL, through, 31);
    int found = -1, last = -1;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        before += a[i];
        if (a[i] > 0.f) last = i;
        if (found < 0 && a[i] > 0.f && before > target) found = i;
    }
    unsigned has = __ballot_sync(ALL, found >= 0);
    unsigned any = __ballot_sync(ALL, last >= 0);
    // Rounding can leave the target at the very end: then it is the last entry that is possible.
    int where = has ? __ffs(has) - 1 : any ? 31 - __clz(any) : 0;
    int at = __shfl_sync(ALL, has ? found : last, where);
    return 8 * where + (at < 0 ? 0 : at);
}

// ---------------------------------------------------------------------------- logits of S streams

// Log-probabilities of logits (S, V), each stream's by one warp of block s % CL, to row `row` of
// `rows` in (streams, rows, V).
inline void write_log_probs(
    const float *logit, float *log_probs, int base, int streams, int rows, int row) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, b = base + warp;
    if (warp >= S || warp % CL != blockIdx.x % CL || b >= streams) return;
    float a[8], sum = 0.f;
    eight(a, logit + warp * V);
    float m = largest(a);
#pragma unroll
    for (int i = 0; i < 8; i++) sum += __expf(a[i] - m);
    float shift = m + __logf(sum_over<32>(sum));
    float4 *to = (float4 *)(log_probs + ((int64)b * rows + row) * V);
    to[2 * lane] = make_float4(a[0] - shift, a[1] - shift, a[2] - shift, a[3] - shift);
    to[2 * lane + 1] = make_float4(a[4] - shift, a[5] - shift, a[6] - shift, a[7] - shift);
}

// One warp tells the host, which looks at `done`, that what the warp wrote before is there.
inline void tell(unsigned *done, unsigned ticket) {
    __threadfence_system();
    __syncwarp();
    if (threadIdx.x % 32 == 0) *(volatile unsigned *)done = ticket;
}

struct Draw {  // how bytes are drawn; `drawn` (streams, steps)
    unsigned char *drawn;
    unsigned long long seed, position;
    float temperature, top_p;
    int top_k;
};

// Every block draws for itself, and so the same: from logit (S, V) into byte (S); prob and kept are
// scratch of that size.
inline void choose(const Draw &how, const float *logit, float *prob, float *kept, int *byte, int base,
                   int streams, int steps, int t) {
    int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, rank = blockIdx.x % CL;
    float temperature = how.temperature, top_p = how.top_p;
    int top_k = how.top_k;
    if (temperature == 0.f) {
        if (warp < S) byte[warp] = first_largest(logit + warp * V);
    } else {
        bool filter = top_k > 0 || top_p < 1.f;
        if (warp < S) {
            float a[8], sum = 0.f;
            eight(a, logit + warp * V);
            float m = largest(a);
#pragma unroll
            for (int i = 0; i < 8; i++) sum += a[i] = __expf((a[i] - m) / temperature);
            float scale = 1.f / sum_over<32>(sum);
#pragma unroll
            for (int i = 0; i < 8; i++) prob[warp * V + 8 * lane + i] = a[i] * scale;
        }
        if (filter) {
            meet();
            for (int i = tid; i < S * V; i += T) {
                const float4 *row = (const float4 *)(prob + i / V * V);
                float p = prob[i], above = 0.f;
                int rank_of = 0;
#pragma unroll 2
                for (int j = 0; j < V; j += 4) {  // by probability, then by index
                    float4 q = row[j / 4];
                    bool a = q.x > p || (q.x == p && j < i % V);
                    bool b = q.y > p || (q.y == p && j + 1 < i % V);
                    bool c = q.z > p || (q.z == p && j + 2 < i % V);
                    bool d = q.w > p || (q.w == p && j + 3 < i % V);
                    rank_of += a + b + c + d;
                    above += (a ? q.x : 0.f) + (b ? q.y : 0.f) + (c ? q.z : 0.f)
                        + (d ? q.w : 0.f);
                }
                bool keep = (top_k == 0 || rank_of < top_k) && (rank_of == 0 || above < top_p);
                kept[i] = keep ? p : 0.f;
            }
            meet();
        } else {
            __syncwarp();
        }
        if (warp < S) {
            float at = uniform(how.seed, how.position + t, base + warp);
            byte[warp] = draw((filter ? kept : prob) + warp * V, at);
        }
    }
    __syncwarp();
    if (warp < S && rank == warp % CL && lane == 0 && base + warp < streams)
        how.drawn[(int64)(base + warp) * steps + t] = (unsigned char)byte[warp];
    meet();
}
