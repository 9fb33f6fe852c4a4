"""The definition of SSD: one step after another, in any floating dtype.

Every other form is measured against this one, in float64. It is the recurrence of Mamba-2
(Dao & Gu 2024, arXiv:2405.21060, section 2): Mamba-1's, with one decay for the whole state of a
head, so that the state of a head is a sum of decayed outer products.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_step(
    x: Tensor, step: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step: ``h = exp(log_decay) h + step x B^T`` and ``y = h C``, for each head.

    Shapes: x (B, H, P); step, log_decay (B, H); B, C (B, G, N), each group serving H / G heads one
    after another; state (B, H, P, N). Returns y (B, H, P) and the new state; the given state is
    not changed.
    """
    repeats = x.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(repeats, 1), C.repeat_interleave(repeats, 1)  # (B, H, N)
    decay = torch.exp(log_decay)[:, :, None, None]
    state = decay * state + (step[:, :, None] * x)[:, :, :, None] * B[:, :, None, :]
    return (state * C[:, :, None, :]).sum(-1), state


def recurrent_ssd(
    x: Tensor, step: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """SSD as L steps, on prepared inputs: x (B, L, H, P); step and log_decay, step times A,
    (B, L, H); B, C (B, L, G, N); state (B, H, P, N). ``chunk`` is not used."""
    ys = []
    # unbind, not indexing: the gradient of each index would be a tensor of the full length.
    for x_t, step_t, decay_t, B_t, C_t in zip(
        x.unbind(1), step.unbind(1), log_decay.unbind(1), B.unbind(1), C.unbind(1), strict=True
    ):
        y_t, state = ssd_step(x_t, step_t, decay_t, B_t, C_t, state)
        ys.append(y_t)
    return torch.stack(ys, dim=1), state
