// Mamba-3's angles around the kernels of ssd.cu: B and C turned by all steps up to theirs, and what the
// gradients of turned ones say about those that were given and about each angle. Follows chunks.cu.
//
// Of pairs of states, neighbours as a complex number, the first `pairs` turn: step t of a head by theta_t
// dt_t, and p_t is the sum from its chunk's first step up to it. An angle is an unsigned integer, a turn
// 2^32: sums wrap around where a turn is full, cost no digit, and are the same in any order.
//
//   b~_t = exp(i p_t) (b_t + bias)        own_t = mix_t dt_t
//   c~_t = exp(i p_t) (c_t + bias)        step_t = own_t + (1 - mix_{t+1}) dt_{t+1}, of the last one own_t
//
// is what SSD reads: step_t is all that step t writes, own_t how much of it step t reads itself, and
// what the step behind the last one adds is for who goes on. A state that goes from chunk to chunk is
// turned back by the chunk's whole angle.

constexpr int WIDE = 2 * THREADS;

inline u32 angle_of(float dt, float theta) {
    double turns = (double)dt * theta * 0.15915494309189535;  // the first product is exact
    return (u32)(int64)rint((turns - rint(turns)) * 4294967296.);
}

// Cosine and sine, right to 4e-7: from half a turn back to half a turn ahead.
inline float2 way_of(u32 angle) {
    float x = (float)(int)angle * 1.4629180792671596e-9f;
    return make_float2(__cosf(x), __sinf(x));
}

// z turned that way.
inline float2 along(float2 way, float2 z) {
    return make_float2(way.x * z.x - way.y * z.y, way.y * z.x + way.x * z.y);
}

// Four pairs in one write: left to itself the compiler may make four of it.
inline void store_pairs(bfloat16 *to, const float2 *z) {
    asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};"
                 :: "l"(to), "r"(pack(z[0].x, z[0].y)), "r"(pack(z[1].x, z[1].y)),
                    "r"(pack(z[2].x, z[2].y)), "r"(pack(z[3].x, z[3].y)) : "memory");
}

// ------------------------------------------------------------------------------- before the scan

// turned_b, turned_c (B, L, H, N), step and own (B, L, H), angles (B, K, H, S) of whole chunks and, unless
// null, each_angle (B, L, H, S). A block has a chunk of a head. A thread sums some steps of a pair, and
// turns some steps of four pairs.
template <int N>
__global__ void __launch_bounds__(WIDE, N > 64 ? 3 : 4) angle_turn(
    const bfloat16 *b, const bfloat16 *c, const float *b_bias, const float *c_bias, const float *dt,
    const float *theta, const float *mix, bfloat16 *turned_b, bfloat16 *turned_c, float *step,
    float *own, u32 *angles, u32 *each_angle, int64 b_batch, int64 b_time, int64 b_group,
    int64 c_batch, int64 c_time, int64 c_group, int length, int heads, int per_group, int pairs) {
    constexpr int PAIRS = N / 2, PARTS = WIDE / PAIRS, STEPS = T / PARTS, PACKS = N / 8;
    constexpr int ROUNDS = (T * PACKS + WIDE - 1) / WIDE, APART = WIDE / PACKS;
    __shared__ __align__(128) u32 angle[T][PAIRS];
    __shared__ u32 sums[PARTS][PAIRS];
    __shared__ float lost[T];  // nan where an angle is: an integer is none
    __shared__ __align__(16) float bias[2][N];
    Place here(length, heads);
    int pair = threadIdx.x % PAIRS, part = threadIdx.x / PAIRS, first = part * STEPS;
    int row = threadIdx.x / PACKS, column = threadIdx.x % PACKS * 8;
    int64 of_head = here.first * heads + here.head;
    // All that is read is asked for first. Beyond the last row that one is read: behind a branch the
    // compiler would widen, and so wait for, each pack.
    const bfloat16 *from_b = b + here.at({b_batch, b_time, b_group}, here.head / per_group) + column;
    const bfloat16 *from_c = c + here.at({c_batch, c_time, c_group}, here.head / per_group) + column;
    const float *from_dt = dt + of_head + (int64)first * heads;
    const float *from_theta = theta + (here.first + first) * pairs + pair;
    int steps = pair < pairs ? here.rows - first : 0;
    Pack<bfloat16, 8> some_b[ROUNDS], some_c[ROUNDS];
    float of_time[STEPS], rate[STEPS], gate[4] = {};  // gate: mix and dt, of the next step too
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        of_time[k] = k < steps ? *from_dt : 0.f, rate[k] = k < steps ? *from_theta : 0.f;
        from_dt += heads, from_theta += pairs;
    }
