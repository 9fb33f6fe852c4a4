// Mamba-3's angles around the kernels of ssd.cu: B and C turned by all steps up to theirs, and what the
// gradients of turned ones say about those that were given and about each angle. Follows chunks.cu.
//
// Of pairs of states, neighbours as a complex number, the first `pairs` turn: step t of a head by theta_t
// dt_t, and p_t is the sum up to it. An angle is an unsigned integer, a turn 2^32: sums wrap around
// where a turn is full, cost no digit, and are the same in any order.
//
//   b~_t = exp(i p_t) (b_t + bias)        own_t = mix_t dt_t
//   c~_t = exp(i p_t) (c_t + bias)        step_t = own_t + (1 - mix_{t+1}) dt_{t+1}, of the last one own_t
//
// is what SSD reads: step_t is all that step t writes, own_t how much of it step t reads itself, and
// what the step behind the last one adds is for who goes on.

constexpr int WIDE = 2 * THREADS;

inline u32 angle_of(float dt, float theta) {
    double turns = (double)dt * theta * 0.15915494309189535;  // the first product is exact
    return (u32)(int64)rint((turns - rint(turns)) * 4294967296.);
}

// `angle` from half a turn back to half a turn ahead, for which the sine and cosine are right to 4e-7.
inline float2 turned(float2 z, u32 angle) {
    float x = (float)(int)angle * 1.4629180792671596e-9f, sine = __sinf(x), cosine = __cosf(x);
    return make_float2(cosine * z.x - sine * z.y, sine * z.x + cosine * z.y);
}

inline float2 both(u32 packed) { return make_float2(low_of(packed), high_of(packed)); }

// ------------------------------------------------------------------------------- before the scan

// angles (B, K + 1, H, S): of each chunk the sum of its steps. A thread has a pair of a head.
__global__ void __launch_bounds__(THREADS) angle_sums(
    const float *dt, const float *theta, u32 *angles, int length, int heads, int pairs) {
    int width = heads * pairs, parts = (width + THREADS - 1) / THREADS;
    Place here(length, parts);
    int unit = here.head * THREADS + threadIdx.x, chunks = (length + T - 1) / T;
    if (unit >= width) return;
    dt += here.first * heads + unit / pairs, theta += here.first * pairs + unit % pairs;
    u32 sum = 0;
#pragma unroll 8
    for (int t = 0; t < here.rows; t++) sum += angle_of(dt[(int64)t * heads], theta[(int64)t * pairs]);
    angles[(here.batch * (chunks + 1) + here.chunk) * width + unit] = sum;
}

// The same angles, now of all chunks before, of all of them last. A warp has a pair of a head.
__global__ void __launch_bounds__(THREADS) angle_pass(u32 *angles, int64 units, int chunks, int width) {
    int64 id = blockIdx.x * (int64)WARPS + threadIdx.x / 32;
    if (id >= units) return;
    int lane = threadIdx.x % 32;
    u32 *of_unit = angles + id / width * (chunks + 1) * width + id % width, before = 0;
    for (int first = 0; first <= chunks; first += 32) {
        int k = first + lane;
        u32 own = k < chunks ? of_unit[(int64)k * width] : 0, sum = own;
#pragma unroll
        for (int far = 1; far < 32; far *= 2) {
            u32 other = __shfl_sync(ALL, sum, lane - far);
            if (lane >= far) sum += other;
        }
        if (k <= chunks) of_unit[(int64)k * width] = before + sum - own;
        before += __shfl_sync(ALL, sum, 31);
    }
}

