// A whole model of any layers, byte after byte, in one launch; stream.cu is quicker for Mamba alone.
//
// CL blocks, one a multiprocessor and all running at a time (a cooperative launch), read one text. Of
// every matrix a block has the same share of rows, and of every state the channels that its rows make.
// Matrices lie in shared memory as far as they fit; the others pass through a ring in it, in the order
// of their use: a thread asks for a tile where its place has become free, so that weights come in while
// the blocks wait for each other. What one block computes and all need is exchanged through L2.
//
//   Mamba (M)        in_proj, convolution => x_proj => scan step => out_proj => x
//   attention (A, L) q, k, v => each block its share of the positions => owners of channels => out_proj
//   Mamba-2 (S)      in_proj, convolution => B, C, step sizes => state => norm, out_proj
//   delta rule (D)   q, k, v, convolution => (KDA: decays =>) state => norms, o_proj
//   MLP              up => down
//
// An exchange (=>): every number goes to L2 beside the number of its exchange, 8 bytes written as one,
// and whoever needs it looks until that number is there. So no barrier and no fence is paid for. A place
// is written again two exchanges later, by a block that has all numbers of the exchange between, which
// each block sent after it had taken in those of the first. For that every block sends in every
// exchange and waits for all blocks: shares are padded to equal sizes.
//
// Keys and values lie in global memory, rows of positions: row i is with block i % CL, which alone
// reads and writes it.
//
// SIZES (see cluster.cu) are given by packing.py, which packs the weights and so knows where they lie:
//   CL, S = 1, T, LAYERS, DM (d_model), DI (d_inner), N, R (dt_rank, 0: from all channels), K (taps),
//   H (hidden or 0), ACTIVATION, CENTERED, STEM (norm behind the embedding), EPS, TINY, SSD_EPS, CAP, HEADS, KVH,
//   HD, QKNORM; SH, SG, SN (Mamba-2's heads, groups, states); DH, DV (the delta rule's heads, values of
//   each); MIXED; GUIDED (the head has one row more, a gate); M, A, SS, D, KDA (whether there are such layers), CACHES (how many of attention);
//   TILE (floats of a tile of several rows), TILES (tiles of a byte), SPACE, RESIDENT, STATE and BLOB
//   (floats of a block's tiles in shared memory, small weights, states and all tiles); where each small
//   weight of a layer lies (MIX_GAIN, M_CONV, ...), and each vector in shared memory (X, XN, ...).
// All arithmetic is float32.

template <int N_, bool NORMED_ = false> struct Columns {
    static constexpr int n = N_;
    static constexpr bool normed = NORMED_;  // the vector is still to be divided by its RMS
};
constexpr float NOTHING = -3e38f;  // below every score of attention

constexpr int pad(int n) { return n <= 96 ? parts(n, 32) * 32 : parts(n, 128) * 128; }
constexpr int most(int a, int b) { return a > b ? a : b; }

constexpr int RD = parts(DM, CL), DC = parts(DI, CL), HC = parts(H ? H : 1, CL), RV = parts(V + GUIDED, CL);
constexpr int XR = R + 2 * N, RX = parts(XR, CL), G = power(N) < 16 ? power(N) : 16;
constexpr int KV = KVH * HD, RK = parts(KV, CL);
constexpr int HEAD_WARPS = most(1, WARPS / HEADS), ROWS = 4 * HEAD_WARPS;  // a head's; keys at a time
constexpr int HE = parts(HD, 8);  // 8 threads a key: channels of each
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
static_assert(S == 1 && SPACE % 4 == 0 && RESIDENT % 4 == 0, "sizes do not fit");

constexpr int HINT = V + 1;  // numbers of a byte's hints

struct Tile { int from, floats, place, gap; };  // gap: see ask; 0 for a tile that stays
struct Number { unsigned bits, exchange; };

inline void write_number(Number *to, float value, unsigned exchange) {
    asm volatile("st.volatile.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(__float_as_uint(value)), "r"(exchange)
                 : "memory");
}

