"""The scan forms that studies compare, each called the same way."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops import FORMS, selective_scan
from mambabyte.ops.scan.dispatch import SCANS
from mambabyte.ops.scan.operator import fused_available

# (u, delta, A, B, C, state, chunk) -> (y, final state), delta positive, in one floating dtype
Scan = Callable[..., tuple[Tensor, Tensor]]

# All but the form that takes the whole sequence as one chunk, whatever chunk is asked for, and the
# one that differs from document_chunked in what it keeps alone.
ANY_CHUNK = tuple(name for name in FORMS if name not in ("document_cumsum", "document_as_coded"))
# Forms that compute h_t = a_t (h_{t-1} + b_t), see mambabyte.ops.scan.cumsum.
PUBLISHED = ("document_chunked", "document_as_coded", "document_cumsum")
# The order of the inputs whose gradients are compared.
INPUTS = ("u", "delta", "A", "B", "C", "initial state")


def scan_of(form: str) -> Scan:
    """The scan of that name, in the dtype of its inputs; "fused" through selective_scan."""
    return SCANS.get(form, _fused)


def _fused(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    return selective_scan(u, delta, A, B, C, initial_state=state, form="fused")


def check_forms(names: tuple[str, ...]) -> None:
    """UserError for a name that is no form, and for no name at all."""
    if not names:
        raise UserError(f"no form is given: choose from {', '.join(FORMS)}")
    for name in names:
        if name not in FORMS:
            raise UserError(f"form {name!r} is unknown: choose from {', '.join(FORMS)}")


def runnable(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names without "fused" where its kernels do not run."""
    if fused_available("cpu")[0]:
        return names
    return tuple(name for name in names if name != "fused")
