/* Selective scan (Mamba-1) on the CPU: forward, backward and single steps.
 *
 *   dt  = softplus(delta + bias)                      per (b, t, d)
 *   h_t = exp(dt A[d,n]) h_{t-1} + dt u B[b,t,n]      per (b, t, d, n)
 *   out = (sum_n C[b,t,n] h_t + D[d] u) silu(z)       per (b, t, d)
 *
 * How it is laid out.  Channels sit in the SIMD lanes, so nothing in the recurrence crosses lanes.
 * One register block is 2 vectors of channels x 2 states: the rows that depend on the channel only
 * (dt, dt*u, ...) serve two states, the numbers that depend on the state only (B, C) serve two
 * vectors.  Time runs in tiles of TILE steps that fit the L1 cache; everything that is done once per
 * (t, d), such as softplus, silu and the conversion from bfloat16, is done once per tile, outside
 * the loop over states.
 *
 * Backward.  The forward leaves the state at the start of every tile; the backward walks the tiles
 * from the last to the first, runs a tile forward again and then back.  Sums over channels (dB, dC)
 * stay in lanes until the end of a group of GROUP channels.  Groups, and after them batch rows, are
 * added in a fixed order, so results do not depend on the number of threads.
 *
 * Compiled once per element type of the computation (float, or double with -DSCAN_DOUBLE).  Needs
 * the vector extensions of gcc or clang and POSIX threads, nothing else.  Never compile it with
 * -ffast-math: nan and inf have to propagate.
 */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef TILE
#define TILE 16 /* time steps between checkpoints; native_scan.py knows this number */
#endif
#define PAD 32    /* rows of saved states are padded to this many channels; so does it know this */
#define GROUP 128 /* channels of one task; a multiple of PAD, never a function of the threads */
#define MAX_THREADS 256

#ifdef SCAN_DOUBLE
typedef double real;
typedef int64_t bits_t;
#define MANTISSA_BITS 52
#define EXPONENT_BIAS 1023
#else
typedef float real;
typedef int32_t bits_t;
#define MANTISSA_BITS 23
#define EXPONENT_BIAS 127
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define LANES ((int)(VECTOR_BYTES / sizeof(real)))
#define WIDTH (2 * LANES) /* channels of one register block */

typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef bits_t ivec __attribute__((vector_size(VECTOR_BYTES)));
typedef struct {
  vec v[2];
} pair; /* one row of WIDTH channels */

#define INLINE static inline __attribute__((always_inline))
#define UNROLL2 _Pragma("GCC unroll 2")

/* ---------------------------------------------------------------- arguments (native_scan.py) */

enum { TYPE_REAL = 0, TYPE_BF16 = 1 };

typedef struct { /* (batch, time, last) with unit stride on the last axis; absent if ptr is NULL */
  char *ptr;
  int64_t type, batch_stride, time_stride; /* strides in elements */
} tensor;

typedef struct {
  int64_t batch, length, channels, states, softplus, threads;
  tensor u, delta, B, C, z, y;
  real *A, *D, *bias, *h0, *h_last, *saved;
  /* the backward only */
  tensor dy, du, ddelta, dz, dB, dC;
  real *dA, *dD, *dbias, *dh0, *dh_last;
  real *part_bc; /* (groups, batch, length, 2, states): dB and dC of one group */
  real *part_a;  /* (batch, states + 2, padded channels): dA, dD, dbias of one batch row */
} scan_args;

typedef struct { /* derived once per call, read by all threads */
  const scan_args *a;
  int64_t padded;  /* channels rounded up to PAD */
  int64_t groups;  /* tasks per batch row */
  int64_t tiles;
  const real *A2;  /* (states, padded): A * log2(e), clamped */
  const real *skip; /* (padded): D or zeros */
  const real *bias; /* (padded): delta_bias or zeros */
} plan;

/* ---------------------------------------------------------------- vectors */

INLINE vec splat(real x) { return (vec){0} + x; }
INLINE vec choose(ivec mask, vec yes, vec no) {
  return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask));
}
INLINE vec vmax(vec x, vec lo) { return choose(x < lo, lo, x); } /* nan stays nan */
INLINE vec vmin(vec x, vec hi) { return choose(x > hi, hi, x); }
INLINE vec vabs(vec x) { return (vec)((ivec)x & ~(ivec)splat(-(real)0)); }
INLINE real sum_lanes(vec x) {
  real s[LANES];
  memcpy(s, &x, sizeof s);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) s[i] += s[i + half];
  return s[0];
}

