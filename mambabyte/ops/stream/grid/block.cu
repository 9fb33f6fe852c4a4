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
enum Kind { MAMBA, ATTENTION, MAMBA2, DELTA, KIMI };
// In the resident weights, behind the tables: gains of the norm behind the embedding; of that and before
// the first layer; bias of the head.
constexpr int STEM_GAIN = LAYERS * ENTRIES, FIRST = STEM_GAIN + DM, HEAD_BIAS = FIRST + DM;

struct Tile { int from, floats, place, gap; };  // gap: see supply; 0 for a tile that stays
struct Packet { float a, b, c; unsigned exchange; };  // three numbers and the number of their exchange

// 16 bytes at once: who reads a packet has all of it or nothing of it.
inline void put(Packet *to, float a, float b, float c, unsigned exchange) {
    const unsigned long long low = __float_as_uint(a) | (unsigned long long)__float_as_uint(b) << 32;
    const unsigned long long high = __float_as_uint(c) | (unsigned long long)exchange << 32;
    asm volatile("{ .reg .b128 v; mov.b128 v, {%1, %2}; st.relaxed.gpu.global.b128 [%0], v; }"
                 ::"l"(to), "l"(low), "l"(high) : "memory");
}

inline Packet look(const Packet *from) {
    unsigned long long low, high;
    asm volatile("{ .reg .b128 v; ld.relaxed.gpu.global.b128 v, [%2]; mov.b128 {%0, %1}, v; }"
                 : "=l"(low), "=l"(high) : "l"(from) : "memory");
    return {__uint_as_float((unsigned)low), __uint_as_float((unsigned)(low >> 32)), __uint_as_float((unsigned)high),
            (unsigned)(high >> 32)};
}

inline bool is_there(unsigned bar, unsigned parity) {
    unsigned done;
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    return done;
}

inline void arrive_at(unsigned bar) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

