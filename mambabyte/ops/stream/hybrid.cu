// A whole model of any layers, byte after byte, in one launch; stream.cu is quicker for Mamba alone.
//
// CL blocks, one a multiprocessor and all running at a time (a cooperative launch), read one text. Of
// every matrix a block has the same share of rows, and of every state the channels that its rows make.
// Matrices lie in shared memory as far as they fit; the others pass through a ring in it, in the order
// of their use: a warp that does nothing else asks for a tile where its place has become free, so that
// weights come in while the blocks wait for each other. What one block computes and all need is
// exchanged through L2 (=> in grid/*.cu, which has the layers); the MLP is up => down => x.
//
// An exchange (=>): three numbers go to L2 beside the number of the exchange, 16 bytes written as one, and
// whoever needs them looks until they are there. So no barrier and no fence is paid for. Exchanges take
// turns in two places. Between two in one place lies one in which every block sends, having taken in what
// came before, and waits for all blocks: shares are padded to equal sizes for that.
//
// A pass reads several bytes where some are guessed: every weight is read once for all of them, every
// exchange made once. At temperature 0 and at any other a byte is drawn as without guesses, from its own
// random number; a guess counts where it is the byte drawn. States after each byte of a pass are written
// to global memory, and those after the last right one are read back. What is guessed: what followed the
// latest of the longest equal endings in the last PAST bytes (prompt lookup decoding; Yang et al. 2023,
// arXiv:2304.04487). A byte without a guess is a pass of its own.
//
// With orders the kernel stays and reads one text whose bytes come one after another: the first block
// looks into the host's memory for the next order, and hands it to all others in packets of a place of
// their own, the byte's hint with it. It writes the next order there when all blocks have sent their
// logits, so have read the one before. Weights that stay in shared memory are read once, the ring's tiles of the
// next byte come in while it is waited for.
//
// SIZES (see cluster.cu) are given by packing.py, which packs the weights and so knows where they lie:
//   CL, S = 1, T, LAYERS, DM (d_model), DI (d_inner), N, R (dt_rank, 0: from all channels), K (taps),
//   H (hidden or 0), ACTIVATION, CENTERED, STEM (norm behind the embedding, done beforehand but where the kernel is given x or hints), EPS, TINY, SSD_EPS, CAP, HEADS, KVH,
//   HD, QKNORM; SH, SG, SN (Mamba-2's and 3's heads, groups, states), SP (Mamba-3's pairs that turn); DH, DV (the delta rule's heads, values of
//   each); MIXED; GUIDED (the head has one row more, a gate); M, A, SS, M3, D, KDA (whether there are such layers), CACHES (how many of attention);
//   PASS (bytes of a pass at most; 1: no guesses), PAST; TILE (floats of a tile of several rows), TILES
//   (tiles of a byte), SPACE, RESIDENT, STATE and BLOB
//   (floats of a block's tiles in shared memory, small weights, states and all tiles); where each small
//   weight of a layer lies (MIX_GAIN, M_CONV, ...), and each vector in shared memory (X, XN, ...).
// All arithmetic is float32.

constexpr int HIDDEN_STRIDE = pad(CL * HC), HINT = V + 1;  // numbers of a byte's hints
static_assert(S == 1 && SPACE % 4 == 0 && RESIDENT % 4 == 0, "sizes do not fit");

// Channel c of a byte's embedding, normed if it is to be: into x, and into what this block keeps of it.
__forceinline__ void start(Block &b, int p, int c, float value) {
    const int r = c - b.rank * RD;
    if (r >= 0 && r < RD) b.mem[EMB + p * RD + r] = value * b.small[STEM_GAIN + c];
    b.mem[X + p * XS + c] = value * b.small[FIRST + c];
}

