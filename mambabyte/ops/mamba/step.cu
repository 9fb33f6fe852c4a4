// One step of a Mamba layer's convolution and SSM states, for streaming.
//
// The layer in two launches that fill the card even for one batch row, since one byte is all latency:
//   step_input: convolution + SiLU for SLICE channels, and what they give to x_proj's sums.
//   step_state: adds those parts in a fixed order; dt_proj, softplus, scan step, skip and gate.
// scan_step is the scan step alone, for many rows, where the projections are matrix products.
//
// T: type of the activations, W: type of the weights. States and their arithmetic are float32.
// A state is read and written by the same thread, so the old and the new may be one memory.

constexpr int SLICE = 64;  // channels of a block of step_input
constexpr int LANES = 4;   // threads that share a channel in the scan step
constexpr int ROW = 8;     // threads that share a row of x_proj, 8 channels each
constexpr unsigned ALL = 0xffffffffu;

inline float softplus(float x) { return x > 20.f ? x : log1pf(__expf(x)); }

// Sum over groups of COUNT neighbouring threads.
template <int COUNT> inline float sum_over(float x) {
#pragma unroll
    for (int step = 1; step < COUNT; step *= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}

// Eight neighbouring weights of a row; zero past its end.
template <class W>
inline void load_weights(float (&to)[8], const W *row, int d, int channels, bool aligned) {
    if (aligned && d + 8 <= channels) {
        Pack<W, 8> pack = *(const Pack<W, 8> *)(row + d);
#pragma unroll
        for (int i = 0; i < 8; i++) to[i] = load(pack.at[i]);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) to[i] = d + i < channels ? load(row[d + i]) : 0.f;
    }
}

// Grid (slices, B), 256 threads. u: (B, D); parts: (B, slices, rows) with rows = R + 2 N.
template <class T, class W>
__global__ void __launch_bounds__(256) step_input(
    const T *x, const T *tail, const W *conv_weight, const W *conv_bias, const W *x_proj,
    T *new_tail, float *u, float *parts, int64 x_stride, int channels, int rows, int taps,
    int aligned) {
    __shared__ float shared[SLICE];
    int first = blockIdx.x * SLICE;
    int64 b = blockIdx.y;
    int lane = threadIdx.x % ROW, row = threadIdx.x / ROW;
    int at = first + lane * 8;

    // The weights do not depend on the convolution: fetch the first two rows ahead of it.
    constexpr int STEP = 256 / ROW;
    float ahead[2][8];
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (row + i * STEP < rows)
            load_weights(ahead[i], x_proj + (int64)(row + i * STEP) * channels, at, channels,
                         aligned);

    if (threadIdx.x < SLICE) {
        int d = first + threadIdx.x;
        float out = 0.f;
        if (d < channels) {
            const T *before = tail + b * (taps - 1) * channels + d;
            T *after = new_tail + b * (taps - 1) * channels + d;
            T now = x[b * x_stride + d];
            float s = conv_bias ? load(conv_bias[d]) : 0.f;
            for (int k = 0; k < taps - 1; k++) {
                T value = before[(int64)k * channels];
                s = fmaf(load(conv_weight[d * taps + k]), load(value), s);
                if (k > 0) after[(int64)(k - 1) * channels] = value;
            }
            after[(int64)(taps - 2) * channels] = now;
            s = fmaf(load(conv_weight[d * taps + taps - 1]), load(now), s);
            out = s * sigmoid(s);
            u[b * channels + d] = out;
        }
        shared[threadIdx.x] = out;
    }
    __syncthreads();

    float mine[8];
#pragma unroll
    for (int i = 0; i < 8; i++) mine[i] = shared[lane * 8 + i];
    parts += (b * gridDim.x + blockIdx.x) * rows;
    for (int base = 0; base < rows; base += 2 * STEP) {  // the same for all: shuffles inside
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int r = base + i * STEP + row;
            float sum = 0.f;
            if (r < rows) {
#pragma unroll
                for (int j = 0; j < 8; j++) sum = fmaf(ahead[i][j], mine[j], sum);
            }
            sum = sum_over<ROW>(sum);
            if (r < rows && lane == 0) parts[r] = sum;
            r += 2 * STEP;
            if (r < rows)
                load_weights(ahead[i], x_proj + (int64)r * channels, at, channels, aligned);
        }
    }
}

