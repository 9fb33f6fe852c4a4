// The gated delta rule in chunks of T steps on tensor cores, forward and backward, with a gate a head
// or (CHANNEL) a gate a key channel. Follows types.cu, mma.cu and chunks.cu.
//
// For a head with D key and D value channels, in a chunk that is entered with state S (D x D): u_i are
// the log-decays cumulated up to and with step i, p_j = beta_j k_j, and x_j = v_j - S_j'^T k_j is what
// the decayed state misses at key j. Then
//
//   (I + A) X = V - K' S          A_ij = sum_c k_i[c] p_j[c] exp(u_i[c] - u_j[c])   for j < i
//   O = Q' S + N X                N_ij = sum_c q_i[c] p_j[c] exp(u_i[c] - u_j[c])   for j <= i
//   S <- exp(u_T) S + P'^T X      K' = exp(u) K, Q' = exp(u) Q, P' = exp(u_T - u) P
//
// delta_pairs makes (I + A)^-1 and N of each chunk, delta_forward goes from chunk to chunk; backward,
// delta_backward goes from the last chunk to the first one for the gradients of V and S, and
// delta_gradients has the rest of each chunk. A block has one chunk, or some value channels, of a head;
// its four warps have 16 of 64 rows each. Sums are float32, factors bf16; the inverse is made from
// factors of two bf16 parts each and rounded once.
//
// With a gate a head, exp(u_i - u_j) multiplies whole products. With a gate a channel it is a product of
// two factors in [0, 1] wherever a step `base` lies between the two: a chunk is halved, the base is the
// last step of the first half, and each half is halved again. So there is no positive exponent.
//
// ages (B, L), null for one document a row: 0 where a document begins, which goes on from a state of zeros.
// Every sum has a fixed order. Strides are in elements; the last axis has stride one.

constexpr int D = 64, ROW = D + 8, TILE = T * ROW;  // of bf16 tiles
constexpr int WIDE_ROW = 72;                        // of float32 tiles: rows 32 bytes apart modulo 128
constexpr int PARTS = 2, COLUMNS = D / PARTS, PASS_THREADS = PARTS * THREADS;  // of a pass: four warps a part
// Numbers of a chunk that delta_pairs leaves for the passes.
template <bool CHANNEL> constexpr int SCALES = CHANNEL ? D : 3 * D;

// Where a lane's numbers of a 16 x 16 block of sums or of a left operand lie: register j has row
// lane / 4 + 8 (j % 2) and the columns 2 (lane % 4) + 8 (j / 2) and the next.
struct Lane {
    int warp, g, t;
    inline Lane() : warp(threadIdx.x / 32 % WARPS), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4 * 2) {}
    inline int row(int j) const { return 16 * warp + g + 8 * (j % 2); }
    inline int column(int j) const { return t + 8 * (j / 2); }
};

// ---------------------------------------------------------------------------------------- gates

inline float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

inline float log2_decay(float log_decay, bool begins) {
    return (begins ? NOTHING : at_least(log_decay)) * 1.44269504f;
}

// Cumulates the log-decays of a chunk, to the base 2: u[t * WIDE_ROW + c] with a gate a channel, else u[t]. Steps that
// are not there do not decay; where a document begins nothing is kept. To be followed by a barrier.
template <bool CHANNEL, int COUNT>
inline void load_gates(float *u, const float *log_decay, const unsigned char *ages, int heads, int rows) {
    if (CHANNEL) {
        constexpr int STEPS = T * D / COUNT;
        int c = threadIdx.x % D, part = threadIdx.x / D, first = part * STEPS;
        static_assert(STEPS <= 32, "a lane looks at each");
        float sum[STEPS], upto = 0.f, before = 0.f;
#pragma unroll
        for (int i = 0; i < STEPS; i++)
            sum[i] = first + i < rows ? log_decay[(int64)(first + i) * heads * D + c] : 0.f;
        int step = first + threadIdx.x % 32;
        u32 begin = ages ? __ballot_sync(ALL, step < rows && ages[step] == 0) : 0u;
#pragma unroll
        for (int i = 0; i < STEPS; i++) sum[i] = upto += log2_decay(sum[i], begin >> i & 1);
        u[part * WIDE_ROW + c] = upto;
        __syncthreads();
        for (int i = 0; i < part; i++) before += u[i * WIDE_ROW + c];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < STEPS; i++) u[(first + i) * WIDE_ROW + c] = before + sum[i];
    } else if (threadIdx.x < 32) {
        int t = 2 * threadIdx.x;
        float g[2];
#pragma unroll
        for (int k = 0; k < 2; k++)
            g[k] = t + k < rows ? log2_decay(log_decay[(int64)(t + k) * heads], ages && ages[t + k] == 0)
                                : 0.f;
        float sum = cumulated(g[0] + g[1]), before = __shfl_sync(ALL, sum, threadIdx.x - 1);
        u[t] = (t ? before : 0.f) + g[0];
        u[t + 1] = sum;
    }
}

inline void load_shares(float *beta, const float *from, int heads, int rows) {
    int t = threadIdx.x;
    if (t < T) beta[t] = t < rows ? from[(int64)t * heads] : 0.f;
}

// Blocks of 2 SIZE steps: whether a row is in the second half of its own, and the last step of the first.
template <int SIZE> inline bool is_second(int row) { return row / SIZE % 2; }
template <int SIZE> inline int base_of(int row) { return row / (2 * SIZE) * (2 * SIZE) + SIZE - 1; }

// The decay between a row and its base, of two neighbouring channels.
template <int SIZE> inline float2 to_base(const float *u, int row, int column) {
    float2 here = *(const float2 *)(u + row * WIDE_ROW + column);
    float2 base = *(const float2 *)(u + base_of<SIZE>(row) * WIDE_ROW + column);
    return make_float2(exp2_of(-fabsf(here.x - base.x)), exp2_of(-fabsf(here.y - base.y)));
}

inline u32 scaled(u32 pair, float2 by, float factor) {
    return pack(low_of(pair) * by.x * factor, high_of(pair) * by.y * factor);
}

// ---------------------------------------------------------------------------------------- inverse

// Operands of two bf16 parts, so that a product of two has the error of float32 but for 1e-5.
struct LeftParts { u32 high[4], low[4]; };

inline void split(u32 &high, u32 &low, float x, float y) {
    high = pack(x, y);
    low = pack(x - low_of(high), y - high_of(high));
}

inline LeftParts left_parts(const float *tile, int row, int column) {
    Lane lane;
    LeftParts a;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float2 pair = *(const float2 *)(tile + (row + lane.g + 8 * (j % 2)) * WIDE_ROW + column +
                                        lane.column(j));
        split(a.high[j], a.low[j], pair.x, pair.y);
    }
    return a;
}

inline LeftParts left_parts(const float (&first)[4], const float (&second)[4]) {
    LeftParts a;
    split(a.high[0], a.low[0], first[0], first[1]);
    split(a.high[1], a.low[1], first[2], first[3]);
    split(a.high[2], a.low[2], second[0], second[1]);
    split(a.high[3], a.low[3], second[2], second[3]);
    return a;
}