inline Number look(const Number *from) {
    Number n;
    asm volatile("ld.volatile.global.v2.u32 {%0, %1}, [%2];" : "=r"(n.bits), "=r"(n.exchange) : "l"(from)
                 : "memory");
    return n;
}

// Grid CL blocks of T threads. `numbers` are exchanged, from exchange number `exchange` on; for the rest
// see stream.cu. `inputs` (streams, steps, DM) are embedded bytes, in place of tokens; `hints` (streams,
// steps, HINT) what a guided model embeds beside tokens: log-probabilities, which it also adds to its
// logits, times its gate, and in the bytes of one number more the best byte and its kind.
extern "C" __global__ void __launch_bounds__(T, 1) stream_hybrid(
    Number *numbers, unsigned exchange, const float *resident, const float *tiles, const Tile *schedule,
    const float *embedding, const float *best, const float *kinds, const float *final_norm, const unsigned char *tokens, const float *inputs,
    const float *hints, const float *first, const float *state_in, float *state_out, float *cache, const float *rotary,
    int rows, int begin, int stored, unsigned char *drawn, float *log_probs, float *hidden,
    unsigned *done, unsigned ticket, unsigned long long seed, unsigned long long position, int streams,
    int steps, int all, float temperature, int top_k, float top_p) {
    extern __shared__ __align__(128) char shared[];
    float *const mem = (float *)shared + SPACE + RESIDENT;
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, rank = blockIdx.x;
    const Draw how = {drawn, seed, position, temperature, top_p, top_k};
    const float *small = mem - RESIDENT;
    float *x = mem + X, *xn = mem + XN, *local = mem + LOCAL, *y = mem + Y;
    int *byte = (int *)(mem + BYTE);
    const unsigned bars = shared_address(mem + BARS);

    // ------------------------------------------------------------------- exchanges
    auto place = [&](int at) { return numbers + (exchange & 1) * PLACES + at; };
    auto send = [&](float *to, float value) {  // to that vector in all blocks
#pragma unroll
        for (int copy = 0; copy < COPIES; copy++)
            write_number(place(copy * VECTORS + (int)(to - mem)), value, exchange);
    };
    // Numbers at `from(i)`, i below n, to `to(i)` in shared memory. Ends with a barrier of the block.
    auto take_from = [&](int n, auto from, auto to) {
        constexpr int AT_ONCE = 4;
        for (int start = tid; start < n; start += AT_ONCE * T) {
            Number got[AT_ONCE];
            bool there;
            do {
                there = true;
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++)
                    if (start + j * T < n) got[j] = look(place(from(start + j * T)));
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++)
                    if (start + j * T < n) there = there && got[j].exchange == exchange;
            } while (!there);
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
                if (start + j * T < n) mem[to(start + j * T)] = __uint_as_float(got[j].bits);
        }
        exchange++;
        __syncthreads();
    };
    auto take = [&](int n, auto where) {  // of vectors
        take_from(n, [&](int i) { return rank % COPIES * VECTORS + where(i); }, where);
    };
    auto take_all = [&](int to, int n) { take(n, [&](int i) { return to + i; }); };

    // ------------------------------------------------------------------- tiles
    const float *own = tiles + (int64)rank * BLOB;
    const Tile *plan = (const Tile *)(mem + SCHEDULE);
    auto fetch = [&](int i) {
        unsigned bar = bars + 8 * i;
        expect(bar, 4 * plan[i].floats);
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                     ::"r"(shared_address((float *)shared + plan[i].place)), "l"(own + plan[i].from),
                     "r"(4 * plan[i].floats), "r"(bar) : "memory");
    };
    // Of a byte's tiles, the next to ask for and to use; of all bytes', how many of the ring's were asked
    // for and used. One of these takes the place of the gap-th before it.
    const int64 total = (int64)streams * steps;
    int64 asked = 0, used = 0, lap = 0;  // lap: of which byte the next one is
    int next = 0, now_used = 0;
    unsigned parity = 0;  // of the ring's barriers
    constexpr int ASKER = T - 32;  // a thread of the warp that has the fewest rows
    auto ask = [&]() {
        while (lap < total) {
            const int gap = plan[next].gap;
            if (gap && used <= asked - gap) return;
            if (gap || lap == 0) fetch(next);
            asked += gap > 0;
            if (++next == TILES) next = 0, lap = asked ? lap + 1 : total;
        }
    };
    // done(row, product of the row and `from`, in all lanes) for this block's rows; `from` has numbers up
    // to a whole number of vectors. Ends with a barrier of the block.
    auto times = [&](auto columns, int n, const float *from, auto done) {
        constexpr int W = pad(decltype(columns)::n), FIT = most(1, TILE / W);
        constexpr bool NORMED = decltype(columns)::normed;
        for (int at = 0; at < n; at += FIT) {
            const Tile here = plan[now_used];
            wait(bars + 8 * now_used, here.gap ? parity : 0);
            const float *tile = (const float *)shared + here.place;
            for (int r = warp; r < min(FIT, n - at); r += WARPS) {
                const float *w = tile + r * W;
                float sum[4] = {}, square[4] = {};
                if constexpr (W % 128 == 0) {
#pragma unroll 4
                    for (int j = 0; j < W / 128; j++) {
                        float4 a = ((const float4 *)w)[32 * j + lane];
                        float4 b = ((const float4 *)from)[32 * j + lane];
                        sum[0] = fmaf(a.x, b.x, sum[0]), sum[1] = fmaf(a.y, b.y, sum[1]);
                        sum[2] = fmaf(a.z, b.z, sum[2]), sum[3] = fmaf(a.w, b.w, sum[3]);
                        if (NORMED) {
                            square[0] = fmaf(b.x, b.x, square[0]), square[1] = fmaf(b.y, b.y, square[1]);
                            square[2] = fmaf(b.z, b.z, square[2]), square[3] = fmaf(b.w, b.w, square[3]);
                        }
                    }
                } else {
#pragma unroll
                    for (int j = 0; j < W / 32; j++) {
                        float b = from[32 * j + lane];
                        sum[j % 4] = fmaf(w[32 * j + lane], b, sum[j % 4]);
                        if (NORMED) square[j % 4] = fmaf(b, b, square[j % 4]);
                    }
                }
                float value = sum_over<32>((sum[0] + sum[1]) + (sum[2] + sum[3]));
                if (NORMED) {
                    float whole = sum_over<32>((square[0] + square[1]) + (square[2] + square[3]));
                    value *= rsqrtf(whole * (1.f / decltype(columns)::n) + EPS);
                }
                done(at + r, value);
            }
            __syncthreads();
            now_used++;
            if (here.gap) {
                used++;
                if (tid == ASKER) ask();
            }
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
    // As times, of x behind a layer's norm. An RMS norm divides the products, while they are summed.
    auto times_normed = [&](int n, auto done) {
        if constexpr (CENTERED) {
            norm(true, EPS, xn);
            times(Columns<DM>{}, n, xn, done);
        } else {
            times(Columns<DM, true>{}, n, x, done);
        }
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
            if (lane == 0) send(x + rank * RD + r, value);
        };
    };
    auto biased = [&](int r, float v) {
        if (lane == 0) local[r] = v + own_small[OWN + r];
    };
    auto mix_row = add_row(MIX_GAIN, MIX_BIAS, H == 0);
    const int mine = max(0, min(RD, DM - rank * RD));  // channels of d_model that are this block's

    // ------------------------------------------------------------------- start
    for (int i = tid; i < 4 * TILES; i += T) ((int *)plan)[i] = ((const int *)schedule)[i];
    if (tid == 0) {
        for (int i = 0; i < TILES; i++)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bars + 8 * i), "r"(1) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async;" ::: "memory");
    }
    __syncthreads();
    if (tid == ASKER) ask();
    for (int i = tid; i < RESIDENT; i += T)
        mem[i - RESIDENT] = resident[(int64)rank * RESIDENT + i];
    for (int i = tid; i < LOGIT - X; i += T) mem[X + i] = 0.f;

