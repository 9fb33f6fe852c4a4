/* Bytes one after another through a whole model on the CPU: batch 1, float32, inference.
 *
 * At batch 1 every weight is read once a byte and nothing is reused, so the floor is the size of
 * the weights over the bandwidth of the cache they sit in; everything here is laid out for that.
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

enum { MAMBA = 0, ATTENTION = 1 };
enum { NORM_LAYER = 0, NORM_RMS = 1 };
enum { RELU2 = 0, GELU = 1, SILU = 2 };

typedef struct { /* weights (out, in) as torch has them; absent if NULL */
  int64_t kind;
  real *norm, *norm_bias;
  real *in_proj, *conv, *conv_bias, *x_proj, *dt_proj, *dt_bias, *A_log, *D; /* MAMBA */
  real *q_proj, *k_proj, *v_proj;                                            /* ATTENTION */
  real *out_proj;
  real *mlp_norm, *mlp_norm_bias, *mlp_up, *mlp_out;
} layer;

typedef struct {
  int64_t layers, width, vocabulary, norm_kind, embedding_norm, hidden, activation;
  int64_t channels, states, taps, rank; /* MAMBA; rank 0: the step size from all channels */
  int64_t heads, kv_heads, head_width, window, normed_heads, turning; /* ATTENTION */
  double norm_eps, tiny_eps, cap, rotary_base; /* cap 0: none */
  real *embedding, *head, *norm, *norm_bias;
} model;

typedef struct { /* of one layer; zeros before the first byte where the inputs are NULL */
  real *first_in, *second_in;   /* MAMBA: tail (taps - 1, channels), state (channels, states) */
  real *first_out, *second_out; /* ATTENTION: k, v (kv_heads, stored, head_width); out + length */
  int64_t stored, k_stride, v_stride; /* strides of a head in first_in and second_in */
} memory;

typedef struct {
  int64_t length, position; /* bytes given, a byte or more, and bytes seen before */
  real *log_probs;          /* (vocabulary), after the last byte */
  real *kept;               /* (layers, kept_size): see transposed */
} call;

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

/* y = w x, or y += w x; w (rows, columns) with a row every `columns` */
static NOINLINE void times(const real *w, int64_t rows, int64_t columns, const real *x, real *y,
                           int add) {
  const int64_t whole = columns / LANES * LANES;
  int64_t r = 0;
  for (; r + LANES <= rows; r += LANES) {
    vec total = rows_times(w + r * columns, columns, whole, x);
    store(y + r, add ? load(y + r) + total : total);
  }
  for (; r < rows; r++) {
    vec sum = splat(0);
    for (int64_t i = 0; i < whole; i += LANES) sum += load(w + r * columns + i) * load(x + i);
    real total = sum_lanes(sum);
    for (int64_t i = whole; i < columns; i++) total += w[r * columns + i] * x[i];
    y[r] = add ? y[r] + total : total;
  }
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
    states_in(l->A_log, m->states, D, t.rates, P);
    for (int64_t n = 0; n < m->states; n++)
      for (int64_t d = 0; d < D; d++) t.rates[n * P + d] = rate_of(-expf(t.rates[n * P + d]));
    states_in(l->conv, m->taps, D, t.taps, P);
    memcpy(t.A_log, l->A_log, D * m->states * sizeof(real));
    memcpy(t.conv, l->conv, D * m->taps * sizeof(real));
    if (!m->rank) continue;
    states_in(l->dt_proj, m->rank, D, t.step, P);
    memcpy(t.dt_proj, l->dt_proj, D * m->rank * sizeof(real));
  }
}

static int stale(const model *m, const layer *layers, real *kept) {
  const int64_t D = m->channels, size = kept_size(m);
  for (int64_t i = 0; i < m->layers; i++) {
    const layer *l = layers + i;
    if (l->kind != MAMBA) continue;
    const transposed t = kept_at(m, kept + i * size);
    if (memcmp(l->A_log, t.A_log, D * m->states * sizeof(real)) ||
        memcmp(l->conv, t.conv, D * m->taps * sizeof(real)) ||
        (m->rank && memcmp(l->dt_proj, t.dt_proj, D * m->rank * sizeof(real))))
      return 1;
  }
  return 0;
}

