// Fused selective scan (Mamba-1), forward and backward.
//
//   dt  = softplus(delta + delta_bias)                     (either part optional)
//   h_t = exp(dt A) h_{t-1} + dt B_t u_t                   h: (channels, states), always fp32
//   y_t = sum_n C_t h_t + D u_t,   out_t = y_t silu(z_t)   (D and the gate optional)
//
// Compiled at run time, so nothing is included: built-ins and inline PTX only (sm_80 and later).
//
// Two families of kernels:
//   any_*   every dtype, state size, channel count and stride; all arithmetic in fp32
//   tile_*  bf16, 16 states, channels a multiple of 8: reductions on the tensor cores
// Both walk time in chunks of 8 steps. The forward stores the state at the start of each chunk; the
// backward reloads it, replays 8 steps keeping h and exp(dt A) in registers, then walks them back.
//
// A sequence may be cut into segments that run side by side. A state-only pass gives every segment's
// end state from zero and its sum of dt; because the recurrence is linear, the state that enters a
// segment is then   h = exp(A sum dt) h + h_end   folded over the segments before it. The adjoint
// state of the backward is cut the same way, from the other end.
//
// Where documents lie one behind another, the decay at the start of each is exactly 0, in a cut too: its
// sum of dt is endless.
//
// Sums never depend on timing: partial sums go to their own slots and are added in index order.

typedef long long i64;
typedef unsigned int u32;

constexpr int CHUNK = 8;  // steps between checkpoints
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr float ENDLESS = 3e38f;  // the dt of a decay of 0

// Strides are in elements; the last axis of every tensor has stride one. Null pointers are allowed
// for z, D, bias and h0. `segment` (a multiple of CHUNK) is the number of steps in a segment. What a segment
// hands over is worked out in `parts` equal pieces of it, of which the sequence has `pieces`.
struct Problem {
    const void *u, *delta, *B, *C, *z;
    const float *A, *D, *bias, *h0;
    const unsigned char *ages;  // (batch, length): steps since the start of the document; null for one
    i64 u_batch, u_time, delta_batch, delta_time, B_batch, B_time, C_batch, C_time, z_batch, z_time;
    i64 batch, length, channels, states, segment, segments, parts, pieces;
    i64 period;       // chunks after which another sequence begins, where several are folded into one
    // From a step of an output to the next one: of y, which is dense, or of du, ddelta and dz. The steps of a
    // sequence follow those of the one before it.
    i64 out_time;
    i64 chunk_bytes;  // the same from chunk to chunk in bf16, in bytes
};

// What the backward reads besides the forward's inputs. dh_end may be null.
struct Upstream {
    const void *dout;
    const float *dh_end;
    i64 dout_batch, dout_time;
};

// Which part of a scan a kernel runs. The passes over states leave out the segment that no other one
// waits for: the last one forwards, the first one backwards.
enum Pass { FULL, STATE_ONLY };

// ------------------------------------------------------------------------------------ scalars

struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ __forceinline__ float to_float(fp16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

__device__ __forceinline__ void put(float *p, float x) { *p = x; }
__device__ __forceinline__ void put(bf16 *p, float x) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(p->bits) : "f"(x));
}
__device__ __forceinline__ void put(fp16 *p, float x) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(x));
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// exp(x) to 2 ulp: the rounding error of x log2(e), up to |x| 6e-8, is put back.
__device__ __forceinline__ float exp_accurate(float x) {
    const float whole = x * LOG2E;
    const float rest = fmaf(x, LOG2E, -whole) + x * 1.9259629911e-8f;
    const float y = exp2_approx(whole);
    return fabsf(whole) < 126.f ? fmaf(y, rest * LN2, y) : y;  // beyond: inf, 0 or nan already
}

// exp(x) as something to multiply by that does not lose slow decay: for |x| < 1/2 it is 1 + part with
// part = exp(x) - 1, else part itself. (The fp32 number next to 1 is 6e-8 away, which a state that
// sums thousands of steps would turn into a visible drift.)
struct Decay {
    float part;
    bool near_one;

    __device__ __forceinline__ explicit Decay(float x) {
        float p = 1.f / 40320;
        p = fmaf(p, x, 1.f / 5040);
        p = fmaf(p, x, 1.f / 720);
        p = fmaf(p, x, 1.f / 120);
        p = fmaf(p, x, 1.f / 24);
        p = fmaf(p, x, 1.f / 6);
        p = fmaf(p, x, .5f);
        p = fmaf(p * x, x, x);
        near_one = fabsf(x) < .5f;
        part = near_one ? p : exp_accurate(x);
    }
    __device__ __forceinline__ Decay(float part, bool near_one) : part(part), near_one(near_one) {}
    // exp(x) h + add
    __device__ __forceinline__ float apply(float h, float add) const {
        return fmaf(part, h, add) + (near_one ? h : 0.f);
    }
};

// softplus(x) = max(x, 0) + log1p(e) with e = exp(-|x|) in (0, 1], and its slope sigmoid(x). log1p(e) =
// 2 atanh(s), s = e / (2 + e) <= 1/3, is an odd series that keeps relative accuracy for tiny e.
__device__ __forceinline__ float softplus_slope(float x, float e) {
    const float r = reciprocal(1.f + e);
    return x >= 0.f ? r : e * r;
}
__device__ __forceinline__ void softplus(const float x, float &value, float &slope) {
    const float e = exp_accurate(-fabsf(x)), s = e * reciprocal(2.f + e), q = s * s;
    float p = 1.f / 15;
#pragma unroll
    for (int k = 7; k >= 1; --k) p = fmaf(p, q, 1.f / (2 * k - 1));
    value = fmaf(2.f * s, p, fmaxf(x, 0.f));
    slope = softplus_slope(x, e);
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + exp2_approx(-LOG2E * x)); }

// Two of them for one reciprocal; 2^-60 stands for what is less.
__device__ __forceinline__ void sigmoids(float x0, float x1, float &s0, float &s1) {
    const float d0 = 1.f + exp2_approx(fminf(-LOG2E * x0, 60.f));
    const float d1 = 1.f + exp2_approx(fminf(-LOG2E * x1, 60.f));
    const float r = reciprocal(d0 * d1);
    s0 = r * d1, s1 = r * d0;
}

// =============================================================================================
// any_*: every dtype, state size and alignment
//
// A channel's states, padded with zeros to NP, lie on NP / 4 neighbouring lanes, four each; a warp
// holds 128 / NP channels and a block four warps. Inputs come straight from global memory.
// =============================================================================================

constexpr int ANY_WARPS = 4;

template <typename T, int NP>
struct AnyLane {
    static constexpr int LANES = NP / 4, CHANNELS = 32 / LANES;
    i64 batch, segment, group, channel, begin, end;
    int state, in_warp;
    bool active;

    __device__ __forceinline__ AnyLane(const Problem &p, i64 first_segment, i64 segments) {
        const i64 per_block = ANY_WARPS * CHANNELS, groups = (p.channels + per_block - 1) / per_block;
        const int lane = threadIdx.x & 31;
        i64 index = blockIdx.x;
        group = index % groups;
        index /= groups;
        segment = first_segment + index % segments;
        batch = index / segments;
        in_warp = lane / LANES;
        state = 4 * (lane % LANES);
        channel = group * per_block + (threadIdx.x >> 5) * CHANNELS + in_warp;
        active = channel < p.channels;
        begin = segment * p.segment;
        end = min(begin + p.segment, p.length);
    }
    __device__ __forceinline__ bool starts(const Problem &p, i64 t) const {
        return p.ages && t < end && p.ages[batch * p.length + t] == 0;
    }
    __device__ __forceinline__ bool holds(const Problem &p, int k) const {
        return active && state + k < p.states;
    }
    // Row of this lane's channel in a (batch, segments, channels) array.
    __device__ __forceinline__ i64 row(const Problem &p, i64 seg) const {
        return (batch * p.segments + seg) * p.channels + channel;
    }
};

// What a segment hands over, after `dt` of decay: x exp(A dt) + end.
__device__ __forceinline__ float handed_over(float x, float A, float dt, float end) {
    return dt >= ENDLESS ? end : fmaf(exp_accurate(A * dt), x, end);
}

template <int LANES>
__device__ __forceinline__ float sum_states(float x) {
#pragma unroll
    for (int s = 1; s < LANES; s *= 2) x += __shfl_xor_sync(~0u, x, s);
    return x;
}

template <typename T>
__device__ __forceinline__ float read(const void *base, i64 offset, bool valid) {
    return valid ? to_float(static_cast<const T *>(base)[offset]) : 0.f;
}

// dt of one step and d dt / d delta; both zero for steps and channels that do not exist, which makes
// such a step the identity on h and on its adjoint.
template <typename T, bool SOFTPLUS>
__device__ __forceinline__ void read_dt(const Problem &p, i64 offset, float bias, bool valid, float &dt,
                                        float &slope) {
    dt = read<T>(p.delta, offset, valid) + bias;
    slope = 1.f;
    if (SOFTPLUS) {
        softplus(dt, dt, slope);
    }
    if (!valid) dt = slope = 0.f;
}

