// Depthwise causal convolution with SiLU in layout (B, L, D), forward and backward.
//
//   s_t = bias + sum_k w_k x_{t-K+1+k},   y_t = silu(s_t)   (or y_t = s_t)
//
// A thread owns V neighbouring channels and walks `steps` positions in time with the last K - 1
// inputs in registers, so each input is read once and a warp reads whole lines. What lies before
// the first position comes from `tail` (zero where it is null). Loads are issued U steps ahead.
// `ages` (B, L), if any, says how many steps of its document come before each: a tap that reaches further
// back reads zero, and so does the tail to carry on with.
//
// The sums over time of the weight gradients leave as one partial a segment, added up afterwards
// in a fixed order: no atomics, so results repeat bit for bit.

constexpr int K = TAPS;
constexpr int U = AHEAD;

// Zero where there is nothing. Not yet converted: what waits in registers stays small.
template <class T, int V> inline Pack<T, V> fetch(const T *from, bool there) {
    Pack<T, V> pack = {};
    if (there) pack = *(const Pack<T, V> *)from;
    return pack;
}

// x at a position that may lie before the sequence.
template <class T, int V>
inline Pack<T, V> fetch_input(const T *x, int64 stride, const T *tail, int channels, int t,
                              int length) {
    if (t >= 0) return fetch<T, V>(x + t * stride, t < length);
    return fetch<T, V>(tail + (int64)(t + K - 1) * channels, tail != nullptr);
}

// Inputs of other documents are none: those more than `age` steps back.
template <int V> inline void forget(float (&window)[K][V], int age) {
#pragma unroll
    for (int k = 0; k < K - 1; k++) {
#pragma unroll
        for (int v = 0; v < V; v++)
            if (K - 1 - k > age) window[k][v] = 0.f;
    }
}

// The ages of U steps from t on that come before `stop`; K, of which nothing is asked, for the others and
// where all are that old. Then the last one alone is read: ages ascend by 1 within a document.
inline void read_ages(int (&age)[U], const unsigned char *ages, int t, int stop) {
    int last = min(t + U, stop) - 1;
    bool young = ages && last >= t && ages[last] < K - 1 + last - t;
#pragma unroll
    for (int j = 0; j < U; j++) age[j] = young && t + j <= last ? ages[t + j] : K;
}

template <class T, int V> inline void store_pack(T *to, const float (&from)[V]) {
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; v++) store(pack.at[v], from[v]);
    *(Pack<T, V> *)to = pack;
}

template <class T, int V>
__global__ void __launch_bounds__(128, 6) conv_forward(
    const T *x, const float *weight, const float *bias, const T *tail, const unsigned char *ages,
    T *y, T *last, int64 batch_stride, int64 stride, int64 threads, int length, int channels, int steps, int silu) {
    int64 id = blockIdx.x * (int64)blockDim.x + threadIdx.x;
    if (id >= threads) return;
    int packs = channels / V, segments = (length + steps - 1) / steps;
    int d = (int)(id % packs) * V;
    int64 rest = id / packs;
    int start = (int)(rest % segments) * steps;
    int64 b = rest / segments;
    int end = min(start + steps, length);

    x += b * batch_stride + d;
    y += b * length * (int64)channels + d;
    last += b * (K - 1) * channels + d;
    if (tail) tail += b * (K - 1) * channels + d;
    if (ages) ages += b * length;

    float w[K][V], offset[V], window[K][V];
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
        for (int k = 0; k < K; k++) w[k][v] = weight[(int64)(d + v) * K + k];
        offset[v] = bias ? bias[d + v] : 0.f;
    }
