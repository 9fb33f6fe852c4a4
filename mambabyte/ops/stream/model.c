/* Bytes one after another through a whole model on the CPU: batch 1, float32, inference.
 *
 * At batch 1 every weight is read once a byte and nothing is reused, so the floor is the size of
 * the weights over the bandwidth of the cache they sit in; everything here is laid out for that.
 * Several bytes that are known read them once together: products first, for all of them, then the
 * recurrence byte by byte; each byte is summed as it is alone.
 * Matrices stay where torch has them, row by row, LANES rows at a time, so that the sums leave the
 * lanes through one tree of shuffles.  The recurrence and the convolution have channels in the
 * lanes; their small parameters (A, taps, the step-size projection) are transposed once and kept
 * beside a copy of what they were made from, which every call compares: a model that has been
 * trained on in between is never answered for from old values.
 *
 * One thread.  A second would have to meet the first some twenty times a byte.
 */
#include "vectors.h"

/* ---------------------------------------------------------------- arguments (stream/cpu.py) */

enum { MAMBA, ATTENTION, MAMBA2, DELTA, MAMBA3 };
enum { NORM_LAYER = 0, NORM_RMS = 1 };
enum { RELU2 = 0, GELU = 1, SILU = 2 };
/* where a mixer's parameters are in `own`, (out, in) as torch has them; NULL where it has none */
enum { IN_PROJ, CONV, CONV_BIAS, X_PROJ, DT_PROJ, DT_BIAS, A_LOG, SKIP, OUT_PROJ, IN_BIAS,
       OUT_BIAS };
enum { Q_PROJ, K_PROJ, V_PROJ, O_PROJ, Q_BIAS, K_BIAS, V_BIAS, O_BIAS, Q_GAIN };
enum { S_IN, S_CONV, S_CONV_BIAS, S_DT_BIAS, S_A_LOG, S_SKIP, S_NORM, S_OUT, S_IN_BIAS,
       S_OUT_BIAS };
enum { R_IN, R_DT_BIAS, R_B_BIAS, R_C_BIAS, R_B_NORM, R_C_NORM, R_SKIP, R_OUT };
enum { D_QKV, D_CONV = 3, D_BETA = 6, D_A_LOG, D_DT_BIAS, D_NORM, D_OUT, D_DECAY, D_DECAY_UP,
       D_GATE, D_GATE_UP, D_GATE_BIAS, OWN };

typedef struct {
  int64_t kind, window;   /* of attention */
  int64_t added, kept_as; /* slots: of the output that is added before, and of its own; -1: none */
  real *norm, *norm_bias, *skip_gain, *stream_gain, *embedded_gain, *mixer_gain, *mlp_gain;
  real *mlp_norm, *mlp_norm_bias, *mlp_up, *mlp_up_bias, *mlp_out, *mlp_out_bias;
  real *own[OWN];
} layer;

typedef struct {
  int64_t layers, width, vocabulary, norm_kind, embedding_norm, hidden, activation;
  int64_t slots, mixed;                                       /* skips; the embedding mixed in */
  int64_t channels, states, taps, rank;                       /* MAMBA; rank 0: from all channels */
  int64_t heads, kv_heads, head_width, normed_heads, turning; /* ATTENTION */
  int64_t ssd_heads, ssd_groups, ssd_states;                  /* MAMBA2, MAMBA3 */
  int64_t ssd_pairs;                                          /* MAMBA3: of states that turn */
  int64_t delta_heads, delta_values;                          /* DELTA; values of a head */
  double norm_eps, tiny_eps, ssd_eps, cap, rotary_base;                /* cap 0: none */
  real *embedding, *head, *norm, *norm_bias, *head_bias, *embedding_gain;
  real *prior, *best, *kind, *gate, *gate_bias; /* of a guided model (task/guide.py), or NULL */
} model;

/* What a layer remembers; zeros before the first byte, where the inputs are NULL.
 * MAMBA and MAMBA2: tail (taps - 1, channels), state; DELTA: three tails, memory.
 * MAMBA3: B of each head and x of the byte before, state.
 * ATTENTION: k and v (kv_heads, stored, head_width), to which `length` rows are added: with inputs
 * they are copied first, without they are in the outputs already. */
typedef struct {
  real *in[4], *out[4];
  int64_t stored, in_stride[2], out_stride[2]; /* ATTENTION: rows, and strides of a head */
} memory;

typedef struct {
  int64_t length, position; /* bytes given, a byte or more, and bytes seen before */
  real *log_probs;          /* (vocabulary), after the last byte; see `each` */
  real *kept;               /* (layers, kept_size): see transposed */
  int64_t each;             /* log_probs (length, vocabulary) and states are those after each byte */
  /* Of a guided model, of the bytes that come next: log p (length, vocabulary), the best byte and
   * its kind (length); or NULL. */
  real *hint;
  unsigned char *best, *kind;
} call;

/* scratch of a call: a row a byte each, and what a mixer needs */
typedef struct {
  real *normed, *branch, *mixer;
} work;

#define INNER_EPS 1e-5 /* of the norms inside DELTA and MAMBA3 */
#define LEAST_RATE ((real)1e-4) /* of MAMBA3's decay */
#define KEY_EPS 1e-6   /* of DELTA, added to the square of a key's length */

INLINE int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---------------------------------------------------------------- matrix times vector */

#if !defined(__clang__)
/* lane i of the result is the sum of the lanes of x[i]: `transpose` and the sum of its rows, in
 * which every level adds what the next would only move */
