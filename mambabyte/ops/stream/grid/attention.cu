// Attention (A, L): q, k, v => each block some keys of one head => owners of channels => out_proj => x.
//
// Row i of a head's keys and values lies with block head * CHUNKS + i % CHUNKS, modulo the number of
// blocks, in global memory; that block alone reads and writes it.

constexpr int KV = KVH * HD, RK = parts(KV, CL), GROUP_OF = HEADS / KVH;  // heads of q to one of k
constexpr int CHUNKS = most(1, CL / KVH), SHARES_OF = KVH * CHUNKS;
constexpr float NOTHING = -3e38f;  // below every score
constexpr int QS = CL * RD, KS = CL * RK, HE = parts(HD, 8);  // 8 threads a key: channels of each

// This block's keys and values of all layers, from slot `first` on of `from_slots`, to a cache of `slots`.
__forceinline__ void copy_rows(Block &b, const float *from, int first, int from_slots, float *to, int slots) {
    constexpr int WIDE = HD % 4 ? 1 : 4;
    const int count = least(from_slots - first, slots) * HD / WIDE;  // of a layer's keys, or values
    for (int share = b.rank; share < SHARES_OF; share += CL)
#pragma unroll 4
        for (int i = b.tid; i < 2 * CACHES * count; i += T) {
            const int64 at = i / count * SHARES_OF + share;
            const float *const source = from + (at * from_slots + first) * HD + i % count * WIDE;
            float *const target = to + at * slots * HD + i % count * WIDE;
            if constexpr (WIDE == 4)
                *(float4 *)target = *(const float4 *)source;
            else
                *target = *source;
        }
    meet();
}