static int64_t mamba_scratch(const model *m) {
  const int64_t P = padded(m->channels);
  return (m->states + m->taps + 5) * P + padded(2 * m->channels) + PAD +
         padded(m->rank + 2 * m->states);
}

/* x[t] += out_proj(...) for every byte; normed: one row of scratch */
static void mamba(const model *m, const layer *l, const transposed t, const memory *s,
                  int64_t length, real *x, real *normed, real *scratch) {
  const int64_t D = m->channels, N = m->states, P = padded(D), before = m->taps - 1;
  real *h = scratch;                         /* (states, P) */
  real *window = h + N * P;                  /* (taps, P): the last inputs, the newest at the end */
  real *u = window + m->taps * P, *delta = u + P;
  real *conv_bias = delta + P, *dt_bias = conv_bias + P, *skip = dt_bias + P;
  real *both = skip + P;                     /* x and z, with room to read beyond z */
  real *low = both + padded(2 * D) + PAD, *B = low + m->rank, *C = B + N;
  memset(scratch, 0, mamba_scratch(m) * sizeof(real));
  if (s->second_in) states_in(s->second_in, N, D, h, P);
  for (int64_t k = 0; k < before && s->first_in; k++)
    memcpy(window + k * P, s->first_in + k * D, D * sizeof(real));
  memcpy(conv_bias, l->conv_bias, D * sizeof(real));
  memcpy(dt_bias, l->dt_bias, D * sizeof(real));
  memcpy(skip, l->D, D * sizeof(real));

  for (int64_t i = 0; i < length; i++, x += m->width) {
    normalise(m, x, l->norm, l->norm_bias, normed);
    times(l->in_proj, 2 * D, m->width, normed, both, 0);
    const real *z = both + D;
    memcpy(window + before * P, both, D * sizeof(real));
    for (int64_t d = 0; d < P; d += LANES) {
      vec sum = load(conv_bias + d);
      for (int64_t k = 0; k <= before; k++) sum += load(t.taps + k * P + d) * load(window + k * P + d);
      store(u + d, sum * sigmoid(sum));
    }
    memmove(window, window + P, before * P * sizeof(real));
    times(l->x_proj, m->rank + 2 * N, D, u, low, 0);
    if (!m->rank) times(l->dt_proj, D, D, u, delta, 0);
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
    times(l->out_proj, m->width, D, u, x, 1);
  }
  for (int64_t k = 0; k < before; k++)
    memcpy(s->first_out + k * D, window + k * P, D * sizeof(real));
  states_out(h, P, D, s->second_out, N);
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

static int64_t attention_scratch(const model *m, int64_t most) {
  return padded(m->width) * 2 + 2 * padded(m->kv_heads * m->head_width) + padded(most);
}

static void attention(const model *m, const layer *l, const memory *s, int64_t length,
                      const real *table, real *x, real *normed, real *scratch) {
  const int64_t w = m->head_width, kv = m->kv_heads * w, rows = s->stored + length;
  real *q = scratch, *y = q + padded(m->width), *k = y + padded(m->width);
  real *v = k + padded(kv), *weight = v + padded(kv);
  for (int64_t h = 0; h < m->kv_heads && s->stored; h++) {
    memcpy(s->first_out + h * rows * w, s->first_in + h * s->k_stride,
           s->stored * w * sizeof(real));
    memcpy(s->second_out + h * rows * w, s->second_in + h * s->v_stride,
           s->stored * w * sizeof(real));
  }
  for (int64_t i = 0; i < length; i++, x += m->width, table += w) {
    const int64_t last = s->stored + i, first = larger(0, last - (m->window - 1));
    const int64_t seen = last - first + 1;
    normalise(m, x, l->norm, l->norm_bias, normed);
    times(l->q_proj, m->width, m->width, normed, q, 0);
    times(l->k_proj, kv, m->width, normed, k, 0);
    times(l->v_proj, kv, m->width, normed, v, 0);
    turn(m, table, q, m->heads);
    turn(m, table, k, m->kv_heads);
    for (int64_t h = 0; h < m->kv_heads; h++) {
      memcpy(s->first_out + (h * rows + last) * w, k + h * w, w * sizeof(real));
      memcpy(s->second_out + (h * rows + last) * w, v + h * w, w * sizeof(real));
    }
    memset(y, 0, m->width * sizeof(real));
    for (int64_t h = 0; h < m->heads; h++) {
      const int64_t start = (h / (m->heads / m->kv_heads) * rows + first) * w;
      real *out = y + h * w;
      times(s->first_out + start, seen, w, q + h * w, weight, 0);
      const real factor = (real)(1 / sqrt((double)w));
      for (int64_t j = 0; j < seen; j++) weight[j] *= factor;
      log_softmax(weight, seen);
      for (int64_t j = 0; j < seen; j += LANES)
        store(weight + j, exp_negative(-load(weight + j)));
      const real *value = s->second_out + start;
      for (int64_t j = 0; j < seen; j++)
        for (int64_t c = 0; c < w; c++) out[c] += weight[j] * value[j * w + c];
    }
    times(l->out_proj, m->width, m->width, y, x, 1);
  }
}

/* ---------------------------------------------------------------- the rest of a block */

static void mlp(const model *m, const layer *l, int64_t length, real *x, real *normed,
                real *hidden) {
  for (int64_t i = 0; i < length; i++, x += m->width) {
    normalise(m, x, l->mlp_norm, l->mlp_norm_bias, normed);
    times(l->mlp_up, m->hidden, m->width, normed, hidden, 0);
    for (int64_t j = 0; j < m->hidden; j += LANES) {
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
    times(l->mlp_out, m->width, m->hidden, hidden, x, 1);
  }
}

static int64_t scratch_size(const model *m, const layer *layers, const memory *s,
                            const call *c) {
  int64_t size = padded(m->hidden);
  for (int64_t i = 0; i < m->layers; i++)
    size = larger(size, layers[i].kind == MAMBA
                            ? mamba_scratch(m)
                            : attention_scratch(m, s[i].stored + c->length));
  return size;
}

/* 0, 1 when memory ran out, or 2 when `kept` must be made anew; only 0 has written anything */
int advance(const model *m, const layer *layers, const memory *states, const call *c,
            const unsigned char *bytes) {
  if (stale(m, layers, c->kept)) return 2;
  const int64_t rows = padded(c->length * m->width), table_size = padded(c->length * m->head_width);
  real *x = take((rows + padded(m->width) + table_size + scratch_size(m, layers, states, c)) *
                 (int64_t)sizeof(real));
  if (!x) return 1;
  real *normed = x + rows, *table = normed + padded(m->width), *scratch = table + table_size;
  const fp_mode old = flush_denormals();
  for (int64_t i = 0; i < c->length; i++) {
    const real *from = m->embedding + bytes[i] * m->width;
    if (m->embedding_norm)
      rms(from, m->width, NULL, m->tiny_eps, x + i * m->width);
    else
      memcpy(x + i * m->width, from, m->width * sizeof(real));
  }
  if (m->heads) rotary(m, c->position, c->length, table);
  for (int64_t n = 0; n < m->layers; n++) {
    const layer *l = layers + n;
    if (l->kind == MAMBA)
      mamba(m, l, kept_at(m, c->kept + n * kept_size(m)), states + n, c->length, x, normed, scratch);
    else
      attention(m, l, states + n, c->length, table, x, normed, scratch);
    if (m->hidden) mlp(m, l, c->length, x, normed, scratch);
  }
  normalise(m, x + (c->length - 1) * m->width, m->norm, m->norm_bias, normed);
  times(m->head, m->vocabulary, m->width, normed, c->log_probs, 0);
  if (m->cap > 0)
    for (int64_t i = 0; i < m->vocabulary; i++)
      c->log_probs[i] = (real)m->cap * tanhf(c->log_probs[i] / (real)m->cap);
  log_softmax(c->log_probs, m->vocabulary);
  restore_mode(old);
  free(x);
  return 0;
}
