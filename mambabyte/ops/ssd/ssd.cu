// SSD, the scan of Mamba-2, in chunks of T steps on tensor cores, forward and backward. Follows
// types.cu, mma.cu and chunks.cu.
//
// For a head, with decays a_s = exp(g_s) and steps d_s (float32, made before), in a chunk that is
// entered with state h (P x N) and left with h':
//
//   y_i  = sum_{j <= i} W_ij d_j (C_i . B_j) x_j + (prod_{s <= i} a_s) h C_i + D x_i
//   h'   = (prod_s a_s) h + sum_j (prod_{s > j} a_s) d_j x_j B_j^T          W_ij = prod_{j < s <= i} a_s
//
// ssd_states adds up what each chunk writes, ssd_pass hands states from chunk to chunk, ssd_output
// has the rest; the backward mirrors them: ssd_states of dy and C, ssd_pass from the end, and
// ssd_gradients. A block has one chunk of one head; its four warps have 16 of 64 rows each. States
// are float32 while they are added up and bf16 where they are a factor.
//
// W_ij = exp(u_i - u_j), u the cumulated log-decays of the chunk.
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

struct Chunk {
    float step[T];  // d
    float upto[T];  // u: log-decay from before the chunk up to and with the step
    float total;
};

// Fills `chunk` from rows of stride `heads`; to be followed by a barrier. Steps that are not there
// do nothing.
inline void load_steps(Chunk &chunk, const float *step, const float *log_decay, int heads, int rows) {
    if (threadIdx.x >= 32) return;
    float g[2];
    int lane = threadIdx.x;
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
    load_steps(chunk, step + of_head, log_decay + of_head, heads, here.rows);
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
// that of the initial state. A thread has two numbers of the state.
__global__ void __launch_bounds__(THREADS) ssd_pass(
    const float *states, const float *totals, const float *initial, bfloat16 *carries, float *last,
    int64 threads, int size, int chunks, int heads, int backward) {
    constexpr int AHEAD = 8;  // loads in flight
    int64 id = 2 * (blockIdx.x * (int64)THREADS + threadIdx.x);
    if (id >= threads) return;
    int64 unit = id / size;
    int head = (int)(unit % heads), i = (int)(id % size);
    int64 first = unit / heads * chunks * heads + head;
    float2 h = make_float2(0.f, 0.f);
    if (initial) h = *(const float2 *)(initial + id);
    for (int k0 = 0; k0 < chunks; k0 += AHEAD) {
        float2 next[AHEAD];
        float decay[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int k = min(k0 + j, chunks - 1);
            int64 at = first + (int64)(backward ? chunks - 1 - k : k) * heads;
            next[j] = *(const float2 *)(states + at * size + i);
            decay[j] = __expf(totals[at]);
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int k = k0 + j;
            if (k >= chunks) break;
            int64 at = first + (int64)(backward ? chunks - 1 - k : k) * heads;
            *(u32 *)(carries + at * size + i) = pack(h.x, h.y);
            h.x = decay[j] * h.x + next[j].x;
            h.y = decay[j] * h.y + next[j].y;
        }
    }
    *(float2 *)(last + id) = h;
}

// ---------------------------------------------------------------------------------------- output

template <int N>
__global__ void __launch_bounds__(THREADS) ssd_output(
    const bfloat16 *x, const float *step, const float *log_decay, const bfloat16 *b,
    const bfloat16 *c, const float *skip, const bfloat16 *carries, bfloat16 *y, int64 x_batch,
    int64 x_time, int64 x_head, int64 b_batch, int64 b_time, int64 b_group, int64 c_batch,
    int64 c_time, int64 c_group, int length, int heads, int per_group) {
    constexpr int N_ROW = N + 8;
    extern __shared__ __align__(128) char shared[];
    bfloat16 *tile_x = (bfloat16 *)shared, *tile_b = tile_x + T * P_ROW;
    bfloat16 *tile_c = tile_b + T * N_ROW, *tile_h = tile_c + T * N_ROW;
    __shared__ Chunk chunk;
    Place here(length, heads);
    int64 of_head = here.first * heads + here.head;
    int group = here.head / per_group;
    load_steps(chunk, step + of_head, log_decay + of_head, heads, here.rows);
    load_tile<P>(tile_x, x + here.at({x_batch, x_time, x_head}, here.head), x_time, here.rows);
    load_tile<N>(tile_b, b + here.at({b_batch, b_time, b_group}, group), b_time, here.rows);
    load_tile<N>(tile_c, c + here.at({c_batch, c_time, c_group}, group), c_time, here.rows);
    load_tile<N>(tile_h, carries + (int64)blockIdx.x * P * N, N, P);
    __syncthreads();

    int lane = threadIdx.x % 32, block = block_of_warp(), row = 16 * block, g = row + lane / 4;
    int t = lane % 4 * 2;
    float scores[T / 8][4] = {};
    multiply<false, true, N / 16>(scores, tile_c, N_ROW, row, tile_b, N_ROW, 0, block + 1);
#pragma unroll
    for (int n = 0; n < T / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int i = g + e / 2 * 8, j = 8 * n + t + e % 2;
            float weight = __expf(chunk.upto[i] - chunk.upto[j]) * chunk.step[j];
            scores[n][e] = i >= j ? scores[n][e] * weight : 0.f;
        }
    }
    u32 left[T / 16][4];
    as_left(left, scores);
    float sum[P / 8][4] = {};
    multiply<false, true, N / 16>(sum, tile_c, N_ROW, row, tile_h, N_ROW);
    float decay[2] = {__expf(chunk.upto[g]), __expf(chunk.upto[g + 8])};
#pragma unroll
    for (int n = 0; n < P / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) sum[n][e] *= decay[e / 2];
    }
    multiply<false>(sum, left, tile_x, P_ROW, 0, block + 1);
    float d = skip ? skip[here.head] : 0.f;