template <typename T, int NP, bool SOFTPLUS, Pass PASS>
__global__ void __launch_bounds__(32 * ANY_WARPS)
any_forward(Problem p, T *out, float *h_end, float *checkpoints, float *segment_h, float *segment_dt) {
    using Lane = AnyLane<T, NP>;
    const Lane lane(p, 0, p.segments - (PASS == STATE_ONLY));
    const bool leader = lane.active && lane.state == 0;

    float A[4], h[4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const bool held = lane.holds(p, k);
        A[k] = held ? p.A[lane.channel * p.states + lane.state + k] : 0.f;
        if (PASS == FULL && p.h0 && held)
            h[k] = p.h0[(lane.batch * p.channels + lane.channel) * p.states + lane.state + k];
    }
    const float bias = p.bias && lane.active ? p.bias[lane.channel] : 0.f;
    const float D = p.D && lane.active ? p.D[lane.channel] : 0.f;
    if (PASS == FULL && lane.active)
        for (i64 s = 0; s < lane.segment; ++s) {
            const i64 row = lane.row(p, s);
            const float dt = segment_dt[row];
#pragma unroll
            for (int k = 0; k < 4; ++k)
                h[k] = handed_over(h[k], A[k], dt, segment_h[row * NP + lane.state + k]);
        }

    const i64 chunks = (p.length + CHUNK - 1) / CHUNK;
    float total = 0.f;
    for (i64 start = lane.begin; start < lane.end; start += CHUNK) {
        if (PASS == FULL && checkpoints && lane.active) {
            float *to = checkpoints +
                        ((lane.batch * chunks + start / CHUNK) * p.channels + lane.channel) * NP;
#pragma unroll
            for (int k = 0; k < 4; ++k) to[lane.state + k] = h[k];
        }
        float chunk_dt = 0.f;
#pragma unroll
        for (int j = 0; j < CHUNK; ++j) {
            const i64 t = start + j;
            const bool valid = lane.active && t < lane.end;
            float dt, slope;
            read_dt<T, SOFTPLUS>(p, lane.batch * p.delta_batch + t * p.delta_time + lane.channel, bias,
                                 valid, dt, slope);
            const float u = read<T>(p.u, lane.batch * p.u_batch + t * p.u_time + lane.channel, valid);
            const bool fresh = lane.starts(p, t);
            float y = 0.f;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const bool held = valid && lane.holds(p, k);
                const i64 n = lane.state + k;
                const float B = read<T>(p.B, lane.batch * p.B_batch + t * p.B_time + n, held);
                const float C = read<T>(p.C, lane.batch * p.C_batch + t * p.C_time + n, held);
                const Decay decay(dt * A[k]);
                h[k] = fresh ? dt * u * B : decay.apply(h[k], dt * u * B);
                y = fmaf(C, h[k], y);
            }
            chunk_dt += fresh ? ENDLESS : dt;
            if (PASS == FULL) {
                y = fmaf(D, u, sum_states<Lane::LANES>(y));
                if (leader && t < lane.end) {
                    if (p.z) {
                        const float z =
                            read<T>(p.z, lane.batch * p.z_batch + t * p.z_time + lane.channel, true);
                        y *= z * sigmoid(z);
                    }
                    put(out + (lane.batch * p.length + t) * p.channels + lane.channel, y);
                }
            }
        }
        total += chunk_dt;
    }
    if (!lane.active) return;
    if (PASS == STATE_ONLY) {
        const i64 row = lane.row(p, lane.segment);
#pragma unroll
        for (int k = 0; k < 4; ++k) segment_h[row * NP + lane.state + k] = h[k];
        if (lane.state == 0) segment_dt[row] = total;
    } else if (lane.end == p.length) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (lane.holds(p, k))
                h_end[(lane.batch * p.channels + lane.channel) * p.states + lane.state + k] = h[k];
    }
}

// The part of the adjoint recurrence that crosses segments: g = exp(dt A) (g + C_t dy_t), backwards.
template <typename T, int NP, bool SOFTPLUS>
__global__ void __launch_bounds__(32 * ANY_WARPS)
any_adjoint(Problem p, Upstream up, float *segment_g, float *segment_dt) {
    const AnyLane<T, NP> lane(p, 1, p.segments - 1);
    float A[4], g[4] = {}, total = 0.f;
#pragma unroll
    for (int k = 0; k < 4; ++k)
        A[k] = lane.holds(p, k) ? p.A[lane.channel * p.states + lane.state + k] : 0.f;
    const float bias = p.bias && lane.active ? p.bias[lane.channel] : 0.f;
    for (i64 t = lane.end - 1; t >= lane.begin; --t) {
        float dt, slope;
        read_dt<T, SOFTPLUS>(p, lane.batch * p.delta_batch + t * p.delta_time + lane.channel, bias,
                             lane.active, dt, slope);
        float dy = read<T>(up.dout, lane.batch * up.dout_batch + t * up.dout_time + lane.channel,
                           lane.active);
        if (p.z) {
            const float z =
                read<T>(p.z, lane.batch * p.z_batch + t * p.z_time + lane.channel, lane.active);
            dy *= z * sigmoid(z);
        }
        const bool fresh = lane.starts(p, t);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float C = read<T>(p.C, lane.batch * p.C_batch + t * p.C_time + lane.state + k,
                                    lane.holds(p, k));
            g[k] = fresh ? 0.f : Decay(dt * A[k]).apply(fmaf(dy, C, g[k]), 0.f);
        }
        total += fresh ? ENDLESS : dt;
    }
    if (!lane.active) return;
    const i64 row = lane.row(p, lane.segment);
#pragma unroll
    for (int k = 0; k < 4; ++k) segment_g[row * NP + lane.state + k] = g[k];
    if (lane.state == 0) segment_dt[row] = total;
}

// Sum over a warp's channels of eight values per lane, by halving: at each level a lane keeps one half
// of its values and adds the partner's copy of it. Afterwards a lane holds KEPT sums, those of
// value numbers first .. first + KEPT - 1, and lanes that differ only in `spare` bits hold the same.
template <int LANES>
struct ChannelSum {
    static constexpr int CHANNELS = 32 / LANES, KEPT = CHANNELS >= 8 ? 1 : 8 / CHANNELS;
    int first = 0;
    bool writes = true;

    __device__ __forceinline__ void run(float (&v)[8]) {
        const int lane = threadIdx.x & 31;
        first = 0;
        writes = true;
#pragma unroll
        for (int stride = 16, count = 8; stride >= LANES; stride /= 2) {
            const bool upper = lane & stride;
            if (count > 1) {
                count /= 2;
#pragma unroll
                for (int k = 0; k < count; ++k) {
                    const float send = upper ? v[k] : v[k + count];
                    const float keep = upper ? v[k + count] : v[k];
                    v[k] = keep + __shfl_xor_sync(~0u, send, stride);
                }
                if (upper) first += count;
            } else {
                v[0] += __shfl_xor_sync(~0u, v[0], stride);
                if (upper) writes = false;
            }
        }
    }
};

template <typename T, int NP, bool SOFTPLUS>
__global__ void __launch_bounds__(32 * ANY_WARPS)
any_backward(Problem p, Upstream up, const float *checkpoints, const float *segment_g,
             const float *segment_dt, T *du, T *ddelta, T *dz, float *dh0, float *partial_BC,
             float *partial_A, float *partial_D, float *partial_bias) {
    using Lane = AnyLane<T, NP>;
    const Lane lane(p, 0, p.segments);
    const int warp = threadIdx.x >> 5;
    const bool leader = lane.active && lane.state == 0;
    __shared__ float sums[ANY_WARPS][CHUNK][2 * NP];  // a chunk's dB | dC, one slice per warp
    ChannelSum<Lane::LANES> over_channels;

    float A[4], g[4] = {}, dA[4] = {}, dD = 0.f, dbias = 0.f;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const bool held = lane.holds(p, k);
        A[k] = held ? p.A[lane.channel * p.states + lane.state + k] : 0.f;
        if (up.dh_end && held)
            g[k] = up.dh_end[(lane.batch * p.channels + lane.channel) * p.states + lane.state + k];
    }
    const float bias = p.bias && lane.active ? p.bias[lane.channel] : 0.f;
    const float D = p.D && lane.active ? p.D[lane.channel] : 0.f;
    if (lane.active)
        for (i64 s = p.segments - 1; s > lane.segment; --s) {
            const i64 row = lane.row(p, s);
            const float dt = segment_dt[row];
#pragma unroll
            for (int k = 0; k < 4; ++k)
                g[k] = handed_over(g[k], A[k], dt, segment_g[row * NP + lane.state + k]);
        }

    const i64 chunks = (p.length + CHUNK - 1) / CHUNK;
    const i64 last = lane.begin + (lane.end - 1 - lane.begin) / CHUNK * CHUNK;
    for (i64 start = last; start >= lane.begin; start -= CHUNK) {
        float h[CHUNK + 1][4], part[CHUNK][4], u[CHUNK], dt[CHUNK], slope[CHUNK], y[CHUNK];
        u32 fresh = 0;  // bit j: a document starts at step j
#pragma unroll
        for (int k = 0; k < 4; ++k)
            h[0][k] = lane.active ? checkpoints[((lane.batch * chunks + start / CHUNK) * p.channels +
                                                 lane.channel) * NP + lane.state + k]
                                  : 0.f;
#pragma unroll
        for (int j = 0; j < CHUNK; ++j) {
            const i64 t = start + j;
            const bool valid = lane.active && t < lane.end;
            read_dt<T, SOFTPLUS>(p, lane.batch * p.delta_batch + t * p.delta_time + lane.channel, bias,
                                 valid, dt[j], slope[j]);
            u[j] = read<T>(p.u, lane.batch * p.u_batch + t * p.u_time + lane.channel, valid);
            y[j] = 0.f;
            if (lane.starts(p, t)) fresh |= 1u << j;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const bool held = valid && lane.holds(p, k);
                const i64 n = lane.state + k;
                const float B = read<T>(p.B, lane.batch * p.B_batch + t * p.B_time + n, held);
                const float C = read<T>(p.C, lane.batch * p.C_batch + t * p.C_time + n, held);
                const Decay decay(dt[j] * A[k]);
                part[j][k] = decay.part;
                h[j + 1][k] = fresh >> j & 1 ? dt[j] * u[j] * B : decay.apply(h[j][k], dt[j] * u[j] * B);
                y[j] = fmaf(C, h[j + 1][k], y[j]);
            }
        }
#pragma unroll
        for (int j = CHUNK - 1; j >= 0; --j) {
            const i64 t = start + j;
            const bool valid = lane.active && t < lane.end;
            const i64 at = (lane.batch * p.length + t) * p.out_time + lane.channel;
            float dy = read<T>(up.dout, lane.batch * up.dout_batch + t * up.dout_time + lane.channel,
                               valid);
            if (p.z) {
                const float z = read<T>(p.z, lane.batch * p.z_batch + t * p.z_time + lane.channel, valid);
                const float s = sigmoid(z), total = fmaf(D, u[j], sum_states<Lane::LANES>(y[j]));
                if (leader && valid) put(dz + at, dy * total * s * fmaf(z, 1.f - s, 1.f));
                dy *= z * s;
            }
            float through_input = 0.f, through_decay = 0.f, terms[8];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const bool held = valid && lane.holds(p, k);
                const i64 n = lane.state + k;
                const float B = read<T>(p.B, lane.batch * p.B_batch + t * p.B_time + n, held);
                const float C = read<T>(p.C, lane.batch * p.C_batch + t * p.C_time + n, held);
                const float gh = fmaf(dy, C, g[k]);
                g[k] = Decay(part[j][k], fabsf(dt[j] * A[k]) < .5f).apply(gh, 0.f);
                if (fresh >> j & 1) g[k] = 0.f;
                const float w = g[k] * h[j][k];  // d / d (dt A)
                dA[k] = fmaf(w, dt[j], dA[k]);
                through_decay = fmaf(w, A[k], through_decay);
                through_input = fmaf(gh, B, through_input);
                terms[k] = gh * (dt[j] * u[j]);
                terms[4 + k] = h[j + 1][k] * dy;
            }
            through_input = sum_states<Lane::LANES>(through_input);
            through_decay = sum_states<Lane::LANES>(through_decay);
            const float dx = fmaf(u[j], through_input, through_decay) * slope[j];
            if (leader && valid) {
                put(du + at, fmaf(through_input, dt[j], D * dy));
                put(ddelta + at, dx);
            }
            dbias += dx;
            dD = fmaf(dy, u[j], dD);
            over_channels.run(terms);
            if (over_channels.writes)
