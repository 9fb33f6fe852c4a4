"""A C driver built with a compiler's sanitizers and run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from mambabyte.ops.build import c as native_build


def compiles(driver: str, include: Path) -> None:
    """Fails where the driver has gone out of step with the source of ``include`` that it includes:
    names and types alone are looked at, in a fraction of a second."""
    done = subprocess.run(
        ["cc", "-fsyntax-only", *native_build.FLAGS, "-march=native", f"-I{include}",
         f"-I{native_build.HEADERS}", "-x", "c", "-"], input=driver, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]


def run_sanitized(folder: Path, driver: str, include: Path, checks: str, *flags: str) -> None:
    """Fails unless the driver, which includes a source of ``include``, compiles, prints "clean" and
    nothing is found; skips where the compiler has no such sanitizer. Leaks are the driver's own."""
    kept = [f for f in native_build.FLAGS if f not in ("-shared", "-fPIC", "-O3")]

    def build(name: str, source: str) -> subprocess.CompletedProcess[str]:
        path = folder / f"{name}.c"
        path.write_text(source)
        return subprocess.run(
            ["cc", "-O1", "-g", *kept, "-march=native", f"-fsanitize={checks}",
             "-fno-sanitize-recover=all", *flags, f"-I{include}",
             f"-I{native_build.HEADERS}", str(path), "-o", str(folder / name), "-lm"],
            capture_output=True, text=True)  # fmt: skip

    probe = build("probe", "int main(void) { return 0; }")
    if probe.returncode:
        pytest.skip(f"no sanitizer here: {probe.stderr[-200:]}")
    built = build("driver", driver)
    assert not built.returncode, built.stderr[-2000:]
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([str(folder / "driver")], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr[-2000:]