/* 2^x as (1 + q) 2^k with integer k and |r| = |x - k| <= 1/2.  The recurrence uses the two parts:
 * g = 2^k h is exact, so h_t = g + (q g + b) is rounded as if a were known to full precision, and a
 * decay of 1 - 1e-7 does not become 1 - 1.19e-7 and pull the state the same way at every step. */
#if defined(__AVX512F__) && !defined(NO_SCALEF)
typedef vec scale_t;
#ifdef SCAN_DOUBLE
INLINE vec round_vec(vec x) { return (vec)_mm512_roundscale_pd((__m512d)x, 0); }
INLINE vec scale(vec h, scale_t k) { return (vec)_mm512_scalef_pd((__m512d)h, (__m512d)k); }
#else
INLINE vec round_vec(vec x) { return (vec)_mm512_roundscale_ps((__m512)x, 0); }
INLINE vec scale(vec h, scale_t k) { return (vec)_mm512_scalef_ps((__m512)h, (__m512)k); }
#endif
INLINE vec split_exponent(vec x, scale_t *k) {
  *k = round_vec(x);
  return x - *k;
}
#else
typedef vec scale_t; /* here 2^k itself, 0 for k <= -bias and inf for k > bias */
INLINE vec scale(vec h, scale_t k) { return h * k; }
INLINE vec split_exponent(vec x, scale_t *k) {
  /* adding 1.5 * 2^mantissa rounds to an integer and leaves it, biased, in the low bits */
  const real magic = (real)(3LL << (MANTISSA_BITS - 1)) + EXPONENT_BIAS;
  x = vmin(vmax(x, splat(-EXPONENT_BIAS)), splat(EXPONENT_BIAS + 1));
  vec t = x + magic;
  *k = (vec)((ivec)t << MANTISSA_BITS);
  return x - (t - magic);
}
#endif

/* q = 2^r - 1 for |r| <= 1/2, relative error of 1 + q below 2e-9 (float) or 5e-18 (double) */
INLINE vec exp2m1(vec r) {
#ifdef SCAN_DOUBLE
  /* ln(2)^k / k! */
  static const double c[] = {
      0.6931471805599453,     0.2402265069591007,     0.05550410866482158,
      0.009618129107628477,   0.0013333558146428443,  0.0001540353039338161,
      1.5252733804059841e-05, 1.321548679014431e-06,  1.0178086009239699e-07,
      7.054911620801123e-09,  4.445538271870811e-10,  2.5678435993488202e-11,
      1.3691488853904128e-12};
#else
  /* minimax in the relative error of 2^r; the first is ln(2) to the last bit but one */
  static const float c[] = {0.6931472028552922f,   0.24022647913613443f,  0.05550332470542767f,
                            0.009618437357721691f, 0.0013398874666663352f, 0.0001535336246235062f};
#endif
  int last = sizeof c / sizeof *c - 1;
  vec p = splat(c[last]);
  for (int i = last - 1; i >= 0; i--) p = p * r + c[i];
  return p * r;
}

/* e = exp(-x) for x >= 0, accurate relatively: the rounding of x log2(e) is carried along */
INLINE vec exp_negative(vec x) {
  const real hi = (real)1.4426950408889634;
#ifdef SCAN_DOUBLE
  const real lo = 2.0355273740931033e-17;
  x = vmin(x, splat(2000));
#else
  const real lo = 1.925963033500011e-08f;
  x = vmin(x, splat(200));
#endif
  scale_t k;
  vec p = x * -hi;
  vec rest = -(x * hi + p) - x * lo;
  vec r = split_exponent(p, &k) + rest;
  return scale(exp2m1(r) + 1, k);
}

/* log(1 + e) for 0 <= e <= 1, given ratio = e / (2 + e): 2 atanh(ratio) */
INLINE vec log1p_ratio(vec s) {
  vec y = s * s, p;
#ifdef SCAN_DOUBLE
  p = splat(1.0 / 39);
  for (int k = 37; k >= 1; k -= 2) p = p * y + 1.0 / k;
#else
  static const float c[] = {1.0f, 0.3333333974f, 0.1999933910f, 0.1431052100f, 0.1069498040f,
                            0.1221245508f};
  p = splat(c[5]);
  for (int i = 4; i >= 0; i--) p = p * y + c[i];
#endif
  return (s + s) * p;
}

/* softplus as torch defines it (the identity above 20), and its derivative */
INLINE vec softplus(vec x, vec *slope) {
  vec e = exp_negative(vabs(x));
  vec inverse = 1 / ((e + 2) * (e + 1)); /* one division for both quotients */
  vec positive = choose(x < 0, splat(0), x);
  vec value = log1p_ratio(e * (e + 1) * inverse) + positive;
  ivec large = x > 20;
  *slope = choose(large, splat(1), choose(x < 0, e, splat(1)) * (e + 2) * inverse);
  return choose(large, x, value);
}

