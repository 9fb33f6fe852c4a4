/* Selective scan (Mamba-1) on the CPU: forward, backward and single steps.
 *
 *   dt  = softplus(delta + bias)                      per (b, t, d)
 *   h_t = exp(dt A[d,n]) h_{t-1} + dt u B[b,t,n]      per (b, t, d, n)
 *   out = (sum_n C[b,t,n] h_t + D[d] u) silu(z)       per (b, t, d)
 *
 * How it is laid out.  Channels sit in the SIMD lanes, so nothing in the recurrence crosses lanes.
 * One register block is 2 vectors of channels x 2 states: the rows that depend on the channel only
 * (dt, dt*u, ...) serve two states, the numbers that depend on the state only (B, C) serve two
 * vectors.  Time runs in tiles of TILE steps that fit the L1 cache; what depends on (t, d) alone,
 * such as softplus, silu and the conversion from bfloat16, is done before and after the loop over
 * states.
 *
 * Documents.  A tile is walked in runs, cut where a document starts (at an age of 0): each run but
 * the first, and the first if it starts so, begins with zeros.
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
#include "vectors.h"
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>

#ifndef TILE /* cpu.py sets both */
#define TILE 16   /* time steps between saved states */
#define GROUP 128 /* channels of one partial sum of dB and dC: a multiple of PAD */
#endif
#define HUGE_PAGE_BYTES (1 << 20) /* outputs from this size on ask for huge pages */
#define MAX_THREADS 256

/* ---------------------------------------------------------------- arguments (cpu.py) */

enum { TYPE_REAL = 0, TYPE_BF16 = 1 };

typedef struct { /* (batch, time, last) with unit stride on the last axis; absent if ptr is NULL */
  char *ptr;
  int64_t type, batch_stride, time_stride; /* strides in elements */
} tensor;

typedef struct {
  int64_t batch, length, channels, states, softplus, threads;
  tensor u, delta, B, C, z, y;
  real *A, *D, *bias, *h0, *h_last, *saved;
  const uint8_t *ages; /* (batch, length): steps since the start of the document; NULL for one */
  /* the backward only */
  tensor dy, du, ddelta, dz, dB, dC;
  real *dA, *dD, *dbias, *dh0, *dh_last;
  real *part_bc; /* (groups, batch, length, 2, states): dB and dC of one group */
  real *part_a;  /* (batch, states + 2, padded channels): dA, dD, dbias of one batch row */
} scan_args;

typedef struct { /* derived once per call, read by all threads */
  const scan_args *a;
  int64_t padded;   /* channels rounded up to PAD */
  int64_t group;    /* channels of one task, at most GROUP */
  int64_t groups;   /* tasks per batch row */
  int64_t tiles;    /* of TILE steps */
  const real *A2;   /* (states, padded): A * log2(e), clamped */
  const real *skip; /* (padded): D or zeros */
  const real *bias; /* (padded): delta_bias or zeros */
} plan;

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
    hvec h0, h1;
    memcpy(&h0, p, sizeof h0);
    memcpy(&h1, p + LANES, sizeof h1);
    return (pair){{from_bf16(h0), from_bf16(h1)}};
  }
#endif
  const real *p = (const real *)x->ptr + at;
  real edge[WIDTH];
  if (count < WIDTH) {
    memset(edge, 0, sizeof edge);
    memcpy(edge, p, count * sizeof *p);
    p = edge;
  }
  return (pair){{load(p), load(p + LANES)}};
}

INLINE void store_row(const tensor *x, int64_t b, int64_t t, int64_t d, int count, pair r) {
  int64_t at = offset_of(x, b, t, d);
#ifndef SCAN_DOUBLE
  if (x->type == TYPE_BF16) {
    uint16_t *p = (uint16_t *)x->ptr + at;
    hvec h0 = to_bf16(r.v[0]), h1 = to_bf16(r.v[1]);
    uint16_t edge[WIDTH], *to = count < WIDTH ? edge : p;
    memcpy(to, &h0, sizeof h0);
    memcpy(to + LANES, &h1, sizeof h1);
    if (count < WIDTH) memcpy(p, edge, count * sizeof *p);
    return;
  }
#endif
  real *p = (real *)x->ptr + at;
  real edge[WIDTH], *to = count < WIDTH ? edge : p;
  store(to, r.v[0]);
  store(to + LANES, r.v[1]);
  if (count < WIDTH) memcpy(p, edge, count * sizeof *p);
}

