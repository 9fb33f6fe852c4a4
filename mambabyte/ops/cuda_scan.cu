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
// Sums never depend on timing: partial sums go to their own slots and are added in index order.

typedef long long i64;
typedef unsigned int u32;

constexpr int CHUNK = 8;  // steps between checkpoints
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// Strides are in elements; the last axis of every tensor has stride one. Null pointers are allowed
// for z, D, bias and h0. `segment` (a multiple of CHUNK) is the number of steps in a segment.
struct Problem {
    const void *u, *delta, *B, *C, *z;
    const float *A, *D, *bias, *h0;
    i64 u_batch, u_time, delta_batch, delta_time, B_batch, B_time, C_batch, C_time, z_batch, z_time;
    i64 batch, length, channels, states, segment, segments;
};

// What the backward reads besides the forward's inputs. dh_end may be null.
struct Upstream {
    const void *dout;
    const float *dh_end;
    i64 dout_batch, dout_time;
};

// Which part of a scan a kernel runs.
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

// softplus(x) = max(x, 0) + log1p(exp(-|x|)), and its slope sigmoid(x). With e = exp(-|x|) in (0, 1],
// log1p(e) = 2 atanh(s), s = e / (2 + e) <= 1/3: an odd series that keeps relative accuracy for tiny
// e, where log2(1 + e) would lose it. TERMS = 8 is exact in fp32, 5 leaves 2e-6.
template <int TERMS>
__device__ __forceinline__ void softplus(float x, float e, float &value, float &slope) {
    const float s = e * reciprocal(2.f + e), q = s * s;
    float p = 1.f / (2 * TERMS - 1);
#pragma unroll
    for (int k = TERMS - 1; k >= 1; --k) p = fmaf(p, q, 1.f / (2 * k - 1));
    value = fmaf(2.f * s, p, fmaxf(x, 0.f));
    const float r = reciprocal(1.f + e);
    slope = x >= 0.f ? r : e * r;
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + exp2_approx(-LOG2E * x)); }

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

    __device__ __forceinline__ explicit AnyLane(const Problem &p) {
        const i64 per_block = ANY_WARPS * CHANNELS, groups = (p.channels + per_block - 1) / per_block;
        const int lane = threadIdx.x & 31;
        i64 index = blockIdx.x;
        group = index % groups;
        index /= groups;
        segment = index % p.segments;
        batch = index / p.segments;
        in_warp = lane / LANES;
        state = 4 * (lane % LANES);
        channel = group * per_block + (threadIdx.x >> 5) * CHANNELS + in_warp;
        active = channel < p.channels;
        begin = segment * p.segment;
        end = min(begin + p.segment, p.length);
    }
    __device__ __forceinline__ bool holds(const Problem &p, int k) const {
        return active && state + k < p.states;
    }
    // Row of this lane's channel in a (batch, segments, channels) array.
    __device__ __forceinline__ i64 row(const Problem &p, i64 seg) const {
        return (batch * p.segments + seg) * p.channels + channel;
    }
};

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
        const float x = dt;
        softplus<8>(x, exp_accurate(-fabsf(x)), dt, slope);
    }
    if (!valid) dt = slope = 0.f;
}

template <typename T, int NP, bool SOFTPLUS, Pass PASS>
__global__ void __launch_bounds__(32 * ANY_WARPS)
any_forward(Problem p, T *out, float *h_end, float *checkpoints, float *segment_h, float *segment_dt) {
    using Lane = AnyLane<T, NP>;
    const Lane lane(p);
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
                h[k] = fmaf(exp_accurate(A[k] * dt), h[k], segment_h[row * NP + lane.state + k]);
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
            float y = 0.f;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const bool held = valid && lane.holds(p, k);
                const i64 n = lane.state + k;
                const float B = read<T>(p.B, lane.batch * p.B_batch + t * p.B_time + n, held);
                const float C = read<T>(p.C, lane.batch * p.C_batch + t * p.C_time + n, held);
                h[k] = Decay(dt * A[k]).apply(h[k], dt * u * B);
                y = fmaf(C, h[k], y);
            }
            chunk_dt += dt;
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
    const AnyLane<T, NP> lane(p);
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
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float C = read<T>(p.C, lane.batch * p.C_batch + t * p.C_time + lane.state + k,
                                    lane.holds(p, k));
            g[k] = Decay(dt * A[k]).apply(fmaf(dy, C, g[k]), 0.f);
        }
        total += dt;
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
    const Lane lane(p);
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
                g[k] = fmaf(exp_accurate(A[k] * dt), g[k], segment_g[row * NP + lane.state + k]);
        }

    const i64 chunks = (p.length + CHUNK - 1) / CHUNK;
    const i64 last = lane.begin + (lane.end - 1 - lane.begin) / CHUNK * CHUNK;
    for (i64 start = last; start >= lane.begin; start -= CHUNK) {
        float h[CHUNK + 1][4], part[CHUNK][4], u[CHUNK], dt[CHUNK], slope[CHUNK], y[CHUNK];
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
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const bool held = valid && lane.holds(p, k);
                const i64 n = lane.state + k;
                const float B = read<T>(p.B, lane.batch * p.B_batch + t * p.B_time + n, held);
                const float C = read<T>(p.C, lane.batch * p.C_batch + t * p.C_time + n, held);
                const Decay decay(dt[j] * A[k]);
                part[j][k] = decay.part;
                h[j + 1][k] = decay.apply(h[j][k], dt[j] * u[j] * B);
                y[j] = fmaf(C, h[j + 1][k], y[j]);
            }
        }