INLINE vec sum_rows(vec x[LANES]) {
  ivec lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  UNROLL_ALL for (int step = LANES / 2; step; step /= 2) {
    const ivec upper = (lane & step) != 0;
    const ivec low = lane + (upper & (LANES - step));
    const ivec high = lane + step + (upper & (LANES - step));
    UNROLL_ALL for (int i = 0; i < step; i++)
      x[i] = __builtin_shuffle(x[i], x[i + step], low) + __builtin_shuffle(x[i], x[i + step], high);
  }
  return x[0];
}
#else
INLINE vec sum_rows(vec x[LANES]) {
  vec sums;
  for (int i = 0; i < LANES; i++) sums[i] = sum_lanes(x[i]);
  return sums;
}
#endif

/* LANES rows of w at once; whole: the columns in whole vectors */
INLINE vec rows_times(const real *w, int64_t columns, int64_t whole, const real *x) {
  vec sum[LANES];
  UNROLL_ALL for (int r = 0; r < LANES; r++) sum[r] = splat(0);
  for (int64_t i = 0; i < whole; i += LANES) {
    const vec v = load(x + i);
    UNROLL_ALL for (int r = 0; r < LANES; r++) {
      sum[r] += load(w + r * columns + i) * v;
    }
  }
  vec total = sum_rows(sum);
  for (int64_t i = whole; i < columns; i++)
    for (int r = 0; r < LANES; r++) total[r] += w[r * columns + i] * x[i];
  return total;
}

/* y = w x, or y += w x, of n vectors; w (rows, columns) with a row every `columns`, vectors every
 * `from` in x and every `to` in y. A few rows of w at a time meet all vectors, so that w is fetched
 * once; each vector is summed as it is alone. */
static NOINLINE void times_each(const real *w, int64_t rows, int64_t columns, int64_t n,
                                const real *x, int64_t from, real *y, int64_t to, int add) {
  const int64_t whole = columns / LANES * LANES;
  int64_t r = 0;
  for (; r + LANES <= rows; r += LANES)
    for (int64_t t = 0; t < n; t++) {
      vec total = rows_times(w + r * columns, columns, whole, x + t * from);
      real *at = y + t * to + r;
      store(at, add ? load(at) + total : total);
    }
  for (; r < rows; r++)
    for (int64_t t = 0; t < n; t++) {
      const real *v = x + t * from;
      vec sum = splat(0);
      for (int64_t i = 0; i < whole; i += LANES) sum += load(w + r * columns + i) * load(v + i);
      real total = sum_lanes(sum), *at = y + t * to + r;
      for (int64_t i = whole; i < columns; i++) total += w[r * columns + i] * v[i];
      *at = add ? *at + total : total;
    }
}

static void times(const real *w, int64_t rows, int64_t columns, const real *x, real *y, int add) {
  times_each(w, rows, columns, 1, x, 0, y, 0, add);
}

/* ---------------------------------------------------------------- elementwise */

static real dot(const real *x, const real *y, int64_t n) {
  vec sum = splat(0);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) sum += load(x + i) * load(y + i);
  real total = sum_lanes(sum);
  for (; i < n; i++) total += x[i] * y[i];
  return total;
}

static real mean_of(const real *x, int64_t n) {
  vec sum = splat(0);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) sum += load(x + i);
  real total = sum_lanes(sum);
  for (; i < n; i++) total += x[i];
  return total / n;
}

static void rms(const real *x, int64_t n, const real *weight, double eps, real *y) {
  const real factor = (real)(1 / sqrt(dot(x, x, n) / (double)n + eps));
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor * (weight ? weight[i] : 1);
}

static void normalise(const model *m, const real *x, const real *weight, const real *bias,
                      real *y) {
  const int64_t n = m->width;
  if (m->norm_kind == NORM_RMS) {
    rms(x, n, weight, m->norm_eps, y);
    return;
  }
  const real mean = mean_of(x, n);
  for (int64_t i = 0; i < n; i++) y[i] = x[i] - mean;
  const real factor = (real)(1 / sqrt(dot(y, y, n) / (double)n + m->norm_eps));
  for (int64_t i = 0; i < n; i++) y[i] = y[i] * factor * weight[i] + bias[i];
}

/* log-softmax of n values in place */
static void log_softmax(real *x, int64_t n) {
  real top = x[0];
  for (int64_t i = 1; i < n; i++) top = x[i] > top ? x[i] : top;
  double sum = 0;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) sum += sum_lanes(exp_negative(top - load(x + i)));
  for (; i < n; i++) sum += exp_negative(splat(top - x[i]))[0];
  const real shift = (real)log(sum);
  for (i = 0; i < n; i++) x[i] = x[i] - top - shift;
}

/* x += gain * (w y + bias) for n bytes, of which gain and bias may be NULL; y every `from` */
static void add_branch(const model *m, const real *w, const real *bias, const real *gain,
                       int64_t columns, int64_t n, const real *y, int64_t from, real *x,
                       real *branch) {
  const int64_t W = m->width;
  if (!bias && !gain) {
    times_each(w, W, columns, n, y, from, x, W, 1);
    return;
  }
  times_each(w, W, columns, n, y, from, branch, W, 0);
  for (int64_t t = 0; t < n; t++, x += W, branch += W)
    for (int64_t i = 0; i < W; i++)
      x[i] += (branch[i] + (bias ? bias[i] : 0)) * (gain ? gain[i] : 1);
}

/* y = w normed + bias for n bytes, y every `to` */
static void project(const model *m, const real *w, const real *bias, int64_t rows, int64_t n,
                    const real *normed, real *y, int64_t to) {
  times_each(w, rows, m->width, n, normed, m->width, y, to, 0);
  for (int64_t t = 0; t < n && bias; t++)
    for (int64_t i = 0; i < rows; i++) y[t * to + i] += bias[i];
}

static void normalise_each(const model *m, const real *x, int64_t n, const real *weight,
                           const real *bias, real *y) {
  for (int64_t t = 0; t < n; t++)
    normalise(m, x + t * m->width, weight, bias, y + t * m->width);
}