INLINE vec sigmoid(vec x) {
  vec e = exp_negative(vabs(x));
  return choose(x < 0, e, splat(1)) / (e + 1);
}

/* ---------------------------------------------------------------- rows of a tensor */

#ifndef SCAN_DOUBLE
typedef uint16_t hvec __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint32_t uvec __attribute__((vector_size(VECTOR_BYTES)));
INLINE vec from_bf16(hvec h) { return (vec)(__builtin_convertvector(h, uvec) << 16); }
INLINE hvec to_bf16(vec x) { /* to nearest, ties to even; nan stays nan */
  uvec b = (uvec)x;
  uvec rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  uvec quiet = (b >> 16) | 0x40;
  uvec is_nan = (uvec)(x != x);
  return __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), hvec);
}
#endif

INLINE int64_t offset_of(const tensor *x, int64_t b, int64_t t, int64_t d) {
  return b * x->batch_stride + t * x->time_stride + d;
}

/* `count` < WIDTH marks the ragged end of the channels: the rest of the lanes reads as zero */
INLINE pair load_row(const tensor *x, int64_t b, int64_t t, int64_t d, int count) {
  pair r;
  int64_t at = offset_of(x, b, t, d);
#ifndef SCAN_DOUBLE
  if (x->type == TYPE_BF16) {
    const uint16_t *p = (const uint16_t *)x->ptr + at;
    uint16_t edge[WIDTH];
    if (count < WIDTH) {
      memset(edge, 0, sizeof edge);
      memcpy(edge, p, count * sizeof *p);
      p = edge;
    }
    hvec h[2];
    memcpy(h, p, sizeof h);
    r.v[0] = from_bf16(h[0]);
    r.v[1] = from_bf16(h[1]);
    return r;
  }
#endif
  const real *p = (const real *)x->ptr + at;
  if (count < WIDTH) {
    memset(&r, 0, sizeof r);
    memcpy(&r, p, count * sizeof *p);
  } else {
    memcpy(&r, p, sizeof r);
  }
  return r;
}

INLINE void store_row(const tensor *x, int64_t b, int64_t t, int64_t d, int count, pair r) {
  int64_t at = offset_of(x, b, t, d);
#ifndef SCAN_DOUBLE
  if (x->type == TYPE_BF16) {
    uint16_t *p = (uint16_t *)x->ptr + at;
    hvec h[2] = {to_bf16(r.v[0]), to_bf16(r.v[1])};
    memcpy(p, h, count < WIDTH ? count * sizeof *p : sizeof h);
    return;
  }
#endif
  real *p = (real *)x->ptr + at;
  if (count < WIDTH)
    memcpy(p, &r, count * sizeof *p);
  else
    memcpy(p, &r, sizeof r);
}

/* one row of B or C, any number of states */
static void load_states(const tensor *x, int64_t b, int64_t t, int64_t n, real *to) {
  int64_t at = offset_of(x, b, t, 0);
#ifndef SCAN_DOUBLE
  if (x->type == TYPE_BF16) {
    const uint16_t *p = (const uint16_t *)x->ptr + at;
    for (int64_t i = 0; i < n; i++) {
      uint32_t bits = (uint32_t)p[i] << 16;
      memcpy(to + i, &bits, sizeof bits);
    }
    return;
  }
#endif
  memcpy(to, (const real *)x->ptr + at, n * sizeof(real));
}

static void store_states(const tensor *x, int64_t b, int64_t t, int64_t n, const real *from) {
  int64_t at = offset_of(x, b, t, 0);
#ifndef SCAN_DOUBLE
  if (x->type == TYPE_BF16) {
    uint16_t *p = (uint16_t *)x->ptr + at;
    for (int64_t i = 0; i < n; i++) p[i] = to_bf16(splat(from[i]))[0];
    return;
  }
#endif
  memcpy((real *)x->ptr + at, from, n * sizeof(real));
}

/* (channels, states) in a caller's tensor  <->  (states, padded) here */
static void states_in(const real *from, int64_t states, int64_t d0, int64_t d1, real *to,
                      int64_t padded) {
  for (int64_t n = 0; n < states; n++)
    for (int64_t d = d0; d < d1; d++) to[n * padded + d] = from[d * states + n];
}

static void states_out(const real *from, int64_t padded, int64_t d0, int64_t d1, real *to,
                       int64_t states) {
  for (int64_t d = d0; d < d1; d++)
    for (int64_t n = 0; n < states; n++) to[d * states + n] = from[n * padded + d];
}