#pragma unroll
        for (int j = CHUNK - 1; j >= 0; --j) {
            const i64 t = start + j;
            const bool valid = lane.active && t < lane.end;
            const i64 at = (lane.batch * p.length + t) * p.channels + lane.channel;
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

// dB, dC: (groups, rows, 2, NP) partial sums -> two (rows, states) outputs.
template <typename T, int NP>
__global__ void any_sum_BC(const float *partial, i64 groups, i64 rows, i64 states, T *dB, T *dC) {
    const i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x, size = rows * 2 * NP;
    if (index >= size) return;
    const i64 row = index / (2 * NP), which = index / NP % 2, n = index % NP;
    if (n >= states) return;
    float sum = 0.f;
    for (i64 group = 0; group < groups; ++group) sum += partial[group * size + index];
    put((which ? dC : dB) + row * states + n, sum);
}

// Column sums of three row-major arrays with the same number of rows: dA, dD and dbias over batch and
// segments. 32 columns x 8 row strands per block; the strands are added in order.
__global__ void sum_rows(const float *in_A, const float *in_D, const float *in_bias, i64 rows, i64 width,
                         i64 channels, float *dA, float *dD, float *dbias) {
    __shared__ float strands[8][32];
    const i64 columns = width + 2 * channels, column = i64(blockIdx.x) * 32 + threadIdx.x;
    const float *in = in_A;
    float *to = dA;
    i64 stride = width, at = column;
    if (column >= width) {
        stride = channels;
        at = column - width;
        in = in_D;
        to = dD;
        if (at >= channels) {
            at -= channels;
            in = in_bias;
            to = dbias;
        }
    }
    float sum = 0.f;
    if (column < columns)
        for (i64 row = threadIdx.y; row < rows; row += 8) sum += in[row * stride + at];
    strands[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < columns && to) {
        for (int k = 1; k < 8; ++k) sum += strands[k][threadIdx.x];
        to[at] = sum;
    }
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
// and its A operand (row g, k = 2t, 2t+1, 2t+8, 2t+9). Hence, with X^ the bf16 form of X:
//
//   B dt u and C dy   are rank-one per step: one MMA gives two steps (rows g and g + 8) of 8 states.
//                     B and C are bf16 already; the fp32 factor goes in as high + low bf16 parts.
//   sum over states   of two steps at a time, A = state tile, B operand = C (or B) of all 8 steps as
//                     its columns. The product of step j with column j is kept.
//   sum over channels needs channels along k, which lie along g: two packed steps are written to
//                     shared memory and read back with ldmatrix.trans.
//
// Work per (step, channel) - softplus, gate, outputs - belongs to the lane that owns channel g at
// steps 2t and 2t+1: ldmatrix.trans hands it both values in one register, movmatrix brings results
// back to rows of channels for the store.
//
// An MMA multiplies masked-out terms by zero, so inf or nan in B_t or C_t spreads to the other steps
// of its chunk, and inf in dt u arrives as nan. Nothing not finite is ever lost.
// =============================================================================================

constexpr int STAGES = 3;          // chunks in flight from global memory, per warp
constexpr int STAGE_BYTES = 1280;  // 4 x 128 (u, delta, z, dout), 4 x 128 (B, C), 256 (checkpoint)
constexpr u32 STAGE_B = 512, STAGE_C = 768, STAGE_CHECKPOINT = 1024;

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ __forceinline__ float low_bf16(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_bf16(u32 x) { return __uint_as_float(x & 0xffff0000u); }

// d += a b, bf16 operands.
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// d += a b, tf32 operands (fp32 numbers of which the tensor core reads 11 bits of significand).
__device__ __forceinline__ void mma_k8(float (&d)[4], float a0, float a1, float a2, float a3, float b0,
                                       float b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
                   "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
__device__ __forceinline__ void mma_k4(float (&d)[4], float a0, float a1, u32 b0) {
    asm volatile("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(b0));
}

__device__ __forceinline__ u32 transpose_8x8(u32 x) {
    u32 r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
    return r;
}

// Four 8x8 matrices of 16-bit elements from 512 consecutive bytes.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address + 16 * (threadIdx.x & 31)) : "memory");
}
__device__ __forceinline__ void load_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address + 16 * (threadIdx.x & 31)) : "memory");
}

template <int BYTES>
__device__ __forceinline__ void copy_async(u32 to, const char *from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :: "r"(to), "l"(from), "n"(BYTES), "r"(valid ? BYTES : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}

__device__ __forceinline__ u32 shared_address(const void *p) { return u32(__cvta_generic_to_shared(p)); }

struct TileLane {
    int lane, g, t, warp;
    i64 batch, segment, group, channel, begin, end;

    template <int WARPS>
    __device__ __forceinline__ static TileLane make(const Problem &p) {
        TileLane l;
        const i64 groups = (p.channels / 8 + WARPS - 1) / WARPS;
        l.lane = threadIdx.x & 31;
        l.warp = threadIdx.x >> 5;
        l.g = l.lane >> 2;
        l.t = l.lane & 3;
        i64 index = blockIdx.x;
        l.group = index % groups;
        index /= groups;
        l.segment = index % p.segments;
        l.batch = index / p.segments;
        l.channel = (l.group * WARPS + l.warp) * 8 + l.g;
        l.begin = l.segment * p.segment;
        l.end = min(l.begin + p.segment, p.length);
        return l;
    }
    __device__ __forceinline__ i64 row(const Problem &p, i64 seg) const {
        return (batch * p.segments + seg) * p.channels + channel;
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

// A warp's ring of chunks. Lane l copies row l % 8 of tensor l / 8 of (u, delta, z, dout), and of
// (B states 0-7, B 8-15, C 0-7, C 8-15); rows past the end arrive as zeros.
struct TileRing {
    const char *rows, *states, *checkpoint;
    i64 rows_step, states_step, checkpoint_step;
    u32 base;
    int slot, row;
    bool rows_used, states_used;

    // FORWARD walks chunks upwards from `first`, else downwards. `dout` and `checkpoints` are the
    // backward's; which tensors a pass needs is said by the flags.
    __device__ __forceinline__ void start(const Problem &p, const TileLane &l, i64 first, int direction,
                                          u32 address, const void *dout, i64 dout_batch, i64 dout_time,
                                          const uint2 *checkpoints, bool use_u, bool use_z, bool use_B,
                                          bool use_C) {
        const int tensor = l.lane >> 3;
        row = l.lane & 7;
        base = address;
        slot = 0;
        const void *from = tensor == 0 ? p.u : tensor == 1 ? p.delta : tensor == 2 ? p.z : dout;
        const i64 batch = tensor == 0 ? p.u_batch : tensor == 1 ? p.delta_batch
                          : tensor == 2 ? p.z_batch : dout_batch;
        const i64 time = tensor == 0 ? p.u_time : tensor == 1 ? p.delta_time
                         : tensor == 2 ? p.z_time : dout_time;
        rows = static_cast<const char *>(from) +
               2 * (l.batch * batch + (first + row) * time + l.channel - l.g);
        rows_step = direction * 2 * CHUNK * time;
        rows_used = tensor == 0 ? use_u : tensor == 1 ? true : tensor == 2 ? use_z : dout != nullptr;
        const bool is_C = tensor >= 2;
        const i64 s_batch = is_C ? p.C_batch : p.B_batch, s_time = is_C ? p.C_time : p.B_time;
        states = static_cast<const char *>(is_C ? p.C : p.B) +
                 2 * (l.batch * s_batch + (first + row) * s_time + 8 * (tensor & 1));
        states_step = direction * 2 * CHUNK * s_time;
        states_used = is_C ? use_C : use_B;
        const i64 chunks = (p.length + CHUNK - 1) / CHUNK;
        checkpoint = reinterpret_cast<const char *>(
            checkpoints + ((l.batch * chunks + first / CHUNK) * p.channels + l.channel) * 4 + l.t);
        checkpoint_step = direction * i64(sizeof(uint2)) * 4 * p.channels;
    }
    // Ask for the next chunk; `left` is its number of existing steps, <= 0 if the chunk itself does
    // not exist.
    template <bool CHECKPOINTS>
    __device__ __forceinline__ void fetch(i64 left) {
        if (left > 0) {
            const u32 to = base + slot * STAGE_BYTES + 16 * (threadIdx.x & 31);
            if (rows_used) copy_async<16>(to, rows, row < left);
            if (states_used) copy_async<16>(to + STAGE_B, states, row < left);
            if (CHECKPOINTS)
                copy_async<8>(base + slot * STAGE_BYTES + STAGE_CHECKPOINT + 8 * (threadIdx.x & 31),
                              checkpoint, true);
            rows += rows_step;
            states += states_step;
            if (CHECKPOINTS) checkpoint += checkpoint_step;
        }
        copy_commit();
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
};

// x of the owner's two steps as A operands of the rank-one MMA: (high, low) bf16 parts of each.
struct SplitPair {
    u32 high, first, second;  // high: both high parts, low half = first step
    __device__ __forceinline__ void set(float x0, float x1) {
        high = pack_bf16(x0, x1);
        const float h0 = low_bf16(high), h1 = high_bf16(high);
        first = pack_bf16(h0, x0 - h0);
        second = pack_bf16(h1, x1 - h1);
    }
};

// B or C of a chunk as B operands of the rank-one MMA. `both` is the transposed tile: state g (g + 8)
// at the owner's steps. k = 2t, 2t+1 meet the parts of step 2t, k = 2t+8, 2t+9 those of step 2t+1.
struct RankOne {
    u32 even[2], odd[2];
    __device__ __forceinline__ void set(u32 low_states, u32 high_states) {
        even[0] = __byte_perm(low_states, 0, 0x1010);
        odd[0] = __byte_perm(low_states, 0, 0x3232);
        even[1] = __byte_perm(high_states, 0, 0x1010);
        odd[1] = __byte_perm(high_states, 0, 0x3232);
    }
    // first[k] = x_{2i} B_{2i}[s(t, k)], second[k] the same one step later: only the lanes t = i, which
    // own these steps, put x into the product.
    __device__ __forceinline__ void outer(const SplitPair &x, u32 own, float (&first)[4],
                                          float (&second)[4]) const {
        float d[2][4] = {};
        mma(d[0], x.first & own, 0, 0, x.second & own, even[0], odd[0]);
        mma(d[1], x.first & own, 0, 0, x.second & own, even[1], odd[1]);
        first[0] = d[0][0], first[1] = d[0][1], first[2] = d[1][0], first[3] = d[1][1];
        second[0] = d[0][2], second[1] = d[0][3], second[2] = d[1][2], second[3] = d[1][3];
    }
};

// dt of the owner's two steps -> dt of all eight steps of channel g, through shared memory.
__device__ __forceinline__ void share_dt(float *room, const TileLane &l, float dt0, float dt1,
                                         float (&dt)[8]) {
    __syncwarp();
    reinterpret_cast<float2 *>(room)[l.lane] = make_float2(dt0, dt1);
    __syncwarp();
    const float4 *from = reinterpret_cast<const float4 *>(room) + 2 * l.g;
    const float4 low = from[0], high = from[1];
    dt[0] = low.x, dt[1] = low.y, dt[2] = low.z, dt[3] = low.w;
    dt[4] = high.x, dt[5] = high.y, dt[6] = high.z, dt[7] = high.w;
}

// Softplus and bias for one step; zero past the end, so that such a step changes nothing.
template <bool SOFTPLUS>
__device__ __forceinline__ void tile_dt(float x, bool valid, float &dt, float &slope) {
    dt = x;
    slope = 1.f;
    if (SOFTPLUS) softplus<5>(x, exp2_approx(-LOG2E * fabsf(x)), dt, slope);
    if (!valid) dt = slope = 0.f;
}

template <bool GATED, bool SOFTPLUS, Pass PASS, int WARPS>
__global__ void __launch_bounds__(32 * WARPS)
tile_forward(Problem p, u32 *out, float *h_end, uint2 *checkpoints, float *segment_h, float *segment_dt) {
    __shared__ __align__(128) char stages[WARPS][STAGES * STAGE_BYTES];
    __shared__ __align__(16) float dt_room[WARPS][64];
    const TileLane l = TileLane::make<WARPS>(p);
    if (l.channel >= p.channels) return;

    float A[4], h[4] = {};
    l.read_states(A, p.A, l.channel);
#pragma unroll
    for (int k = 0; k < 4; ++k) A[k] *= LOG2E;
    const float bias = p.bias ? p.bias[l.channel] : 0.f, D = p.D ? p.D[l.channel] : 0.f;

    TileRing ring;
    ring.start(p, l, l.begin, 1, shared_address(stages[l.warp]), nullptr, 0, 0, nullptr, true,
               GATED && PASS == FULL, true, PASS == FULL);
    const i64 chunks = (p.length + CHUNK - 1) / CHUNK;
    const int length = int(l.end - l.begin);
#pragma unroll
    for (int s = 0; s < STAGES; ++s) ring.fetch<false>(length - s * CHUNK);

    if (PASS == FULL) {
        if (p.h0) l.read_states(h, p.h0, l.batch * p.channels + l.channel);
        for (i64 s = 0; s < l.segment; ++s) {
            const float dt = segment_dt[l.row(p, s)];
            float end[4];
            l.read_states(end, segment_h, l.row(p, s));
#pragma unroll
            for (int k = 0; k < 4; ++k) h[k] = fmaf(exp2_approx(A[k] * dt), h[k], end[k]);
        }
        if (checkpoints)
            checkpoints += ((l.batch * chunks + l.begin / CHUNK) * p.channels + l.channel) * 4 + l.t;
        out += ((l.batch * p.length + l.begin + l.g) * p.channels + l.channel - l.g) / 2 + l.t;
    }
    u32 own[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) own[i] = l.t == i ? ~0u : 0u;

    // What a chunk needs after its preparation, which runs one chunk ahead of the recurrence.
    struct Ready {
        float dt[8], c[4], skip[2], gate[2];
        SplitPair x;
        RankOne B;
    } next, now;
    int slot = 0;
    float total = 0.f;
    const auto prepare = [&](int left) {
        copy_wait<STAGES - 1>();
        __syncwarp();
        const u32 from = ring.base + slot * STAGE_BYTES;
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        u32 rows[4], across[4], along[4];
        load_transposed(rows, from);
        load_transposed(across, from + STAGE_B);
        load_matrices(along, from + STAGE_B);
        const float u0 = low_bf16(rows[0]), u1 = high_bf16(rows[0]);
        float dt0, dt1, slope;
        tile_dt<SOFTPLUS>(low_bf16(rows[1]) + bias, 2 * l.t < left, dt0, slope);
        tile_dt<SOFTPLUS>(high_bf16(rows[1]) + bias, 2 * l.t + 1 < left, dt1, slope);
        next.x.set(dt0 * u0, dt1 * u1);
        next.B.set(across[0], across[1]);
        share_dt(dt_room[l.warp], l, dt0, dt1, next.dt);
        if (PASS == FULL) {
            next.c[0] = low_bf16(along[2]), next.c[1] = high_bf16(along[2]);
            next.c[2] = low_bf16(along[3]), next.c[3] = high_bf16(along[3]);
            next.skip[0] = D * u0, next.skip[1] = D * u1;
            if (GATED) {
                const float z0 = low_bf16(rows[2]), z1 = high_bf16(rows[2]);
                next.gate[0] = z0 * sigmoid(z0), next.gate[1] = z1 * sigmoid(z1);
            }
        } else {
            total += dt0 + dt1;
        }
    };
    prepare(length);
    for (int at = 0; at < length; at += CHUNK) {
        now = next;
        ring.fetch<false>(length - at - STAGES * CHUNK);
        prepare(length - at - CHUNK);
        if (PASS == FULL && checkpoints) {
            *checkpoints = make_uint2(pack_bf16(h[0], h[1]), pack_bf16(h[2], h[3]));
            checkpoints += 4 * p.channels;
        }
        float y0 = 0.f, y1 = 0.f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float first[4], second[4], sum[4] = {};
            now.B.outer(now.x, own[i], first, second);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                first[k] = fmaf(exp2_approx(A[k] * now.dt[2 * i]), h[k], first[k]);
                second[k] = fmaf(exp2_approx(A[k] * now.dt[2 * i + 1]), first[k], second[k]);
                h[k] = second[k];
            }
            if (PASS == FULL) {
                mma_k8(sum, first[0], second[0], first[1], second[1], now.c[0], now.c[1]);
                mma_k8(sum, first[2], second[2], first[3], second[3], now.c[2], now.c[3]);
                if (l.t == i) y0 = sum[0], y1 = sum[3];
            }
        }
        if (PASS == FULL) {
            y0 += now.skip[0], y1 += now.skip[1];
            if (GATED) y0 *= now.gate[0], y1 *= now.gate[1];
            const u32 row = transpose_8x8(pack_bf16(y0, y1));
            if (at + l.g < length) *out = row;
            out += CHUNK * p.channels / 2;
        }
    }
    if (PASS == STATE_ONLY) {
        l.write_states(segment_h, l.row(p, l.segment), h);
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        if (l.t == 0) segment_dt[l.row(p, l.segment)] = total;
    } else if (l.end == p.length) {
        l.write_states(h_end, l.batch * p.channels + l.channel, h);
    }
}

// The adjoint state that a segment hands to the one before it, from a zero one at its end.
template <bool GATED, bool SOFTPLUS, int WARPS>
__global__ void __launch_bounds__(32 * WARPS)
tile_adjoint(Problem p, Upstream up, float *segment_g, float *segment_dt) {
    __shared__ __align__(128) char stages[WARPS][STAGES * STAGE_BYTES];
    __shared__ __align__(16) float dt_room[WARPS][64];
    const TileLane l = TileLane::make<WARPS>(p);
    if (l.channel >= p.channels) return;

    float A[4], g[4] = {}, total = 0.f;
    l.read_states(A, p.A, l.channel);
#pragma unroll
    for (int k = 0; k < 4; ++k) A[k] *= LOG2E;
    const float bias = p.bias ? p.bias[l.channel] : 0.f;
    u32 own[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) own[i] = l.t == i ? ~0u : 0u;

    const int length = int(l.end - l.begin), last = (length - 1) / CHUNK * CHUNK;
    TileRing ring;
    ring.start(p, l, l.begin + last, -1, shared_address(stages[l.warp]), up.dout, up.dout_batch,
               up.dout_time, nullptr, false, GATED, false, true);
#pragma unroll
    for (int s = 0; s < STAGES; ++s)
        ring.fetch<false>(last - s * CHUNK >= 0 ? length - last + s * CHUNK : 0);

    int slot = 0;
    for (int at = last; at >= 0; at -= CHUNK) {
        copy_wait<STAGES - 1>();
        __syncwarp();
        const u32 from = ring.base + slot * STAGE_BYTES;
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        u32 rows[4], across[4];
        load_transposed(rows, from);
        load_transposed(across, from + STAGE_B);
        float dt0, dt1, slope, dt[8];
        tile_dt<SOFTPLUS>(low_bf16(rows[1]) + bias, at + 2 * l.t < length, dt0, slope);
        tile_dt<SOFTPLUS>(high_bf16(rows[1]) + bias, at + 2 * l.t + 1 < length, dt1, slope);
        share_dt(dt_room[l.warp], l, dt0, dt1, dt);
        ring.fetch<false>(at >= STAGES * CHUNK ? CHUNK : 0);
        total += dt0 + dt1;
        float dy0 = low_bf16(rows[3]), dy1 = high_bf16(rows[3]);
        if (GATED) {
            const float z0 = low_bf16(rows[2]), z1 = high_bf16(rows[2]);
            dy0 *= z0 * sigmoid(z0), dy1 *= z1 * sigmoid(z1);
        }
        SplitPair dy;
        dy.set(dy0, dy1);
        RankOne C;
        C.set(across[2], across[3]);
#pragma unroll
        for (int i = 3; i >= 0; --i) {
            float first[4], second[4];
            C.outer(dy, own[i], first, second);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                g[k] = (g[k] + second[k]) * exp2_approx(A[k] * dt[2 * i + 1]);
                g[k] = (g[k] + first[k]) * exp2_approx(A[k] * dt[2 * i]);
            }
        }
    }
    l.write_states(segment_g, l.row(p, l.segment), g);
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (l.t == 0) segment_dt[l.row(p, l.segment)] = total;
}

// A phased barrier in shared memory on which a warp may arrive now and wait later.
struct PhasedBarrier {
    u32 address;
    __device__ __forceinline__ void init(int arrivals) const {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(address), "r"(arrivals) : "memory");
    }
    __device__ __forceinline__ void arrive() const {
        asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" :: "r"(address) : "memory");
    }
    __device__ __forceinline__ void wait(u32 parity) const {
        u32 done;
        do {
            asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; "
                         "selp.u32 %0, 1, 0, p; }"
                         : "=r"(done) : "r"(address), "r"(parity) : "memory");
        } while (!done);
    }
};