/* Rows of a block are a whole time step apart, which no hardware prefetcher follows. */
INLINE void prefetch_row(const tensor *x, int64_t b, int64_t t, int64_t d, int writing) {
  if (!x->ptr) return;
  const int64_t size = x->type == TYPE_BF16 ? 2 : (int64_t)sizeof(real);
  const char *p = x->ptr + offset_of(x, b, t, d) * size;
  for (int64_t i = 0; i < WIDTH * size; i += 64) {
    if (writing)
      __builtin_prefetch(p + i, 1, 2);
    else
      __builtin_prefetch(p + i, 0, 2);
  }
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

/* ---------------------------------------------------------------- threads */

typedef int (*task_fn)(const plan *p, int64_t task, char *scratch);
typedef struct {
  task_fn run;
  const plan *p;
  int64_t tasks, scratch_bytes;
  atomic_llong next;
  atomic_int failed;
} team;

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

/* Threads live for one call.  Starting one costs some tens of microseconds; in exchange there is
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

typedef struct { /* one time step of one block of channels */
  vec dt[2], dtu[2], y[2];
} forward_row;

/* Two states (or one, S) of one run.  Pointers go to the first state, the second is a row on; no
 * h_at: from zeros. */
INLINE void tile_forward(int S, int steps, int64_t states, forward_row *r, const real *B,
                         const real *C, const real *A2_at, int64_t padded, const real *h_at,
                         int64_t row, real *h_next, int64_t next_row) {
  vec A2[2][2], h[2][2];
  UNROLL2 for (int s = 0; s < S; s++) {
    UNROLL2 for (int v = 0; v < 2; v++) {
      A2[s][v] = load(A2_at + s * padded + v * LANES);
      h[s][v] = h_at ? load(h_at + s * row + v * LANES) : splat(0);
    }
  }
  for (int t = 0; t < steps; t++) {
    UNROLL2 for (int v = 0; v < 2; v++) {
      vec dt = r[t].dt[v], dtu = r[t].dtu[v], sum = r[t].y[v];
      UNROLL2 for (int s = 0; s < S; s++) {
        h[s][v] = next_state(h[s][v], dt * A2[s][v], dtu * B[t * states + s]);
        sum += h[s][v] * C[t * states + s];
      }
      r[t].y[v] = sum;
    }
  }
  UNROLL2 for (int s = 0; s < S; s++) {
    UNROLL2 for (int v = 0; v < 2; v++) store(h_next + s * next_row + v * LANES, h[s][v]);
  }
}

static int64_t forward_scratch(int64_t states) {
  return TILE * (int64_t)sizeof(forward_row) + (2 * TILE + GROUP) * states * (int64_t)sizeof(real);
}

/* steps of a tile, 0 if there is no such tile */
INLINE int steps_of(const scan_args *a, int64_t tile) {
  const int64_t left = a->length - tile * TILE;
  return tile < 0 || left < 0 ? 0 : left < TILE ? (int)left : TILE;
}

typedef struct { /* where a task is */
  int64_t b, t0, d;
  int steps, count; /* of the tile, and channels of the block */
} place;

/* whether a document starts at a step of a tile */
INLINE int starts_at(const scan_args *a, place at, int t) {
  return a->ages && !a->ages[at.b * a->length + at.t0 + t];
}

/* what is computed once per (t, d) before the loop over states ... */
static NOINLINE void forward_open(const plan *p, place at, place next, forward_row *r) {
  const scan_args *a = p->a;
  const pair skip = {{load(p->skip + at.d), load(p->skip + at.d + LANES)}};
  const pair bias = {{load(p->bias + at.d), load(p->bias + at.d + LANES)}};
  for (int t = 0; t < at.steps; t++) {
    pair x = load_row(&a->delta, at.b, at.t0 + t, at.d, at.count);
    pair u = load_row(&a->u, at.b, at.t0 + t, at.d, at.count);
    UNROLL2 for (int v = 0; v < 2; v++) {
      vec slope, dt = x.v[v] + bias.v[v];
      if (a->softplus) dt = softplus(dt, &slope);
      r[t].dtu[v] = dt * u.v[v];
      r[t].dt[v] = vmin(dt, splat(HUGE_DT));
      r[t].y[v] = u.v[v] * skip.v[v];
    }
    if (t < next.steps) {
      prefetch_row(&a->delta, next.b, next.t0 + t, next.d, 0);
      prefetch_row(&a->u, next.b, next.t0 + t, next.d, 0);
      prefetch_row(&a->z, next.b, next.t0 + t, next.d, 0);
    }
  }
}