#pragma unroll
    for (int k = 0; k < K - 1; k++) {
        Pack<T, V> pack =
            fetch_input<T, V>(x, stride, tail, channels, start - K + 1 + k, length);
#pragma unroll
        for (int v = 0; v < V; v++) window[k + 1][v] = load(pack.at[v]);
    }

    auto step = [&](const Pack<T, V> &input, int age, int t) {
        float out[V];
#pragma unroll
        for (int v = 0; v < V; v++) {
#pragma unroll
            for (int k = 0; k < K - 1; k++) window[k][v] = window[k + 1][v];
            window[K - 1][v] = load(input.at[v]);
        }
        if (age < K - 1) forget<V>(window, age);
#pragma unroll
        for (int v = 0; v < V; v++) {
            float s = offset[v];
#pragma unroll
            for (int k = 0; k < K; k++) s = fmaf(w[k][v], window[k][v], s);
            out[v] = silu ? s * sigmoid(s) : s;
        }
        store_pack<T, V>(y + (int64)t * channels, out);
    };
    int t0 = start;
    for (; t0 + U <= end; t0 += U) {
        Pack<T, V> ahead[U];
        int age[U];
#pragma unroll
        for (int j = 0; j < U; j++) ahead[j] = fetch<T, V>(x + (t0 + j) * stride, true);
        read_ages(age, ages, t0, t0 + U);
#pragma unroll
        for (int j = 0; j < U; j++) step(ahead[j], age[j], t0 + j);
    }
    for (; t0 < end; t0++) step(fetch<T, V>(x + t0 * stride, true), ages ? ages[t0] : K, t0);

    // The K - 1 inputs to carry on with; in a sequence shorter than that, some come from `tail`.
    for (int k = 0; k < K - 1; k++) {
        int t = length - (K - 1) + k;
        if (t >= end || (t < start && !(t < 0 && start == 0))) continue;
        Pack<T, V> pack = {};
        if (!ages || K - 2 - k <= ages[length - 1])
            pack = fetch_input<T, V>(x, stride, tail, channels, t, length);
        *(Pack<T, V> *)(last + (int64)k * channels) = pack;
    }
}

// What a thread of the backward keeps from step to step, for V channels.
template <class T, int V> struct Walk {
    float w[K][V], offset[V];
    float window[K][V];  // the last K inputs
    float ds[K][V];      // ds[k] is the gradient of s at t - k
    float dw[K][V], db[V];
    unsigned starts;  // bit k: a document starts at t - k

    // Take in the input and the gradient at t, and give dx at t - K + 1, which is complete now.
    // A step beyond `here` belongs to the next segment and does not count for dw and db.
    inline void step(const Pack<T, V> &input, const Pack<T, V> &gradient, int age, bool there,
                     bool here, int silu, float (&dx)[V]) {
#pragma unroll
        for (int v = 0; v < V; v++) {
#pragma unroll
            for (int k = 0; k < K - 1; k++) window[k][v] = window[k + 1][v];
            window[K - 1][v] = load(input.at[v]);
        }
        if (age < K - 1) forget<V>(window, age);
        starts = starts << 1 | (age == 0);
#pragma unroll
        for (int v = 0; v < V; v++) {
            float g = load(gradient.at[v]);
            if (silu) {
                float s = offset[v];
#pragma unroll
                for (int k = 0; k < K; k++) s = fmaf(w[k][v], window[k][v], s);
                float gate = sigmoid(s);
                g *= gate * fmaf(s, 1.f - gate, 1.f);
            }
            if (!there) g = 0.f;  // else a NaN or inf in s would make 0 * s a NaN
#pragma unroll
            for (int k = K - 1; k > 0; k--) ds[k][v] = ds[k - 1][v];
            ds[0][v] = g;
            if (here) {
#pragma unroll
                for (int k = 0; k < K; k++) dw[k][v] = fmaf(g, window[k][v], dw[k][v]);
                db[v] += g;
            }
            dx[v] = 0.f;
#pragma unroll
            for (int k = 0; k < K; k++) dx[v] = fmaf(w[k][v], ds[k][v], dx[v]);
        }
        // A document that starts after t - K + 1, at t - k, did not read the input there.
        if ((starts & ((1u << (K - 1)) - 1)) == 0) return;
        int first = 0;
#pragma unroll
        for (int k = 0; k < K - 1; k++)
            if (starts >> k & 1) first = k + 1;
#pragma unroll
        for (int v = 0; v < V; v++) {
            dx[v] = 0.f;
#pragma unroll
            for (int k = 0; k < K; k++)
                if (k >= first) dx[v] = fmaf(w[k][v], ds[k][v], dx[v]);
        }
    }
};

// partial: (B * segments, D K + D), the gradients of the weights (D, K) and of the bias.
template <class T, int V>
__global__ void __launch_bounds__(128, BLOCKS) conv_backward(
    const T *dy, const T *dlast, const T *x, const float *weight, const float *bias, const T *tail,
    const unsigned char *ages, T *dx, T *dtail, float *partial, int64 dy_batch_stride, int64 dy_stride, int64 batch_stride,
    int64 stride, int64 dx_batch_stride, int64 dx_stride, int64 threads, int length, int channels,
    int steps, int silu) {
    int64 id = blockIdx.x * (int64)blockDim.x + threadIdx.x;
    if (id >= threads) return;
    int packs = channels / V, segments = (length + steps - 1) / steps;
    int d = (int)(id % packs) * V;
    int64 rest = id / packs;
    int start = (int)(rest % segments) * steps;
    int64 b = rest / segments;
    int end = min(start + steps, length);

    x += b * batch_stride + d;
    dy += b * dy_batch_stride + d;
    dx += b * dx_batch_stride + d;
    int64 edge = b * (K - 1) * channels + d;
    if (tail) tail += edge;
    if (dlast) dlast += edge;
    if (dtail) dtail += edge;
    if (ages) ages += b * length;

    Walk<T, V> walk;
    walk.starts = 0;
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
        for (int k = 0; k < K; k++) {
            walk.w[k][v] = weight[(int64)(d + v) * K + k];
            walk.ds[k][v] = walk.dw[k][v] = 0.f;
        }
        walk.offset[v] = bias ? bias[d + v] : 0.f;
        walk.db[v] = 0.f;
    }
