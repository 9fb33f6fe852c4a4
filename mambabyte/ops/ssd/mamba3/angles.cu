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

// By additions that leave what was wanted in the low bits, where a conversion would take eight times as long.
inline u32 angle_of(float dt, float theta) {
    constexpr double ROUND = 6755399441055744.;               // 1.5 2^52
    double turns = (double)dt * theta * 0.15915494309189535;  // the first product is exact
    double rest = turns - ((turns + ROUND) - ROUND);
    return (u32)__double_as_longlong(rest * 4294967296. + ROUND);
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

// Which pair, and which of the PARTS of a chunk, a thread sums: where a half of the pairs turns, all that a
// warp has do, or none of it.
template <int N> struct Parts {
    static constexpr int PAIRS = N / 2, LANES = PAIRS < 32 ? PAIRS : 32;
    static constexpr int PARTS = WIDE / PAIRS, STEPS = T / PARTS;
    int pair = threadIdx.x % LANES + threadIdx.x / (LANES * PARTS) * LANES;
    int part = threadIdx.x / LANES % PARTS, first = part * STEPS;  // first: of its steps
};

// turned_b, turned_c (B, L, H, N), step and own (B, L, H), angles (B, K, H, S) of whole chunks and, unless
// null, each_angle (B, L, H, S). A block has a chunk of `together` heads of a group, one after the other. A
// thread sums some steps of a pair, and turns some steps of four pairs; one half of the warps has the first
// half of the pairs.
template <int N>
__global__ void __launch_bounds__(WIDE, N > 64 ? 2 : 3) angle_turn(
    const bfloat16 *b, const bfloat16 *c, const float *b_bias, const float *c_bias, const float *dt,
    const float *theta, const float *mix, bfloat16 *turned_b, bfloat16 *turned_c, float *step,
    float *own, u32 *angles, u32 *each_angle, int64 b_batch, int64 b_time, int64 b_group,
    int64 c_batch, int64 c_time, int64 c_group, int length, int heads, int per_group, int pairs, int together) {
    constexpr int PAIRS = N / 2, PARTS = Parts<N>::PARTS, STEPS = Parts<N>::STEPS, PACKS = N / 16;
    constexpr int APART = THREADS / PACKS, ROUNDS = (T + APART - 1) / APART;
    __shared__ __align__(128) u32 angle[T][PAIRS];
    __shared__ u32 sums[PARTS][PAIRS];
    __shared__ float lost[T];  // nan where an angle is: an integer is none
    Place here(length, heads / together);
    Parts<N> of;
    int pair = of.pair, part = of.part, first = of.first, head = here.head * together;
    int row = threadIdx.x % THREADS / PACKS, column = (threadIdx.x / THREADS * PACKS + threadIdx.x % PACKS) * 8;
    const bfloat16 *from_b = b + here.at({b_batch, b_time, b_group}, head / per_group) + column;
    const bfloat16 *from_c = c + here.at({c_batch, c_time, c_group}, head / per_group) + column;
    bool there = pair < pairs, turns = pair < (pairs + 3) / 4 * 4;  // those of a thread below turn all
    int steps = here.rows - first;
    theta += (here.first + first) * pairs + pair;
    if (threadIdx.x < T) lost[threadIdx.x] = 0.f;
    int64 unit = blockIdx.x * (int64)together;  // its (batch, chunk, head)
    for (int end = head + together; head < end; head++, unit++) {
        // Or the compiler keeps the address of everything below in registers, from head to head.
        asm volatile("" : "+l"(theta), "+l"(from_b), "+l"(from_c));
        int64 of_head = here.first * heads + head, gate_at = of_head + (int64)threadIdx.x * heads;
        float gate[4] = {};  // mix and dt, of the next step too
        if (threadIdx.x < here.rows) {
            gate[0] = mix[gate_at], gate[1] = dt[gate_at];
            gate[2] = 1.f;  // behind the last step nothing is written
            if (here.chunk * T + (int)threadIdx.x + 1 < length)
                gate[2] = mix[gate_at + heads], gate[3] = dt[gate_at + heads];
        }
        u32 upto[STEPS], sum = 0, bad = 0;  // bad: a bit a step
        if (turns) {
            const float *from_dt = dt + of_head + (int64)first * heads, *from_theta = theta;
            float time[STEPS], rate[STEPS], none = 0.f;
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                time[k] = k < steps ? *from_dt : 0.f, rate[k] = there && k < steps ? *from_theta : 0.f;
                from_dt += heads, from_theta += pairs;
            }
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                upto[k] = sum += angle_of(time[k], rate[k]);
                none += 0.f * time[k] * rate[k];
            }
            sums[part][pair] = sum;
            if (none != 0.f) {
#pragma unroll
                for (int k = 0; k < STEPS; k++)
                    if (0.f * time[k] * rate[k] != 0.f) bad |= 1u << k;
            }
        }
        __syncthreads();
        if (turns) {
            u32 before = 0;
            for (int earlier = 0; earlier < part; earlier++) before += sums[earlier][pair];
            u32 *to_each = each_angle + (of_head + (int64)first * heads) * pairs + pair;
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                angle[first + k][pair] = before + upto[k];
                if (each_angle && there && k < steps) *to_each = before + upto[k];
                to_each += heads * pairs;
            }
            for (int k = 0; bad >> k; k++)
                if (bad >> k & 1) lost[first + k] = __uint_as_float(0x7fffffffu);
            if (there && part == PARTS - 1) angles[unit * pairs + pair] = before + sum;
        }
        // Beyond the last row that one is read: behind a branch the compiler would widen, and so wait for,
        // each pack. Heads behind the first find them near.
        Pack<u32, 4> some_b[ROUNDS], some_c[ROUNDS];  // of two numbers each
