// What a block of hybrid.cu has and does whatever the layer: numbers exchanged with the other blocks,
// tiles of the weights, products of matrices, norms. Sizes are explained in hybrid.cu.

constexpr int pad(int n) { return n <= 96 ? parts(n, 32) * 32 : parts(n, 128) * 128; }
constexpr int most(int a, int b) { return a > b ? a : b; }
constexpr int least(int a, int b) { return a < b ? a : b; }

constexpr int RD = parts(DM, CL), DC = parts(DI, CL), HC = parts(H ? H : 1, CL), RV = parts(V + GUIDED, CL);
// From one byte of a pass to the next, in the vectors of all bytes.
constexpr int XS = pad(CL * RD), LS = up4(CL * RV);

// The table of a layer, in the resident weights; offsets in floats.
enum Entry { KIND, WINDOW, ADDED, KEPT_AS, SMALL, STATE_AT, CACHE, ENTRIES };
enum Kind { MAMBA, ATTENTION, MAMBA2, DELTA, KIMI, MAMBA3 };
// In the resident weights, behind the tables: gains of the norm behind the embedding; of that and before
// the first layer; bias of the head.
constexpr int STEM_GAIN = LAYERS * ENTRIES, FIRST = STEM_GAIN + DM, HEAD_BIAS = FIRST + DM;

struct Tile { int from, floats, place, gap; };  // gap: see supply; 0 for a tile that stays
constexpr int slices(int units) {
    int n = 1;
    while (n < WARPS && units > 8 * n) n *= 2;
    return n;
}

// A block's rows of a matrix, spread over its warps in slices of their columns.
template <int ROWS_, int COLUMNS_> struct Weights {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, W = pad(COLUMNS), UNITS = W / 32;
    static constexpr int FIT = most(1, TILE / W), TILES_OF = parts(ROWS, FIT);  // rows of a tile; tiles
    static constexpr int SLICES = slices(UNITS), GROUPS = WARPS / SLICES, U = parts(UNITS, SLICES);
    static constexpr int VEC = U % 4 == 0 && UNITS % 4 == 0 ? 4 : 1;  // floats that a lane reads at once
    static constexpr int R = parts(ROWS, GROUPS);  // rows of a warp
    // A lane's weights are in registers before their use where there are registers: a product of 32 or 40
    // numbers a lane takes 0.15 us then, and 0.7 to 1.0 us where they are read at their use.
    static constexpr bool EARLY = R * U <= (PASS > 1 && !MANY_REGISTERS ? 24 : 40);
    float held[EARLY ? R : 1][EARLY ? U : 1] = {};
    int at = -1, freed;  // of the tiles: the present one, the first that is not yet free
    const float *tile = nullptr;
};

struct Block {
    float *mem;          // this block's vectors and states in shared memory
    const float *small;  // its resident weights
    const float *own;    // those of the present layer
    const int *table;    // of the present layer
    int tid, lane, warp, rank;
    int mine;  // channels of d_model that are this block's
    float *out;  // numbers that the next exchange sends
    Packet *packets;
    unsigned exchange, side;  // the next one's number; which of two places
    float *trail;  // (PASS, STATE) in global memory: the states after each byte of a pass
    bool due;      // whether x is given and not yet received
    int used;      // tiles of this pass so far
    unsigned parity;  // of the ring's barriers

    // ------------------------------------------------------------------- exchanges
    // What up to N threads wrote, up to N may read: the first warp's need no meeting.
    template <int N> __forceinline__ void settle() {
        if constexpr (N <= 32)
            __syncwarp();
        else
            meet();
    }

