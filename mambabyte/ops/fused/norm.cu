// A residual stream and what is added to it, mixed and normalised in one pass, and its backward.
//
//   sum = x + a y,   out = s (sum + b z) + c e,   normed = weight xhat(out) + bias
//
// x, z and e are streams of type X; y, what a branch gives, and normed, what the next one reads, are
// of type Y. s, a, b and c are gains a channel, each 1 where it is null; y, z, e may be null. sum is
// written where it is asked for, as the z of a later layer. Its gradient, and the one that e has from
// later layers, come back into the same pass. Without any of the gains, z and e MIXED is false, which
// spares a third of the registers. A block takes a row after another, a thread V neighbouring channels
// of each, so the sums over rows that the gains' gradients need stay in registers. They leave as a
// partial sum a block, which column_sums adds up in a fixed order: no atomics, so results repeat bit
// for bit.

constexpr int PLAIN = 0, RMS = 1, LAYER = 2;  // what xhat is: nothing, out / rms, (out - mean) / std

template <int V> struct Row {
    float at[V];
};

template <int V> inline Row<V> filled(float value) {
    Row<V> row;
#pragma unroll
    for (int v = 0; v < V; v++) row.at[v] = value;
    return row;
}

// V channels of a row; `otherwise` where there is no tensor, or no channel.
template <int V, class T>
inline Row<V> fetch(const T *from, int64 at, bool there, float otherwise = 0.f) {
    if (!from || !there) return filled<V>(otherwise);
    Pack<T, V> pack = *(const Pack<T, V> *)(from + at);
    Row<V> row;
#pragma unroll
    for (int v = 0; v < V; v++) row.at[v] = load(pack.at[v]);
    return row;
}

template <int V, class T> inline void put(T *to, int64 at, bool there, const Row<V> &row) {
    if (!to || !there) return;
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; v++) store(pack.at[v], row.at[v]);
    *(Pack<T, V> *)(to + at) = pack;
}

template <int V> inline void add_product(Row<V> &to, const Row<V> &p, const Row<V> &q) {
#pragma unroll
    for (int v = 0; v < V; v++) to.at[v] = fmaf(p.at[v], q.at[v], to.at[v]);
}

template <int V> inline void add(Row<V> &to, const Row<V> &p) {
#pragma unroll
    for (int v = 0; v < V; v++) to.at[v] += p.at[v];
}

template <int V> inline Row<V> product(const Row<V> &p, const Row<V> &q) {
    Row<V> r;
#pragma unroll
    for (int v = 0; v < V; v++) r.at[v] = p.at[v] * q.at[v];
    return r;
}

// Sums over the block of COUNT values a thread. Two rooms by turns: nobody can still be reading what
// is written, since there is a barrier in between.
template <int COUNT> struct BlockSum {
    float (*room)[32][COUNT];
    int turn;

    inline void operator()(float (&value)[COUNT]) {
        turn ^= 1;
#pragma unroll
        for (int i = 0; i < COUNT; i++)
#pragma unroll
            for (int far = 16; far; far /= 2) value[i] += __shfl_xor_sync(~0u, value[i], far);
        int warps = blockDim.x / 32;
        if (warps == 1) return;
        if (threadIdx.x % 32 == 0)
#pragma unroll
            for (int i = 0; i < COUNT; i++) room[turn][threadIdx.x / 32][i] = value[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < COUNT; i++) value[i] = 0.f;
        for (int w = 0; w < warps; w++)
#pragma unroll
            for (int i = 0; i < COUNT; i++) value[i] += room[turn][w][i];
    }
};