#pragma unroll
    for (int down = 0; down < 2; down++) {
        int i = g + 8 * down;
        if (i >= here.rows) continue;
        bfloat16 *to = y + (of_head + (int64)i * heads) * P + t;
#pragma unroll
        for (int n = 0; n < P / 8; n++) {
            const bfloat16 *at = tile_x + i * P_ROW + 8 * n + t;
            *(u32 *)(to + 8 * n) = pack(sum[n][2 * down] + d * load(at[0]),
                                        sum[n][2 * down + 1] + d * load(at[1]));
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
// away would cancel. db, dc (B, L, H, N): of each head by itself. dskip (B, K, H).
template <int N>
__global__ void __launch_bounds__(THREADS) ssd_gradients(
    const bfloat16 *dy, const bfloat16 *x, const float *step, const float *log_decay,
    const bfloat16 *b, const bfloat16 *c, const float *skip, const bfloat16 *carries,
    const bfloat16 *dcarries, bfloat16 *dx, float *dstep, float *dlog_decay, bfloat16 *db, bfloat16 *dc,
    float *dskip, int64 dy_batch, int64 dy_time, int64 dy_head, int64 x_batch, int64 x_time,
    int64 x_head, int64 b_batch, int64 b_time, int64 b_group, int64 c_batch, int64 c_time,
    int64 c_group, int length, int heads, int per_group) {
    constexpr int N_ROW = N + 8;
    extern __shared__ __align__(128) char shared[];
    bfloat16 *tile_x = (bfloat16 *)shared, *tile_dy = tile_x + T * P_ROW;
    bfloat16 *tile_ds = tile_dy + T * P_ROW, *tile_b = tile_ds + T * P_ROW;
    bfloat16 *tile_c = tile_b + T * N_ROW, *tile_h = tile_c + T * N_ROW, *tile_dh = tile_h + P * N_ROW;
    __shared__ Chunk chunk;
    __shared__ float of_row[T], from_carry[T], to_end[T], of_column[WARPS][T];
    __shared__ float with_state[WARPS], with_skip[WARPS];
    Place here(length, heads);
    int64 of_head = here.first * heads + here.head;
    int group = here.head / per_group;
    load_steps(chunk, step + of_head, log_decay + of_head, heads, here.rows);
    load_tile<P>(tile_x, x + here.at({x_batch, x_time, x_head}, here.head), x_time, here.rows);
    load_tile<P>(tile_dy, dy + here.at({dy_batch, dy_time, dy_head}, here.head), dy_time, here.rows);
    load_tile<N>(tile_b, b + here.at({b_batch, b_time, b_group}, group), b_time, here.rows);
    load_tile<N>(tile_c, c + here.at({c_batch, c_time, c_group}, group), c_time, here.rows);
    load_tile<N>(tile_h, carries + (int64)blockIdx.x * P * N, N, P);
    load_tile<N>(tile_dh, dcarries + (int64)blockIdx.x * P * N, N, P);
    __syncthreads();

    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, block = block_of_warp(), row = 16 * block;
    int g = row + lane / 4, t = lane % 4 * 2;
    // Two sums over the whole tile: dh' . h and dy . x.
    float states = 0.f, skipped = 0.f;
    for (int k = threadIdx.x; k < P * N; k += THREADS) {
        int at = k / N * N_ROW + k % N;
        states += load(tile_h[at]) * load(tile_dh[at]);
    }
    for (int k = threadIdx.x; k < T * P; k += THREADS) {
        int at = k / P * P_ROW + k % P;
        skipped += load(tile_x[at]) * load(tile_dy[at]);
    }
    states = sum_of_warp(states), skipped = sum_of_warp(skipped);
    if (lane == 0) with_state[warp] = states, with_skip[warp] = skipped;

    // Transposed, so that a warp has 16 steps j as rows: M_ij = W_ij d_j S_ij and dS_ij = W_ij d_j Q_ij.
    u32 m[T / 16][4], ds[T / 16][4];
    float direct[2] = {0.f, 0.f}, decayed[2] = {0.f, 0.f};
    {
        float s[T / 8][4] = {}, q[T / 8][4] = {}, column[T / 8][2] = {};
        multiply<false, true, N / 16>(s, tile_b, N_ROW, row, tile_c, N_ROW, block);
        multiply<false, true, P / 16>(q, tile_x, P_ROW, row, tile_dy, P_ROW, block);
#pragma unroll
        for (int n = 0; n < T / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int j = g + e / 2 * 8, i = 8 * n + t + e % 2;
                float weight = i >= j ? __expf(chunk.upto[i] - chunk.upto[j]) : 0.f;
                float both = weight * s[n][e] * q[n][e], d = chunk.step[j];
                direct[e / 2] += both;
                float off_diagonal = i > j ? both * d : 0.f;
                decayed[e / 2] += off_diagonal;
                column[n][e % 2] += off_diagonal;
                s[n][e] *= weight * d;
                q[n][e] *= weight * d;
            }
        }
        as_left(m, s);
        as_left(ds, q);
        // Columns: over the warp's 16 rows here, over the warps later.
#pragma unroll
        for (int n = 0; n < T / 8; n++) {
#pragma unroll
            for (int k = 0; k < 2; k++) {
                float sum = column[n][k];
#pragma unroll
                for (int far = 4; far < 32; far *= 2) sum += __shfl_xor_sync(ALL, sum, far);
                if (lane < 4) of_column[warp][8 * n + t + k] = sum;
            }
            int right = n % 2 * 2;
            *(u32 *)(tile_ds + g * P_ROW + 8 * n + t) = ds[n / 2][right];
            *(u32 *)(tile_ds + (g + 8) * P_ROW + 8 * n + t) = ds[n / 2][right + 1];
        }
    }
    float end[2], d[2];
#pragma unroll
    for (int down = 0; down < 2; down++) {
        end[down] = __expf(chunk.total - chunk.upto[g + 8 * down]);
        d[down] = chunk.step[g + 8 * down];
        direct[down] = sum_of_row(direct[down]), decayed[down] = sum_of_row(decayed[down]);
    }

    {
        float sum[P / 8][4] = {}, read[2] = {0.f, 0.f};
        multiply<false, true, N / 16>(sum, tile_b, N_ROW, row, tile_dh, N_ROW);  // R
#pragma unroll
        for (int n = 0; n < P / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int down = e / 2;
                read[down] += load(tile_x[(g + 8 * down) * P_ROW + 8 * n + t + e % 2]) * sum[n][e];
                sum[n][e] *= end[down] * d[down];
            }
        }
        multiply<false>(sum, m, tile_dy, P_ROW, block);
        float factor = skip ? skip[here.head] : 0.f;
#pragma unroll
        for (int down = 0; down < 2; down++) {
            int j = g + 8 * down;
            float written = end[down] * sum_of_row(read[down]);
            if (t == 0) to_end[j] = written * d[down];
            if (j >= here.rows) continue;
            int64 at = of_head + (int64)j * heads;
            if (t == 0) dstep[at] = direct[down] + written;
#pragma unroll
            for (int n = 0; n < P / 8; n++) {
                const bfloat16 *from = tile_dy + j * P_ROW + 8 * n + t;
                *(u32 *)(dx + at * P + 8 * n + t) =
                    pack(sum[n][2 * down] + factor * load(from[0]),
                         sum[n][2 * down + 1] + factor * load(from[1]));
            }
        }
    }
    {
        float sum[N / 8][4] = {};
        multiply<false, false, P / 16>(sum, tile_x, P_ROW, row, tile_dh, N_ROW);
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) sum[n][e] *= end[e / 2] * d[e / 2];
        }
        multiply<false>(sum, ds, tile_c, N_ROW, block);