// P bytes through all layers: from x of each to its logits. `raw`: x is embedded bytes before their norm.
template <int P> __forceinline__ void pass(
    Block &b, bool raw, float *cache, int slots, int begin, int now, int valid, const float *final_norm, float *hidden) {
    float *const mem = b.mem;
    if ((STEM || GUIDED) && raw) {
        if (STEM) b.norm<P>(false, TINY, mem + X, mem + X);
#pragma unroll 1
        for (int i = b.tid; i < P * DM; i += T) start(b, i / DM, i % DM, mem[X + i / DM * XS + i % DM]);
        meet();
    }
#pragma unroll 1
    for (int layer = 0; layer < LAYERS; layer++) {
        b.table = (const int *)b.small + layer * ENTRIES;
        b.own = b.small + b.table[SMALL];
        float *const state = mem + STATES + b.table[STATE_AT];
        const int kind = b.table[KIND];
        if constexpr (M)
            if (kind == MAMBA) mamba<P>(b, state);
        if constexpr (A)
            if (kind == ATTENTION)
                attention<P>(b, cache + (int64)b.table[CACHE] * 2 * SHARES_OF * slots * HD, slots, begin, now, valid);
        if constexpr (SS)
            if (kind == MAMBA2) mamba2<P>(b, state);
        if constexpr (M3)
            if (kind == MAMBA3) mamba3<P>(b, state);
        if constexpr (D)
            if (kind == DELTA) delta<P, false>(b, state);
        if constexpr (KDA)
            if (kind == KIMI) delta<P, true>(b, state);
        if constexpr (H > 0) {
            b.rows_normed<HC, P>([&](int r, int p, float v) {
                b.out[p * HC + r] = activate(v + b.own[UP_BIAS + r]);
            });
            b.give<HC, P, HC * P>();
            Weights<RD, CL * HC> down;
            b.fetch(down);
            b.receive_all<HC, P>(HIDDEN, HIDDEN_STRIDE);
            b.branch<P>(down, mem + HIDDEN, HIDDEN_STRIDE, MLP_GAIN, MLP_BIAS, true);
        }
    }
    if (hidden) {
        b.receive_x<P>();
        b.norm<P>(CENTERED, EPS, mem + X, mem + XN);
#pragma unroll 1
        for (int i = b.tid; b.rank == 0 && i < P * DM; i += T)
            hidden[i] = fmaf(mem[XN + i / DM * XS + i % DM], final_norm[i % DM], final_norm[DM + i % DM]);
        meet();
    }
    b.rows_normed<RV, P>([&](int r, int p, float v) {
        float value = v + b.small[HEAD_BIAS + r];
        if (CAP > 0.f && b.rank * RV + r < V)  // CAP tanh(value / CAP)
            value = CAP * (1.f - 2.f / (1.f + __expf(value * (2.f / CAP))));
        b.out[p * RV + r] = value;
    });
    b.give<RV, P, RV * P>();
    b.receive_all<RV, P>(LOGIT, LS);
    b.used = 0, b.parity ^= 1;
}

// An order of the host, in shared memory.
struct Order {
    // Its words: a byte with a flag of cluster.cu, where the state before it lies and the one after it
    // goes, the keys and values (and slots of a share, rows BEGIN to STORED), the byte's angles; where the
    // rows so far lie, from which slot on of how many, if they are to be copied to KEYS first.
    enum { WHAT, BEFORE, AFTER = BEFORE + 2, KEYS = AFTER + 2, ANGLES = KEYS + 2, SLOTS = ANGLES + 2, BEGIN, STORED,
           FROM, FROM_SLOT = FROM + 2, FROM_SLOTS, WORDS };
    static_assert(parts(WORDS + (GUIDED ? HINT : 0), 3) == ORDER_PACKETS, "sizes.py counts an order otherwise");
    const unsigned *word;  // the hint behind them

    __forceinline__ float *pointer(int i) const {
        return (float *)(word[i] | (unsigned long long)word[i + 1] << 32);
    }
    __forceinline__ const float *hint() const { return (const float *)(word + WORDS); }

    // Whether there is one: all blocks know it and have it.
    __forceinline__ bool take(
        Block &b, const uint2 *orders, unsigned ticket, int patience, const volatile float *hint) const {
        float *const to = (float *)word;
        Packet *const place = b.packets + ORDERS;
        if (b.rank == 0) {
            if (b.warp == 0) {
                const unsigned found = look_for_order(orders, WORDS, ticket, patience);
                if (b.lane < WORDS) to[b.lane] = __uint_as_float(found);
            }
            meet();
            for (int i = b.tid; GUIDED && i < HINT; i += T) to[WORDS + i] = hint[i];
            meet();
            for (int i = b.tid; i < ORDER_PACKETS; i += T)
                put(place + i, to[3 * i], to[3 * i + 1], to[3 * i + 2], b.exchange);
            b.exchange++;
        } else {
            b.take<ORDER_PACKETS>([&](int i) { return place + i; }, [](int i, int j) { return ORDER + 3 * i + j; });
        }
        return !(word[WHAT] & LEAVE);
    }
};

