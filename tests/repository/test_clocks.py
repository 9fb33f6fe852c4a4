"""No test depends on how fast the machine is: none reads a clock, none waits for a time to pass."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
CLOCKS = {"perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "time", "process_time"}
# Where a test may let time pass: to poll, up to a generous limit, for what another process does.
SLEEPS = {"runs/sweep/test_sweep.py", "tools/test_pool.py"}


def uses_of_time(source: str) -> set[str]:
    """Functions of the module ``time`` that the source calls or imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (
                node.value.id == "time"):
            found.add(node.attr)
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            found |= {alias.name for alias in node.names}
    return found


FILES = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py"))


def test_no_test_reads_a_clock():
    used = {name: uses_of_time((TESTS / name).read_text(encoding="utf-8")) for name in FILES}
    clocks = {name for name, found in used.items() if found & CLOCKS}
    assert not clocks, "use tests.helpers.clock, or count calls"
    sleeps = {name for name, found in used.items() if "sleep" in found} - SLEEPS
    assert not sleeps, "use tests.helpers.clock, or wait for an event"


def test_a_use_is_seen():
    assert uses_of_time("import time\ntime.sleep(1)\nfrom time import monotonic") == {
        "sleep", "monotonic"}


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_deprecations_are_errors_in_what_we_call_and_not_inside_torch(category):
    """As pytest's configuration has it, which a GPU test depends on: torch imports parts of itself
    at first use, and an error there would leave them half imported for the tests that follow."""
    for module in ("torch", "torch._inductor.compile_fx"):
        warnings.warn_explicit("old", category, "file.py", 1, module=module)
    for module in ("mambabyte.ops", "torchlike", "tests.x"):
        with pytest.raises(category, match="old"):
            warnings.warn_explicit("old", category, "file.py", 1, module=module)