/* ... and after it */
static NOINLINE void forward_close(const plan *p, place at, const forward_row *r) {
  const scan_args *a = p->a;
  for (int t = 0; t < at.steps; t++) {
    pair y = {{r[t].y[0], r[t].y[1]}};
    if (a->z.ptr) {
      pair z = load_row(&a->z, at.b, at.t0 + t, at.d, at.count);
      UNROLL2 for (int v = 0; v < 2; v++) y.v[v] *= z.v[v] * sigmoid(z.v[v]);
    }
    store_row(&a->y, at.b, at.t0 + t, at.d, at.count, y);
  }
}

static NOINLINE void forward_states(const plan *p, place at, forward_row *r, const real *B,
                                    const real *C, const real *h, int64_t row, real *h_next,
                                    int64_t next_row) {
  const int64_t N = p->a->states, P = p->padded;
  const real *A2 = p->A2 + at.d;
  for (int begin = 0, end; begin < at.steps; begin = end) {
    const int fresh = starts_at(p->a, at, begin);
    for (end = begin + 1; end < at.steps && !starts_at(p->a, at, end);) end++;
    const real *B_at = B + begin * N, *C_at = C + begin * N;
    for (int64_t n = 0; n < N; n += 2) {
      const real *from = fresh ? NULL : h + n * row;
      if (n + 1 == N)
        tile_forward(1, end - begin, N, r + begin, B_at + n, C_at + n, A2 + n * P, P, from, row,
                     h_next + n * next_row, next_row);
      else
        tile_forward(2, end - begin, N, r + begin, B_at + n, C_at + n, A2 + n * P, P, from, row,
                     h_next + n * next_row, next_row);
    }
  }
}

static int forward_task(const plan *p, int64_t task, char *scratch) {
  const scan_args *a = p->a;
  const int64_t N = a->states, P = p->padded, b = task / p->groups;
  const int64_t d_begin = task % p->groups * p->group;
  const int64_t d_end = d_begin + p->group < a->channels ? d_begin + p->group : a->channels;
  forward_row *r = (forward_row *)scratch;
  real *own = (real *)(r + TILE);                    /* (states, GROUP) */
  real *sB = own + GROUP * N, *sC = sB + TILE * N;   /* (TILE, states) */
  /* The state lives in scratch, or where the checkpoint of the coming tile is wanted. */
  real *saved = a->saved ? a->saved + b * p->tiles * N * P + d_begin : NULL;
  real *h = saved ? saved : own;
  int64_t row = saved ? P : GROUP;
  const int64_t width = (d_end - d_begin + PAD - 1) / PAD * PAD;

  for (int64_t n = 0; n < N; n++) memset(h + n * row, 0, width * sizeof(real));
  if (a->h0)
    states_in(a->h0 + (b * a->channels + d_begin) * N, N, d_end - d_begin, h, row);

  for (int64_t tile = 0; tile < p->tiles; tile++) {
    place at = {.b = b, .t0 = tile * TILE, .steps = steps_of(a, tile)};
    const int last = tile + 1 == p->tiles;
    real *h_next = saved && !last ? h + N * P : own;
    const int64_t next_row = saved && !last ? P : GROUP;
    for (int t = 0; t < at.steps; t++) {
      load_states(&a->B, b, at.t0 + t, N, sB + t * N);
      load_states(&a->C, b, at.t0 + t, N, sC + t * N);
    }
    for (at.d = d_begin; at.d < d_end; at.d += WIDTH) {
      const int64_t i = at.d - d_begin;
      at.count = d_end - at.d < WIDTH ? (int)(d_end - at.d) : WIDTH;
      place next = at;
      next.d += WIDTH;
      if (next.d >= d_end)
        next = (place){.b = b, .t0 = at.t0 + TILE, .d = d_begin, .steps = steps_of(a, tile + 1)};
      forward_open(p, at, next, r);
      forward_states(p, at, r, sB, sC, h + i, row, h_next + i, next_row);
      forward_close(p, at, r);
    }
    h = h_next;
    row = next_row;
  }
  states_out(h, row, d_end - d_begin, a->h_last + (b * a->channels + d_begin) * N, N);
  return 0;
}

