"""The definition of the selective scan: one step after another, in any floating dtype.

Every other form is measured against this one, in float64. It is written as the recurrence is
printed in the Mamba paper (arXiv:2312.00752, equation 2a with the discretisation of section
3.3: A by zero-order hold, B by Euler's rule, as the paper's code has it), and the tests hold it
against numbers worked by hand.
"""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan_step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step: ``h = exp(delta A) h + delta B u`` and ``y = C . h``.

    Shapes: u, delta (B, D); A (D, N); B, C (B, N); state (B, D, N). Returns y (B, D) and the new
    state; the given state is not changed.
    """
    decay = torch.exp(delta[:, :, None] * A)  # (B, D, N)
    state = decay * state + (delta * u)[:, :, None] * B[:, None, :]
    return (state * C[:, None, :]).sum(-1), state


def sequential_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """The scan as L steps. Shapes as in mambabyte.ops.selective_scan; ``chunk`` is not used."""
    ys = []
    # unbind, not indexing in the loop: the gradient of each index would be a tensor of the full
    # length, filled with zeros but for one step, and the backward quadratic in L.
    for u_t, delta_t, B_t, C_t in zip(
        u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1), strict=True
    ):
        y_t, state = selective_scan_step(u_t, delta_t, A, B_t, C_t, state)
        ys.append(y_t)
    return torch.stack(ys, dim=1), state