// Sums over a warp's channels of eight packed steps: acc[m][0..1] row g, acc[m][2..3] row g + 8.
//
// A lane writes its states of steps 2i, 2i+1 (eight bf16) as row g of matrix t. Read back transposed,
// lane 4 r + c holds channels 2c, 2c+1 of matrix m's column r, that is of state s(m, r % 4) at step
// 2i + r / 4: an A operand whose k are channels. Weights are the B operand with the eight steps as
// columns, all but 2i and 2i + 1 masked out, so the four products can share an accumulator. Column
// 2c + r / 4 then holds the sum; the other one mixes steps and is dropped by pick(). The weights come
// in two bf16 parts, so that of the products only the state is rounded.
struct ChannelProduct {
    float low[4] = {}, high[4] = {};  // matrices 0, 1 and 2, 3

    __device__ __forceinline__ void add(u32 room, const SplitPair &x, const u32 (&step)[4]) {
        const u32 weights[2] = {transpose_8x8(x.high), transpose_8x8(__byte_perm(x.first, x.second, 0x7632))};
        u32 m[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) load_transposed(m[i], room + 512 * i);
#pragma unroll
        for (int i = 0; i < 4; i += 2)
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const u32 b0 = weights[part] & step[i], b1 = weights[part] & step[i + 1];
                mma(low, m[i][0], m[i][1], m[i + 1][0], m[i + 1][1], b0, b1);
                mma(high, m[i][2], m[i][3], m[i + 1][2], m[i + 1][3], b0, b1);
            }
    }
    // Sums for the states s(0..3, r % 4) at step 2c + r / 4, lane = 4 r + c.
    __device__ __forceinline__ float4 pick(bool odd) const {
        return make_float4(odd ? low[1] : low[0], odd ? low[3] : low[2], odd ? high[1] : high[0],
                           odd ? high[3] : high[2]);
    }
};