#pragma unroll
        for (int k = 0; k < ROUNDS; k++) {
            int t = min(row + k * APART, here.rows - 1);
            some_b[k] = *(const Pack<u32, 4> *)(from_b + t * b_time);
            some_c[k] = *(const Pack<u32, 4> *)(from_c + t * c_time);
        }
        float2 plus[4] = {}, more[4] = {};  // the biases of B and C
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (b_bias) plus[e] = *(const float2 *)(b_bias + head * N + column + 2 * e);
            if (c_bias) more[e] = *(const float2 *)(c_bias + head * N + column + 2 * e);
        }
        __syncthreads();

        int64 to = (of_head + (int64)row * heads) * N + column;
#pragma unroll
        for (int k = 0; k < ROUNDS; k++) {
            int t = row + k * APART;
            float2 y[4], z[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                y[e] = make_float2(low_of(some_b[k].at[e]) + plus[e].x, high_of(some_b[k].at[e]) + plus[e].y);
                z[e] = make_float2(low_of(some_c[k].at[e]) + more[e].x, high_of(some_c[k].at[e]) + more[e].y);
            }
            if (column / 2 < pairs) {
                Pack<u32, 4> four = *(const Pack<u32, 4> *)&angle[min(t, T - 1)][column / 2];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float2 way = way_of(four.at[e]);
                    y[e] = along(way, y[e]), z[e] = along(way, z[e]);
                }
            }
            if (t < here.rows) {
                store_pairs(turned_b + to, y);
                store_pairs(turned_c + to, z);
            }
            to += (int64)APART * heads * N;
        }
        if (threadIdx.x >= here.rows) continue;
        float alone = gate[0] * gate[1] + lost[threadIdx.x];
        lost[threadIdx.x] = 0.f;  // for the next head
        own[gate_at] = alone;
        step[gate_at] = alone + (1.f - gate[2]) * gate[3];
    }
}

// ------------------------------------------------------------------------------- after the scan