// sum (16 x 8) += a tile's 16 x 8 at (row, column), from the left by a.
inline void multiply_parts(float (&sum)[4], const LeftParts &a, const float *tile, int row, int column) {
    Lane lane;
    const float *from = tile + (row + lane.t) * WIDE_ROW + column + lane.g;
    u32 high[2], low[2];
#pragma unroll
    for (int k = 0; k < 2; k++)
        split(high[k], low[k], from[8 * k * WIDE_ROW], from[(8 * k + 1) * WIDE_ROW]);
    mma(sum, a.low, high[0], high[1]);
    mma(sum, a.high, low[0], low[1]);
    mma(sum, a.high, high[0], high[1]);
}

inline void store_negative(float *tile, int row, int column, const float (&sum)[2][4]) {
    Lane lane;
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int down = 0; down < 2; down++)
            *(float2 *)(tile + (row + lane.g + 8 * down) * WIDE_ROW + column + 8 * n + lane.t) =
                make_float2(-sum[n][2 * down], -sum[n][2 * down + 1]);
    }
}

// Replaces A, strictly lower triangular, by (I + A)^-1: blocks of 16 by substitution, then
// [[a, 0], [b, c]]^-1 = [[a^-1, 0], [-c^-1 b a^-1, c^-1]]. Needs and leaves a barrier's order within
// warps only before it; above the blocks of 16 on the diagonal nothing is read or written.
inline void invert(float *a) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = lane % 16;
    {
        float *block = a + 16 * warp * (WIDE_ROW + 1), x[16];
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float sum = i == column ? 1.f : 0.f;
#pragma unroll
            for (int k = 0; k < i; k++) sum -= block[i * WIDE_ROW + k] * x[k];
            x[i] = sum;
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 16; i++)
            if (lane < 16) block[i * WIDE_ROW + column] = x[i];
    }
    __syncthreads();
    if (warp < 2) {
        float *block = a + 32 * warp * (WIDE_ROW + 1), p[2][4] = {}, sum[2][4] = {};
        LeftParts c = left_parts(block, 16, 16);
        multiply_parts(p[0], c, block, 16, 0);
        multiply_parts(p[1], c, block, 16, 8);
        LeftParts cb = left_parts(p[0], p[1]);
        multiply_parts(sum[0], cb, block, 0, 0);
        multiply_parts(sum[1], cb, block, 0, 8);
        __syncwarp();
        store_negative(block, 16, 0, sum);
    }
    __syncthreads();
    int down = warp / 2, right = warp % 2;
    float p[4][4] = {}, sum[2][4] = {};
#pragma unroll
    for (int k = 0; k < 2; k++) {
        if (k > down) continue;
        LeftParts c = left_parts(a, 32 + 16 * down, 32 + 16 * k);
#pragma unroll
        for (int n = 0; n < 4; n++) multiply_parts(p[n], c, a, 32 + 16 * k, 8 * n);
    }
#pragma unroll
    for (int k = 0; k < 2; k++) {
        if (k < right) continue;
        LeftParts cb = left_parts(p[2 * k], p[2 * k + 1]);
#pragma unroll
        for (int n = 0; n < 2; n++) multiply_parts(sum[n], cb, a, 16 * k, 16 * right + 8 * n);
    }
    __syncthreads();
    store_negative(a, 32 + 16 * down, 16 * right, sum);
    __syncthreads();
}

// ---------------------------------------------------------------------------------------- pairs

// A lane's part of a block of A, into its tile, and of N, into device memory; sums of products that are
// decayed already.
inline void store_pairs(float *tile, bfloat16 *reads, int block, const float (&a)[2][4],
                        const float (&n)[2][4]) {
    Lane lane;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        int row = lane.row(j), column = 16 * block + lane.column(j), e = 2 * (j % 2);
        *(float2 *)(tile + row * WIDE_ROW + column) = make_float2(a[j / 2][e], a[j / 2][e + 1]);
        *(u32 *)(reads + row * D + column) = pack(n[j / 2][e], n[j / 2][e + 1]);
    }
}

// Adds the pairs of blocks of 2 SIZE steps that lie in different halves, within the warp's 16 steps. The
// rows that key and query registers hold are the columns as well.
template <int SIZE>
inline void add_pairs(float (&a)[2][4], float (&n)[2][4], const bfloat16 *tile_k, const bfloat16 *tile_q,
                      const float *u, const float *beta) {
    Lane lane;
    float of_a[2][4] = {}, of_n[2][4] = {};
#pragma unroll 1  // code that is read again and again is short
    for (int c = 0; c < D; c += 16) {
        u32 keys[4], queries[4];
        load_left<false>(keys, tile_k, ROW, 16 * lane.warp, c);
        load_left<false>(queries, tile_q, ROW, 16 * lane.warp, c);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = lane.row(j);
            float2 decay = to_base<SIZE>(u, row, c + lane.column(j));
            keys[j] = scaled(keys[j], decay, is_second<SIZE>(row) ? 1.f : beta[row]);
            queries[j] = scaled(queries[j], decay, 1.f);
        }
#pragma unroll
        for (int right = 0; right < (SIZE == 8 ? 1 : 2); right++) {
            mma(of_a[right], keys, keys[right], keys[2 + right]);
            mma(of_n[right], queries, keys[right], keys[2 + right]);
        }
    }
#pragma unroll
    for (int right = 0; right < 2; right++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int i = lane.g + e / 2 * 8, j = 8 * right + lane.t + e % 2;
            if (i > j && (i ^ j) / SIZE == 1) {
                a[right][e] += of_a[right][e];
                n[right][e] += of_n[right][e];
            }
        }
    }
}

// Blocks of 2 SIZE steps, SIZE 16 or 32: where the keys of their first halves lie, which other warps read.
template <int SIZE> inline int place_of_keys(int row) { return SIZE == 32 ? 32 + row : row / 32 * 16 + row % 16; }

template <int SIZE>
inline void share_keys(bfloat16 *to, const bfloat16 *tile_k, const float *u, const float *beta) {
    for (int i = threadIdx.x; i < T * D / 4; i += THREADS) {
        int k = i / (D / 2), row = k / SIZE * (2 * SIZE) + k % SIZE, column = i % (D / 2) * 2;
        *(u32 *)(to + place_of_keys<SIZE>(row) * ROW + column) =
            scaled(*(const u32 *)(tile_k + row * ROW + column), to_base<SIZE>(u, row, column), beta[row]);
    }
}

template <int SIZE>
inline void pairs_across(float (&a)[SIZE / 8][4], float (&n)[SIZE / 8][4], const bfloat16 *shared_keys,
                         const bfloat16 *tile_k, const bfloat16 *tile_q, const float *u) {
    Lane lane;
    if (!is_second<SIZE>(16 * lane.warp)) return;
    int first = 16 * lane.warp / (2 * SIZE) * (2 * SIZE);
#pragma unroll 1
    for (int c = 0; c < D; c += 16) {
        u32 keys[1][4], queries[1][4];
        load_left<false>(keys[0], tile_k, ROW, 16 * lane.warp, c);
        load_left<false>(queries[0], tile_q, ROW, 16 * lane.warp, c);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 decay = to_base<SIZE>(u, lane.row(j), c + lane.column(j));
            keys[0][j] = scaled(keys[0][j], decay, 1.f);
            queries[0][j] = scaled(queries[0][j], decay, 1.f);
        }
        multiply<true>(a, keys, shared_keys + place_of_keys<SIZE>(first) * ROW + c, ROW);
        multiply<true>(n, queries, shared_keys + place_of_keys<SIZE>(first) * ROW + c, ROW);
    }
}