template <int P> __forceinline__ void attention(
    Block &b, float *cache, int slots, int begin, int now, int valid) {
    // Queries of all bytes and heads to one of k, so many at a time in a warp's registers. Which thread looks
    // at a key, and after which others, depends on its place alone: so a sum is the same in every pass.
    constexpr int QUERIES = P * GROUP_OF, HELD = least(QUERIES, most(1, 16 / HE)), ROWS = 4 * WARPS;
    float *const q = b.mem + Q, *const key = b.mem + KEY, *const value = b.mem + VALUE;
    const float *own = b.own;
    Packet *const shares = b.packets + 2 * COPIES * CL * PACKETS;  // in an exchange of some, with one place
    const int lane = b.lane, warp = b.warp, window = b.table[WINDOW];
    auto channel = [&](int e) {  // neighbours where 8 threads take whole float4
        return HD % 32 == 0 ? 4 * (lane % 8) + 32 * (e / 4) + e % 4 : lane % 8 + 8 * e;
    };
    // Of the share (head, chunk): rows chunk, chunk + CHUNKS, ... of the cache; the slots to look at.
    const int64 size = (int64)slots * HD;  // of a share's keys; all values are behind all keys
    struct Row { float k[HE], v[HE]; };
    auto first_slot = [&](int chunk) { return max(0, parts(max(begin, now - window + 1) - chunk, CHUNKS)); };
    auto row_of = [&](int share, int slot) { return slot * CHUNKS + share % CHUNKS; };
    auto fetch_row = [&](int share, int slot) {  // what was stored before this pass
        const bool before = row_of(share, slot) < now;
        const float *k = cache + share * size + (int64)(before ? slot : 0) * HD, *v = k + SHARES_OF * size;
        Row row;
#pragma unroll
        for (int e = 0; e < HE; e++) {
            bool in = before && channel(e) < HD;
            row.k[e] = in ? k[channel(e)] : 0.f, row.v[e] = in ? v[channel(e)] : 0.f;
        }
        return row;
    };
    auto mine = [&](int start) { return start + (4 * warp + lane / 8 - start & ROWS - 1); };  // the first
    // The first rows that a thread looks at are fetched ahead: two of them, or one of a pass of several
    // bytes, which has no registers left.
    constexpr int AHEAD = P > 1 ? 1 : 2;
    Row rows[AHEAD] = {};
    auto fetch_first = [&](int share) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) rows[i] = fetch_row(share, mine(first_slot(share % CHUNKS)) + i * ROWS);
    };
    if (b.rank < SHARES_OF) fetch_first(b.rank);  // while q comes to be
    b.rows_normed<RD + 2 * RK, P>([&](int r, int p, float v) { b.out[p * (RD + 2 * RK) + r] = v + own[OWN + r]; });
    b.give<RD + 2 * RK, P, (RD + 2 * RK) * P>();
    b.receive<RD + 2 * RK, P>([](int p, int block, int r) {
        return r < RD ? Q + p * QS + block * RD + r : r < RD + RK ? KEY + p * KS + block * RK + r - RD
                      : VALUE + p * KS + block * RK + r - RD - RK;
    });
    for (int share = b.rank; share < SHARES_OF; share += CL) {
        const int chunk = share % CHUNKS, head_of = share / CHUNKS, at = head_of * HD, start = first_slot(chunk);
        const int end = parts(now + P - chunk, CHUNKS);
        // Queries to this head's keys and its own key, normed and turned, by the blocks that use them.
#pragma unroll 1
        for (int unit = warp; unit < P * (GROUP_OF + 1); unit += WARPS) {
            const int p = unit / (GROUP_OF + 1), i = unit % (GROUP_OF + 1), head = head_of * GROUP_OF + i;
            float *v = i < GROUP_OF ? q + p * QS + head * HD : key + p * KS + at, square = 0.f;
            for (int c = lane; c < HD; c += 32) square = fmaf(v[c], v[c], square);
            float scale = QKNORM ? rsqrtf(sum_over<32>(square) * (1.f / HD) + TINY) : 1.f;
            if (i < GROUP_OF) scale *= own[A_GAIN + head];
            for (int c = lane; c < HD / 2; c += 32) {
                float x = v[c] * scale, z = v[c + HD / 2] * scale;
                float cosine = b.mem[TURN + p * HD + c], sine = b.mem[TURN + p * HD + HD / 2 + c];
                v[c] = x * cosine - z * sine, v[c + HD / 2] = x * sine + z * cosine;
            }
        }
        meet();
        if (share != b.rank) fetch_first(share);
#pragma unroll 1
        for (int set = 0; set * HELD < QUERIES; set++) {
            float qs[HELD][HE], o[HELD][HE], peak[HELD], sum[HELD];
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                const int query = set * HELD + i, p = query / GROUP_OF;
                const int head = share / CHUNKS * GROUP_OF + query % GROUP_OF;
                peak[i] = NOTHING, sum[i] = 0.f;
#pragma unroll
                for (int e = 0; e < HE; e++) {
                    qs[i][e] = query < QUERIES && channel(e) < HD ? q[p * QS + head * HD + channel(e)] : 0.f;
                    o[i][e] = 0.f;
                }
            }
#pragma unroll 1
            for (int s = start; s < end; s += ROWS) {
                const int slot = mine(start) + s - start, row = row_of(share, slot);
                float ks[HE], vs[HE];
#pragma unroll
                for (int e = 0; e < HE; e++) ks[e] = rows[0].k[e], vs[e] = rows[0].v[e];
                if (AHEAD > 1) rows[0] = rows[AHEAD - 1];
                if (s + AHEAD * ROWS < end) rows[AHEAD - 1] = fetch_row(share, slot + AHEAD * ROWS);
                if (row >= now && row < now + P)
#pragma unroll
                    for (int e = 0; e < HE; e++)
                        if (channel(e) < HD) {
                            const int from = (row - now) * KS + at + channel(e);
                            ks[e] = key[from], vs[e] = value[from];
                        }
#pragma unroll
                for (int i = 0; i < HELD; i++) {
                    const int there = now + (set * HELD + i) / GROUP_OF;
                    float score = 0.f;
#pragma unroll
                    for (int e = 0; e < HE; e++) score = fmaf(qs[i][e], ks[e], score);
                    score = sum_over<8>(score);
                    if (slot < end && row <= there && row >= max(begin, there - window + 1)) {
                        float top = fmaxf(peak[i], score), keep = exp2f(peak[i] - top), w = exp2f(score - top);
                        sum[i] = fmaf(sum[i], keep, w), peak[i] = top;
#pragma unroll
                        for (int e = 0; e < HE; e++) o[i][e] = fmaf(o[i][e], keep, w * vs[e]);
                    }
                }
            }
            if ((set + 1) * HELD < QUERIES) fetch_first(share);
#pragma unroll
            for (int i = 0; i < HELD; i++) {
#pragma unroll
                for (int mask = 8; mask < 32; mask *= 2) {  // the warp's four shares
                    float other = __shfl_xor_sync(ALL, peak[i], mask), top = fmaxf(peak[i], other);
                    float keep = exp2f(peak[i] - top), add = exp2f(other - top);
                    peak[i] = top, sum[i] = fmaf(sum[i], keep, add * __shfl_xor_sync(ALL, sum[i], mask));
#pragma unroll
                    for (int e = 0; e < HE; e++)
                        o[i][e] = fmaf(o[i][e], keep, add * __shfl_xor_sync(ALL, o[i][e], mask));
                }
                float *to = b.mem + GROUP + (i * WARPS + warp) * (HD + 2);
                if (lane < 8)
#pragma unroll
                    for (int e = 0; e < HE; e++)
                        if (channel(e) < HD) to[channel(e)] = o[i][e];
                if (lane == 0) to[HD] = peak[i], to[HD + 1] = sum[i];
            }
            meet();
            // To the owner of each channel: this block's sum of values, their highest score, sum of weights.
#pragma unroll 1
            for (int i = b.tid; i < least(HELD, QUERIES - set * HELD) * HD; i += T) {
                const int query = set * HELD + i / HD;
                const float *part = b.mem + GROUP + i / HD * WARPS * (HD + 2);
                float peak = NOTHING, out = 0.f, sum = 0.f;
#pragma unroll
                for (int g = 0; g < WARPS; g++) peak = fmaxf(peak, part[g * (HD + 2) + HD]);
#pragma unroll
                for (int g = 0; g < WARPS; g++) {
                    const float *from = part + g * (HD + 2);
                    const float w = exp2f(from[HD] - peak);
                    out = fmaf(w, from[i % HD], out), sum = fmaf(w, from[HD + 1], sum);
                }
                put(shares + (share * QUERIES + query) * HD + i % HD, out, peak, sum, b.exchange);
            }
            if (SHARES_OF > CL || QUERIES > HELD) meet();
        }
        // For later passes; behind what others wait for.
