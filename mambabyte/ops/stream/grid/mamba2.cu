// Mamba-2 (S): in_proj, convolution => B, C, step sizes => state => norm, out_proj => x.

constexpr int SB = 2 * SG * SN, RB = parts(SB, CL), RH = parts(SH, CL);
constexpr int S_ROWS = 2 * DC + RB + RH;  // of in_proj: x, z, a share of B and C and of the step sizes
constexpr int BS = CL * RB, S_LANES = 16, SE = parts(SN, S_LANES);

template <int P> __forceinline__ void mamba2(Block &b, float *state) {
    float *const bc = b.mem + BC, *const dts = b.mem + DTS, *const local = b.mem + LOCAL, *const y = b.mem + Y;
    const float *own = b.own;
    b.rows_normed<S_ROWS, P>([&](int r, int p, float v) { local[p * LOCALS + r] = v + own[OWN + r]; });
    meet();
#pragma unroll 1
    for (int c = b.tid; c < DC + RB; c += T)
        b.convolve<P>(
            own + S_CONV + c * K, own[S_CONV_BIAS + c], state + DC * SN + c, DC + RB,
            [&](int p) { return local + p * LOCALS + (c < DC ? c : c + DC); },
            [&](int p, float v) {
                *(c < DC ? local + p * LOCALS + c : b.out + p * (RB + RH) + c - DC) = v;
            });
#pragma unroll 1
    for (int i = b.tid; i < P * RH; i += T)
        b.out[i / RH * (RB + RH) + RB + i % RH] = local[i / RH * LOCALS + 2 * DC + RB + i % RH];
    b.give<RB + RH, P, T>();
    b.receive<RB + RH, P>([](int p, int block, int r) {
        return r < RB ? BC + p * BS + block * RB + r : DTS + p * DTS_STRIDE + block * RH + r - RB;
    });
#pragma unroll 1
    for (int start = 32 * b.warp; start < DC * S_LANES; start += T) {
        const int g = b.lane % S_LANES, c = min((start + b.lane) / S_LANES, DC - 1);
        const bool there = start + b.lane < DC * S_LANES;
        const int h = min((b.rank * DC + c) / (DI / SH), SH - 1), group = h / (SH / SG);
        float s[SE];
#pragma unroll
        for (int e = 0; e < SE; e++) s[e] = g + e * S_LANES < SN ? state[c * SN + g + e * S_LANES] : 0.f;
#pragma unroll 1
        for (int p = 0; p < P; p++) {
            const float *B = bc + p * BS + group * SN, *C = bc + p * BS + (SG + group) * SN;
            const float *at = local + p * LOCALS + c;
            float dt = softplus(dts[p * DTS_STRIDE + h] + own[S_DT_BIAS + h]), out = 0.f;
            float decay = exp2f(dt * own[S_RATE + h]), in = dt * *at, z = at[DC];
#pragma unroll
            for (int e = 0; e < SE; e++) {
                const int n = g + e * S_LANES;
                if (n >= SN) continue;
                s[e] = fmaf(decay, s[e], in * B[n]);
                if (there) b.keep<P>(state + c * SN + n, s[e], p);
                out = fmaf(C[n], s[e], out);
            }
            out = fmaf(own[S_SKIP + h], *at, sum_over<S_LANES>(out)) * z * sigmoid(z);
            if (there && g == 0) b.out[p * DC + c] = out;
        }
    }
    b.give<DC, P, DC * S_LANES>();
    b.mix<CL * DC, P>([&]() {
        b.receive_all<DC, P>(Y, YS);
#pragma unroll 1
        for (int unit = b.warp; unit < P * SG; unit += WARPS) {
            float *part = y + unit / SG * YS + unit % SG * (DI / SG), square = 0.f;
            for (int c = b.lane; c < DI / SG; c += 32) square = fmaf(part[c], part[c], square);
            float scale = rsqrtf(sum_over<32>(square) * (1.f / (DI / SG)) + SSD_EPS);
            for (int c = b.lane; c < DI / SG; c += 32) part[c] *= scale;
        }
        meet();
    });
}