template <int SIZE>
inline void store_across(float *tile_a, bfloat16 *reads, const float (&a)[SIZE / 8][4],
                         const float (&n)[SIZE / 8][4]) {
    Lane lane;
    if (!is_second<SIZE>(16 * lane.warp)) return;
    int first = 16 * lane.warp / (2 * SIZE) * (2 * SIZE);
#pragma unroll
    for (int block = 0; block < SIZE / 16; block++) {
        float one[2][4], two[2][4];
#pragma unroll
        for (int e = 0; e < 8; e++) {
            one[e / 4][e % 4] = a[2 * block + e / 4][e % 4];
            two[e / 4][e % 4] = n[2 * block + e / 4][e % 4];
        }
        store_pairs(tile_a, reads, first / 16 + block, one, two);
    }
}

// inverse and reads (B, K, H, T, T): (I + A)^-1 and N. decayed (B, K, H, 3, T, D), with CHANNEL alone:
// K', Q' and P'. scales (B, K, H, 1 or 3, D): exp(u_T) of each key channel, and with a gate a head
// exp(u_i) and beta_i exp(u_T - u_i).
template <bool CHANNEL>
__global__ void __launch_bounds__(THREADS, 4) delta_pairs(
    const bfloat16 *q, const bfloat16 *k, const float *log_decay, const float *beta,
    const unsigned char *ages, bfloat16 *inverse, bfloat16 *reads, bfloat16 *decayed, float *scales, int64 q_batch,
    int64 q_time, int64 q_head, int64 k_batch, int64 k_time, int64 k_head, int length, int heads) {
    extern __shared__ __align__(128) char shared[];
    bfloat16 *tile_q = (bfloat16 *)shared, *tile_k = tile_q + TILE;
    float *tile_a = (float *)(CHANNEL ? tile_q : tile_k + TILE);  // in the place of q and k, or behind
    float *u = (float *)(tile_k + TILE);                          // with CHANNEL alone
    bfloat16 *far_keys = (bfloat16 *)(u + T * WIDE_ROW);          // too
    __shared__ float gates[T], share[T];
    if (!CHANNEL) u = gates;
    Place here(length, heads);
    int64 of_head = here.first * heads + here.head;
    if (ages) ages += here.first;
    load_gates<CHANNEL, THREADS>(u, log_decay + of_head * (CHANNEL ? D : 1), ages, heads, here.rows);
    load_shares(share, beta + of_head, heads, here.rows);
    load_tile<D>(tile_q, q + here.at({q_batch, q_time, q_head}, here.head), q_time, here.rows);
    load_tile<D>(tile_k, k + here.at({k_batch, k_time, k_head}, here.head), k_time, here.rows);
    __syncthreads();

    Lane lane;
    inverse += (int64)blockIdx.x * T * T, reads += (int64)blockIdx.x * T * T;
    scales += (int64)blockIdx.x * SCALES<CHANNEL>;
    if (CHANNEL) {
        u32 *to = (u32 *)(decayed + (int64)blockIdx.x * 3 * T * D);
        for (int i = threadIdx.x; i < T * D / 2; i += THREADS) {
            int row = i / (D / 2), column = i % (D / 2) * 2;
            float2 here = *(const float2 *)(u + row * WIDE_ROW + column);
            float2 last = *(const float2 *)(u + (T - 1) * WIDE_ROW + column);
            float2 start = make_float2(exp2_of(here.x), exp2_of(here.y));
            float2 end = make_float2(exp2_of(last.x - here.x), exp2_of(last.y - here.y));
            u32 key = *(const u32 *)(tile_k + row * ROW + column);
            u32 query = *(const u32 *)(tile_q + row * ROW + column);
            to[i] = scaled(key, start, 1.f);
            to[T * D / 2 + i] = scaled(query, start, 1.f);
            to[T * D + i] = scaled(key, end, share[row]);
        }
        if (threadIdx.x < D) scales[threadIdx.x] = exp2_of(u[(T - 1) * WIDE_ROW + threadIdx.x]);
        share_keys<16>(far_keys, tile_k, u, share);
        share_keys<32>(far_keys, tile_k, u, share);
        float a[2][4] = {}, n[2][4] = {}, own[2] = {0.f, 0.f};
#pragma unroll
        for (int c = 0; c < D; c += 16) {
            u32 keys[4], queries[4];
            load_left<false>(keys, tile_k, ROW, 16 * lane.warp, c);
            load_left<false>(queries, tile_q, ROW, 16 * lane.warp, c);
#pragma unroll
            for (int j = 0; j < 4; j++)
                own[j % 2] += low_of(keys[j]) * low_of(queries[j]) + high_of(keys[j]) * high_of(queries[j]);
        }
        add_pairs<8>(a, n, tile_k, tile_q, u, share);
        add_pairs<4>(a, n, tile_k, tile_q, u, share);
        add_pairs<2>(a, n, tile_k, tile_q, u, share);
        add_pairs<1>(a, n, tile_k, tile_q, u, share);
#pragma unroll
        for (int down = 0; down < 2; down++) {
            float diagonal = sum_of_row(own[down]) * share[lane.row(down)];
#pragma unroll
            for (int e = 0; e < 2; e++)  // row and column agree in their halves
                if (lane.t + e == lane.g) n[down][2 * down + e] = diagonal;
        }
        __syncthreads();  // the shared keys are there
        float far_a[2][4] = {}, far_n[2][4] = {}, farther_a[4][4] = {}, farther_n[4][4] = {};
        pairs_across<16>(far_a, far_n, far_keys, tile_k, tile_q, u);
        pairs_across<32>(farther_a, farther_n, far_keys, tile_k, tile_q, u);
        __syncthreads();  // no warp needs the tiles of q and k any more
        store_pairs(tile_a, reads, lane.warp, a, n);
        store_across<16>(tile_a, reads, far_a, far_n);
        store_across<32>(tile_a, reads, farther_a, farther_n);
    } else {
        if (threadIdx.x < T) {
            int t = threadIdx.x;
            scales[t] = exp2_of(gates[T - 1]);
            scales[D + t] = exp2_of(gates[t]);
            scales[2 * D + t] = exp2_of(gates[T - 1] - gates[t]) * share[t];
        }
        for (int block = 0; block <= lane.warp; block++) {
            float a[2][4] = {}, n[2][4] = {};
            multiply<false, true, D / 16>(a, tile_k, ROW, 16 * lane.warp, tile_k + 16 * block * ROW, ROW);
            multiply<false, true, D / 16>(n, tile_q, ROW, 16 * lane.warp, tile_k + 16 * block * ROW, ROW);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                int i = lane.row(e / 2 % 2), j = 16 * block + 8 * (e / 4) + lane.t + e % 2;
                float weight = i >= j ? exp2_of(gates[i] - gates[j]) * share[j] : 0.f;
                a[e / 4][e % 4] = i > j ? a[e / 4][e % 4] * weight : 0.f;
                n[e / 4][e % 4] = i >= j ? n[e / 4][e % 4] * weight : 0.f;
            }
            store_pairs(tile_a, reads, block, a, n);
        }
    }
    __syncthreads();
    invert(tile_a);
    for (int i = threadIdx.x; i < T * T / 2; i += THREADS) {
        int row = i / (T / 2), column = i % (T / 2) * 2;
        bool above = column / 16 > row / 16;
        float2 pair = *(const float2 *)(tile_a + row * WIDE_ROW + column);
        ((u32 *)inverse)[i] = above ? 0u : pack(pair.x, pair.y);
        if (above) ((u32 *)reads)[i] = 0u;
    }
}