#pragma unroll 1
        for (int i = b.tid; i < P * HD; i += T) {
            const int p = i / HD, c = i % HD, there = now + p;
            if (p < valid && there % CHUNKS == chunk) {
                float *to = cache + share * size + (int64)(there / CHUNKS) * HD + c;
                to[0] = key[p * KS + at + c], to[SHARES_OF * size] = value[p * KS + at + c];
            }
        }
    }
    b.take<P * RD * CHUNKS>([&](int i) {
        const int p = i / (RD * CHUNKS), chunk = i % CHUNKS, c = min(b.rank * RD + i / CHUNKS % RD, DM - 1);
        const int share = c / HD / GROUP_OF * CHUNKS + chunk, query = p * GROUP_OF + c / HD % GROUP_OF;
        return shares + (share * QUERIES + query) * HD + c % HD;
    }, [](int i, int j) { return PARTIAL + 3 * i + j; });
#pragma unroll 1
    for (int unit = warp; unit < P * RD; unit += WARPS) {
        const float *from = b.mem + PARTIAL + 3 * unit * CHUNKS;
        float peak = NOTHING, sum = 0.f, out = 0.f;
        for (int s = lane; s < CHUNKS; s += 32) peak = fmaxf(peak, from[3 * s + 1]);
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) peak = fmaxf(peak, __shfl_xor_sync(ALL, peak, mask));
        for (int s = lane; s < CHUNKS; s += 32) {
            float w = exp2f(from[3 * s + 1] - peak);
            sum = fmaf(w, from[3 * s + 2], sum), out = fmaf(w, from[3 * s], out);
        }
        sum = sum_over<32>(sum), out = sum_over<32>(out);
        if (lane == 0) b.out[unit] = out / sum;
    }
    b.give<RD, P, P * RD * 32>();
    b.mix<DM, P>([&]() { b.receive_all<RD, P>(Y, YS); });
}