/* ---------------------------------------------------------------- threads */

typedef int (*task_fn)(const plan *p, int64_t task, char *scratch);
typedef struct {
  task_fn run;
  const plan *p;
  int64_t tasks, scratch_bytes;
  atomic_llong next;
  atomic_int failed;
} team;

/* States decay into denormals, which some processors handle a hundred times slower. */
#if defined(__x86_64__)
typedef unsigned int fp_mode;
static fp_mode flush_denormals(void) {
  fp_mode old = _mm_getcsr();
  _mm_setcsr(old | 0x8040);
  return old;
}
static void restore_mode(fp_mode old) { _mm_setcsr(old); }
#elif defined(__aarch64__)
typedef uint64_t fp_mode;
static fp_mode flush_denormals(void) {
  fp_mode old;
  __asm__ volatile("mrs %0, fpcr" : "=r"(old));
  __asm__ volatile("msr fpcr, %0" ::"r"(old | (1u << 24)));
  return old;
}
static void restore_mode(fp_mode old) { __asm__ volatile("msr fpcr, %0" ::"r"(old)); }
#else
typedef int fp_mode;
static fp_mode flush_denormals(void) { return 0; }
static void restore_mode(fp_mode old) { (void)old; }
#endif

static void *take(int64_t bytes) { /* aligned to a cache line and to a vector */
  void *p = NULL;
  return posix_memalign(&p, 64, bytes ? (size_t)bytes : 64) ? NULL : p;
}

static void *work(void *arg) {
  team *t = arg;
  char *scratch = take(t->scratch_bytes);
#ifdef SCAN_DOUBLE
  fp_mode old = 0; /* double is for checking: keep its denormals */
#else
  fp_mode old = flush_denormals();
#endif
  if (!scratch) atomic_store(&t->failed, 1);
  while (scratch) {
    int64_t task = atomic_fetch_add(&t->next, 1);
    if (task >= t->tasks) break;
    if (t->run(t->p, task, scratch)) atomic_store(&t->failed, 1);
  }
#ifndef SCAN_DOUBLE
  restore_mode(old);
#else
  (void)old;
#endif
  free(scratch);
  return NULL;
}

/* Threads live for one call.  Starting one costs some tens of microseconds, and in exchange there is
 * no pool that a fork could break or that could fight with the pool of the caller.  Which thread
 * takes which task is left to chance; what a task computes is not. */
static int run_tasks(const plan *p, task_fn run, int64_t tasks, int64_t scratch_bytes,
                     int64_t threads) {
  team t = {run, p, tasks, scratch_bytes, 0, 0};
  pthread_t id[MAX_THREADS];
  int64_t started = 0;
  if (threads > tasks) threads = tasks;
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  while (started < threads - 1 && !pthread_create(&id[started], NULL, work, &t)) started++;
  work(&t);
  for (int64_t i = 0; i < started; i++) pthread_join(id[i], NULL);
  return atomic_load(&t.failed);
}

/* ---------------------------------------------------------------- forward */

/* TILE steps of 2 vectors x S states; h is in and out, y is added to if with_y */
INLINE void tile_forward(int S, int with_y, int steps, int64_t states, const pair *dt,
                         const pair *dtu, const real *B, const real *C, const vec A2[2][2],
                         vec h[2][2], pair *y) {
  for (int t = 0; t < steps; t++) {
    UNROLL2 for (int v = 0; v < 2; v++) {
      vec x_dt = dt[t].v[v], x_dtu = dtu[t].v[v], sum = with_y ? y[t].v[v] : splat(0);
      UNROLL2 for (int s = 0; s < S; s++) {
        scale_t k;
        vec q = exp2m1(split_exponent(x_dt * A2[s][v], &k));
        vec g = scale(h[s][v], k);
        h[s][v] = g + (q * g + x_dtu * B[t * states + s]);
        if (with_y) sum += h[s][v] * C[t * states + s];
      }
      if (with_y) y[t].v[v] = sum;
    }
  }
}

typedef struct {
  pair dt[TILE], dtu[TILE], y[TILE];
} forward_rows;

static int64_t forward_scratch(int64_t states) {
  return (int64_t)sizeof(forward_rows) + (2 * TILE + GROUP) * states * (int64_t)sizeof(real);
}

/* exponents use a dt that is finite, so that dt = inf gives exp(dt A) = 0 and not nan */
#define HUGE_DT ((real)1e30)
#define HUGE_A ((real)1e8)