#pragma unroll
                for (int i = 0; i < over_channels.KEPT; ++i) {
                    const int value = over_channels.first + i;
                    sums[warp][j][(value >> 2) * NP + lane.state + (value & 3)] = terms[i];
                }
        }
        __syncthreads();
        const int steps = int(min(i64(CHUNK), lane.end - start));
        for (int i = threadIdx.x; i < steps * 2 * NP; i += 32 * ANY_WARPS) {
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < ANY_WARPS; ++w) sum += (&sums[w][0][0])[i];
            partial_BC[((lane.group * p.batch + lane.batch) * p.length + start) * 2 * NP + i] = sum;
        }
        __syncthreads();
    }
    if (!lane.active) return;
    const i64 row = lane.row(p, lane.segment);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        if (!lane.holds(p, k)) continue;
        partial_A[row * p.states + lane.state + k] = dA[k];
        if (lane.segment == 0 && dh0)
            dh0[(lane.batch * p.channels + lane.channel) * p.states + lane.state + k] = g[k];
    }
    if (leader) {
        partial_D[row] = dD;
        partial_bias[row] = dbias;
    }
}

// Column sums of three row-major arrays with the same number of rows: dA, dD and dbias over batch and
// segments. The kernels that add up dB and dC do it in blocks of their own.
struct RowSums {
    const float *A, *D, *bias;
    i64 rows, width, channels;  // width: columns of A
    float *dA, *dD, *dbias;
};

// 256 threads: 32 columns x 8 row strands; the strands are added in order.
__device__ __forceinline__ void sum_rows(const RowSums &s, i64 block) {
    __shared__ float strands[8][32];
    const int lane = threadIdx.x & 31, strand = threadIdx.x >> 5;
    const i64 columns = s.width + 2 * s.channels, column = block * 32 + lane;
    const float *in = s.A;
    float *to = s.dA;
    i64 stride = s.width, at = column;
    if (column >= s.width) {
        stride = s.channels;
        at = column - s.width;
        in = s.D;
        to = s.dD;
        if (at >= s.channels) {
            at -= s.channels;
            in = s.bias;
            to = s.dbias;
        }
    }
    float sum = 0.f;
    if (column < columns)
        for (i64 row = strand; row < s.rows; row += 8) sum += in[row * stride + at];
    strands[strand][lane] = sum;
    __syncthreads();
    if (strand == 0 && column < columns) {
        for (int k = 1; k < 8; ++k) sum += strands[k][lane];
        to[at] = sum;
    }
}

// dB, dC: (groups, rows, 2, NP) partial sums -> two outputs of `states` columns, whose rows are `stride`
// elements apart, by the first `blocks` blocks.
template <typename T, int NP>
__global__ void any_sums(const float *partial, i64 groups, i64 rows, i64 states, T *dB, T *dC, i64 stride,
                         i64 blocks, RowSums others) {
    if (blockIdx.x >= blocks) return sum_rows(others, blockIdx.x - blocks);
    const i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x, size = rows * 2 * NP;
    if (index >= size) return;
    const i64 row = index / (2 * NP), which = index / NP % 2, n = index % NP;
    if (n >= states) return;
    float sum = 0.f;
    for (i64 group = 0; group < groups; ++group) sum += partial[group * size + index];
    put((which ? dC : dB) + row * stride + n, sum);
}

// =============================================================================================
// tile_*: bf16, 16 states, 8 channels per warp
//
// A warp works alone on a tile of 8 channels x 16 states x 8 steps (one chunk). With
// lane = 4 g + t it holds, of channel g, the states
//
//     s(t, 0..3) = 2t, 2t + 1, 2t + 8, 2t + 9
//
// which is how m16n8k16 lays out both its accumulator (row g, columns 2t, 2t+1 of two 8-wide tiles)
// and its A operand (row g, k = 2t, 2t+1, 2t+8, 2t+9). Hence
//
//   B dt u            is rank-one per step: one MMA gives two steps (rows g and g + 8) of 8 states.
//                     B is bf16 already; the fp32 factor dt u goes in as high + low bf16 parts.
//   sum over states   (y = C h, and B gh) of two steps at a time: A = state tile (tf32 forwards, bf16
//                     backwards), B operand = C (or B) of all 8 steps as its columns. The product of
//                     step j with column j is kept.
//   sum over channels (dB, dC) needs channels along k, which lie along g: movmatrix turns the packed
//                     states of a step.
//
// Work per (step, channel) - softplus, gate, outputs - belongs to the lane that owns channel g at
// steps 2t and 2t+1: ldmatrix.trans hands it both values in one register, movmatrix brings results
// back to rows of channels for the store.
//
// An MMA multiplies masked-out terms by zero, so inf or nan in B_t or C_t spreads to the other steps
// of its chunk, and inf in dt u arrives as nan. Nothing not finite is ever lost.
// =============================================================================================

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ __forceinline__ float low_bf16(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_bf16(u32 x) { return __uint_as_float(x & 0xffff0000u); }

// d += a b, bf16 operands.
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// d += a b, tf32 operands (fp32 numbers of which the tensor core reads 11 bits of significand).
__device__ __forceinline__ void mma_k8(float (&d)[4], float a0, float a1, float a2, float a3, float b0,
                                       float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
          "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
// 1 where the mask's bits are set, else 0.
__device__ __forceinline__ float ones(u32 mask) { return __uint_as_float(mask & 0x3f800000u); }

__device__ __forceinline__ u32 transpose_8x8(u32 x) {
    u32 r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
    return r;
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_matrices(u32 (&r)[2], u32 address) {  // two: lanes 0 to 15
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void put_pair(u32 address, float x0, float x1) {
    asm volatile("st.shared.v2.f32 [%0], {%1,%2};" :: "r"(address), "f"(x0), "f"(x1) : "memory");
}
__device__ __forceinline__ float4 load_shared(u32 address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}
__device__ __forceinline__ void store_shared(u32 address, u32 x, u32 y, u32 z, u32 w) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};"
                 :: "r"(address), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
__device__ __forceinline__ void store_shared(u32 address, float x, float y, float z, float w) {
    store_shared(address, __float_as_uint(x), __float_as_uint(y), __float_as_uint(z), __float_as_uint(w));
}

// 16 bytes from global to shared memory, zeros unless valid; nothing unless wanted.
__device__ __forceinline__ void copy_async(u32 to, const char *from, bool valid, bool wanted = true) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0; "
                 "@p cp.async.ca.shared.global [%0], [%1], 16, %2; }"
                 :: "r"(to), "l"(from), "r"(valid ? 16 : 0), "r"(u32(wanted)) : "memory");
}

// Keeps a lane's value in a register: the compiler, which no longer knows where it came from, would else
// derive it again in every chunk.
__device__ __forceinline__ u32 opaque(u32 x) { return __shfl_sync(~0u, x, threadIdx.x & 31); }

// base + i step, as the one instruction that it is.
__device__ __forceinline__ const char *advance(const char *base, int step, int i) {
    i64 r;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(r) : "r"(step), "r"(i), "l"(i64(base)));
    return reinterpret_cast<const char *>(r);
}

// A phased barrier in shared memory on which a warp may arrive now and wait later.
struct PhasedBarrier {
    u32 address;

    __device__ __forceinline__ void init(int arrivals) const {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(address), "r"(arrivals) : "memory");
    }
    __device__ __forceinline__ void arrive() const {
        asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }"
                     :: "r"(address) : "memory");
    }
    // Arrive once the thread's copies so far are done.
    __device__ __forceinline__ void arrive_after_copies() const {
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(address) : "memory");
    }
    __device__ __forceinline__ void wait(u32 parity) const {
        u32 done;
        do {
#if __CUDA_ARCH__ >= 900  // suspends the warp for a while instead of spinning
            asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; "
                         "selp.u32 %0, 1, 0, p; }"
                         : "=r"(done) : "r"(address), "r"(parity) : "memory");
#else
            asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; "
                         "selp.u32 %0, 1, 0, p; }"
                         : "=r"(done) : "r"(address), "r"(parity) : "memory");
#endif
        } while (!done);
    }
};

// Of two steps' delta, for which zeros were copied, -inf for those past the end, of which `left` are not.
__device__ __forceinline__ void mark_steps_past_end(u32 &delta, int left) {
    if (left < 1) delta = (delta & 0xffff0000u) | 0xff80u;
    if (left < 2) delta = (delta & 0xffffu) | 0xff800000u;
}

// What the host encodes: arrays (.., channels / 8 or 2, time, 8) of which a box is copied.
struct alignas(64) TensorMap { unsigned long long words[16]; };
struct TensorMaps { TensorMap of[6]; };  // as in Tensor, then B and C

// Copies that the barrier counts in bytes. One thread asks for them.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap *map, int time, int group, int batch,
                                         u32 barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];"
                 :: "r"(to), "l"(map), "r"(0), "r"(time), "r"(group), "r"(batch), "r"(barrier) : "memory");
}
__device__ __forceinline__ void copy_bulk(u32 to, const void *from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }"
                 :: "r"(barrier), "r"(bytes) : "memory");
}
// True in one lane of the warp, which the compiler then knows to be alone.
__device__ __forceinline__ bool elected() {
    u32 chosen;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(chosen));
    return chosen;
}
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.proxy.async;" ::: "memory");
}

__device__ __forceinline__ void store_if(bool valid, char *to, u32 x) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.b32 [%1], %2; }"
                 :: "r"(u32(valid)), "l"(to), "r"(x) : "memory");
}

__device__ __forceinline__ u32 shared_address(const void *p) { return u32(__cvta_generic_to_shared(p)); }