/* Where the state after byte i of n goes, `size` values: if those after every byte are wanted, each
 * has a place of its own, and begins as the one before it. */
INLINE real *place(real *out, int64_t size, int64_t i, int each) {
  if (each && i) memcpy(out + i * size, out + (i - 1) * size, size * sizeof(real));
  return each ? out + i * size : out;
}

/* The next three work on whole vectors: arrays are padded. */
static void silu(real *x, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) store(x + i, load(x + i) * sigmoid(load(x + i)));
}

static void softplus_of(real *x, const real *bias, int64_t n) {
  vec slope;
  for (int64_t i = 0; i < n; i++) x[i] += bias[i];
  for (int64_t i = 0; i < n; i += LANES) store(x + i, softplus(load(x + i), &slope));
}

/* exp(-x), for x >= 0 */
static void decays(real *x, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) store(x + i, exp_negative(load(x + i)));
}

/* Causal depthwise convolution and SiLU of one byte. window (taps, channels): the last inputs, the
 * newest one to come from x at its end; w (channels, taps). out may be x. */
static void convolve(const real *w, const real *bias, int64_t taps, int64_t channels, real *window,
                     const real *x, real *out) {
  real *newest = window + (taps - 1) * channels;
  memcpy(newest, x, channels * sizeof(real));
  for (int64_t c = 0; c < channels; c++) {
    real sum = bias ? bias[c] : 0;
    for (int64_t k = 0; k < taps; k++) sum += w[c * taps + k] * window[k * channels + c];
    out[c] = sum;
  }
  silu(out, channels);
  memmove(window, window + channels, (taps - 1) * channels * sizeof(real));
}

static void copy_or_zero(real *to, const real *from, int64_t n) {
  if (!n) return; /* then either may be NULL */
  if (from)
    memcpy(to, from, n * sizeof(real));
  else
    memset(to, 0, n * sizeof(real));
}

/* ---------------------------------------------------------------- selective SSM */

/* The parameters with channels in the lanes, (rows, padded channels) each, and what they were made
 * from. */
typedef struct {
  real *rates, *taps, *step; /* (states), (taps), (rank) rows */
  real *A_log, *conv, *dt_proj;
} transposed;

static transposed kept_at(const model *m, real *kept) {
  const int64_t P = padded(m->channels);
  transposed t;
  t.rates = kept;
  t.taps = t.rates + m->states * P;
  t.step = t.taps + m->taps * P;
  t.A_log = t.step + m->rank * P;
  t.conv = t.A_log + m->channels * m->states;
  t.dt_proj = t.conv + m->channels * m->taps;
  return t;
}

int64_t kept_size(const model *m) { /* elements of one layer */
  return padded((m->states + m->taps + m->rank) * (padded(m->channels) + m->channels));
}

/* fill what `advance` takes as `kept` */
void keep(const model *m, const layer *layers, real *kept) {
  const int64_t D = m->channels, P = padded(D), size = kept_size(m);
  memset(kept, 0, m->layers * size * sizeof(real));
  for (int64_t i = 0; i < m->layers; i++) {
    const layer *l = layers + i;
    if (l->kind != MAMBA) continue;
    const transposed t = kept_at(m, kept + i * size);
    states_in(l->own[A_LOG], m->states, D, t.rates, P);
    for (int64_t n = 0; n < m->states; n++)
      for (int64_t d = 0; d < D; d++) t.rates[n * P + d] = rate_of(-expf(t.rates[n * P + d]));
    states_in(l->own[CONV], m->taps, D, t.taps, P);
    memcpy(t.A_log, l->own[A_LOG], D * m->states * sizeof(real));
    memcpy(t.conv, l->own[CONV], D * m->taps * sizeof(real));
    if (!m->rank) continue;
    states_in(l->own[DT_PROJ], m->rank, D, t.step, P);
    memcpy(t.dt_proj, l->own[DT_PROJ], D * m->rank * sizeof(real));
  }
}

static int stale(const model *m, const layer *layers, real *kept) {
  const int64_t D = m->channels, size = kept_size(m);
  for (int64_t i = 0; i < m->layers; i++) {
    const layer *l = layers + i;
    if (l->kind != MAMBA) continue;
    const transposed t = kept_at(m, kept + i * size);
    if (memcmp(l->own[A_LOG], t.A_log, D * m->states * sizeof(real)) ||
        memcmp(l->own[CONV], t.conv, D * m->taps * sizeof(real)) ||
        (m->rank && memcmp(l->own[DT_PROJ], t.dt_proj, D * m->rank * sizeof(real))))
      return 1;
  }
  return 0;
}

static int64_t mamba_scratch(const model *m, int64_t length) {
  const int64_t P = padded(m->channels);
  return (m->states + m->taps + 3) * P +
         length * (2 * P + padded(2 * m->channels) + PAD + padded(m->rank + 2 * m->states));
}

