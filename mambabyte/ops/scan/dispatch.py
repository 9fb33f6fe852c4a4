"""The selective scan: one signature, several forms.

A form is a function ``(u, delta, A, B, C, state, chunk) -> (y, final_state)`` on prepared
inputs: delta positive, one floating dtype, the skip and the gate left to the caller.
``mambabyte.config.scan_forms`` says what may be expected of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambabyte.config.scan_forms import FORMS, OLD_NAMES
from mambabyte.errors import UserError
from mambabyte.ops.arguments import ages_of, autocasts, check_chunk_size, check_flag
from mambabyte.ops.scan import operator
from mambabyte.ops.scan.chunked import chunked_scan
from mambabyte.ops.scan.cumsum import (
    corrected_chunked_cumsum_scan,
    document_as_coded_scan,
    document_chunked_scan,
    document_cumsum_scan,
)
from mambabyte.ops.scan.recurrent import Scan, by_documents, complete_scan, recurrent_scan
from mambabyte.ops.scan.repairs import (
    associative_scan,
    centred_cumsum_scan,
    clamped_cumsum_scan,
    epsilon_cumsum_scan,
    late_mask_scan,
    pairwise_scan,
    segment_sum_scan,
)

# The forms in torch; "fused" is the operator, which takes the unprepared inputs.
SCANS: dict[str, Scan] = {
    "recurrent": recurrent_scan,
    "chunked": chunked_scan,
} | {name: by_documents(scan) for name, scan in {
    "corrected_cumsum": corrected_chunked_cumsum_scan,
    "document_chunked": document_chunked_scan,
    "document_as_coded": document_as_coded_scan,
    "document_cumsum": document_cumsum_scan,
    "clamped": clamped_cumsum_scan,
    "epsilon": epsilon_cumsum_scan,
    "centred": centred_cumsum_scan,
    "pairwise": pairwise_scan,
    "late_mask": late_mask_scan,
    "segment_sum": segment_sum_scan,
    "associative": associative_scan,
}.items()}


def default_form(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The form that "auto" means there: fused where its kernels run, else the stable chunks."""
    return operator.default_form(torch.device(device), dtype)


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, *, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    initial_state: Tensor | None = None, document_starts: Tensor | Sequence[int] | None = None,
    ages: Tensor | None = None, form: str = "auto", chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Selective scan of Mamba (arXiv:2312.00752, section 3), with state in and state out.

    With ``dt = softplus(delta + delta_bias)`` (each part optional)::

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t
        y_t = (C_t . h_t + D u_t) * silu(z_t)

    Shapes: u, delta, z (B, L, D); A (D, N); B, C (B, L, N); D, delta_bias (D,);
    initial_state (B, D, N), zero when None. Returns y (B, L, D) in u's dtype and the state after
    the last step (B, D, N) in float32 (float64 when any input is float64). Gradients flow to
    every input and through both results.

    ``document_starts`` says where documents begin that lie one behind another in a row: each goes
    on from a state of zeros and nothing crosses, neither value nor gradient; see ``document_ages``
    of mambabyte.ops.arguments for what it may be, and for ``ages``, which say the same. The state
    that comes back is that of the last.

    Where A or a step size is infinite, the fused form's gradients of the other may be finite where
    the recurrence's are nan: of a decay that is exactly 0 it takes the limit.

    Raises UserError for shapes that do not agree, an unknown form, or a chunk size below 1.
    """
    operator.check_shapes(u, delta, A, B, C, D, z, delta_bias, initial_state)
    if not isinstance(form, str):
        raise UserError(f"form is of type {type(form).__name__}: expected auto, {', '.join(FORMS)}")
    check_flag("delta_softplus", delta_softplus)
    if form == "auto":
        fits = A.shape[-1] <= operator.MAX_STATES and _in_one_dtype(
            u, (delta, B, C, z), (A, D, delta_bias, initial_state))
        form = default_form(u.device, u.dtype) if fits else "chunked"
    form = OLD_NAMES.get(form, form)
    if form not in FORMS:
        raise UserError(f"scan form {form!r} is unknown: choose auto, {', '.join(FORMS)}")
    check_chunk_size(chunk_size)

    ages = ages_of(document_starts, ages, u)
    if form == "fused":
        return operator.run_fused(
            u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, ages=ages)

    y, final_state = complete_scan(
        SCANS[form], chunk_size or FORMS[form].chunk, u, delta, A, B, C, D, z, delta_bias,
        initial_state, delta_softplus, ages)
    return y, final_state


def _in_one_dtype(
    u: Tensor, streams: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...]
) -> bool:
    """Whether the fused operator takes these dtypes; the chunked form computes in the widest."""
    wide = u.dtype == torch.float64
    return all(t is None or wide or t.dtype != torch.float64 for t in others) and (
        autocasts(u.device)
        or all(t is None or t.dtype == u.dtype for t in streams))
