"""The scan forms of analysis.theory.forms, each called the same way."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mambabyte.ops import selective_scan
from mambabyte.ops.scan.dispatch import SCANS
from mambabyte.ops.scan.operator import fused_available

# (u, delta, A, B, C, state, chunk) -> (y, final state), delta positive, in one floating dtype
Scan = Callable[..., tuple[Tensor, Tensor]]


def scan_of(form: str) -> Scan:
    """The scan of that name, in the dtype of its inputs; "fused" through selective_scan."""
    return SCANS.get(form, _fused)


def _fused(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    return selective_scan(u, delta, A, B, C, initial_state=state, form="fused")


def runnable(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names without "fused" where its kernels do not run."""
    if fused_available("cpu")[0]:
        return names
    return tuple(name for name in names if name != "fused")
