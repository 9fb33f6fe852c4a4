// The activation of an MLP, and its backward: one pass each. V neighbouring elements a thread.

constexpr int RELU2 = 0, GELU = 1, SILU = 2;

template <int KIND> inline float value(float x) {
    if (KIND == RELU2) return x > 0.f ? x * x : x * 0.f;  // a nan stays one
    if (KIND == GELU) return .5f * x * (1.f + erff(x * .70710678f));
    return x * sigmoid(x);
}

template <int KIND> inline float slope(float x) {
    if (KIND == RELU2) return x > 0.f ? 2.f * x : x * 0.f;
    if (KIND == GELU)
        return .5f * (1.f + erff(x * .70710678f)) + x * .39894228f * __expf(-.5f * x * x);
    float gate = sigmoid(x);
    return gate * fmaf(x, 1.f - gate, 1.f);
}

template <class T, int V, int KIND>
__global__ void activation_forward(const T *x, T *y, int64 count) {
    int64 at = (blockIdx.x * (int64)blockDim.x + threadIdx.x) * V;
    if (at >= count) return;
    Pack<T, V> from = *(const Pack<T, V> *)(x + at), to;
#pragma unroll
    for (int v = 0; v < V; v++) store(to.at[v], value<KIND>(load(from.at[v])));
    *(Pack<T, V> *)(y + at) = to;
}

template <class T, int V, int KIND>
__global__ void activation_backward(const T *dy, const T *x, T *dx, int64 count) {
    int64 at = (blockIdx.x * (int64)blockDim.x + threadIdx.x) * V;
    if (at >= count) return;
    Pack<T, V> from = *(const Pack<T, V> *)(x + at), up = *(const Pack<T, V> *)(dy + at), to;
#pragma unroll
    for (int v = 0; v < V; v++) store(to.at[v], load(up.at[v]) * slope<KIND>(load(from.at[v])));
    *(Pack<T, V> *)(dx + at) = to;
}