// ---------------------------------------------------------------------------------------- passes

// Which head a block of a pass has, and which value channels its threads.
struct Part {
    int head, column, chunks;
    int64 batch, unit;  // unit: of (B, H)
    inline Part(int length, int heads) {
        column = threadIdx.x / THREADS * COLUMNS;
        unit = blockIdx.x;
        head = (int)(unit % heads);
        batch = unit / heads;
        chunks = (length + T - 1) / T;
    }
    inline int64 block(int chunk, int heads) const { return (batch * chunks + chunk) * heads + head; }
};

// What a pass reads of a chunk, but for its own sequence: (I + A)^-1, N, keys, queries and P'. With a
// gate a head keys and queries are as they came, and the keys serve for P' too.
template <bool CHANNEL> struct Tiles {
    static constexpr int COUNT = CHANNEL ? 5 : 4, SIZE = (COUNT + 1) * TILE;
    bfloat16 *inverse, *reads, *keys, *queries, *ends, *own;
    inline explicit Tiles(bfloat16 *at)
        : inverse(at), reads(at + TILE), keys(at + 2 * TILE), queries(at + 3 * TILE),
          ends(at + (CHANNEL ? 4 : 2) * TILE), own(at + COUNT * TILE) {}
};

struct Source {
    const bfloat16 *q, *k, *inverse, *reads, *decayed, *own;
    Strides of_q, of_k, of_own;
    int length, heads;
};

template <bool CHANNEL>
inline void fetch(const Tiles<CHANNEL> &tiles, const Source &from, const Part &part, int chunk) {
    int64 block = part.block(chunk, from.heads);
    int rows = min(T, from.length - chunk * T);
    int64 first = (int64)chunk * T;
    copy_tile<D, PASS_THREADS>(tiles.inverse, from.inverse + block * T * T, T, T);
    copy_tile<D, PASS_THREADS>(tiles.reads, from.reads + block * T * T, T, T);
    if (CHANNEL) {
        const bfloat16 *decayed = from.decayed + block * 3 * T * D;
        copy_tile<D, PASS_THREADS>(tiles.keys, decayed, D, T);
        copy_tile<D, PASS_THREADS>(tiles.queries, decayed + T * D, D, T);
        copy_tile<D, PASS_THREADS>(tiles.ends, decayed + 2 * T * D, D, T);
    } else {
        const Strides &q = from.of_q, &k = from.of_k;
        copy_tile<D, PASS_THREADS>(tiles.keys, from.k + part.batch * k.batch + first * k.time + part.head * k.head,
                     k.time, rows);
        copy_tile<D, PASS_THREADS>(tiles.queries, from.q + part.batch * q.batch + first * q.time + part.head * q.head,
                     q.time, rows);
    }
    const Strides &own = from.of_own;
    copy_tile<D, PASS_THREADS>(tiles.own, from.own + part.batch * own.batch + first * own.time + part.head * own.head,
              own.time, rows);
}

inline void swap(bfloat16 *&one, bfloat16 *&two) {
    bfloat16 *was = one;
    one = two, two = was;
}

// Of rows and columns that a lane holds of 16 x COLUMNS sums.
constexpr int N = COLUMNS / 8;

template <class Store> inline void for_each_pair(Store store) {
    Lane lane;
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int down = 0; down < 2; down++) store(n, down, 16 * lane.warp + lane.g + 8 * down, 8 * n + lane.t);
    }
}

inline void load_state(float (&s)[N][4], const float *from) {
    for_each_pair([&](int n, int down, int row, int column) {
        float2 pair = make_float2(0.f, 0.f);
        if (from) pair = *(const float2 *)(from + row * D + column);
        s[n][2 * down] = pair.x, s[n][2 * down + 1] = pair.y;
    });
}

// missing (B, K, H, T, D): X. carries (B, K, H, D, D): S at the start of each chunk. Both null if there
// is no backward pass to come. last (B, H, D, D).
template <bool CHANNEL>
__global__ void __launch_bounds__(PASS_THREADS) delta_forward(
    const bfloat16 *q, const bfloat16 *k, const bfloat16 *v, const bfloat16 *inverse,
    const bfloat16 *reads, const bfloat16 *decayed, const float *scales, const float *initial,
    bfloat16 *o, bfloat16 *missing, bfloat16 *carries, float *last, int64 q_batch, int64 q_time,
    int64 q_head, int64 k_batch, int64 k_time, int64 k_head, int64 v_batch, int64 v_time, int64 v_head,
    int length, int heads) {
    using Stage = Tiles<CHANNEL>;
    extern __shared__ __align__(128) char shared[];
    bfloat16 *stages = (bfloat16 *)shared, *tile_s = stages + 2 * Stage::SIZE, *tile_r = tile_s + TILE;
    bfloat16 *tile_end = tile_r + TILE;  // with a gate a head alone
    Part part(length, heads);
    Lane lane;
    Source source{q, k, inverse, reads, decayed, v, {q_batch, q_time, q_head}, {k_batch, k_time, k_head},
                  {v_batch, v_time, v_head}, length, heads};
    float s[N][4];
    load_state(s, initial ? initial + part.unit * D * D + part.column : nullptr);
    fetch(Stage(stages), source, part, 0);
    for (int chunk = 0; chunk < part.chunks; chunk++) {
        int64 block = part.block(chunk, heads);
        Stage tiles(stages + chunk % 2 * Stage::SIZE);
        float total[2], start[2], end[2];
#pragma unroll
        for (int down = 0; down < 2; down++) {
            const float *of_row = scales + block * SCALES<CHANNEL> + lane.row(down);
            total[down] = of_row[0];
            start[down] = CHANNEL ? 1.f : of_row[D];
            end[down] = CHANNEL ? 1.f : of_row[2 * D];
        }
        for_each_pair([&](int n, int down, int row, int column) {
            u32 pair = pack(s[n][2 * down], s[n][2 * down + 1]);
            *(u32 *)(tile_s + row * ROW + part.column + column) = pair;
            if (carries) *(u32 *)(carries + (block * D + row) * D + part.column + column) = pair;
        });
        wait_for_copies();
        __syncthreads();  // all threads are done with the last chunk
        if (chunk + 1 < part.chunks)
            fetch(Stage(stages + (chunk + 1) % 2 * Stage::SIZE), source, part, chunk + 1);

        float r[N][4] = {}, y[N][4] = {}, x[N][4] = {};
        multiply<false, false, D / 16>(r, tiles.keys, ROW, 16 * lane.warp, tile_s + part.column, ROW);
        multiply<false, false, D / 16>(y, tiles.queries, ROW, 16 * lane.warp, tile_s + part.column, ROW);
        for_each_pair([&](int n, int down, int row, int column) {
            const bfloat16 *own = tiles.own + row * ROW + part.column + column;
            float one = load(own[0]) - start[down] * r[n][2 * down];
            float two = load(own[1]) - start[down] * r[n][2 * down + 1];
            *(u32 *)(tile_r + row * ROW + part.column + column) = pack(one, two);
            y[n][2 * down] *= start[down], y[n][2 * down + 1] *= start[down];
        });
        __syncthreads();
        for (int block = 0; block <= lane.warp; block++)
            multiply<false, false, 1>(x, tiles.inverse + 16 * block, ROW, 16 * lane.warp,
                                      tile_r + 16 * block * ROW + part.column, ROW);
        for_each_pair([&](int n, int down, int row, int column) {
            float one = x[n][2 * down], two = x[n][2 * down + 1];
            u32 pair = pack(one, two);
            *(u32 *)(tile_s + row * ROW + part.column + column) = pair;  // in the place of S, which was read
            if (!CHANNEL) *(u32 *)(tile_end + row * ROW + part.column + column) = pack(one * end[down], two * end[down]);
            if (missing) *(u32 *)(missing + (block * T + row) * D + part.column + column) = pair;
            s[n][2 * down] *= total[down], s[n][2 * down + 1] *= total[down];
        });
        __syncthreads();
        multiply<true, false, T / 16>(s, tiles.ends, ROW, 16 * lane.warp, (CHANNEL ? tile_s : tile_end) + part.column,
                                     ROW);
        for (int block = 0; block <= lane.warp; block++)
            multiply<false, false, 1>(y, tiles.reads + 16 * block, ROW, 16 * lane.warp,
                                      tile_s + 16 * block * ROW + part.column, ROW);
        for_each_pair([&](int n, int down, int row, int column) {
            int64 step = (int64)chunk * T + row;
            if (step < length)
                *(u32 *)(o + ((part.batch * length + step) * heads + part.head) * D + part.column + column) =
                    pack(y[n][2 * down], y[n][2 * down + 1]);
        });
        swap(tile_s, tile_r);  // of the two only X may still be read
    }
    for_each_pair([&](int n, int down, int row, int column) {
        *(float2 *)(last + (part.unit * D + row) * D + part.column + column) =
            make_float2(s[n][2 * down], s[n][2 * down + 1]);
    });
}