/* ---------------------------------------------------------------- backward */

typedef struct { /* one time step of one block of channels: what the loop over states touches */
  vec dt[2], dtu[2], dy[2];
  vec y[2];               /* sum_n C h + D u, for dz */
  vec v[2];               /* sum_n g B,       for du and ddelta */
  vec w[2];               /* sum_n g a h A2,  for ddelta */
  vec q[2][2], h[2][2];   /* of the two states at hand: exp(dt A) = (1 + q) 2^k, */
  scale_t k[2][2];        /* h is the state before the step */
} backward_row;

typedef struct { /* ... and what it does not */
  pair u, slope, gate; /* gate = dout silu'(z) */
} outer_row;

typedef struct { /* per time step and two states: sums over channels, still in lanes */
  vec B[2], C[2];
} lane_sums;

static int64_t backward_scratch(int64_t states) {
  return (TILE + 1) * (int64_t)sizeof(backward_row) + TILE * (int64_t)sizeof(outer_row) +
         TILE * (states + 1) / 2 * (int64_t)sizeof(lane_sums) +
         (2 * TILE + 2 * GROUP) * states * (int64_t)sizeof(real) +
         2 * GROUP * (int64_t)sizeof(real);
}

/* Two states (or one, S) of one run: forward, keeping exp(dt A) and h, then back.  On entry g is
 * the gradient of the state after the run, on return of the state before it; dA is added to.
 * Pointers go to the first state, the second is `row` further on (for h and A2 `padded`); no h_at:
 * from zeros. */
INLINE void tile_backward(int S, int with_y, int steps, int64_t states, backward_row *r,
                          const real *B, const real *C, const real *A2_at, const real *h_at,
                          int64_t padded, real *g_at, real *dA_at, int64_t row,
                          lane_sums *sums) {
  vec A2[2][2], h[2][2], g[2][2], dA[2][2];
  UNROLL2 for (int s = 0; s < S; s++) {
    UNROLL2 for (int v = 0; v < 2; v++) {
      A2[s][v] = load(A2_at + s * padded + v * LANES);
      h[s][v] = h_at ? load(h_at + s * padded + v * LANES) : splat(0);
    }
  }
  for (int t = 0; t < steps; t++) {
    UNROLL2 for (int v = 0; v < 2; v++) {
      vec dt = r[t].dt[v], dtu = r[t].dtu[v], sum = r[t].y[v];
      UNROLL2 for (int s = 0; s < S; s++) {
        scale_t k;
        vec q = exp2m1(split_exponent(dt * A2[s][v], &k));
        vec x = scale(h[s][v], k);
        r[t].h[s][v] = h[s][v];
        r[t].q[s][v] = q;
        r[t].k[s][v] = k;
        h[s][v] = x + (q * x + dtu * B[t * states + s]);
        if (with_y) sum += h[s][v] * C[t * states + s];
      }
      if (with_y) r[t].y[v] = sum;
    }
  }
  UNROLL2 for (int s = 0; s < S; s++) {
    UNROLL2 for (int v = 0; v < 2; v++) {
      g[s][v] = load(g_at + s * row + v * LANES);
      dA[s][v] = load(dA_at + s * row + v * LANES);
    }
  }
  for (int t = steps - 1; t >= 0; t--) {
    vec sumB[2], sumC[2];
    UNROLL2 for (int s = 0; s < S; s++) {
      sumB[s] = sums[t].B[s];
      sumC[s] = sums[t].C[s];
    }
    UNROLL2 for (int v = 0; v < 2; v++) {
      vec dt = r[t].dt[v], dtu = r[t].dtu[v], dy = r[t].dy[v];
      vec sum_v = r[t].v[v], sum_w = r[t].w[v];
      UNROLL2 for (int s = 0; s < S; s++) {
        vec gh = g[s][v] + dy * C[t * states + s];
        sum_v += gh * B[t * states + s];
        sumB[s] += gh * dtu;
        sumC[s] += dy * h[s][v];
        h[s][v] = r[t].h[s][v];
        vec x = scale(gh, r[t].k[s][v]);
        g[s][v] = x + x * r[t].q[s][v];
        vec w = g[s][v] * h[s][v];
        dA[s][v] += w * dt;
        sum_w += w * A2[s][v];
      }
      r[t].v[v] = sum_v;
      r[t].w[v] = sum_w;
    }
    UNROLL2 for (int s = 0; s < S; s++) {
      sums[t].B[s] = sumB[s];
      sums[t].C[s] = sumC[s];
    }
  }
  UNROLL2 for (int s = 0; s < S; s++) {
    UNROLL2 for (int v = 0; v < 2; v++) {
      store(g_at + s * row + v * LANES, g[s][v]);
      store(dA_at + s * row + v * LANES, dA[s][v]);
    }
  }
}