// Programmatic launches (sm_90). A kernel launched so may start when every block of the one before it has
// called before_next_kernel() or ended, and may read its results after after_previous_kernel(). Launched in
// the common way, both do nothing.
__device__ __forceinline__ void before_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void after_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct TileLane {
    int lane, g, t, warp;
    bool active;  // a warp past the last channel works on zeros and writes nothing
    i64 batch, segment, group, channel, begin, end;

    template <int WARPS>
    __device__ __forceinline__ static TileLane make(const Problem &p, i64 first_segment, i64 segments) {
        TileLane l;
        const i64 groups = (p.channels / 8 + WARPS - 1) / WARPS;
        l.lane = threadIdx.x & 31;
        l.warp = threadIdx.x >> 5;
        l.g = l.lane >> 2;
        l.t = l.lane & 3;
        i64 index = blockIdx.x;
        l.group = index % groups;
        index /= groups;
        l.segment = first_segment + index % segments;
        l.batch = index / segments;
        const i64 tile = l.group * WARPS + l.warp, tiles = p.channels / 8;
        l.active = tile < tiles;
        l.channel = min(tile, tiles - 1) * 8 + l.g;
        l.begin = l.segment * p.segment;
        l.end = min(l.begin + p.segment, p.length);
        return l;
    }
    __device__ __forceinline__ i64 row(const Problem &p, i64 seg) const {
        return (batch * p.segments + seg) * p.channels + channel;
    }
    // Folds what the pieces [from, to) hand over into a state, in this or the opposite order.
    template <bool DOWNWARDS>
    __device__ __forceinline__ void fold(const Problem &p, float (&x)[4], const float (&A)[4], i64 from, i64 to,
                                         const float *piece_x, const float *piece_dt) const {
        const int count = int(to - from);
        i64 at = (batch * p.pieces + (DOWNWARDS ? to - 1 : from)) * p.channels + channel;
        const i64 step = DOWNWARDS ? -p.channels : p.channels;
#pragma unroll 8
        for (int s = 0; s < count; ++s) {
            const float dt = piece_dt[at];
            float end[4];
            read_states(end, piece_x, at);
#pragma unroll
            for (int k = 0; k < 4; ++k) x[k] = fmaf(exp2_approx(A[k] * dt), x[k], end[k]);
            at += step;
        }
    }
    // Four values of a (.., channels, 16) array in this lane's state order.
    __device__ __forceinline__ void read_states(float (&v)[4], const float *base, i64 row) const {
        const float2 *at = reinterpret_cast<const float2 *>(base + row * 16) + t;
        const float2 low = at[0], high = at[4];
        v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
    }
    __device__ __forceinline__ void write_states(float *base, i64 row, const float (&v)[4]) const {
        float2 *at = reinterpret_cast<float2 *>(base + row * 16) + t;
        at[0] = make_float2(v[0], v[1]);
        at[4] = make_float2(v[2], v[3]);
    }
};

// The block's ring of chunks in shared memory, filled by all threads in the order of the global rows
// (a warp's own 16 bytes of a row would waste half of each sector) and read by each warp on its own.
// A warp never waits for the others as long as they are less than two chunks behind.
//
// A stage: per warp a tile of 8 rows x 16 bytes of each of u, delta, z, dout, padded against bank
// conflicts; the block's B states 0-7, 8-15, C 0-7, 8-15, 8 x 16 bytes each; per warp a checkpoint.
enum Tensor { U, DELTA, Z, DOUT };

template <int WARPS, bool BACKWARD, bool SOFTPLUS, int STAGES, int AHEAD, int EXTRA = 0>
struct TileRing {
    static constexpr int NONE = 1 << 30;
    static_assert(WARPS >= 4, "the forward has B and C copied by the threads of the fourth tensor");
    static constexpr int TILE = 4 * 128 + 16;
    static constexpr u32 STATES = WARPS * TILE, CHECKPOINTS = STATES + 512,
                         FILLED = CHECKPOINTS + (BACKWARD ? WARPS * 256 : 0), EMPTIED = FILLED + 8,
                         SUMS = FILLED + 16, STAGE = SUMS + EXTRA, BYTES = STAGES * STAGE;

    __device__ __forceinline__ static u32 rows_offset(const TileLane &l) {
        return l.warp * TILE + 16 * l.lane;
    }

    const char *from, *from_second;  // in the first chunk
    int step, step_second, fetched;  // bytes from chunk to chunk; chunks asked for
    u32 to, to_second;
    u32 reading, writing, end;  // stages in turn
    u32 reading_phase, writing_phase;
    int row, row_second;  // of the chunk; NONE: nothing to copy
    bool second, delta;

    // Chunks upwards (direction 1) or downwards (-1) from step `first`. A null tensor is skipped.
    // Ends with a barrier of the block.
    __device__ __forceinline__ void start(const Problem &p, const TileLane &l, u32 address, i64 first,
                                          int direction, const Upstream &up, const uint2 *checkpoints,
                                          const void *u, const void *z, const void *B, const void *C) {
        reading = writing = address;
        end = address + BYTES;
        reading_phase = 0;
        writing_phase = 1;  // a wait for the phase before the first one passes
        const int thread = threadIdx.x, tensor = thread / (8 * WARPS), tile = thread % WARPS;
        const i64 channel = (l.group * WARPS + tile) * 8;
        const void *source = tensor == U ? u : tensor == DELTA ? p.delta : tensor == Z ? z : up.dout;
        const i64 batch = tensor == U ? p.u_batch : tensor == DELTA ? p.delta_batch
                          : tensor == Z ? p.z_batch : up.dout_batch;
        const i64 time = tensor == U ? p.u_time : tensor == DELTA ? p.delta_time
                         : tensor == Z ? p.z_time : up.dout_time;
        row = thread / WARPS % 8;
        delta = tensor == DELTA;
        from = static_cast<const char *>(source) + 2 * (l.batch * batch + (first + row) * time + channel);
        step = int(opaque(u32(16 * direction * time)));  // CHUNK elements are 16 bytes
        fetched = int(opaque(0));
        to = tile * TILE + tensor * 128 + row * 16;
        if (source == nullptr || channel >= p.channels) row = NONE;

        // B and C: the last 32 pieces. The forward has threads to spare instead of dout.
        const int piece = thread - (BACKWARD ? 16 : 24) * WARPS;
        const bool is_C = piece >= 16;
        const void *states = is_C ? C : B;
        const i64 s_time = is_C ? p.C_time : p.B_time;
        const int s_row = states == nullptr ? NONE : piece & 7;
        const char *s_from = static_cast<const char *>(states) +
                             2 * (l.batch * (is_C ? p.C_batch : p.B_batch) + (first + s_row) * s_time +
                                  8 * (piece >> 3 & 1));
        const int s_step = int(16 * direction * s_time);
        const u32 s_to = STATES + 16 * piece;
        second = false;
        if (BACKWARD) {
            second = piece < 32;
            from_second = s_from, step_second = s_step, to_second = s_to, row_second = s_row;
            if (piece < 0) {
                const i64 chunks = (p.length + CHUNK - 1) / CHUNK, at = l.group * WARPS * 8 + thread / 2;
                from_second = reinterpret_cast<const char *>(
                    checkpoints + ((l.batch * chunks + first / CHUNK) * p.channels + at) * 4 +
                    thread % 2 * 2);
                step_second = int(direction * 32 * p.channels);
                to_second = CHECKPOINTS + 16 * thread;
                row_second = checkpoints && at < p.channels ? 0 : NONE;
            }
        } else if (piece >= 0 && piece < 32) {
            from = s_from, step = s_step, to = s_to, row = s_row;
        }
        step_second = BACKWARD ? int(opaque(u32(step_second))) : 0;
        if (thread < STAGES) {
            PhasedBarrier{address + thread * STAGE + FILLED}.init(32 * WARPS);
            PhasedBarrier{address + thread * STAGE + EMPTIED}.init(32 * WARPS);
        }
        __syncthreads();
    }
    __device__ __forceinline__ void turn(u32 &stage, u32 &phase) const {
        stage += STAGE;
        if (stage == end) stage -= BYTES, phase ^= 1;
    }
    // Wait until every thread has released the stage that the next fetch fills.
    __device__ __forceinline__ void wait_emptied() const {
        PhasedBarrier{writing + EMPTIED}.wait(writing_phase);
    }
    // Ask for the next chunk, of `left` steps. Steps past the end get zeros, but delta = -inf.
    __device__ __forceinline__ void fetch(int left) {
        fetch(writing, left);
        turn(writing, writing_phase);
    }
    __device__ __forceinline__ void fetch(u32 stage, int left) {
        if (SOFTPLUS && left < CHUNK && delta && row >= left) {
            const u32 inf = 0xff80ff80u;  // two bf16 -inf
            store_shared(stage + to, inf, inf, inf, inf);
        } else {
            copy_async(stage + to, advance(from, step, fetched), row < left);
        }
        if (BACKWARD)
            copy_async(stage + to_second, advance(from_second, step_second, fetched), row_second < left, second);
        ++fetched;
        const PhasedBarrier filled{stage + FILLED};
        if (left < CHUNK) {  // the plain store above takes a plain arrival to be seen
            asm volatile("cp.async.wait_all;" ::: "memory");
            filled.arrive();
        } else {
            filled.arrive_after_copies();
        }
    }
    __device__ __forceinline__ void wait_filled() const {
        PhasedBarrier{reading + FILLED}.wait(reading_phase);
    }
    // The thread has read what it needs of it. (One arrival for a warp, after __syncwarp(), would do, but
    // is no faster and racecheck does not follow it.)
    __device__ __forceinline__ void release(u32 stage) const {
        PhasedBarrier{stage + EMPTIED}.arrive();
    }
};

// For the backward on sm_90: filled by one thread, a tensor's part of a stage is a box that the copy engine
// cuts out. Steps and channels that do not exist get zeros. A warp's tile of a tensor is 8 rows x 16 bytes.
constexpr int SUMS_BYTES = 64 * 16;  // of a warp of tile_backward, for dB and dC

template <int WARPS, bool GATED, int STAGES>
struct BoxRing {
    static constexpr u32 TENSOR = WARPS * 128, STATES = 4 * TENSOR, CHECKPOINTS = STATES + 512,
                         SUMS = CHECKPOINTS + WARPS * 256, FILLED = SUMS + WARPS * SUMS_BYTES,
                         STAGE = FILLED + 128, BYTES = STAGES * STAGE;  // boxes are copied to 128 bytes

    const TensorMaps *maps;
    const uint2 *saved;  // checkpoints of the first chunk
    i64 saved_step;
    u32 saved_bytes;
    int time, group, batch;