// From the last chunk to the first, with E the gradient of the state at a chunk's end:
//
//   Z = ((I + A)^-1)^T (N^T dO + P' E), the gradient of V      E <- exp(u_T) E + Q'^T dO - K'^T Z
//
// dcarries (B, K, H, D, D): E at each chunk's end.
template <bool CHANNEL>
__global__ void __launch_bounds__(PASS_THREADS) delta_backward(
    const bfloat16 *q, const bfloat16 *k, const bfloat16 *dy, const bfloat16 *inverse,
    const bfloat16 *reads, const bfloat16 *decayed, const float *scales, const float *dlast,
    bfloat16 *dv, bfloat16 *dcarries, float *dinitial, int64 q_batch, int64 q_time, int64 q_head,
    int64 k_batch, int64 k_time, int64 k_head, int64 dy_batch, int64 dy_time, int64 dy_head, int length,
    int heads) {
    using Stage = Tiles<CHANNEL>;
    extern __shared__ __align__(128) char shared[];
    bfloat16 *stages = (bfloat16 *)shared, *tile_e = stages + 2 * Stage::SIZE, *tile_y = tile_e + TILE;
    bfloat16 *tile_dy = tile_y + TILE;  // with a gate a head alone
    Part part(length, heads);
    Lane lane;
    Source source{q, k, inverse, reads, decayed, dy, {q_batch, q_time, q_head}, {k_batch, k_time, k_head},
                  {dy_batch, dy_time, dy_head}, length, heads};
    float e[N][4];
    load_state(e, dlast ? dlast + part.unit * D * D + part.column : nullptr);
    fetch(Stage(stages + (part.chunks - 1) % 2 * Stage::SIZE), source, part, part.chunks - 1);
    for (int chunk = part.chunks - 1; chunk >= 0; chunk--) {
        int64 block = part.block(chunk, heads);
        Stage tiles(stages + chunk % 2 * Stage::SIZE);
        float total[2], start[2], end[2];
#pragma unroll
        for (int down = 0; down < 2; down++) {
            const float *of_row = scales + block * SCALES<CHANNEL> + lane.row(down);
            total[down] = of_row[0];
            start[down] = CHANNEL ? 1.f : of_row[D];
            end[down] = CHANNEL ? 1.f : of_row[2 * D];
        }
        for_each_pair([&](int n, int down, int row, int column) {
            u32 pair = pack(e[n][2 * down], e[n][2 * down + 1]);
            *(u32 *)(tile_e + row * ROW + part.column + column) = pair;
            *(u32 *)(dcarries + (block * D + row) * D + part.column + column) = pair;
        });
        wait_for_copies();
        __syncthreads();  // all threads are done with the chunk before
        if (chunk > 0) fetch(Stage(stages + (chunk - 1) % 2 * Stage::SIZE), source, part, chunk - 1);

        float y[N][4] = {}, z[N][4] = {};
        multiply<false, false, D / 16>(y, tiles.ends, ROW, 16 * lane.warp, tile_e + part.column, ROW);
        if (!CHANNEL) {
            for_each_pair([&](int n, int down, int row, int column) {
                const bfloat16 *own = tiles.own + row * ROW + part.column + column;
                *(u32 *)(tile_dy + row * ROW + part.column + column) =
                    pack(start[down] * load(own[0]), start[down] * load(own[1]));
                y[n][2 * down] *= end[down], y[n][2 * down + 1] *= end[down];
            });
        }
        for (int block = lane.warp; block < T / 16; block++)
            multiply<true, false, 1>(y, tiles.reads + 16 * block * ROW, ROW, 16 * lane.warp,
                                     tiles.own + 16 * block * ROW + part.column, ROW);
        for_each_pair([&](int n, int down, int row, int column) {
            *(u32 *)(tile_y + row * ROW + part.column + column) = pack(y[n][2 * down], y[n][2 * down + 1]);
        });
        __syncthreads();
        for (int block = lane.warp; block < T / 16; block++)
            multiply<true, false, 1>(z, tiles.inverse + 16 * block * ROW, ROW, 16 * lane.warp,
                                     tile_y + 16 * block * ROW + part.column, ROW);
        for_each_pair([&](int n, int down, int row, int column) {
            float one = z[n][2 * down], two = z[n][2 * down + 1];
            *(u32 *)(tile_e + row * ROW + part.column + column) = pack(-start[down] * one, -start[down] * two);
            int64 step = (int64)chunk * T + row;
            if (step < length)
                *(u32 *)(dv + ((part.batch * length + step) * heads + part.head) * D + part.column + column) =
                    pack(one, two);
            e[n][2 * down] *= total[down], e[n][2 * down + 1] *= total[down];
        });
        __syncthreads();
        multiply<true, false, T / 16>(e, tiles.queries, ROW, 16 * lane.warp, (CHANNEL ? tiles.own : tile_dy) +
                                      part.column, ROW);
        multiply<true, false, T / 16>(e, tiles.keys, ROW, 16 * lane.warp, tile_e + part.column, ROW);
        swap(tile_e, tile_y);  // of the two only Z may still be read
    }
    for_each_pair([&](int n, int down, int row, int column) {
        *(float2 *)(dinitial + (part.unit * D + row) * D + part.column + column) =
            make_float2(e[n][2 * down], e[n][2 * down + 1]);
    });
}

// ------------------------------------------------------------------------------------- gradients