    // N packets from where from(i) says; number j of packet i goes to mem[to(i, j)], or nowhere if that is
    // negative. Ends with a meeting of the block.
    template <int N, class From, class To> __forceinline__ void take(From from, To to) {
        constexpr int AT_ONCE = least(4, parts(N, T));
#pragma unroll 1
        for (int start = tid; start < N; start += AT_ONCE * T) {
            Packet found[AT_ONCE];
            int places[AT_ONCE][3];
            bool there;
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
                for (int e = 0; e < 3; e++) {
                    places[j][e] = to(start + j * T, e);
                    asm volatile("" : "+r"(places[j][e]));  // known before the packet is there
                }
            do {
                there = true;
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++)
                    if (start + j * T < N) found[j] = look(from(start + j * T));
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++)
                    if (start + j * T < N) there = there && found[j].exchange == exchange;
            } while (!there);
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
                if (start + j * T < N) {
                    if (places[j][0] >= 0) mem[places[j][0]] = found[j].a;
                    if (places[j][1] >= 0) mem[places[j][1]] = found[j].b;
                    if (places[j][2] >= 0) mem[places[j][2]] = found[j].c;
                }
        }
        exchange++;
        meet();
    }

    // An exchange: this block gives out[byte * N + i], N numbers of each of P bytes, which up to WRITERS
    // threads have written, and all blocks receive them, to mem[where(byte, block, i)].
    template <int N, int P> static constexpr int own_packets() { return parts(N * P, 3); }

    template <int N, int P, int WRITERS> __forceinline__ void give() {
        constexpr int OWN = own_packets<N, P>();
        static_assert(OWN <= PACKETS, "packing.py counts too few");
        Packet *const places = packets + side * COPIES * CL * PACKETS;
        settle<most(WRITERS, COPIES * OWN)>();
#pragma unroll 1
        for (int i = tid; i < COPIES * OWN; i += T) {
            const int at = 3 * (i % OWN);
            put(places + i / OWN * CL * PACKETS + rank * OWN + i % OWN, out[at], out[at + 1], out[at + 2], exchange);
        }
    }

    template <int N, int P, class Where> __forceinline__ void receive(Where where) {
        constexpr int OWN = own_packets<N, P>();
        const Packet *const from = packets + (side * COPIES + rank % COPIES) * CL * PACKETS;
        side ^= 1;
        take<CL * OWN>([&](int i) { return from + i; }, [&](int i, int j) {
            const int at = 3 * (i % OWN) + j;
            return N * P % 3 == 0 || at < N * P ? where(at / N, i / OWN, at % N) : -1;
        });
    }

    // The shares of vectors at `to`, `stride` from one byte's to the next.
    template <int N, int P> __forceinline__ void receive_all(int to, int stride) {
        receive<N, P>([&](int p, int block, int i) { return to + p * stride + block * N + i; });
    }

    // ------------------------------------------------------------------- tiles
    __forceinline__ const Tile *plan() { return (const Tile *)(mem + SCHEDULE); }
    __forceinline__ unsigned full(int tile) { return shared_address(mem + BARS) + 16 * tile; }
    __forceinline__ unsigned free(int tile) { return full(tile) + 8; }
    __forceinline__ unsigned over() { return full(TILES); }

    // One thread asks for all tiles in the order of their use, `laps` times or until *ended is the number
    // of laps that are over. A tile takes the place of the gap-th of the ring's tiles before it, once that
    // is free.
    __forceinline__ void supply(const float *tiles, int64 laps, volatile int *ended) {
        const float *from = tiles + (int64)rank * BLOB;
        int64 lap = 0;
        int tile = 0, back = 0, of_ring = 0;
        for (int i = 0; i < TILES; i++) of_ring += plan()[i].gap > 0;
        // The ring's tiles, counted from the first lap on: this one's number, and where `back` stands.
        int64 number = 0, freed = 0;
        unsigned free_lap = 0;
        auto pass_by = [&]() {  // `back` to the next of the ring's tiles
            do {
                if (++back == TILES) back = 0, free_lap ^= 1;
            } while (!plan()[back].gap);
        };
        while (of_ring && !plan()[back].gap) back++;
        for (; lap < laps && (of_ring || lap == 0); tile + 1 < TILES ? tile++ : (tile = 0, lap++)) {
            const Tile t = plan()[tile];
            if (lap > 0 && !t.gap) continue;
            if (t.gap) {
                for (; freed <= number - t.gap; freed++, pass_by())
                    while (!is_there(free(back), free_lap))
                        if (*ended >= 0) goto stopped;
                number++;
            }
            expect(full(tile), 4 * t.floats);
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                         ::"r"(shared_address((float *)small - SPACE + t.place)), "l"(from + t.from),
                         "r"(4 * t.floats), "r"(full(tile)) : "memory");
        }
    stopped:
        // Nothing may come in when the block has ended: what was asked for and is not used is waited for.
        wait_for(over(), 0);
        const int over_laps = *ended;
        number -= (int64)over_laps * of_ring;
        for (int i = 0, round = over_laps; number > 0; i + 1 < TILES ? i++ : (i = 0, round++))
            if (plan()[i].gap) wait_for(full(i), round & 1), number--;
    }

    // ------------------------------------------------------------------- products
    // Reads this warp's weights of a matrix, or leaves them for rows() where they are many. The matrix's
    // turn must have come; best before what it is multiplied with is there.
    template <class Matrix> __forceinline__ void fetch(Matrix &m) {
        m.freed = used;
        if constexpr (Matrix::EARLY)
            each_row<Matrix, Matrix::R>(m, 0, [&](int i, int u, const float (&a)[Matrix::VEC]) {
#pragma unroll
                for (int e = 0; e < Matrix::VEC; e++) m.held[i][u + e] = a[e];
            });
        if constexpr (Matrix::EARLY) let_go(m, used += Matrix::TILES_OF);
    }

    template <class Matrix> __forceinline__ void let_go(Matrix &m, int until) {
        __syncwarp();
#pragma unroll 1
        for (; m.freed < until; m.freed++)
            if (lane == 0 && plan()[m.freed].gap) arrive_at(free(m.freed));
    }

    template <class Matrix> __forceinline__ void read(const float *v, int u, float (&to)[Matrix::VEC]) {
        constexpr int VEC = Matrix::VEC;
        const float *from = v + 32 * (warp % Matrix::SLICES * Matrix::U + u) + VEC * lane;
        if constexpr (VEC == 4) {
            const float4 x = *(const float4 *)from;
            to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
        } else {
            to[0] = *from;
        }
    }

    template <class Matrix> __forceinline__ bool inside(int u) {
        return Matrix::UNITS % Matrix::SLICES == 0 || warp % Matrix::SLICES * Matrix::U + u < Matrix::UNITS;
    }

    // next(i, u, a lane's weights of it) for this warp's rows first + i, i below COUNT, and columns.
    template <class Matrix, int COUNT, class Next> __forceinline__ void each_row(Matrix &m, int first, Next next) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int r = warp / Matrix::SLICES + Matrix::GROUPS * (first + i);
            if (r >= Matrix::ROWS) continue;
            if (used + r / Matrix::FIT != m.at) {
                m.at = used + r / Matrix::FIT;
                let_go(m, m.at);
                const Tile here = plan()[m.at];
                wait_for(full(m.at), here.gap ? parity : 0);
                m.tile = small - SPACE + here.place;
            }