    __device__ __forceinline__ static u32 rows_offset(const TileLane &l) {
        return l.warp * 128 + (l.lane >> 3) * TENSOR + 16 * (l.lane & 7);
    }
    __device__ __forceinline__ void start(const Problem &p, const TileLane &l, u32 address, const TensorMaps &all,
                                          const uint2 *checkpoints, int warps) {
        maps = &all;
        time = int(l.begin), group = int(l.group) * WARPS, batch = int(l.batch);
        const i64 chunks = (p.length + CHUNK - 1) / CHUNK;
        saved = checkpoints + ((l.batch * chunks + l.begin / CHUNK) * p.channels + l.group * WARPS * 8) * 4;
        saved_step = p.channels * 4;
        saved_bytes = warps * 256;
        if (threadIdx.x < STAGES) {
            PhasedBarrier{address + STAGE * threadIdx.x + FILLED}.init(1);
            publish_barriers();
        }
        if (!l.active) {  // nothing is copied there
#pragma unroll
            for (int s = 0; s < STAGES; ++s)
                put_pair(address + s * STAGE + CHECKPOINTS + 256 * l.warp + 8 * l.lane, 0.f, 0.f);
        }
        __syncthreads();
    }
    // One thread: ask for the chunk that begins `first` steps after the segment.
    __device__ __forceinline__ void fetch(u32 stage, int first) const {
        const u32 barrier = stage + FILLED;
        const int row = time + first;
        arrive_expecting(barrier, (4 - !GATED) * TENSOR + 512 + saved_bytes);
        copy_box(stage + U * TENSOR, &maps->of[U], row, group, batch, barrier);
        copy_box(stage + DELTA * TENSOR, &maps->of[DELTA], row, group, batch, barrier);
        if (GATED) copy_box(stage + Z * TENSOR, &maps->of[Z], row, group, batch, barrier);
        copy_box(stage + DOUT * TENSOR, &maps->of[DOUT], row, group, batch, barrier);
        copy_box(stage + STATES, &maps->of[4], row, 0, batch, barrier);
        copy_box(stage + STATES + 256, &maps->of[5], row, 0, batch, barrier);
        copy_bulk(stage + CHECKPOINTS, saved + first / CHUNK * saved_step, saved_bytes, barrier);
    }
};

template <bool FIRST, class A, class B> struct Choose { using type = A; };
template <class A, class B> struct Choose<false, A, B> { using type = B; };

// x of the owner's two steps (low half: first step) in two bf16 parts, x = high + low to 17 bits.
struct SplitPair {
    u32 high, low;
    __device__ __forceinline__ SplitPair(float x0, float x1) {
        high = pack_bf16(x0, x1);
        low = pack_bf16(x0 - low_bf16(high), x1 - high_bf16(high));
    }
};

// x_j B_j of steps j = 2i (first) and 2i + 1 (second), for the states s(t, k).
//
// `both` holds the transposed tile of B twice over: state g (then g + 8) at the owner's steps 2t, 2t+1.
// Rows g of A take the first step from k = 2t (high part) and 2t+8 (low part), rows g + 8 the second
// one from k = 2t+1 and 2t+9. Only the lanes t = i, which own these steps, put x into the product.
__device__ __forceinline__ void outer(u32 x_high, u32 x_low, u32 own, const u32 (&both)[4],
                                      float (&first)[4], float (&second)[4]) {
    const u32 a0 = x_high & own & 0xffffu, a1 = x_high & own & 0xffff0000u;
    const u32 a2 = x_low & own & 0xffffu, a3 = x_low & own & 0xffff0000u;
    float d[2][4] = {};
    mma(d[0], a0, a1, a2, a3, both[0], both[1]);
    mma(d[1], a0, a1, a2, a3, both[2], both[3]);
    first[0] = d[0][0], first[1] = d[0][1], first[2] = d[1][0], first[3] = d[1][1];
    second[0] = d[0][2], second[1] = d[0][3], second[2] = d[1][2], second[3] = d[1][3];
}

// Sums over states of two steps: d[0] = sum_n first[n] w[n], at the lanes that own the first step, d[3]
// the same of `second` at the lanes that own the second one; w is given at step g, states s(t, k).
__device__ __forceinline__ void sum_over_states(float (&d)[4], const float (&first)[4],
                                                const float (&second)[4], const float (&w)[4]) {
    mma_k8(d, first[0], second[0], first[1], second[1], w[0], w[1]);
    mma_k8(d, first[2], second[2], first[3], second[3], w[2], w[3]);
}

// Offsets of a lane's row for ldmatrix: matrices in order, or the two of B (or C) each twice.
__device__ __forceinline__ u32 matrix_row(const TileLane &l) { return 16 * l.lane; }
__device__ __forceinline__ u32 doubled_row(const TileLane &l) {
    return 128 * (l.lane >> 4) + 16 * (l.lane & 7);
}

// Values of the owner's two steps (put_pair at room + 8 lane) -> those of all eight steps of channel g
// (read at room + 32 g).
__device__ __forceinline__ void get_steps(u32 address, float (&x)[8]) {
    const float4 low = load_shared(address), high = load_shared(address + 16);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

// dt of one step and d dt / d delta. log1p(e) = e p(e), a polynomial good to 1.3e-6 (relative): one
// division less than the series of softplus(). Without softplus `valid` masks steps past the end; with
// it, the ring has set their delta to -inf, and dt = slope = 0 come by themselves.
template <bool SOFTPLUS, bool SHORT = false>
__device__ __forceinline__ void tile_dt(float x, bool valid, float &dt, float &slope) {
    if (SOFTPLUS) {
        const float e = exp2_approx(-LOG2E * fabsf(x));
        float p;
        if (SHORT) {
            p = -0.023869153f;
            p = fmaf(p, e, 0.1012223f);
            p = fmaf(p, e, -0.21004872f);
            p = fmaf(p, e, 0.3252067f);
            p = fmaf(p, e, -0.49936137f);
            p = fmaf(p, e, 0.9999916f);
        } else {
            p = 0.01414102f;
            p = fmaf(p, e, -0.066401787f);
            p = fmaf(p, e, 0.14922386f);
            p = fmaf(p, e, -0.23503859f);
            p = fmaf(p, e, 0.33109447f);
            p = fmaf(p, e, -0.49986964f);
            p = fmaf(p, e, 0.99999875f);
        }
        dt = fmaf(p, e, fmaxf(x, 0.f));
        slope = softplus_slope(x, e);
    } else {
        dt = valid ? x : 0.f;
        slope = valid ? 1.f : 0.f;
    }
}

// The ages of the two steps of an owner lane, of the chunk that begins `at` steps into its segment of
// `length`; of steps that do not exist, 1. Read while the chunk before is walked.
struct Ages {
    u32 first, second;
    __device__ __forceinline__ Ages() : first(1), second(1) {}
    __device__ __forceinline__ void read(const Problem &p, const TileLane &l, int at, int length) {
        const int t = at + 2 * l.t;
        const unsigned char *from = p.ages + l.batch * p.length + l.begin + t;
        first = at >= 0 && t < length ? from[0] : 1;
        second = at >= 0 && t + 1 < length ? from[1] : 1;
    }
};
template <bool DOCUMENTS>
__device__ __forceinline__ void put_decays(u32 to, float dt0, float dt1, const Ages &ages) {
    put_pair(to, DOCUMENTS && ages.first == 0 ? ENDLESS : dt0, DOCUMENTS && ages.second == 0 ? ENDLESS : dt1);
}
// With an endless dt, A = 0 has to decay too: below the smallest number that does nothing else.
__device__ __forceinline__ void let_decay(float (&A)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
        if (A[k] > -1e-35f && A[k] <= 0.f) A[k] = -1e-35f;
}

// Four masks in one register: all bits of mask `which` are set, none of the others.
struct Masks {
    u32 bytes;
    __device__ __forceinline__ explicit Masks(int which) : bytes(opaque(0xffu << (8 * which))) {}
    __device__ __forceinline__ void unpack(u32 (&mask)[4]) const {
        u32 x = bytes;
        asm volatile("" : "+r"(x));  // not to be hoisted out of the loop over chunks
#pragma unroll
        for (int i = 0; i < 4; ++i) mask[i] = __byte_perm(x, 0, 0x1111 * i);
    }
};

// FOLDED: a sequence of `p` is several, of p.period whole chunks each, that begin at zero. DOCUMENTS: there
// are ages; where one is 0, the dt in the room is endless, and the dt of what is written is not.
template <bool GATED, bool SOFTPLUS, int WARPS, int BLOCKS, bool FOLDED, bool DOCUMENTS>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS)
tile_forward(Problem p, char *out, float *h_end, char *checkpoints, const float *segment_h,
             const float *segment_dt) {
    constexpr int AHEAD = 5;
    using Ring = TileRing<WARPS, false, SOFTPLUS, 8, AHEAD>;
    extern __shared__ __align__(128) char shared[];  // the ring; a room a warp for dt of a chunk
    const u32 ring_room = shared_address(shared);
    const TileLane l = TileLane::make<WARPS>(p, 0, p.segments);
    const u32 room = ring_room + Ring::BYTES + 256 * l.warp;
    const u32 dt_to = opaque(room + 8 * l.lane), dt_from = opaque(room + 32 * l.g);
    const u32 rows_at = opaque(Ring::rows_offset(l));
    const u32 states_at = opaque(Ring::STATES + doubled_row(l));
    const u32 C_at = opaque(Ring::STATES + 256 + matrix_row(l) % 256);
    const Masks owners(l.t);  // mask i: the lanes that own steps 2i and 2i + 1
    const int length = int(l.end - l.begin);
    const i64 chunks = (p.length + CHUNK - 1) / CHUNK;

    Ring ring;
    ring.start(p, l, ring_room, l.begin, 1, Upstream{}, nullptr, p.u, GATED ? p.z : nullptr, p.B, p.C);
#pragma unroll
    for (int c = 0; c < AHEAD; ++c)
        if (length > c * CHUNK) ring.fetch(length - c * CHUNK);

    const bool saves = opaque(checkpoints && l.active);
    float A[4], h[4] = {};
    l.read_states(A, p.A, l.channel);
#pragma unroll
    for (int k = 0; k < 4; ++k) A[k] *= LOG2E;
    if (DOCUMENTS) let_decay(A);
    const float bias = p.bias ? p.bias[l.channel] : 0.f, D = p.D ? p.D[l.channel] : 0.f;
    if (p.h0) l.read_states(h, p.h0, l.batch * p.channels + l.channel);
    after_previous_kernel();
    l.fold<false>(p, h, A, 0, l.segment * p.parts, segment_h, segment_dt);
    checkpoints += 8 * (((l.batch * chunks + l.begin / CHUNK) * p.channels + l.channel) * 4 + l.t);
    int rows_left = int(opaque(l.active ? length - l.g : 0));
    out += 2 * ((l.batch * p.length + l.begin + l.g) * p.channels + l.channel - l.g) + 4 * l.t;

    // The owners' part of a chunk, made ready while the chunk before it is walked. dt goes to the room.
    struct Ready {
        u32 u, z;
        SplitPair x;
        __device__ __forceinline__ Ready() : x(0.f, 0.f) {}
    } next;
    u32 rows[4] = {};
    const auto prepare = [&](int left, const Ages &ages) {
        float dt0, dt1, slope;
        tile_dt<SOFTPLUS>(low_bf16(rows[DELTA]) + bias, 2 * l.t < left, dt0, slope);
        tile_dt<SOFTPLUS>(high_bf16(rows[DELTA]) + bias, 2 * l.t + 1 < left, dt1, slope);
        put_decays<DOCUMENTS>(dt_to, dt0, dt1, ages);
        next.u = rows[U], next.z = rows[Z];
        next.x = SplitPair(dt0 * low_bf16(rows[U]), dt1 * high_bf16(rows[U]));
    };
    int until = int(p.period);
    if (FOLDED) h_end += (l.batch * (p.length / CHUNK / p.period) * p.channels + l.channel) * 16;
    ring.wait_filled();
    load_transposed(rows, ring.reading + rows_at);
    Ages ages;
    if (DOCUMENTS) ages.read(p, l, 0, length);
    prepare(length, ages);
    for (int left = length; left > 0; left -= CHUNK) {
        const Ready now = next;
        if (DOCUMENTS) ages.read(p, l, length - left + CHUNK, length);
        const u32 from = ring.reading;
        u32 own[4], B[4], C[2];
        float dt[8];
        owners.unpack(own);
        __syncwarp();
        load_transposed(B, from + states_at);
        get_steps(dt_from, dt);
        load_matrices(C, from + C_at);
        ring.turn(ring.reading, ring.reading_phase);
        if (left > AHEAD * CHUNK) {
            ring.wait_emptied();
            if (left >= (AHEAD + 1) * CHUNK) {
                ring.fetch(CHUNK);
            } else {
                ring.fetch(left - AHEAD * CHUNK);
            }
        }
        if (saves)
            *reinterpret_cast<uint2 *>(checkpoints) =
                make_uint2(pack_bf16(h[0], h[1]), pack_bf16(h[2], h[3]));
        checkpoints += 2 * p.chunk_bytes;
        if (left > CHUNK) ring.wait_filled();
        load_transposed(rows, ring.reading + rows_at);
        ring.release(from);
        __syncwarp();  // every lane has read dt

        float y0 = 0.f, y1 = 0.f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // The decays first: the special functions are what the forward waits for.
            float decay[2][4], first[4], second[4], sum[4] = {};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                decay[0][k] = exp2_approx(A[k] * dt[2 * i]);
                decay[1][k] = exp2_approx(A[k] * dt[2 * i + 1]);
            }
            outer(now.x.high, now.x.low, own[i], B, first, second);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                first[k] = fmaf(decay[0][k], h[k], first[k]);
                second[k] = fmaf(decay[1][k], first[k], second[k]);
                h[k] = second[k];
            }
            const float c[4] = {low_bf16(C[0]), high_bf16(C[0]), low_bf16(C[1]), high_bf16(C[1])};
            sum_over_states(sum, first, second, c);
            if (l.t == i) y0 = sum[0], y1 = sum[3];
        }
        prepare(left - CHUNK, ages);
        y0 = fmaf(D, low_bf16(now.u), y0), y1 = fmaf(D, high_bf16(now.u), y1);
        if (GATED) {
            const float z0 = low_bf16(now.z), z1 = high_bf16(now.z);
            float s0, s1;
            sigmoids(z0, z1, s0, s1);
            y0 *= z0 * s0, y1 *= z1 * s1;
        }
        const u32 row = transpose_8x8(pack_bf16(y0, y1));
        store_if(rows_left > 0, out, row);
        rows_left -= CHUNK;
        out += p.chunk_bytes;
        if (FOLDED && --until == 0) {
            until = int(p.period);
            if (l.active) l.write_states(h_end, 0, h);
            h_end += p.channels * 16;
#pragma unroll
            for (int k = 0; k < 4; ++k) h[k] = 0.f;
        }
    }
    if (!FOLDED && l.active && l.end == p.length) l.write_states(h_end, l.batch * p.channels + l.channel, h);
}

