"""The C engine of models under a compiler's sanitizers: all layers, odd shapes."""

from __future__ import annotations

import pytest

from mambabyte.stream.engines import cpu as native_model
from tests.helpers.sanitized import run_sanitized

SANITIZED = """
#include "model.c"
#include <stdio.h>
static real *data(int64_t n, real lo) {
  real *p = malloc((n ? n : 1) * sizeof *p);
  for (int64_t i = 0; i < n; i++) p[i] = lo + (real)((i * 7919) % 101) / 101;
  return p;
}
static void once(int64_t w, int64_t D, int64_t N, int64_t K, int64_t R, int64_t hidden,
                 int64_t heads, int64_t kv, int64_t window, int64_t length, int64_t activation) {
  const int64_t d = w / heads, V = 261, H = heads, G = kv, Vd = d + 1, most = 8 * length;
  const int64_t E = N + N % 2, S = (E + 2) / 4;
  model m = {.layers = 6, .width = w, .vocabulary = V, .norm_kind = NORM_LAYER, .hidden = hidden,
    .activation = activation, .slots = 1, .mixed = 1, .channels = D, .states = N, .taps = K,
    .rank = R, .heads = heads, .kv_heads = kv, .head_width = d, .normed_heads = 1, .turning = 1,
    .ssd_heads = D / (D / H), .ssd_groups = G, .ssd_states = E, .ssd_pairs = S,
    .delta_heads = H,
    .delta_values = Vd, .embedding_norm = 1, .norm_eps = 1e-5, .tiny_eps = 1e-7, .ssd_eps = 1e-6,
    .cap = 3, .rotary_base = 100, .embedding = data(V * w, -.5), .norm = data(w, 0),
    .norm_bias = data(w, 0),
    .head_bias = data(V, 0), .embedding_gain = data(w, 0)};
  m.head = m.embedding;
  const int64_t conv = D + 2 * G * E, values = H * Vd, keys = w;
  layer l = {.added = -1, .kept_as = -1, .window = window, .norm = data(w, 0),
    .norm_bias = data(w, 0), .skip_gain = data(w, 0), .stream_gain = data(w, 0),
    .embedded_gain = data(w, 0), .mixer_gain = data(w, 0), .mlp_gain = data(w, 0),
    .mlp_norm = data(w, 0), .mlp_norm_bias = data(w, 0), .mlp_up = data(hidden * w, -.5),
    .mlp_up_bias = data(hidden, 0), .mlp_out = data(hidden * w, -.5), .mlp_out_bias = data(w, 0)};
  layer layers[6] = {l, l, l, l, l, l};
  const int64_t sizes[6][OWN] = {
    {2 * D * w, D * K, D, (R + 2 * N) * D, D * (R ? R : D), D, D * N, D, D * w, 2 * D, w},
    {w * w, kv * d * w, kv * d * w, w * w, w, kv * d, kv * d, w, H},
    {(D + conv + H) * w, conv * K, conv, H, H, H, D, D * w, D + conv + H, w},
    {keys * w, keys * w, values * w, keys * K, keys * K, values * K, H * w, H, H, Vd, values * w,
     H * w, 0, values * w},
    {keys * w, keys * w, values * w, keys * K, keys * K, values * K, H * w, H, keys, Vd,
     values * w, Vd * w, keys * Vd, Vd * w, values * Vd, values},
    {(2 * D + 2 * G * E + 3 * H + S) * w, H, H * E, H * E, E, E, H, D * w}};
  for (int i = 0; i < 6; i++) {
    layers[i].kind = i < 4 ? i : i == 4 ? DELTA : MAMBA3;
    for (int j = 0; j < OWN; j++)
      layers[i].own[j] = sizes[i][j] ? data(sizes[i][j], j == A_LOG ? 0 : -.5) : NULL;
  }
  layers[0].kept_as = layers[4].added = 0;
  real *kept = malloc(6 * kept_size(&m) * sizeof *kept);
  keep(&m, layers, kept);
  unsigned char *bytes = malloc(length);
  memset(bytes, 255, length);
  call c = {length, 0, data(length * V, 0), kept};
  memory s[6] = {{{0}, {0}, 0, {0}, {0}}};
  const int64_t states[6][4] = {{(K - 1) * D, D * N}, {kv * most * d, kv * most * d},
    {(K - 1) * conv, D * E}, {(K - 1) * keys, (K - 1) * keys, (K - 1) * values, keys * Vd},
    {(K - 1) * keys, (K - 1) * keys, (K - 1) * values, keys * Vd}, {H * E, D, D * E}};
  s[1].in_stride[0] = s[1].in_stride[1] = s[1].out_stride[0] = s[1].out_stride[1] = most * d;
  for (int round = 0; round < 4; round++) {
    for (int i = 0; i < 6; i++)
      for (int j = 0; j < 4; j++) {
        const int here = i == 1 && round > 1 && round != 3; /* rows are added where they are */
        const int64_t last = i != 1 && c.each ? (length - 1) * states[i][j] : 0;
        s[i].in[j] = here ? NULL : round ? s[i].out[j] + last : NULL;
        if (states[i][j] && !here) s[i].out[j] = data((i == 1 ? 1 : length) * states[i][j], 0);
      }
    c.each = round & 1;
    if (round == 3) {
      m.prior = data(w * V, -.5), m.best = m.kind = data(2 * w, 0);
      m.gate = data(w, 0), m.gate_bias = data(1, 0);
      c.hint = data(length * V, -2), c.best = c.kind = calloc(length, 1);
    }
    if (advance(&m, layers, s, &c, bytes)) abort();
    s[1].stored += length;
    c.position += length;
  }
  for (int64_t i = 0; i < V; i++) if (!(c.log_probs[i] <= 0)) abort();
  layers[0].own[A_LOG][0] += 1;
  if (advance(&m, layers, s, &c, bytes) != 2) abort();
}
int main(void) {
  once(6, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0);
  once(36, 72, 5, 3, 3, 61, 6, 2, 4, 5, 1);
  once(64, 130, 16, 4, 0, 0, 2, 2, 100, 16, 2);
  once(48, 36, 17, 2, 7, 19, 4, 1, 3, 2, 2);
  puts("clean");
}
"""


@pytest.mark.long
def test_sanitizers(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Odd shapes under gcc's or clang's checkers."""
    run_sanitized(tmp_path, SANITIZED, native_model.SOURCE.parent, "address,undefined")
