// Attention (A, L): q, k, v => each block some keys of one head => owners of channels => out_proj => x.
//
// Row i of a head's keys and values lies with block head * CHUNKS + i % CHUNKS, modulo the number of
// blocks, in global memory; that block alone reads and writes it.

constexpr int KV = KVH * HD, RK = parts(KV, CL), GROUP_OF = HEADS / KVH;  // heads of q to one of k
constexpr int CHUNKS = most(1, CL / KVH), SHARES_OF = KVH * CHUNKS;
constexpr float NOTHING = -3e38f;  // below every score
constexpr int QS = CL * RD, KS = CL * RK, HE = parts(HD, 8);  // 8 threads a key: channels of each

template <int P> inline void attention(
    Block &b, float *cache, int slots, int begin, int now, int valid) {
    // Queries of all bytes and heads to one of k; so many at a time in a warp's registers; the sets of
    // them, and warps of each.
    constexpr int QUERIES = P * GROUP_OF, HELD = least(QUERIES, most(1, 32 / HE));
    constexpr int SETS = parts(QUERIES, HELD), SET_WARPS = most(1, WARPS / SETS), ROWS = 4 * SET_WARPS;
    float *const q = b.mem + Q, *const key = b.mem + KEY, *const value = b.mem + VALUE, *const y = b.mem + Y;
    const float *own = b.own;
    const int lane = b.lane, warp = b.warp, window = b.table[WINDOW];
    auto channel = [&](int e) {  // neighbours where 8 threads take whole float4
        return HD % 32 == 0 ? 4 * (lane % 8) + 32 * (e / 4) + e % 4 : lane % 8 + 8 * e;
    };
    // Of the share (head, chunk): rows chunk, chunk + CHUNKS, ... of the cache; the slots to look at.
    const int64 size = (int64)slots * HD;  // of a share's keys; all values are behind all keys
    float ks[HE], vs[HE];
    auto first_slot = [&](int chunk) { return max(0, parts(max(begin, now - window + 1) - chunk, CHUNKS)); };
    auto fetch_row = [&](int share, int slot) {  // what was stored before this pass
        const int chunk = share % CHUNKS, row = slot * CHUNKS + chunk;
        const bool before = row < now;
        const float *k = cache + share * size + (int64)(before ? slot : 0) * HD, *v = k + SHARES_OF * size;
#pragma unroll
        for (int e = 0; e < HE; e++) {
            bool in = before && channel(e) < HD;
            ks[e] = in ? k[channel(e)] : 0.f, vs[e] = in ? v[channel(e)] : 0.f;
        }
        return row;
    };
    const int mine = warp < SETS * SET_WARPS ? 4 * (warp / SETS) + lane / 8 : 0;
    int row = 0;
    if (b.rank < SHARES_OF) row = fetch_row(b.rank, first_slot(b.rank % CHUNKS) + mine);  // while q comes to be
    b.rows_normed<RD + 2 * RK, P>([&](int r, int p, float v) {
        float *to = r < RD ? q + p * QS + b.rank * RD + r : r < RD + RK ? key + p * KS + b.rank * RK + r - RD
                           : value + p * KS + b.rank * RK + r - RD - RK;
        b.send(to, v + own[OWN + r]);
    });
    b.take<CL * (RD + 2 * RK), P>([](int p, int i) {
        return i < QS ? Q + p * QS + i : i < QS + KS ? KEY + p * KS + i - QS : VALUE + p * KS + i - QS - KS;
    });
    for (int unit = warp; unit < P * (HEADS + KVH); unit += WARPS) {
        const int p = unit / (HEADS + KVH), head = unit % (HEADS + KVH);
        float *v = head < HEADS ? q + p * QS + head * HD : key + p * KS + (head - HEADS) * HD, square = 0.f;
        for (int c = lane; c < HD; c += 32) square = fmaf(v[c], v[c], square);
        float scale = QKNORM ? rsqrtf(sum_over<32>(square) * (1.f / HD) + TINY) : 1.f;
        if (head < HEADS) scale *= own[A_GAIN + head];
        for (int c = lane; c < HD / 2; c += 32) {
            float x = v[c] * scale, z = v[c + HD / 2] * scale;
            float cosine = b.mem[TURN + p * HD + c], sine = b.mem[TURN + p * HD + HD / 2 + c];
            v[c] = x * cosine - z * sine, v[c + HD / 2] = x * sine + z * cosine;
        }
    }
    meet();
    for (int share = b.rank; share < SHARES_OF; share += CL) {
        const int chunk = share % CHUNKS, at = share / CHUNKS * HD, start = first_slot(chunk);
        const int end = parts(now + P - chunk, CHUNKS);
        for (int i = b.tid; i < P * HD; i += T) {
            const int p = i / HD, c = i % HD, there = now + p;
            if (p < valid && there % CHUNKS == chunk) {
                float *to = cache + share * size + (int64)(there / CHUNKS) * HD + c;
                to[0] = key[p * KS + at + c], to[SHARES_OF * size] = value[p * KS + at + c];
            }
        }
#pragma unroll 1
        for (int unit = warp; unit < SETS * SET_WARPS; unit += WARPS) {
            const int set = unit % SETS;
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
                const int slot = s + 4 * (unit / SETS) + lane / 8;
                if (s > start || unit != warp || share != b.rank) row = fetch_row(share, slot);
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
                const int query = set * HELD + i;
                float *to = b.mem + GROUP + (query * SET_WARPS + unit / SETS) * (HD + 2);
                if (query < QUERIES) {
                    if (lane < 8)
#pragma unroll
                        for (int e = 0; e < HE; e++)
                            if (channel(e) < HD) to[channel(e)] = o[i][e];
                    if (lane == 0) to[HD] = peak[i], to[HD + 1] = sum[i];
                }
            }
        }
        meet();
        // To the owners of its channels: this block's sum of values, their highest score, sum of weights.
        for (int i = b.tid; i < QUERIES * (HD + 2); i += T) {
            const int query = i / (HD + 2), c = i % (HD + 2);
            const float *part = b.mem + GROUP + query * SET_WARPS * (HD + 2);
            float peak = NOTHING, out = 0.f;
#pragma unroll
            for (int g = 0; g < SET_WARPS; g++) peak = fmaxf(peak, part[g * (HD + 2) + HD]);
#pragma unroll
            for (int g = 0; g < SET_WARPS; g++) {
                const float *from = part + g * (HD + 2);
                out = fmaf(exp2f(from[HD] - peak), from[c], out);
            }
            write_number(b.place(SHARES + (share * P * GROUP_OF + query) * (HD + 2) + c), c == HD ? peak : out, b.exchange);
        }
        if (SHARES_OF > CL) meet();
    }
    constexpr int THREE = 3 * CHUNKS;  // of each of this block's channels
    auto channel_of = [&](int r) { return min(b.rank * RD + r, DM - 1); };
    b.take_from(P * RD * THREE, [&](int i) {
        const int p = i / (RD * THREE), r = i / THREE % RD, chunk = i % THREE / 3, which = i % 3;
        const int c = channel_of(r), head = c / HD, share = head / GROUP_OF * CHUNKS + chunk;
        const int query = p * GROUP_OF + head % GROUP_OF;
        return SHARES + (share * P * GROUP_OF + query) * (HD + 2) + (which ? HD - 1 + which : c % HD);
    }, [](int i) { return PARTIAL + i; });
    for (int unit = warp; unit < P * RD; unit += WARPS) {
        const float *from = b.mem + PARTIAL + unit * THREE;
        float peak = NOTHING, sum = 0.f, out = 0.f;
        for (int s = lane; s < CHUNKS; s += 32) peak = fmaxf(peak, from[3 * s + 1]);
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) peak = fmaxf(peak, __shfl_xor_sync(ALL, peak, mask));
        for (int s = lane; s < CHUNKS; s += 32) {
            float w = exp2f(from[3 * s + 1] - peak);
            sum = fmaf(w, from[3 * s + 2], sum), out = fmaf(w, from[3 * s], out);
        }
        sum = sum_over<32>(sum), out = sum_over<32>(out);
        if (lane == 0) b.send(y + unit / RD * YS + b.rank * RD + unit % RD, out / sum);
    }
    b.take_all<CL * RD, P>(Y, YS);
    b.mix<DM, P>(y, YS);
}
