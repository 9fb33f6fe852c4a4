/* Depthwise causal convolution with SiLU on the CPU, forward and backward.
 *
 *   s_t = bias + sum_k weight[k] x_{t-K+1+k}          per (b, t, d); x before 0 comes from the tail
 *   y_t = s_t sigmoid(s_t)                            or s_t itself
 *
 * Channels sit in the SIMD lanes, time runs innermost, and the last K inputs stay in registers: each
 * input is read once.  The backward makes s_t again instead of storing it and walks the time backwards,
 * so that the last K gradients of s are at hand when dx needs them.  A task is a block of channels over
 * the whole batch, so sums over batch and time need no second pass and have one order.
 *
 * Where documents lie one behind another, a tap reads an input only if it is not older than the
 * document: at an age of a steps, the last a inputs and that of the step itself.
 *
 * Compiled once per element type (float, or double with -DSCAN_DOUBLE).
 */
#include "vectors.h"
#include <pthread.h>
#include <stdatomic.h>

#define MAX_TAPS 8
#define MAX_THREADS 256
#define BLOCK (4 * LANES) /* channels of one task: whole cache lines of a row */

typedef struct { /* x, y, dy, dx: (batch, length, channels), unit stride on the last axis */
  int64_t batch, length, channels, taps, silu, threads;
  int64_t x_batch, x_time, dy_batch, dy_time; /* strides; the others are contiguous */
  const real *x, *tail, *weight, *bias;       /* tail (batch, taps - 1, channels); may be NULL */
  real *y;
  const real *dy;
  real *dx, *dtail, *dweight, *dbias; /* dtail and dbias may be NULL */
  const uint8_t *ages; /* (batch, length): steps since the start of the document; NULL for one */
} conv_args;

INLINE vec load_part(const real *p, int count) {
  if (count == LANES) return load(p);
  real s[LANES] = {0};
  memcpy(s, p, count * sizeof(real));
  return load(s);
}
INLINE void store_part(real *p, vec x, int count) {
  if (count == LANES) {
    store(p, x);
    return;
  }
  real s[LANES];
  store(s, x);
  memcpy(p, s, count * sizeof(real));
}

/* column k of weight (channels, taps) */
INLINE vec tap(const conv_args *a, int64_t d, int k, int count) {
  real s[LANES] = {0};
  for (int i = 0; i < count; i++) s[i] = a->weight[(d + i) * a->taps + k];
  return load(s);
}

/* input at time t, which may be before 0 */
INLINE vec input(const conv_args *a, int64_t b, int64_t t, int64_t d, int count) {
  if (t >= 0) return load_part(a->x + b * a->x_batch + t * a->x_time + d, count);
  if (!a->tail) return splat(0);
  return load_part(a->tail + (b * (a->taps - 1) + a->taps - 1 + t) * a->channels + d, count);
}

INLINE int age_at(const conv_args *a, int64_t b, int64_t t) {
  return a->ages ? a->ages[b * a->length + t] : MAX_TAPS;
}

INLINE void lane_forward(const conv_args *a, int K, int64_t d, int count) {
  vec w[MAX_TAPS], past[MAX_TAPS];
  const vec bias = a->bias ? load_part(a->bias + d, count) : splat(0);
  for (int k = 0; k < K; k++) w[k] = tap(a, d, k, count);
  for (int64_t b = 0; b < a->batch; b++) {
    for (int k = 0; k < K - 1; k++) past[k] = input(a, b, k - (K - 1), d, count);
    for (int64_t t = 0; t < a->length; t++) {
      past[K - 1] = input(a, b, t, d, count);
      if (age_at(a, b, t) == 0)
        for (int k = 0; k < K - 1; k++) past[k] = splat(0);
      vec s = bias;
      UNROLL_ALL for (int k = 0; k < K; k++) s += w[k] * past[k];
      if (a->silu) s *= sigmoid(s);
      store_part(a->y + (b * a->length + t) * a->channels + d, s, count);
      UNROLL_ALL for (int k = 0; k < K - 1; k++) past[k] = past[k + 1];
    }
  }
}