#pragma unroll
    for (int k = 0; k < K - 1; k++) {
        Pack<T, V> pack =
            fetch_input<T, V>(x, stride, tail, channels, start - K + 1 + k, length);
#pragma unroll
        for (int v = 0; v < V; v++) walk.window[k + 1][v] = load(pack.at[v]);
    }

    // dx at t - K + 1 is complete at t, so this walks K - 1 steps into the next segment, or past
    // the end (ds is zero there).
    int stop = end + K - 1;
    for (int t0 = start; t0 < stop; t0 += U) {
        // Most rounds are inside: all their steps count, and all of dx lies in this segment.
        bool inside = t0 >= start + K - 1 && t0 + U <= end && (!dlast || t0 + U <= length - K);
        Pack<T, V> ahead[U], gradient[U];
        int age[U];
        read_ages(age, ages, t0, min(stop, length));
        if (inside) {
#pragma unroll
            for (int j = 0; j < U; j++) {
                ahead[j] = fetch<T, V>(x + (t0 + j) * stride, true);
                gradient[j] = fetch<T, V>(dy + (t0 + j) * dy_stride, true);
            }
            T *to = dx + (t0 - K + 1) * dx_stride;
#pragma unroll
            for (int j = 0; j < U; j++) {
                float out[V];
                walk.step(ahead[j], gradient[j], age[j], true, true, silu, out);
                store_pack<T, V>(to + j * dx_stride, out);
            }
            continue;
        }
#pragma unroll
        for (int j = 0; j < U; j++) {
            bool there = t0 + j < min(stop, length);
            ahead[j] = fetch<T, V>(x + (t0 + j) * stride, there);
            gradient[j] = fetch<T, V>(dy + (t0 + j) * dy_stride, there);
        }
#pragma unroll
        for (int j = 0; j < U; j++) {
            int t = t0 + j;
            if (t >= stop) break;
            float out[V];
            walk.step(ahead[j], gradient[j], age[j], t < length, t < end, silu, out);
            int p = t - K + 1, k = p - (length - K + 1);
            if (dlast && k >= 0 && k < K - 1 && (!ages || K - 2 - k <= ages[length - 1])) {
                Pack<T, V> more = fetch<T, V>(dlast + (int64)k * channels, true);
#pragma unroll
                for (int v = 0; v < V; v++) out[v] += load(more.at[v]);
            }
            if (p >= start)
                store_pack<T, V>(dx + p * dx_stride, out);
            else if (p < 0 && start == 0 && dtail)
                store_pack<T, V>(dtail + (int64)(p + K - 1) * channels, out);
        }
    }

    partial += (b * segments + start / steps) * (K + 1) * channels;
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
        for (int k = 0; k < K; k++) partial[(d + v) * K + k] = walk.dw[k][v];
    }
    store_pack<float, V>(partial + K * channels + d, walk.db);
}

// Adds up the rows of partial (rows, columns), in a fixed order, into dweight and, from column
// `weights` on, dbias. A block has 32 columns, a warp of it every 32nd row: torch's sum takes four
// times as long.
__global__ void __launch_bounds__(1024) conv_sums(const float *partial, float *dweight,
                                                  float *dbias, int64 rows, int weights,
                                                  int columns) {
    __shared__ float room[32][33];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int c = blockIdx.x * 32 + lane;
    float sum = 0.f;
    if (c < columns)
        for (int64 r = warp; r < rows; r += 32) sum += partial[r * columns + c];
    room[warp][lane] = sum;
    __syncthreads();
    sum = room[lane][warp];
#pragma unroll
    for (int far = 16; far; far /= 2) sum += __shfl_xor_sync(~0u, sum, far);
    c = blockIdx.x * 32 + warp;
    if (lane == 0 && c < columns) (c < weights ? dweight : dbias - weights)[c] = sum;
}