// turned_b, turned_c (B, L, H, N), step and own (B, L, H) and, unless null, each_angle (B, L, H, S). A
// block has a chunk of a head, a thread one pair of some steps.
template <int N>
__global__ void __launch_bounds__(WIDE) angle_turn(
    const bfloat16 *b, const bfloat16 *c, const float *b_bias, const float *c_bias, const float *dt,
    const float *theta, const float *mix, const u32 *angles, bfloat16 *turned_b, bfloat16 *turned_c,
    float *step, float *own, u32 *each_angle, int64 b_batch, int64 b_time, int64 b_group,
    int64 c_batch, int64 c_time, int64 c_group, int length, int heads, int per_group, int pairs) {
    constexpr int PAIRS = N / 2, PARTS = WIDE / PAIRS, STEPS = T / PARTS;
    __shared__ u32 sums[PARTS][PAIRS];
    Place here(length, heads);
    int pair = threadIdx.x % PAIRS, part = threadIdx.x / PAIRS, chunks = (length + T - 1) / T;
    bool turns = pair < pairs;
    int64 of_head = here.first * heads + here.head;
    dt += of_head, mix += of_head, step += of_head, own += of_head;
    theta += here.first * pairs + pair;
    u32 angle[STEPS], sum = 0;
    float lost[STEPS];  // nan where an angle is: an integer is none
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        int t = part * STEPS + k;
        bool there = turns && t < here.rows;
        float of_time = there ? dt[(int64)t * heads] : 0.f, rate = there ? theta[(int64)t * pairs] : 0.f;
        lost[k] = 0.f * of_time * rate;
        angle[k] = sum += angle_of(of_time, rate);
    }
    sums[part][pair] = sum;
    __syncthreads();
    u32 before = 0;
    if (turns) before = angles[((here.batch * (chunks + 1) + here.chunk) * heads + here.head) * pairs + pair];
    for (int earlier = 0; earlier < part; earlier++) before += sums[earlier][pair];
    const bfloat16 *from_b = b + here.at({b_batch, b_time, b_group}, here.head / per_group) + 2 * pair;
    const bfloat16 *from_c = c + here.at({c_batch, c_time, c_group}, here.head / per_group) + 2 * pair;
    int of_bias = here.head * N + 2 * pair;
    float2 plus_b = b_bias ? *(const float2 *)(b_bias + of_bias) : make_float2(0.f, 0.f);
    float2 plus_c = c_bias ? *(const float2 *)(c_bias + of_bias) : make_float2(0.f, 0.f);
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        int t = part * STEPS + k;
        if (t >= here.rows) break;
        int64 row = of_head + (int64)t * heads;
        u32 p = before + angle[k];
        float2 one = both(*(const u32 *)(from_b + t * b_time));
        float2 other = both(*(const u32 *)(from_c + t * c_time));
        one = turned(make_float2(one.x + plus_b.x + lost[k], one.y + plus_b.y), p);
        other = turned(make_float2(other.x + plus_c.x + lost[k], other.y + plus_c.y), p);
        *(u32 *)(turned_b + row * N + 2 * pair) = pack(one.x, one.y);
        *(u32 *)(turned_c + row * N + 2 * pair) = pack(other.x, other.y);
        if (each_angle && turns) each_angle[row * pairs + pair] = p;
    }
    int t = threadIdx.x;
    if (t >= here.rows) return;
    int64 at = (int64)t * heads;
    float alone = mix[at] * dt[at];
    bool last = here.chunk * T + t + 1 == length;
    own[at] = alone;
    step[at] = alone + (last ? 0.f : (1.f - mix[at + heads]) * dt[at + heads]);
}

// ------------------------------------------------------------------------------- after the scan

