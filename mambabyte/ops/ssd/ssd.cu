// SSD, the scan of Mamba-2, in chunks of T steps on tensor cores, forward and backward. Follows
// types.cu, mma.cu, chunks.cu and angles.cu.
//
// For a head, with decays a_s = exp(g_s) and steps d_s (float32, made before), in a chunk that is
// entered with state h (P x N) and left with h':
//
//   y_i  = sum_{j <= i} W_ij d_j (C_i . B_j) x_j + (prod_{s <= i} a_s) h C_i + D x_i
//   h'   = (prod_s a_s) h + sum_j (prod_{s > j} a_s) d_j x_j B_j^T          W_ij = prod_{j < s <= i} a_s
//
// ssd_walk goes from chunk to chunk with the state in registers; where there are too few sequences for
// that, ssd_states adds up what each chunk writes and ssd_pass hands it on. ssd_output has the rest; the
// backward mirrors them: ssd_walk, or both, of dy and C from the end, and ssd_gradients. A warp has 16 of a chunk's 64 rows. States are float32 while they are added up and
// bf16 where they are a factor.
//
// ssd_states has a head in a block; the others have `together` heads of a group, one after the other,
// for which B, C and C B^T are the same, and read the next head while they work on one.
//
// W_ij = exp(u_i - u_j), u the cumulated log-decays of the chunk.
//
// TURNED, for Mamba-3 (angles.cu), a step reads own_i of what it writes itself and d_i of it is read later,
// b and c are a head's own, and there are gradients of own and of angles.
//
// Every sum has a fixed order. Strides are in elements; the last axis has stride one.

constexpr int P = 64, P_ROW = P + 8;

// ------------------------------------------------------------------------------ parts of a block

// Multiplies the rows of a tile, each by its own number.
template <int COLUMNS> inline void scale_rows(bfloat16 *tile, const float *by) {
    for (int k = threadIdx.x; k < T * COLUMNS / 2; k += THREADS) {
        int row = k / (COLUMNS / 2);
        bfloat16 *at = tile + row * (COLUMNS + 8) + k % (COLUMNS / 2) * 2;
        *(u32 *)at = pack(load(at[0]) * by[row], load(at[1]) * by[row]);
    }
}

struct __align__(8) Chunk {
    float step[T];  // d
    float upto[T];  // u: log-decay from before the chunk up to and with the step
    float total;
};

// One warp fills `chunk` from rows of stride `heads`; to be followed by a barrier. Steps that are not
// there do nothing.
inline void load_steps(Chunk &chunk, const float *step, const float *log_decay, int heads, int rows) {
    float g[2];
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int t = 2 * lane + k;
        g[k] = t < rows ? at_least(log_decay[(int64)t * heads]) : 0.f;
        chunk.step[t] = t < rows ? step[(int64)t * heads] : 0.f;
    }
    float sum = cumulated(g[0] + g[1]), before = __shfl_sync(ALL, sum, lane - 1);
    chunk.upto[2 * lane] = (lane ? before : 0.f) + g[0];
    chunk.upto[2 * lane + 1] = sum;
    if (lane == 31) chunk.total = sum;
}

// Of the two rows that a thread has, `first` and 8 behind.
inline void load_own(float (&to)[2], const float *own, int heads, int first, int rows) {
#pragma unroll
    for (int down = 0; down < 2; down++) {
        int i = first + 8 * down;
        to[down] = i < rows ? own[(int64)i * heads] : 0.f;
    }
}

// ---------------------------------------------------------------------------------------- states

// states (B, K, H, P, N): sum_j w_j x_j b_j^T over the steps of a chunk, where w_j is the step size
// times the decay to the chunk's end; BACKWARD the decay from its start, x = dy and b = C. totals
// (B, K, H): the log-decay of a whole chunk.
template <int N, bool BACKWARD>
__global__ void __launch_bounds__(THREADS) ssd_states(
    const bfloat16 *x, const float *step, const float *log_decay, const bfloat16 *b, float *states,
    float *totals, int64 x_batch, int64 x_time, int64 x_head, int64 b_batch, int64 b_time,
    int64 b_group, int length, int heads, int per_group) {
    constexpr int N_ROW = N + 8;
    extern __shared__ __align__(128) char shared[];
    bfloat16 *tile_x = (bfloat16 *)shared, *tile_b = tile_x + T * P_ROW;
    __shared__ Chunk chunk;
    __shared__ float weight[T];
    Place here(length, heads);
    int64 of_head = here.first * heads + here.head;
    if (threadIdx.x < 32) load_steps(chunk, step + of_head, log_decay + of_head, heads, here.rows);
    load_tile<P>(tile_x, x + here.at({x_batch, x_time, x_head}, here.head), x_time, here.rows);
    load_tile<N>(tile_b, b + here.at({b_batch, b_time, b_group}, here.head / per_group), b_time,
                 here.rows);
    __syncthreads();
    if (threadIdx.x < T) {
        int t = threadIdx.x;
        weight[t] = BACKWARD ? __expf(chunk.upto[t]) : __expf(chunk.total - chunk.upto[t]) * chunk.step[t];
    }
    if (threadIdx.x == 0) totals[blockIdx.x] = chunk.total;
    __syncthreads();
    scale_rows<P>(tile_x, weight);
    __syncthreads();

    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    float sum[N / 8][4] = {};
    multiply<true, false, T / 16>(sum, tile_x, P_ROW, row, tile_b, N_ROW);
    states += (int64)blockIdx.x * P * N;
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
#pragma unroll
        for (int down = 0; down < 2; down++) {
            float *to = states + (row + lane / 4 + 8 * down) * N + 8 * n + lane % 4 * 2;
            *(float2 *)to = make_float2(sum[n][2 * down], sum[n][2 * down + 1]);
        }
    }
}