// What a segment hands to the next one: its end state from a zero one at its start, or (ADJOINT) to the one
// before it: its start's adjoint state from a zero one at its end. Both are
//
//     sum_t exp(A S_t) x_t V_t      S_t: the sum of dt between step t and where it is handed over,
//
// with x V = dt u B or dy C. Here a segment of `p` is a piece of the consumer's segments; `first` and `count`
// say which pieces somebody waits for. The walk starts where the sum is handed over. Once exp(A S) is below
// 2^-24 in all of a warp's channels (dt >= 0, so it stays there), what is further away is only looked at for
// inf and nan, which it hands on. So the error is below 2^-24 of the largest state of the sequence: small beside
// bf16 everywhere but where inputs are a million times larger than those long after them.
constexpr float FORGOTTEN = -24.f;

// Two bf16 numbers: nan where x ever was not finite, else 0.
__device__ __forceinline__ void note_not_finite(u32 &seen, u32 x) {
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(seen) : "r"(x), "r"(0));
}
__device__ __forceinline__ u32 max_bf16x2_or_nan(u32 x, u32 y) {
    u32 r;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
    return r;
}
__device__ __forceinline__ float sum_over_owners(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

template <bool ADJOINT, bool GATED, bool SOFTPLUS, int WARPS, bool DOCUMENTS>
__global__ void __launch_bounds__(32 * WARPS)
tile_carry(Problem p, Upstream up, float *segment_x, float *segment_dt, i64 first, i64 count) {
    before_next_kernel();
    constexpr int AHEAD = 5;
    using Ring = TileRing<WARPS, ADJOINT, SOFTPLUS, 8, AHEAD>;
    __shared__ __align__(128) char ring_room[Ring::BYTES];
    __shared__ __align__(128) char rooms[WARPS][256];  // dt of a chunk
    const TileLane l = TileLane::make<WARPS>(p, first, count);
    const u32 dt_to = opaque(shared_address(rooms[l.warp]) + 8 * l.lane);
    const u32 dt_from = opaque(shared_address(rooms[l.warp]) + 32 * l.g);
    const u32 rows_at = opaque(l.warp * Ring::TILE + matrix_row(l));
    const u32 V_at = opaque(Ring::STATES + (ADJOINT ? 256 : 0) + doubled_row(l));
    const Masks owners(l.t);  // mask i: the lanes that own steps 2i and 2i + 1
    const int length = int(l.end - l.begin);  // whole chunks, but for the last segment, the adjoint's

    Ring ring;
    ring.start(p, l, shared_address(ring_room), ADJOINT ? l.begin : l.end - CHUNK, ADJOINT ? 1 : -1, up,
               nullptr, ADJOINT ? nullptr : p.u, ADJOINT && GATED ? p.z : nullptr, ADJOINT ? nullptr : p.B,
               ADJOINT ? p.C : nullptr);
#pragma unroll
    for (int c = 0; c < AHEAD; ++c)
        if (length > c * CHUNK) ring.fetch(ADJOINT ? length - c * CHUNK : CHUNK);

    float A[4], sum[4] = {}, distance = 0.f;
    l.read_states(A, p.A, l.channel);
#pragma unroll
    for (int k = 0; k < 4; ++k) A[k] *= LOG2E;
    if (DOCUMENTS) let_decay(A);
    const float bias = p.bias ? p.bias[l.channel] : 0.f;
    const float slowest = fmaxf(fmaxf(A[0], A[1]), fmaxf(A[2], A[3]));

    // The owners' part of a chunk, made ready while the one before is walked. dt goes to the room.
    SplitPair next(0.f, 0.f);
    u32 rows[4] = {}, V[4];
    int left = length;  // steps not walked yet
    Ages ages;
    // Of the chunk that is walked when `left` steps are not yet.
    const auto read_ages = [&](int left) {
        if (DOCUMENTS) ages.read(p, l, ADJOINT ? length - left : left - CHUNK, length);
    };
    const auto prepare = [&](int left) {
        float dt0, dt1, slope;
        tile_dt<SOFTPLUS>(low_bf16(rows[DELTA]) + bias, 2 * l.t < left, dt0, slope);
        tile_dt<SOFTPLUS>(high_bf16(rows[DELTA]) + bias, 2 * l.t + 1 < left, dt1, slope);
        put_decays<DOCUMENTS>(dt_to, dt0, dt1, ages);
        float x0 = dt0 * low_bf16(rows[U]), x1 = dt1 * high_bf16(rows[U]);
        if (ADJOINT) {
            x0 = low_bf16(rows[DOUT]), x1 = high_bf16(rows[DOUT]);
            if (GATED) {
                const float z0 = low_bf16(rows[Z]), z1 = high_bf16(rows[Z]);
                float s0, s1;
                sigmoids(z0, z1, s0, s1);
                x0 *= z0 * s0, x1 *= z1 * s1;
            }
        }
        next = SplitPair(x0, x1);
    };
    // Done with the stage `from`: ask for another one, take the rows of the next chunk.
    const auto move_on = [&](u32 from) {
        ring.turn(ring.reading, ring.reading_phase);
        if (left > AHEAD * CHUNK) {
            ring.wait_emptied();
            if (!ADJOINT || left >= (AHEAD + 1) * CHUNK) {
                ring.fetch(CHUNK);
            } else {
                ring.fetch(left - AHEAD * CHUNK);
            }
        }
        if (left > CHUNK) ring.wait_filled();
        load_transposed(rows, ring.reading + rows_at);
        ring.release(from);
        left -= CHUNK;
    };
    ring.wait_filled();
    load_transposed(rows, ring.reading + rows_at);
    read_ages(left);
    prepare(left);
    bool forgotten = false;
    while (left > 0 && !forgotten) {
        const SplitPair now = next;
        const u32 from = ring.reading;
        read_ages(left - CHUNK);
        u32 own[4];
        float dt[8];
        owners.unpack(own);
        __syncwarp();
        load_transposed(V, from + V_at);
        get_steps(dt_from, dt);
        move_on(from);
        __syncwarp();  // every lane has read dt
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int i = ADJOINT ? j : 3 - j;
            float at[2], first[4], second[4];  // S of the two steps
            if (ADJOINT) {
                at[0] = distance + dt[2 * i], at[1] = distance = at[0] + dt[2 * i + 1];
            } else {
                at[1] = distance, at[0] = distance + dt[2 * i + 1], distance = at[0] + dt[2 * i];
            }
            outer(now.high, now.low, own[i], V, first, second);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                sum[k] = fmaf(exp2_approx(A[k] * at[0]), first[k], sum[k]);
                sum[k] = fmaf(exp2_approx(A[k] * at[1]), second[k], sum[k]);
            }
        }
        prepare(left);
        forgotten = SOFTPLUS && __all_sync(~0u, slowest * distance < FORGOTTEN);
    }
    u32 row_seen = 0, low_seen = 0, high_seen = 0;  // V: of state g, of state g + 8
    while (left > 0) {
        const u32 from = ring.reading;
        load_transposed(V, from + V_at);
        note_not_finite(row_seen, max_bf16x2_or_nan(rows[DELTA], 0));  // -inf is a step left out
        if (ADJOINT) {
            note_not_finite(row_seen, rows[DOUT]);
            if (GATED) note_not_finite(row_seen, rows[Z]);
        } else {
            note_not_finite(row_seen, rows[U]);
        }
        note_not_finite(low_seen, V[0]);
        note_not_finite(high_seen, V[2]);
        move_on(from);
    }
    const float row_bad = sum_over_owners(low_bf16(row_seen) + high_bf16(row_seen));
    const float low_bad = sum_over_owners(low_bf16(low_seen) + high_bf16(low_seen));
    const float high_bad = sum_over_owners(low_bf16(high_seen) + high_bf16(high_seen));
