"""Mamba-3's scan: one signature, several forms."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.arguments import (
    FLOATS,
    ages_of,
    check_chunk_size,
    check_tensors,
    chosen_form,
    wide_dtype,
    without_autocast,
)
from mambabyte.ops.ssd.chunked import CHUNK, chunked_ssd
from mambabyte.ops.ssd.decay import without_past
from mambabyte.ops.ssd.dispatch import check_heads
from mambabyte.ops.ssd.mamba3.operator import (
    check_shapes,
    composed,
    fused_mamba3,
    no_state,
    per_head,
)
from mambabyte.ops.ssd.recurrent import Mamba3State, recurrent_mamba3

FORMS = ("recurrent", "chunked", "fused")


def mamba3_scan(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    theta: Tensor,
    mix: Tensor,
    D: Tensor | None = None,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    initial_state: Mamba3State | None = None,
    document_starts: Tensor | Sequence[int] | None = None,
    ages: Tensor | None = None,
    form: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, Mamba3State]:
    """Scan of Mamba-3 (arXiv:2603.15569, section 3), with state in and state out.

    For each head, with ``a_t = exp(log_decay_t) exp(-i dt_t theta_t)`` on pairs of neighbouring
    states as complex numbers, the biases added to B and C::

        h_t = a_t h_{t-1} + (1 - mix_t) dt_t a_t x_{t-1} B_{t-1}^T + mix_t dt_t x_t B_t^T
        y_t = h_t C_t + D x_t

    Shapes: x (B, L, H, P), H heads of P channels; dt, log_decay (not above 0) and mix (in [0, 1])
    (B, L, H); B, C (B, L, G, N), G a divisor of H, each group serving H / G heads one after
    another; theta (B, L, S), radians a unit of time of the first S pairs of states, the others do
    not turn; D (H,); B_bias and C_bias (H, N); initial_state as it comes back, zeros when None.
    Returns y (B, L, H, P) in x's dtype and the state after the last step, (B, H, N), (B, H, P) and
    (B, H, P, N) in float32 (float64 when any input is float64). Gradients flow to every input and
    through all results.

    ``document_starts`` and ``ages``, ``form`` and ``chunk_size`` are as in
    :func:`mambabyte.ops.ssd_scan`. Angles are cumulated in float64, whole turns left out: they may
    be of any size. Raises UserError for shapes that do not agree, an unknown form, or a chunk size
    below 1.
    """
    _check(x, dt, log_decay, B, C, theta, mix, D, B_bias, C_bias, initial_state, chunk_size)
    form = chosen_form("Mamba-3", form, FORMS, x.shape[1])
    with without_autocast(x.device):
        wide = wide_dtype(x, dt, log_decay, B, C, theta, mix, *(initial_state or ()))
        ages = ages_of(document_starts, ages, x)
        log_decay = without_past(log_decay.to(wide), ages)
        state = None if initial_state is None else Mamba3State(
            *(t.to(wide) for t in initial_state))
        D, B_bias, C_bias = (None if t is None else t.to(wide) for t in (D, B_bias, C_bias))
        gates = (dt.to(wide), log_decay, theta.to(wide), mix.to(wide))
        if form == "recurrent":
            u = x.to(wide)
            k, c = (per_head(t.to(wide), bias, x.shape[2])
                    for t, bias in ((B, B_bias), (C, C_bias)))
            y, state = recurrent_mamba3(
                u, *gates[:2], k, c, *gates[2:], no_state(u, k) if state is None else state)
            return (y if D is None else y + D[:, None] * u).to(x.dtype), state
        given = (x, *gates, B, C, D, B_bias, C_bias, *(state or (None,) * 3))
        y, h = fused_mamba3(*given) if form == "fused" else composed(
            functools.partial(chunked_ssd, chunk=chunk_size or CHUNK), wide, *given)
        k = per_head(B[:, -1:].to(wide), B_bias, x.shape[2]).squeeze(1)
        return y, Mamba3State(k, x[:, -1].to(wide), h)


def _check(
    x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, theta: Tensor, mix: Tensor,
    D: Tensor | None, B_bias: Tensor | None, C_bias: Tensor | None, state: Mamba3State | None,
    chunk_size: int | None,
) -> None:  # fmt: skip
    """Raise UserError for what :func:`mamba3_scan` does not take."""
    check_tensors("x", x, None, FLOATS)
    check_tensors("B", B, None, FLOATS)
    check_tensors("theta", theta, None, FLOATS)
    check_heads(x, B)
    batch, length = x.shape[:2]
    states = B.shape[3]
    if states % 2:
        raise UserError(f"B has shape {tuple(B.shape)}: Mamba-3's states are pairs, expected an "
                        "even number of them")
    if theta.ndim != 3 or 2 * theta.shape[2] > states:
        raise UserError(f"theta has shape {tuple(theta.shape)}: expected ({batch}, {length}, "
                        f"pairs) with at most {states // 2} pairs of the {states} states")
    if state is not None and not (isinstance(state, tuple) and len(state) == 3):
        raise UserError("initial_state is no Mamba3State: expected the state that an earlier call "
                        "gave back, of three tensors")
    check_chunk_size(chunk_size)
    check_shapes(x, dt, log_decay, B, C, theta, mix, D, B_bias, C_bias,
                  state or (None, None, None))