// From chunk to chunk: carries (B, K, H, size) is the state that a chunk is entered with, last (B, H,
// size) the one behind the last chunk; backward, the gradient of the state that it is left with, and
// that of the initial state. A thread has two numbers of the state. With `angles` (B, K, H, pairs) a pair
// turns back by its chunk's where the chunk is left, and its gradient ahead.
__global__ void __launch_bounds__(THREADS) ssd_pass(
    const float *states, const float *totals, const float *initial, const u32 *angles, bfloat16 *carries,
    float *last, int64 threads, int size, int chunks, int heads, int backward, int n, int pairs) {
    constexpr int AHEAD = 8;  // loads in flight
    int64 id = 2 * (blockIdx.x * (int64)THREADS + threadIdx.x);
    if (id >= threads) return;
    int64 unit = id / size;
    int head = (int)(unit % heads), i = (int)(id % size);
    int64 first = unit / heads * chunks * heads + head;
    float2 h = make_float2(0.f, 0.f);
    if (initial) h = *(const float2 *)(initial + id);
    bool turns = angles && i % n / 2 < pairs;
    if (turns) angles += i % n / 2;
    for (int k0 = 0; k0 < chunks; k0 += AHEAD) {
        float2 next[AHEAD];
        float decay[AHEAD];
        u32 angle[AHEAD] = {};
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int k = min(k0 + j, chunks - 1);
            int64 at = first + (int64)(backward ? chunks - 1 - k : k) * heads;
            next[j] = *(const float2 *)(states + at * size + i);
            decay[j] = __expf(totals[at]);
            if (turns) angle[j] = angles[at * pairs];
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int k = k0 + j;
            if (k >= chunks) break;
            int64 at = first + (int64)(backward ? chunks - 1 - k : k) * heads;
            if (turns && backward) h = along(way_of(angle[j]), h);
            *(u32 *)(carries + at * size + i) = pack(h.x, h.y);
            h.x = decay[j] * h.x + next[j].x;
            h.y = decay[j] * h.y + next[j].y;
            if (turns && !backward) h = along(way_of(0u - angle[j]), h);
        }
    }
    *(float2 *)(last + id) = h;
}

// Starts what is copied from here on as a group of its own; waits until all but the last LEFT are there.
inline void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> inline void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
}