#pragma unroll
    for (int k = 0; k < 4; ++k)
        sum[k] += row_bad + __shfl_sync(~0u, k < 2 ? low_bad : high_bad, 8 * l.t + 4 * (k & 1));
    if (!l.active) return;
    l.write_states(segment_x, l.row(p, l.segment), sum);
    if (l.t == 0) segment_dt[l.row(p, l.segment)] = distance;
}

// Sums over a warp's channels, for dB and dC: weights[channel, step] state[channel, n, step].
//
// A lane's packed states, transposed with movmatrix, are an A operand: rows are states, k = 2t, 2t + 1
// channels of one step, k = 2t + 8, 2t + 9 those of the step after next. The weights come in two bf16 parts,
// so that of the factors only the state is rounded, and are the B operand: of even steps 2i the high part
// is column 2i, the low part column 2i + 1, and the others are masked out, so that all even steps can share
// an accumulator; odd steps 2i + 1 likewise have columns 2i and 2i + 1 of another one.
struct TileChannelSum {
    u32 of_even, of_odd;  // weights
    u32 s[2][4];          // operands of even and of odd steps
    float even[4] = {}, odd[4] = {};
    __device__ __forceinline__ explicit TileChannelSum(const SplitPair &x)
        : of_even(transpose_8x8(__byte_perm(x.high, x.low, 0x5410))),
          of_odd(transpose_8x8(__byte_perm(x.high, x.low, 0x7632))) {}
    // The packed states of steps 2i, 2i + 1.
    __device__ __forceinline__ void take(int i, const u32 (&packed)[4]) {
        const int half = 2 * (i & 1);
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            s[odd][half] = transpose_8x8(packed[odd]);
            s[odd][half + 1] = transpose_8x8(packed[odd + 2]);
        }
    }
    // Adds up what was taken of steps 2i .. 2i + 3.
    __device__ __forceinline__ void add(int i, const u32 (&step)[4]) {
        mma(even, s[0][0], s[0][1], s[0][2], s[0][3], of_even & step[i], of_even & step[i + 1]);
        mma(odd, s[1][0], s[1][1], s[1][2], s[1][3], of_odd & step[i], of_odd & step[i + 1]);
    }
    // Lane 4 r + c: state r of steps 2c and 2c + 1, state r + 8 of the same.
    __device__ __forceinline__ void store(u32 to) const {
        store_shared(to, even[0] + even[1], odd[0] + odd[1], even[2] + even[3], odd[2] + odd[3]);
    }
};

// States of two steps as an A operand: rows g of the first, rows g + 8 of the second.
__device__ __forceinline__ void pack_steps(u32 (&packed)[4], const float (&first)[4],
                                           const float (&second)[4]) {
    packed[0] = pack_bf16(first[0], first[1]), packed[1] = pack_bf16(second[0], second[1]);
    packed[2] = pack_bf16(first[2], first[3]), packed[3] = pack_bf16(second[2], second[3]);
}

// Shared memory of a warp of tile_backward: in each of the ring's stages, one a round, its sums for dB and
// dC; a room with C of a chunk in fp32, dt and dy, and with the state that enters the sequence.
constexpr int ROUNDS = 4, TILE_ROOM = 512 + 2 * 256 + 512;

// EXACT: there is an h0. FOLDED: as in the forward. BOXES: rows come by tensor maps (sm_90), else by threads.
template <bool GATED, bool SOFTPLUS, int WARPS, int BLOCKS, bool EXACT, bool FOLDED, bool BOXES,
          bool DOCUMENTS>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS)
tile_backward(const __grid_constant__ typename Choose<BOXES, TensorMaps, i64>::type maps, Problem p, Upstream up, const uint2 *checkpoints, const float *segment_g,
              const float *segment_dt, char *du, char *ddelta, char *dz, float *dh0, float4 *partial_BC,
              float *partial_A, float *partial_D, float *partial_bias) {
    extern __shared__ __align__(128) char shared[];
    constexpr int AHEAD = 2;
    using Ring = typename Choose<BOXES, BoxRing<WARPS, GATED, ROUNDS>,
                                 TileRing<WARPS, true, SOFTPLUS, ROUNDS, AHEAD, WARPS * SUMS_BYTES>>::type;
    const TileLane l = TileLane::make<WARPS>(p, 0, p.segments);
    const int warps = int(min(i64(WARPS), p.channels / 8 - l.group * WARPS));  // with channels to do
    const u32 ring_room = shared_address(shared), sums = Ring::SUMS;  // in a stage: [WARPS][64] float4
    const u32 room = ring_room + Ring::BYTES + l.warp * TILE_ROOM;
    const u32 c_to = opaque(room + 16 * l.lane), c_from = opaque(room + 16 * l.t);
    const u32 dt_to = opaque(room + 512 + 8 * l.lane), dt_from = opaque(room + 512 + 32 * l.g);
    const u32 sums_to = opaque(sums + SUMS_BYTES * l.warp + 16 * l.lane);
    const u32 rows_at = opaque(Ring::rows_offset(l));
    const u32 both_at = opaque(Ring::STATES + doubled_row(l));
    const u32 along_at = opaque(Ring::STATES + matrix_row(l));
    const u32 saved_at = opaque(Ring::CHECKPOINTS + 256 * l.warp + 8 * l.lane);
    // Mask i: lanes that own steps 2i and 2i + 1; lanes of their columns in a B operand, used often
    // enough for a register each.
    const Masks owners(l.t);
    u32 step[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) step[i] = opaque(l.g >> 1 == i ? ~0u : 0u);
    const u32 barriers = ring_room + Ring::BYTES + WARPS * TILE_ROOM;  // of even and of odd rounds
    const int length = int(l.end - l.begin), last = (length - 1) / CHUNK * CHUNK;
    const i64 chunks = (p.length + CHUNK - 1) / CHUNK;

    if (threadIdx.x < 2) PhasedBarrier{barriers + 8 * threadIdx.x}.init(32 * WARPS);
    Ring ring;
    if constexpr (BOXES) {
        ring.start(p, l, ring_room, maps, checkpoints, warps);
        if (threadIdx.x < 32 && elected()) {
            ring.fetch(ring_room, last);
            if (last > 0) ring.fetch(ring_room + Ring::STAGE, last - CHUNK);
        }
    } else {
        ring.start(p, l, ring_room, l.begin + last, -1, up, checkpoints, p.u, GATED ? p.z : nullptr, p.B, p.C);
        ring.fetch(ring_room, length - last);
        if (last > 0) ring.fetch(ring_room + Ring::STAGE, CHUNK);
    }

    float A[4], g[4] = {}, dA[4] = {}, dD = 0.f, dbias = 0.f;
    l.read_states(A, p.A, l.channel);
#pragma unroll
    for (int k = 0; k < 4; ++k) A[k] *= LOG2E;
    if (DOCUMENTS) let_decay(A);
    const float bias = p.bias ? p.bias[l.channel] : 0.f, D = p.D ? p.D[l.channel] : 0.f;
    if (up.dh_end) l.read_states(g, up.dh_end, l.batch * p.channels + l.channel);
    after_previous_kernel();
    before_next_kernel();
    l.fold<true>(p, g, A, (l.segment + 1) * p.parts, p.pieces, segment_g, segment_dt);
    // Where the lane's two channels of a row are in the outputs, in bytes.
    i64 row = 2 * ((l.batch * p.length + l.begin + last + l.g) * p.out_time + l.channel - l.g) + 4 * l.t;
    partial_BC += ((l.group * p.batch + l.batch) * chunks + l.begin / CHUNK) * 64;
    u32 to_BC = opaque(u32((last / CHUNK + 2) * 64 + l.lane));  // two rounds ahead

    // Stages: of this round, of the next one, of the one after and the one before the last, of the last.
    u32 stage = ring_room, next_stage = stage + Ring::STAGE, far_stage = next_stage + Ring::STAGE,
        last_stage = far_stage + Ring::STAGE;
    u32 round = 0, done = barriers;  // done: barrier of this round and, with the other phase, of two before

    // Adds up, in the order of the warps, the sums of the round before the last, which every warp has
    // finished (a wait before there is one passes). The warps take turns. Two barriers, used in alternate
    // rounds, let warps drift apart by two chunks.
    int turn = l.active ? l.warp + 2 : 1 << 30;  // a warp without channels never has one
    const auto add_warps = [&](int at) {
        PhasedBarrier{done}.wait(~(round >> 1) & 1);
        if constexpr (BOXES) {
            if (turn == 2 && at >= AHEAD * CHUNK) {  // there are three warps or more
                if (elected()) ring.fetch(far_stage, at - AHEAD * CHUNK);
                __syncwarp();
            }
        }
        if (turn == 0) {
            turn = warps;
            const u32 from = far_stage + sums + 16 * l.lane;
            float4 B = load_shared(from), C = load_shared(from + 512);
#pragma unroll
            for (int w = 1; w < WARPS; ++w) {  // a warp without channels has zeros
                const u32 more = from + SUMS_BYTES * w;
                const float4 b = load_shared(more), c = load_shared(more + 512);
                B.x += b.x, B.y += b.y, B.z += b.z, B.w += b.w;
                C.x += c.x, C.y += c.y, C.z += c.z, C.w += c.w;
            }
            partial_BC[to_BC] = B;
            partial_BC[to_BC + 32] = C;
        }
        --turn;
        to_BC -= 64;
    };
    const auto next_round = [&]() {
        ++round;
        done ^= 8;
        const u32 done_stage = stage;
        stage = next_stage, next_stage = far_stage, far_stage = last_stage, last_stage = done_stage;
    };

    // A chunk made ready: what its owner lanes know of it, operands, checkpoint. dt, dy and C go to the
    // rooms. It happens while the chunk before it is being finished.
    struct Ready {
        float u0, u1, dt0, dt1, slope0, slope1, dy0, dy1, gate0, gate1;
        SplitPair x, dy;
        u32 B_both[4], along[4], saved[2];  // along: B, C of step g, states s(t, k)
        __device__ __forceinline__ Ready() : x(0.f, 0.f), dy(0.f, 0.f) {}
    } now;
    u32 rows[4];
    const auto load = [&](u32 from) {
        load_transposed(rows, from + rows_at);
        load_transposed(now.B_both, from + both_at);
        load_matrices(now.along, from + along_at);
        asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];"
                     : "=r"(now.saved[0]), "=r"(now.saved[1]) : "r"(from + saved_at) : "memory");
    };
    Ages ages;
    const auto prepare = [&](int at) {
        now.u0 = low_bf16(rows[U]), now.u1 = high_bf16(rows[U]);
        tile_dt<SOFTPLUS, true>(low_bf16(rows[DELTA]) + bias, at + 2 * l.t < length, now.dt0, now.slope0);
        tile_dt<SOFTPLUS, true>(high_bf16(rows[DELTA]) + bias, at + 2 * l.t + 1 < length, now.dt1, now.slope1);
        now.dy0 = low_bf16(rows[DOUT]), now.dy1 = high_bf16(rows[DOUT]);
        if (GATED) {
            const float z0 = low_bf16(rows[Z]), z1 = high_bf16(rows[Z]);
            const float s0 = sigmoid(z0), s1 = sigmoid(z1);
            const float y0 = z0 * s0, y1 = z1 * s1;
            now.gate0 = now.dy0 * fmaf(y0, 1.f - s0, s0);  // the slope of z sigmoid(z)
            now.gate1 = now.dy1 * fmaf(y1, 1.f - s1, s1);
            now.dy0 *= y0, now.dy1 *= y1;
        }
        put_decays<DOCUMENTS>(dt_to, now.dt0, now.dt1, ages);
        put_pair(dt_to + 256, now.dy0, now.dy1);
        store_shared(c_to, low_bf16(now.along[2]), high_bf16(now.along[2]), low_bf16(now.along[3]),
                     high_bf16(now.along[3]));
        now.x = SplitPair(now.dt0 * now.u0, now.dt1 * now.u1);
        now.dy = SplitPair(now.dy0, now.dy1);
    };

    const int rows_left = int(opaque(l.active ? length - l.g : 0));
    // The first chunk's start is known in fp32.
    const int exact_start = int(opaque(EXACT && l.segment == 0 ? 0u : ~0u));
    if (EXACT && exact_start == 0) {
        float h0[4];
        l.read_states(h0, p.h0, l.batch * p.channels + l.channel);
        store_shared(c_to + 1024, h0[0], h0[1], h0[2], h0[3]);
    }
    int until = int(p.period);
    PhasedBarrier{stage + Ring::FILLED}.wait(0);
    load(stage);
    if (BOXES && SOFTPLUS) mark_steps_past_end(rows[DELTA], length - last - 2 * l.t);
    if (DOCUMENTS) ages.read(p, l, last, length);
    prepare(last);
    __syncwarp();
    for (int at = last; at >= 0; at -= CHUNK) {
        if (DOCUMENTS) ages.read(p, l, at - CHUNK, length);
        // ---- forwards: h of the eight steps, y, the sums for dC
        u32 own[4];
        owners.unpack(own);
        TileChannelSum for_C(now.dy);
        float h[9][4], a[8][4], dt[8], y[4] = {};
        get_steps(dt_from, dt);
        h[0][0] = low_bf16(now.saved[0]), h[0][1] = high_bf16(now.saved[0]);
        h[0][2] = low_bf16(now.saved[1]), h[0][3] = high_bf16(now.saved[1]);
        if (EXACT && at == exact_start) {
            const float4 h0 = load_shared(c_to + 1024);
            h[0][0] = h0.x, h[0][1] = h0.y, h[0][2] = h0.z, h[0][3] = h0.w;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float first[4], second[4];
            outer(now.x.high, now.x.low, own[i], now.B_both, first, second);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                a[2 * i][k] = exp2_approx(A[k] * dt[2 * i]);
                a[2 * i + 1][k] = exp2_approx(A[k] * dt[2 * i + 1]);
                h[2 * i + 1][k] = fmaf(a[2 * i][k], h[2 * i][k], first[k]);
                h[2 * i + 2][k] = fmaf(a[2 * i + 1][k], h[2 * i + 1][k], second[k]);
            }
            u32 packed[4];
            pack_steps(packed, h[2 * i + 1], h[2 * i + 2]);
            for_C.take(i, packed);
            if (i & 1) for_C.add(i - 1, step);
            if (GATED) {
                mma(y, packed[0], packed[1], packed[2], packed[3], now.along[2] & step[i],
                    now.along[3] & step[i]);
            }
        }
        add_warps(at);  // and so every warp is done with that stage
        if constexpr (!BOXES) {
            if (at >= AHEAD * CHUNK) ring.fetch(far_stage, CHUNK);
        }

        for_C.store(stage + sums_to + 512);

        // ---- backwards, and the sums for dB
        TileChannelSum for_B(now.x);
        float v[4] = {}, through_decay[4] = {}, dys[8], d[4][2] = {};
        get_steps(dt_from + 256, dys);
        get_steps(dt_from, dt);  // again, rather than keeping it in registers