static int forward_task(const plan *p, int64_t task, char *scratch) {
  const scan_args *a = p->a;
  const int64_t N = a->states, b = task / p->groups, d_begin = task % p->groups * GROUP;
  const int64_t d_end = d_begin + GROUP < a->channels ? d_begin + GROUP : a->channels;
  forward_rows *rows = (forward_rows *)scratch;
  real *state = (real *)(rows + 1);       /* (states, GROUP), when nothing is saved */
  real *sB = state + GROUP * N, *sC = sB + TILE * N; /* (TILE, states) */
  int64_t row = GROUP;
  const int64_t checkpoint = N * p->padded;
  if (a->saved) {
    state = a->saved + b * p->tiles * checkpoint + d_begin;
    row = p->padded;
  }
  for (int64_t n = 0; n < N; n++) memset(state + n * row, 0, (d_end - d_begin + PAD - 1) / PAD * PAD * sizeof(real));
  if (a->h0)
    states_in(a->h0 + (b * a->channels + d_begin) * N, N, 0, d_end - d_begin, state, row);

  for (int64_t tile = 0; tile < p->tiles; tile++) {
    const int64_t t0 = tile * TILE;
    const int steps = a->length - t0 < TILE ? (int)(a->length - t0) : TILE;
    /* the last tile has no checkpoint after it: its end goes to the caller from scratch */
    real *next = state;
    if (a->saved) {
      next = tile + 1 < p->tiles ? state + checkpoint : (real *)(rows + 1);
    }
    const int64_t next_row = a->saved && tile + 1 < p->tiles ? p->padded : GROUP;
    for (int t = 0; t < steps; t++) {
      load_states(&a->B, b, t0 + t, N, sB + t * N);
      load_states(&a->C, b, t0 + t, N, sC + t * N);
    }
    for (int64_t d = d_begin; d < d_end; d += WIDTH) {
      const int count = d_end - d < WIDTH ? (int)(d_end - d) : WIDTH;
      pair u[TILE];
      for (int t = 0; t < steps; t++) {
        pair x = load_row(&a->delta, b, t0 + t, d, count);
        u[t] = load_row(&a->u, b, t0 + t, d, count);
        UNROLL2 for (int v = 0; v < 2; v++) {
          vec slope, dt = x.v[v] + *(const vec *)(p->bias + d + v * LANES);
          if (a->softplus) dt = softplus(dt, &slope);
          rows->dtu[t].v[v] = dt * u[t].v[v];
          rows->dt[t].v[v] = vmin(dt, splat(HUGE_DT));
          rows->y[t].v[v] = u[t].v[v] * *(const vec *)(p->skip + d + v * LANES);
        }
      }
      for (int64_t n = 0; n < N; n += 2) {
        const int S = n + 1 < N ? 2 : 1;
        vec A2[2][2], h[2][2];
        for (int s = 0; s < S; s++)
          for (int v = 0; v < 2; v++) {
            A2[s][v] = *(const vec *)(p->A2 + (n + s) * p->padded + d + v * LANES);
            h[s][v] = *(const vec *)(state + (n + s) * row + d - d_begin + v * LANES);
          }
        if (S == 2)
          tile_forward(2, 1, steps, N, rows->dt, rows->dtu, sB + n, sC + n, A2, h, rows->y);
        else
          tile_forward(1, 1, steps, N, rows->dt, rows->dtu, sB + n, sC + n, A2, h, rows->y);
        for (int s = 0; s < S; s++)
          for (int v = 0; v < 2; v++)
            *(vec *)(next + (n + s) * next_row + d - d_begin + v * LANES) = h[s][v];
      }
      for (int t = 0; t < steps; t++) {
        pair y = rows->y[t];
        if (a->z.ptr) {
          pair z = load_row(&a->z, b, t0 + t, d, count);
          UNROLL2 for (int v = 0; v < 2; v++) y.v[v] *= z.v[v] * sigmoid(z.v[v]);
        }
        store_row(&a->y, b, t0 + t, d, count, y);
      }
    }
    state = next;
    row = next_row;
  }
  states_out(state, row, 0, d_end - d_begin, a->h_last + (b * a->channels + d_begin) * N, N);
  return 0;
}

/* ---------------------------------------------------------------- backward */

typedef struct {
  pair u[TILE], dt[TILE], dtu[TILE], slope[TILE], dy[TILE], dout[TILE], z[TILE];
  pair y[TILE];  /* sum_n C h + D u, for dz */
  pair v[TILE];  /* sum_n g B,       for du and ddelta */
  pair w[TILE];  /* sum_n g a h A2,  for ddelta */
  vec h[TILE + 1][2][2], a[TILE][2][2];
} backward_rows;

