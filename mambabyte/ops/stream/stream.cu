// A whole model of Mamba layers, byte after byte, in one launch: at batch 1 all is latency.
//
// A cluster of CL blocks runs S streams. Every block has DI / CL channels of every layer, their
// states, and its share of all weights: as much as fits in shared memory, the rest is read from L2,
// one phase ahead of its use. Everything that the blocks tell each other goes into each other's
// shared memory by st.async, which counts itself off at a barrier of the receiver: three exchanges
// a layer, one for the logits, and no other barrier across the cluster.
//
//   x (all blocks) -> norm -> rows of in_proj -> convolution, SiLU -> parts of x_proj's sums
//   => exchange => sums in a fixed order -> dt_proj, scan step, gate
//   => exchange => y (all blocks) -> x + rows of out_proj => exchange => x; an MLP goes likewise
//   after the last layer: norm -> rows of the head => exchange => every block draws the same byte
//
// Exchanges are kept small: a block takes in some 10 bytes a cycle, so parts of out_proj's sums,
// CL d_model floats, took longer than a further exchange does.
//
// A buffer may be written again when all blocks have read it: an exchange starts in a block only
// after it has everybody's part of the one before, which each sent after reading what came earlier.
// So exchanges that follow each other use different buffers, and that is enough.
//
// SIZES (see cluster.cu) are given by cuda.py, which also packs the weights:
//   CL, S, T (threads), LAYERS, DM (d_model), DI (d_inner), N (states), R (dt_rank), K (taps),
//   H (hidden width of the MLP or 0), ACTIVATION, DECAYED (a step's decay is its input's too),
//   CENTERED (layer norm), EPS, CAP (of the logits or
//   0), RESIDENT (floats of a block's weights kept in shared memory), and BLOB and WORK, its own idea
//   of the sizes below.
// All arithmetic is float32.

constexpr int DC = parts(DI, CL);                     // channels of a block
constexpr int HC = parts(H ? H : 1, CL);              // hidden units of a block, if there is an MLP
constexpr int G = power(N) < 16 ? power(N) : 16;      // threads that share a channel in the scan
constexpr int PER = parts(N, G);                      // states a thread
constexpr int RS = R <= 16 ? 1 : G;                   // and that share the sum of a step size
constexpr int RD = parts(DM, CL);                     // rows of d_model of a block
constexpr int XR = R + 2 * N, X4 = up4(XR);           // rows of x_proj
constexpr int R4 = parts(R, 4);
// Columns a lane has: of in_proj and the head (32 lanes), x_proj (8), out_proj and the MLP's (32
// lanes, four columns at a time).
constexpr int CI = parts(DM, 32), CX = parts(DC, 8), CO = parts(CL * DC, 128);
constexpr int CH = parts(CL * HC, 128);
// Rows of in_proj, the MLP and the head come in quads: a float4 is a column of four rows.
constexpr int UQ = parts(2 * DC, 4), HQ = parts(HC, 4), VQ = V / CL / 4;
constexpr int ROW = 4 * UQ + up4(RD);  // of the table: rows of in_proj, and of x

// One block's weights, in floats. Those of the norms are in the projections behind them.
constexpr int IN_BIAS = 0, CONV = up4(2 * DC), CONV_BIAS = CONV + up4(DC * K);
constexpr int DT_BIAS = CONV_BIAS + up4(DC), SKIP = DT_BIAS + up4(DC), RATE = SKIP + up4(DC);
constexpr int DT = RATE + up4(DC * N), UP_BIAS = DT + DC * R4 * 4;
constexpr int XP = UP_BIAS + (H ? up4(HC) : 0), SMALL = XP + CX * XR * 8;
constexpr int IN = UQ * CI * 128, OUT = RD * CO * 128, HEAD = VQ * CI * 128;
constexpr int UP = H ? HQ * CI * 128 : 0, DOWN = H ? RD * CH * 128 : 0;
constexpr int HEAD_BIAS = LAYERS * SMALL, HEAD_AT = HEAD_BIAS + V / CL, IN_AT = HEAD_AT + HEAD;
constexpr int UP_AT = IN_AT + (LAYERS - 1) * IN, DOWN_AT = UP_AT + LAYERS * UP;
constexpr int OUT_AT = DOWN_AT + LAYERS * DOWN;
static_assert(OUT_AT + LAYERS * OUT == BLOB, "the weights are packed in another layout");
static_assert(HEAD_AT <= RESIDENT, "the small weights must be in shared memory");