#pragma unroll
            for (int u = 0; u < Matrix::U; u += Matrix::VEC) {
                float a[Matrix::VEC] = {};
                if (inside<Matrix>(u)) read<Matrix>(m.tile + r % Matrix::FIT * Matrix::W, u, a);
                next(i, u, a);
            }
        }
    }

    // done(r, p, product of row r with the vector of byte p), each by one thread, neighbouring rows by
    // neighbouring threads; from[p * stride ...] has numbers up to a whole number of 32. NORMED: an RMS
    // norm divides the vector. Sums are the same in every P. What follows in another thread needs a meeting
    // of the block first, or settle().
    template <bool NORMED, int P, class Matrix, class Done>
    __forceinline__ void rows(Matrix &m, const float *from, int stride, Done done) {
        constexpr int N = Matrix::ROWS, SLICES = Matrix::SLICES, U = Matrix::U, VEC = Matrix::VEC, PP = power(P);
        constexpr int AT_ONCE = least(power(Matrix::R), most(1, 32 / PP)), VALUES = AT_ONCE * PP;
        constexpr bool HELD = P * U <= 32;  // a lane's part of the vectors is in registers
        const int slice = warp % SLICES, group = warp / SLICES;
        float *sums = mem + SUMS, *squares = sums + N * P * SLICES;
        float held[HELD ? P : 1][HELD ? U : 1], square[NORMED ? PP : 1] = {};
        if (HELD || NORMED)
#pragma unroll
            for (int p = 0; p < P; p++)
#pragma unroll
                for (int u = 0; u < U; u += VEC) {
                    float x[VEC] = {};
                    if (inside<Matrix>(u)) read<Matrix>(from + p * stride, u, x);
#pragma unroll
                    for (int e = 0; e < VEC; e++) {
                        if (HELD) held[p][u + e] = x[e];
                        if (NORMED) square[p] = fmaf(x[e], x[e], square[p]);
                    }
                }
        if constexpr (NORMED)
            if (group == Matrix::GROUPS - 1) {
                float sum = sums_over<PP, 32>(square);
                if (lane < P) squares[lane * SLICES + slice] = sum;
            }
#pragma unroll (Matrix::EARLY ? Matrix::R : 1)
        for (int first = 0; first < Matrix::R; first += AT_ONCE) {
            float sum[VALUES] = {};
            auto add = [&](int i, int u, const float (&a)[VEC]) {
#pragma unroll
                for (int p = 0; p < P; p++) {
                    float x[VEC] = {};
                    if (!HELD && inside<Matrix>(u)) read<Matrix>(from + p * stride, u, x);
#pragma unroll
                    for (int e = 0; e < VEC; e++)
                        sum[i * PP + p] = fmaf(a[e], HELD ? held[HELD ? p : 0][HELD ? u + e : 0] : x[e], sum[i * PP + p]);
                }
            };
            if constexpr (Matrix::EARLY) {
#pragma unroll
                for (int i = 0; i < least(AT_ONCE, Matrix::R - first); i++)
#pragma unroll
                    for (int u = 0; u < U; u += VEC) {
                        float a[VEC];
#pragma unroll
                        for (int e = 0; e < VEC; e++) a[e] = m.held[first + i][u + e];
                        add(i, u, a);
                    }
            } else {
                each_row<Matrix, AT_ONCE>(m, first, add);
            }
            const float all = sums_over<VALUES, 32>(sum);
            const int r = group + Matrix::GROUPS * (first + lane / PP), p = lane % PP;
            if (lane < VALUES && p < P && r < N) sums[(p * N + r) * SLICES + slice] = all;
        }
        if constexpr (!Matrix::EARLY) let_go(m, used += Matrix::TILES_OF);
        meet();
#pragma unroll 1
        for (int i = tid; i < N * P; i += T) {
            const int p = i / N;
            float value = 0.f, square_of = 0.f;
#pragma unroll
            for (int s = 0; s < SLICES; s++) value += sums[i * SLICES + s];
            if (NORMED) {
#pragma unroll
                for (int s = 0; s < SLICES; s++) square_of += squares[p * SLICES + s];
                value *= rsqrtf(square_of * (1.f / Matrix::COLUMNS) + EPS);
            }
            done(i % N, p, value);
        }
    }

    // ------------------------------------------------------------------- parts of layers
    // P vectors of d_model at `from`, normed, to `to`; the weights are in what comes next.
    template <int P> __forceinline__ void norm(bool centered, float eps, const float *from, float *to) {
        float mean[P], scale[P];
#pragma unroll
        for (int p = 0; p < P; p++) {
            const float *x = from + p * XS;
            float sum = 0.f, square = 0.f;
            for (int i = lane; i < DM; i += 32) sum += x[i];
            mean[p] = centered ? sum_over<32>(sum) * (1.f / DM) : 0.f;
            for (int i = lane; i < DM; i += 32) square = fmaf(x[i] - mean[p], x[i] - mean[p], square);
            scale[p] = rsqrtf(sum_over<32>(square) * (1.f / DM) + eps);
        }
        if (to == from) meet();
#pragma unroll
        for (int p = 0; p < P; p++)
#pragma unroll 1
            for (int i = tid; i < DM; i += T) to[p * XS + i] = (from[p * XS + i] - mean[p]) * scale[p];
        meet();
    }

    // As rows, of x behind a layer's norm, once x is there. An RMS norm divides the products.
    template <int N, int P, class Done> __forceinline__ void rows_normed(Done done) {
        Weights<N, DM> w;
        fetch(w);
        receive_x<P>();
        if constexpr (CENTERED) {
            norm<P>(true, EPS, mem + X, mem + XN);
            rows<false, P>(w, mem + XN, XS, done);
        } else {
            rows<true, P>(w, mem + X, XS, done);
        }
    }

    template <int P> __forceinline__ void receive_x() {
        if (due) receive_all<RD, P>(X, XS);
        due = false;
    }

    // A branch, of the vector at `from`, is added to x; behind a layer's last one also what the next layer
    // adds before.
    template <int P, class Matrix>
    __forceinline__ void branch(Matrix &w, const float *from, int stride, int gain, int bias, bool last) {
        rows<false, P>(w, from, stride, [&](int r, int p, float v) {
            float *const slot = mem + SLOT + p * SLOTS * RD + r;
            float value = fmaf(own[gain + r], v + own[bias + r], mem[X + p * XS + rank * RD + r]);
            if (last) {
                if (table[KEPT_AS] >= 0) slot[table[KEPT_AS] * RD] = value;
                if (table + ENTRIES < (const int *)small + LAYERS * ENTRIES && table[ENTRIES + ADDED] >= 0)
                    value = fmaf(own[SKIP + r], slot[table[ENTRIES + ADDED] * RD], value);
                if (MIXED) value = fmaf(own[EMBEDDED + r], mem[EMB + p * RD + r], own[STREAM + r] * value);
            }
            out[p * RD + r] = value;
        });
        give<RD, P, RD * P>();
        due = true;
    }

    // A mixer's last matrix, of y, which ready() makes.
    template <int COLUMNS, int P, class Ready> __forceinline__ void mix(Ready ready) {
        Weights<RD, COLUMNS> w;
        fetch(w);
        ready();
        branch<P>(w, mem + Y, YS, MIX_GAIN, MIX_BIAS, H == 0);
    }

    // A number of a layer's state after byte p of the pass.
    template <int P> __forceinline__ void keep(float *at, float value, int p) {
        if (p == P - 1) *at = value;
        if (P > 1) trail[p * STATE + (int)(at - (mem + STATES))] = value;
    }

    // Causal convolution and SiLU of one channel: of *value(p) for each byte p of the pass, to done(p, result).
    // tail (K - 1, width), w (K). All is read before anything is written.
    template <int P, class Value, class Done>
    __forceinline__ void convolve(const float *w, float bias, float *tail, int width, Value value, Done done) {
        float of[K], x[K - 1 + P], sum[P];
#pragma unroll
        for (int k = 0; k < K; k++) of[k] = w[k];
#pragma unroll
        for (int k = 0; k < K - 1; k++) x[k] = tail[k * width];
#pragma unroll
        for (int p = 0; p < P; p++) x[K - 1 + p] = *value(p);
#pragma unroll
        for (int p = 0; p < P; p++) {
            sum[p] = fmaf(of[K - 1], x[K - 1 + p], bias);
#pragma unroll
            for (int k = 0; k < K - 1; k++) sum[p] = fmaf(of[k], x[p + k], sum[p]);
            sum[p] *= sigmoid(sum[p]);
        }
#pragma unroll
        for (int p = 0; p < P; p++) {
            done(p, sum[p]);
#pragma unroll
            for (int k = 0; k < K - 1; k++) keep<P>(tail + k * width, x[p + 1 + k], p);
        }
    }
};