constexpr int slices(int units) {
    int n = 1;
    while (n < WARPS && units > 8 * n) n *= 2;
    return n;
}

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
    int used;      // tiles of this pass so far
    unsigned parity;  // of the ring's barriers

    // ------------------------------------------------------------------- exchanges
    // n packets from where from(i) says, to got(i, packet). Ends with a meeting of the block.
    template <class From, class Got> inline void take(int n, From from, Got got) {
        constexpr int AT_ONCE = 4;
        for (int start = tid; start < n; start += AT_ONCE * T) {
            Packet found[AT_ONCE];
            bool there;
            do {
                there = true;
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++)
                    if (start + j * T < n) found[j] = look(from(start + j * T));
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++)
                    if (start + j * T < n) there = there && found[j].exchange == exchange;
            } while (!there);
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
                if (start + j * T < n) got(start + j * T, found[j]);
        }
        exchange++;
        meet();
    }

    // N numbers of each of P bytes go from out[byte * N + i] to mem[where(byte, block, i)] of all blocks.
    template <int N, int P, class Where> inline void swap(Where where) {
        constexpr int OWN = parts(N * P, 3);  // packets of a block
        static_assert(OWN <= PACKETS, "packing.py counts too few");
        Packet *const places = packets + side * COPIES * CL * PACKETS;
        side ^= 1;
        meet();
        for (int i = tid; i < COPIES * OWN; i += T) {
            const int at = 3 * (i % OWN);
            put(places + (i / OWN * CL + rank) * OWN + i % OWN, out[at], out[at + 1], out[at + 2], exchange);
        }
        const Packet *const from = places + rank % COPIES * CL * OWN;
        take(CL * OWN, [&](int i) { return from + i; }, [&](int i, const Packet &found) {
            const int block = i / OWN, at = 3 * (i % OWN);
            auto to = [&](int j, float value) {
                if (N * P % 3 == 0 || j < N * P) mem[where(j / N, block, j % N)] = value;
            };
            to(at, found.a), to(at + 1, found.b), to(at + 2, found.c);
        });
    }

    // The shares of vectors at `to`, `stride` from one byte's to the next.
    template <int N, int P> inline void swap_all(int to, int stride) {
        swap<N, P>([&](int p, int block, int i) { return to + p * stride + block * N + i; });
    }

    // ------------------------------------------------------------------- tiles
    inline const Tile *plan() { return (const Tile *)(mem + SCHEDULE); }
    inline unsigned full(int tile) { return shared_address(mem + BARS) + 16 * tile; }
    inline unsigned free(int tile) { return full(tile) + 8; }
    inline unsigned over() { return full(TILES); }

    // One thread asks for all tiles in the order of their use, `laps` times or until *ended is the number
    // of laps that are over. A tile takes the place of the gap-th of the ring's tiles before it, once that
    // is free.
    inline void supply(const float *tiles, int64 laps, volatile int *ended) {
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
        wait(over(), 0);
        for (int64 at = (int64)*ended * of_ring; at < number; at++) {
            int i = 0;
            for (int skip = (int)(at % of_ring); !plan()[i].gap || skip > 0; i++) skip -= plan()[i].gap > 0;
            wait(full(i), (unsigned)(at / of_ring) & 1);
        }
    }

    // ------------------------------------------------------------------- products
    // done(r, p, product of row r with the vector of byte p) for this block's N rows, each by one thread,
    // neighbouring rows by neighbouring threads; from[p * stride ...] has numbers up to a whole number of
    // 32. NORMED: an RMS norm divides the vector. Rows are spread over the warps in SLICES of their
    // columns. What follows in another thread needs a meeting of the block first.
    template <int N, int COLUMNS, bool NORMED, int P, class Done>
    inline void rows(const float *from, int stride, Done done) {
        constexpr int W = pad(COLUMNS), UNITS = W / 32, FIT = most(1, TILE / W);  // rows of a tile
        constexpr int SLICES = slices(UNITS), GROUPS = WARPS / SLICES, U = parts(UNITS, SLICES);
        constexpr int VEC = U % 4 == 0 && UNITS % 4 == 0 ? 4 : 1;  // floats that a lane reads at once
        constexpr int R = parts(N, GROUPS), AT_ONCE = least(power(R), most(1, 32 / power(P)));
        constexpr bool HELD = P * U <= 32;  // a lane's part of the vectors is in registers
        constexpr int VALUES = AT_ONCE * power(P);
        const int slice = warp % SLICES, group = warp / SLICES, begin = slice * U;
        float *sums = mem + SUMS, *squares = sums + N * P * SLICES;
        auto column = [&](int u) { return 32 * (begin + u) + (VEC == 4 ? 4 * lane : lane); };
        auto inside = [&](int u) { return begin + u < UNITS; };
        float held[HELD ? P : 1][HELD ? U : 1], square[NORMED ? power(P) : 1] = {};
        auto read = [&](const float *v, int u, float (&to)[VEC]) {
            if constexpr (VEC == 4) {
                const float4 x = *(const float4 *)(v + column(u));
                to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
            } else {
                to[0] = v[column(u)];
            }
        };
        if (HELD || NORMED)
#pragma unroll
            for (int p = 0; p < P; p++)
#pragma unroll
                for (int u = 0; u < U; u += VEC) {
                    float x[VEC] = {};
                    if (inside(u)) read(from + p * stride, u, x);
#pragma unroll
                    for (int e = 0; e < VEC; e++) {
                        if (HELD) held[p][u + e] = x[e];
                        if (NORMED) square[p] = fmaf(x[e], x[e], square[p]);
                    }
                }
        if constexpr (NORMED)
            if (group == GROUPS - 1) {
                float sum = sums_over<power(P), 32>(square);
                if (lane < P) squares[lane * SLICES + slice] = sum;
            }
        int at = -1, freed = used;  // of the tiles of this matrix: the present one, the first not yet free
        const float *tile = nullptr;
        auto let_go = [&](int until) {
            __syncwarp();
            for (; freed < until; freed++)
                if (lane == 0 && plan()[freed].gap) arrive_at(free(freed));
        };
#pragma unroll 1
        for (int first = 0; first < R; first += AT_ONCE) {
            float sum[VALUES] = {};
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int r = group + GROUPS * (first + i);
                if (r < N) {
                    if (used + r / FIT != at) {
                        at = used + r / FIT;
                        let_go(at);
                        const Tile here = plan()[at];
                        wait(full(at), here.gap ? parity : 0);
                        tile = small - SPACE + here.place;
                    }
                    const float *w = tile + r % FIT * W;
#pragma unroll
                    for (int u = 0; u < U; u += VEC) {
                        if (!inside(u)) continue;
                        float a[VEC];
                        read(w, u, a);
#pragma unroll
                        for (int p = 0; p < P; p++) {
                            float x[VEC];
                            if (!HELD) read(from + p * stride, u, x);
#pragma unroll
                            for (int e = 0; e < VEC; e++)
                                sum[i * power(P) + p] =
                                    fmaf(a[e], HELD ? held[HELD ? p : 0][HELD ? u + e : 0] : x[e], sum[i * power(P) + p]);
                        }
                    }
                }
            }
            const float all = sums_over<VALUES, 32>(sum);
            const int r = group + GROUPS * (first + lane / power(P)), p = lane % power(P);
            if (lane < VALUES && p < P && r < N) sums[(p * N + r) * SLICES + slice] = all;
        }
        let_go(used += parts(N, FIT));
        meet();
        for (int i = tid; i < N * P; i += T) {
            const int p = i / N;
            float value = 0.f, square_of = 0.f;
#pragma unroll
            for (int s = 0; s < SLICES; s++) value += sums[i * SLICES + s];
            if (NORMED) {
#pragma unroll
                for (int s = 0; s < SLICES; s++) square_of += squares[p * SLICES + s];
                value *= rsqrtf(square_of * (1.f / COLUMNS) + EPS);
            }
            done(i % N, p, value);
        }
    }

    // ------------------------------------------------------------------- parts of layers
    // P vectors of d_model at `from`, normed, to `to`; the weights are in what comes next.
    template <int P> inline void norm(bool centered, float eps, const float *from, float *to) {
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
            for (int i = tid; i < DM; i += T) to[p * XS + i] = (from[p * XS + i] - mean[p]) * scale[p];
        meet();
    }

    // As rows, of x behind a layer's norm. An RMS norm divides the products.
    template <int N, int P, class Done> inline void rows_normed(Done done) {
        if constexpr (CENTERED) {
            norm<P>(true, EPS, mem + X, mem + XN);
            rows<N, DM, false, P>(mem + XN, XS, done);
        } else {
            rows<N, DM, true, P>(mem + X, XS, done);
        }
    }

    // A branch is added to x; behind a layer's last one also what the next layer adds before.
    template <int N, int COLUMNS, int P>
    inline void branch(const float *from, int stride, int gain, int bias, bool last) {
        rows<N, COLUMNS, false, P>(from, stride, [&](int r, int p, float v) {
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
        swap_all<RD, P>(X, XS);
    }

    template <int COLUMNS, int P> inline void mix(const float *from, int stride) {
        branch<RD, COLUMNS, P>(from, stride, MIX_GAIN, MIX_BIAS, H == 0);
    }

    // A number of a layer's state after byte p of the pass.
    template <int P> inline void keep(float *at, float value, int p) {
        *at = value;
        if (P > 1) trail[p * STATE + (int)(at - (mem + STATES))] = value;
    }

    // Causal convolution and SiLU of one channel of byte p; tail (K - 1, width), w (K).
    template <int P>
    inline float convolve(const float *w, float bias, float *tail, int width, float value, int p) {
        float sum = fmaf(w[K - 1], value, bias), old[K];
#pragma unroll
        for (int k = 0; k < K - 1; k++) {
            old[k] = tail[k * width];
            sum = fmaf(w[k], old[k], sum);
        }
#pragma unroll
        for (int k = 1; k < K - 1; k++) keep<P>(tail + (k - 1) * width, old[k], p);
        if (K > 1) keep<P>(tail + (K > 1 ? K - 2 : 0) * width, value, p);
        return sum * sigmoid(sum);
    }
};
