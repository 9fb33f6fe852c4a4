// Steps and log-decays of a head from what a layer gives, forward and backward. Follows types.cu.
//
//   z = dt + bias      step = softplus(z), or z      log_decay = A step, -inf where a document begins
//
// dt (B, L, H) of any strides, in bf16 or float32; A, bias (H); ages (B, L), 0 where a document begins,
// null for one a row; all else (B, L, H) in a row.

constexpr int THREADS = 128;

struct Layout {
    int64 batch, time, head;
    int length, heads;
    inline int64 at(int64 row, int unit) const {
        return row / length * batch + row % length * time + unit * head;
    }
};

inline float softplus(float x) { return x > 20.f ? x : log1pf(__expf(x)); }

template <class D>
__global__ void __launch_bounds__(THREADS) gates(
    const D *dt, const float *A, const float *bias, const unsigned char *ages, float *step,
    float *log_decay, int64 batch, int64 time, int64 head, int64 count, int length, int heads,
    int curved) {
    int64 id = blockIdx.x * (int64)THREADS + threadIdx.x;
    if (id >= count) return;
    Layout from = {batch, time, head, length, heads};
    int h = (int)(id % heads);
    float z = load(dt[from.at(id / heads, h)]) + (bias ? bias[h] : 0.f);
    float value = curved ? softplus(z) : z;
    step[id] = value;
    log_decay[id] = ages && ages[id / heads] == 0 ? -__uint_as_float(0x7f800000u) : A[h] * value;
}

// A block has one head and ROWS rows; sums (blocks of rows, 2, H): of A's gradient and of the bias'.
constexpr int ROWS = 8 * THREADS;
template <class D>
__global__ void __launch_bounds__(THREADS) gates_backward(
    const D *dt, const float *A, const float *bias, const unsigned char *ages, const float *dstep,
    const float *dlog_decay, D *ddt, float *sums, int64 batch, int64 time, int64 head, int64 rows, int length, int heads,
    int curved) {
    Layout from = {batch, time, head, length, heads};
    int h = blockIdx.x % heads;
    int64 first = (int64)(blockIdx.x / heads) * ROWS;
    float a = A[h], shift = bias ? bias[h] : 0.f, of_a = 0.f, of_bias = 0.f;
    for (int64 row = first + threadIdx.x; row < rows && row < first + ROWS; row += THREADS) {
        int64 id = row * heads + h;
        float z = load(dt[from.at(row, h)]) + shift, dlog = 0.f;
        if (dlog_decay && !(ages && ages[row] == 0)) dlog = dlog_decay[id];
        float dz = ((dstep ? dstep[id] : 0.f) + a * dlog) * (curved ? sigmoid(z) : 1.f);
        of_a += dlog * (curved ? softplus(z) : z);
        of_bias += dz;
        store(ddt[id], dz);
    }
    __shared__ float found[2][THREADS / 32];
#pragma unroll
    for (int far = 16; far; far /= 2) {
        of_a += __shfl_xor_sync(~0u, of_a, far);
        of_bias += __shfl_xor_sync(~0u, of_bias, far);
    }
    if (threadIdx.x % 32 == 0) found[0][threadIdx.x / 32] = of_a, found[1][threadIdx.x / 32] = of_bias;
    __syncthreads();
    if (threadIdx.x >= 2) return;
    float sum = 0.f;
    for (int warp = 0; warp < THREADS / 32; warp++) sum += found[threadIdx.x][warp];
    sums[((int64)(blockIdx.x / heads) * 2 + threadIdx.x) * heads + h] = sum;
}