// From gradients of what angle_turn made to those of what it was given: turned back, added up over the
// heads of a group, and of the biases over ROWS steps: biases (blocks, 2, H, N). d_angle (B, L, H, S) is
// each step's own. A block has ROWS of all (B L) steps; a thread one pair of some of them, and in the
// end some of the numbers that a step has for a head or a pair.
constexpr int ROWS = 32;
template <int N>
__global__ void __launch_bounds__(WIDE) angle_back(
    const bfloat16 *turned_db, const bfloat16 *turned_dc, const float *d_angle, const u32 *each_angle,
    const float *dt, const float *theta, const float *mix, const float *dstep, const float *d_own,
    bfloat16 *db, bfloat16 *dc, float *biases, float *d_dt, float *d_theta, float *d_mix, int64 rows,
    int length, int heads, int per_group, int pairs) {
    constexpr int PAIRS = N / 2, PARTS = WIDE / PAIRS, STEPS = (ROWS + PARTS - 1) / PARTS;
    __shared__ float2 sums[2][2][PARTS][PAIRS];
    int pair = threadIdx.x % PAIRS, part = threadIdx.x / PAIRS;
    int64 first = blockIdx.x * (int64)ROWS;
    int here = (int)min((int64)ROWS, rows - first);
    for (int group = 0; group < heads / per_group; group++) {
        float2 of_b[STEPS] = {}, of_c[STEPS] = {};
        for (int head = group * per_group; head < (group + 1) * per_group; head++) {
            float2 plus_b = {0.f, 0.f}, plus_c = {0.f, 0.f};
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                int t = part + k * PARTS;
                if (t >= here) continue;
                int64 row = (first + t) * heads + head;
                u32 p = pair < pairs ? 0u - each_angle[row * pairs + pair] : 0u;
                float2 one = turned(both(*(const u32 *)(turned_db + row * N + 2 * pair)), p);
                float2 other = turned(both(*(const u32 *)(turned_dc + row * N + 2 * pair)), p);
                of_b[k].x += one.x, of_b[k].y += one.y, of_c[k].x += other.x, of_c[k].y += other.y;
                plus_b.x += one.x, plus_b.y += one.y, plus_c.x += other.x, plus_c.y += other.y;
            }
            if (!biases) continue;
            float2(&sum)[2][PARTS][PAIRS] = sums[head % 2];
            sum[0][part][pair] = plus_b, sum[1][part][pair] = plus_c;
            __syncthreads();  // one is enough: the next head writes elsewhere
            if (part < 2) {
                float2 total = {0.f, 0.f};
                for (int k = 0; k < PARTS; k++)
                    total.x += sum[part][k][pair].x, total.y += sum[part][k][pair].y;
                *(float2 *)(biases + ((blockIdx.x * (int64)2 + part) * heads + head) * N + 2 * pair) = total;
            }
        }
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            int t = part + k * PARTS;
            if (t >= here) continue;
            int64 to = ((first + t) * (heads / per_group) + group) * N + 2 * pair;
            *(u32 *)(db + to) = pack(of_b[k].x, of_b[k].y);
            *(u32 *)(dc + to) = pack(of_c[k].x, of_c[k].y);
        }
    }
    for (int id = threadIdx.x; id < here * pairs; id += WIDE) {
        int64 row = first + id / pairs;
        int s = id % pairs;
        float sum = 0.f;
#pragma unroll 4
        for (int h = 0; h < heads; h++) sum += d_angle[(row * heads + h) * pairs + s] * dt[row * heads + h];
        d_theta[row * pairs + s] = sum;
    }
    for (int id = threadIdx.x; id < here * heads; id += WIDE) {
        int64 row = first + id / heads, at = first * heads + id;
        float sum = 0.f;
#pragma unroll 4
        for (int s = 0; s < pairs; s++) sum += d_angle[at * pairs + s] * theta[row * pairs + s];
        float of_own = dstep[at] + d_own[at], of_last = row % length ? dstep[at - heads] : 0.f;
        d_dt[at] = sum + mix[at] * of_own + (1.f - mix[at]) * of_last;
        d_mix[at] = dt[at] * (of_own - of_last);
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
    static constexpr int PAIRS = N / 2, PARTS = WIDE / PAIRS, STEPS = T / PARTS;
    float points[T][PAIRS];            // what turning step t alone changes
    float crossing[2 * WARPS][PAIRS];  // by warp: the state that enters, at the end
    float written[WARPS][PAIRS];       // by 16 rows: what they wrote, there
    float sums[PARTS][PAIRS];

    // d_angle (T, pairs) of a head: rows of stride `stride`. By all threads, behind a barrier; `decay` is
    // that of the whole chunk.
    inline void finish(float decay, float *d_angle, int64 stride, int pairs, int rows) {
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
