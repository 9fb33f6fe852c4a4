// Products of bf16 matrices on tensor cores, for one warp: tiles lie in shared memory, sums are
// float32 in registers. Follows types.cu.

typedef unsigned u32;

// Two numbers as bf16 in one register, `low` in its lower half.
inline u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

inline float low_of(u32 pair) { return __uint_as_float(pair << 16); }
inline float high_of(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two neighbours, the first at an even place, in one read.
inline float2 pair_at(const bfloat16 *at) {
    u32 pair = *(const u32 *)at;
    return make_float2(low_of(pair), high_of(pair));
}

// d (16 x 8) += a (16 x 16) b (16 x 8). Lane 4 g + t holds d[g][2t], d[g][2t + 1], d[g + 8][2t] and
// d[g + 8][2t + 1].
inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
inline void load_matrices(u32 (&r)[4], const bfloat16 *at) {
    u32 address = (u32)__cvta_generic_to_shared(at);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
inline void load_transposed(u32 (&r)[4], const bfloat16 *at) {
    u32 address = (u32)__cvta_generic_to_shared(at);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// An 8 x 8 matrix of bf16 by its diagonal; lane 4 g + t holds row g, columns 2t and 2t + 1.
inline u32 transpose_8x8(u32 x) {
    u32 r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
    return r;
}

// The left operand of mma: rows m to m + 15 and columns k to k + 15 of a matrix that lies in memory
// as it is, or TRANSPOSED (a row of memory is a column of it). `stride`: elements between rows.
template <bool TRANSPOSED>
inline void load_left(u32 (&a)[4], const bfloat16 *tile, int stride, int m, int k) {
    int lane = threadIdx.x % 32, i = lane % 8, down = lane / 8 % 2 * 8, right = lane / 16 * 8;
    if (TRANSPOSED)
        load_transposed(a, tile + (k + right + i) * stride + m + down);
    else
        load_matrices(a, tile + (m + down + i) * stride + k + right);
}

// The right operands of two mma, next to each other: rows k to k + 15 and columns n to n + 15;
// b[0], b[1] are the first eight columns. Here too TRANSPOSED is about memory.
template <bool TRANSPOSED>
inline void load_right(u32 (&b)[4], const bfloat16 *tile, int stride, int k, int n) {
    int lane = threadIdx.x % 32, i = lane % 8, down = lane / 8 % 2 * 8, right = lane / 16 * 8;
    if (TRANSPOSED)
        load_matrices(b, tile + (n + right + i) * stride + k + down);
    else
        load_transposed(b, tile + (k + down + i) * stride + n + right);
}

// sum (16 x 8 TILES) += left right, of 16 STEPS products each, or of those from `first` on and before
// `last`: left from registers.
template <bool RIGHT_TRANSPOSED, int TILES, int STEPS>
inline void multiply(float (&sum)[TILES][4], const u32 (&left)[STEPS][4],
                     const bfloat16 *right, int right_stride, int first = 0, int last = STEPS) {
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        if (k < first || k >= last) continue;
#pragma unroll
        for (int n = 0; n < TILES / 2; n++) {
            u32 b[4];
            load_right<RIGHT_TRANSPOSED>(b, right, right_stride, 16 * k, 16 * n);
            mma(sum[2 * n], left[k], b[0], b[1]);
            mma(sum[2 * n + 1], left[k], b[2], b[3]);
        }
    }
}

// With rows `row` to row + 15 of a matrix in shared memory on the left; here first and last are of the
// sum's blocks of 16 columns.
template <bool LEFT_TRANSPOSED, bool RIGHT_TRANSPOSED, int STEPS, int TILES>
inline void multiply(float (&sum)[TILES][4], const bfloat16 *left, int left_stride, int row,
                     const bfloat16 *right, int right_stride, int first = 0, int last = TILES / 2) {
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        u32 a[4];
        load_left<LEFT_TRANSPOSED>(a, left, left_stride, row, 16 * k);
#pragma unroll
        for (int n = 0; n < TILES / 2; n++) {
            if (n < first || n >= last) continue;
            u32 b[4];
            load_right<RIGHT_TRANSPOSED>(b, right, right_stride, 16 * k, 16 * n);
            mma(sum[2 * n], a, b[0], b[1]);
            mma(sum[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// Sums of one product as the left operand of another, rounded to bf16.
template <int STEPS, int TILES>
inline void as_left(u32 (&a)[STEPS][4], const float (&sum)[TILES][4]) {
    static_assert(TILES == 2 * STEPS, "16 products a step");
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        a[k][0] = pack(sum[2 * k][0], sum[2 * k][1]);
        a[k][1] = pack(sum[2 * k][2], sum[2 * k][3]);
        a[k][2] = pack(sum[2 * k + 1][0], sum[2 * k + 1][1]);
        a[k][3] = pack(sum[2 * k + 1][2], sum[2 * k + 1][3]);
    }
}
