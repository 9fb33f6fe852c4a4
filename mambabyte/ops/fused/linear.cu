// The gradient of a bias: sums over rows, as a partial sum a block that column_sums adds up.
//
// A thread has V neighbouring columns, a block `steps` rows one after another, some at a time.

template <class T, int V>
__global__ void linear_bias(const T *rows_of, float *partial, int rows, int columns, int steps) {
    constexpr int AHEAD = 8;
    int c = threadIdx.x * V;
    if (c >= columns) return;
    float sum[V];
#pragma unroll
    for (int v = 0; v < V; v++) sum[v] = 0.f;
    int first = blockIdx.x * steps, end = min(first + steps, rows);
    const T *from = rows_of + (int64)first * columns + c;
    for (int r = first; r < end; r += AHEAD, from += (int64)AHEAD * columns) {
        Pack<T, V> ahead[AHEAD] = {};
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (r + j < end) ahead[j] = *(const Pack<T, V> *)(from + (int64)j * columns);
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
#pragma unroll
            for (int v = 0; v < V; v++) sum[v] += load(ahead[j].at[v]);
    }
    for (int v = 0; v < V; v++) partial[(int64)blockIdx.x * columns + c + v] = sum[v];
}