// What ssd_states and ssd_pass do, without states in memory between them. A block has all chunks of
// COLUMNS columns of a head's state, and room for `stages` chunks, two or three, of which all but one are
// copied ahead; a warp has 16 of its rows.
template <int N, bool BACKWARD>
__global__ void __launch_bounds__(THREADS, 6) ssd_walk(
    const bfloat16 *x, const float *step, const float *log_decay, const bfloat16 *b,
    const float *initial, const u32 *angles, bfloat16 *carries, float *last, int64 x_batch,
    int64 x_time, int64 x_head, int64 b_batch, int64 b_time, int64 b_group, int length, int heads,
    int per_group, int pairs, int stages) {
    constexpr int COLUMNS = N < 32 ? N : 32, SLICES = N / COLUMNS, ROW = COLUMNS + 8, TILES = COLUMNS / 8;
    constexpr int STAGE = T * (P_ROW + ROW), PACKS = COLUMNS / 8;
    extern __shared__ __align__(128) char shared[];
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16, chunks = (length + T - 1) / T;
    int64 unit = blockIdx.x / SLICES, batch = unit / heads;
    int head = (int)(unit % heads), slice = blockIdx.x % SLICES * COLUMNS;
    x += batch * x_batch + head * x_head, b += batch * b_batch + head / per_group * b_group + slice;
    step += batch * length * heads + head, log_decay += batch * length * heads + head;
    auto first_of = [&](int k) { return (BACKWARD ? chunks - 1 - k : k) * T; };
    bfloat16 *stage = (bfloat16 *)shared, *next = stage, *end = stage + stages * STAGE;
    bfloat16 *out = end + row * ROW;  // of the state: a warp's rows, on their way
    auto fetch = [&](int k) {
        if (k < chunks) {
            int first = first_of(k), rows = min(T, length - first);
            bfloat16 *to = next;
            next = next + STAGE == end ? stage : next + STAGE;
            copy_tile<P, THREADS>(to, x + first * x_time, x_time, rows);
            copy_tile<COLUMNS, THREADS>(to + T * P_ROW, b + first * b_time, b_time, rows);
        }
        close_group();
    };
    float g[2], d[2];  // of steps 2 lane and 2 lane + 1 of the next chunk
    u32 next_angle[TILES] = {};
    auto gates = [&](int k) {
        int first = first_of(k);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int t = first + 2 * lane + e;
            g[e] = t < length ? at_least(log_decay[(int64)t * heads]) : 0.f;
            d[e] = t < length ? step[(int64)t * heads] : 0.f;
        }
        if (!angles) return;
        int64 of_chunk = ((batch * chunks + first / T) * heads + head) * pairs;
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            int pair = (slice + 8 * n + lane % 4 * 2) / 2;
            if (pair < pairs) next_angle[n] = angles[of_chunk + pair];
        }
    };
    // Of the state: rows row + lane / 4 and 8 below, columns 8 n + lane % 4 * 2 and the next.
    int64 of_state = unit * P * N;
    int place = (row + lane / 4) * N + slice + lane % 4 * 2;
    float h[TILES][4] = {};
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int down = 0; down < 2; down++) {
            if (!initial) continue;
            float2 z = *(const float2 *)(initial + of_state + place + 8 * n + 8 * down * N);
            h[n][2 * down] = z.x, h[n][2 * down + 1] = z.y;
        }
    }
    auto turn = [&](const u32(&angle)[TILES]) {
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            float2 way = way_of(BACKWARD ? angle[n] : 0u - angle[n]);
#pragma unroll
            for (int down = 0; down < 2; down++) {
                float2 z = along(way, make_float2(h[n][2 * down], h[n][2 * down + 1]));
                h[n][2 * down] = z.x, h[n][2 * down + 1] = z.y;
            }
        }
    };
    const bfloat16 *tile_x = stage;
    for (int k = 0; k < stages - 1; k++) fetch(k);
    gates(0);
    for (int k = 0; k < chunks; k++) {
        float sum = cumulated(g[0] + g[1]), before = __shfl_sync(ALL, sum, lane - 1);
        float total = __shfl_sync(ALL, sum, 31), upto = (lane ? before : 0.f) + g[0];
        float weight[2] = {BACKWARD ? __expf(upto) : __expf(total - upto) * d[0],
                           BACKWARD ? __expf(sum) : __expf(total - sum) * d[1]};
        float decay = __expf(total);
        u32 angle[TILES];
#pragma unroll
        for (int n = 0; n < TILES; n++) angle[n] = next_angle[n];
        if (k + 1 < chunks) gates(k + 1);
        if (BACKWARD && angles) turn(angle);
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            bfloat16 *to = out + lane / 4 * ROW + 8 * n + lane % 4 * 2;
            *(u32 *)to = pack(h[n][0], h[n][1]);
            *(u32 *)(to + 8 * ROW) = pack(h[n][2], h[n][3]);
        }
        __syncwarp();
        bfloat16 *to = carries + ((batch * chunks + first_of(k) / T) * heads + head) * P * N + row * N + slice;
#pragma unroll
        for (int i = lane; i < 16 * PACKS; i += 32)
            *(float4 *)(to + i / PACKS * N + i % PACKS * 8) = *(const float4 *)(out + i / PACKS * ROW + i % PACKS * 8);
        if (stages == 2) wait_for_groups<0>();
        else wait_for_groups<1>();
        __syncthreads();  // all have read what is overwritten now
        fetch(k + stages - 1);
        const bfloat16 *tile_b = tile_x + T * P_ROW;
        float added[TILES][4] = {};
#pragma unroll
        for (int s = 0; s < T / 16; s++) {
            u32 left[1][4];
            load_left<true>(left[0], tile_x, P_ROW, row, 16 * s);
#pragma unroll
            for (int later = 0; later < 2; later++) {
                int owner = 8 * s + 4 * later + lane % 4;
                float one = __shfl_sync(ALL, weight[0], owner), two = __shfl_sync(ALL, weight[1], owner);
#pragma unroll
                for (int down = 0; down < 2; down++) {
                    u32 &pair = left[0][2 * later + down];
                    pair = pack(low_of(pair) * one, high_of(pair) * two);
                }
            }
            multiply<false>(added, left, tile_b + 16 * s * ROW, ROW);
        }
#pragma unroll
        for (int n = 0; n < TILES; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) h[n][e] = decay * h[n][e] + added[n][e];
        }
        if (!BACKWARD && angles) turn(angle);
        tile_x = tile_x + STAGE == end ? stage : tile_x + STAGE;
    }
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int down = 0; down < 2; down++) {
            float2 z = make_float2(h[n][2 * down], h[n][2 * down + 1]);
            *(float2 *)(last + of_state + place + 8 * n + 8 * down * N) = z;
        }
    }
}

// ---------------------------------------------------------------------------------------- output

// The heads of a block: `together` of them from `first` on, in one chunk.
struct Heads {
    Place here;
    int first, group;
    int64 unit;  // the first head's (batch, chunk, head)
    inline Heads(int length, int heads, int per_group, int together) : here(length, heads / together) {
        first = here.head * together;
        group = first / per_group;
        unit = (int64)blockIdx.x * together;
    }
};