// Grid (D / 32, B), 128 threads: LANES a channel, PER states each. Shared: rows floats.
template <class T, class W, int PER>
__global__ void __launch_bounds__(128) step_state(
    const float *u, const float *parts, const T *z, const float *state, const W *dt_proj,
    const float *dt_bias, const float *A, const float *D, T *y, float *new_state, int64 z_stride,
    int channels, int states, int rank, int slices) {
    extern __shared__ float low[];
    int64 b = blockIdx.y;
    int part = threadIdx.x % LANES, d = blockIdx.x * (128 / LANES) + threadIdx.x / LANES;
    bool there = d < channels;
    if (!there) d = channels - 1;

    // All that does not depend on the parts first: its latency hides theirs.
    int64 at = (b * channels + d) * states + part * PER;
    float h[PER], rate[PER];
#pragma unroll
    for (int i = 0; i < PER; i++) {
        bool valid = part * PER + i < states;
        h[i] = valid ? state[at + i] : 0.f;
        rate[i] = valid ? A[(int64)d * states + part * PER + i] : 0.f;
    }
    float now = u[b * channels + d], gate = load(z[b * z_stride + d]);
    float bias = dt_bias[d], skip = D[d];

    int rows = rank + 2 * states;
    for (int r = threadIdx.x; r < rows; r += 128) {
        const float *from = parts + b * slices * (int64)rows + r;
        float sum = 0.f;
#pragma unroll 8
        for (int s = 0; s < slices; s++) sum += from[(int64)s * rows];
        low[r] = sum;
    }
    __syncthreads();

    float dt = 0.f;
#pragma unroll 4
    for (int r = part; r < rank; r += LANES)
        dt = fmaf(load(dt_proj[(int64)d * rank + r]), low[r], dt);
    dt = softplus(sum_over<LANES>(dt) + bias);
    float out = 0.f;
    const float *B = low + rank + part * PER, *C = B + states;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        if (part * PER + i < states) {
            h[i] = fmaf(__expf(dt * rate[i]), h[i], dt * now * B[i]);
            if (there) new_state[at + i] = h[i];
            out = fmaf(C[i], h[i], out);
        }
    }
    out = sum_over<LANES>(out);
    if (there && part == 0) {
        out = fmaf(skip, now, out) * gate * sigmoid(gate);
        store(y[b * channels + d], out);
    }
}

// LANES threads a (batch, channel).
template <class T>
__global__ void scan_step(const T *u, const T *delta, const float *A, const T *B, const T *C,
                          const float *D, const T *z, const float *dt_bias, const float *state,
                          T *y, float *new_state, int64 u_stride, int64 delta_stride,
                          int64 b_stride, int64 c_stride, int64 z_stride, int64 rows, int channels,
                          int states, int use_softplus) {
    int64 row = (blockIdx.x * (int64)blockDim.x + threadIdx.x) / LANES;
    int part = threadIdx.x % LANES;
    bool there = row < rows;
    if (!there) row = rows - 1;
    int64 b = row / channels;
    int d = (int)(row % channels);
    float now = load(u[b * u_stride + d]);
    float dt = load(delta[b * delta_stride + d]) + (dt_bias ? dt_bias[d] : 0.f);
    if (use_softplus) dt = softplus(dt);
    float out = 0.f;
    if (there) {
        for (int n = part; n < states; n += LANES) {
            float h = __expf(dt * A[(int64)d * states + n]) * state[row * states + n];
            h = fmaf(dt * now, load(B[b * b_stride + n]), h);
            new_state[row * states + n] = h;
            out = fmaf(load(C[b * c_stride + n]), h, out);
        }
    }
    out = sum_over<LANES>(out);
    if (there && part == 0) {
        if (D) out = fmaf(D[d], now, out);
        if (z) {
            float gate = load(z[b * z_stride + d]);
            out *= gate * sigmoid(gate);
        }
        store(y[b * channels + d], out);
    }
}