#pragma unroll
        for (int down = 0; down < 2; down++) {
            int j = g + 8 * down;
            if (j >= here.rows) continue;
            bfloat16 *to = db + (of_head + (int64)j * heads) * N + t;
#pragma unroll
            for (int n = 0; n < N / 8; n++)
                *(u32 *)(to + 8 * n) = pack(sum[n][2 * down], sum[n][2 * down + 1]);
        }
    }
    __syncthreads();  // all of tile_ds is there
    {
        float sum[N / 8][4] = {}, read[2] = {0.f, 0.f};
        multiply<false, false, P / 16>(sum, tile_dy, P_ROW, row, tile_h, N_ROW);
        float start[2] = {__expf(chunk.upto[g]), __expf(chunk.upto[g + 8])};
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int down = e / 2;
                sum[n][e] *= start[down];
                read[down] += load(tile_c[(g + 8 * down) * N_ROW + 8 * n + t + e % 2]) * sum[n][e];
            }
        }
        for (int k = 0; k <= block; k++)
            multiply<true, false, 1>(sum, tile_ds + 16 * k * P_ROW, P_ROW, row, tile_b + 16 * k * N_ROW, N_ROW);
#pragma unroll
        for (int down = 0; down < 2; down++) {
            int i = g + 8 * down;
            float carried = sum_of_row(read[down]);
            if (t == 0) of_row[i] = decayed[down], from_carry[i] = carried;
            if (i >= here.rows) continue;
            bfloat16 *to = dc + (of_head + (int64)i * heads) * N + t;
#pragma unroll
            for (int n = 0; n < N / 8; n++)
                *(u32 *)(to + 8 * n) = pack(sum[n][2 * down], sum[n][2 * down + 1]);
        }
    }
    __syncthreads();
    if (warp == 0) {  // each lane has two steps
        float of_u[2], ahead[2];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            int s = 2 * lane + k;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += of_column[w][s];
            of_u[k] = sum - of_row[s] + from_carry[s];
            ahead[k] = to_end[s];
        }
        // Of u_i for i >= s, counted from the end; of what was written before s.
        float later = of_u[0] + of_u[1];
