"""SSD, the scan of Mamba-2: one signature, several forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.arguments import (
    FLOATS,
    ages_of,
    check_chunk_size,
    check_flag,
    check_tensors,
    chosen_form,
    wide_dtype,
    without_autocast,
)
from mambabyte.ops.ssd.chunked import CHUNK, chunked_ssd
from mambabyte.ops.ssd.gates import gates
from mambabyte.ops.ssd.operator import fused_ssd
from mambabyte.ops.ssd.recurrent import recurrent_ssd

FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "recurrent": recurrent_ssd, "chunked": chunked_ssd}


def check_heads(x: Tensor, B: Tensor) -> None:
    """Raise UserError unless x is (batch, length, heads, channels) and B (batch, length, groups,
    states) with groups that divide the heads."""
    if x.ndim != 4 or x.shape[1] < 1:
        raise UserError(f"x has shape {tuple(x.shape)}: expected (batch, length >= 1, heads, "
                        "channels)")
    batch, length, heads, _ = x.shape
    if B.ndim != 4 or B.shape[2] < 1 or heads % B.shape[2]:
        raise UserError(f"B has shape {tuple(B.shape)}: expected ({batch}, {length}, groups, "
                        f"states) with groups a divisor of {heads} heads")


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    document_starts: Tensor | Sequence[int] | None = None,
    ages: Tensor | None = None,
    form: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan of Mamba-2 (arXiv:2405.21060), a scalar decay a head, with state in and state out.

    With ``dt = softplus(dt + dt_bias)`` (each part optional), for each head::

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T
        y_t = h_t C_t + D x_t

    Shapes: x (B, L, H, P), H heads of P channels; dt (B, L, H); A, D, dt_bias (H,), A not above
    0; B, C (B, L, G, N), G a divisor of H, each group serving H / G heads one after another;
    initial_state (B, H, P, N), zero when None. Returns y (B, L, H, P) in x's dtype and the state
    after the last step (B, H, P, N) in float32 (float64 when any input is float64). Gradients
    flow to every input and through both results.

    ``document_starts`` says where documents begin that lie one behind another in a row: each goes
    on from a state of zeros and nothing crosses, neither value nor gradient; see ``document_ages``
    of mambabyte.ops.arguments, and for ``ages``, which say the same. The state that comes back is
    that of the last.

    ``form`` is "recurrent", the definition; "chunked", of ``chunk_size`` steps rounded down to a
    power of two; "fused", one operator that keeps its inputs alone for the backward pass, with a
    kernel on a GPU (see mambabyte.ops.ssd.operator); or "auto": fused, a single step recurrent.

    Raises UserError for shapes that do not agree, an unknown form, or a chunk size below 1.
    """
    check_tensors("x", x, None, FLOATS)
    check_tensors("B", B, None, FLOATS)
    check_heads(x, B)
    batch, length, heads, channels = x.shape
    check_tensors("x", x, None, FLOATS, (
        ("dt", dt, (batch, length, heads), None), ("A", A, (heads,), None),
        ("D?", D, (heads,), None), ("dt_bias?", dt_bias, (heads,), None),
        ("B", B, (batch, length, *B.shape[2:]), None), ("C", C, tuple(B.shape), None),
        ("initial_state?", initial_state, (batch, heads, channels, B.shape[3]), None)))
    check_chunk_size(chunk_size)
    check_flag("dt_softplus", dt_softplus)
    form = chosen_form("SSD", form, ("fused", *FORMS), length)

    # Autocast would take the products to bf16; the state accumulates in float32 or better.
    with without_autocast(x.device):
        wide = wide_dtype(x, dt, A, B, C, initial_state)
        bias = None if dt_bias is None else dt_bias.to(wide)
        ages = ages_of(document_starts, ages, x)
        step, log_decay = gates(dt, A.to(wide), bias, dt_softplus, ages)
        skip = None if D is None else D.to(wide)
        state = None if initial_state is None else initial_state.to(wide)
    if form == "fused":
        dtype = wide
        if wide == torch.float32:
            dtype = torch.promote_types(torch.promote_types(x.dtype, B.dtype), C.dtype)
        y, state = fused_ssd(
            x.to(dtype), step, log_decay, B.to(dtype), C.to(dtype), skip, state)
        return y.to(x.dtype), state
    with without_autocast(x.device):
        u = x.to(wide)
        if state is None:
            state = u.new_zeros(batch, heads, channels, B.shape[3])
        y, state = FORMS[form](
            u, step, log_decay, B.to(wide), C.to(wide), state, chunk_size or CHUNK)
        if skip is not None:
            y = y + skip[:, None] * u
        return y.to(x.dtype), state
