"""Every C source under the compiler's checkers, with threads; scan.c is in tests/ops."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.sanitized import compiles, run_sanitized
from tests.tools.test_sanitized_model import SANITIZED as MODEL

PACKAGE = Path(__file__).resolve().parents[2] / "mambabyte"
needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")

CONV = """
#include "conv.c"
#include <stdio.h>
#include <stdlib.h>
static real *data(int64_t n) {
  real *p = malloc((n ? n : 1) * sizeof *p);
  for (int64_t i = 0; i < n; i++) p[i] = (real)((i * 7919) % 101) / 101 - (real).5;
  return p;
}
static void once(int64_t b, int64_t l, int64_t d, int64_t k, int tail) {
  conv_args a = {.batch = b, .length = l, .channels = d, .taps = k, .silu = 1, .threads = 4,
    .x_batch = l * d, .x_time = d, .dy_batch = l * d, .dy_time = d, .x = data(b * l * d),
    .tail = tail ? data(b * (k - 1) * d) : NULL, .weight = data(d * k),
    .bias = tail ? data(d) : NULL, .y = data(b * l * d), .dy = data(b * l * d),
    .dx = data(b * l * d), .dtail = tail ? data(b * (k - 1) * d) : NULL, .dweight = data(d * k),
    .dbias = tail ? data(d) : NULL};
  if (conv_forward(&a) || conv_backward(&a)) abort();
}
int main(void) {
  for (int64_t k = 1; k <= MAX_TAPS; k++)
    once(1, 1, 1, k, 1), once(2, 17, 33, k, 0), once(3, 5, 300, k, 1), once(1, 2, 129, k, 1);
  puts("clean");
}
"""

NGRAM = """
#include "ngram.c"
#include <stdio.h>
static void once(int64_t n, int order, int values) {
  uint8_t *text = malloc(n + order - 1), *common = malloc(n);
  int32_t *place = malloc(n * sizeof *place);
  for (int64_t i = 0; i < n + order - 1; i++) text[i] = (uint8_t)((i * i * 7919 + i / 3) % values);
  if (sort_contexts(text, n, order, 4, place, common)) abort();
  char *seen = calloc(n, 1);
  for (int64_t i = 0; i < n; i++)
    if (place[i] < 0 || place[i] >= n || seen[place[i]]++ || common[i] > order) abort();
  int64_t child[3] = {0, 1, 2};
  int32_t start[3] = {0, 2, 4}, count[4] = {1, 2, 3, 4}, starts[3], totals[2], counts[4];
  uint8_t symbol[4] = {0, 255, 0, 64}, symbols[4];
  if (shorten(2, child, start, symbol, count, 0, starts, totals, symbols, counts) != 4) abort();
  if (totals[0] != 3 || totals[1] != 7) abort();
}
int main(void) {
  once(1, 1, 2), once(2, 16, 256), once(1000, 5, 3), once(5000, 16, 2), once(3000, 2, 256);
  once(3000, 12, 1);
  puts("clean");
}
"""

STREAM = """
#include "model.c"
#include <pthread.h>
#include <stdio.h>
static real *data(int64_t n, real lo) {
  real *p = malloc((n ? n : 1) * sizeof *p);
  for (int64_t i = 0; i < n; i++) p[i] = lo + (real)((i * 7919) % 101) / 101;
  return p;
}
enum { W = 12, D = 24, N = 3, K = 4, R = 2, V = 257, BYTES = 5 };
static model m;
static layer l[1];
static real *kept;
static void *stream(void *unused) { /* states are each thread's own, the model is shared */
  unsigned char bytes[BYTES] = {1, 2, 3, 4, 255};
  memory s = {0};
  call c = {BYTES, 0, data(V, 0), kept};
  for (int i = 0; i < 20; i++) {
    s.out[0] = data((K - 1) * D, 0), s.out[1] = data(D * N, 0);
    if (advance(&m, l, &s, &c, bytes)) abort();
    s.in[0] = s.out[0], s.in[1] = s.out[1], c.position += BYTES;
  }
  return c.log_probs;
}
int main(void) {
  m = (model){.layers = 1, .width = W, .vocabulary = V, .norm_kind = NORM_LAYER, .channels = D,
    .states = N, .taps = K, .rank = R, .norm_eps = 1e-5, .tiny_eps = 1e-7,
    .embedding = data(V * W, -.5), .norm = data(W, 0), .norm_bias = data(W, 0)};
  m.head = m.embedding;
  l[0] = (layer){.kind = MAMBA, .added = -1, .kept_as = -1, .norm = data(W, 0),
    .norm_bias = data(W, 0), .own = {[IN_PROJ] = data(2 * D * W, -.5), [CONV] = data(D * K, -.5),
    [CONV_BIAS] = data(D, 0), [X_PROJ] = data((R + 2 * N) * D, -.5), [DT_PROJ] = data(D * R, -.5),
    [DT_BIAS] = data(D, -.5), [A_LOG] = data(D * N, 0), [SKIP] = data(D, 0),
    [OUT_PROJ] = data(D * W, -.5)}};
  kept = malloc(kept_size(&m) * sizeof *kept);
  keep(&m, l, kept);
  pthread_t id[4];
  void *got[4];
  for (int i = 0; i < 4; i++) pthread_create(&id[i], NULL, stream, NULL);
  for (int i = 0; i < 4; i++) pthread_join(id[i], &got[i]);
  for (int i = 1; i < 4; i++) if (memcmp(got[0], got[i], V * sizeof(real))) abort();
  puts("clean");
}
"""

EXPERTS = """
#include "experts.c"
#include <stdio.h>
enum { PAD = 64, LENGTH = 3000, OTHERS = 1, GIVEN = 2 + 2 + 2 + OTHERS, HIDDEN = 3 };
int main(void) {
  static uint8_t text[PAD + LENGTH];
  for (int i = 0; i < LENGTH; i++) text[PAD + i] = (uint8_t)("ab AB\\xc3"[(i * i / 7 + i) % 6]);
  int64_t root[1] = {0}, after[2] = {'a', 'b'}, match[2] = {3, 7};
  int32_t start[2] = {0, 2}, total[1] = {3}, count[2] = {1, 2};
  int32_t starts[3] = {0, 1, 2}, totals[2] = {1, 5};
  int32_t counts[2] = {1, 5}, begin[2] = {0, 2};
  uint8_t symbol[2] = {'a', 255};
  Level level[2] = {
    {1, begin, root, start, total, symbol, count, {.5, .6, .7}, 1},
    {2, begin, after, starts, totals, symbol, counts, {.5, .6, .7}, 1}};
  Table table[2] = {{.length = 9, .words = 2, .fold = 1, .discount = {.5, .6, .7}},
                    {.length = 2, .skip = 1, .discount = {.5, .6, .7}}};
  static int64_t keys[2][2];
  for (int t = 0; t < 2; t++) { /* what came before the 100th place, and one more */
    keys[t][0] = hashed(text, PAD + 100, &table[t]) << 8 | 'a', keys[t][1] = INT64_MAX;
    table[t].pairs = 2, table[t].key = keys[t], table[t].count = counts;
  }
  static float in[HIDDEN * 4 * GIVEN], out_of[GIVEN * HIDDEN], bias[HIDDEN + GIVEN];
  static float others[LENGTH * V];
  for (int i = 0; i < HIDDEN * 4 * GIVEN; i++) in[i] = (float)(i % 5) / 5 - .4f;
  for (int i = 0; i < LENGTH * V; i++) others[i] = 1.0f / V;
  Mixture m = {2, 2, 2, OTHERS, HIDDEN, 500, 32, level, table, match, .5, in, bias, out_of, bias};
  static float one[LENGTH * V], four[LENGTH * V], p[LENGTH * GIVEN], feature[LENGTH * 4 * GIVEN];
  mixture(&m, text, PAD, PAD, PAD + LENGTH, others, 1, 1, one, NULL);
  mixture(&m, text, PAD, PAD, PAD + LENGTH, others, 4, 1, four, NULL);
  mixture(&m, text, PAD, PAD, PAD + LENGTH, others, 4, 0, p, feature);
  mixture(&m, text, PAD, PAD, PAD + 2, others, 7, 1, four, NULL);
  if (memcmp(one, four, sizeof one)) abort();
  Found *found = malloc(found_bytes(&m)); /* a byte at a time, in two halves */
  for (int i = 0; i < LENGTH; i++) {
    look_up(&m, text, PAD, PAD + i, found);
    if (mix(&m, others + i * OTHERS * V, found, four)) abort();
    if (memcmp(one + i * V, four, V * sizeof *four)) abort();
  }
  free(found);
  puts("clean");
}
"""


DRIVERS = {"conv": (CONV, "ops/conv"), "ngram": (NGRAM, "task"),
           "experts": (EXPERTS, "task/experts"), "stream": (STREAM, "ops/stream")}


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("checks", ["address,undefined", "thread"])
@pytest.mark.parametrize("name", DRIVERS)
def test_sanitizers(name, checks, tmp_path):
    driver, folder = DRIVERS[name]
    run_sanitized(tmp_path, driver, PACKAGE / folder, checks)


@needs_compiler
@pytest.mark.parametrize("driver", [*DRIVERS, "model"])
def test_drivers_are_in_step_with_their_sources(driver):
    """What the long suite runs under the checkers still compiles."""
    source, folder = {**DRIVERS, "model": (MODEL, "ops/stream")}[driver]
    compiles(source, PACKAGE / folder)


def test_no_source_is_left_out():
    scan = Path(__file__).parents[1] / "ops/test_native_build.py"
    drivers = [*(driver for driver, _ in DRIVERS.values()), scan.read_text()]
    for source in PACKAGE.rglob("*.c"):
        assert any(f'#include "{source.name}"' in driver for driver in drivers), source