#pragma unroll
        for (int far = 1; far < 32; far *= 2) {
            float other = __shfl_sync(ALL, later, lane + far);
            if (lane + far < 32) later += other;
        }
        float rest = __shfl_sync(ALL, later, lane + 1);
        if (lane == 31) rest = 0.f;
        float before = __shfl_sync(ALL, cumulated(ahead[0] + ahead[1]), lane - 1);
        if (lane == 0) before = 0.f;
        float total = 0.f, of_skip = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += with_state[w], of_skip += with_skip[w];
        total *= __expf(chunk.total);
        float found[2] = {later + before + total, rest + of_u[1] + before + ahead[0] + total};
#pragma unroll
        for (int k = 0; k < 2; k++) {
            int s = 2 * lane + k;
            if (s < here.rows) dlog_decay[of_head + (int64)s * heads] = found[k];
        }
        if (lane == 0) dskip[blockIdx.x] = of_skip;
    }
}

// Adds up what the heads of each group have: db, dc (B, L, G, H / G, N) -> sum_b, sum_c (B, L, G, N). A
// thread has eight numbers of one of the two.
template <int N>
__global__ void __launch_bounds__(THREADS) ssd_groups(
    const bfloat16 *db, const bfloat16 *dc, bfloat16 *sum_b, bfloat16 *sum_c, int64 packs, int per_group) {
    int64 id = blockIdx.x * (int64)THREADS + threadIdx.x;
    if (id >= 2 * packs) return;
    bool second = id >= packs;
    int64 pack_id = second ? id - packs : id, group = pack_id / (N / 8);
    const bfloat16 *from = (second ? dc : db) + group * per_group * N + pack_id % (N / 8) * 8;
    float sum[8] = {};
    for (int head = 0; head < per_group; head++) {
        Pack<bfloat16, 8> some = *(const Pack<bfloat16, 8> *)(from + head * N);
#pragma unroll
        for (int k = 0; k < 8; k++) sum[k] += load(some.at[k]);
    }
    Pack<bfloat16, 8> result;
#pragma unroll
    for (int k = 0; k < 8; k++) store(result.at[k], sum[k]);
    *(Pack<bfloat16, 8> *)((second ? sum_c : sum_b) + pack_id * 8) = result;
}
