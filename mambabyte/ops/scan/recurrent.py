"""The definition of the selective scan: one step after another, in any floating dtype.

Every other form is measured against this one, in float64. It is written as the recurrence is
printed in the Mamba paper (arXiv:2312.00752, equation 2a with the discretisation of section
3.3: A by zero-order hold, B by Euler's rule, as the paper's code has it), and the tests hold it
against numbers worked by hand.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.arguments import FLOATS, check_tensors, without_autocast

Scan = Callable[..., tuple[Tensor, Tensor]]


def selective_scan_step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step: ``h = exp(delta A) h + delta B u`` and ``y = C . h``.

    Shapes: u, delta (B, D); A (D, N); B, C (B, N); state (B, D, N). Returns y (B, D) and the new
    state; the given state is not changed. Raises UserError for shapes that do not agree.
    """
    check_tensors("state", state, None, FLOATS)
    if state.ndim != 3:
        raise UserError(f"state has shape {tuple(state.shape)}: expected (batch, channels, states)")
    batch, channels, states = state.shape
    check_tensors("state", state, None, FLOATS, (
        ("u", u, (batch, channels), None), ("delta", delta, (batch, channels), None),
        ("A", A, (channels, states), None), ("B", B, (batch, states), None),
        ("C", C, (batch, states), None)))
    return scan_step(u, delta, A, B, C, state)


def scan_step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`selective_scan_step`, shapes and results as there, of what was checked."""
    decay = torch.exp(delta[:, :, None] * A)  # (B, D, N)
    state = decay * state + (delta * u)[:, :, None] * B[:, None, :]
    return (state * C[:, None, :]).sum(-1), state


def recurrent_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int = 0,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan as L steps. Shapes as in mambabyte.ops.selective_scan; ``chunk`` is not used. A
    document starts, where ``starts`` (B, L) bool is true, from a state of zeros."""
    ys = []
    fresh = [None] * u.shape[1] if starts is None else starts[:, :, None, None].unbind(1)
    # unbind, not indexing in the loop: the gradient of each index would be a tensor of the full
    # length, filled with zeros but for one step, and the backward quadratic in L.
    for u_t, delta_t, B_t, C_t, fresh_t in zip(
        u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1), fresh, strict=True
    ):
        state = state if fresh_t is None else state.masked_fill(fresh_t, 0)
        y_t, state = scan_step(u_t, delta_t, A, B_t, C_t, state)
        ys.append(y_t)
    return torch.stack(ys, dim=1), state


def by_documents(scan: Scan) -> Scan:
    """A form that knows no documents, with the argument ``starts`` of :func:`recurrent_scan`: it is
    called for each document by itself."""
    @functools.wraps(scan)
    def separately(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if starts is None:
            return scan(u, delta, A, B, C, state, chunk)
        ys, states = [], []
        for row, h in enumerate(state.split(1)):
            begins = starts[row].nonzero().flatten().tolist()
            of_row = []
            for begin, end in itertools.pairwise(sorted({0, *begins, u.shape[1]})):
                u_d, delta_d, B_d, C_d = (t[row : row + 1, begin:end] for t in (u, delta, B, C))
                h = torch.zeros_like(h) if begin in begins else h
                y, h = scan(u_d, delta_d, A, B_d, C_d, h, chunk)
                of_row.append(y)
            ys.append(torch.cat(of_row, 1))
            states.append(h)
        return torch.cat(ys), torch.cat(states)

    return separately


def complete_scan(
    scan: Scan, chunk: int, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, initial_state: Tensor | None,
    delta_softplus: bool, ages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``mambabyte.ops.selective_scan`` by one form in torch, with bias, softplus, initial state,
    skip and gate around it. Shapes and results as there; ``ages`` as of ``document_ages``.

    ``scan`` is called with (u, delta, A, B, C, state, chunk): delta positive, all in one dtype,
    float32 or the widest that is given; and with the starts of documents, if there are any.
    """
    # Autocast would take the sum over states to bf16; a scan accumulates in float32 or better.
    with without_autocast(u.device):
        dtype = torch.float32
        for t in (u, delta, A, B, C, D, z, delta_bias, initial_state):
            if t is not None:
                dtype = torch.promote_types(dtype, t.dtype)
        x, dt = u.to(dtype), delta.to(dtype)
        if delta_bias is not None:
            dt = dt + delta_bias.to(dtype)
        if delta_softplus:
            dt = F.softplus(dt)
        if initial_state is None:
            state = x.new_zeros(x.shape[0], x.shape[2], A.shape[1])
        else:
            state = initial_state.to(dtype)
        starts = () if ages is None else (ages == 0,)
        y, final_state = scan(
            x, dt, A.to(dtype), B.to(dtype), C.to(dtype), state, chunk, *starts)
        if D is not None:
            y = y + D.to(dtype) * x
        if z is not None:
            y = y * F.silu(z.to(dtype))
        return y.to(u.dtype), final_state