// With Y_ij = dO_i . X_j (j < i) and R_ij = -Z_i . X_j, both times the decays between i and j, channel by
// channel, what a step reads at q_i and at k_i, and what it writes at p_i, have the gradients
//
//   dq_i = exp(u_i) (S dO_i) + sum_j Y_ij p_j + (dO_i . X_i) p_i
//   dr_i = -exp(u_i) (S Z_i) + sum_j R_ij p_j                        dk_i = dr_i + beta_i dp_i
//   dp_j = exp(u_T - u_j) (E X_j) + sum_i (Y_ij q_i + R_ij k_i) + (dO_j . X_j) q_j
//
// and dbeta_i = k_i . dp_i. A log-decay g_s is in every pair j < s <= i, in exp(u_i) for i >= s, in
// exp(u_T - u_j) for j < s and in exp(u_T) of the state. So its gradient has q_i dq_i + k_i dr_i - p_i dp_i
// of the pairs, added up from s on, where pairs that lie behind s wholly cancel: the two ways to each are
// products of the same rounded factors. A pair i = j has no decay.

// Sums of 16 steps and 16 channels, a lane's registers as in Lane; du is what a cumulated log-decay gets
// of pairs and as exp(u).
struct Sums {
    float dq[4][2], dr[4][2], dp[4][2], du[4][2];
};

// Adds the products of pairs: `read` for dq, and `other` for dr where a step reads and for dp where it
// writes; q and k are the rounded factors.
template <class Second>
inline void add_products(Sums &to, const float (&read)[2][4], const float (&other)[2][4],
                         const u32 (&q)[4], const u32 (&k)[4], const float2 (&decay)[4], Second second) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int e = 2 * (j % 2) + h;
            float factor = h ? decay[j].y : decay[j].x;
            float key = h ? high_of(k[j]) : low_of(k[j]), query = h ? high_of(q[j]) : low_of(q[j]);
            if (second(j)) {
                to.dq[j][h] += factor * read[j / 2][e];
                to.dr[j][h] += factor * other[j / 2][e];
                to.du[j][h] += query * read[j / 2][e] + key * other[j / 2][e];
            } else {
                to.dp[j][h] += factor * other[j / 2][e];
                to.du[j][h] -= key * other[j / 2][e];
            }
        }
    }
}

// sum += left right, one step of 16 products, with the right operand transposed from a left one's
// registers: its rows become the products' steps, its columns the sums'.
inline void multiply_turned(float (&sum)[2][4], const u32 (&left)[4], const u32 (&turned)[4]) {
    mma(sum[0], left, turned[0], turned[1]);
    mma(sum[1], left, turned[2], turned[3]);
}

// Pairs in different halves of 2 SIZE steps within the warp's 16. Y and R are lower triangular there,
// without the diagonal.
template <int SIZE>
inline void gradients_within(Sums &to, const bfloat16 *tile_y, const bfloat16 *tile_r, const u32 (&q)[4],
                             const u32 (&k)[4], const float *u, const float *beta, int column) {
    Lane lane;
    int own = 16 * lane.warp;
    float2 decay[4];
    u32 keys[4], queries[4], keys_turned[4], queries_turned[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        int row = lane.row(j);
        decay[j] = to_base<SIZE>(u, row, column + lane.column(j));
        keys[j] = scaled(k[j], decay[j], is_second<SIZE>(row) ? 1.f : beta[row]);
        queries[j] = scaled(q[j], decay[j], 1.f);
        keys_turned[j] = transpose_8x8(keys[j]);
        queries_turned[j] = transpose_8x8(queries[j]);
    }
    u32 y[4], r[4], y_turned[4], r_turned[4], of_y[4] = {}, of_y_turned[4] = {}, of_both[4] = {};
    load_left<false>(y, tile_y, ROW, own, own);
    load_left<false>(r, tile_r, ROW, own, own);
    load_left<true>(y_turned, tile_y, ROW, own, own);
    load_left<true>(r_turned, tile_r, ROW, own, own);
    if (SIZE == 8) {
        of_y[1] = y[1], of_y_turned[2] = y_turned[2];
        of_both[1] = r[1], of_both[2] = r_turned[2];
    } else {
        u32 mask = ((lane.g ^ lane.t) / SIZE == 1 ? 0xffffu : 0u) |
                   ((lane.g ^ (lane.t + 1)) / SIZE == 1 ? 0xffff0000u : 0u);
#pragma unroll
        for (int j = 0; j < 4; j += 3) {
            of_y[j] = y[j] & mask, of_y_turned[j] = y_turned[j] & mask;
            of_both[j] = (r[j] | r_turned[j]) & mask;
        }
    }
    float read[2][4] = {}, other[2][4] = {};
    multiply_turned(read, of_y, keys_turned);
    multiply_turned(other, of_both, keys_turned);
    multiply_turned(other, of_y_turned, queries_turned);
    add_products(to, read, other, queries, keys, decay, [&](int j) { return is_second<SIZE>(lane.row(j)); });
}

// Steps of blocks of 2 SIZE, SIZE 16 or 32, scaled for products with those of another warp: where the
// queries of second halves lie, one after another.
template <int SIZE> inline int place_of_queries(int row) { return SIZE == 32 ? row : row / 32 * 16 + row % 16; }

template <int SIZE>
inline void share_scaled(bfloat16 *keys, bfloat16 *queries, const bfloat16 *tile_q, const bfloat16 *tile_k,
                         const float *u, const float *beta) {
    for (int i = threadIdx.x; i < T * D / 2; i += THREADS) {
        int row = i / (D / 2), column = i % (D / 2) * 2;
        bool second = is_second<SIZE>(row);
        float2 decay = to_base<SIZE>(u, row, column);
        *(u32 *)(keys + row * ROW + column) =
            scaled(*(const u32 *)(tile_k + row * ROW + column), decay, second ? 1.f : beta[row]);
        if (second)
            *(u32 *)(queries + place_of_queries<SIZE>(row) * ROW + column) =
                scaled(*(const u32 *)(tile_q + row * ROW + column), decay, 1.f);
    }
}

template <bool TURNED>
inline void multiply_block(float (&sum)[2][4], const bfloat16 *left, int row, int k, const bfloat16 *right,
                           int right_row, int column) {
    u32 a[4], b[4];
    load_left<TURNED>(a, left, ROW, row, k);
    load_right<false>(b, right, ROW, right_row, column);
    mma(sum[0], a, b[0], b[1]);
    mma(sum[1], a, b[2], b[3]);
}

template <int SIZE>
inline void gradients_across(Sums &to, const bfloat16 *tile_y, const bfloat16 *tile_r,
                             const bfloat16 *queries, const bfloat16 *keys, const u32 (&q)[4],
                             const u32 (&k)[4], const float *u, const float *beta, int column) {
    Lane lane;
    int own = 16 * lane.warp, first = own / (2 * SIZE) * (2 * SIZE);
    bool second = is_second<SIZE>(own);
    float read[2][4] = {}, other[2][4] = {};
#pragma unroll
    for (int block = 0; block < SIZE / 16; block++) {
        if (second) {
            int row = first + 16 * block;
            multiply_block<false>(read, tile_y, own, row, keys, row, column);
            multiply_block<false>(other, tile_r, own, row, keys, row, column);
        } else {
            int row = first + SIZE + 16 * block;
            multiply_block<true>(other, tile_y, own, row, queries, place_of_queries<SIZE>(row), column);
            multiply_block<true>(other, tile_r, own, row, keys, row, column);
        }
    }
    float2 decay[4];
    u32 own_keys[4], own_queries[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        decay[j] = to_base<SIZE>(u, lane.row(j), column + lane.column(j));
        own_keys[j] = scaled(k[j], decay[j], second ? 1.f : beta[lane.row(j)]);
        own_queries[j] = scaled(q[j], decay[j], 1.f);
    }
    add_products(to, read, other, own_queries, own_keys, decay, [&](int) { return second; });
}

