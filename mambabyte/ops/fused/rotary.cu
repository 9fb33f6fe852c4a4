// Queries and keys of one projection, normalised (or not) and turned by rotary angles, the queries
// scaled by a gain a head; and the backward, which puts the gradients of queries, keys and values
// where the projection's backward reads them.
//
// qkv (B, L, H + 2 G, 2 half), H heads of queries, G of keys and G of values -> y (B, L, H + G,
// 2 half). LANES neighbouring threads share a head of a position, V channels of each half a thread.

template <int LANES> inline float lane_sum(float x) {
#pragma unroll
    for (int far = LANES / 2; far; far /= 2) x += __shfl_xor_sync(~0u, x, far);
    return x;
}

template <class T, int V> inline void take(float (&to)[V], const T *from, bool there) {
    Pack<T, V> pack = {};
    if (there) pack = *(const Pack<T, V> *)from;
#pragma unroll
    for (int v = 0; v < V; v++) to[v] = load(pack.at[v]);
}

template <class T, int V> inline void give(T *to, const float (&from)[V]) {
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; v++) store(pack.at[v], from[v]);
    *(Pack<T, V> *)to = pack;
}

template <class T, int V, int LANES>
__global__ void rotary_forward(const T *qkv, const float *cosine, const float *sine,
                               const float *gain, T *y, int positions, int length, int queries,
                               int keys, int half, int norm, float eps) {
    int heads = queries + keys;
    int row = (blockIdx.x * (int)blockDim.x + threadIdx.x) / LANES;
    int c = threadIdx.x % LANES * V;
    bool here = row < positions * heads && c < half;
    if (!here) row = 0;
    int h = row % heads, t = row / heads % length;
    const T *from = qkv + ((int64)(row / heads) * (heads + keys) + h) * 2 * half + c;
    float one[V], two[V], cos[V], sin[V];
    take<T, V>(one, from, here);
    take<T, V>(two, from + half, here);
    take<float, V>(cos, cosine + (int64)t * half + c, here);
    take<float, V>(sin, sine + (int64)t * half + c, here);
    float scale = 1.f;
    if (norm) {
        float squares = 0.f;
#pragma unroll
        for (int v = 0; v < V; v++) squares += one[v] * one[v] + two[v] * two[v];
        scale = rsqrtf(lane_sum<LANES>(squares) / (2 * half) + eps);
    }
    if (gain && h < queries) scale *= gain[h];
#pragma unroll
    for (int v = 0; v < V; v++) {
        float first = one[v] * scale, second = two[v] * scale;
        one[v] = first * cos[v] - second * sin[v];
        two[v] = first * sin[v] + second * cos[v];
    }
    if (!here) return;
    T *to = y + (int64)row * 2 * half + c;
    give<T, V>(to, one);
    give<T, V>(to + half, two);
}

// The gradient of one of the three that attention reads, (B, H, L, 2 half) of any strides but 1 in
// the last.
template <class T> struct Upstream {
    const T *from;
    int64 batch_stride, head_stride, time_stride;
};

// dots (positions, queries): what each head of a position gives to the gradient of its gain; null
// without gains.
template <class T, int V, int LANES>
__global__ void rotary_backward(const T *dq, int64 dq_batch, int64 dq_head, int64 dq_time,
                                const T *dk, int64 dk_batch, int64 dk_head, int64 dk_time,
                                const T *dv, int64 dv_batch, int64 dv_head, int64 dv_time,
                                const T *qkv, const float *cosine, const float *sine,
                                const float *gain, T *d_qkv, float *dots, int positions,
                                int length, int queries, int keys, int half, int norm, float eps) {
    int heads = queries + 2 * keys;
    int row = (blockIdx.x * (int)blockDim.x + threadIdx.x) / LANES;
    int c = threadIdx.x % LANES * V;
    bool here = row < positions * heads && c < half;
    if (!here) row = 0;
    int h = row % heads, position = row / heads, t = position % length, b = position / length;
    bool is_query = h < queries, is_key = !is_query && h < queries + keys;
    const T *from = qkv + (int64)row * 2 * half + c;
    T *to = d_qkv + (int64)row * 2 * half + c;
    Upstream<T> up = is_query ? Upstream<T>{dq, dq_batch, dq_head, dq_time}
                     : is_key ? Upstream<T>{dk, dk_batch, dk_head, dk_time}
                              : Upstream<T>{dv, dv_batch, dv_head, dv_time};
    int of_its_own = is_query ? h : is_key ? h - queries : h - queries - keys;
    const T *upstream = up.from + b * up.batch_stride + of_its_own * up.head_stride +
                        t * up.time_stride + c;
    float one[V], two[V], d_one[V], d_two[V], cos[V], sin[V];
    take<T, V>(d_one, upstream, here);
    take<T, V>(d_two, upstream + half, here);
    bool turned = is_query || is_key;
    take<T, V>(one, from, here && turned);
    take<T, V>(two, from + half, here && turned);
    take<float, V>(cos, cosine + (int64)t * half + c, here);
    take<float, V>(sin, sine + (int64)t * half + c, here);
    float squares = 0.f, along = 0.f;
    if (turned)
#pragma unroll
        for (int v = 0; v < V; v++) {
            float first = d_one[v] * cos[v] + d_two[v] * sin[v];
            d_two[v] = d_two[v] * cos[v] - d_one[v] * sin[v];
            d_one[v] = first;
            squares += one[v] * one[v] + two[v] * two[v];
            along += one[v] * d_one[v] + two[v] * d_two[v];
        }
    along = lane_sum<LANES>(along);  // by all lanes of a warp: they may have different heads
    squares = lane_sum<LANES>(squares);
    float scale = norm && turned ? rsqrtf(squares / (2 * half) + eps) : 1.f;
    if (dots && is_query && here && c == 0) dots[(int64)position * queries + h] = along * scale;
    float factor = gain && is_query ? gain[h] * scale : scale;
    float level = norm ? along * scale * scale / (2 * half) : 0.f;
#pragma unroll
    for (int v = 0; v < V; v++) {
        one[v] = factor * (d_one[v] - one[v] * level);
        two[v] = factor * (d_two[v] - two[v] * level);
    }
    if (!here) return;
    give<T, V>(to, one);
    give<T, V>(to + half, two);
}