/* what is computed once per (t, d) before the loop over states ... */
static NOINLINE void backward_open(const plan *p, place at, place next, backward_row *r,
                                   outer_row *outer) {
  const scan_args *a = p->a;
  const pair skip = {{load(p->skip + at.d), load(p->skip + at.d + LANES)}};
  const pair bias = {{load(p->bias + at.d), load(p->bias + at.d + LANES)}};
  for (int t = 0; t < at.steps; t++) {
    pair x = load_row(&a->delta, at.b, at.t0 + t, at.d, at.count);
    pair u = load_row(&a->u, at.b, at.t0 + t, at.d, at.count);
    pair dout = load_row(&a->dy, at.b, at.t0 + t, at.d, at.count);
    pair slope = {{splat(1), splat(1)}}, z = u;
    if (a->z.ptr) z = load_row(&a->z, at.b, at.t0 + t, at.d, at.count);
    UNROLL2 for (int v = 0; v < 2; v++) {
      vec dt = x.v[v] + bias.v[v], dy = dout.v[v];
      if (a->softplus) dt = softplus(dt, &slope.v[v]);
      r[t].dtu[v] = dt * u.v[v];
      r[t].dt[v] = vmin(dt, splat(HUGE_DT));
      r[t].y[v] = u.v[v] * skip.v[v];
      r[t].v[v] = r[t].w[v] = splat(0);
      if (a->z.ptr) {
        vec sig = sigmoid(z.v[v]), gate = z.v[v] * sig;
        outer[t].gate.v[v] = dy * (sig + gate * (1 - sig));
        dy *= gate;
      }
      r[t].dy[v] = dy;
    }
    outer[t].u = u;
    outer[t].slope = slope;
    if (t < next.steps) {
      prefetch_row(&a->delta, next.b, next.t0 + t, next.d, 0);
      prefetch_row(&a->u, next.b, next.t0 + t, next.d, 0);
      prefetch_row(&a->dy, next.b, next.t0 + t, next.d, 0);
      prefetch_row(&a->z, next.b, next.t0 + t, next.d, 0);
    }
    prefetch_row(&a->du, at.b, at.t0 + t, at.d, 1);
    prefetch_row(&a->ddelta, at.b, at.t0 + t, at.d, 1);
    prefetch_row(&a->dz, at.b, at.t0 + t, at.d, 1);
  }
  const tensor saved = {(char *)a->saved, TYPE_REAL, p->tiles * a->states * p->padded, p->padded};
  if (next.steps > 0)
    for (int64_t n = 0; n < a->states; n++)
      prefetch_row(&saved, next.b, next.t0 / TILE * a->states + n, next.d, 0);
}