/* every mixer: x[t] += out_proj(...) for every byte */
static void mamba(const model *m, const layer *l, const transposed t, const memory *s,
                  int64_t length, int each, real *x, work w) {
  const int64_t D = m->channels, N = m->states, P = padded(D), before = m->taps - 1;
  const int64_t lows = padded(m->rank + 2 * N), boths = padded(2 * D) + PAD;
  real *h = w.mixer;                         /* (states, P) */
  real *window = h + N * P;                  /* (taps, P): the last inputs, the newest at the end */
  real *conv_bias = window + m->taps * P, *dt_bias = conv_bias + P, *skip = dt_bias + P;
  /* of every byte: */
  real *u = skip + P, *delta = u + length * P;
  real *both = delta + length * P;           /* x and z, with room to read beyond z */
  real *low = both + length * boths;         /* step sizes, B, C */
  memset(w.mixer, 0, mamba_scratch(m, length) * sizeof(real));
  if (s->in[1]) states_in(s->in[1], N, D, h, P);
  for (int64_t k = 0; k < before && s->in[0]; k++)
    memcpy(window + k * P, s->in[0] + k * D, D * sizeof(real));
  if (l->own[CONV_BIAS]) memcpy(conv_bias, l->own[CONV_BIAS], D * sizeof(real));
  memcpy(dt_bias, l->own[DT_BIAS], D * sizeof(real));
  memcpy(skip, l->own[SKIP], D * sizeof(real));

  normalise_each(m, x, length, l->norm, l->norm_bias, w.normed);
  project(m, l->own[IN_PROJ], l->own[IN_BIAS], 2 * D, length, w.normed, both, boths);
  for (int64_t i = 0; i < length; i++) {
    memcpy(window + before * P, both + i * boths, D * sizeof(real));
    for (int64_t d = 0; d < P; d += LANES) {
      vec sum = load(conv_bias + d);
      for (int64_t k = 0; k <= before; k++) sum += load(t.taps + k * P + d) * load(window + k * P + d);
      store(u + i * P + d, sum * sigmoid(sum));
    }
    memmove(window, window + P, before * P * sizeof(real));
    for (int64_t k = 0; k < before && (each || i == length - 1); k++)
      memcpy(s->out[0] + (each * i * before + k) * D, window + k * P, D * sizeof(real));
  }
  times_each(l->own[X_PROJ], m->rank + 2 * N, D, length, u, P, low, lows, 0);
  if (!m->rank) times_each(l->own[DT_PROJ], D, D, length, u, P, delta, P, 0);
  real *y = u;
  for (int64_t i = 0; i < length; i++, u += P, delta += P, low += lows, both += boths) {
    const real *z = both + D, *B = low + m->rank, *C = B + N;
    for (int64_t d = 0; d < P; d += WIDTH) {
      vec dt[2], input[2], sum[2], slope;
      UNROLL2 for (int v = 0; v < 2; v++) {
        const int64_t at = d + v * LANES;
        dt[v] = load(delta + at);
        for (int64_t r = 0; r < m->rank; r++) dt[v] += low[r] * load(t.step + r * P + at);
      }
      UNROLL2 for (int v = 0; v < 2; v++) {
        const int64_t at = d + v * LANES;
        dt[v] = softplus(dt[v] + load(dt_bias + at), &slope);
        input[v] = dt[v] * load(u + at);
        dt[v] = vmin(dt[v], splat(HUGE_DT));
        sum[v] = load(u + at) * load(skip + at);
      }
      for (int64_t n = 0; n < N; n++)
        UNROLL2 for (int v = 0; v < 2; v++) {
          const int64_t at = n * P + d + v * LANES;
          vec next = next_state(load(h + at), dt[v] * load(t.rates + at), input[v] * B[n]);
          store(h + at, next);
          sum[v] += next * C[n];
        }
      UNROLL2 for (int v = 0; v < 2; v++) {
        const vec gate = load(z + d + v * LANES);
        store(u + d + v * LANES, sum[v] * (gate * sigmoid(gate)));
      }
    }
    if (each || i == length - 1) states_out(h, P, D, s->out[1] + each * i * D * N, N);
  }
  add_branch(m, l->own[OUT_PROJ], l->own[OUT_BIAS], l->mixer_gain, D, length, y, P, x, w.branch);
}

/* ---------------------------------------------------------------- SSD */

static int64_t mamba2_scratch(const model *m, int64_t length) {
  const int64_t conv = m->channels + 2 * m->ssd_groups * m->ssd_states;
  return padded(m->taps * conv) + padded(conv) + 2 * padded(m->ssd_heads) +
         length * (padded(m->channels + conv + m->ssd_heads) + padded(m->channels) + PAD);
}

/* h = a h + b B, and h . C */
INLINE real step_row(real *h, real a, real b, const real *B, const real *C, int64_t n) {
  vec sum = splat(0);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vec next = load(h + i) * a + load(B + i) * b;
    store(h + i, next);
    sum += next * load(C + i);
  }
  real total = sum_lanes(sum);
  for (; i < n; i++) total += (h[i] = h[i] * a + B[i] * b) * C[i];
  return total;
}

static void mamba2(const model *m, const layer *l, const memory *s, int64_t length, int each,
                   real *x, work w) {
  const int64_t D = m->channels, H = m->ssd_heads, G = m->ssd_groups, N = m->ssd_states;
  const int64_t conv = D + 2 * G * N, P = D / H, before = m->taps - 1;
  const int64_t alls = padded(D + conv + H) + PAD, ys = padded(D);
  real *window = w.mixer, *u = window + padded(m->taps * conv), *dt = u + padded(conv);
  real *decay = dt + padded(H), *all = decay + padded(H), *y = all + length * alls;
  copy_or_zero(window, s->in[0], before * conv);
  copy_or_zero(s->out[1], s->in[1], D * N);
  normalise_each(m, x, length, l->norm, l->norm_bias, w.normed);
  project(m, l->own[S_IN], l->own[S_IN_BIAS], D + conv + H, length, w.normed, all,
          alls); /* z; x, B, C; dt */
  for (int64_t i = 0; i < length; i++, all += alls, y += ys) {
    real *h = place(s->out[1], D * N, i, each);
    convolve(l->own[S_CONV], l->own[S_CONV_BIAS], m->taps, conv, window, all + D, u);
    memcpy(dt, all + D + conv, H * sizeof(real));
    softplus_of(dt, l->own[S_DT_BIAS], H);
    for (int64_t j = 0; j < H; j++) decay[j] = dt[j] * expf(l->own[S_A_LOG][j]);
    decays(decay, H);
    for (int64_t c = 0; c < D; c++) {
      const int64_t j = c / P, g = j / (H / G);
      y[c] = step_row(h + c * N, decay[j], dt[j] * u[c], u + D + g * N, u + D + (G + g) * N, N) +
             l->own[S_SKIP][j] * u[c];
    }
    silu(all, D);
    for (int64_t c = 0; c < D; c++) y[c] *= all[c];
    for (int64_t g = 0, size = D / G; g < G; g++)
      rms(y + g * size, size, l->own[S_NORM] + g * size, m->ssd_eps, y + g * size);
    copy_or_zero(s->out[0] + each * i * before * conv, window, before * conv);
  }
  add_branch(m, l->own[S_OUT], l->own[S_OUT_BIAS], l->mixer_gain, D, length, y - length * ys, ys, x,
             w.branch);
}

