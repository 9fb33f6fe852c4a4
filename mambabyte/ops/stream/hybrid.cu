// A whole model of any layers, byte after byte, in one launch; stream.cu is quicker for Mamba alone.
//
// A cluster of CL blocks runs one stream. Of every matrix a block has the same share of rows, and of
// every state the channels that its rows make. A block's matrices pass through a ring of tiles in its
// shared memory, in the order of their use: thread 0 asks for a tile where one has been used up, so
// that weights come in while the blocks wait for each other. Vectors that all rows need are sent to all
// blocks by st.async, which counts itself off at a barrier of the receiver.
//
//   Mamba (M)        in_proj, convolution => sums of x_proj => scan step => out_proj => x
//   attention (A, L) q, k, v => each block its share of the positions => owners of channels => out_proj
//   Mamba-2 (S)      in_proj, convolution => B, C, step sizes => state => norm, out_proj
//   delta rule (D)   q, k, v, convolution => (KDA: decays =>) state => norms, o_proj
//   MLP              up => down
//
// A buffer that an exchange fills may be filled by a fast block as soon as this block has sent its
// own part of the exchange before: it must not be one that is still read after that. So exchanges that
// follow each other fill different buffers, and x is changed in place by rows, each by its owner.
//
// Keys and values lie in global memory, rows of positions: row i is with block i % CL, which alone
// reads and writes it.
//
// SIZES (see cluster.cu) are given by hybrid.py, which packs the weights and so knows where they lie:
//   CL, S = 1, T, LAYERS, DM (d_model), DI (d_inner), N, R (dt_rank, 0: from all channels), K (taps),
//   H (hidden or 0), ACTIVATION, CENTERED, STEM (norm behind the embedding), EPS, TINY, SSD_EPS, CAP, HEADS, KVH,
//   HD, QKNORM; SH, SG, SN (Mamba-2's heads, groups, states); DH, DV (the delta rule's heads, values of
//   each); MIXED; M, A, SS, D, KDA (whether there are such layers), CACHES (how many of attention);
//   TILE and RING (floats, tiles), RESIDENT, STATE and BLOB (floats of a block's small weights, states
//   and tiles); where each small weight of a layer lies (MIX_GAIN, M_CONV, ...), and each vector in
//   shared memory (X, XN, ...).
// All arithmetic is float32.

template <int N_> struct Columns { static constexpr int n = N_; };
constexpr float NOTHING = -3e38f;  // below every score of attention

constexpr int pad(int n) { return n <= 96 ? parts(n, 32) * 32 : parts(n, 128) * 128; }
constexpr int most(int a, int b) { return a > b ? a : b; }

constexpr int RD = parts(DM, CL), DC = parts(DI, CL), HC = parts(H ? H : 1, CL), RV = V / CL;
constexpr int XR = R + 2 * N, G = power(N) < 16 ? power(N) : 16;
constexpr int KV = KVH * HD, RK = parts(KV, CL);
constexpr int GROUPS = T / 8 / HEADS, HE = parts(HD, 8);  // groups of 8 threads a head; channels each
constexpr int SB = 2 * SG * SN, RB = parts(SB, CL), RH = parts(SH, CL);
constexpr int DK = DM / DH, VC = parts(DH * DV, CL), RE = parts(DH, CL), RF = parts(DV, CL);
constexpr int GV = power(DK) < 16 ? power(DK) : 16, KE = parts(DK, GV);  // threads a value; keys each

// The table of a layer, in the resident weights; offsets in floats.
enum Entry { KIND, WINDOW, ADDED, KEPT_AS, SMALL, STATE_AT, CACHE, ENTRIES };
enum Kind { MAMBA, ATTENTION, MAMBA2, DELTA, KIMI };
// In the resident weights, behind the tables: gains of the norm behind the embedding; of that and before
// the first layer; bias of the head.
constexpr int STEM_GAIN = LAYERS * ENTRIES, FIRST = STEM_GAIN + DM, HEAD_BIAS = FIRST + DM;
constexpr int S_ROWS = 2 * DC + RB + RH, D_ROWS = 2 * RD + VC + RE;  // of in_proj; without the gates' rows
static_assert(S == 1 && V % CL == 0 && CL <= 32 && TILE % 4 == 0 && RESIDENT % 4 == 0, "sizes do not fit");
static_assert(!A || GROUPS > 0, "more heads than groups of threads");