// With a gate a head: all pairs at once, whose decays are in y and r.
inline void gradients_of_all(Sums &to, const bfloat16 *tile_y, const bfloat16 *tile_r,
                             const bfloat16 *tile_q, const bfloat16 *tile_k, const bfloat16 *tile_p,
                             const u32 (&q)[4], const u32 (&k)[4], int column) {
    Lane lane;
    int own = 16 * lane.warp;
    float read[2][4] = {}, other[2][4] = {}, written[2][4] = {};
    for (int row = 0; row <= own; row += 16) {
        multiply_block<false>(read, tile_y, own, row, tile_p, row, column);
        multiply_block<false>(other, tile_r, own, row, tile_p, row, column);
    }
    for (int row = own; row < T; row += 16) {
        multiply_block<true>(written, tile_y, own, row, tile_q, row, column);
        multiply_block<true>(written, tile_r, own, row, tile_k, row, column);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        u32 p = *(const u32 *)(tile_p + lane.row(j) * ROW + column + lane.column(j));
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int e = 2 * (j % 2) + h;
            float one = read[j / 2][e], two = other[j / 2][e], three = written[j / 2][e];
            to.dq[j][h] += one, to.dr[j][h] += two, to.dp[j][h] += three;
            to.du[j][h] += (h ? high_of(q[j]) : low_of(q[j])) * one + (h ? high_of(k[j]) : low_of(k[j])) * two -
                           (h ? high_of(p) : low_of(p)) * three;
        }
    }
}

// Sums over the 16 steps of a warp that a lane and those of its column have, in rows g and g + 8: from a
// step on, and before it; `all` over the warp.
inline void sum_from(float (&x)[2], float &all) {
    int lane = threadIdx.x % 32, g = lane / 4;
#pragma unroll
    for (int far = 1; far < 8; far *= 2) {
        float low = __shfl_sync(ALL, x[0], lane + 4 * far), high = __shfl_sync(ALL, x[1], lane + 4 * far);
        if (g + far < 8) x[0] += low, x[1] += high;
    }
    x[0] += __shfl_sync(ALL, x[1], lane % 4);
    all = __shfl_sync(ALL, x[0], lane % 4);
}

inline void sum_before(float (&x)[2], float &all) {
    int lane = threadIdx.x % 32, g = lane / 4;
#pragma unroll
    for (int far = 1; far < 8; far *= 2) {
        float low = __shfl_sync(ALL, x[0], lane - 4 * far), high = __shfl_sync(ALL, x[1], lane - 4 * far);
        if (g >= far) x[0] += low, x[1] += high;
    }
    float first = __shfl_sync(ALL, x[0], 28 + lane % 4);
    all = first + __shfl_sync(ALL, x[1], 28 + lane % 4);
    float low = __shfl_sync(ALL, x[0], lane - 4), high = __shfl_sync(ALL, x[1], lane - 4);
    x[0] = g ? low : 0.f;
    x[1] = first + (g ? high : 0.f);
}

// dq, dk (B, L, H, D); dlog_decay (B, L, H, D or 1), 0 where a document begins, and dbeta (B, L, H).
template <bool CHANNEL>
__global__ void __launch_bounds__(THREADS) delta_gradients(
    const bfloat16 *q, const bfloat16 *k, const bfloat16 *dy, const bfloat16 *dv, const float *log_decay,
    const float *beta, const unsigned char *ages, const bfloat16 *missing, const bfloat16 *carries,
    const bfloat16 *dcarries,
    bfloat16 *dq, bfloat16 *dk, float *dlog_decay, float *dbeta, int64 q_batch, int64 q_time, int64 q_head,
    int64 k_batch, int64 k_time, int64 k_head, int64 dy_batch, int64 dy_time, int64 dy_head, int length,
    int heads) {
    extern __shared__ __align__(128) char shared[];
    bfloat16 *tile_q = (bfloat16 *)shared, *tile_k = tile_q + TILE, *tile_s = tile_k + TILE;
    bfloat16 *tile_e = tile_s + TILE, *tile_y = tile_e + TILE, *tile_r = tile_y + TILE;
    bfloat16 *tile_x = tile_r + TILE, *tile_near = tile_x;  // one after the other
    bfloat16 *tile_far = tile_x + TILE, *tile_queries = tile_far + TILE;  // with CHANNEL alone
    float *u = (float *)(tile_queries + TILE);                            // too
    __shared__ float gates[T], share[T], diagonal[T], of_state[D], of_pairs[WARPS][D], of_ends[WARPS][D];
    if (!CHANNEL) u = gates;
    Place here(length, heads);
    int64 of_head = here.first * heads + here.head;
    if (ages) ages += here.first;
    load_gates<CHANNEL, THREADS>(u, log_decay + of_head * (CHANNEL ? D : 1), ages, heads, here.rows);
    load_shares(share, beta + of_head, heads, here.rows);
    load_tile<D>(tile_q, q + here.at({q_batch, q_time, q_head}, here.head), q_time, here.rows);
    load_tile<D>(tile_k, k + here.at({k_batch, k_time, k_head}, here.head), k_time, here.rows);
    load_tile<D>(tile_s, carries + (int64)blockIdx.x * D * D, D, D);
    load_tile<D>(tile_e, dcarries + (int64)blockIdx.x * D * D, D, D);
    load_tile<D>(tile_y, dy + here.at({dy_batch, dy_time, dy_head}, here.head), dy_time, here.rows);
    load_tile<D>(tile_r, dv + of_head * D, (int64)heads * D, here.rows);
    load_tile<D>(tile_x, missing + (int64)blockIdx.x * T * D, D, T);
    __syncthreads();

    Lane lane;
    int own = 16 * lane.warp;
    u32 of_y[D / 16][4], of_z[D / 16][4], of_x[D / 16][4];
#pragma unroll
    for (int c = 0; c < D / 16; c++) {
        load_left<false>(of_y[c], tile_y, ROW, own, 16 * c);
        load_left<false>(of_z[c], tile_r, ROW, own, 16 * c);
        load_left<false>(of_x[c], tile_x, ROW, own, 16 * c);
    }
    __syncwarp();
    // Pairs take the place of dO and Z, of which other warps do not need these rows.
    for (int block = 0; block <= lane.warp; block++) {
        float y[2][4] = {}, r[2][4] = {};
        multiply<true>(y, of_y, tile_x + 16 * block * ROW, ROW);
        multiply<true>(r, of_z, tile_x + 16 * block * ROW, ROW);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = lane.row(j), column = 16 * block + lane.column(j);
            float pairs[2][2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float one = y[j / 2][2 * (j % 2) + h], two = r[j / 2][2 * (j % 2) + h];
                float weight = CHANNEL ? 1.f : exp2_of(gates[row] - gates[min(column + h, row)]);
                bool behind = column + h < row;
                if (column + h == row) diagonal[row] = one;
                pairs[0][h] = behind ? one * weight : 0.f;
                pairs[1][h] = behind ? -two * weight : 0.f;
            }
            *(u32 *)(tile_y + row * ROW + column) = pack(pairs[0][0], pairs[0][1]);
            *(u32 *)(tile_r + row * ROW + column) = pack(pairs[1][0], pairs[1][1]);
        }
    }
    {  // of exp(u_T), a key channel for two threads
        int c = threadIdx.x / 2, half = threadIdx.x % 2 * (D / 2);
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < D / 2; i += 2) {
            u32 s = *(const u32 *)(tile_s + c * ROW + half + i), e = *(const u32 *)(tile_e + c * ROW + half + i);
            sum += low_of(s) * low_of(e) + high_of(s) * high_of(e);
        }
        sum += __shfl_xor_sync(ALL, sum, 1);
        of_state[c] = sum * exp2_of(CHANNEL ? u[(T - 1) * WIDE_ROW + c] : gates[T - 1]);
    }
    __syncthreads();
    if (CHANNEL) {
        share_scaled<16>(tile_near, tile_queries, tile_q, tile_k, u, share);
        share_scaled<32>(tile_far, tile_queries, tile_q, tile_k, u, share);
    } else {
        for (int i = threadIdx.x; i < T * D / 2; i += THREADS) {
            int row = i / (D / 2), at = row * ROW + i % (D / 2) * 2;
            *(u32 *)(tile_near + at) = scaled(*(const u32 *)(tile_k + at), make_float2(share[row], share[row]), 1.f);
        }
    }
    __syncthreads();

    float of_share[2] = {0.f, 0.f}, of_u[2] = {0.f, 0.f}, of_end[2] = {0.f, 0.f};