#pragma unroll
        for (int i = 3; i >= 0; --i) {
            float gh[2][4];
#pragma unroll
            for (int odd = 1; odd >= 0; --odd) {
                const int j = 2 * i + odd;
                const float4 C = load_shared(c_from + 64 * j);
                gh[odd][0] = fmaf(dys[j], C.x, g[0]);
                gh[odd][1] = fmaf(dys[j], C.y, g[1]);
                gh[odd][2] = fmaf(dys[j], C.z, g[2]);
                gh[odd][3] = fmaf(dys[j], C.w, g[3]);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    g[k] = gh[odd][k] * a[j][k];
                    const float w = g[k] * h[j][k];  // d / d (dt A)
                    dA[k] = fmaf(w, dt[j], dA[k]);
                    d[i][odd] = fmaf(w, A[k], d[i][odd]);
                }
            }
            u32 packed[4];
            pack_steps(packed, gh[0], gh[1]);
            for_B.take(i, packed);
            if (!(i & 1)) for_B.add(i, step);
            mma(v, packed[0], packed[1], packed[2], packed[3], now.along[0] & step[i],
                now.along[1] & step[i]);
            // The lanes' sums over four states, added across t: ones in columns 2i and 2i + 1.
            if (!(i & 1))
                mma_k8(through_decay, d[i][0], d[i][1], d[i + 1][0], d[i + 1][1], ones(step[i]), ones(step[i + 1]));
        }

        // ---- outputs of the owner's two steps; the next chunk made ready
        if (at > 0) PhasedBarrier{next_stage + Ring::FILLED}.wait(((round + 1) / ROUNDS) & 1);
        __syncwarp();
        const float x0 = fmaf(now.u0, v[0], LN2 * through_decay[0]) * now.slope0;
        const float x1 = fmaf(now.u1, v[3], LN2 * through_decay[3]) * now.slope1;
        dbias += x0 + x1;
        dD = fmaf(now.dy0, now.u0, fmaf(now.dy1, now.u1, dD));
        const u32 row_u = transpose_8x8(
            pack_bf16(fmaf(v[0], now.dt0, D * now.dy0), fmaf(v[3], now.dt1, D * now.dy1)));
        const u32 row_x = transpose_8x8(pack_bf16(x0, x1));
        const u32 row_z = GATED ? transpose_8x8(pack_bf16(now.gate0 * fmaf(D, now.u0, y[0]),
                                                          now.gate1 * fmaf(D, now.u1, y[3])))
                                : 0;
        load(next_stage);
        prepare(at - CHUNK);
        for_B.store(stage + sums_to);
        const bool stored = at < rows_left;
        store_if(stored, du + row, row_u);
        store_if(stored, ddelta + row, row_x);
        if (GATED) store_if(stored, dz + row, row_z);
        row -= p.chunk_bytes;
        PhasedBarrier{done}.arrive();
        __syncwarp();  // the rooms are written
        next_round();
        if (FOLDED && --until == 0) {
            until = int(p.period);
#pragma unroll
            for (int k = 0; k < 4; ++k) g[k] = 0.f;
        }
    }
    add_warps(0);
    next_round();
    add_warps(0);

    dD += __shfl_xor_sync(~0u, dD, 1);
    dD += __shfl_xor_sync(~0u, dD, 2);
    dbias += __shfl_xor_sync(~0u, dbias, 1);
    dbias += __shfl_xor_sync(~0u, dbias, 2);
    if (!l.active) return;
    l.write_states(partial_A, l.row(p, l.segment), dA);
    if (l.t == 0) {
        partial_D[l.row(p, l.segment)] = dD;
        partial_bias[l.row(p, l.segment)] = dbias;
    }
    if (l.segment == 0 && dh0) l.write_states(dh0, l.batch * p.channels + l.channel, g);
}

// Partial sums of tile_backward, (groups, batch, chunks, 2, 32 lanes, 4), to dB and dC, whose rows are
// `stride` elements apart. Lane 4 r + c holds state r of steps 2c and 2c + 1 of its chunk, then state r + 8
// of them.
__global__ void tile_sums(const float4 *partial, i64 groups, i64 batch, i64 length, bf16 *dB, bf16 *dC,
                          i64 stride, i64 blocks, RowSums others) {
    after_previous_kernel();
    if (blockIdx.x >= blocks) return sum_rows(others, blockIdx.x - blocks);
    const i64 chunks = (length + CHUNK - 1) / CHUNK, size = batch * chunks * 64;
    const i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= size) return;
    float4 sum = partial[index];
    for (i64 group = 1; group < groups; ++group) {
        const float4 more = partial[group * size + index];
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    const int lane = index & 31, c = lane & 3, r = lane >> 2;
    const i64 chunk = index / 64, b = chunk / chunks, t = chunk % chunks * CHUNK + 2 * c;
    if (t >= length) return;
    bf16 *to = (index & 32 ? dC : dB) + (b * length + t) * stride + r;
    put(to, sum.x);
    put(to + 8, sum.z);
    if (t + 1 >= length) return;
    put(to + stride, sum.y);
    put(to + stride + 8, sum.w);
}