// From gradients of what angle_turn made to those of what it was given: turned back, added up over the
// heads of a group, and of the biases over a block's steps: biases (blocks, 2, H, N), or null. d_angle
// (B, L, H, S) is each step's own. A thread has eight numbers of a step, `rounds` times, and what these add
// up over heads in shared memory, which is nobody else's; the next ones are asked for while some are worked on.
template <int N>
__global__ void __launch_bounds__(WIDE) angle_back(
    const bfloat16 *turned_db, const bfloat16 *turned_dc, const float *d_angle, const u32 *each_angle,
    const float *dt, const float *theta, const float *mix, const float *dstep, const float *d_own,
    bfloat16 *db, bfloat16 *dc, float *biases, float *d_dt, float *d_theta, float *d_mix, int64 rows,
    int length, int heads, int per_group, int pairs, int rounds) {
    constexpr int PACKS = N / 8, ROWS = WIDE / PACKS;
    extern __shared__ __align__(128) char shared[];
    float4 *kept = (float4 *)shared + threadIdx.x;  // a round has five of WIDE: eight of B and C, theta's
    __shared__ float sums[2 * WARPS][2 * N];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = threadIdx.x % PACKS * 8;
    int64 before = blockIdx.x * (int64)rounds * ROWS;  // rows of other blocks
    int row = threadIdx.x / PACKS, count = (int)min((int64)(rounds * ROWS), rows - before), groups = heads / per_group;
    bool whole = pairs % 4 == 0, leads = column == 0;
    int turns = max(0, min(4, pairs - column / 2));  // of this thread's pairs, the first so many
    turned_db += before * heads * N + column, turned_dc += before * heads * N + column;
    each_angle += before * heads * pairs + column / 2, d_angle += before * heads * pairs + column / 2;
    theta += before * pairs + column / 2, d_theta += before * pairs + column / 2;
    db += before * groups * N + column, dc += before * groups * N + column;
    dt += before * heads, mix += before * heads, dstep += before * heads, d_own += before * heads;
    d_dt += before * heads, d_mix += before * heads;
    u32 begins = 0;  // a bit a round: of a row that is the first of its sequence
    int place = (int)((before + row) % length);
    for (int round = 0; round < rounds; round++) begins |= (u32)((place + round * ROWS) % length == 0) << round;
    Pack<u32, 4> one, other;  // of two numbers each
    u32 angle[4] = {};
    float of_angle[4] = {}, rate[4] = {}, time;
    float share = 0.f, of_own = 0.f, of_last = 0.f;  // mix, gradients; of the thread with a step's first pairs
    auto fetch = [&](int head, int round) {
        // Beyond the last row that one is read: behind a branch the compiler would widen, and so wait
        // for, each pack.
        int from = min(row + round * ROWS, count - 1), at = from * heads + head;
        one = *(const Pack<u32, 4> *)(turned_db + at * N);
        other = *(const Pack<u32, 4> *)(turned_dc + at * N);
        time = dt[at];
        if (whole && turns) {
            Pack<u32, 4> each = *(const Pack<u32, 4> *)(each_angle + at * pairs);
            Pack<float, 4> of_each = *(const Pack<float, 4> *)(d_angle + at * pairs);
            Pack<float, 4> rates = *(const Pack<float, 4> *)(theta + from * pairs);
#pragma unroll
            for (int k = 0; k < 4; k++) angle[k] = each.at[k], of_angle[k] = of_each.at[k], rate[k] = rates.at[k];
        } else {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if (k >= turns) continue;
                angle[k] = each_angle[at * pairs + k], of_angle[k] = d_angle[at * pairs + k];
                rate[k] = theta[from * pairs + k];
            }
        }
        if (leads) {
            share = mix[at], of_own = dstep[at] + d_own[at];
            of_last = begins >> round & 1 ? 0.f : dstep[at - heads];
        }
    };
    fetch(0, 0);
    for (int head = 0, group = 0, of_group = 0; head < heads; head++) {  // of_group: its place among its heads
        float of_bias[16] = {};
        for (int round = 0; round < rounds; round++) {
            int at = row + round * ROWS;
            bool there = at < count;
            float of_head[16];  // eight numbers of B's gradient, eight of C's
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float2 way = way_of(0u - angle[e]);
                float2 y = along(way, make_float2(low_of(one.at[e]), high_of(one.at[e])));
                float2 z = along(way, make_float2(low_of(other.at[e]), high_of(other.at[e])));
                of_head[2 * e] = y.x, of_head[2 * e + 1] = y.y, of_head[8 + 2 * e] = z.x, of_head[9 + 2 * e] = z.y;
            }
            float4 *here = kept + round * 5 * WIDE, of_theta = make_float4(0.f, 0.f, 0.f, 0.f);
            if (head) of_theta = here[4 * WIDE];
            of_theta.x += of_angle[0] * time, of_theta.y += of_angle[1] * time;
            of_theta.z += of_angle[2] * time, of_theta.w += of_angle[3] * time;
            float of_time = 0.f;
#pragma unroll
            for (int k = 0; k < 4; k++) of_time += of_angle[k] * rate[k];
#pragma unroll
            for (int far = 1; far < PACKS; far *= 2) of_time += __shfl_xor_sync(ALL, of_time, far);
            if (there && leads) {
                d_dt[at * heads + head] = of_time + share * of_own + (1.f - share) * of_last;
                d_mix[at * heads + head] = time * (of_own - of_last);
            }
            bool more = round + 1 < rounds;
            if (more || head + 1 < heads) fetch(more ? head : head + 1, more ? round + 1 : 0);
            if (there) {
#pragma unroll
                for (int e = 0; e < 16; e++) of_bias[e] += of_head[e];
            }
            if (of_group) {
#pragma unroll
                for (int e = 0; e < 16; e += 4) {
                    float4 some = here[e / 4 * WIDE];
                    of_head[e] += some.x, of_head[e + 1] += some.y, of_head[e + 2] += some.z, of_head[e + 3] += some.w;
                }
            }
            if (of_group + 1 < per_group) {
#pragma unroll
                for (int e = 0; e < 16; e += 4)
                    here[e / 4 * WIDE] = make_float4(of_head[e], of_head[e + 1], of_head[e + 2], of_head[e + 3]);
            } else if (there) {
                float2 all[8];
#pragma unroll
                for (int e = 0; e < 8; e++) all[e] = make_float2(of_head[2 * e], of_head[2 * e + 1]);
                store_pairs(db + (at * groups + group) * N, all), store_pairs(dc + (at * groups + group) * N, all + 4);
            }
            if (head + 1 < heads) {
                here[4 * WIDE] = of_theta;
            } else if (there) {
                float last[4] = {of_theta.x, of_theta.y, of_theta.z, of_theta.w};
#pragma unroll
                for (int k = 0; k < 4; k++)
                    if (k < turns) d_theta[at * pairs + k] = last[k];
            }
        }
        if (++of_group == per_group) group++, of_group = 0;
        if (!biases) continue;
        constexpr int LEFT = 16 * PACKS / 32 ? 16 * PACKS / 32 : 1;
        int from = sums_in_turn<PACKS>(of_bias);  // over the rows of a warp
        __syncthreads();  // the head before has been read
