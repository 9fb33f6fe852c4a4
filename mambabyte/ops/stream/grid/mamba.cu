// Mamba (M): in_proj, convolution => x_proj => scan step => out_proj => x.

constexpr int XR = R + 2 * N, RX = parts(XR, CL), G = power(N) < 16 ? power(N) : 16;
constexpr int US = pad(CL * DC), WS = CL * RX, NE = parts(N, G);  // states of a thread

template <int P> __forceinline__ void mamba(Block &b, float *state) {
    float *const all_u = b.mem + ALL_U, *const low = b.mem + LOW, *const local = b.mem + LOCAL;
    const float *own = b.own;
    b.rows_normed<2 * DC, P>([&](int r, int p, float v) { local[p * LOCALS + r] = v + own[OWN + r]; });
    b.settle<2 * DC * P>();
#pragma unroll 1
    for (int c = b.tid; c < DC; c += T)
#pragma unroll 1
        for (int p = 0; p < P; p++) {
            float *const at = local + p * LOCALS + c;
            const float u = b.convolve<P>(own + M_CONV + c * K, own[M_CONV_BIAS + c], state + DC * N + c, DC, *at, p);
            b.out[p * DC + c] = *at = u, at[DC] *= sigmoid(at[DC]);
        }
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
        float h[NE];
#pragma unroll
        for (int e = 0; e < NE; e++) h[e] = g + e * G < N ? state[c * N + g + e * G] : 0.f;
#pragma unroll 1
        for (int p = 0; p < P; p++) {
            const float *in = low + p * WS;
            const float u = local[p * LOCALS + c];
            float sum = 0.f, out = 0.f;
            for (int r = g; r < R; r += G) sum = fmaf(own[M_DT + c * R + r], in[r], sum);
            sum = R ? sum_over<G>(sum) : b.mem[STEP + p * DC + c];
            const float dt = softplus(sum + own[M_DT_BIAS + c]);
#pragma unroll
            for (int e = 0; e < NE; e++) {
                const int n = g + e * G;
                if (n >= N) continue;
                h[e] = fmaf(exp2f(dt * own[M_RATE + c * N + n]), h[e], dt * u * in[R + n]);
                if (there) b.keep<P>(state + c * N + n, h[e], p);
                out = fmaf(in[R + N + n], h[e], out);
            }
            out = fmaf(own[M_SKIP + c], u, sum_over<G>(out)) * local[p * LOCALS + DC + c];
            if (there && g == 0) b.out[p * DC + c] = out;
        }
    }
    b.give<DC, P, DC * G>();
    b.mix<CL * DC, P>([&]() { b.receive_all<DC, P>(Y, YS); });
}