// Four blocks a multiprocessor up to 64 states, where compilers may take registers for three.
template <int N, bool TURNED>
__global__ void __launch_bounds__(THREADS, !TURNED && N <= 64 ? 4 : 0) ssd_output(
    const bfloat16 *x, const float *step, const float *log_decay, const bfloat16 *b,
    const bfloat16 *c, const float *skip, const bfloat16 *carries, const float *own, bfloat16 *y,
    int64 x_batch, int64 x_time, int64 x_head, int64 b_batch, int64 b_time, int64 b_group,
    int64 c_batch, int64 c_time, int64 c_group, int length, int heads, int per_group, int together) {
    constexpr int N_ROW = N + 8, X = T * P_ROW, HEAD = X + P * N_ROW;
    extern __shared__ __align__(128) char shared[];
    bfloat16 *tile_c = (bfloat16 *)shared, *of_heads = tile_c + T * N_ROW;
    bfloat16 *tile_b = of_heads + HEAD;  // where the second head will be
    __shared__ Chunk chunks[2];
    if (TURNED) together = 1;
    Heads all(length, heads, per_group, together);
    const Place &here = all.here;
    int lane = threadIdx.x % 32, warp = warp_of_thread(), block = block_of_warp(warp), row = 16 * block;
    int g = row + lane / 4, t = lane % 4 * 2;
    auto fetch = [&](int k) {
        bfloat16 *to = of_heads + k % 2 * HEAD;
        copy_tile<P, THREADS>(to, x + here.at({x_batch, x_time, x_head}, all.first + k), x_time, here.rows);
        copy_tile<N, THREADS>(to + X, carries + (all.unit + k) * P * N, N, P);
        int64 at = here.first * heads + all.first + k;
        if (warp == k % WARPS) load_steps(chunks[k % 2], step + at, log_decay + at, heads, here.rows);
    };
    copy_tile<N, THREADS>(tile_b, b + here.at({b_batch, b_time, b_group}, all.group), b_time, here.rows);
    copy_tile<N, THREADS>(tile_c, c + here.at({c_batch, c_time, c_group}, all.group), c_time, here.rows);
    fetch(0);
    wait_for_copies();
    __syncthreads();
    float scores[T / 8][4] = {};
    multiply<false, true, N / 16>(scores, tile_c, N_ROW, row, tile_b, N_ROW, 0, block + 1);

    for (int k = 0; k < together; k++) {
        wait_for_copies();
        __syncthreads();
        if (k + 1 < together) fetch(k + 1);
        const bfloat16 *tile_x = of_heads + k % 2 * HEAD, *tile_h = tile_x + X;
        const Chunk &chunk = chunks[k % 2];
        float sum[P / 8][4] = {};
        multiply<false, true, N / 16>(sum, tile_c, N_ROW, row, tile_h, N_ROW);
        float upto[2] = {chunk.upto[g], chunk.upto[g + 8]}, alone[2];
        float decay[2] = {__expf(upto[0]), __expf(upto[1])};
        if (TURNED) load_own(alone, own + here.first * heads + all.first + k, heads, g, here.rows);
#pragma unroll
        for (int n = 0; n < P / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) sum[n][e] *= decay[e / 2];
        }
#pragma unroll
        for (int column = 0; column < T / 16; column++) {
            if (column > block) continue;
            float weighted[2][4];
            u32 left[1][4];
#pragma unroll
            for (int n = 0; n < 2; n++) {
                int first = 16 * column + 8 * n + t;
                float2 u = *(const float2 *)&chunk.upto[first], step = *(const float2 *)&chunk.step[first];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int i = g + e / 2 * 8, j = first + e % 2;
                    float weight = __expf(upto[e / 2] - (e % 2 ? u.y : u.x)) * (e % 2 ? step.y : step.x);
                    if (TURNED && i == j) weight = alone[e / 2];
                    weighted[n][e] = i >= j ? scores[2 * column + n][e] * weight : 0.f;
                }
            }
            as_left(left, weighted);
            multiply<false>(sum, left, tile_x + 16 * column * P_ROW, P_ROW);
        }
        float d = skip ? skip[all.first + k] : 0.f;
        int64 of_head = here.first * heads + all.first + k;
        // By way of its rows of C, which are as long and not needed any more.
        constexpr bool BY_C = TURNED && N == P;
        bfloat16 *out = BY_C ? tile_c + row * N_ROW : y + (of_head + (int64)row * heads) * P;
        int64 apart = BY_C ? N_ROW : (int64)heads * P;
#pragma unroll
        for (int down = 0; down < 2; down++) {
            if (!BY_C && g + 8 * down >= here.rows) continue;
            bfloat16 *to = out + (lane / 4 + 8 * down) * apart + t;
#pragma unroll
            for (int n = 0; n < P / 8; n++) {
                float2 z = pair_at(tile_x + (g + 8 * down) * P_ROW + 8 * n + t);
                *(u32 *)(to + 8 * n) = pack(sum[n][2 * down] + d * z.x, sum[n][2 * down + 1] + d * z.y);
            }
        }
        if (!BY_C) continue;
        __syncwarp();
#pragma unroll
        for (int i = lane / 8; i < 16; i += 4) {
            if (row + i < here.rows)
                *(float4 *)(y + (of_head + (int64)(row + i) * heads) * P + lane % 8 * 8) =
                    *(const float4 *)(out + i * N_ROW + lane % 8 * 8);
        }
    }
}

// ------------------------------------------------------------------------------------- gradients