// Shared memory behind the resident weights, in floats.
constexpr int PARTS = RESIDENT, Y = PARTS + CL * S * X4, HIDDEN = Y + S * CO * 128;
constexpr int LOGIT = HIDDEN + (H ? S * CH * 128 : 0), PROB = LOGIT + S * V, KEPT = PROB + S * V;
constexpr int X = KEPT + S * V, U = X + S * DM, GATE = U + up4(S * DC), LOW = GATE + up4(S * DC);
constexpr int STATE = LOW + S * X4, TAIL = STATE + up4(LAYERS * S * DC * N);
constexpr int BARS = TAIL + up4(LAYERS * S * (K - 1) * DC), BYTE = BARS + 12;
constexpr int ORDER = BYTE + up4(S), END = ORDER + 8;
static_assert(END - RESIDENT == WORK, "shared memory is laid out otherwise");
static_assert(DM % 4 == 0 && V % (4 * CL) == 0 && S <= 8 && S <= WARPS, "sizes do not fit");

enum Exchange { PROJECTED, SCANNED, ADDED, ACTIVATED, LOGITS, ORDERED, EXCHANGES };

// What the host orders a kernel that stays, in words beside the number of the order: a byte with one
// of the flags, and where the state before it lies and the state after it goes.
constexpr int WORDS = 5;

// ------------------------------------------------------------------------------------ in a warp

// Lane l gets x[32 j + l], centred where the norm is; returns what to multiply it by. Every warp
// does so for itself.
inline float normalise(float (&out)[CI], const float *x, bool centered, float eps) {
    int lane = threadIdx.x % 32;
    float sum = 0.f, square = 0.f;
#pragma unroll
    for (int j = 0; j < CI; j++) {
        out[j] = 32 * j + lane < DM ? x[32 * j + lane] : 0.f;
        sum += out[j];
    }
    float mean = centered ? sum_over<32>(sum) * (1.f / DM) : 0.f;
#pragma unroll
    for (int j = 0; j < CI; j++) {
        out[j] = 32 * j + lane < DM ? out[j] - mean : 0.f;
        square = fmaf(out[j], out[j], square);
    }
    return rsqrtf(sum_over<32>(square) * (1.f / DM) + eps);
}

template <int COLUMNS> inline void fetch(float4 (&to)[COLUMNS], const float4 *from) {
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) to[j] = from[j * 32];
}

// Four rows times the streams, which are still to be scaled: lane l has row l % 4 of stream
// l / 4 % S.
inline float times_x(const float4 (&w)[CI], const float (&xn)[S][CI], const float (&scale)[S]) {
    float sum[4 * S] = {};
#pragma unroll
    for (int j = 0; j < CI; j++)
#pragma unroll
        for (int s = 0; s < S; s++) {
            sum[4 * s] = fmaf(w[j].x, xn[s][j], sum[4 * s]);
            sum[4 * s + 1] = fmaf(w[j].y, xn[s][j], sum[4 * s + 1]);
            sum[4 * s + 2] = fmaf(w[j].z, xn[s][j], sum[4 * s + 2]);
            sum[4 * s + 3] = fmaf(w[j].w, xn[s][j], sum[4 * s + 3]);
        }
    float value = sums_over<4 * S, 32>(sum), mine = scale[0];
#pragma unroll
    for (int s = 1; s < S; s++)
        if (threadIdx.x % 32 / 4 % S == s) mine = scale[s];
    return value * mine;
}