#pragma unroll
        for (int e = 0; e < LEFT; e++)
            sums[warp][(from + e) / 8 * N + column + (from + e) % 8] = of_bias[e];
        __syncthreads();
        if (threadIdx.x < 2 * N) {
            float total = 0.f;
#pragma unroll
            for (int w = 0; w < 2 * WARPS; w++) total += sums[w][threadIdx.x];
            int of_this = (threadIdx.x / N * heads + head) * N + threadIdx.x % N;
            biases[blockIdx.x * (int64)(2 * heads * N) + of_this] = total;
        }
    }
}

// ---------------------------------------------------------------------- a part of ssd_gradients

// What the gradients of turned B and C say about the angles, where they are not rounded yet.
//
// The gradient of step t's angle has a part of every pair of steps with t between them. As a sum over all
// later steps of what turning theirs changes, the parts of all pairs behind t cancel, and what was
// rounded between does not. Here they cancel to the bit or nearly so: within a chunk, whose sums have
// the same factors for both of a pair; what crosses the end of a chunk is counted there.
template <int N> struct Angles {
    static constexpr int PAIRS = N / 2, PARTS = Parts<N>::PARTS, STEPS = Parts<N>::STEPS;
    static constexpr int ROW = PAIRS + 4;  // of points: eight rows lie in different banks
    float crossing[WARPS][PAIRS];  // by warp of a half: the state that enters, at the end
    float written[WARPS][PAIRS];   // by 16 rows: what they wrote, there
    float sums[PARTS][PAIRS];

    // d_angle (T, pairs) of a head: rows of stride `stride`. By all threads, behind a barrier; `points` is
    // what turning each step alone changes, `decay` that of the whole chunk.
    inline void finish(const float (*points)[ROW], float decay, float *d_angle, int64 stride, int pairs,
                       int rows) {
        Parts<N> of;
        int pair = of.pair, part = of.part, first = of.first;
        bool turns = pair < pairs;
        float sum = 0.f, change = 0.f, alone[STEPS];
        if (turns) {
#pragma unroll
            for (int k = 0; k < STEPS; k++) sum += alone[k] = points[first + k][pair];
            sums[part][pair] = sum;
        }
        __syncthreads();
        if (!turns) return;
#pragma unroll
        for (int w = 0; w < WARPS; w++) change += crossing[w][pair];
        sum = decay * change;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum -= written[w][pair];
#pragma unroll
        for (int later = PARTS - 1; later > 0; later--)
            if (later > part) sum += sums[later][pair];
        float *to = d_angle + (first + STEPS - 1) * stride + pair;
#pragma unroll
        for (int k = STEPS - 1; k >= 0; k--) {
            sum += alone[k];
            if (first + k < rows) *to = sum;
            to -= stride;
        }
    }
};

// How a product changes with a turn: of z, whose gradient is d.
inline float along_turn(float dx, float dy, float2 z) { return dy * z.x - dx * z.y; }