/* ---------------------------------------------------------------- Mamba-3's scan */

static int64_t mamba3_projected(const model *m) {
  return 2 * m->channels + 2 * m->ssd_groups * m->ssd_states + 3 * m->ssd_heads + m->ssd_pairs;
}

static int64_t mamba3_scratch(const model *m, int64_t length) {
  return 4 * padded(m->ssd_heads) + padded(m->ssd_pairs) + 5 * padded(m->ssd_states) +
         padded(m->ssd_heads * m->ssd_states) + padded(m->channels) +
         length * (padded(mamba3_projected(m)) + PAD + padded(m->channels));
}

/* each pair of neighbours, the other way round */
INLINE vec swapped(vec x) {
#if !defined(__clang__)
  ivec lane;
  UNROLL_ALL for (int i = 0; i < LANES; i++) lane[i] = i ^ 1;
  return __builtin_shuffle(x, lane);
#else
  vec y;
  UNROLL_ALL for (int i = 0; i < LANES; i++) y[i] = x[i ^ 1];
  return y;
#endif
}

/* h = cos h + sin (h, pairs swapped) + v before + u now, and h . C; n even */
INLINE real turn_row(real *h, const real *cosine, const real *sine, real v, const real *before,
                     real u, const real *now, const real *C, int64_t n) {
  vec sum = splat(0);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vec old = load(h + i);
    const vec next = old * load(cosine + i) + swapped(old) * load(sine + i) +
                     load(before + i) * v + load(now + i) * u;
    store(h + i, next);
    sum += next * load(C + i);
  }
  real total = sum_lanes(sum);
  for (; i < n; i += 2) {
    const real a = h[i], b = h[i + 1];
    h[i] = a * cosine[i] + b * sine[i] + v * before[i] + u * now[i];
    h[i + 1] = b * cosine[i + 1] + a * sine[i + 1] + v * before[i + 1] + u * now[i + 1];
    total += h[i] * C[i] + h[i + 1] * C[i + 1];
  }
  return total;
}

static void mamba3(const model *m, const layer *l, const memory *s, int64_t length, int each,
                   real *x, work w) {
  const int64_t D = m->channels, H = m->ssd_heads, G = m->ssd_groups, N = m->ssd_states;
  const int64_t P = D / H, S = m->ssd_pairs, alls = padded(mamba3_projected(m)) + PAD;
  const int64_t ys = padded(D);
  real *dt = w.mixer, *rate = dt + padded(H), *mix = rate + padded(H), *decay = mix + padded(H);
  real *theta = decay + padded(H), *cosine = theta + padded(S), *sine = cosine + padded(N);
  real *before = sine + padded(N), *now = before + padded(N), *query = now + padded(N);
  real *k = query + padded(N), *v = k + padded(H * N), *all = v + padded(D);
  real *y = all + length * alls;
  copy_or_zero(k, s->in[0], H * N);
  copy_or_zero(v, s->in[1], D);
  copy_or_zero(s->out[2], s->in[2], D * N);
  normalise_each(m, x, length, l->norm, l->norm_bias, w.normed);
  project(m, l->own[R_IN], NULL, mamba3_projected(m), length, w.normed, all, alls);
  for (int64_t i = 0; i < length; i++, all += alls, y += ys) {
    real *h = place(s->out[2], D * N, i, each), *u = all + D, *B = u + D, *C = B + G * N;
    const real *gates = C + G * N; /* of the heads: dt, rate, mix; of the pairs: angle */
    vec slope;
    memcpy(dt, gates, H * sizeof(real));
    softplus_of(dt, l->own[R_DT_BIAS], H);
    memcpy(rate, gates + H, H * sizeof(real));
    memcpy(mix, gates + 2 * H, H * sizeof(real));
    for (int64_t j = 0; j < H; j += LANES) {
      store(rate + j, vmax(softplus(load(rate + j), &slope), splat(LEAST_RATE)));
      store(mix + j, sigmoid(load(mix + j)));
      store(decay + j, exp_negative(load(rate + j) * load(dt + j)));
    }
    for (int64_t p = 0; p < S; p++) theta[p] = (real)M_PI * tanhf(gates[3 * H + p]);
    for (int64_t g = 0; g < G; g++) {
      rms(B + g * N, N, l->own[R_B_NORM], INNER_EPS, B + g * N);
      rms(C + g * N, N, l->own[R_C_NORM], INNER_EPS, C + g * N);
    }
    for (int64_t j = 0; j < H; j++) {
      const int64_t g = j / (H / G);
      const real last = (1 - mix[j]) * dt[j], own = mix[j] * dt[j];
      real *key = k + j * N;
      for (int64_t n = 0; n < N; n++) cosine[n] = decay[j], sine[n] = 0;
      for (int64_t p = 0; p < S; p++) { /* whole turns are left out in double */
        const double angle = (double)theta[p] * dt[j];
        const real left = (real)(angle - 2 * M_PI * rint(angle / (2 * M_PI)));
        cosine[2 * p] = cosine[2 * p + 1] = decay[j] * cosf(left);
        sine[2 * p] = decay[j] * sinf(left);
        sine[2 * p + 1] = -sine[2 * p];
      }
      for (int64_t n = 0; n < N; n++)
        before[n] = last * (cosine[n] * key[n] + sine[n] * key[n ^ 1]);
      for (int64_t n = 0; n < N; n++) {
        key[n] = B[g * N + n] + l->own[R_B_BIAS][j * N + n];
        now[n] = own * key[n];
        query[n] = C[g * N + n] + l->own[R_C_BIAS][j * N + n];
      }
      for (int64_t c = j * P; c < (j + 1) * P; c++)
        y[c] = turn_row(h + c * N, cosine, sine, v[c], before, u[c], now, query, N) +
               l->own[R_SKIP][j] * u[c];
    }
    memcpy(v, u, D * sizeof(real));
    silu(all, D);
    for (int64_t c = 0; c < D; c++) y[c] *= all[c];
    if (each || i == length - 1) {
      memcpy(s->out[0] + each * i * H * N, k, H * N * sizeof(real));
      memcpy(s->out[1] + each * i * D, v, D * sizeof(real));
    }
  }
  add_branch(m, l->own[R_OUT], NULL, l->mixer_gain, D, length, y - length * ys, ys, x, w.branch);
}