static int64_t backward_scratch(int64_t states) {
  return (int64_t)sizeof(backward_rows) + 2 * TILE * states * (int64_t)sizeof(vec) +
         (2 * TILE + 2 * GROUP) * states * (int64_t)sizeof(real) +
         2 * GROUP * (int64_t)sizeof(real);
}

/* One tile forward (keeping a and h), then back.  g is the gradient of the state after the tile on
 * entry and of the state before it on return; accB, accC are (TILE, states) vectors. */
INLINE void tile_backward(int S, int with_y, int steps, int64_t states, backward_rows *r,
                          const real *B, const real *C, const vec A2[2][2], vec g[2][2],
                          vec dA[2][2], vec *accB, vec *accC) {
  for (int t = 0; t < steps; t++) {
    UNROLL2 for (int v = 0; v < 2; v++) {
      vec dt = r->dt[t].v[v], dtu = r->dtu[t].v[v], sum = r->y[t].v[v];
      UNROLL2 for (int s = 0; s < S; s++) {
        scale_t k;
        vec q = exp2m1(split_exponent(dt * A2[s][v], &k));
        vec x = scale(r->h[t][s][v], k);
        vec h = x + (q * x + dtu * B[t * states + s]);
        r->a[t][s][v] = scale(q + 1, k);
        r->h[t + 1][s][v] = h;
        if (with_y) sum += h * C[t * states + s];
      }
      if (with_y) r->y[t].v[v] = sum;
    }
  }
  for (int t = steps - 1; t >= 0; t--) {
    vec sumB[2] = {accB[t * states], S > 1 ? accB[t * states + 1] : splat(0)};
    vec sumC[2] = {accC[t * states], S > 1 ? accC[t * states + 1] : splat(0)};
    UNROLL2 for (int v = 0; v < 2; v++) {
      vec dt = r->dt[t].v[v], dtu = r->dtu[t].v[v], dy = r->dy[t].v[v];
      vec sum_v = r->v[t].v[v], sum_w = r->w[t].v[v];
      UNROLL2 for (int s = 0; s < S; s++) {
        vec gh = g[s][v] + dy * C[t * states + s];
        sum_v += gh * B[t * states + s];
        sumB[s] += gh * dtu;
        sumC[s] += dy * r->h[t + 1][s][v];
        g[s][v] = gh * r->a[t][s][v];
        vec w = g[s][v] * r->h[t][s][v];
        dA[s][v] += w * dt;
        sum_w += w * A2[s][v];
      }
      r->v[t].v[v] = sum_v;
      r->w[t].v[v] = sum_w;
    }
    for (int s = 0; s < S; s++) {
      accB[t * states + s] = sumB[s];
      accC[t * states + s] = sumC[s];
    }
  }
}