// stats (rows, 2): mean, which is 0 of an RMS norm, and 1 / deviation.
template <class X, class Y, int V, bool MIXED>
__global__ void norm_forward(const X *x, const Y *y, const X *z, const X *e, const float *x_gain,
                             const float *y_gain, const float *z_gain, const float *e_gain,
                             const float *weight, const float *bias, X *out, X *sum_out, Y *normed,
                             float *stats, int blocks, int rows, int channels, int kind,
                             float eps) {
    constexpr int ROWS = 2;
    __shared__ float room[2][32][ROWS];
    BlockSum<ROWS> sum{room, 0};
    int c = threadIdx.x * V;
    bool here = c < channels;
    Row<V> s = fetch<V>(MIXED ? x_gain : nullptr, c, here, 1.f);
    Row<V> a = fetch<V>(MIXED ? y_gain : nullptr, c, here, 1.f);
    Row<V> b = fetch<V>(MIXED ? z_gain : nullptr, c, here, 1.f);
    Row<V> g = fetch<V>(MIXED ? e_gain : nullptr, c, here, 1.f);
    Row<V> w = fetch<V>(weight, c, here, 1.f), o = fetch<V>(bias, c, here);
    for (int first = blockIdx.x * ROWS; first < rows; first += blocks * ROWS) {
        Row<V> mixed[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            bool there = here && first + r < rows;
            int64 at = (int64)(first + r) * channels + c;
            mixed[r] = fetch<V>(x, at, there);
            Row<V> branch = fetch<V>(y, at, there), skip = fetch<V>(MIXED ? z : nullptr, at, there);
            Row<V> extra = fetch<V>(MIXED ? e : nullptr, at, there);
            add_product(mixed[r], a, branch);
            if (MIXED) {
                put<V>(sum_out, at, there, mixed[r]);
                add_product(mixed[r], b, skip);
                mixed[r] = product(s, mixed[r]);
                add_product(mixed[r], g, extra);
            }
            put<V>(out, at, there, mixed[r]);
        }
        if (kind == PLAIN) continue;
        float mean[ROWS], scale[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) mean[r] = scale[r] = 0.f;
        if (kind == LAYER) {
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int v = 0; v < V; v++) mean[r] += mixed[r].at[v];
            sum(mean);
#pragma unroll
            for (int r = 0; r < ROWS; r++) mean[r] /= channels;
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int v = 0; v < V; v++) {
                float away = here ? mixed[r].at[v] - mean[r] : 0.f;
                scale[r] += away * away;
            }
        sum(scale);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            scale[r] = rsqrtf(scale[r] / channels + eps);
            if (first + r >= rows) continue;
            if (threadIdx.x == 0) {
                stats[2 * (first + r)] = mean[r];
                stats[2 * (first + r) + 1] = scale[r];
            }
            Row<V> n;
#pragma unroll
            for (int v = 0; v < V; v++)
                n.at[v] = (mixed[r].at[v] - mean[r]) * scale[r] * w.at[v] + o.at[v];
            put<V>(normed, (int64)(first + r) * channels + c, here, n);
        }
    }
}