#pragma unroll 1
    for (int text = 0, t = 0; text < streams; t + 1 < steps ? t++ : (t = 0, text++)) {
        const int64 step = (int64)text * steps + t;
        const int64 state_at = ((int64)text * CL + rank) * STATE;
        if (t == 0) {
            __syncthreads();  // the text before is at its end in all threads
            for (int i = tid; i < STATE; i += T) mem[STATES + i] = state_in ? state_in[state_at + i] : 0.f;
            for (int i = tid; first && i < V; i += T) mem[LOGIT + i] = first[(int64)text * V + i];
        }
        __syncthreads();
        const bool drawing = !tokens && !inputs;
        if (drawing) choose(how, mem + LOGIT, mem + PROB, mem + KEPT, byte, text, streams, steps, t);
        const float *from = inputs ? inputs + step * DM
                                   : embedding + (int64)(drawing ? byte[0] : tokens[step]) * DM;
        for (int i = tid; i < DM; i += T) x[i] = from[i];
        for (int i = tid; A && i < HD; i += T) mem[TURN + i] = rotary[(int64)t * HD + i];
        __syncthreads();
        if (GUIDED) {  // the tile is passed by in any case
            const float *hint = hints + step * HINT;
            for (int i = tid; hints && i < V; i += T) {  // once, as they may lie with the host
                mem[HINTS + i] = hint[i];
                mem[LIKELY + i] = __expf(0.5f * mem[HINTS + i]);
            }
            const unsigned which = hints && tid < mine ? __float_as_uint(hint[V]) : 0;
            for (int r = tid; hints && r < mine; r += T) {
                const int c = rank * RD + r;
                local[r] = x[c] + best[(which & 255) * DM + c] + kinds[(which >> 8 & 255) * DM + c];
            }
            __syncthreads();
            times(Columns<V>{}, RD, mem + LIKELY, [&](int r, float v) {
                if (hints && lane == 0) send(x + rank * RD + r, r < mine ? v + local[r] : 0.f);
            });
            if (hints) take_all(X, CL * RD);
        }
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
            if (M && kind == MAMBA) {
                float *all_u = mem + ALL_U, *u = all_u + rank * DC, *low = mem + LOW;
                times_normed(2 * DC, biased);
                for (int c = tid; c < DC; c += T) {
                    send(u + c, convolve(own_small + M_CONV + c * K, own_small[M_CONV_BIAS + c],
                                         state + DC * N + c, DC, local[c]));
                    local[DC + c] *= sigmoid(local[DC + c]);
                }
                take_all(ALL_U, CL * DC);
                times(Columns<CL * DC>{}, RX, all_u, [&](int r, float v) {
                    if (lane == 0) send(low + rank * RX + r, v);
                });
                if constexpr (R == 0)
                    times(Columns<CL * DC>{}, DC, all_u, [&](int r, float v) {
                        if (lane == 0) mem[STEP + r] = v;
                    });
                take_all(LOW, CL * RX);
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
                    if (there && g == 0) send(y + rank * DC + c, out);
                }
                take_all(Y, CL * DC);
                times(Columns<CL * DC>{}, RD, y, mix_row);
            }
            if (A && kind == ATTENTION) {
                float *q = mem + Q, *key = mem + KEY, *value = mem + VALUE;
                const int now = stored + t, low_row = max(begin, now - table[WINDOW] + 1);
                const int64 size = (int64)(rows / CL) * KV;  // of one block's keys of one layer
                float *keys = cache + (((int64)text * CACHES + table[CACHE]) * 2 * CL + rank) * size;
                float *values = keys + CL * size;
                const int first_slot = low_row / CL, slots = now / CL - first_slot + 1;
                auto channel = [&](int e) {  // neighbours where 8 threads take whole float4
                    return HD % 32 == 0 ? 4 * (lane % 8) + 32 * (e / 4) + e % 4 : lane % 8 + 8 * e;
                };
                float ks[HE], vs[HE];
                // Slot s of those that warp `unit` looks at, here 8 threads': its row, or -1. What was stored
                // before this byte is fetched.
                auto fetch_row = [&](int unit, int s) {
                    const int i = s + 4 * (unit / HEADS) + lane / 8, row = (first_slot + i) * CL + rank;
                    const bool seen = i < slots && row >= low_row && row <= now, before = seen && row < now;
                    const int at = unit % HEADS / (HEADS / KVH) * HD;
                    const float *k = keys + (int64)(before ? first_slot + i : 0) * KV + at;
                    const float *v = k + CL * size;
#pragma unroll
                    for (int e = 0; e < HE; e++) {
                        bool in = before && channel(e) < HD;
                        ks[e] = in ? k[channel(e)] : 0.f, vs[e] = in ? v[channel(e)] : 0.f;
                    }
                    return seen ? row : -1;
                };
                int row = warp < HEADS * HEAD_WARPS ? fetch_row(warp, 0) : -1;  // while q comes to be
                times_normed(RD + 2 * RK, [&](int r, float v) {
                    float *to = r < RD ? q + rank * RD + r : r < RD + RK ? key + rank * RK + r - RD
                                       : value + rank * RK + r - RD - RK;
                    if (lane == 0) send(to, v + own_small[OWN + r]);
                });
                take(CL * (RD + 2 * RK), [](int i) {
                    return i < CL * RD ? Q + i : i < CL * (RD + RK) ? KEY + i - CL * RD : VALUE + i - CL * (RD + RK);
                });
                for (int head = warp; head < HEADS + KVH; head += WARPS) {
                    float *v = head < HEADS ? q + head * HD : key + (head - HEADS) * HD, square = 0.f;
                    for (int c = lane; c < HD; c += 32) square = fmaf(v[c], v[c], square);
                    float scale = QKNORM ? rsqrtf(sum_over<32>(square) * (1.f / HD) + TINY) : 1.f;
                    if (head < HEADS) scale *= own_small[A_GAIN + head];
                    for (int c = lane; c < HD / 2; c += 32) {
                        float a = v[c] * scale, b = v[c + HD / 2] * scale;
                        float cosine = mem[TURN + c], sine = mem[TURN + HD / 2 + c];
                        v[c] = a * cosine - b * sine, v[c + HD / 2] = a * sine + b * cosine;
                    }
                }
                __syncthreads();
                if (now % CL == rank)
                    for (int i = tid; i < KV; i += T) {
                        keys[(int64)(now / CL) * KV + i] = key[i];
                        values[(int64)(now / CL) * KV + i] = value[i];
                    }
#pragma unroll 1
                for (int unit = warp; unit < HEADS * HEAD_WARPS; unit += WARPS) {
                    const int head = unit % HEADS, at = head / (HEADS / KVH) * HD;
                    float qs[HE], o[HE], peak = NOTHING, sum = 0.f;
#pragma unroll
                    for (int e = 0; e < HE; e++) {
                        qs[e] = channel(e) < HD ? q[head * HD + channel(e)] : 0.f;
                        o[e] = 0.f;
                    }
#pragma unroll 1
                    for (int s = 0; s < slots; s += ROWS) {
                        if (s > 0 || unit != warp) row = fetch_row(unit, s);
                        float score = 0.f;
#pragma unroll
                        for (int e = 0; e < HE; e++) {
                            if (row == now && channel(e) < HD) ks[e] = key[at + channel(e)], vs[e] = value[at + channel(e)];
                            score = fmaf(qs[e], ks[e], score);
                        }
                        score = sum_over<8>(score);
                        if (row >= 0) {
                            float top = fmaxf(peak, score), keep = exp2f(peak - top), w = exp2f(score - top);
                            sum = fmaf(sum, keep, w), peak = top;
#pragma unroll
                            for (int e = 0; e < HE; e++) o[e] = fmaf(o[e], keep, w * vs[e]);
                        }
                    }
#pragma unroll
                    for (int mask = 8; mask < 32; mask *= 2) {  // the warp's four shares
                        float other = __shfl_xor_sync(ALL, peak, mask), top = fmaxf(peak, other);
                        float keep = exp2f(peak - top), add = exp2f(other - top);
                        peak = top, sum = fmaf(sum, keep, add * __shfl_xor_sync(ALL, sum, mask));
#pragma unroll
                        for (int e = 0; e < HE; e++)
                            o[e] = fmaf(o[e], keep, add * __shfl_xor_sync(ALL, o[e], mask));
                    }
                    float *to = mem + GROUP + (head * HEAD_WARPS + unit / HEADS) * (HD + 2);
                    if (lane < 8)
#pragma unroll
                        for (int e = 0; e < HE; e++)
                            if (channel(e) < HD) to[channel(e)] = o[e];
                    if (lane == 0) to[HD] = peak, to[HD + 1] = sum;
                }
                __syncthreads();
                // To the owner of each channel: this block's sum of values, their highest score, sum of weights.
                for (int idx = tid; idx < CL * RD; idx += T) {
                    const float *part = mem + GROUP + min(idx, DM - 1) / HD * HEAD_WARPS * (HD + 2);
                    float peak = NOTHING, sum = 0.f, out = 0.f;
#pragma unroll
                    for (int g = 0; g < HEAD_WARPS; g++) peak = fmaxf(peak, part[g * (HD + 2) + HD]);
#pragma unroll
                    for (int g = 0; g < HEAD_WARPS; g++) {
                        const float *from = part + g * (HD + 2);
                        float w = exp2f(from[HD] - peak);
                        sum = fmaf(w, from[HD + 1], sum), out = fmaf(w, from[idx % HD], out);
                    }
                    Number *to = place(SHARES + 3 * (idx * CL + rank));
                    write_number(to, out, exchange);
                    write_number(to + 1, peak, exchange);
                    write_number(to + 2, sum, exchange);
                }
                take_from(3 * RD * CL, [&](int i) { return SHARES + rank * 3 * RD * CL + i; },
                          [](int i) { return PARTIAL + i; });
                for (int r = warp; r < RD; r += WARPS) {
                    const float *from = mem + PARTIAL + 3 * r * CL;
                    float peak = NOTHING, sum = 0.f, out = 0.f;
                    for (int b = lane; b < CL; b += 32) peak = fmaxf(peak, from[3 * b + 1]);
#pragma unroll
                    for (int mask = 1; mask < 32; mask *= 2) peak = fmaxf(peak, __shfl_xor_sync(ALL, peak, mask));
                    for (int b = lane; b < CL; b += 32) {
                        float w = exp2f(from[3 * b + 1] - peak);
                        sum = fmaf(w, from[3 * b + 2], sum), out = fmaf(w, from[3 * b], out);
                    }
                    sum = sum_over<32>(sum), out = sum_over<32>(out);
                    if (lane == 0) send(y + rank * RD + r, out / sum);
                }
                take_all(Y, CL * RD);
                times(Columns<DM>{}, RD, y, mix_row);
            }
            if (SS && kind == MAMBA2) {
                float *bc = mem + BC, *steps_of = mem + DTS;
                times_normed(S_ROWS, biased);  // x, z, a share of B and C and of the step sizes
                for (int c = tid; c < DC + RB; c += T) {
                    const int at = c < DC ? c : c + DC;
                    float out = convolve(own_small + S_CONV + c * K, own_small[S_CONV_BIAS + c],
                                         state + DC * SN + c, DC + RB, local[at]);
                    if (c < DC)
                        local[c] = out;
                    else
                        send(bc + rank * RB + c - DC, out);
                }
                for (int h = tid; h < RH; h += T) send(steps_of + rank * RH + h, local[2 * DC + RB + h]);
                take(CL * (RB + RH), [](int i) { return i < CL * RB ? BC + i : DTS + i - CL * RB; });
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
                    if (there && g == 0) send(y + rank * DC + c, out);
                }
                take_all(Y, CL * DC);
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
                times_normed(D_ROWS + (kimi ? 2 * RF : RE + VC), biased);  // q, k, v, beta; gates
                for (int c = tid; c < 2 * RD + VC; c += T) {
                    float out = convolve(own_small + D_CONV + c * K, 0.f, state + VC * DK + c, 2 * RD + VC,
                                         local[c]);
                    if (c < 2 * RD)
                        send((c < RD ? q : key - RD) + rank * RD + c, out);
                    else
                        local[c] = out;
                }
                for (int r = tid; r < RE; r += T) {
                    send(mem + BETA + rank * RE + r, local[D_ROWS - RE + r]);
                    if (!kimi) send(decay + rank * RE + r, local[D_ROWS + r]);
                }
                for (int r = tid; kimi && r < RF; r += T) {
                    send(mem + F + rank * RF + r, local[D_ROWS + r]);
                    send(mem + GL + rank * RF + r, local[D_ROWS + RF + r]);
                }
                take(CL * (2 * RD + RE + (kimi ? 2 * RF : RE)), [&](int i) {
                    if (i < CL * RD) return Q + i;
                    if (i < 2 * CL * RD) return KEY + i - CL * RD;
                    i -= 2 * CL * RD;
                    if (i < CL * RE) return BETA + i;
                    i -= CL * RE;
                    return !kimi ? DTS + i : i < CL * RF ? F + i : GL + i - CL * RF;
                });
                if constexpr (KDA)
                    if (kimi) {
                        times(Columns<CL * RF>{}, RD, mem + F, [&](int r, float v) {
                            float dt = softplus(v + own_small[D_DT_BIAS + r]);
                            if (lane == 0) send(decay + rank * RD + r, exp2f(dt * own_small[D_RATE + r]));
                        });
                        times(Columns<CL * RF>{}, VC, mem + GL, [&](int r, float v) {
                            if (lane == 0) gate[r] = sigmoid(v + own_small[D_GATE + r]);
                        });
                        take_all(DTS, CL * RD);
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
                    if (there && g == 0) {
                        send(y + rank * VC + j, out);
                        send(mem + GATES + rank * VC + j, open);
                    }
                }
                take(2 * CL * VC, [](int i) { return i < CL * VC ? Y + i : GATES + i - CL * VC; });
                for (int head = warp; head < DH; head += WARPS) {
                    float *v = y + head * DV, *open = mem + GATES + head * DV, square = 0.f;
                    for (int c = lane; c < DV; c += 32) square = fmaf(v[c], v[c], square);
                    float scale = rsqrtf(sum_over<32>(square) * (1.f / DV) + 1e-5f);
                    for (int c = lane; c < DV; c += 32) v[c] *= scale * open[c];
                }
                __syncthreads();
                times(Columns<CL * VC>{}, RD, y, mix_row);
            }
            take_all(X, CL * RD);
            if constexpr (H > 0) {
                times_normed(HC, [&](int r, float v) {
                    if (lane == 0) send(mem + HIDDEN + rank * HC + r, activate(v + own_small[UP_BIAS + r]));
                });
                take_all(HIDDEN, CL * HC);
                times(Columns<CL * HC>{}, RD, mem + HIDDEN, add_row(MLP_GAIN, MLP_BIAS, true));
                take_all(X, CL * RD);
            }
        }

        if (hidden) {
            norm(CENTERED, EPS, xn);
            for (int i = tid; rank == 0 && i < DM; i += T)
                hidden[step * DM + i] = fmaf(xn[i], final_norm[i], final_norm[DM + i]);
            __syncthreads();
        }
        times_normed(RV, [&](int r, float v) {
            float value = v + small[HEAD_BIAS + r];
            if (CAP > 0.f && rank * RV + r < V)  // CAP tanh(value / CAP)
                value = CAP * (1.f - 2.f / (1.f + __expf(value * (2.f / CAP))));
            if (lane == 0) send(mem + LOGIT + rank * RV + r, value);
        });
        take_all(LOGIT, CL * RV);
        if (GUIDED && hints) {
            for (int i = tid; i < V; i += T)
                mem[LOGIT + i] = fmaf(mem[LOGIT + V], mem[HINTS + i], mem[LOGIT + i]);
            __syncthreads();
        }
        now_used = 0, parity ^= 1;
        if (log_probs && (all || t + 1 == steps))
            write_log_probs(mem + LOGIT, log_probs, text, streams, all ? steps : 1, all ? t : 0);
        if (done && step + 1 == total && rank == 0 && warp == 0) tell(done, ticket);
        if (t + 1 == steps)
            for (int i = tid; i < STATE; i += T) state_out[state_at + i] = mem[STATES + i];
    }
}