/* ---------------------------------------------------------------- gated delta rule */

static int64_t delta_scratch(const model *m, int64_t length) {
  const int64_t values = m->delta_heads * m->delta_values, width = padded(m->width);
  return (m->taps + length) * (2 * width + padded(values)) + padded(m->delta_values) +
         padded(m->delta_heads) + padded(m->delta_values) +
         length * (width + 2 * padded(values) + 3 * PAD);
}

/* S = diag(decay) S, S += beta k (v - S^T k)^T, o = S^T q; S (keys, values), decay[k * each] */
static void delta_rule(real *S, const real *q, const real *k, const real *v, const real *decay,
                       int64_t each, real beta, int64_t keys, int64_t values, real *missing,
                       real *o) {
  memcpy(missing, v, values * sizeof(real));
  memset(o, 0, values * sizeof(real));
  for (int64_t i = 0; i < keys; i++) {
    const real a = decay[i * each], key = k[i];
    real *row = S + i * values;
    for (int64_t j = 0; j < values; j++) missing[j] -= key * (row[j] *= a);
  }
  for (int64_t i = 0; i < keys; i++) {
    const real key = beta * k[i], query = q[i];
    real *row = S + i * values;
    for (int64_t j = 0; j < values; j++) o[j] += query * (row[j] += key * missing[j]);
  }
}

static void delta(const model *m, const layer *l, const memory *s, int64_t length, int each,
                  real *x, work w) {
  const int64_t H = m->delta_heads, V = m->delta_values, keys = m->width, values = H * V;
  const int64_t K = keys / H, before = m->taps - 1, by_channel = l->own[D_DECAY_UP] != NULL;
  const int64_t widths[3] = {keys, keys, values}, gates = by_channel ? keys : H;
  const int64_t decays_of = padded(keys) + PAD, gates_of = padded(values) + PAD, os = padded(values);
  real *at = w.mixer, *window[3], *qkv[3];
  normalise_each(m, x, length, l->norm, l->norm_bias, w.normed);
  for (int p = 0; p < 3; p++) {
    window[p] = at, qkv[p] = at + m->taps * padded(widths[p]);
    at += (m->taps + length) * padded(widths[p]);
    copy_or_zero(window[p], s->in[p], before * widths[p]);
    project(m, l->own[D_QKV + p], NULL, widths[p], length, w.normed, qkv[p], padded(widths[p]));
  }
  real *missing = at, *beta = missing + padded(V), *low = beta + padded(H);
  real *decay = low + padded(V), *gate = decay + length * decays_of, *o = gate + length * gates_of;
  copy_or_zero(s->out[3], s->in[3], keys * V);
  if (!by_channel) {
    project(m, l->own[D_DECAY], NULL, H, length, w.normed, decay, decays_of);
    project(m, l->own[D_GATE], NULL, values, length, w.normed, gate, gates_of);
  }
  for (int64_t i = 0; i < length; i++, decay += decays_of, gate += gates_of, o += os) {
    const real *normed = w.normed + i * m->width;
    real *S = place(s->out[3], keys * V, i, each);
    for (int p = 0; p < 3; p++) {
      convolve(l->own[D_CONV + p], NULL, m->taps, widths[p], window[p], qkv[p], qkv[p]);
      copy_or_zero(s->out[p] + each * i * before * widths[p], window[p], before * widths[p]);
    }
    for (int64_t h = 0; h < H; h++) { /* |q| = 1 / sqrt(K), |k| = 1 */
      rms(qkv[0] + h * K, K, NULL, KEY_EPS / K, qkv[0] + h * K);
      rms(qkv[1] + h * K, K, NULL, KEY_EPS / K, qkv[1] + h * K);
      for (int64_t c = h * K; c < (h + 1) * K; c++)
        qkv[0][c] /= K, qkv[1][c] *= (real)(1 / sqrt((double)K));
    }
    times(l->own[D_BETA], H, m->width, normed, beta, 0);
    for (int64_t h = 0; h < H; h += LANES) store(beta + h, sigmoid(load(beta + h)));
    if (by_channel) { /* both gates by way of as many channels as a head has values */
      times(l->own[D_DECAY], V, m->width, normed, low, 0);
      times(l->own[D_DECAY_UP], keys, V, low, decay, 0);
      times(l->own[D_GATE], V, m->width, normed, low, 0);
      times(l->own[D_GATE_UP], values, V, low, gate, 0);
      for (int64_t c = 0; c < values && l->own[D_GATE_BIAS]; c++) gate[c] += l->own[D_GATE_BIAS][c];
      for (int64_t c = 0; c < values; c += LANES) store(gate + c, sigmoid(load(gate + c)));
    } else {
      silu(gate, values);
    }
    softplus_of(decay, l->own[D_DT_BIAS], gates);
    for (int64_t c = 0; c < gates; c++) decay[c] *= expf(l->own[D_A_LOG][c * H / gates]);
    decays(decay, gates);
    for (int64_t h = 0; h < H; h++) {
      delta_rule(S + h * K * V, qkv[0] + h * K, qkv[1] + h * K, qkv[2] + h * V,
                 decay + h * gates / H, by_channel, beta[h], K, V, missing, o + h * V);
      rms(o + h * V, V, l->own[D_NORM], INNER_EPS, o + h * V);
    }
    for (int64_t c = 0; c < values; c++) o[c] *= gate[c];
    for (int p = 0; p < 3; p++) qkv[p] += padded(widths[p]);
  }
  add_branch(m, l->own[D_OUT], NULL, l->mixer_gain, values, length, o - length * os, os, x,
             w.branch);
}