constexpr int TILE_ROOM = 2048 + 256;  // per warp: packed states of a chunk, dt of a chunk

__device__ __forceinline__ void store_packed(u32 room, const TileLane &l, int i, const float (&first)[4],
                                             const float (&second)[4], u32 (&packed)[4]) {
    packed[0] = pack_bf16(first[0], first[1]);
    packed[2] = pack_bf16(first[2], first[3]);
    packed[1] = pack_bf16(second[0], second[1]);
    packed[3] = pack_bf16(second[2], second[3]);
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};"
                 :: "r"(room + 512 * i + 128 * l.t + 16 * l.g), "r"(packed[0]), "r"(packed[2]),
                    "r"(packed[1]), "r"(packed[3]) : "memory");
}

template <int WARPS>
constexpr int tile_backward_shared() {
    return WARPS * (STAGES * STAGE_BYTES + TILE_ROOM + 2 * 64 * 16) + 16;
}

template <bool GATED, bool SOFTPLUS, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS)
tile_backward(Problem p, Upstream up, const uint2 *checkpoints, const float *segment_g,
              const float *segment_dt, u32 *du, u32 *ddelta, u32 *dz, float *dh0, float4 *partial_BC,
              float *partial_A, float *partial_D, float *partial_bias) {
    extern __shared__ __align__(128) char shared[];
    const TileLane l = TileLane::make<WARPS>(p);
    float4 *sums = reinterpret_cast<float4 *>(shared);  // [2][WARPS][64]: a chunk's dB and dC per warp
    char *own_room = shared + 2 * WARPS * 64 * 16 + l.warp * (STAGES * STAGE_BYTES + TILE_ROOM);
    const u32 room = shared_address(own_room) + STAGES * STAGE_BYTES;
    float *dt_room = reinterpret_cast<float *>(own_room + STAGES * STAGE_BYTES + 2048);
    const int warps = int(min(i64(WARPS), p.channels / 8 - l.group * WARPS));  // with channels to do
    const PhasedBarrier barrier{
        shared_address(shared + WARPS * (STAGES * STAGE_BYTES + TILE_ROOM + 2 * 64 * 16))};
    if (threadIdx.x == 0) barrier.init(warps);
    __syncthreads();
    if (l.warp >= warps) return;

    const int length = int(l.end - l.begin), last = (length - 1) / CHUNK * CHUNK;
    const i64 chunks = (p.length + CHUNK - 1) / CHUNK;
    TileRing ring;
    ring.start(p, l, l.begin + last, -1, shared_address(own_room), up.dout, up.dout_batch, up.dout_time,
               checkpoints, true, GATED, true, true);
#pragma unroll
    for (int s = 0; s < STAGES; ++s)
        ring.fetch<true>(last - s * CHUNK >= 0 ? length - last + s * CHUNK : 0);

    float A[4], g[4] = {}, dA[4] = {}, dD = 0.f, dbias = 0.f;
    l.read_states(A, p.A, l.channel);
#pragma unroll
    for (int k = 0; k < 4; ++k) A[k] *= LOG2E;
    const float bias = p.bias ? p.bias[l.channel] : 0.f, D = p.D ? p.D[l.channel] : 0.f;
    if (up.dh_end) l.read_states(g, up.dh_end, l.batch * p.channels + l.channel);
    for (i64 s = p.segments - 1; s > l.segment; --s) {
        const float dt = segment_dt[l.row(p, s)];
        float end[4];
        l.read_states(end, segment_g, l.row(p, s));
#pragma unroll
        for (int k = 0; k < 4; ++k) g[k] = fmaf(exp2_approx(A[k] * dt), g[k], end[k]);
    }
    // Masks: own[i] for the lanes that own steps 2i and 2i+1, step[i] for the lanes of their columns.
    u32 own[4], step[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        own[i] = l.t == i ? ~0u : 0u;
        step[i] = l.g >> 1 == i ? ~0u : 0u;
    }
    i64 row = ((l.batch * p.length + l.begin + last + l.g) * p.channels + l.channel - l.g) / 2 + l.t;
    float4 *to_BC = partial_BC + ((l.group * p.batch + l.batch) * chunks + (l.begin + last) / CHUNK) * 64;

    // Once every warp has arrived, the sums of round `round` are added up, in the order of the warps,
    // by two of them in turn.
    const auto add_warps = [&](int round) {
        barrier.wait(round & 1);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if ((2 * round + half) % warps != l.warp) continue;
            const float4 *from = sums + (round & 1) * WARPS * 64 + half * 32 + l.lane;
            float4 sum = from[0];
            for (int w = 1; w < warps; ++w) {
                const float4 more = from[64 * w];
                sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
            }
            to_BC[half * 32 + l.lane] = sum;
        }
        to_BC -= 64;
    };

    int slot = 0, round = 0;
    for (int at = last; at >= 0; at -= CHUNK, ++round) {
        copy_wait<STAGES - 1>();
        __syncwarp();
        const u32 from = ring.base + slot * STAGE_BYTES;
        u32 rows[4], across[4], along[4];
        load_transposed(rows, from);
        load_transposed(across, from + STAGE_B);
        load_matrices(along, from + STAGE_B);
        const uint2 saved =
            *reinterpret_cast<const uint2 *>(own_room + slot * STAGE_BYTES + STAGE_CHECKPOINT + 8 * l.lane);
        slot = slot + 1 == STAGES ? 0 : slot + 1;

        // ---- once per (step, channel): the owner's two steps
        const float u0 = low_bf16(rows[0]), u1 = high_bf16(rows[0]);
        float dt0, dt1, slope0, slope1, dt[8];
        tile_dt<SOFTPLUS>(low_bf16(rows[1]) + bias, at + 2 * l.t < length, dt0, slope0);
        tile_dt<SOFTPLUS>(high_bf16(rows[1]) + bias, at + 2 * l.t + 1 < length, dt1, slope1);
        share_dt(dt_room, l, dt0, dt1, dt);
        ring.fetch<true>(at >= STAGES * CHUNK ? CHUNK : 0);
        float dy0 = low_bf16(rows[3]), dy1 = high_bf16(rows[3]), gate0 = 0.f, gate1 = 0.f;
        if (GATED) {
            const float z0 = low_bf16(rows[2]), z1 = high_bf16(rows[2]);
            const float s0 = sigmoid(z0), s1 = sigmoid(z1);
            gate0 = dy0 * s0 * fmaf(z0, 1.f - s0, 1.f), gate1 = dy1 * s1 * fmaf(z1, 1.f - s1, 1.f);
            dy0 *= z0 * s0, dy1 *= z1 * s1;
        }
        SplitPair x, dy;
        x.set(dt0 * u0, dt1 * u1);
        dy.set(dy0, dy1);
        RankOne B, C;
        B.set(across[0], across[1]);
        C.set(across[2], across[3]);

        // ---- forwards: h of the eight steps, y
        float h[9][4], a[8][4], y0 = 0.f, y1 = 0.f;
        h[0][0] = low_bf16(saved.x), h[0][1] = high_bf16(saved.x);
        h[0][2] = low_bf16(saved.y), h[0][3] = high_bf16(saved.y);
        ChannelProduct product_B, product_C;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float first[4], second[4];
            B.outer(x, own[i], first, second);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                a[2 * i][k] = exp2_approx(A[k] * dt[2 * i]);
                a[2 * i + 1][k] = exp2_approx(A[k] * dt[2 * i + 1]);
                h[2 * i + 1][k] = fmaf(a[2 * i][k], h[2 * i][k], first[k]);
                h[2 * i + 2][k] = fmaf(a[2 * i + 1][k], h[2 * i + 1][k], second[k]);
            }
            u32 packed[4];
            store_packed(room, l, i, h[2 * i + 1], h[2 * i + 2], packed);
            if (GATED) {
                float sum[4] = {};
                mma(sum, packed[0], packed[1], packed[2], packed[3], along[2], along[3]);
                if (l.t == i) y0 = sum[0], y1 = sum[3];
            }
        }
        __syncwarp();
        product_C.add(room, dy, step);
        __syncwarp();

        // ---- backwards
        float v0 = 0.f, v1 = 0.f, through_decay[4] = {};
