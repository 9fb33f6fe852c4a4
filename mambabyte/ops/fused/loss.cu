// Cross-entropy of logits that may be capped and added to another model's, without a copy of them in
// float32, and its backward.
//
//   u = cap tanh(logit / cap) (or logit) + gate offset,   loss = log sum exp u - u[target]
//
// A row whose target is -1 is not asked: its loss and gradients are 0. A warp takes a row. gate (rows), offset (rows, symbols) in float16; null where there are none.

// tanh by its exponential: what the compiler takes for it has 11 bits.
inline float capped(float x, float cap) {
    return cap > 0.f ? cap * (1.f - 2.f / (1.f + __expf(2.f * x / cap))) : x;
}

inline float warp_max(float x) {
#pragma unroll
    for (int far = 16; far; far /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, far));
    return x;
}

inline float warp_sum(float x) {
#pragma unroll
    for (int far = 16; far; far /= 2) x += __shfl_xor_sync(~0u, x, far);
    return x;
}

template <class T, class G>
__global__ void loss_forward(const T *logits, const int64 *targets, const G *gate,
                             const float16 *offset, float *losses, float *normaliser, int rows,
                             int symbols, float cap) {
    int row = (blockIdx.x * (int)blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    int64 first = (int64)row * symbols;
    float share = gate ? load(gate[row]) : 0.f;
    auto at = [&](int64 i) {
        float u = capped(load(logits[first + i]), cap);
        return offset ? fmaf(share, load(offset[first + i]), u) : u;
    };
    // A row is read three times, twice from the first-level cache.
    float top = -3.402823466e38f;
    for (int i = lane; i < symbols; i += 32) top = fmaxf(top, at(i));
    top = warp_max(top);
    float sum = 0.f;
    for (int i = lane; i < symbols; i += 32) sum += __expf(at(i) - top);
    float all = top + __logf(warp_sum(sum));
    if (lane == 0) {
        int64 target = targets[row];
        // Not a symbol: no number, as torch ends the process.
        float loss = target >= 0 && target < symbols ? all - at(target) : nanf("");
        losses[row] = target == -1 ? 0.f : loss;
        normaliser[row] = all;
    }
}

// The mean of losses (rows), in a fixed order, by one block.
__global__ void __launch_bounds__(1024) loss_mean(const float *losses, float *mean, int rows) {
    __shared__ float room[32];
    float sum = 0.f;
    for (int r = threadIdx.x; r < rows; r += 1024) sum += losses[r];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    sum = warp_sum(room[threadIdx.x]);
    if (threadIdx.x == 0) *mean = sum / rows;
}

template <class T, class G>
__global__ void loss_backward(const float *d_mean, const T *logits, const int64 *targets,
                              const G *gate, const float16 *offset, const float *normaliser,
                              T *d_logits, G *d_gate, int rows, int symbols, float cap) {
    int row = (blockIdx.x * (int)blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    int64 first = (int64)row * symbols, target = targets[row];
    float share = gate ? load(gate[row]) : 0.f, all = normaliser[row];
    float upstream = target == -1 ? 0.f : *d_mean / rows, along = 0.f;
    for (int i = lane; i < symbols; i += 32) {
        float u = capped(load(logits[first + i]), cap), ratio = u / cap;
        float other = offset ? load(offset[first + i]) : 0.f;
        float du = (__expf(fmaf(share, other, u) - all) - (i == target)) * upstream;
        along = fmaf(du, other, along);
        store(d_logits[first + i], cap > 0.f ? du * (1.f - ratio * ratio) : du);
    }
    if (!d_gate) return;
    along = warp_sum(along);
    if (lane == 0) store(d_gate[row], along);
}