/* ---------------------------------------------------------------- attention */

/* cosines and sines (length, 2, half), in double as the angles grow with the position */
static void rotary(const model *m, int64_t position, int64_t length, real *table) {
  const int64_t half = m->head_width / 2;
  for (int64_t i = 0; i < length; i++)
    for (int64_t j = 0; j < half; j++) {
      const double rate = j < m->turning ? pow(m->rotary_base, -(double)j / m->turning) : 0;
      table[2 * i * half + j] = (real)cos((position + i) * rate);
      table[(2 * i + 1) * half + j] = (real)sin((position + i) * rate);
    }
}

/* heads of one row: normalised where the model does so, and rotated; from and to may be one */
static void turn(const model *m, const real *table, real *x, int64_t heads) {
  const int64_t half = m->head_width / 2;
  for (int64_t h = 0; h < heads; h++, x += m->head_width) {
    if (m->normed_heads) rms(x, m->head_width, NULL, m->tiny_eps, x);
    for (int64_t j = 0; j < half; j++) {
      const real a = x[j], b = x[half + j], c = table[j], s = table[half + j];
      x[j] = a * c - b * s;
      x[half + j] = a * s + b * c;
    }
  }
}

static int64_t attention_scratch(const model *m, int64_t length, int64_t most) {
  return length * (2 * padded(m->width) + 2 * padded(m->kv_heads * m->head_width)) + padded(most);
}

static void attention(const model *m, const layer *l, const memory *s, int64_t length,
                      const real *table, real *x, work w) {
  const int64_t d = m->head_width, kv = m->kv_heads * d;
  const int64_t qs = padded(m->width), rows = padded(kv);
  real *q = w.mixer, *y = q + length * qs, *row[2] = {y + length * qs, NULL};
  real *weight = row[0] + 2 * length * rows;
  row[1] = row[0] + length * rows;
  for (int64_t h = 0; h < m->kv_heads; h++)
    for (int p = 0; p < 2 && s->in[0] && s->stored; p++)
      memcpy(s->out[p] + h * s->out_stride[p], s->in[p] + h * s->in_stride[p],
             s->stored * d * sizeof(real));
  normalise_each(m, x, length, l->norm, l->norm_bias, w.normed);
  project(m, l->own[Q_PROJ], l->own[Q_BIAS], m->width, length, w.normed, q, qs);
  project(m, l->own[K_PROJ], l->own[K_BIAS], kv, length, w.normed, row[0], rows);
  project(m, l->own[V_PROJ], l->own[V_BIAS], kv, length, w.normed, row[1], rows);
  for (int64_t i = 0; i < length; i++, table += d, q += qs, y += qs) {
    const int64_t last = s->stored + i, first = larger(0, last - (l->window - 1));
    const int64_t seen = last - first + 1;
    turn(m, table, q, m->heads);
    turn(m, table, row[0], m->kv_heads);
    for (int64_t h = 0; h < m->kv_heads; h++)
      for (int p = 0; p < 2; p++)
        memcpy(s->out[p] + h * s->out_stride[p] + last * d, row[p] + h * d, d * sizeof(real));
    row[0] += rows, row[1] += rows;
    memset(y, 0, m->width * sizeof(real));
    for (int64_t h = 0; h < m->heads; h++) {
      const int64_t head = h / (m->heads / m->kv_heads);
      real *out = y + h * d;
      times(s->out[0] + head * s->out_stride[0] + first * d, seen, d, q + h * d, weight, 0);
      const real factor = (real)(1 / sqrt((double)d)) *
                          (l->own[Q_GAIN] ? l->own[Q_GAIN][h] : 1);
      for (int64_t j = 0; j < seen; j++) weight[j] *= factor;
      log_softmax(weight, seen);
      for (int64_t j = 0; j < seen; j += LANES)
        store(weight + j, exp_negative(-load(weight + j)));
      const real *value = s->out[1] + head * s->out_stride[1] + first * d;
      for (int64_t j = 0; j < seen; j++)
        for (int64_t c = 0; c < d; c++) out[c] += weight[j] * value[j * d + c];
    }
  }
  add_branch(m, l->own[O_PROJ], l->own[O_BIAS], l->mixer_gain, m->width, length, y - length * qs,
             qs, x, w.branch);
}

/* ---------------------------------------------------------------- the rest of a block */

