"""The definitions of SSD and of Mamba-3's scan: one step after another, in any floating dtype.

Every other form is measured against this one, in float64. It is the recurrence of Mamba-2
(Dao & Gu 2024, arXiv:2405.21060, section 2): Mamba-1's, with one decay for the whole state of a
head, so that the state of a head is a sum of decayed outer products. Mamba-3's (Lahoti et al. 2026,
arXiv:2603.15569, section 3) has complex states, which turn as they decay, and each step writes at
both of its ends.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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


class Mamba3State(NamedTuple):
    """What Mamba-3's scan goes on with: the last step's part of the next one, and the state."""

    k_state: Tensor  # (B, H, N) B of the last step, bias included
    v_state: Tensor  # (B, H, P) x of the last step
    ssm_state: Tensor  # (B, H, P, N)


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """x (..., N), of which the first S pairs of neighbours are complex numbers, times
    exp(i angle), angle (..., S) in radians."""
    pairs, rest = x[..., : 2 * angle.shape[-1]], x[..., 2 * angle.shape[-1] :]
    real, imaginary = pairs.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = torch.cos(angle), torch.sin(angle)
    pairs = torch.stack([cos * real - sin * imaginary, sin * real + cos * imaginary], -1)
    return torch.cat([pairs.flatten(-2), rest], -1)


def angles(theta: Tensor, dt: Tensor) -> Tensor:
    """theta (..., S) times dt (..., H): (..., H, S), in float64, in which whole turns cost no
    digits."""
    return theta.double().unsqueeze(-2) * dt.double().unsqueeze(-1)


def less_than_a_turn(angle: Tensor, dtype: torch.dtype) -> Tensor:
    """The angle from 0 to 2 pi with the same sine and cosine."""
    return angle.remainder(2 * math.pi).to(dtype)


def mamba3_step(
    x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, angle: Tensor, mix: Tensor,
    state: Mamba3State,
) -> tuple[Tensor, Mamba3State]:
    """One step: ``h = a (h + (1 - mix) dt x' B'^T) + mix dt x B^T`` and ``y = h C``, for each head.

    Shapes: x (B, H, P); dt, log_decay, mix (B, H); B, C (B, H, N); angle (B, H, S). ``a`` is
    exp(log_decay) times a turn of the first S pairs of states by -angle; x' and B' are those of the
    step before. Returns y (B, H, P) and the new state; the given state is not changed.
    """
    written = x[:, :, :, None] * B[:, :, None, :]
    before = state.v_state[:, :, :, None] * state.k_state[:, :, None, :]
    h = state.ssm_state + ((1 - mix) * dt)[:, :, None, None] * before
    h = turned(torch.exp(log_decay)[:, :, None, None] * h, -angle[:, :, None, :])
    h = h + (mix * dt)[:, :, None, None] * written
    return (h * C[:, :, None, :]).sum(-1), Mamba3State(B, x, h)


def recurrent_mamba3(
    x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, theta: Tensor, mix: Tensor,
    state: Mamba3State, chunk: int = 0,
) -> tuple[Tensor, Mamba3State]:
    """Mamba-3's scan as L steps: x (B, L, H, P); dt, log_decay, mix (B, L, H); B, C (B, L, H, N);
    theta (B, L, S), radians a unit of time, for all heads. ``chunk`` is not used."""
    ys = []
    for x_t, dt_t, decay_t, B_t, C_t, theta_t, mix_t in zip(
        *(t.unbind(1) for t in (x, dt, log_decay, B, C, theta, mix)), strict=True
    ):
        angle = less_than_a_turn(angles(theta_t, dt_t), dt_t.dtype)
        y_t, state = mamba3_step(x_t, dt_t, decay_t, B_t, C_t, angle, mix_t, state)
        ys.append(y_t)
    return torch.stack(ys, dim=1), state