// The last bytes of a text, byte i at i % PAST, and what may follow them.
struct Past {
    unsigned char *bytes;
    int *best;  // of each warp
    int end;    // bytes so far

    __forceinline__ unsigned char at(int i) const { return bytes[i & (PAST - 1)]; }

    // Where the text goes on after the longest ending equal to its own, of 3 bytes or more and the latest
    // of several; 0 where there is none. All threads know it after the meeting with which it ends.
    __forceinline__ int same_before() {
        constexpr int LONGEST = 31;
        const int oldest = max(0, end - PAST);
        int found = 0;
        for (int to = end - 1 - threadIdx.x; to > oldest + 2; to -= T) {
            int n = 0;
            while (n < LONGEST && to - n > oldest && at(to - 1 - n) == at(end - 1 - n)) n++;
            if (n > 2) found = max(found, n << 26 | (PAST - (end - to)));
        }
        found = __reduce_max_sync(ALL, found);
        if (threadIdx.x % 32 == 0) best[threadIdx.x / 32] = found;
        meet();
        for (int w = 0; w < WARPS; w++) found = max(found, best[w]);
        return found ? end - PAST + (found & (1 << 26) - 1) : 0;
    }
};

// What a launch is given: LAUNCH of fitting.py has the same names in the same order.
//
// Where bytes are drawn and PASS > 1, there is one text. With `orders` there is one text too, whose bytes,
// states and keys these tell, until there have been `steps` of them, or the kernel is told to leave, or has
// looked `patience` times in vain.
struct Launch {
    Packet *packets;  // through which blocks exchange numbers
    const float *resident, *tiles;
    const Tile *schedule;
    const float *embedding, *best, *kinds, *final_norm;
    const unsigned char *tokens;
    const float *inputs;  // (streams, steps, DM): embedded bytes, in place of tokens
    // (streams, steps, HINT): what a guided model embeds beside tokens: log-probabilities, which it also
    // adds to its logits, times its gate, and in the bytes of one number more the best byte and its kind.
    // With orders: of one byte, in the host's memory.
    const float *hints;
    const float *first, *state_in;
    float *state_out, *cache;
    const float *rotary;
    unsigned char *drawn;
    float *log_probs, *hidden;
    unsigned *done;
    const unsigned char *past;  // the last bytes of the text, the oldest first
    float *trail;               // (blocks, PASS, STATE): scratch
    int *passes;                // (2): how many it took, how many bytes were guessed
    const uint2 *orders;        // WORDS words of the host's memory
    unsigned long long seed, position;
    unsigned exchange;  // number of the first
    int slots, begin, stored;
    unsigned ticket;
    int streams, steps, all;
    float temperature;
    int top_k;
    float top_p;
    int known;  // bytes of `past`
    int patience;
};

// Grid CL blocks of T threads and BESIDE more, of which one asks for tiles. For what is not said above see
// stream.cu.
extern "C" __global__ void __launch_bounds__(T + BESIDE, 1) stream_hybrid(const __grid_constant__ Launch given) {
    extern __shared__ __align__(128) char shared[];
    float *const mem = (float *)shared + SPACE + RESIDENT;
    const int tid = threadIdx.x, rank = blockIdx.x;
    Block b = {mem, mem - RESIDENT, nullptr, nullptr, tid, tid % 32, tid / 32, rank,
               max(0, min(RD, DM - rank * RD)), mem + OUT, given.packets, given.exchange, 0, given.trail + (int64)rank * PASS * STATE, false, 0, 0};
    float *cache = given.cache;
    int slots = given.slots, begin = given.begin;  // orders have others
    unsigned ticket = given.ticket;
    volatile int *const ended = (int *)(mem + ENDED);
    for (int i = tid; i < 4 * TILES; i += T + BESIDE) ((int *)b.plan())[i] = ((const int *)given.schedule)[i];
    if (tid == 0) {
        for (int i = 0; i < TILES; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b.full(i)), "r"(1) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b.free(i)), "r"(WARPS) : "memory");
        }
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b.over()), "r"(1) : "memory");
        *ended = -1;
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async;" ::: "memory");
    }
    __syncthreads();
    const bool drawing = !given.tokens && !given.inputs && !given.orders, guessing = PASS > 1 && drawing;
    const int64 total = (int64)given.streams * given.steps;
    if (tid >= T) {
        keep_registers<24>();
        if (tid == T) b.supply(given.tiles, total, ended);
        return;
    }
    take_registers<240>();
    const Draw how = {given.drawn, given.seed, given.position, given.temperature, given.top_p, given.top_k};
    int *byte = (int *)(mem + BYTE), laps = 0, guesses = 0;
    const Order order = {(const unsigned *)(mem + ORDER)};
    for (int i = tid; i < RESIDENT; i += T)
        mem[i - RESIDENT] = given.resident[(int64)rank * RESIDENT + i];
