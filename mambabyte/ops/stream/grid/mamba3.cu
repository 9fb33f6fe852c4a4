// Mamba-3 (R): in_proj => B, C, gates, angles => norms of B and C, state => out_proj => x.
//
// A pair of states is a complex number; a thread has whole pairs. Of the step before, the state keeps B of
// each channel's head (k) and x (v).

constexpr int RP = parts(SP, CL), GATES_OF = 3 * RH + RP;  // dt, decay, mix of heads; angles of pairs
constexpr int R_ROWS = 2 * DC + RB + GATES_OF;             // of in_proj: x, z, a share of B and C, the gates'
constexpr int PE = parts(SN / 2, S_LANES), ANGLES = 3 * CL * RH;

template <int P> __forceinline__ void mamba3(Block &b, float *state) {
    float *const bc = b.mem + BC, *const gates = b.mem + DTS, *const local = b.mem + LOCAL;
    const float *own = b.own;
    b.rows_normed<R_ROWS, P>([&](int r, int p, float v) {
        v += own[OWN + r];
        *(r < 2 * DC ? local + p * LOCALS + r : b.out + p * (RB + GATES_OF) + r - 2 * DC) = v;
    });
    b.give<RB + GATES_OF, P, R_ROWS * P>();
    b.receive<RB + GATES_OF, P>([](int p, int block, int r) {
        if (r < RB) return BC + p * BS + block * RB + r;
        r -= RB;
        return DTS + p * DTS_STRIDE + (r < 3 * RH ? (r / RH * CL + block) * RH + r % RH
                                                  : ANGLES + block * RP + r - 3 * RH);
    });
#pragma unroll 1
    for (int start = 32 * b.warp; start < DC * S_LANES; start += T) {
        const int g = b.lane % S_LANES, c = min((start + b.lane) / S_LANES, DC - 1);
        const bool there = start + b.lane < DC * S_LANES;
        const int h = min((b.rank * DC + c) / (DI / SH), SH - 1), group = h / (SH / SG);
        float *const of_h = state + c * SN, *const of_k = of_h + DC * SN, *const of_v = state + 2 * DC * SN + c;
        float s[PE][2], k[PE][2], v = *of_v;
#pragma unroll
        for (int e = 0; e < PE; e++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int n = 2 * (g + e * S_LANES) + i;
                s[e][i] = n < SN ? of_h[n] : 0.f, k[e][i] = n < SN ? of_k[n] : 0.f;
            }
#pragma unroll 1
        for (int p = 0; p < P; p++) {
            const float *B = bc + p * BS + group * SN, *C = B + SG * SN, *at = gates + p * DTS_STRIDE + h;
            float squares[2] = {};
#pragma unroll
            for (int e = 0; e < PE; e++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int n = 2 * (g + e * S_LANES) + i;
                    if (n < SN) squares[0] = fmaf(B[n], B[n], squares[0]), squares[1] = fmaf(C[n], C[n], squares[1]);
                }
            const float scale_b = rsqrtf(sum_over<S_LANES>(squares[0]) * (1.f / SN) + 1e-5f);
            const float scale_c = rsqrtf(sum_over<S_LANES>(squares[1]) * (1.f / SN) + 1e-5f);
            const float dt = softplus(at[0] + own[R_DT_BIAS + h]), mix = sigmoid(at[2 * CL * RH]);
            const float decay = exp2f(-1.44269504f * fmaxf(softplus(at[CL * RH]), 1e-4f) * dt);
            const float u = local[p * LOCALS + c], z = local[p * LOCALS + DC + c];
            const float before = (1.f - mix) * dt * v, now = mix * dt * u;
            float out = 0.f;
#pragma unroll
            for (int e = 0; e < PE; e++) {
                const int pair = g + e * S_LANES, n = 2 * pair;
                if (n >= SN) continue;
                float sine = 0.f, cosine = 1.f;
                if (pair < SP) {  // in half turns; whole turns are left out without a rounding
                    const float angle = gates[p * DTS_STRIDE + ANGLES + pair];
                    const float rate = 1.f - __fdividef(2.f, 1.f + __expf(2.f * angle)), turns = rate * dt;  // tanh
                    sincospif(turns - 2.f * rintf(0.5f * turns) + fmaf(rate, dt, -turns), &sine, &cosine);
                }
                const float x = fmaf(before, k[e][0], s[e][0]), y = fmaf(before, k[e][1], s[e][1]);
                const float next[2] = {decay * fmaf(cosine, x, sine * y), decay * fmaf(cosine, y, -sine * x)};
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    k[e][i] = fmaf(B[n + i] * scale_b, own[R_B_NORM + n + i], own[R_B_BIAS + c * SN + n + i]);
                    s[e][i] = fmaf(now, k[e][i], next[i]);
                    const float query = fmaf(C[n + i] * scale_c, own[R_C_NORM + n + i], own[R_C_BIAS + c * SN + n + i]);
                    out = fmaf(query, s[e][i], out);
                    if (there) b.keep<P>(of_h + n + i, s[e][i], p), b.keep<P>(of_k + n + i, k[e][i], p);
                }
            }
            v = u;
            out = fmaf(own[R_SKIP + h], u, sum_over<S_LANES>(out)) * z * sigmoid(z);
            if (there && g == 0) b.out[p * DC + c] = out, b.keep<P>(of_v, v, p);
        }
    }
    b.give<DC, P, DC * S_LANES>();
    b.mix<CL * DC, P>([&]() { b.receive_all<DC, P>(Y, YS); });
}
