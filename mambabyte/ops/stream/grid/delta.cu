// The delta rule (D), and Kimi's with a decay of each key (K): q, k, v, convolution => (K: decays =>)
// state => norms, o_proj => x.

constexpr int DK = DM / DH, VC = parts(DH * DV, CL), RE = parts(DH, CL), RF = parts(DV, CL);
constexpr int GV = power(DK) < 16 ? power(DK) : 16, KE = parts(DK, GV);  // threads a value; keys each
constexpr int D_ROWS = 2 * RD + VC + RE;  // of in_proj, without the gates' rows
constexpr int ES = CL * RE, FS = pad(CL * RF), VS = CL * VC;

template <int P, bool KIMI_RULE> __forceinline__ void delta(Block &b, float *state) {
    constexpr int ROWS = D_ROWS + (KIMI_RULE ? 2 * RF : RE + VC), TAPS = 2 * RD + VC;
    constexpr int GATE_AT = D_ROWS + (KIMI_RULE ? 0 : RE), QD = CL * RD;
    constexpr int SENT = 2 * RD + RE + (KIMI_RULE ? 2 * RF : RE);  // q, k, beta; a, or f and g
    float *const q = b.mem + Q, *const key = b.mem + KEY, *const decay = b.mem + DTS, *const y = b.mem + Y;
    float *const local = b.mem + LOCAL, *const beta = b.mem + BETA, *const low = b.mem + F, *const gl = b.mem + GL;
    const float *own = b.own;
    const int rank = b.rank, lane = b.lane;
    b.rows_normed<ROWS, P>([&](int r, int p, float v) { local[p * LOCALS + r] = v + own[OWN + r]; });
    meet();
#pragma unroll 1
    for (int c = b.tid; c < TAPS; c += T)
        b.convolve<P>(
            own + D_CONV + c * K, 0.f, state + VC * DK + c, TAPS,
            [&](int p) { return local + p * LOCALS + c; },
            [&](int p, float v) { (c < 2 * RD ? b.out + p * SENT : local + p * LOCALS)[c] = v; });
#pragma unroll 1
    for (int i = b.tid; i < P * (SENT - 2 * RD); i += T) {
        const int p = i / (SENT - 2 * RD), r = i % (SENT - 2 * RD);
        b.out[p * SENT + 2 * RD + r] = local[p * LOCALS + TAPS + r];
    }
    b.give<SENT, P, T>();
    b.receive<SENT, P>([](int p, int block, int r) {
        if (r < RD) return Q + p * QD + block * RD + r;
        if (r < 2 * RD) return KEY + p * QD + block * RD + r - RD;
        r -= 2 * RD;
        if (r < RE) return BETA + p * ES + block * RE + r;
        r -= RE;
        if (!KIMI_RULE) return DTS + p * DTS_STRIDE + block * RE + r;
        return r < RF ? F + p * FS + block * RF + r : GL + p * FS + block * RF + r - RF;
    });
    if constexpr (KIMI_RULE) {
        Weights<RD, CL * RF> decays;
        b.fetch(decays);
        b.rows<false, P>(decays, low, FS, [&](int r, int p, float v) {
            float dt = softplus(v + own[D_DT_BIAS + r]);
            b.out[p * RD + r] = exp2f(dt * own[D_RATE + r]);
        });
        meet();
        Weights<VC, CL * RF> gates;
        b.fetch(gates);
        b.rows<false, P>(gates, gl, FS, [&](int r, int p, float v) {
            local[p * LOCALS + GATE_AT + r] = sigmoid(v + own[D_GATE + r]);
        });
        b.give<RD, P, T>();
        b.receive_all<RD, P>(DTS, DTS_STRIDE);
    }
#pragma unroll 1
    for (int unit = b.warp; unit < P * 2 * DH; unit += WARPS) {  // |q| = 1 / sqrt(DK), |k| = 1
        const int p = unit / (2 * DH), head = unit % (2 * DH);
        float *v = (head < DH ? q + head * DK : key + (head - DH) * DK) + p * QD, square = 0.f;
        for (int c = lane; c < DK; c += 32) square = fmaf(v[c], v[c], square);
        float scale = rsqrtf(sum_over<32>(square) + 1e-6f);
        if (head < DH) scale *= rsqrtf((float)DK);
        for (int c = lane; c < DK; c += 32) v[c] *= scale;
    }
    meet();
#pragma unroll 1
    for (int start = 32 * b.warp; start < VC * GV; start += T) {
        const int g = lane % GV, j = min((start + lane) / GV, VC - 1);
        const bool there = start + lane < VC * GV;
        const int h = min((rank * VC + j) / DV, DH - 1);
        float s[KE];
#pragma unroll
        for (int e = 0; e < KE; e++) s[e] = g + GV * e < DK ? state[j * DK + g + GV * e] : 0.f;
#pragma unroll 1
        for (int p = 0; p < P; p++) {
            const float *decay_of = decay + p * DTS_STRIDE, *in = local + p * LOCALS;
            float read = 0.f, out = 0.f, a = 1.f;
            if (!KIMI_RULE) a = exp2f(softplus(decay_of[h] + own[D_DT_BIAS + h]) * own[D_RATE + h]);
#pragma unroll
            for (int e = 0; e < KE; e++) {
                const int at = h * DK + min(g + GV * e, DK - 1);
                s[e] *= KIMI_RULE ? decay_of[at] : a;
                read = fmaf(key[p * QD + at], s[e], read);
            }
            float write = (in[2 * RD + j] - sum_over<GV>(read)) * sigmoid(beta[p * ES + h]);
#pragma unroll
            for (int e = 0; e < KE; e++) {
                const int k = g + GV * e, at = p * QD + h * DK + min(k, DK - 1);
                if (k < DK) s[e] = fmaf(key[at], write, s[e]);
                out = fmaf(q[at], s[e], out);
                if (there && k < DK) b.keep<P>(state + j * DK + k, s[e], p);
            }
            out = sum_over<GV>(out);
            const float gate = in[GATE_AT + j];
            if (there && g == 0) {
                b.out[p * 2 * VC + j] = out;
                b.out[p * 2 * VC + VC + j] = KIMI_RULE ? gate : gate * sigmoid(gate);
            }
        }
    }
    b.give<2 * VC, P, VC * GV>();
    b.mix<VS, P>([&]() {
        b.receive<2 * VC, P>([](int p, int block, int r) {
            return r < VC ? Y + p * YS + block * VC + r : GATES + p * VS + block * VC + r - VC;
        });
#pragma unroll 1
        for (int unit = b.warp; unit < P * DH; unit += WARPS) {
            const int p = unit / DH, head = unit % DH;
            float *v = y + p * YS + head * DV, *open = b.mem + GATES + p * VS + head * DV, square = 0.f;
            for (int c = lane; c < DV; c += 32) square = fmaf(v[c], v[c], square);
            float scale = rsqrtf(sum_over<32>(square) * (1.f / DV) + 1e-5f);
            for (int c = lane; c < DV; c += 32) v[c] *= scale * open[c];
        }
        meet();
    });
}