// Of the gains' and weights' gradients, those whose partial is not null: (blocks, channels) each. All
// that a row needs is on its way before the sums over the block are waited for.
template <class X, class Y, int V, bool MIXED>
__global__ void __launch_bounds__(MIXED ? 512 : 1024)
norm_backward(const X *d_out, const Y *d_normed, const X *d_sum, const X *d_e, const X *out,
              const float *stats, const X *x, const Y *y, const X *z, const X *e, const float *x_gain,
              const float *y_gain, const float *z_gain, const float *e_gain, const float *weight, X *dx,
              Y *dy, X *dz, X *de, float *p_x, float *p_y, float *p_z, float *p_e, float *p_weight,
              float *p_bias, int blocks, int rows, int channels, int kind) {
    constexpr int ROWS = MIXED ? 1 : 2;
    __shared__ float room[2][32][2 * ROWS];
    BlockSum<2 * ROWS> sum{room, 0};
    int c = threadIdx.x * V;
    bool here = c < channels;
    Row<V> s = fetch<V>(MIXED ? x_gain : nullptr, c, here, 1.f);
    Row<V> a = fetch<V>(MIXED ? y_gain : nullptr, c, here, 1.f);
    Row<V> b = fetch<V>(MIXED ? z_gain : nullptr, c, here, 1.f);
    Row<V> g = fetch<V>(MIXED ? e_gain : nullptr, c, here, 1.f);
    Row<V> w = fetch<V>(weight, c, here, 1.f), none = filled<V>(0.f);
    Row<V> ds = none, da = none, db = none, dg = none, dw = none, d_bias = none;
    for (int first = blockIdx.x * ROWS; first < rows; first += blocks * ROWS) {
        Row<V> grad[ROWS], hat[ROWS], d_hat[ROWS];
        Row<V> branch[ROWS], whole[ROWS], skip[ROWS], extra[ROWS], more[ROWS], d_extra[ROWS];
        float sums[2 * ROWS], scale[ROWS];  // of d_hat xhat, and of d_hat
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            bool there = here && first + r < rows;
            int64 at = (int64)(first + r) * channels + c;
            grad[r] = fetch<V>(d_out, at, there);
            branch[r] = fetch<V>(MIXED && (p_x || p_y) ? y : nullptr, at, there);
            whole[r] = fetch<V>(MIXED && p_x ? x : nullptr, at, there);
            skip[r] = fetch<V>(MIXED && (p_x || p_z) ? z : nullptr, at, there);
            extra[r] = fetch<V>(MIXED && p_e ? e : nullptr, at, there);
            more[r] = fetch<V>(MIXED ? d_sum : nullptr, at, there);
            d_extra[r] = fetch<V>(MIXED ? d_e : nullptr, at, there);
            sums[r] = sums[ROWS + r] = 0.f;
            if (kind == PLAIN) continue;
            d_hat[r] = fetch<V>(d_normed, at, there);
            hat[r] = fetch<V>(out, at, there);
            float mean = there ? stats[2 * (first + r)] : 0.f;
            scale[r] = there ? stats[2 * (first + r) + 1] : 0.f;
#pragma unroll
            for (int v = 0; v < V; v++) {
                hat[r].at[v] = (hat[r].at[v] - mean) * scale[r];
                dw.at[v] = fmaf(d_hat[r].at[v], hat[r].at[v], dw.at[v]);
                d_bias.at[v] += d_hat[r].at[v];
                d_hat[r].at[v] *= w.at[v];
                sums[r] = fmaf(d_hat[r].at[v], hat[r].at[v], sums[r]);
                sums[ROWS + r] += d_hat[r].at[v];
            }
        }
        if (kind != PLAIN) sum(sums);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            bool there = here && first + r < rows;
            int64 at = (int64)(first + r) * channels + c;
            if (kind != PLAIN) {
                float along = sums[r] / channels;
                float level = kind == LAYER ? sums[ROWS + r] / channels : 0.f;
#pragma unroll
                for (int v = 0; v < V; v++)
                    grad[r].at[v] += scale[r] * (d_hat[r].at[v] - level - hat[r].at[v] * along);
            }
            Row<V> inner = product(s, grad[r]), d_x = inner;
            if (MIXED) add(d_x, more[r]);
            put<V>(dx, at, there, d_x);
            put<V>(dy, at, there, product(a, d_x));
            if (!MIXED) continue;
            put<V>(dz, at, there, product(b, inner));
            Row<V> d_more = d_extra[r];
            add_product(d_more, g, grad[r]);
            put<V>(de, at, there, d_more);
            add_product(da, d_x, branch[r]);
            add_product(whole[r], a, branch[r]);
            add_product(whole[r], b, skip[r]);
            add_product(ds, grad[r], whole[r]);
            add_product(db, inner, skip[r]);
            add_product(dg, grad[r], extra[r]);
        }
    }
    int64 at = (int64)blockIdx.x * channels + c;
    put<V>(p_weight, at, here, dw);
    put<V>(p_bias, at, here, d_bias);
    if (!MIXED) return;
    put<V>(p_x, at, here, ds);
    put<V>(p_y, at, here, da);
    put<V>(p_z, at, here, db);
    put<V>(p_e, at, here, dg);
}

// sums (groups, columns) of partial (groups, rows, columns), in a fixed order. A block has 32 columns
// of a group, a warp of it every 32nd row.
__global__ void __launch_bounds__(1024) column_sums(const float *partial, float *sums, int rows,
                                                    int columns) {
    __shared__ float room[32][33];
    int tiles = (columns + 31) / 32, group = blockIdx.x / tiles;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int c = blockIdx.x % tiles * 32 + lane;
    partial += (int64)group * rows * columns;
    float sum = 0.f;
    if (c < columns)
        for (int r = warp; r < rows; r += 32) sum += partial[(int64)r * columns + c];
    room[warp][lane] = sum;
    __syncthreads();
    sum = room[lane][warp];
#pragma unroll
    for (int far = 16; far; far /= 2) sum += __shfl_xor_sync(~0u, sum, far);
    c += warp - lane;
    if (lane == 0 && c < columns) sums[(int64)group * columns + c] = sum;
}