static void mlp(const model *m, const layer *l, int64_t length, real *x, work w) {
  const int64_t row = padded(m->hidden);
  real *hidden = w.mixer;
  normalise_each(m, x, length, l->mlp_norm, l->mlp_norm_bias, w.normed);
  project(m, l->mlp_up, l->mlp_up_bias, m->hidden, length, w.normed, hidden, row);
  for (int64_t j = 0; j < length * row; j += LANES) {
    vec v = load(hidden + j), gelu = v;
    if (m->activation == RELU2)
      v = vmax(v, splat(0)) * vmax(v, splat(0));
    else if (m->activation == SILU)
      v = v * sigmoid(v);
    else {
      for (int n = 0; n < LANES; n++)
        gelu[n] = (real)0.5 * v[n] * (1 + erff(v[n] * (real)0.70710678118654752));
      v = gelu;
    }
    store(hidden + j, v);
  }
  add_branch(m, l->mlp_out, l->mlp_out_bias, l->mlp_gain, m->hidden, length, hidden, row, x,
             w.branch);
}

static int64_t scratch_size(const model *m, const layer *layers, const memory *s,
                            const call *c) {
  const int64_t n = c->length;
  int64_t size = n * padded(m->hidden);
  for (int64_t i = 0; i < m->layers; i++) {
    const int64_t kind = layers[i].kind;
    size = larger(size, kind == MAMBA    ? mamba_scratch(m, n)
                        : kind == MAMBA2 ? mamba2_scratch(m, n)
                        : kind == MAMBA3 ? mamba3_scratch(m, n)
                        : kind == DELTA  ? delta_scratch(m, n)
                                         : attention_scratch(m, n, s[i].stored + n));
  }
  return size;
}

/* x, n values of all bytes, before a layer: with an earlier output, then the embedded bytes */
static void mix_in(const model *m, const layer *l, int64_t n, const real *slots,
                   const real *embedded, real *x) {
  for (int64_t i = 0; i < n && l->added >= 0; i++)
    x[i] += l->skip_gain[i % m->width] * slots[l->added * padded(n) + i];
  for (int64_t i = 0; i < n && m->mixed; i++)
    x[i] = l->stream_gain[i % m->width] * x[i] + l->embedded_gain[i % m->width] * embedded[i];
}

/* The input of a guided model's layers for byte i: embedded, and what is said of the next byte. */
static void add_hint(const model *m, const call *c, int64_t i, const real *embedded, real *likely,
                     real *to) {
  const real *hint = c->hint + i * m->vocabulary;
  const real *best = m->best + c->best[i] * m->width, *kind = m->kind + c->kind[i] * m->width;
  for (int64_t s = 0; s < m->vocabulary; s++) likely[s] = expf((real)0.5 * hint[s]);
  times(m->prior, m->width, m->vocabulary, likely, to, 0);
  for (int64_t j = 0; j < m->width; j++) to[j] += embedded[j] + best[j] + kind[j];
}

/* 0, 1 when memory ran out, or 2 when `kept` must be made anew; only 0 has written anything */
int advance(const model *m, const layer *layers, const memory *states, const call *c,
            const unsigned char *bytes) {
  if (stale(m, layers, c->kept)) return 2;
  const int64_t n = c->length * m->width, rows = padded(n), each = c->each != 0;
  const int64_t table_size = padded(c->length * m->head_width);
  const int64_t copies = m->slots + m->mixed;
  const int64_t scratch = padded(scratch_size(m, layers, states, c));
  real *x = take(((3 + copies) * rows + table_size + scratch + padded(m->vocabulary)) *
                 (int64_t)sizeof(real));
  if (!x) return 1;
  real *slots = x + rows, *embedded = slots + m->slots * rows, *table = x + (1 + copies) * rows;
  const work w = {table + table_size, table + table_size + rows, table + table_size + 2 * rows};
  const fp_mode old = flush_denormals();
  for (int64_t i = 0; i < c->length; i++) {
    const real *from = m->embedding + bytes[i] * m->width;
    if (c->hint) {
      add_hint(m, c, i, from, w.mixer + scratch, w.normed);
      from = w.normed;
    }
    if (m->embedding_norm)
      rms(from, m->width, m->embedding_gain, m->tiny_eps, x + i * m->width);
    else
      memcpy(x + i * m->width, from, m->width * sizeof(real));
  }
  if (m->mixed) memcpy(embedded, x, n * sizeof(real));
  if (m->heads) rotary(m, c->position, c->length, table);
  for (int64_t j = 0; j < m->layers; j++) {
    const layer *l = layers + j;
    mix_in(m, l, n, slots, embedded, x);
    if (l->kind == MAMBA)
      mamba(m, l, kept_at(m, c->kept + j * kept_size(m)), states + j, c->length, each, x, w);
    else if (l->kind == ATTENTION)
      attention(m, l, states + j, c->length, table, x, w);
    else
      (l->kind == MAMBA2   ? mamba2
       : l->kind == MAMBA3 ? mamba3
                           : delta)(m, l, states + j, c->length, each, x, w);
    if (m->hidden) mlp(m, l, c->length, x, w);
    if (l->kept_as >= 0) memcpy(slots + l->kept_as * rows, x, n * sizeof(real));
  }
  /* after every byte, or after the last alone */
  const int64_t asked = each ? c->length : 1, V = m->vocabulary;
  normalise_each(m, x + n - asked * m->width, asked, m->norm, m->norm_bias, w.normed);
  project(m, m->head, m->head_bias, V, asked, w.normed, c->log_probs, V);
  for (int64_t i = 0; i < asked * V && m->cap > 0; i++)
    c->log_probs[i] = (real)m->cap * tanhf(c->log_probs[i] / (real)m->cap);
  for (int64_t i = 0; i < asked; i++) {
    real *logits = c->log_probs + i * V;
    if (c->hint) {
      const real *hint = c->hint + (c->length - asked + i) * V;
      const real gate = dot(m->gate, w.normed + i * m->width, m->width) + *m->gate_bias;
      for (int64_t s = 0; s < V; s++) logits[s] += gate * hint[s];
    }
    log_softmax(logits, V);
  }
  restore_mode(old);
  free(x);
  return 0;
}
