/* What the C sources here share: vectors and their functions, transposition, memory.
 *
 * Compiled per element type of the computation (float, or double with -DSCAN_DOUBLE).  Needs the
 * vector extensions of gcc or clang, nothing else.  Never compile it with -ffast-math: nan and inf
 * have to propagate.
 */
#ifndef NATIVE_VECTORS_H
#define NATIVE_VECTORS_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

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
#ifndef PAD
#define PAD 32 /* rows of states are padded to this many channels: a multiple of every WIDTH */
#endif

typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef bits_t ivec __attribute__((vector_size(VECTOR_BYTES)));
/* the same anywhere in memory */
typedef real loose_vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
typedef struct {
  vec v[2];
} pair; /* one row of WIDTH channels */

#define INLINE static inline __attribute__((always_inline))
INLINE vec load(const real *p) { return *(const loose_vec *)p; }
INLINE void store(real *p, vec x) { *(loose_vec *)p = x; }
#define NOINLINE __attribute__((noinline)) /* so that a profile shows the parts */
#define UNROLL2 _Pragma("GCC unroll 2")
#define UNROLL_ALL _Pragma("GCC unroll 16") /* so that arrays of vectors become registers */

/* ---------------------------------------------------------------- vectors */

INLINE vec splat(real x) { return (vec){0} + x; }
INLINE vec choose(ivec mask, vec yes, vec no) {
  return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask));
}
INLINE vec vmax(vec x, vec lo) { return choose(x < lo, lo, x); } /* nan stays nan */
INLINE vec vmin(vec x, vec hi) { return choose(x > hi, hi, x); }
INLINE vec vabs(vec x) { return choose(x < 0, -x, x); }
#if defined(__AVX512F__) && !defined(SCAN_DOUBLE)
INLINE real sum_lanes(vec x) { return _mm512_reduce_add_ps((__m512)x); }
#else
INLINE real sum_lanes(vec x) {
  real s[LANES];
  memcpy(s, &x, sizeof s);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) s[i] += s[i + half];
  return s[0];
}
#endif

/* 2^x as (1 + q) 2^k with integer k and |r| = |x - k| <= 1/2.  The recurrence uses the two parts:
 * g = 2^k h is exact, so h_t = g + (q g + b) is rounded as if a were known to full precision, and a
 * decay of 1 - 1e-7 does not become 1 - 1.19e-7 and pull the state the same way at every step. */
#if defined(__AVX512F__)
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

/* ---------------------------------------------------------------- one step of the recurrence */

/* Exponents use a dt that is finite, so that dt = inf gives exp(dt A) = 0 and not nan */
#define HUGE_DT ((real)1e30)
#define HUGE_A ((real)1e8)

/* A in units of log2, bounded */
INLINE real rate_of(real A) {
  A = A < -HUGE_A ? -HUGE_A : A > HUGE_A ? HUGE_A : A;
  return A * (real)1.4426950408889634;
}

/* 2^exponent h + input */
INLINE vec next_state(vec h, vec exponent, vec input) {
  scale_t k;
  vec q = exp2m1(split_exponent(exponent, &k));
  vec x = scale(h, k);
  return x + (q * x + input);
}

/* ---------------------------------------------------------------- transposition */

/* x[i] lane j  <->  x[j] lane i, halving the distance at each level */
INLINE void transpose(vec x[LANES]) {
#if defined(__clang__)
  real from[LANES][LANES], to[LANES][LANES];
  memcpy(from, x, sizeof from);
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < LANES; j++) to[j][i] = from[i][j];
  memcpy(x, to, sizeof to);
#else
  ivec lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  UNROLL_ALL for (int step = LANES / 2; step; step /= 2) {
    const ivec upper = (lane & step) != 0;
    const ivec low = lane + (upper & (LANES - step));            /* of y from lane `step` on */
    const ivec high = lane + step + (upper & (LANES - step));    /* of x up to there */
    UNROLL_ALL for (int i = 0; i < LANES; i++) {
      if (i & step) continue;
      vec a = x[i], b = x[i + step];
      x[i] = __builtin_shuffle(a, b, low);
      x[i + step] = __builtin_shuffle(a, b, high);
    }
  }
#endif
}

/* to[j * to_row + i] = from[i * from_row + j] */
static void transpose_matrix(const real *from, int64_t from_row, int64_t rows, int64_t columns,
                             real *to, int64_t to_row) {
  const int64_t whole_rows = rows / LANES * LANES, whole_columns = columns / LANES * LANES;
  for (int64_t i = 0; i < whole_rows; i += LANES)
    for (int64_t j = 0; j < whole_columns; j += LANES) {
      vec x[LANES];
      UNROLL_ALL for (int k = 0; k < LANES; k++) x[k] = load(from + (i + k) * from_row + j);
      transpose(x);
      UNROLL_ALL for (int k = 0; k < LANES; k++) store(to + (j + k) * to_row + i, x[k]);
    }
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; j++)
      to[j * to_row + i] = from[i * from_row + j];
}

/* (channels, states) in a caller's tensor  <->  (states, padded) here */
static void states_in(const real *from, int64_t states, int64_t channels, real *to, int64_t row) {
  transpose_matrix(from, states, channels, states, to, row);
}
static void states_out(const real *from, int64_t row, int64_t channels, real *to, int64_t states) {
  transpose_matrix(from, row, states, channels, to, states);
}

/* ---------------------------------------------------------------- processor and memory */

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

#endif