#pragma unroll 1
    for (int i = tid; i < LOGIT - X; i += T) mem[X + i] = 0.f;

#pragma unroll 1
    for (int text = 0; text < given.streams; text++) {
        const int64 state_at = ((int64)text * CL + rank) * STATE;
        Past seen = {(unsigned char *)(mem + SEEN), (int *)(mem + ENDINGS), given.known};
        meet();  // the text before is at its end in all threads
        for (int i = tid; !given.orders && i < STATE; i += T) mem[STATES + i] = given.state_in ? given.state_in[state_at + i] : 0.f;
#pragma unroll 1
        for (int i = tid; given.first && i < V; i += T) mem[LOGIT + i] = given.first[(int64)text * V + i];
        for (int i = tid; guessing && i < given.known; i += T) seen.bytes[i & (PAST - 1)] = given.past[i];
        meet();
        if (drawing) choose(how, mem + LOGIT, mem + PROB, mem + KEPT, byte, text, given.streams, given.steps, 0);
        int row = 0;   // of the logits, the last
        int from = 0;  // where the guesses are; 0: none
#pragma unroll 1
        for (int t = 0, count = 0; t < given.steps; t += count, laps++) {
            const int64 step = (int64)text * given.steps + t;
            if (given.orders) {
                if (!order.take(b, given.orders, ticket, given.patience, given.hints)) break;
                const float *const before = order.pointer(Order::BEFORE) + rank * STATE;
                for (int i = tid; !(order.word[Order::WHAT] & GO_ON) && i < STATE; i += T) mem[STATES + i] = before[i];
            }
            if (guessing) {
                if (tid == 0) seen.bytes[seen.end & (PAST - 1)] = byte[0];
                seen.end++;
                meet();
                if (from && seen.at(from + count - 1) == seen.at(seen.end - 1))
                    from += count;  // the byte drawn was foreseen as well
                else
                    from = seen.same_before();
                if (t + 1 == given.steps) from = 0;
            }
            const int valid = from ? min(PASS, given.steps - t) : 1;
            guesses += valid - 1;
            auto guess = [&](int p) { return (int)seen.at(from + (p - 1) % (seen.end - from)); };
            auto begin_with = [&](int p) {
                if (given.inputs) return given.inputs + step * DM;
                const int fed = given.orders ? order.word[Order::WHAT] & 255 : !drawing ? given.tokens[step] : p ? guess(p) : byte[0];
                return given.embedding + (int64)fed * DM;
            };
            const int width = from ? PASS : 1;
            const bool raw = GUIDED || (STEM && given.inputs);
            const float *const angles = given.orders ? order.pointer(Order::ANGLES) : given.rotary + (int64)t * HD;
            const float turn = A && tid < width * HD ? angles[tid] : 0.f;
            constexpr int EACH = parts(DM, T), EMBEDDED_AT_ONCE = least(PASS, 4);
#pragma unroll 1
            for (int first = 0; first < width; first += EMBEDDED_AT_ONCE) {
                float found[EMBEDDED_AT_ONCE][EACH];  // asked for all at once
#pragma unroll
                for (int j = 0; j < EMBEDDED_AT_ONCE; j++)
                    if (j == 0 || first + j < width) {
                        const float *embedded = begin_with(first + j);
#pragma unroll
                        for (int k = 0; k < EACH; k++)
                            found[j][k] = tid + k * T < DM ? embedded[tid + k * T] : 0.f;
                    }
#pragma unroll
                for (int j = 0; j < EMBEDDED_AT_ONCE; j++)
#pragma unroll
                    for (int k = 0; k < EACH; k++)
                        if ((j == 0 || first + j < width) && tid + k * T < DM) {
                            if (raw)
                                mem[X + (first + j) * XS + tid + k * T] = found[j][k];
                            else
                                start(b, first + j, tid + k * T, found[j][k]);
                        }
            }
            if (A && tid < width * HD) mem[TURN + tid] = turn;
#pragma unroll 1
            for (int i = tid + T; A && i < width * HD; i += T) mem[TURN + i] = angles[i];
            meet();
            if constexpr (GUIDED) {  // the tile is passed by in any case
                float *const local = mem + LOCAL, *const x = mem + X;
                const float *hint = given.orders ? order.hint() : given.hints + step * HINT;
#pragma unroll 1
                for (int i = tid; given.hints && i < V; i += T) {  // once, as they may lie with the host
                    mem[HINTS + i] = hint[i];
                    mem[LIKELY + i] = __expf(0.5f * mem[HINTS + i]);
                }
                const unsigned which = given.hints && tid < b.mine ? __float_as_uint(hint[V]) : 0;
#pragma unroll 1
                for (int r = tid; given.hints && r < b.mine; r += T) {
                    const int c = rank * RD + r;
                    local[r] = x[c] + given.best[(which & 255) * DM + c] + given.kinds[(which >> 8 & 255) * DM + c];
                }
                meet();
                Weights<RD, V> prior;
                b.fetch(prior);
                b.rows<false, 1>(prior, mem + LIKELY, 0, [&](int r, int, float v) {
                    b.out[r] = r < b.mine ? v + local[r] : 0.f;
                });
                if (given.hints) b.give<RD, 1, RD>(), b.due = true, b.receive_x<1>();
                meet();
            }
            if (given.orders) {
                cache = order.pointer(Order::KEYS), slots = order.word[Order::SLOTS], begin = order.word[Order::BEGIN];
                if (A && order.pointer(Order::FROM) != cache)
                    copy_rows(b, order.pointer(Order::FROM), order.word[Order::FROM_SLOT], order.word[Order::FROM_SLOTS],
                              cache, slots);
            }
            float *const cache_of = cache + (int64)text * CACHES * 2 * SHARES_OF * slots * HD;
            float *const to = given.hidden ? given.hidden + step * DM : nullptr;
            const int now = given.orders ? order.word[Order::STORED] : given.stored + t;
            if (PASS > 1 && from)
                pass<PASS>(b, raw, cache_of, slots, begin, now, valid, given.final_norm, to);
            else
                pass<1>(b, raw, cache_of, slots, begin, now, valid, given.final_norm, to);
            if (GUIDED && given.hints) {
#pragma unroll 1
                for (int i = tid; i < V; i += T)
                    mem[LOGIT + i] = fmaf(mem[LOGIT + V], mem[HINTS + i], mem[LOGIT + i]);
                meet();
            }
            // The bytes behind are drawn one after another as long as they are what was guessed.
            for (count = 1; drawing && t + count < given.steps; count++) {
                choose(how, mem + LOGIT + (count - 1) * LS, mem + PROB, mem + KEPT, byte, text, given.streams, given.steps,
                       t + count);
                if (count >= valid || byte[0] != guess(count)) break;
                if (tid == 0) seen.bytes[seen.end + count - 1 & (PAST - 1)] = byte[0];
                meet();  // before the next is drawn
            }
            count = min(count, valid), row = count - 1;
            if (guessing) {
                seen.end += count - 1;
                if (from && count < PASS)
                    for (int i = tid; i < STATE; i += T) mem[STATES + i] = b.trail[row * STATE + i];
                meet();
            }
            if (given.log_probs && (given.all || given.orders || t + count >= given.steps))
                write_log_probs(mem + LOGIT + row * LS, given.log_probs, text, given.streams, given.all ? given.steps : 1, given.all ? t : 0);
            if (given.done && (given.orders || step + 1 == total) && rank == 0 && b.warp == 0) tell(given.done, ticket);
            if (given.orders) {  // the host has its answer
                float *const after = order.pointer(Order::AFTER) + rank * STATE;
                for (int i = tid; i < STATE; i += T) after[i] = mem[STATES + i];
                ticket = next_ticket(ticket);
            }
        }
        for (int i = tid; !given.orders && i < STATE; i += T) given.state_out[state_at + i] = mem[STATES + i];
    }
    if (tid == 0) {
        *ended = laps;
        arrive_at(b.over());
        if (given.passes && rank == 0) given.passes[0] = laps, given.passes[1] = guesses;
    }
}
