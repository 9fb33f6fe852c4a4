// Queries or keys, normalised (or not), turned by rotary angles and scaled by a gain a head, and the
// backward. Rows of two halves: x (B, L, H, 2 half) -> y of the same shape, contiguous.
//
// LANES neighbouring threads share a row, V channels of each half a thread.

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
__global__ void rotary_forward(const T *x, const float *cosine, const float *sine,
                               const float *gain, T *y, int64 batch_stride, int64 time_stride,
                               int64 head_stride, int rows, int length, int heads, int half,
                               int norm, float eps) {
    int row = (blockIdx.x * (int)blockDim.x + threadIdx.x) / LANES;
    int c = threadIdx.x % LANES * V;
    bool here = row < rows && c < half;
    if (row >= rows) row = rows - 1;
    int h = row % heads, t = row / heads % length, b = row / heads / length;
    const T *from = x + b * batch_stride + t * time_stride + h * head_stride + c;
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
    if (gain) scale *= gain[h];
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

// dots (rows): what each row gives to the gradient of its head's gain; null without gains.
template <class T, int V, int LANES>
__global__ void rotary_backward(const T *dy, const T *x, const float *cosine, const float *sine,
                                const float *gain, T *dx, float *dots, int64 dy_batch_stride,
                                int64 dy_time_stride, int64 dy_head_stride, int64 batch_stride,
                                int64 time_stride, int64 head_stride, int rows, int length,
                                int heads, int half, int norm, float eps) {
    int row = (blockIdx.x * (int)blockDim.x + threadIdx.x) / LANES;
    int c = threadIdx.x % LANES * V;
    bool here = row < rows && c < half;
    if (row >= rows) row = rows - 1;
    int h = row % heads, t = row / heads % length, b = row / heads / length;
    const T *from = x + b * batch_stride + t * time_stride + h * head_stride + c;
    const T *upstream = dy + b * dy_batch_stride + t * dy_time_stride + h * dy_head_stride + c;
    float one[V], two[V], d_one[V], d_two[V], cos[V], sin[V];
    take<T, V>(one, from, here);
    take<T, V>(two, from + half, here);
    take<T, V>(d_one, upstream, here);
    take<T, V>(d_two, upstream + half, here);
    take<float, V>(cos, cosine + (int64)t * half + c, here);
    take<float, V>(sin, sine + (int64)t * half + c, here);
    float squares = 0.f, along = 0.f;
#pragma unroll
    for (int v = 0; v < V; v++) {
        float first = d_one[v] * cos[v] + d_two[v] * sin[v];
        d_two[v] = d_two[v] * cos[v] - d_one[v] * sin[v];
        d_one[v] = first;
        squares += one[v] * one[v] + two[v] * two[v];
        along += one[v] * d_one[v] + two[v] * d_two[v];
    }
    along = lane_sum<LANES>(along);
    float scale = norm ? rsqrtf(lane_sum<LANES>(squares) / (2 * half) + eps) : 1.f;
    if (dots && threadIdx.x % LANES == 0 && here) dots[row] = along * scale;
    float factor = gain ? gain[h] * scale : scale;
    float level = norm ? along * scale * scale / (2 * half) : 0.f;
#pragma unroll
    for (int v = 0; v < V; v++) {
        one[v] = factor * (d_one[v] - one[v] * level);
        two[v] = factor * (d_two[v] - two[v] * level);
    }
    if (!here) return;
    T *to = dx + (int64)row * 2 * half + c;
    give<T, V>(to, one);
    give<T, V>(to + half, two);
}
