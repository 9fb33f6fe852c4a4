// What Mamba-3's scan reads, from what a layer's projection gives, forward and backward. Follows types.cu.
//
// A step's part of the projection, `tail` (2 G N + 3 H + S numbers), is B and C of each group, and dt, decay,
// mix and angle:
//
//   b_i = w_i B_i / rms(B)    dt = softplus(dt' + bias)    log_decay = -max(softplus(decay'), LEAST) dt
//   c likewise                mix = sigmoid(mix')          theta = pi tanh(angle')
//
// tail has any strides but 1 in the last axis, in bf16 or float32; b and c its dtype, all else float32, and
// both in a row. A warp has a step.

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr float PI = 3.14159265f;

inline float softplus(float x) { return x > 20.f ? x : log1pf(__expf(x)); }

// tanhf has 11 bits under --use_fast_math.
inline float tanh_of(float x) { return 2.f * sigmoid(2.f * x) - 1.f; }

inline float at_least(float x, float least) { return x < least ? least : x; }  // a nan stays one

inline float sum_of_warp(float x) {
#pragma unroll
    for (int far = 16; far; far /= 2) x += __shfl_xor_sync(~0u, x, far);
    return x;
}

template <class D>
__global__ void __launch_bounds__(THREADS) inputs_forward(
    const D *tail, const float *bias, const float *b_weight, const float *c_weight, D *b, D *c, float *dt,
    float *log_decay, float *theta, float *mix, int64 rows, int64 batch_stride, int64 time_stride,
    int length, int groups, int n, int heads, int pairs, float eps, float least) {
    int64 row = blockIdx.x * (int64)WARPS + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (row >= rows) return;
    tail += row / length * batch_stride + row % length * time_stride;
    for (int part = 0; part < 2 * groups; part++, tail += n) {
        float squares = 0.f;
        for (int i = lane; i < n; i += 32) squares += load(tail[i]) * load(tail[i]);
        float scale = rsqrtf(sum_of_warp(squares) / n + eps);
        D *to = (part < groups ? b : c) + (row * groups + part % groups) * n;
        const float *weight = part < groups ? b_weight : c_weight;
        for (int i = lane; i < n; i += 32) store(to[i], weight[i] * scale * load(tail[i]));
    }
    for (int h = lane; h < heads; h += 32) {
        float step = softplus(load(tail[h]) + bias[h]);
        dt[row * heads + h] = step;
        log_decay[row * heads + h] = -at_least(softplus(load(tail[heads + h])), least) * step;
        mix[row * heads + h] = sigmoid(load(tail[2 * heads + h]));
    }
    tail += 3 * heads;
    for (int s = lane; s < pairs; s += 32) theta[row * pairs + s] = PI * tanh_of(load(tail[s]));
}

// d_tail (B, L, 2 G N + 3 H + S) in a row; sums (blocks, 2 N + H): of the weights of B, of C, and of the
// bias. A gradient that is null is one of zeros. A block has ROWS steps.
constexpr int ROWS = 64;
template <class D>
__global__ void __launch_bounds__(THREADS) inputs_backward(
    const D *db, const D *dc, const float *d_dt, const float *d_log_decay, const float *d_theta,
    const float *d_mix, const D *tail, const float *bias, const float *b_weight, const float *c_weight,
    D *d_tail, float *sums, int64 rows, int64 batch_stride, int64 time_stride, int length, int groups,
    int n, int heads, int pairs, float eps, float least) {
    extern __shared__ __align__(128) char shared[];
    int width = 2 * n + heads, lane = threadIdx.x % 32;
    float *found = (float *)shared + threadIdx.x / 32 * width;  // this warp's, each number one lane's
    for (int i = lane; i < width; i += 32) found[i] = 0.f;
    for (int k = threadIdx.x / 32; k < ROWS; k += WARPS) {
        int64 row = blockIdx.x * (int64)ROWS + k;
        if (row >= rows) break;
        const D *from = tail + row / length * batch_stride + row % length * time_stride;
        D *to = d_tail + row * (2 * groups * n + 3 * heads + pairs);
        for (int part = 0; part < 2 * groups; part++, from += n, to += n) {
            bool first = part < groups;
            const D *given = first ? db : dc;
            if (given) given += (row * groups + part % groups) * n;
            const float *weight = first ? b_weight : c_weight;
            float squares = 0.f, along = 0.f;
            for (int i = lane; i < n; i += 32) {
                float x = load(from[i]);
                squares += x * x;
                if (given) along += weight[i] * load(given[i]) * x;
            }
            float scale = rsqrtf(sum_of_warp(squares) / n + eps);
            float level = sum_of_warp(along) * scale * scale / n;
            for (int i = lane; i < n; i += 32) {
                float x = load(from[i]), dy = given ? load(given[i]) : 0.f;
                store(to[i], scale * (weight[i] * dy - level * x));
                found[(first ? 0 : n) + i] += dy * scale * x;
            }
        }
        for (int h = lane; h < heads; h += 32) {
            int64 at = row * heads + h;
            float z = load(from[h]) + bias[h], rate = load(from[heads + h]);
            float share = sigmoid(load(from[2 * heads + h]));
            float decay = softplus(rate), dlog = d_log_decay ? d_log_decay[at] : 0.f;
            float dz = ((d_dt ? d_dt[at] : 0.f) - at_least(decay, least) * dlog) * sigmoid(z);
            store(to[h], dz);
            store(to[heads + h], decay < least ? 0.f : -softplus(z) * dlog * sigmoid(rate));
            store(to[2 * heads + h], d_mix ? d_mix[at] * share * (1.f - share) : 0.f);
            found[2 * n + h] += dz;
        }
        from += 3 * heads, to += 3 * heads;
        for (int s = lane; s < pairs; s += 32) {
            float bent = tanh_of(load(from[s]));
            store(to[s], d_theta ? d_theta[row * pairs + s] * PI * (1.f - bent * bent) : 0.f);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += THREADS) {
        float sum = 0.f;
        for (int warp = 0; warp < WARPS; warp++) sum += ((float *)shared)[warp * width + i];
        sums[blockIdx.x * (int64)width + i] = sum;
    }
}