#pragma unroll
        for (int i = 3; i >= 0; --i) {
            float first[4], second[4], d_first = 0.f, d_second = 0.f;
            C.outer(dy, own[i], first, second);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                second[k] += g[k];
                g[k] = second[k] * a[2 * i + 1][k];
                const float w = g[k] * h[2 * i + 1][k];  // d / d (dt A)
                dA[k] = fmaf(w, dt[2 * i + 1], dA[k]);
                d_second = fmaf(w, A[k], d_second);
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                first[k] += g[k];
                g[k] = first[k] * a[2 * i][k];
                const float w = g[k] * h[2 * i][k];
                dA[k] = fmaf(w, dt[2 * i], dA[k]);
                d_first = fmaf(w, A[k], d_first);
            }
            u32 packed[4];
            store_packed(room, l, i, first, second, packed);
            float sum[4] = {};
            mma(sum, packed[0], packed[1], packed[2], packed[3], along[0], along[1]);
            if (l.t == i) v0 = sum[0], v1 = sum[3];
            // The lanes' sums over four states, added across t: ones in columns 2i and 2i + 1.
            mma_k4(through_decay, d_first, d_second, step[i] & 0x3f800000u);
        }
        __syncwarp();
        product_B.add(room, x, step);

        // ---- the block's sums over channels
        if (round > 0) add_warps(round - 1);
        float4 *to = sums + ((round & 1) * WARPS + l.warp) * 64 + l.lane;
        to[0] = product_B.pick(l.g >= 4);
        to[32] = product_C.pick(l.g >= 4);
        __syncwarp();
        if (l.lane == 0) barrier.arrive();

        // ---- outputs of the owner's two steps
        const float x0 = fmaf(u0, v0, LN2 * through_decay[0]) * slope0;
        const float x1 = fmaf(u1, v1, LN2 * through_decay[3]) * slope1;
        dbias += x0 + x1;
        dD = fmaf(dy0, u0, fmaf(dy1, u1, dD));
        const u32 row_u = transpose_8x8(pack_bf16(fmaf(v0, dt0, D * dy0), fmaf(v1, dt1, D * dy1)));
        const u32 row_x = transpose_8x8(pack_bf16(x0, x1));
        const u32 row_z =
            GATED ? transpose_8x8(pack_bf16(gate0 * fmaf(D, u0, y0), gate1 * fmaf(D, u1, y1))) : 0;
        if (at + l.g < length) {
            du[row] = row_u;
            ddelta[row] = row_x;
            if (GATED) dz[row] = row_z;
        }
        row -= CHUNK / 2 * p.channels;
    }
    add_warps(round - 1);

    dD += __shfl_xor_sync(~0u, dD, 1);
    dD += __shfl_xor_sync(~0u, dD, 2);
    dbias += __shfl_xor_sync(~0u, dbias, 1);
    dbias += __shfl_xor_sync(~0u, dbias, 2);
    l.write_states(partial_A, l.row(p, l.segment), dA);
    if (l.t == 0) {
        partial_D[l.row(p, l.segment)] = dD;
        partial_bias[l.row(p, l.segment)] = dbias;
    }
    if (l.segment == 0 && dh0) l.write_states(dh0, l.batch * p.channels + l.channel, g);
}

// Partial sums of tile_backward, (groups, batch, chunks, 2, 32 lanes, 4), to dB and dC. Lane 4 r + c
// holds the states s(0..3, r % 4) at step 2c + r / 4 of its chunk.
__global__ void tile_sum_BC(const float4 *partial, i64 groups, i64 batch, i64 length, bf16 *dB, bf16 *dC) {
    const i64 chunks = (length + CHUNK - 1) / CHUNK, size = batch * chunks * 64;
    const i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= size) return;
    float4 sum = partial[index];
    for (i64 group = 1; group < groups; ++group) {
        const float4 more = partial[group * size + index];
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    const int lane = index & 31, c = lane & 3, r = lane >> 2, q = r & 3;
    const i64 chunk = index / 64, b = chunk / chunks, t = chunk % chunks * CHUNK + 2 * c + (r >> 2);
    if (t >= length) return;
    bf16 *to = (index & 32 ? dC : dB) + (b * length + t) * 16 + (q & 1) + (q & 2) * 4;
    put(to, sum.x);
    put(to + 2, sum.y);
    put(to + 4, sum.z);
    put(to + 6, sum.w);
}