#pragma unroll
    for (int k = 0; k < ROUNDS; k++) {
        int t = min(row + k * APART, here.rows - 1);
        some_b[k] = *(const Pack<bfloat16, 8> *)(from_b + t * b_time);
        some_c[k] = *(const Pack<bfloat16, 8> *)(from_c + t * c_time);
    }
    int64 gate_at = of_head + (int64)threadIdx.x * heads;
    if (threadIdx.x < here.rows) {
        gate[0] = mix[gate_at], gate[1] = dt[gate_at];
        gate[2] = 1.f;  // behind the last step nothing is written
        if (here.chunk * T + (int)threadIdx.x + 1 < length)
            gate[2] = mix[gate_at + heads], gate[3] = dt[gate_at + heads];
    }
    if (threadIdx.x < T) lost[threadIdx.x] = 0.f;
    if (threadIdx.x < 2 * N) {
        const float *from = threadIdx.x < N ? b_bias : c_bias;
        bias[threadIdx.x / N][threadIdx.x % N] = from ? from[here.head * N + threadIdx.x % N] : 0.f;
    }
    u32 upto[STEPS], sum = 0;
#pragma unroll
    for (int k = 0; k < STEPS; k++) upto[k] = sum += angle_of(of_time[k], rate[k]);
    sums[part][pair] = sum;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        if (0.f * of_time[k] * rate[k] != 0.f) lost[first + k] = __uint_as_float(0x7fffffffu);
    u32 before = 0;
    for (int earlier = 0; earlier < part; earlier++) before += sums[earlier][pair];
    u32 *to_each = each_angle + (of_head + (int64)first * heads) * pairs + pair;
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        angle[first + k][pair] = before + upto[k];
        if (each_angle && k < steps) *to_each = before + upto[k];
        to_each += heads * pairs;
    }
    if (part == PARTS - 1 && pair < pairs) angles[blockIdx.x * (int64)pairs + pair] = before + sum;
    __syncthreads();

    int64 to = (of_head + (int64)row * heads) * N + column;
#pragma unroll
    for (int k = 0; k < ROUNDS; k++) {
        int t = row + k * APART;
        Pack<u32, 4> angles_of_four = *(const Pack<u32, 4> *)&angle[min(t, T - 1)][column / 2];
        float2 y[4], z[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float2 plus = *(const float2 *)&bias[0][column + 2 * e], more = *(const float2 *)&bias[1][column + 2 * e];
            y[e] = make_float2(load(some_b[k].at[2 * e]) + plus.x, load(some_b[k].at[2 * e + 1]) + plus.y);
            z[e] = make_float2(load(some_c[k].at[2 * e]) + more.x, load(some_c[k].at[2 * e + 1]) + more.y);
        }
        if (column / 2 < pairs) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float2 way = way_of(angles_of_four.at[e]);
                y[e] = along(way, y[e]), z[e] = along(way, z[e]);
            }
        }
        if (t < here.rows) {
            store_pairs(turned_b + to, y);
            store_pairs(turned_c + to, z);
        }
        to += (int64)APART * heads * N;
    }
    if (threadIdx.x >= here.rows) return;
    float alone = gate[0] * gate[1] + lost[threadIdx.x];
    own[gate_at] = alone;
    step[gate_at] = alone + (1.f - gate[2]) * gate[3];
}

// ------------------------------------------------------------------------------- after the scan