// With S = C B^T, Q = dy x^T and R_j = dh' B_j (dh' the gradient of the state behind the chunk, w_j =
// prod_{s > j} a_s):
//
//   dx_j = sum_i W_ij d_j S_ij dy_i + w_j d_j R_j + D dy_j       dd_j = sum_i W_ij S_ij Q_ij + w_j x_j . R_j
//   dB_j = sum_i W_ij d_j Q_ij C_i + w_j d_j dh'^T x_j
//   dC_i = sum_j W_ij d_j Q_ij B_j + exp(u_i) h^T dy_i
//
// A log-decay g_s is in every W_ij with j < s <= i, in exp(u_i) for i >= s, in w_j for j < s and in
// the decay of the whole chunk. Pairs i = j have no decay and are left out, where adding and taking
// away would cancel.
//
// db, dc (B, L, H / together, N): of a block's heads, whose W d Q are added up before they meet B and
// C. dskip (B, K, H). Eight warps: two have the same 16 rows, and every other 16 columns of a product
// of pairs, or one half of the columns of any other. Pairs are transposed: rows are the steps j.
//
// TURNED: d_own (B, L, H), and d_angle (B, L, H, pairs) as Angles says. `together` is 1, and Angles has the
// place of a second head.

// What one head's warps find for the log-decays; a row of [2] is of the two warps with the same rows.
struct Found {
    float column[WARPS][T];  // by the block of rows; of blocks that reach the column
    float direct[2][T], decayed[2][T], written[2][T], carried[2][T];
    float with_state[2 * WARPS], with_skip[2 * WARPS];
};

// One warp, two steps a lane; to be called behind a barrier.
inline void ssd_finish(
    const Found &found, const Chunk &chunk, float *dstep, float *dlog_decay, float *dskip, int heads,
    int rows) {
    int lane = threadIdx.x % 32, s = 2 * lane;
    auto both = [&](const float(&of)[2][T]) {
        float2 one = *(const float2 *)&of[0][s], other = *(const float2 *)&of[1][s];
        return make_float2(one.x + other.x, one.y + other.y);
    };
    float2 written = both(found.written), direct = both(found.direct), decayed = both(found.decayed);
    float2 carried = both(found.carried), step = *(const float2 *)&chunk.step[s];
    float2 of_u = make_float2(carried.x - decayed.x, carried.y - decayed.y);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        float2 reached = *(const float2 *)&found.column[w][s];
        if (w <= lane / 8) of_u.x += reached.x, of_u.y += reached.y;
    }
    float2 ahead = make_float2(written.x * step.x, written.y * step.y);
    // Of u_i for i >= s, counted from the end; of what was written before s.
    float later = of_u.x + of_u.y;
#pragma unroll
    for (int far = 1; far < 32; far *= 2) {
        float other = __shfl_sync(ALL, later, lane + far);
        if (lane + far < 32) later += other;
    }
    float rest = __shfl_sync(ALL, later, lane + 1);
    if (lane == 31) rest = 0.f;
    float before = __shfl_sync(ALL, cumulated(ahead.x + ahead.y), lane - 1);
    if (lane == 0) before = 0.f;
    float total = 0.f, of_skip = 0.f;
#pragma unroll
    for (int w = 0; w < 2 * WARPS; w++) total += found.with_state[w], of_skip += found.with_skip[w];
    total *= __expf(chunk.total);
    float of_step[2] = {later + before + total, rest + of_u.y + before + ahead.x + total};
    float of_size[2] = {direct.x + written.x, direct.y + written.y};
    dstep += (int64)s * heads, dlog_decay += (int64)s * heads;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        if (s + k < rows) dstep[k * heads] = of_size[k], dlog_decay[k * heads] = of_step[k];
    }
    if (lane == 0) *dskip = of_skip;
}