static int backward_task(const plan *p, int64_t task, char *scratch) {
  const scan_args *a = p->a;
  const int64_t N = a->states, b = task / p->groups, group = task % p->groups;
  const int64_t d_begin = group * GROUP;
  const int64_t d_end = d_begin + GROUP < a->channels ? d_begin + GROUP : a->channels;
  backward_rows *r = (backward_rows *)scratch;
  vec *accB = (vec *)(r + 1), *accC = accB + TILE * N; /* (TILE, states) */
  real *g = (real *)(accC + TILE * N);                 /* (states, GROUP): carried gradient */
  real *dA = g + GROUP * N;                            /* (states, GROUP), then dD, dbias */
  real *dD = dA + GROUP * N, *dbias = dD + GROUP;
  real *sB = dbias + GROUP, *sC = sB + TILE * N;

  memset(g, 0, GROUP * N * sizeof(real));
  memset(dA, 0, (GROUP * N + 2 * GROUP) * sizeof(real));
  if (a->dh_last)
    states_in(a->dh_last + (b * a->channels + d_begin) * N, N, 0, d_end - d_begin, g, GROUP);

  for (int64_t tile = p->tiles - 1; tile >= 0; tile--) {
    const int64_t t0 = tile * TILE;
    const int steps = a->length - t0 < TILE ? (int)(a->length - t0) : TILE;
    const real *saved = a->saved + (b * p->tiles + tile) * N * p->padded;
    for (int t = 0; t < steps; t++) {
      load_states(&a->B, b, t0 + t, N, sB + t * N);
      load_states(&a->C, b, t0 + t, N, sC + t * N);
    }
    memset(accB, 0, 2 * TILE * N * sizeof(vec));
    for (int64_t d = d_begin; d < d_end; d += WIDTH) {
      const int count = d_end - d < WIDTH ? (int)(d_end - d) : WIDTH;
      pair skip, bias;
      memcpy(&skip, p->skip + d, sizeof skip);
      memcpy(&bias, p->bias + d, sizeof bias);
      for (int t = 0; t < steps; t++) {
        pair x = load_row(&a->delta, b, t0 + t, d, count);
        r->u[t] = load_row(&a->u, b, t0 + t, d, count);
        r->dout[t] = load_row(&a->dy, b, t0 + t, d, count);
        if (a->z.ptr) r->z[t] = load_row(&a->z, b, t0 + t, d, count);
        UNROLL2 for (int v = 0; v < 2; v++) {
          vec dt = x.v[v] + bias.v[v], u = r->u[t].v[v], dy = r->dout[t].v[v];
          r->slope[t].v[v] = splat(1);
          if (a->softplus) dt = softplus(dt, &r->slope[t].v[v]);
          r->dtu[t].v[v] = dt * u;
          r->dt[t].v[v] = vmin(dt, splat(HUGE_DT));
          r->y[t].v[v] = u * skip.v[v];
          r->v[t].v[v] = r->w[t].v[v] = splat(0);
          if (a->z.ptr) {
            vec z = r->z[t].v[v], sig = sigmoid(z), gate = z * sig;
            r->z[t].v[v] = dy * (sig + gate * (1 - sig)); /* dout silu'(z) */
            dy *= gate;
          }
          r->dy[t].v[v] = dy;
        }
      }
      for (int64_t n = 0; n < N; n += 2) {
        const int S = n + 1 < N ? 2 : 1;
        vec A2[2][2], x[2][2], y[2][2];
        for (int s = 0; s < S; s++)
          for (int v = 0; v < 2; v++) {
            const int64_t at = (n + s) * GROUP + d - d_begin + v * LANES;
            A2[s][v] = *(const vec *)(p->A2 + (n + s) * p->padded + d + v * LANES);
            r->h[0][s][v] = *(const vec *)(saved + (n + s) * p->padded + d + v * LANES);
            x[s][v] = *(const vec *)(g + at);
            y[s][v] = *(const vec *)(dA + at);
          }
        if (S == 1)
          tile_backward(1, 1, steps, N, r, sB + n, sC + n, A2, x, y, accB + n, accC + n);
        else if (a->z.ptr)
          tile_backward(2, 1, steps, N, r, sB + n, sC + n, A2, x, y, accB + n, accC + n);
        else
          tile_backward(2, 0, steps, N, r, sB + n, sC + n, A2, x, y, accB + n, accC + n);
        for (int s = 0; s < S; s++)
          for (int v = 0; v < 2; v++) {
            const int64_t at = (n + s) * GROUP + d - d_begin + v * LANES;
            *(vec *)(g + at) = x[s][v];
            *(vec *)(dA + at) = y[s][v];
          }
      }
      pair sumD, sum_bias;
      memcpy(&sumD, dD + d - d_begin, sizeof sumD);
      memcpy(&sum_bias, dbias + d - d_begin, sizeof sum_bias);
      for (int t = steps - 1; t >= 0; t--) {
        pair du, ddelta, dz;
        UNROLL2 for (int v = 0; v < 2; v++) {
          vec dt = r->dt[t].v[v], dy = r->dy[t].v[v], u = r->u[t].v[v];
          du.v[v] = dy * skip.v[v] + dt * r->v[t].v[v];
          /* w was summed with A log2(e) */
          ddelta.v[v] = u * r->v[t].v[v] + r->w[t].v[v] * (real)0.6931471805599453;
          ddelta.v[v] *= r->slope[t].v[v];
          sumD.v[v] += dy * u;
          sum_bias.v[v] += ddelta.v[v];
          dz.v[v] = r->z[t].v[v] * r->y[t].v[v];
        }
        store_row(&a->du, b, t0 + t, d, count, du);
        store_row(&a->ddelta, b, t0 + t, d, count, ddelta);
        if (a->z.ptr) store_row(&a->dz, b, t0 + t, d, count, dz);
      }
      memcpy(dD + d - d_begin, &sumD, sizeof sumD);
      memcpy(dbias + d - d_begin, &sum_bias, sizeof sum_bias);
    }
    real *part = a->part_bc + ((group * a->batch + b) * a->length + t0) * 2 * N;
    for (int t = 0; t < steps; t++)
      for (int64_t n = 0; n < N; n++) {
        part[(2 * t) * N + n] = sum_lanes(accB[t * N + n]);
        part[(2 * t + 1) * N + n] = sum_lanes(accC[t * N + n]);
      }
  }
  if (a->dh0)
    states_out(g, GROUP, 0, d_end - d_begin, a->dh0 + (b * a->channels + d_begin) * N, N);
  real *part = a->part_a + b * (N + 2) * p->padded + d_begin;
  for (int64_t n = 0; n < N + 2; n++)
    memcpy(part + n * p->padded, dA + n * GROUP, (d_end - d_begin) * sizeof(real));
  return 0;
}