#pragma unroll 1
    for (int c = 0; c < D; c += 16) {
        Sums to;
        u32 queries[4], keys[4];
        load_left<false>(queries, tile_q, ROW, own, c);
        load_left<false>(keys, tile_k, ROW, own, c);
        float read[2][4] = {}, other[2][4] = {}, written[2][4] = {}, end[4][2];
        multiply<true>(read, of_y, tile_s + c * ROW, ROW);
        multiply<true>(other, of_z, tile_s + c * ROW, ROW);
        multiply<true>(written, of_x, tile_e + c * ROW, ROW);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = lane.row(j), column = c + lane.column(j);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int e = 2 * (j % 2) + h;
                float upto = CHANNEL ? u[row * WIDE_ROW + column + h] : gates[row];
                float total = CHANNEL ? u[(T - 1) * WIDE_ROW + column + h] : gates[T - 1];
                float start = exp2_of(upto), key = h ? high_of(keys[j]) : low_of(keys[j]);
                to.dq[j][h] = start * read[j / 2][e];
                to.dr[j][h] = -start * other[j / 2][e];
                to.du[j][h] = (h ? high_of(queries[j]) : low_of(queries[j])) * to.dq[j][h] + key * to.dr[j][h];
                to.dp[j][h] = 0.f;
                end[j][h] = exp2_of(total - upto) * written[j / 2][e];
            }
        }
        if (CHANNEL) {
            gradients_within<8>(to, tile_y, tile_r, queries, keys, u, share, c);
            gradients_within<4>(to, tile_y, tile_r, queries, keys, u, share, c);
            gradients_within<2>(to, tile_y, tile_r, queries, keys, u, share, c);
            gradients_within<1>(to, tile_y, tile_r, queries, keys, u, share, c);
            gradients_across<16>(to, tile_y, tile_r, tile_queries, tile_near, queries, keys, u, share, c);
            gradients_across<32>(to, tile_y, tile_r, tile_queries, tile_far, queries, keys, u, share, c);
        } else {
            gradients_of_all(to, tile_y, tile_r, tile_q, tile_k, tile_near, queries, keys, c);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = lane.row(j);
            float beta_i = share[row], same = diagonal[row], of_q[2], of_k[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float key = h ? high_of(keys[j]) : low_of(keys[j]);
                float query = h ? high_of(queries[j]) : low_of(queries[j]);
                float of_p = to.dp[j][h] + same * query + end[j][h];
                of_q[h] = to.dq[j][h] + same * beta_i * key;
                of_k[h] = to.dr[j][h] + beta_i * of_p;
                of_share[j % 2] += key * of_p;
                end[j][h] *= beta_i * key;  // now what exp(u_T - u) gets
                if (!CHANNEL) of_u[j % 2] += to.du[j][h], of_end[j % 2] += end[j][h];
            }
            if (row < here.rows) {
                int64 at = (of_head + (int64)row * heads) * D + c + lane.column(j);
                *(u32 *)(dq + at) = pack(of_q[0], of_q[1]);
                *(u32 *)(dk + at) = pack(of_k[0], of_k[1]);
            }
        }
        if (!CHANNEL) continue;
        float found[4][2];
#pragma unroll
        for (int right = 0; right < 2; right++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float later[2] = {to.du[2 * right][h], to.du[2 * right + 1][h]}, all_later;
                float before[2] = {end[2 * right][h], end[2 * right + 1][h]}, all_before;
                sum_from(later, all_later);
                sum_before(before, all_before);
                int column = c + 8 * right + lane.t + h;
                if (lane.g == 0) of_pairs[lane.warp][column] = all_later, of_ends[lane.warp][column] = all_before;
#pragma unroll
                for (int down = 0; down < 2; down++) found[2 * right + down][h] = later[down] + before[down];
            }
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = lane.row(j), column = c + lane.column(j);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float sum = of_state[column + h];
#pragma unroll
                for (int w = 0; w < WARPS; w++) {
                    if (w > lane.warp) sum += of_pairs[w][column + h];
                    if (w < lane.warp) sum += of_ends[w][column + h];
                }
                found[j][h] += sum;
            }
            if (row < here.rows) {
                bool begins = ages && ages[row] == 0;
                *(float2 *)(dlog_decay + (of_head + (int64)row * heads) * D + column) =
                    begins ? make_float2(0.f, 0.f) : make_float2(found[j][0], found[j][1]);
            }
        }
    }
#pragma unroll
    for (int down = 0; down < 2; down++) {
        int row = lane.row(down);
        float sum = sum_of_row(of_share[down]), later = sum_of_row(of_u[down]), end = sum_of_row(of_end[down]);
        if (lane.t) continue;
        if (row < here.rows) dbeta[of_head + (int64)row * heads] = sum;
        if (!CHANNEL) of_pairs[0][row] = later, of_ends[0][row] = end;
    }
    if (CHANNEL) return;
    __syncthreads();
    if (lane.warp > 0) return;
    int id = threadIdx.x, t = 2 * id;
    float later = of_pairs[0][t] + of_pairs[0][t + 1], ends = cumulated(of_ends[0][t] + of_ends[0][t + 1]);
#pragma unroll
    for (int far = 1; far < 32; far *= 2) {
        float other = __shfl_sync(ALL, later, id + far);
        if (id + far < 32) later += other;
    }
    float rest = __shfl_sync(ALL, later, id + 1), before = __shfl_sync(ALL, ends, id - 1);
    if (id == 31) rest = 0.f;
    if (id == 0) before = 0.f;
    float total = sum_of_warp(of_state[t] + of_state[t + 1]);
    float sums[2] = {later + before + total, rest + of_pairs[0][t + 1] + before + of_ends[0][t] + total};
#pragma unroll
    for (int k = 0; k < 2; k++)
        if (t + k < here.rows)
            dlog_decay[of_head + (int64)(t + k) * heads] = ages && ages[t + k] == 0 ? 0.f : sums[k];
}