template <int N, bool TURNED>
__global__ void __launch_bounds__(WIDE, TURNED ? (N > 64 ? 2 : 3) : (N > 64 ? 1 : 2)) ssd_gradients(
    const bfloat16 *dy, const bfloat16 *x, const float *step, const float *log_decay,
    const bfloat16 *b, const bfloat16 *c, const float *skip, const bfloat16 *carries,
    const bfloat16 *dcarries, const float *own, bfloat16 *dx, float *dstep, float *dlog_decay,
    bfloat16 *db, bfloat16 *dc, float *dskip, float *d_own, float *d_angle, int64 dy_batch,
    int64 dy_time, int64 dy_head, int64 x_batch, int64 x_time, int64 x_head, int64 b_batch,
    int64 b_time, int64 b_group, int64 c_batch, int64 c_time, int64 c_group, int length, int heads,
    int per_group, int together, int pairs) {
    constexpr int N_ROW = N + 8, X = T * P_ROW, H = P * N_ROW, HEAD = 2 * (X + H);
    constexpr int WIDTH = N < 32 ? 16 : N / 2;  // columns of B and C that a warp has
    if (TURNED) together = 1;
    extern __shared__ __align__(128) char shared[];
    bfloat16 *tile_b = (bfloat16 *)shared, *tile_c = tile_b + T * N_ROW;
    bfloat16 *tile_m = tile_c + T * N_ROW, *of_heads = tile_m + X;
    __shared__ Chunk chunks[2];
    __shared__ Found results[2];
    Angles<N> &angles = *(Angles<N> *)(of_heads + HEAD);
    // In the end, over what has been read by then:
    auto points = (float(*)[Angles<N>::ROW])of_heads;
    bfloat16 *out_b = of_heads + 2 * T * Angles<N>::ROW;  // and dc behind it
    Heads all(length, heads, per_group, together);
    const Place &here = all.here;
    int lane = threadIdx.x % 32, warp = warp_of_thread(), half = warp / WARPS, block = block_of_warp(warp);
    int row = 16 * block, g = row + lane / 4, t = lane % 4 * 2, left_column = half * WIDTH;
    bool has_columns = left_column < N;  // of B and C
    int first_pair = (left_column + t) / 2;
    bool turns = TURNED && has_columns && left_column / 2 < pairs;
    // Two groups of copies: x and dy; the states around the chunk.
    auto fetch = [&](int k) {
        if (k < together) {
            bfloat16 *to = of_heads + k % 2 * HEAD;
            int head = all.first + k;
            copy_tile<P, WIDE>(to, x + here.at({x_batch, x_time, x_head}, head), x_time, here.rows);
            copy_tile<P, WIDE>(to + X, dy + here.at({dy_batch, dy_time, dy_head}, head), dy_time, here.rows);
            close_group();
            copy_tile<N, WIDE>(to + 2 * X, carries + (all.unit + k) * P * N, N, P);
            copy_tile<N, WIDE>(to + 2 * X + H, dcarries + (all.unit + k) * P * N, N, P);
        } else {
            close_group();
        }
        close_group();
    };
    auto finish = [&](int k) {
        int64 at = here.first * heads + all.first + k;
        ssd_finish(results[k % 2], chunks[k % 2], dstep + at, dlog_decay + at, dskip + all.unit + k,
                   heads, here.rows);
    };
    auto steps = [&](int k) {
        int64 at = here.first * heads + all.first + k;
        load_steps(chunks[k % 2], step + at, log_decay + at, heads, here.rows);
    };
    copy_tile<N, WIDE>(tile_b, b + here.at({b_batch, b_time, b_group}, all.group), b_time, here.rows);
    copy_tile<N, WIDE>(tile_c, c + here.at({c_batch, c_time, c_group}, all.group), c_time, here.rows);
    fetch(0);
    if (warp == 0) steps(0);

    // S and the sum over heads of W d Q: blocks `half` and `half` + 2 of 16 columns.
    float s[2][2][4] = {}, ds[2][2][4] = {}, db_sum[WIDTH / 8][4] = {}, dc_sum[WIDTH / 8][4] = {};
    for (int k = 0; k < together; k++) {
        wait_for_groups<1>();
        __syncthreads();
        if (k + 1 < together) fetch(k + 1);
        else close_group(), close_group();
        if (!TURNED && warp == k % (2 * WARPS)) {
            if (k) finish(k - 1);
            if (k + 1 < together) steps(k + 1);
        }
        if (k == 0) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                int column = half + 2 * c;
                if (column >= block)
                    multiply<false, true, N / 16>(s[c], tile_b, N_ROW, row, tile_c + 16 * column * N_ROW, N_ROW);
            }
        }
        const bfloat16 *tile_x = of_heads + k % 2 * HEAD, *tile_dy = tile_x + X;
        const bfloat16 *tile_h = tile_dy + X, *tile_dh = tile_h + H;
        const Chunk &chunk = chunks[k % 2];
        Found &found = results[k % 2];
        int64 of_head = here.first * heads + all.first + k;
        float alone[2], of_own[2] = {0.f, 0.f};
        if (TURNED) load_own(alone, own + of_head, heads, g, here.rows);
        float skipped = 0.f, direct[2] = {0.f, 0.f}, decayed[2] = {0.f, 0.f};
        float upto[2] = {chunk.upto[g], chunk.upto[g + 8]}, d[2] = {chunk.step[g], chunk.step[g + 8]};
#pragma unroll
        for (int c = 0; c < 2; c++) {
            int column = half + 2 * c;
            if (column < block) continue;
            float q[2][4] = {}, sums[4] = {};  // sums: of the columns, two of each n
            multiply<false, true, P / 16>(q, tile_x, P_ROW, row, tile_dy + 16 * column * P_ROW, P_ROW);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                int first = 16 * column + 8 * n + t;
                float2 u = *(const float2 *)&chunk.upto[first];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int down = e / 2, j = g + 8 * down, i = first + e % 2;
                    float weight = i >= j ? __expf((e % 2 ? u.y : u.x) - upto[down]) : 0.f;
                    float both = weight * s[c][n][e] * q[n][e];
                    float by = weight * (TURNED && i == j ? alone[down] : d[down]);
                    if (TURNED) of_own[down] += i == j ? both : 0.f;
                    direct[down] += TURNED && i == j ? 0.f : both;
                    float off_diagonal = i > j ? both * d[down] : 0.f;
                    decayed[down] += off_diagonal;
                    sums[2 * n + e % 2] += off_diagonal;
                    skipped += i == j ? q[n][e] : 0.f;  // dy . x
                    ds[c][n][e] = TURNED ? q[n][e] * by : ds[c][n][e] + q[n][e] * by;
                    q[n][e] = s[c][n][e] * by;  // M
                }
                bfloat16 *to = tile_m + g * P_ROW + first;
                *(u32 *)to = pack(q[n][0], q[n][1]);
                *(u32 *)(to + 8 * P_ROW) = pack(q[n][2], q[n][3]);
            }
            int from = sums_in_turn<4>(sums);
            if (lane < 16) found.column[block][16 * column + from / 2 * 8 + t + from % 2] = sums[0];
        }
        // The lane with the diagonal of its rows.
        if (TURNED && half == block % 2 && lane % 4 == lane / 8) {
#pragma unroll
            for (int down = 0; down < 2; down++) {
                int j = g + 8 * down;
                if (j < here.rows) d_own[of_head + (int64)j * heads] = of_own[down];
            }
        }
        skipped = sum_of_warp(skipped);
        if (lane == 0) found.with_skip[warp] = skipped;
        float end[2], start[2];