/* ... and after it */
static NOINLINE void backward_close(const plan *p, place at, const backward_row *r,
                                    const outer_row *outer, real *dD, real *dbias) {
  const scan_args *a = p->a;
  const pair skip = {{load(p->skip + at.d), load(p->skip + at.d + LANES)}};
  pair sumD = {{load(dD), load(dD + LANES)}}, sum_bias = {{load(dbias), load(dbias + LANES)}};
  for (int t = at.steps - 1; t >= 0; t--) {
    pair du, ddelta, dz;
    UNROLL2 for (int v = 0; v < 2; v++) {
      vec dt = r[t].dt[v], dy = r[t].dy[v], u = outer[t].u.v[v];
      du.v[v] = dy * skip.v[v] + dt * r[t].v[v];
      /* w was summed with A log2(e) */
      vec x = u * r[t].v[v] + r[t].w[v] * (real)0.6931471805599453;
      ddelta.v[v] = x * outer[t].slope.v[v];
      sumD.v[v] += dy * u;
      sum_bias.v[v] += ddelta.v[v];
      dz.v[v] = outer[t].gate.v[v] * r[t].y[v];
    }
    store_row(&a->du, at.b, at.t0 + t, at.d, at.count, du);
    store_row(&a->ddelta, at.b, at.t0 + t, at.d, at.count, ddelta);
    if (a->z.ptr) store_row(&a->dz, at.b, at.t0 + t, at.d, at.count, dz);
  }
  for (int v = 0; v < 2; v++) {
    store(dD + v * LANES, sumD.v[v]);
    store(dbias + v * LANES, sum_bias.v[v]);
  }
}

/* sums over the channels of a group leave the lanes */
static NOINLINE void backward_sums(int steps, int64_t states, const lane_sums *sums, real *part) {
  for (int t = 0; t < steps; t++)
    for (int64_t n = 0; n < states; n++) {
      part[2 * t * states + n] = sum_lanes(sums[n / 2 * TILE + t].B[n % 2]);
      part[(2 * t + 1) * states + n] = sum_lanes(sums[n / 2 * TILE + t].C[n % 2]);
    }
}

static NOINLINE void backward_states(const plan *p, place at, backward_row *r, const real *B,
                                     const real *C, real *g, real *dA, lane_sums *sums) {
  const int64_t N = p->a->states, P = p->padded;
  const real *A2 = p->A2 + at.d;
  const real *h = p->a->saved + (at.b * p->tiles + at.t0 / TILE) * N * P + at.d;
  for (int end = at.steps, begin; end > 0; end = begin) {
    for (begin = end - 1; begin > 0 && !starts_at(p->a, at, begin);) begin--;
    const int fresh = starts_at(p->a, at, begin), steps = end - begin;
    const real *B_at = B + begin * N, *C_at = C + begin * N;
    for (int64_t n = 0; n < N; n += 2) {
      const real *from = fresh ? NULL : h + n * P;
      lane_sums *to = sums + n / 2 * TILE + begin;
      if (n + 1 == N)
        tile_backward(1, 1, steps, N, r + begin, B_at + n, C_at + n, A2 + n * P, from, P,
                      g + n * GROUP, dA + n * GROUP, GROUP, to);
      else if (p->a->z.ptr)
        tile_backward(2, 1, steps, N, r + begin, B_at + n, C_at + n, A2 + n * P, from, P,
                      g + n * GROUP, dA + n * GROUP, GROUP, to);
      else
        tile_backward(2, 0, steps, N, r + begin, B_at + n, C_at + n, A2 + n * P, from, P,
                      g + n * GROUP, dA + n * GROUP, GROUP, to);
    }
    if (fresh) /* of what came before, nothing was read */
      for (int64_t n = 0; n < N; n++) memset(g + n * GROUP, 0, WIDTH * sizeof(real));
  }
}