// Element i of what all blocks sent, added in the order of the blocks (in four strands).
inline float sum_blocks(const float *part, int stride) {
    float sum[4] = {};
#pragma unroll
    for (int c = 0; c < CL; c++) sum[c % 4] += part[c * stride];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// --------------------------------------------------------------------------------- the kernel

// Grid CL * ceil(streams / S) blocks of T threads. table (V, CL, ROW), what depends on a byte alone.
// `tokens` (streams, steps), or null: then each byte is drawn from the log-probabilities after the
// byte before, the first from `first` (streams, V), and written to `drawn` (streams, steps).
// `log_probs` is (streams, steps, V) where `all` says so, else (streams, V) after the last byte.
// tail: (LAYERS, streams, K - 1, DI); state: (LAYERS, streams, DI, N).
//
// With `orders`, WORDS words of the host's memory, the kernel stays and takes one text's bytes from
// there, until it is told to leave or has looked `patience` times in vain; then the state is one
// piece of memory, (LAYERS, DI, N) and then (LAYERS, K - 1, DI).
extern "C" __global__ void __cluster_dims__(CL, 1, 1) __launch_bounds__(T, 1) stream_bytes(
    const float *blob, const float *table, const unsigned char *tokens, const float *first,
    const float *tail_in, const float *state_in, float *tail_out, float *state_out,
    unsigned char *drawn, float *log_probs, unsigned *done, unsigned ticket,
    unsigned long long seed, unsigned long long position, int streams, int steps, int all,
    float temperature, int top_k, float top_p, const uint2 *orders, int patience) {
    extern __shared__ __align__(16) char shared[];
    float *const mem = (float *)shared;
    int tid = threadIdx.x, lane = tid % 32, warp = __shfl_sync(ALL, tid / 32, 0);  // uniform
    int rank = blockIdx.x % CL, base = blockIdx.x / CL * S;
    const float *own = blob + (int64)rank * BLOB;
    // A row, or quad of rows, of a matrix that is `size` floats from `at` on, for this lane.
    auto fetch_row = [&](auto &to, int at, int size, int row) {
        int first = at + row * (int)(sizeof(to) / 4 * 32) + 4 * lane;
        if (at + size <= RESIDENT)
            fetch(to, (const float4 *)(mem + first));
        else
            fetch(to, (const float4 *)(own + first));
    };
    float *x = mem + X, *u = mem + U, *gate = mem + GATE, *low = mem + LOW;
    float *logit = mem + LOGIT;
    float *prob = mem + PROB, *kept = mem + KEPT;
    int *byte = (int *)(mem + BYTE);
    const Draw how = {drawn, seed, position, temperature, top_p, top_k};
    unsigned bars = shared_address(mem + BARS), parities = 0;
    auto wait_for = [&](Exchange e) {
        wait(bars + 8 * e, parities >> e & 1);
        parities ^= 1u << e;
    };
    auto expect_all = [&](Exchange e, int floats) {
        if (tid == 0) expect(bars + 8 * e, 4 * floats);
    };

    // In shared memory: state [layer][s][channel][n], tail [layer][s][tap][channel].
    auto load_state = [&]() {
        for (int i = tid; i < LAYERS * S * DC * N; i += T) {
            int n = i % N, d = rank * DC + i / N % DC, b = base + i / (N * DC) % S;
            int64 l = i / (N * DC * S);
            bool there = d < DI && b < streams;
            mem[STATE + i] = there ? state_in[((l * streams + b) * DI + d) * N + n] : 0.f;
        }
        for (int i = tid; i < LAYERS * S * (K - 1) * DC; i += T) {
            int d = rank * DC + i % DC, k = i / DC % (K - 1), b = base + i / (DC * (K - 1)) % S;
            int64 l = i / (DC * (K - 1) * S);
            bool there = d < DI && b < streams;
            mem[TAIL + i] = there ? tail_in[((l * streams + b) * (K - 1) + k) * DI + d] : 0.f;
        }
    };
    auto store_state = [&]() {
        for (int i = tid; i < LAYERS * S * DC * N; i += T) {
            int n = i % N, d = rank * DC + i / N % DC, b = base + i / (N * DC) % S;
            int64 l = i / (N * DC * S);
            if (d < DI && b < streams)
                state_out[((l * streams + b) * DI + d) * N + n] = mem[STATE + i];
        }
        for (int i = tid; i < LAYERS * S * (K - 1) * DC; i += T) {
            int d = rank * DC + i % DC, k = i / DC % (K - 1), b = base + i / (DC * (K - 1)) % S;
            int64 l = i / (DC * (K - 1) * S);
            if (d < DI && b < streams)
                tail_out[((l * streams + b) * (K - 1) + k) * DI + d] = mem[TAIL + i];
        }
    };

    // To the same address in every step-th block.
    auto send_all = [&](unsigned to, Exchange e, auto value, int first_block, int step) {
#pragma unroll
        for (int block = first_block; block < CL; block += step) {
            unsigned there = window(bars, block);
            send(to + there, bars + 8 * e + there, value);
        }
    };

    if (tid == 0) {
        for (int e = 0; e < EXCHANGES; e++)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bars + 8 * e), "r"(1) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    for (int i = tid; i < RESIDENT / 4; i += T) ((float4 *)mem)[i] = ((const float4 *)own)[i];
    if (orders)
        tokens = (const unsigned char *)(mem + ORDER), steps = 0x7fffffff;
    else
        load_state();
    for (int i = tid; i < LOGIT - Y; i += T) mem[Y + i] = 0.f;  // what is past the channels
    if (!tokens)
        for (int i = tid; i < S * V; i += T)
            logit[i] = base + i / V < streams ? first[(int64)(base + i / V) * V + i % V] : 0.f;
    __syncthreads();
    cluster_barrier();

    // What depends on the byte alone is fetched a byte ahead where the bytes are known: what the first
    // layer's in_proj makes of it, and this block's rows of x; the others come with the first exchange
    // of x.
    constexpr int MINE = parts(S * RD, T);
    float coming[MINE], looked_up = 0.f;
    auto byte_at = [&](int s, int t) -> int {
        if (!tokens) return byte[s];
        return orders ? *tokens : base + s < streams ? tokens[(int64)(base + s) * steps + t] : 0;
    };
    auto row_of = [&](int s, int t) { return table + (byte_at(s, t) * CL + rank) * ROW; };
    auto look_up = [&](int t, int q) { return row_of(lane / 4 % S, t)[4 * q + lane % 4]; };
    auto embed = [&](int t) {
#pragma unroll
        for (int m = 0; m < MINE; m++) {
            int i = tid + m * T;
            if (i < S * RD) coming[m] = row_of(i / RD, t)[4 * UQ + i % RD];
        }
        if (warp < UQ) looked_up = look_up(t, warp);
    };

    float4 ahead[CI];  // of the next product with x, this warp's first quad
    auto fetch_in = [&](int layer) {  // from the second on
        if (warp < UQ) fetch_row(ahead, IN_AT + (layer - 1) * IN, IN, warp);
    };
    if (tokens && !orders) embed(0);

    // The first block looks into the host's memory, and tells all blocks what it found. Its answer is
    // what the host waits for before it orders anything else, so one order is under way at a time.
    auto take_order = [&]() {
        unsigned at = shared_address(mem + ORDER);
        if (rank == 0 && warp == 0) {
            const unsigned word = look_for_order(orders, WORDS, ticket, patience);
            if (lane < WORDS) send_all(at + 4 * lane, ORDERED, __uint_as_float(word), 0, 1);
        }
        expect_all(ORDERED, WORDS);
        wait_for(ORDERED);
        const unsigned *word = (const unsigned *)(mem + ORDER);
        auto pointer = [&](int i) {
            return (float *)(word[i] | (unsigned long long)word[i + 1] << 32);
        };
        state_in = pointer(1), tail_in = state_in + LAYERS * DI * N;
        state_out = pointer(3), tail_out = state_out + LAYERS * DI * N;
        return word[0];
    };

    // x plus rows times `values` (S, 128 columns), for all blocks. The first row has been fetched.
    auto add_rows = [&](auto &row, int at, int size, int values) {
        constexpr int COLUMNS = sizeof(row) / sizeof(float4);
        for (int r = warp; r < RD; r += WARPS) {
            if (r != warp) fetch_row(row, at, size, r);
            int i = min(rank * RD + r, DM - 1);
            float sum[S], old = x[lane % S * DM + i];
#pragma unroll
            for (int s = 0; s < S; s++) {
                float part[4] = {};
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) {
                    float4 v = ((float4 *)(mem + values))[(s * COLUMNS + j) * 32 + lane];
                    part[0] = fmaf(row[j].x, v.x, part[0]), part[1] = fmaf(row[j].y, v.y, part[1]);
                    part[2] = fmaf(row[j].z, v.z, part[2]), part[3] = fmaf(row[j].w, v.w, part[3]);
                }
                sum[s] = (part[0] + part[1]) + (part[2] + part[3]);
            }
            float value = old + sums_over<S, 32>(sum);
            if (rank * RD + r < DM)
                send_all(shared_address(x + lane % S * DM + i), ADDED, value, lane / S, 32 / S);
        }
        expect_all(ADDED, S * DM);
    };

    for (int t = 0; t < steps; t++) {
        bool last = orders || t + 1 == steps;
        if (orders) {
            unsigned order = take_order();
            if (order & LEAVE) break;
            embed(0);
            if (!(order & GO_ON)) load_state();
        }
        if (!tokens) {
            choose(how, logit, prob, kept, byte, base, streams, steps, t);
            embed(t);
        }
#pragma unroll
        for (int m = 0; m < MINE; m++) {
            int i = tid + m * T, row = rank * RD + i % RD;
            if (i < S * RD && row < DM) x[i / RD * DM + row] = coming[m];
        }
        float first_rows = looked_up;
        __syncthreads();
        if (tokens && !last) embed(t + 1);

#pragma unroll 1
        for (int layer = 0; layer < LAYERS; layer++) {
            const float *small = mem + layer * SMALL;
            float xn[S][CI], scale[S];
#pragma unroll
            for (int s = 0; s < S; s++)
                if (layer > 0) scale[s] = normalise(xn[s], x + s * DM, CENTERED, EPS);

            // in_proj, convolution and SiLU: the rows of u, then those of z
            for (int q = warp; q < UQ; q += WARPS) {
                if (q != warp && layer > 0) fetch_row(ahead, IN_AT + (layer - 1) * IN, IN, q);
                int r = 4 * q + lane % 4, s = lane / 4, c = min(r, DC - 1);
                float *before = mem + TAIL + (layer * S + s % S) * (K - 1) * DC + c;
                float old[K], sum = small[CONV_BIAS + c], w[K];
#pragma unroll
                for (int k = 0; k < K; k++) {
                    if (k < K - 1) old[k] = before[k * DC];
                    w[k] = small[CONV + c * K + k];
                }
#pragma unroll
                for (int k = 0; k < K - 1; k++) sum = fmaf(w[k], old[k], sum);
                float value = 0.f;
                if (layer > 0)
                    value = times_x(ahead, xn, scale) + small[IN_BIAS + min(r, 2 * DC - 1)];
                else
                    value = q == warp ? first_rows : look_up(t, q);
                sum = fmaf(w[K - 1], value, sum);
                float out = r < DC ? sum : value;
                out *= sigmoid(out);
                if (s < S && r < DC) {
                    u[s * DC + r] = out;
#pragma unroll
                    for (int k = 1; k < K - 1; k++) before[(k - 1) * DC] = old[k];
                    before[(K - 2) * DC] = value;
                } else if (s < S && r < 2 * DC) {
                    gate[s * DC + r - DC] = out;
                }
            }
            // x_proj: this block's part of every row, 8 threads a row
            float w_x[CX];
            auto fetch_x = [&](int item) {
#pragma unroll
                for (int j = 0; j < CX; j++)
                    w_x[j] = small[XP + j * XR * 8 + min(item, XR * 8 - 1)];
            };
            fetch_x(tid);
            __syncthreads();
            for (int first = 32 * warp; first < XR * 8; first += T) {
                int item = first + lane, row = item / 8, part = lane % 8;
                if (first >= T) fetch_x(item);
                float sum[S] = {};
#pragma unroll
                for (int j = 0; j < CX; j++)
#pragma unroll
                    for (int s = 0; s < S; s++) {
                        int c = 8 * j + part;
                        sum[s] = fmaf(w_x[j], c < DC ? u[s * DC + c] : 0.f, sum[s]);
                    }
                float value = sums_over<S, 8>(sum);
                unsigned at = shared_address(mem + PARTS + (rank * S + part % S) * X4 + row);
                if (row < XR) send_all(at, PROJECTED, value, part / S, 8 / S);
            }
            expect_all(PROJECTED, CL * S * XR);
            if (tokens && layer == 0 && t > 0 && all) {  // the byte before: hidden in the wait
                wait_for(LOGITS);
                write_log_probs(logit, log_probs, base, streams, steps, t - 1);
            }

            // What does not depend on the exchange is fetched before waiting for it.
            float4 w_out[CO], w_dt[R4];
            if (warp < RD) fetch_row(w_out, OUT_AT + layer * OUT, OUT, warp);
            float rate[PER], h[S][PER], now[S], open[S], dt_bias, skip;
            auto fetch_channel = [&](int c, int g) {
                dt_bias = small[DT_BIAS + c], skip = small[SKIP + c];
#pragma unroll
                for (int p = 0; p < PER; p++) rate[p] = small[RATE + c * N + min(p * G + g, N - 1)];
#pragma unroll
                for (int r = 0; r < R4; r++)
                    if (RS == 1) w_dt[r] = ((const float4 *)(small + DT))[c * R4 + r];
#pragma unroll
                for (int s = 0; s < S; s++) {
                    const float *from = mem + STATE + ((layer * S + s) * DC + c) * N;
#pragma unroll
                    for (int p = 0; p < PER; p++) h[s][p] = from[min(p * G + g, N - 1)];
                    now[s] = u[s * DC + c], open[s] = gate[s * DC + c];
                }
            };
            fetch_channel(min(tid / G, DC - 1), lane % G);
            wait_for(PROJECTED);
            for (int i = tid; i < S * X4; i += T) low[i] = sum_blocks(mem + PARTS + i, S * X4);
            __syncthreads();

            // dt_proj, softplus, scan step, skip, gate: G threads a channel
            for (int first = 32 * warp; first < DC * G; first += T) {
                int g = lane % G, c = min((first + lane) / G, DC - 1);
                bool there = first + lane < DC * G;
                if (first >= T) fetch_channel(c, g);
#pragma unroll
                for (int s = 0; s < S; s++) {
                    const float *from = low + s * X4;
                    float part[4] = {};
                    if (RS == 1) {
#pragma unroll
                        for (int r = 0; r < R4; r++) {
                            float4 v = ((const float4 *)from)[r];
                            part[0] = fmaf(w_dt[r].x, v.x, part[0]);
                            part[1] = fmaf(w_dt[r].y, v.y, part[1]);
                            part[2] = fmaf(w_dt[r].z, v.z, part[2]);
                            part[3] = fmaf(w_dt[r].w, v.w, part[3]);
                        }
                    } else {
#pragma unroll
                        for (int r = g; r < R; r += G)
                            part[0] = fmaf(small[DT + c * R4 * 4 + r], from[r], part[0]);
                    }
                    float sum = (part[0] + part[1]) + (part[2] + part[3]);
                    float dt = softplus(sum_over<RS>(sum) + dt_bias), y = 0.f;
#pragma unroll
                    for (int p = 0; p < PER; p++) {
                        int n = p * G + g;
                        if (n < N) {
                            float keep = exp2f(dt * rate[p]), in = dt * now[s] * from[R + n];
                            float next = DECAYED ? keep * (h[s][p] + in) : fmaf(keep, h[s][p], in);
                            if (there)
                                mem[STATE + ((layer * S + s) * DC + c) * N + n] = next;
                            y = fmaf(from[R + N + n], next, y);
                        }
                    }
                    y = fmaf(skip, now[s], sum_over<G>(y)) * open[s];
                    if (there)
                        send_all(shared_address(mem + Y + s * CO * 128 + rank * DC + c), SCANNED,
                                 y, g, G);
                }
            }
            expect_all(SCANNED, CL * S * DC);
            if (H == 0 && layer + 1 < LAYERS) fetch_in(layer + 1);
            if (H > 0 && warp < HQ) fetch_row(ahead, UP_AT + layer * UP, UP, warp);
            wait_for(SCANNED);
            add_rows(w_out, OUT_AT + layer * OUT, OUT, Y);
            wait_for(ADDED);

            if (H > 0) {
                float4 w_down[CH];
                if (warp < RD) fetch_row(w_down, DOWN_AT + layer * DOWN, DOWN, warp);
#pragma unroll
                for (int s = 0; s < S; s++) scale[s] = normalise(xn[s], x + s * DM, CENTERED, EPS);
                for (int q = warp; q < HQ; q += WARPS) {
                    if (q != warp) fetch_row(ahead, UP_AT + layer * UP, UP, q);
                    int r = 4 * q + lane % 4, s = lane / 4 % S;
                    float value = activate(times_x(ahead, xn, scale)
                                           + small[UP_BIAS + min(r, HC - 1)]);
                    unsigned at = shared_address(mem + HIDDEN + s * CH * 128 + rank * HC + r);
                    if (r < HC) send_all(at, ACTIVATED, value, lane / (4 * S), 8 / S);
                }
                expect_all(ACTIVATED, CL * S * HC);
                if (layer + 1 < LAYERS) fetch_in(layer + 1);
                __syncthreads();  // every warp has seen ADDED before it can come again
                wait_for(ACTIVATED);
                add_rows(w_down, DOWN_AT + layer * DOWN, DOWN, HIDDEN);
                wait_for(ADDED);
            }
        }

        if (!tokens || all || last) {
            float xn[S][CI], scale[S];
            for (int q = warp; q < VQ; q += WARPS) {
                fetch_row(ahead, HEAD_AT, HEAD, q);
                if (q == warp)
#pragma unroll
                    for (int s = 0; s < S; s++)
                        scale[s] = normalise(xn[s], x + s * DM, CENTERED, EPS);
                int r = 4 * q + lane % 4, s = lane / 4 % S;
                float value = times_x(ahead, xn, scale) + mem[HEAD_BIAS + r];
                if (CAP > 0.f)  // CAP tanh(value / CAP)
                    value = CAP * (1.f - 2.f / (1.f + __expf(value * (2.f / CAP))));
                unsigned at = shared_address(logit + s * V + rank * (V / CL) + r);
                send_all(at, LOGITS, value, lane / (4 * S), 8 / S);
            }
            expect_all(LOGITS, S * V);
        }
        if (!tokens || last) {
            wait_for(LOGITS);
            if (last) {
                write_log_probs(logit, log_probs, base, streams, all ? steps : 1, all ? t : 0);
                if (done && blockIdx.x == 0 && warp == 0) tell(done, ticket);
            }
        }
        if (orders) {
            store_state();
            ticket = next_ticket(ticket);
        }
        // x is written next, and was read by the slowest warp for the head.
        __syncthreads();
    }

    if (!orders) store_state();
    cluster_barrier();  // nobody leaves while others may still send to it
}
