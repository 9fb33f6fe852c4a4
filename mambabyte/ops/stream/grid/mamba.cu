// Mamba (M): in_proj, convolution => x_proj => scan step => out_proj => x.

constexpr int XR = R + 2 * N, RX = parts(XR, CL), G = power(N) < 16 ? power(N) : 16;
constexpr int US = pad(CL * DC), WS = CL * RX, NE = parts(N, G);  // states of a thread

// Bytes of a pass of P whose steps a thread's registers hold: a divisor of P.
constexpr int together(int P) { return P * NE <= 16 ? P : 1; }

template <int P> __forceinline__ void mamba(Block &b, float *state) {
    float *const all_u = b.mem + ALL_U, *const low = b.mem + LOW, *const local = b.mem + LOCAL;
    const float *own = b.own;
    constexpr int BYTES = together(P);
    b.rows_normed<2 * DC, P>([&](int r, int p, float v) { local[p * LOCALS + r] = v + own[OWN + r]; });
    b.settle<2 * DC * P>();
#pragma unroll 1
    for (int c = b.tid; c < DC; c += T)
        b.convolve<P>(
            own + M_CONV + c * K, own[M_CONV_BIAS + c], state + DC * N + c, DC,
            [&](int p) { return local + p * LOCALS + c; },
            [&](int p, float u) {
                float *const at = local + p * LOCALS + c;
                b.out[p * DC + c] = at[0] = u, at[DC] *= sigmoid(at[DC]);
            });
    b.give<DC, P, DC>();
    Weights<RX + (R ? 0 : DC), CL * DC> projections;
    b.fetch(projections);
    b.receive_all<DC, P>(ALL_U, US);
    b.rows<false, P>(projections, all_u, US, [&](int r, int p, float v) {
        *(r < RX ? b.out + p * RX + r : b.mem + STEP + p * DC + r - RX) = v;
    });
    b.give<RX, P, (RX + (R ? 0 : DC)) * P>();
    b.receive_all<RX, P>(LOW, WS);
#pragma unroll 1
    for (int start = 32 * b.warp; start < DC * G; start += T) {
        const int g = b.lane % G, c = min((start + b.lane) / G, DC - 1);
        const bool there = start + b.lane < DC * G;
        float h[NE], rate[NE];
#pragma unroll
        for (int e = 0; e < NE; e++) {
            const int n = g + e * G;
            h[e] = n < N ? state[c * N + n] : 0.f, rate[e] = n < N ? own[M_RATE + c * N + n] : 0.f;
        }
#pragma unroll 1
        for (int first = 0; first < P; first += BYTES) {
            // What does not depend on the state, of all bytes; the states one after another; their sums.
            float dt[BYTES], u[BYTES], out[BYTES], decay[BYTES][NE], add[BYTES][NE], read[BYTES][NE];
#pragma unroll
            for (int i = 0; i < BYTES; i++) {
                const float *in = low + (first + i) * WS;
                float sum = 0.f;
                for (int r = g; r < R; r += G) sum = fmaf(own[M_DT + c * R + r], in[r], sum);
                sum = R ? sum_over<G>(sum) : b.mem[STEP + (first + i) * DC + c];
                dt[i] = softplus(sum + own[M_DT_BIAS + c]), u[i] = local[(first + i) * LOCALS + c];
#pragma unroll
                for (int e = 0; e < NE; e++) {
                    const int n = g + e * G;
                    decay[i][e] = exp2f(dt[i] * rate[e]);
                    add[i][e] = n < N ? dt[i] * u[i] * in[R + n] : 0.f, read[i][e] = n < N ? in[R + N + n] : 0.f;
                }
            }
#pragma unroll
            for (int i = 0; i < BYTES; i++) {
                float sum = 0.f;
#pragma unroll
                for (int e = 0; e < NE; e++) {
                    h[e] = fmaf(decay[i][e], h[e], add[i][e]);
                    sum = fmaf(read[i][e], h[e], sum);
                    if (P > 1) add[i][e] = h[e];  // what is kept
                }
                out[i] = sum;
            }
#pragma unroll
            for (int i = 0; i < BYTES; i++)
                out[i] = fmaf(own[M_SKIP + c], u[i], sum_over<G>(out[i])) * local[(first + i) * LOCALS + DC + c];
#pragma unroll
            for (int i = 0; i < BYTES; i++) {
#pragma unroll
                for (int e = 0; e < NE; e++)
                    if (there && g + e * G < N)
                        b.keep<P>(state + c * N + g + e * G, P > 1 ? add[i][e] : h[e], first + i);
                if (there && g == 0) b.out[(first + i) * DC + c] = out[i];
            }
        }
    }
    b.give<DC, P, DC * G>();
    b.mix<CL * DC, P>([&]() { b.receive_all<DC, P>(Y, YS); });
}