static int backward_task(const plan *p, int64_t task, char *scratch) {
  const scan_args *a = p->a;
  const int64_t N = a->states, b = task / p->groups, group = task % p->groups;
  const int64_t d_begin = group * GROUP;
  const int64_t d_end = d_begin + GROUP < a->channels ? d_begin + GROUP : a->channels;
  backward_row *r = (backward_row *)scratch;
  outer_row *outer = (outer_row *)(r + TILE);
  lane_sums *sums = (lane_sums *)(outer + TILE);   /* ((states + 1) / 2, TILE) */
  real *g = (real *)(sums + TILE * ((N + 1) / 2)); /* (states, GROUP): carried gradient */
  real *dA = g + GROUP * N;                        /* (states, GROUP), then dD, dbias */
  real *dD = dA + GROUP * N, *dbias = dD + GROUP;
  real *sB = dbias + GROUP, *sC = sB + TILE * N;

  memset(g, 0, GROUP * N * sizeof(real));
  memset(dA, 0, (GROUP * N + 2 * GROUP) * sizeof(real));
  if (a->dh_last)
    states_in(a->dh_last + (b * a->channels + d_begin) * N, N, d_end - d_begin, g, GROUP);

  for (int64_t tile = p->tiles - 1; tile >= 0; tile--) {
    place at = {.b = b, .t0 = tile * TILE, .steps = steps_of(a, tile)};
    for (int t = 0; t < at.steps; t++) {
      load_states(&a->B, b, at.t0 + t, N, sB + t * N);
      load_states(&a->C, b, at.t0 + t, N, sC + t * N);
    }
    memset(sums, 0, TILE * ((N + 1) / 2) * sizeof *sums);
    for (at.d = d_begin; at.d < d_end; at.d += WIDTH) {
      const int64_t i = at.d - d_begin;
      at.count = d_end - at.d < WIDTH ? (int)(d_end - at.d) : WIDTH;
      place next = at;
      next.d += WIDTH;
      if (next.d >= d_end)
        next = (place){.b = b, .t0 = at.t0 - TILE, .d = d_begin, .steps = steps_of(a, tile - 1)};
      backward_open(p, at, next, r, outer);
      backward_states(p, at, r, sB, sC, g + i, dA + i, sums);
      backward_close(p, at, r, outer, dD + i, dbias + i);
    }
    backward_sums(at.steps, N, sums,
                  a->part_bc + ((group * a->batch + b) * a->length + at.t0) * 2 * N);
  }
  if (a->dh0)
    states_out(g, GROUP, d_end - d_begin, a->dh0 + (b * a->channels + d_begin) * N, N);
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
  states_out(sum, p->padded, a->channels, a->dA, N);
  if (a->dD) memcpy(a->dD, sum + N * p->padded, a->channels * sizeof(real));
  if (a->dbias) memcpy(a->dbias, sum + (N + 1) * p->padded, a->channels * sizeof(real));
}

/* ---------------------------------------------------------------- entry points */

static real *make_plan(const scan_args *a, int64_t group, plan *p) {
  const int64_t N = a->states;
  p->a = a;
  p->padded = (a->channels + PAD - 1) / PAD * PAD;
  p->group = group;
  p->groups = (a->channels + group - 1) / group;
  p->tiles = (a->length + TILE - 1) / TILE;
  real *memory = take((N + 2) * p->padded * (int64_t)sizeof(real));
  if (!memory) return NULL;
  memset(memory, 0, (N + 2) * p->padded * sizeof(real));
  states_in(a->A, N, a->channels, memory, p->padded);
  for (int64_t i = 0; i < N * p->padded; i++) memory[i] = rate_of(memory[i]);
  real *skip = memory + N * p->padded, *bias = skip + p->padded;
  if (a->D) memcpy(skip, a->D, a->channels * sizeof(real));
  if (a->bias) memcpy(bias, a->bias, a->channels * sizeof(real));
  p->A2 = memory;
  p->skip = skip;
  p->bias = bias;
  return memory;
}

/* A fresh output costs a page fault every 4 KiB, at these speeds as much as computing it. */
static void prefer_huge_pages(const tensor *x, int64_t elements) {
#ifdef MADV_HUGEPAGE
  const int64_t bytes = elements * (x->type == TYPE_BF16 ? 2 : (int64_t)sizeof(real));
  const uintptr_t inside = (uintptr_t)x->ptr & 4095; /* advice starts at the page of the start */
  if (x->ptr && bytes >= HUGE_PAGE_BYTES) madvise(x->ptr - inside, bytes + inside, MADV_HUGEPAGE);
#else
  (void)x, (void)elements;
#endif
}

/* below this many state updates a second thread costs more than it gives */
#ifndef SMALL_WORK
#define SMALL_WORK (1 << 17)
#endif

static int64_t useful_threads(const scan_args *a) {
  return a->batch * a->length * a->channels * a->states < SMALL_WORK ? 1 : a->threads;
}