// From gradients of what angle_turn made to those of what it was given: turned back, added up over the
// heads of a group, and of the biases over a block's steps: biases (2, H, N, blocks). d_angle (B, L, H, S)
// is each step's own. A block has WIDE * 8 / N of all (B L) steps, a thread four pairs of one; what is
// read for a head is asked for while the one before is worked on.
template <int N>
__global__ void __launch_bounds__(WIDE) angle_back(
    const bfloat16 *turned_db, const bfloat16 *turned_dc, const float *d_angle, const u32 *each_angle,
    const float *dt, const float *theta, const float *mix, const float *dstep, const float *d_own,
    bfloat16 *db, bfloat16 *dc, float *biases, float *d_dt, float *d_theta, float *d_mix, int64 rows,
    int length, int heads, int per_group, int pairs) {
    constexpr int PACKS = N / 8, ROWS = WIDE / PACKS;
    __shared__ float sums[2][2 * WARPS][2 * N];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = threadIdx.x % PACKS * 8;
    int64 row = blockIdx.x * (int64)ROWS + threadIdx.x / PACKS;
    bool there = row < rows, leads = there && column == 0, whole = pairs % 4 == 0;
    int turns = there ? max(0, min(4, pairs - column / 2)) : 0;  // of this thread's pairs, the first so many
    // Beyond the last row that one is read: behind a branch the compiler would widen, and so wait for,
    // each pack.
    int64 first = min(row, rows - 1), at = first * heads;
    const bfloat16 *from_b = turned_db + at * N + column, *from_c = turned_dc + at * N + column;
    const u32 *from_each = each_angle + at * pairs + column / 2;
    const float *from_angle = d_angle + at * pairs + column / 2, *from_dt = dt + at;
    bool enters = first % length;  // or nothing of a step before is this row's
    float of_group[16] = {};  // eight numbers of B's gradient, eight of C's
    Pack<bfloat16, 8> one, other;
    u32 angle[4] = {};
    float of_angle[4] = {}, of_theta[4] = {}, rate[4] = {}, time;
    float share = 0.f, of_own = 0.f, of_last = 0.f;  // mix, gradients; of the thread with a step's first pairs
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < turns) rate[k] = theta[row * pairs + column / 2 + k];
    auto fetch = [&](int head) {
        one = *(const Pack<bfloat16, 8> *)(from_b + head * N);
        other = *(const Pack<bfloat16, 8> *)(from_c + head * N);
        time = from_dt[head];
        if (whole && turns) {
            Pack<u32, 4> each = *(const Pack<u32, 4> *)(from_each + head * pairs);
            Pack<float, 4> of_each = *(const Pack<float, 4> *)(from_angle + head * pairs);
#pragma unroll
            for (int k = 0; k < 4; k++) angle[k] = each.at[k], of_angle[k] = of_each.at[k];
        } else {
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (k < turns) angle[k] = from_each[head * pairs + k], of_angle[k] = from_angle[head * pairs + k];
        }
        if (leads) {
            share = mix[at + head], of_own = dstep[at + head] + d_own[at + head];
            of_last = enters ? dstep[at + head - heads] : 0.f;
        }
    };
    fetch(0);
    for (int head = 0; head < heads; head++) {
        float of_head[16];
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
            float2 way = way_of(0u - angle[e / 2]);
            float2 y = along(way, make_float2(load(one.at[e]), load(one.at[e + 1])));
            float2 z = along(way, make_float2(load(other.at[e]), load(other.at[e + 1])));
            of_head[e] = y.x, of_head[e + 1] = y.y, of_head[8 + e] = z.x, of_head[9 + e] = z.y;
        }
        if (!there) {
#pragma unroll
            for (int e = 0; e < 16; e++) of_head[e] = 0.f;
        }
        float of_time = 0.f;
#pragma unroll
        for (int k = 0; k < 4; k++) of_theta[k] += of_angle[k] * time, of_time += of_angle[k] * rate[k];
#pragma unroll
        for (int far = 1; far < PACKS; far *= 2) of_time += __shfl_xor_sync(ALL, of_time, far);
        if (leads) {
            d_dt[at + head] = of_time + share * of_own + (1.f - share) * of_last;
            d_mix[at + head] = time * (of_own - of_last);
        }
        if (head + 1 < heads) fetch(head + 1);