#pragma unroll
        for (int down = 0; down < 2; down++) {
            int j = g + 8 * down;
            start[down] = __expf(upto[down]);
            end[down] = __expf(chunk.total - upto[down]);
            direct[down] = sum_of_row(direct[down]), decayed[down] = sum_of_row(decayed[down]);
            if (t == 0) found.direct[half][j] = direct[down], found.decayed[half][j] = decayed[down];
        }
        wait_for_groups<2>();
        __syncthreads();  // all of tile_m is there, and the states

        // dh' . h: a half of the warps has a half of the columns.
        constexpr int PACKS = N / 16, APART = THREADS / PACKS;
        float states = 0.f, crossing[4] = {};
        int of_half = threadIdx.x % THREADS, pack_column = (half * PACKS + of_half % PACKS) * 8;
#pragma unroll
        for (int first = 0; first < P; first += APART) {
            int r = first + of_half / PACKS;
            if (APART > P && r >= P) break;
            int at = r * N_ROW + pack_column;
            Pack<u32, 4> one = *(const Pack<u32, 4> *)(tile_h + at), other = *(const Pack<u32, 4> *)(tile_dh + at);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float2 z = make_float2(low_of(one.at[e]), high_of(one.at[e]));
                float2 dz = make_float2(low_of(other.at[e]), high_of(other.at[e]));
                states += z.x * dz.x, states += z.y * dz.y;
                // Against that way: what it writes turns ahead.
                if (TURNED) crossing[e] += dz.x * z.y, crossing[e] -= dz.y * z.x;
            }
        }
        if (TURNED && half * PACKS * 4 < pairs) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
#pragma unroll
                for (int far = PACKS; far < 32; far *= 2) crossing[e] += __shfl_xor_sync(ALL, crossing[e], far);
                if (lane < PACKS) angles.crossing[warp % WARPS][pack_column / 2 + e] = crossing[e];
            }
        }
        states = sum_of_warp(states);
        if (lane == 0) found.with_state[warp] = states;

        {
            float sum[P / 16][4] = {}, read[2] = {0.f, 0.f};
            int left = half * P / 2;
            multiply<false, true, N / 16>(sum, tile_b, N_ROW, row, tile_dh + left * N_ROW, N_ROW);  // R
#pragma unroll
            for (int n = 0; n < P / 16; n++) {
#pragma unroll
                for (int down = 0; down < 2; down++) {
                    float2 z = pair_at(tile_x + (g + 8 * down) * P_ROW + left + 8 * n + t);
                    read[down] += z.x * sum[n][2 * down], read[down] += z.y * sum[n][2 * down + 1];
                    sum[n][2 * down] *= end[down] * d[down], sum[n][2 * down + 1] *= end[down] * d[down];
                }
            }
            for (int c = block; c < T / 16; c++)
                multiply<false, false, 1>(sum, tile_m + 16 * c, P_ROW, row,
                                          tile_dy + 16 * c * P_ROW + left, P_ROW);
            float factor = skip ? skip[all.first + k] : 0.f;
#pragma unroll
            for (int down = 0; down < 2; down++) {
                int j = g + 8 * down;
                float written = end[down] * sum_of_row(read[down]);
                if (t == 0) found.written[half][j] = written;
                if (j >= here.rows) continue;
                bfloat16 *to = dx + (of_head + (int64)j * heads) * P + left + t;
                const bfloat16 *from = tile_dy + j * P_ROW + left + t;
#pragma unroll
                for (int n = 0; n < P / 16; n++) {
                    float2 z = pair_at(from + 8 * n);
                    *(u32 *)(to + 8 * n) = pack(sum[n][2 * down] + factor * z.x, sum[n][2 * down + 1] + factor * z.y);
                }
            }
        }
        float read[2] = {0.f, 0.f};
        if (has_columns) {
            // TURNED, what is added up over heads is of one head.
            float sum[WIDTH / 8][4] = {};
            float(&of_b)[WIDTH / 8][4] = TURNED ? db_sum : sum, (&of_c)[WIDTH / 8][4] = TURNED ? dc_sum : sum;
            multiply<false, false, P / 16>(of_b, tile_x, P_ROW, row, tile_dh + left_column, N_ROW);
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float found = end[e / 2] * d[e / 2] * of_b[n][e];
                    sum[n][e] = 0.f;
                    db_sum[n][e] = TURNED ? found : db_sum[n][e] + found;
                }
            }
            if (turns) {
                float written[WIDTH / 8];
#pragma unroll
                for (int n = 0; n < WIDTH / 8; n++) {
                    const bfloat16 *z = tile_b + g * N_ROW + left_column + t + 8 * n;
                    written[n] = along_turn(db_sum[n][0], db_sum[n][1], pair_at(z))
                                 + along_turn(db_sum[n][2], db_sum[n][3], pair_at(z + 8 * N_ROW));
                }
                int from = sums_in_turn<4>(written);
                if (lane < WIDTH / 2) angles.written[block][first_pair + 4 * from] = written[0];
            }
            multiply<false, false, P / 16>(of_c, tile_dy, P_ROW, row, tile_h + left_column, N_ROW);
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n++) {
#pragma unroll
                for (int down = 0; down < 2; down++) {
                    float2 z = pair_at(tile_c + (g + 8 * down) * N_ROW + left_column + 8 * n + t);
                    float one = start[down] * of_c[n][2 * down], other = start[down] * of_c[n][2 * down + 1];
                    dc_sum[n][2 * down] = TURNED ? one : dc_sum[n][2 * down] + one;
                    dc_sum[n][2 * down + 1] = TURNED ? other : dc_sum[n][2 * down + 1] + other;
                    read[down] += one * z.x, read[down] += other * z.y;
                }
            }
        }