extern "C" __global__ void __cluster_dims__(CL, 1, 1) __launch_bounds__(T, 1) stream_hybrid(
    const float *resident, const float *tiles, const int *ends, int n_tiles, const float *embedding,
    const float *final_norm, const unsigned char *tokens, const float *inputs, const float *first,
    const float *state_in, float *state_out, float *cache, const float *rotary, int rows, int begin,
    int stored, unsigned char *drawn, float *log_probs, float *hidden, unsigned *done, unsigned ticket,
    unsigned long long seed, unsigned long long position, int streams, int steps, int all,
    float temperature, int top_k, float top_p) {
    extern __shared__ __align__(128) char shared[];
    float *const mem = (float *)shared + TILE * RING + RESIDENT;
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int rank = blockIdx.x % CL, stream = blockIdx.x / CL;
    const Draw how = {drawn, seed, position, temperature, top_p, top_k};
    const float *small = mem - RESIDENT;
    float *x = mem + X, *xn = mem + XN, *local = mem + LOCAL, *y = mem + Y;
    int *byte = (int *)(mem + BYTE);
    const unsigned bars = shared_address(mem + BARS);

    // ------------------------------------------------------------------- exchanges
    int exchanges = 0;
    auto send_to = [&](float *to, int block, float value) {
        unsigned there = window(bars, block);
        send(shared_address(to) + there, bars + 8 * (exchanges & 1) + there, value);
    };
    auto send_all = [&](float *to, float value) {  // one thread
#pragma unroll 4
        for (int block = 0; block < CL; block++) send_to(to, block, value);
    };
    auto spread = [&](float *to, float value) {  // the lanes of a warp, which all have the value
        if (lane < CL) send_to(to, lane, value);
    };
    auto exchange = [&](int floats) {
        unsigned bar = bars + 8 * (exchanges & 1);
        if (tid == 0) expect(bar, 4 * floats);
        wait(bar, exchanges >> 1 & 1);
        exchanges++;
        __syncthreads();
    };

    // ------------------------------------------------------------------- the ring
    const float *own = tiles + (int64)rank * BLOB;
    const long long total = (long long)n_tiles * steps;
    long long asked = 0, used = 0;
    int next = 0;  // of a byte's tiles, the next one to ask for
    auto ask = [&]() {  // thread 0
        if (asked == total) return;
        int from = next ? ends[next - 1] : 0, floats = ends[next] - from, slot = (int)(asked % RING);
        unsigned bar = bars + 8 * (2 + slot);
        expect(bar, 4 * floats);
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                     ::"r"(shared_address((float *)shared + slot * TILE)), "l"(own + from), "r"(4 * floats), "r"(bar)
                     : "memory");
        asked++;
        next = next + 1 == n_tiles ? 0 : next + 1;
    };
    // done(row, product of the row and `from`, in all lanes) for this block's rows; `from` has numbers up
    // to a whole number of vectors. Ends with a barrier of the block.
    auto times = [&](auto columns, int n, const float *from, auto done) {
        constexpr int W = pad(decltype(columns)::n), FIT = TILE / W;
        for (int at = 0; at < n; at += FIT) {
            int slot = (int)(used % RING);
            wait(bars + 8 * (2 + slot), (unsigned)(used / RING & 1));
            const float *tile = (const float *)shared + slot * TILE;
            for (int r = warp; r < min(FIT, n - at); r += WARPS) {
                const float *w = tile + r * W;
                float sum[4] = {};
                if constexpr (W % 128 == 0) {
#pragma unroll 4
                    for (int j = 0; j < W / 128; j++) {
                        float4 a = ((const float4 *)w)[32 * j + lane];
                        float4 b = ((const float4 *)from)[32 * j + lane];
                        sum[0] = fmaf(a.x, b.x, sum[0]), sum[1] = fmaf(a.y, b.y, sum[1]);
                        sum[2] = fmaf(a.z, b.z, sum[2]), sum[3] = fmaf(a.w, b.w, sum[3]);
                    }
                } else {
#pragma unroll
                    for (int j = 0; j < W / 32; j++)
                        sum[j % 4] = fmaf(w[32 * j + lane], from[32 * j + lane], sum[j % 4]);
                }
                done(at + r, sum_over<32>((sum[0] + sum[1]) + (sum[2] + sum[3])));
            }
            __syncthreads();
            used++;
            if (tid == 0) ask();
        }
    };

    // ------------------------------------------------------------------- parts of layers
    auto norm = [&](bool centered, float eps, float *to) {  // of x; the weights are in what comes next
        float sum = 0.f, square = 0.f;
        for (int i = lane; i < DM; i += 32) sum += x[i];
        float mean = centered ? sum_over<32>(sum) * (1.f / DM) : 0.f;
        for (int i = lane; i < DM; i += 32) square = fmaf(x[i] - mean, x[i] - mean, square);
        float scale = rsqrtf(sum_over<32>(square) * (1.f / DM) + eps);
        if (to == x) __syncthreads();
        for (int i = tid; i < DM; i += T) to[i] = (x[i] - mean) * scale;
        __syncthreads();
    };
    // Causal convolution and SiLU of one channel; tail (K - 1, width), w (K).
    auto convolve = [&](const float *w, float bias, float *tail, int width, float value) {
        float sum = fmaf(w[K - 1], value, bias), old[K];
#pragma unroll
        for (int k = 0; k < K - 1; k++) {
            old[k] = tail[k * width];
            sum = fmaf(w[k], old[k], sum);
        }
#pragma unroll
        for (int k = 1; k < K - 1; k++) tail[(k - 1) * width] = old[k];
        if (K > 1) tail[(K > 1 ? K - 2 : 0) * width] = value;
        return sum * sigmoid(sum);
    };
    const float *own_small = small;
    const int *table = nullptr;
    // Row r of a branch goes to x; behind a layer's last branch with what the next layer adds before.
    auto add_row = [&](int gain, int bias, bool last) {
        return [&, gain, bias, last](int r, float v) {
            float value = fmaf(own_small[gain + r], v + own_small[bias + r], x[rank * RD + r]);
            if (last) {
                if (table[KEPT_AS] >= 0) {
                    if (lane == 0) mem[SLOT + table[KEPT_AS] * RD + r] = value;
                    __syncwarp();
                }
                if (table + ENTRIES < (const int *)small + LAYERS * ENTRIES && table[ENTRIES + ADDED] >= 0)
                    value = fmaf(own_small[SKIP + r], mem[SLOT + table[ENTRIES + ADDED] * RD + r], value);
                if (MIXED)
                    value = fmaf(own_small[EMBEDDED + r], mem[EMB + r], own_small[STREAM + r] * value);
            }
            __syncwarp();  // every lane has read x before the first one's number can come
            spread(x + rank * RD + r, value);
        };
    };
    auto biased = [&](int r, float v) {
        if (lane == 0) local[r] = v + own_small[OWN + r];
    };
    auto mix_row = add_row(MIX_GAIN, MIX_BIAS, H == 0);
    const int mine = max(0, min(RD, DM - rank * RD));  // channels of d_model that are this block's

    // ------------------------------------------------------------------- start
    if (tid == 0) {
        for (int i = 0; i < 2 + RING; i++)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bars + 8 * i), "r"(1) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async;" ::: "memory");
        for (int i = 0; i < RING; i++) ask();
    }
    for (int i = tid; i < RESIDENT; i += T)
        mem[i - RESIDENT] = resident[(int64)rank * RESIDENT + i];
    const int64 state_at = ((int64)stream * CL + rank) * STATE;
    for (int i = tid; i < STATE; i += T) mem[STATES + i] = state_in ? state_in[state_at + i] : 0.f;
    for (int i = tid; i < LOGIT - X; i += T) mem[X + i] = 0.f;
    for (int i = tid; i < V; i += T)
        mem[LOGIT + i] = first ? first[(int64)stream * V + i] : 0.f;
    __syncthreads();
    cluster_barrier();