/* 0, or 1 when memory ran out */
int scan_forward(const scan_args *a) {
  plan p;
  const int64_t threads = useful_threads(a);
  int64_t group = GROUP; /* channels are independent here: cut them finer if threads would idle */
  while (group > PAD && a->batch * ((a->channels + group - 1) / group) < 3 * threads) group -= PAD;
  real *memory = make_plan(a, group, &p);
  if (!memory) return 1;
  const tensor saved = {(char *)a->saved, TYPE_REAL, 0, 0};
  prefer_huge_pages(&a->y, a->batch * a->length * a->channels);
  prefer_huge_pages(&saved, a->batch * p.tiles * a->states * p.padded);
  int failed =
      run_tasks(&p, forward_task, a->batch * p.groups, forward_scratch(a->states), threads);
  free(memory);
  return failed;
}

int scan_backward(const scan_args *a) {
  plan p;
  const int64_t rows = a->batch * a->length, threads = useful_threads(a);
  real *memory = make_plan(a, GROUP, &p); /* not a function of the threads: it orders the sums */
  if (!memory) return 1;
  prefer_huge_pages(&a->du, rows * a->channels);
  prefer_huge_pages(&a->ddelta, rows * a->channels);
  prefer_huge_pages(&a->dz, rows * a->channels);
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

/* ---------------------------------------------------------------- single steps */

typedef struct { /* all contiguous: streams (batch, channels or states) */
  int64_t batch, channels, states, softplus, threads;
  int64_t type_u, type_delta, type_B, type_C, type_z;
  char *u, *delta, *B, *C, *z, *y;
  real *A, *D, *bias, *h0, *h_last;
} step_args;

int scan_step(const step_args *s) {
  const int64_t d = s->channels, n = s->states;
  const scan_args a = {
      .batch = s->batch, .length = 1, .channels = d, .states = n,
      .softplus = s->softplus, .threads = s->threads,
      .u = {s->u, s->type_u, d, d}, .delta = {s->delta, s->type_delta, d, d},
      .B = {s->B, s->type_B, n, n}, .C = {s->C, s->type_C, n, n},
      .z = {s->z, s->type_z, d, d}, .y = {s->y, s->type_u, d, d},
      .A = s->A, .D = s->D, .bias = s->bias, .h0 = s->h0, .h_last = s->h_last,
  };
  return scan_forward(&a);
}

/* x, y (batch, channels); tails (batch, taps - 1, channels); weight (channels, taps) */
typedef struct {
  int64_t batch, channels, taps, type;
  char *x, *tail, *y, *tail_out;
  real *weight, *bias;
} conv_args;

/* y = silu(causal convolution of the tail and x), and the tail of the next step */
int conv_step(const conv_args *c) {
  const int64_t D = c->channels, before = c->taps - 1;
  const tensor x = {c->x, c->type, D, 0}, y = {c->y, c->type, D, 0};
  const tensor tail = {c->tail, c->type, before * D, D};
  const tensor tail_out = {c->tail_out, c->type, before * D, D};
  for (int64_t d = 0; d < D; d += WIDTH) {
    const int count = D - d < WIDTH ? (int)(D - d) : WIDTH;
    for (int64_t b = 0; b < c->batch; b++) {
      pair sum = {{splat(0), splat(0)}};
      real column[WIDTH] = {0};
      if (c->bias) {
        memcpy(column, c->bias + d, count * sizeof(real));
        sum = (pair){{load(column), load(column + LANES)}};
      }
      for (int64_t k = 0; k <= before; k++) {
        pair in = k < before ? load_row(&tail, b, k, d, count) : load_row(&x, b, 0, d, count);
        if (k > 0) store_row(&tail_out, b, k - 1, d, count, in);
        for (int i = 0; i < count; i++) column[i] = c->weight[(d + i) * c->taps + k];
        sum.v[0] += in.v[0] * load(column);
        sum.v[1] += in.v[1] * load(column + LANES);
      }
      for (int v = 0; v < 2; v++) sum.v[v] *= sigmoid(sum.v[v]);
      store_row(&y, b, 0, d, count, sum);
    }
  }
  return 0;
}