INLINE void lane_backward(const conv_args *a, int K, int64_t d, int count) {
  vec w[MAX_TAPS], dw[MAX_TAPS], x[MAX_TAPS], g[MAX_TAPS], dbias = splat(0);
  const vec bias = a->bias ? load_part(a->bias + d, count) : splat(0);
  for (int k = 0; k < K; k++) w[k] = tap(a, d, k, count), dw[k] = splat(0);
  for (int64_t b = 0; b < a->batch; b++) {
    /* At time t: x[k] is the input of time t-K+1+k, g[j] the gradient of s at time t+j. Both are
     * shifted at the start of a step, so they begin one step late. */
    for (int k = 0; k < K; k++) g[k] = splat(0);
    for (int k = 0; k < K - 1; k++) x[k] = input(a, b, a->length - K + 1 + k, d, count);
    for (int64_t t = a->length - 1; t >= 1 - K; t--) {
      UNROLL_ALL for (int k = K - 1; k > 0; k--) x[k] = x[k - 1], g[k] = g[k - 1];
      g[0] = splat(0);
      if (t >= 0) {
        x[0] = input(a, b, t - K + 1, d, count);
        const int age = age_at(a, b, t);
        vec own[MAX_TAPS];
        UNROLL_ALL for (int k = 0; k < K; k++) own[k] = x[k];
        if (age < K - 1)
          for (int k = 0; k < K - 1 - age; k++) own[k] = splat(0);
        vec dy = load_part(a->dy + b * a->dy_batch + t * a->dy_time + d, count);
        if (a->silu) {
          vec s = bias;
          UNROLL_ALL for (int k = 0; k < K; k++) s += w[k] * own[k];
          vec p = sigmoid(s);
          dy *= p * (1 + s * (1 - p));
        }
        g[0] = dy;
        dbias += dy;
        UNROLL_ALL for (int k = 0; k < K; k++) dw[k] += dy * own[k];
      }
      vec sum = splat(0);
      UNROLL_ALL for (int k = 0; k < K; k++) sum += w[K - 1 - k] * g[k];
      if (t >= 0)
        store_part(a->dx + (b * a->length + t) * a->channels + d, sum, count);
      else if (a->dtail)
        store_part(a->dtail + (b * (K - 1) + K - 1 + t) * a->channels + d, sum, count);
      if (t >= 0 && age_at(a, b, t) == 0) /* what came before was not read */
        for (int k = 0; k < K; k++) g[k] = splat(0);
    }
  }
  for (int k = 0; k < K; k++) {
    real s[LANES];
    store(s, dw[k]);
    for (int i = 0; i < count; i++) a->dweight[(d + i) * a->taps + k] = s[i];
  }
  if (a->dbias) store_part(a->dbias + d, dbias, count);
}

typedef void (*lane_fn)(const conv_args *, int, int64_t, int);
/* The usual 4 taps with loops that the compiler unrolls, any number with loops that it does not. */
static void forward_4(const conv_args *a, int K, int64_t d, int count) {
  (void)K;
  lane_forward(a, 4, d, count);
}
static void forward_any(const conv_args *a, int K, int64_t d, int count) {
  lane_forward(a, K, d, count);
}
static void backward_4(const conv_args *a, int K, int64_t d, int count) {
  (void)K;
  lane_backward(a, 4, d, count);
}
static void backward_any(const conv_args *a, int K, int64_t d, int count) {
  lane_backward(a, K, d, count);
}

typedef struct {
  const conv_args *a;
  lane_fn run;
  atomic_llong next;
} team;

static void *work(void *shared) {
  team *t = shared;
  const conv_args *a = t->a;
  const fp_mode mode = flush_denormals();
  for (int64_t d; (d = BLOCK * atomic_fetch_add(&t->next, 1)) < a->channels;)
    for (int64_t at = d; at < d + BLOCK && at < a->channels; at += LANES)
      t->run(a, (int)a->taps, at, a->channels - at < LANES ? (int)(a->channels - at) : LANES);
  restore_mode(mode);
  return NULL;
}

/* Threads that live as long as the call: nothing that a fork could break. */
static void run_tasks(const conv_args *a, lane_fn run) {
  team t = {a, run, 0};
  pthread_t id[MAX_THREADS];
  int64_t started = 0, threads = (a->channels + BLOCK - 1) / BLOCK;
  if (threads > a->threads) threads = a->threads;
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  while (started < threads - 1 && !pthread_create(&id[started], NULL, work, &t)) started++;
  work(&t);
  for (int64_t i = 0; i < started; i++) pthread_join(id[i], NULL);
}

int conv_forward(const conv_args *a) {
  run_tasks(a, a->taps == 4 ? forward_4 : forward_any);
  return 0;
}
int conv_backward(const conv_args *a) {
  run_tasks(a, a->taps == 4 ? backward_4 : backward_any);
  return 0;
}