#pragma unroll
        for (int down = 0; down < 2; down++) {
            float carried = sum_of_row(read[down]);
            if (t == 0) found.carried[half][g + 8 * down] = carried;
        }
    }

    __syncthreads();  // tile_m has been read
#pragma unroll
    for (int c = 0; c < 2; c++) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            bfloat16 *to = tile_m + g * P_ROW + 16 * (half + 2 * c) + 8 * n + t;
            *(u32 *)to = pack(ds[c][n][0], ds[c][n][1]);
            *(u32 *)(to + 8 * P_ROW) = pack(ds[c][n][2], ds[c][n][3]);
        }
    }
    __syncthreads();
    if (has_columns) {
        for (int c = block; c < T / 16; c++)
            multiply<false, false, 1>(db_sum, tile_m + 16 * c, P_ROW, row,
                                      tile_c + 16 * c * N_ROW + left_column, N_ROW);
        for (int c = 0; c <= block; c++)
            multiply<true, false, 1>(dc_sum, tile_m + 16 * c * P_ROW, P_ROW, row,
                                     tile_b + 16 * c * N_ROW + left_column, N_ROW);
#pragma unroll
        for (int down = 0; down < 2; down++) {
            int i = g + 8 * down;
            if (turns) {
#pragma unroll
                for (int n = 0; n < WIDTH / 8; n++) {
                    int at = i * N_ROW + left_column + t + 8 * n;
                    points[i][first_pair + 4 * n] =
                        along_turn(db_sum[n][2 * down], db_sum[n][2 * down + 1], pair_at(tile_b + at))
                        + along_turn(dc_sum[n][2 * down], dc_sum[n][2 * down + 1], pair_at(tile_c + at));
                }
            }
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n++) {
                bfloat16 *to = out_b + i * N_ROW + left_column + t + 8 * n;
                *(u32 *)to = pack(db_sum[n][2 * down], db_sum[n][2 * down + 1]);
                *(u32 *)(to + T * N_ROW) = pack(dc_sum[n][2 * down], dc_sum[n][2 * down + 1]);
            }
        }
    }
    __syncthreads();
    int64 of_block = (here.first * (heads / together) + here.head) * N, apart = (int64)(heads / together) * N;
    store_tile<N, WIDE>(db + of_block, out_b, apart, here.rows);
    store_tile<N, WIDE>(dc + of_block, out_b + T * N_ROW, apart, here.rows);
    if (TURNED) {
        angles.finish(points, __expf(chunks[0].total), d_angle + (here.first * heads + all.first) * pairs,
                      (int64)heads * pairs, pairs, here.rows);
    }
    // Behind all that others wait for.
    if (warp == 2 * WARPS - 1) finish(together - 1);
}

// Adds up what the blocks of each group have: db, dc (B, L, G, parts, N) -> sum_b, sum_c (B, L, G, N). A
// thread has eight numbers of one of the two.
template <int N>
__global__ void __launch_bounds__(THREADS) ssd_groups(
    const bfloat16 *db, const bfloat16 *dc, bfloat16 *sum_b, bfloat16 *sum_c, int64 packs, int parts) {
    int64 id = blockIdx.x * (int64)THREADS + threadIdx.x;
    if (id >= 2 * packs) return;
    bool second = id >= packs;
    int64 pack_id = second ? id - packs : id, group = pack_id / (N / 8);
    const bfloat16 *from = (second ? dc : db) + group * parts * N + pack_id % (N / 8) * 8;
    float sum[8] = {};
    for (int part = 0; part < parts; part++) {
        Pack<bfloat16, 8> some = *(const Pack<bfloat16, 8> *)(from + part * N);
#pragma unroll
        for (int k = 0; k < 8; k++) sum[k] += load(some.at[k]);
    }
    Pack<bfloat16, 8> result;
#pragma unroll
    for (int k = 0; k < 8; k++) store(result.at[k], sum[k]);
    *(Pack<bfloat16, 8> *)((second ? sum_c : sum_b) + pack_id * 8) = result;
}