#define ROWS_PER_TASK 256

/* sum the groups of dB and dC for some (batch, time) rows */
static int reduce_task(const plan *p, int64_t task, char *scratch) {
  const scan_args *a = p->a;
  const int64_t N = a->states, rows = a->batch * a->length;
  real *sum = (real *)scratch;
  int64_t end = (task + 1) * ROWS_PER_TASK < rows ? (task + 1) * ROWS_PER_TASK : rows;
  for (int64_t row = task * ROWS_PER_TASK; row < end; row++) {
    memcpy(sum, a->part_bc + row * 2 * N, 2 * N * sizeof(real));
    for (int64_t group = 1; group < p->groups; group++) {
      const real *part = a->part_bc + (group * rows + row) * 2 * N;
      for (int64_t i = 0; i < 2 * N; i++) sum[i] += part[i];
    }
    store_states(&a->dB, row / a->length, row % a->length, N, sum);
    store_states(&a->dC, row / a->length, row % a->length, N, sum + N);
  }
  return 0;
}

/* sum dA, dD and dbias over the batch, into the first row, then turn it round */
static void reduce_batch(const plan *p) {
  const scan_args *a = p->a;
  const int64_t N = a->states, size = (N + 2) * p->padded;
  real *sum = a->part_a;
  for (int64_t b = 1; b < a->batch; b++)
    for (int64_t n = 0; n < N + 2; n++)
      for (int64_t d = 0; d < a->channels; d++)
        sum[n * p->padded + d] += sum[b * size + n * p->padded + d];
  states_out(sum, p->padded, 0, a->channels, a->dA, N);
  if (a->dD) memcpy(a->dD, sum + N * p->padded, a->channels * sizeof(real));
  if (a->dbias) memcpy(a->dbias, sum + (N + 1) * p->padded, a->channels * sizeof(real));
}

/* ---------------------------------------------------------------- entry points */

static real *make_plan(const scan_args *a, plan *p) {
  const int64_t N = a->states;
  p->a = a;
  p->padded = (a->channels + PAD - 1) / PAD * PAD;
  p->groups = (a->channels + GROUP - 1) / GROUP;
  p->tiles = (a->length + TILE - 1) / TILE;
  real *memory = take((N + 2) * p->padded * (int64_t)sizeof(real));
  if (!memory) return NULL;
  memset(memory, 0, (N + 2) * p->padded * sizeof(real));
  states_in(a->A, N, 0, a->channels, memory, p->padded);
  for (int64_t i = 0; i < N * p->padded; i++) {
    real x = memory[i];
    x = x < -HUGE_A ? -HUGE_A : x > HUGE_A ? HUGE_A : x;
    memory[i] = x * (real)1.4426950408889634;
  }
  real *skip = memory + N * p->padded, *bias = skip + p->padded;
  if (a->D) memcpy(skip, a->D, a->channels * sizeof(real));
  if (a->bias) memcpy(bias, a->bias, a->channels * sizeof(real));
  p->A2 = memory;
  p->skip = skip;
  p->bias = bias;
  return memory;
}

/* below this many state updates a second thread costs more than it gives */
#define SMALL_WORK (1 << 17)

/* 0, or 1 when memory ran out */
int scan_forward(const scan_args *a) {
  plan p;
  real *memory = make_plan(a, &p);
  if (!memory) return 1;
  int64_t work_size = a->batch * a->length * a->channels * a->states;
  int failed = run_tasks(&p, forward_task, a->batch * p.groups, forward_scratch(a->states),
                         work_size < SMALL_WORK ? 1 : a->threads);
  free(memory);
  return failed;
}

int scan_backward(const scan_args *a) {
  plan p;
  real *memory = make_plan(a, &p);
  if (!memory) return 1;
  int64_t work_size = a->batch * a->length * a->channels * a->states;
  int64_t threads = work_size < SMALL_WORK ? 1 : a->threads;
  int64_t rows = a->batch * a->length;
  int failed = run_tasks(&p, backward_task, a->batch * p.groups, backward_scratch(a->states),
                         threads);
  if (!failed) {
    failed = run_tasks(&p, reduce_task, (rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK,
                       2 * a->states * (int64_t)sizeof(real),
                       rows * a->states * p.groups < SMALL_WORK ? 1 : threads);
    reduce_batch(&p);
  }
  free(memory);
  return failed;
}
