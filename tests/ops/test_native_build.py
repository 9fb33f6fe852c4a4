"""C compiled on first use: who compiles, where it is kept, and what a sanitizer says of it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mambabyte.ops.build import c
from mambabyte.ops.scan import cpu as native
from tests.helpers.sanitized import run_sanitized

ROOT = Path(__file__).resolve().parents[2]
needs_native = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])

PROBE = """
from mambabyte.ops.scan import cpu as native
import torch
ok, reason = native.available()
if ok:
    x, B = torch.ones(1, 3, 2), torch.ones(1, 3, 1)
    y = native.forward(x, x, -x[0, :2].T[:, :1], B, B, None, None, None, None, True, False)[0]
    ok = bool(y.isfinite().all())
print(ok, reason)
"""


def probe(**environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", PROBE], env=env, stdout=pipe, text=True)


def test_compiler_present_means_available() -> None:
    if shutil.which("cc") and sys.platform == "linux":
        assert native.available() == (True, "")


@needs_native
@pytest.mark.long
def test_several_processes_compile_at_once(tmp_path: Path) -> None:
    started = [probe(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    assert [p.communicate()[0].split()[0] for p in started] == ["True"] * 2
    files = [p.name for p in (tmp_path / "mambabyte").iterdir()]
    assert [name[-3:] for name in files] == [".so"]  # one, and no temporary file is left


def test_missing_or_broken_compiler_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'error: no luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(broken))
    failing = c.load(native.SOURCE)
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    for reason, words in ((c.load(native.SOURCE), "no C compiler"), (failing, "error: no luck")):
        assert isinstance(reason, str)
        assert words in reason
        assert "\n" not in reason


@needs_native
def test_unwritable_cache_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")  # a file where the directory should go
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert isinstance(c.load(native.SOURCE), ctypes.CDLL)
    assert list(tmp_path.glob("mambabyte-*/*.so"))


SANITIZED = """
#include "scan.c"
#include <stdio.h>
static real *data(int64_t n, real lo) {
  real *p = malloc((n ? n : 1) * sizeof *p);
  for (int64_t i = 0; i < n; i++) p[i] = lo + (real)((i * 7919) % 101) / 101;
  return p;
}
static tensor rows(int64_t b, int64_t l, int64_t d) {
  return (tensor){(char *)data(b * l * d, -0.5), TYPE_REAL, l * d, d};
}
static void once(int64_t b, int64_t l, int64_t d, int64_t n) {
  int64_t padded = (d + PAD - 1) / PAD * PAD, tiles = (l + TILE - 1) / TILE;
  int64_t groups = (d + GROUP - 1) / GROUP;
  scan_args a = {.batch = b, .length = l, .channels = d, .states = n, .softplus = 1, .threads = 4,
    .u = rows(b, l, d), .delta = rows(b, l, d), .z = rows(b, l, d), .y = rows(b, l, d),
    .B = rows(b, l, n), .C = rows(b, l, n), .dy = rows(b, l, d), .du = rows(b, l, d),
    .ddelta = rows(b, l, d), .dz = rows(b, l, d), .dB = rows(b, l, n), .dC = rows(b, l, n),
    .A = data(d * n, -2), .D = data(d, 0), .bias = data(d, 0), .h0 = data(b * d * n, 0),
    .h_last = data(b * d * n, 0), .saved = take(b * tiles * n * padded * sizeof(real)),
    .dA = data(d * n, 0), .dD = data(d, 0), .dbias = data(d, 0), .dh0 = data(b * d * n, 0),
    .dh_last = data(b * d * n, 0), .part_bc = data(groups * b * l * 2 * n, 0),
    .part_a = data(b * (n + 2) * padded, 0)};
  if (scan_forward(&a) || scan_backward(&a)) abort();
  conv_args c = {.batch = b, .channels = d, .taps = 4, .x = a.u.ptr, .y = a.y.ptr,
    .tail = (char *)data(b * 3 * d, 0), .tail_out = (char *)data(b * 3 * d, 0),
    .weight = data(d * 4, 0), .bias = a.bias};
  if (conv_step(&c)) abort();
}
int main(void) {
  once(1, 1, 1, 1); once(2, 17, 33, 3); once(3, 40, 300, 16); once(2, 5, 129, 9);
  puts("clean");
}
"""


@needs_native
@pytest.mark.parametrize(
    "checks", [pytest.param("address,undefined", marks=pytest.mark.long), "thread"])
def test_sanitizers(tmp_path: Path, checks: str) -> None:
    """Odd shapes under gcc's or clang's checkers."""
    run_sanitized(tmp_path, SANITIZED, native.SOURCE.parent, checks, "-DSMALL_WORK=1")