#pragma unroll 1
    for (int t = 0; t < steps; t++) {
        const int64 step = (int64)stream * steps + t;
        const bool drawing = !tokens && !inputs;
        if (drawing)
            choose(how, mem + LOGIT, mem + PROB, mem + KEPT, byte, stream, streams, steps, t);
        const float *from = inputs ? inputs + step * DM
                                   : embedding + (int64)(drawing ? byte[0] : tokens[step]) * DM;
        for (int i = tid; i < DM; i += T) x[i] = from[i];
        __syncthreads();
        if (STEM) norm(false, TINY, x);
        for (int r = tid; r < mine; r += T)
            mem[EMB + r] = x[rank * RD + r] * small[STEM_GAIN + rank * RD + r];
        __syncthreads();
        for (int i = tid; i < DM; i += T) x[i] *= small[FIRST + i];
        __syncthreads();

#pragma unroll 1
        for (int layer = 0; layer < LAYERS; layer++) {
            table = (const int *)small + layer * ENTRIES;
            own_small = small + table[SMALL];
            float *state = mem + STATES + table[STATE_AT];
            const int kind = table[KIND];
            norm(CENTERED, EPS, xn);
            if (M && kind == MAMBA) {
                float *u = mem + U, *low = mem + LOW;
                times(Columns<DM>{}, 2 * DC, xn, biased);
                for (int c = tid; c < DC; c += T) {
                    u[c] = convolve(own_small + M_CONV + c * K, own_small[M_CONV_BIAS + c],
                                    state + DC * N + c, DC, local[c]);
                    local[DC + c] *= sigmoid(local[DC + c]);
                    if (R == 0) send_all(mem + ALL_U + rank * DC + c, u[c]);
                }
                __syncthreads();
                times(Columns<DC>{}, XR, u, [&](int r, float v) { spread(mem + PARTS + rank * XR + r, v); });
                exchange(CL * XR + (R == 0 ? CL * DC : 0));
                for (int i = tid; i < XR; i += T) {
                    float sum = 0.f;
                    for (int b = 0; b < CL; b++) sum += mem[PARTS + b * XR + i];
                    low[i] = sum;
                }
                __syncthreads();
                if constexpr (R == 0)
                    times(Columns<CL * DC>{}, DC, mem + ALL_U, [&](int r, float v) {
                        if (lane == 0) mem[STEP + r] = v;
                    });
                for (int start = 32 * warp; start < DC * G; start += T) {
                    const int g = lane % G, c = min((start + lane) / G, DC - 1);
                    const bool there = start + lane < DC * G;
                    float sum = 0.f, out = 0.f;
                    for (int r = g; r < R; r += G) sum = fmaf(own_small[M_DT + c * R + r], low[r], sum);
                    sum = R ? sum_over<G>(sum) : mem[STEP + c];
                    float dt = softplus(sum + own_small[M_DT_BIAS + c]);
                    for (int n = g; n < N; n += G) {
                        float h = fmaf(exp2f(dt * own_small[M_RATE + c * N + n]), state[c * N + n],
                                       dt * u[c] * low[R + n]);
                        if (there) state[c * N + n] = h;
                        out = fmaf(low[R + N + n], h, out);
                    }
                    out = fmaf(own_small[M_SKIP + c], u[c], sum_over<G>(out)) * local[DC + c];
                    for (int block = g; there && block < CL; block += G)
                        send_to(y + rank * DC + c, block, out);
                }
                exchange(CL * DC);
                times(Columns<CL * DC>{}, RD, y, mix_row);
            }
            if (A && kind == ATTENTION) {
                float *q = mem + Q, *key = mem + KEY, *value = mem + VALUE;
                times(Columns<DM>{}, RD + 2 * RK, xn, [&](int r, float v) {
                    float *to = r < RD ? q + rank * RD + r : r < RD + RK ? key + rank * RK + r - RD
                                       : value + rank * RK + r - RD - RK;
                    spread(to, v + own_small[OWN + r]);
                });
                exchange(CL * (RD + 2 * RK));
                const int now = stored + t, low_row = max(begin, now - table[WINDOW] + 1);
                const int64 size = (int64)(rows / CL) * KV;  // of one block's keys of one layer
                float *keys = cache + (((int64)stream * CACHES + table[CACHE]) * 2 * CL + rank) * size;
                float *values = keys + CL * size;
                for (int head = warp; head < HEADS + KVH; head += WARPS) {
                    float *v = head < HEADS ? q + head * HD : key + (head - HEADS) * HD, square = 0.f;
                    for (int c = lane; c < HD; c += 32) square = fmaf(v[c], v[c], square);
                    float scale = QKNORM ? rsqrtf(sum_over<32>(square) * (1.f / HD) + TINY) : 1.f;
                    if (head < HEADS) scale *= own_small[A_GAIN + head];
                    for (int c = lane; c < HD / 2; c += 32) {
                        float a = v[c] * scale, b = v[c + HD / 2] * scale;
                        float cosine = rotary[t * HD + c], sine = rotary[t * HD + HD / 2 + c];
                        v[c] = a * cosine - b * sine, v[c + HD / 2] = a * sine + b * cosine;
                    }
                }
                __syncthreads();
                if (now % CL == rank)
                    for (int i = tid; i < KV; i += T) {
                        keys[(int64)(now / CL) * KV + i] = key[i];
                        values[(int64)(now / CL) * KV + i] = value[i];
                    }
                __syncthreads();
                {
                    const int group = tid / 8, part = tid % 8, head = group % HEADS, i = group / HEADS;
                    const int at = head / (HEADS / KVH) * HD;
                    float qs[HE], o[HE], peak = NOTHING, sum = 0.f;
                    auto channel = [&](int e) {  // neighbours where 8 threads take whole float4
                        return HD % 32 == 0 ? 4 * part + 32 * (e / 4) + e % 4 : part + 8 * e;
                    };
#pragma unroll
                    for (int e = 0; e < HE; e++) {
                        qs[e] = channel(e) < HD ? q[head * HD + channel(e)] : 0.f;
                        o[e] = 0.f;
                    }
                    const int first_slot = low_row / CL, slots = now / CL - first_slot + 1;
#pragma unroll 2
                    for (int s = 0; s < slots; s += GROUPS) {  // as often in every thread
                        const int slot = first_slot + min(s + i, slots - 1), row = slot * CL + rank;
                        const bool seen = i < GROUPS && s + i < slots && row >= low_row && row <= now;
                        const float *k = keys + (int64)(seen ? slot : first_slot) * KV + at;
                        const float *v = values + (int64)(seen ? slot : first_slot) * KV + at;
                        float ks[HE], vs[HE], score = 0.f;
#pragma unroll
                        for (int e = 0; e < HE; e++) {
                            bool in = seen && channel(e) < HD;
                            ks[e] = in ? k[channel(e)] : 0.f, vs[e] = in ? v[channel(e)] : 0.f;
                            score = fmaf(qs[e], ks[e], score);
                        }
                        score = sum_over<8>(score);
                        if (seen) {
                            float top = fmaxf(peak, score), keep = exp2f(peak - top), w = exp2f(score - top);
                            sum = fmaf(sum, keep, w), peak = top;
#pragma unroll
                            for (int e = 0; e < HE; e++) o[e] = fmaf(o[e], keep, w * vs[e]);
                        }
                    }
                    float *to = mem + GROUP + (head * GROUPS + i) * (HD + 2);
                    if (i < GROUPS) {
#pragma unroll
                        for (int e = 0; e < HE; e++)
                            if (channel(e) < HD) to[channel(e)] = o[e];
                        if (part == 0) to[HD] = peak, to[HD + 1] = sum;
                    }
                }
                __syncthreads();
                for (int idx = tid; idx < DM; idx += T) {
                    const float *part = mem + GROUP + idx / HD * GROUPS * (HD + 2);
                    float peak = NOTHING, sum = 0.f, out = 0.f;
                    for (int g = 0; g < GROUPS; g++) peak = fmaxf(peak, part[g * (HD + 2) + HD]);
                    for (int g = 0; g < GROUPS; g++) {
                        const float *from = part + g * (HD + 2);
                        float w = from[HD] == NOTHING ? 0.f : exp2f(from[HD] - peak);
                        sum = fmaf(w, from[HD + 1], sum), out = fmaf(w, from[idx % HD], out);
                    }
                    send_to(mem + SHARE + rank * RD + idx % RD, idx / RD, out);
                    if (idx % HD == 0) {
                        send_all(mem + PEAK + rank * HEADS + idx / HD, peak);
                        send_all(mem + SUM + rank * HEADS + idx / HD, sum);
                    }
                }
                exchange(CL * (mine + 2 * HEADS));
                for (int r = tid; r < mine; r += T) {
                    const int head = (rank * RD + r) / HD;
                    float peak = NOTHING, sum = 0.f, out = 0.f;
                    for (int b = 0; b < CL; b++) peak = fmaxf(peak, mem[PEAK + b * HEADS + head]);
                    for (int b = 0; b < CL; b++) {
                        float w = exp2f(mem[PEAK + b * HEADS + head] - peak);
                        sum = fmaf(w, mem[SUM + b * HEADS + head], sum);
                        out = fmaf(w, mem[SHARE + b * RD + r], out);
                    }
                    send_all(y + rank * RD + r, out / sum);
                }
                exchange(DM);
                times(Columns<DM>{}, RD, y, mix_row);
            }
            if (SS && kind == MAMBA2) {
                float *bc = mem + BC, *steps_of = mem + DTS;
                times(Columns<DM>{}, S_ROWS, xn, biased);  // x, z, a share of B and C and of the step sizes
                for (int c = tid; c < DC + RB; c += T) {
                    const int at = c < DC ? c : c + DC;
                    float out = convolve(own_small + S_CONV + c * K, own_small[S_CONV_BIAS + c],
                                         state + DC * SN + c, DC + RB, local[at]);
                    if (c < DC)
                        local[c] = out;
                    else
                        send_all(bc + rank * RB + c - DC, out);
                }
                for (int h = tid; h < RH; h += T)
                    send_all(steps_of + rank * RH + h, local[2 * DC + RB + h]);
                exchange(CL * (RB + RH));
                for (int start = 32 * warp; start < DC * 16; start += T) {
                    const int g = lane % 16, c = min((start + lane) / 16, DC - 1);
                    const bool there = start + lane < DC * 16;
                    const int h = min((rank * DC + c) / (DI / SH), SH - 1), group = h / (SH / SG);
                    const float *B = bc + group * SN, *C = bc + (SG + group) * SN;
                    float dt = softplus(steps_of[h] + own_small[S_DT_BIAS + h]), out = 0.f;
                    float decay = exp2f(dt * own_small[S_RATE + h]), in = dt * local[c];
                    for (int n = g; n < SN; n += 16) {
                        float next_h = fmaf(decay, state[c * SN + n], in * B[n]);
                        if (there) state[c * SN + n] = next_h;
                        out = fmaf(C[n], next_h, out);
                    }
                    float z = local[DC + c];
                    out = fmaf(own_small[S_SKIP + h], local[c], sum_over<16>(out)) * z * sigmoid(z);
                    if (there && g < CL)
                        for (int block = g; block < CL; block += 16) send_to(y + rank * DC + c, block, out);
                }
                exchange(CL * DC);
                for (int group = warp; group < SG; group += WARPS) {
                    float *part = y + group * (DI / SG), square = 0.f;
                    for (int c = lane; c < DI / SG; c += 32) square = fmaf(part[c], part[c], square);
                    float scale = rsqrtf(sum_over<32>(square) * (1.f / (DI / SG)) + SSD_EPS);
                    for (int c = lane; c < DI / SG; c += 32) part[c] *= scale;
                }
                __syncthreads();
                times(Columns<CL * DC>{}, RD, y, mix_row);
            }
            if ((D || KDA) && kind >= DELTA) {
                const bool kimi = KDA && (!D || kind == KIMI);
                float *q = mem + Q, *key = mem + KEY, *decay = mem + DTS;
                float *gate = local + D_ROWS + (kimi ? 0 : RE);
                times(Columns<DM>{}, D_ROWS + (kimi ? 2 * RF : RE + VC), xn, biased);  // q, k, v, beta; gates
                for (int c = tid; c < 2 * RD + VC; c += T) {
                    float out = convolve(own_small + D_CONV + c * K, 0.f, state + VC * DK + c, 2 * RD + VC,
                                         local[c]);
                    if (c < 2 * RD)
                        send_all((c < RD ? q : key - RD) + rank * RD + c, out);
                    else
                        local[c] = out;
                }
                for (int r = tid; r < RE; r += T) {
                    send_all(mem + BETA + rank * RE + r, local[D_ROWS - RE + r]);
                    if (!kimi) send_all(decay + rank * RE + r, local[D_ROWS + r]);
                }
                for (int r = tid; kimi && r < RF; r += T) {
                    send_all(mem + F + rank * RF + r, local[D_ROWS + r]);
                    send_all(mem + GL + rank * RF + r, local[D_ROWS + RF + r]);
                }
                exchange(CL * (2 * RD + RE + (kimi ? 2 * RF : RE)));
                if constexpr (KDA)
                    if (kimi) {
                        times(Columns<CL * RF>{}, RD, mem + F, [&](int r, float v) {
                            float dt = softplus(v + own_small[D_DT_BIAS + r]);
                            spread(decay + rank * RD + r, exp2f(dt * own_small[D_RATE + r]));
                        });
                        times(Columns<CL * RF>{}, VC, mem + GL, [&](int r, float v) {
                            if (lane == 0) gate[r] = sigmoid(v + own_small[D_GATE + r]);
                        });
                        exchange(CL * RD);
                    }
                for (int head = warp; head < 2 * DH; head += WARPS) {  // |q| = 1 / sqrt(DK), |k| = 1
                    float *v = head < DH ? q + head * DK : key + (head - DH) * DK, square = 0.f;
                    for (int c = lane; c < DK; c += 32) square = fmaf(v[c], v[c], square);
                    float scale = rsqrtf(sum_over<32>(square) + 1e-6f);
                    if (head < DH) scale *= rsqrtf((float)DK);
                    for (int c = lane; c < DK; c += 32) v[c] *= scale;
                }
                __syncthreads();
                for (int start = 32 * warp; start < VC * GV; start += T) {
                    const int g = lane % GV, j = min((start + lane) / GV, VC - 1);
                    const bool there = start + lane < VC * GV;
                    const int h = min((rank * VC + j) / DV, DH - 1);
                    float s[KE], read = 0.f, out = 0.f, a = 1.f;
                    if (!kimi) a = exp2f(softplus(decay[h] + own_small[D_DT_BIAS + h]) * own_small[D_RATE + h]);
#pragma unroll
                    for (int e = 0; e < KE; e++) {
                        const int k = g + GV * e, at = h * DK + min(k, DK - 1);
                        s[e] = k < DK ? state[j * DK + k] * (kimi ? decay[at] : a) : 0.f;
                        read = fmaf(key[at], s[e], read);
                    }
                    float write = (local[2 * RD + j] - sum_over<GV>(read)) * sigmoid(mem[BETA + h]);
#pragma unroll
                    for (int e = 0; e < KE; e++) {
                        const int k = g + GV * e, at = h * DK + min(k, DK - 1);
                        s[e] = fmaf(key[at], write, s[e]);
                        out = fmaf(q[at], k < DK ? s[e] : 0.f, out);
                        if (there && k < DK) state[j * DK + k] = s[e];
                    }
                    out = sum_over<GV>(out);
                    float open = kimi ? gate[j] : gate[j] * sigmoid(gate[j]);
                    for (int block = g; there && block < CL; block += GV) {
                        send_to(y + rank * VC + j, block, out);
                        send_to(mem + GATES + rank * VC + j, block, open);
                    }
                }
                exchange(2 * CL * VC);
                for (int head = warp; head < DH; head += WARPS) {
                    float *v = y + head * DV, *open = mem + GATES + head * DV, square = 0.f;
                    for (int c = lane; c < DV; c += 32) square = fmaf(v[c], v[c], square);
                    float scale = rsqrtf(sum_over<32>(square) * (1.f / DV) + 1e-5f);
                    for (int c = lane; c < DV; c += 32) v[c] *= scale * open[c];
                }
                __syncthreads();
                times(Columns<CL * VC>{}, RD, y, mix_row);
            }
            exchange(CL * RD);
            if constexpr (H > 0) {
                norm(CENTERED, EPS, xn);
                times(Columns<DM>{}, HC, xn, [&](int r, float v) {
                    spread(mem + HIDDEN + rank * HC + r, activate(v + own_small[UP_BIAS + r]));
                });
                exchange(CL * HC);
                times(Columns<CL * HC>{}, RD, mem + HIDDEN, add_row(MLP_GAIN, MLP_BIAS, true));
                exchange(CL * RD);
            }
        }

        norm(CENTERED, EPS, xn);
        if (hidden && rank == 0)
            for (int i = tid; i < DM; i += T)
                hidden[step * DM + i] = fmaf(xn[i], final_norm[i], final_norm[DM + i]);
        if (log_probs) {
            times(Columns<DM>{}, RV, xn, [&](int r, float v) {
                float value = v + small[HEAD_BIAS + r];
                if (CAP > 0.f)  // CAP tanh(value / CAP)
                    value = CAP * (1.f - 2.f / (1.f + __expf(value * (2.f / CAP))));
                spread(mem + LOGIT + rank * RV + r, value);
            });
            exchange(V);
            if (all || t + 1 == steps)
                write_log_probs(mem + LOGIT, log_probs, stream, streams, all ? steps : 1, all ? t : 0);
            if (done && t + 1 == steps && blockIdx.x == 0 && warp == 0) tell(done, ticket);
        }
        __syncthreads();
    }

    for (int i = tid; i < STATE; i += T) state_out[state_at + i] = mem[STATES + i];
    cluster_barrier();  // nobody leaves while others may still send to it
}