#pragma unroll
        for (int e = 0; e < 16; e++) of_group[e] += of_head[e];
        if ((head + 1) % per_group == 0) {
            int64 to = (row * (heads / per_group) + head / per_group) * N + column;
            float2 all[8];
#pragma unroll
            for (int e = 0; e < 8; e++)
                all[e] = make_float2(of_group[2 * e], of_group[2 * e + 1]), of_group[2 * e] = of_group[2 * e + 1] = 0.f;
            if (there) store_pairs(db + to, all), store_pairs(dc + to, all + 4);
        }
        if (!biases) continue;
        // Over the rows of a warp: a lane gives one half of what it has for the other half, and is left
        // with `left` sums, from `kept` on.
        int left = 16, kept = 0;
#pragma unroll
        for (int far = PACKS; far < 32; far *= 2) {
            left /= 2;
            bool high = lane & far;
#pragma unroll
            for (int e = 0; e < 8; e++) {
                if (e >= left) break;
                float given = high ? of_head[e] : of_head[e + left];
                of_head[e] = (high ? of_head[e + left] : of_head[e]) + __shfl_xor_sync(ALL, given, far);
            }
            kept += high ? left : 0;
        }
        float(&sum)[2 * WARPS][2 * N] = sums[head % 2];
#pragma unroll
        for (int e = 0; e < 8; e++)
            if (e < left) sum[warp][(kept + e) / 8 * N + column + (kept + e) % 8] = of_head[e];
        __syncthreads();  // one is enough: the next head writes elsewhere
        if (threadIdx.x < 2 * N) {
            float total = 0.f;
#pragma unroll
            for (int w = 0; w < 2 * WARPS; w++) total += sum[w][threadIdx.x];
            int64 to = (threadIdx.x / N * heads + head) * N + threadIdx.x % N;
            biases[to * ((rows + ROWS - 1) / ROWS) + blockIdx.x] = total;
        }
    }
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < turns) d_theta[row * pairs + column / 2 + k] = of_theta[k];
}

// ---------------------------------------------------------------------- a part of ssd_gradients

// What the gradients of turned B and C say about the angles, where they are not rounded yet.
//
// The gradient of step t's angle has a part of every pair of steps with t between them. As a sum over all
// later steps of what turning theirs changes, the parts of all pairs behind t cancel, and what was
// rounded between does not. Here they cancel to the bit or nearly so: within a chunk, whose sums have
// the same factors for both of a pair; what crosses the end of a chunk is counted there.
template <int N> struct Angles {
    static constexpr int PAIRS = N / 2, PARTS = WIDE / PAIRS, STEPS = T / PARTS;
    float crossing[2 * WARPS][PAIRS];  // by warp: the state that enters, at the end
    float written[WARPS][PAIRS];       // by 16 rows: what they wrote, there
    float sums[PARTS][PAIRS];

    // d_angle (T, pairs) of a head: rows of stride `stride`. By all threads, behind a barrier; `points` is
    // what turning each step alone changes, `decay` that of the whole chunk.
    inline void finish(const float (*points)[PAIRS], float decay, float *d_angle, int64 stride, int pairs,
                       int rows) {
        int pair = threadIdx.x % PAIRS, part = threadIdx.x / PAIRS;
        float sum = 0.f, at_end = 0.f;
#pragma unroll
        for (int k = 0; k < STEPS; k++) sum += points[part * STEPS + k][pair];
        sums[part][pair] = sum;
#pragma unroll
        for (int w = 0; w < 2 * WARPS; w++) at_end += crossing[w][pair];
        sum = decay * at_end;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum -= written[w][pair];
        __syncthreads();
        for (int later = PARTS - 1; later > part; later--) sum += sums[later][pair];
#pragma unroll
        for (int k = STEPS - 1; k >= 0; k--) {
            int t = part * STEPS + k;
            sum += points[t][pair];
            if (t < rows && pair < pairs) d_angle[t * stride + pair] = sum;
        }
    }
};

// How a product changes with a turn: of z, whose gradient is d.
inline float along_turn(float dx, float dy, const bfloat16 *z) { return dy * load(z[0]) - dx * load(z[1]); }
