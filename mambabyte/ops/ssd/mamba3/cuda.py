"""Mamba-3's scan on NVIDIA GPUs (sm_80 and later): SSD's kernels between those of ``angles.cu``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambabyte.ops.ssd import cuda as ssd
from mambabyte.ops.ssd.cuda import CHUNK, Kind, Turns, aligned_rows, heads_of_a_block, launch
from mambabyte.ops.ssd.recompute import gradients_again

_THREADS = 256  # of a block of angle_back
_ROUND_BYTES = 80  # of a thread: what it adds up over heads
MOST_ROUNDS, BACK_BLOCKS = 4, 256  # its blocks fill the card, with more rounds their sums are fewer
TURN_BLOCKS = 512  # of angle_turn, at least: it reads B and C once for all heads of a block


def rounds_of_a_block(rounds: int) -> int:
    """How many of all rounds a block of angle_back has."""
    return max(n for n in (1, 2, MOST_ROUNDS) if n == 1 or rounds // n >= BACK_BLOCKS)


def forward(
    x: Tensor, dt: Tensor, log_decay: Tensor, theta: Tensor, mix: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, B_bias: Tensor | None, C_bias: Tensor | None, k_state: Tensor | None,
    v_state: Tensor | None, ssm_state: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``mamba3_scan`` on prepared inputs, shapes as there: sequences in bf16 with any strides,
    heads of 64 channels, states as in ``ssd.cuda.STATES``, the rest in float32.

    Returns y, the final ssm_state, and for :func:`backward` the states between chunks; empty unless
    ``save``.
    """
    dt, theta, mix = dt.contiguous(), theta.contiguous(), mix.contiguous()
    turned_B, turned_C, step, own, angles, _ = _turn(B, C, B_bias, C_bias, dt, theta, mix, False)
    entered = _entering(dt[:, 0], mix[:, 0], k_state, v_state, ssm_state)
    return ssd.forward(
        x, step, log_decay, turned_B, turned_C, D, entered[0] if entered else None, save,
        Turns(own, angles))


def backward(
    dy: Tensor, dlast: Tensor | None, x: Tensor, dt: Tensor, log_decay: Tensor, theta: Tensor,
    mix: Tensor, B: Tensor, C: Tensor, D: Tensor | None, B_bias: Tensor | None,
    C_bias: Tensor | None, k_state: Tensor | None, v_state: Tensor | None,
    ssm_state: Tensor | None, carries: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of :func:`forward`'s tensors, in their order; None for one that is None."""
    dt, theta, mix = dt.contiguous(), theta.contiguous(), mix.contiguous()
    turned_B, turned_C, step, own, angles, each = _turn(
        B, C, B_bias, C_bias, dt, theta, mix, True)
    first = (dt[:, 0], mix[:, 0], k_state, v_state, ssm_state)
    entered = _entering(*first)
    dx, dstep, dlog_decay, dB, dC, dD, dinitial, d_own, d_angle = ssd.backward(
        dy, dlast, x, step, log_decay, turned_B, turned_C, D, entered[0] if entered else None,
        carries, Turns(own, angles))

    (batch, length, heads, _), (_, _, groups, n) = x.shape, B.shape
    found_B, found_C = (torch.empty(B.shape, dtype=B.dtype, device=B.device) for _ in range(2))
    rows = batch * length
    per_round = 8 * _THREADS // n  # rows: a thread has eight numbers of one
    rounds = rounds_of_a_block(-(-rows // per_round))
    blocks = -(-rows // (per_round * rounds))
    biases = None
    if B_bias is not None or C_bias is not None:
        biases = dt.new_empty(blocks, 2, heads, n)
    ddt, dtheta, dmix = torch.empty_like(dt), torch.empty_like(theta), torch.empty_like(dt)
    kind = Kind(n, True)
    launch(x, kind.of("angle_back"), kind, blocks, dB, dC, d_angle, each, dt, theta, mix, dstep,
           d_own, found_B, found_C, biases, ddt, dtheta, dmix, rows, length, heads,
           heads // groups, theta.shape[2], rounds, shared=rounds * _THREADS * _ROUND_BYTES)
    of_B, of_C = (None, None) if biases is None else biases.sum(0).unbind()
    of_states: Sequence[Tensor | None] = (None, None, None)
    if entered:
        of_dt, of_mix, *of_states = gradients_again(_entering, (dinitial,), first)
        for total, part in ((ddt, of_dt), (dmix, of_mix)):
            assert part is not None  # of what is given
            total[:, 0] += part
    return (dx, ddt, dlog_decay, dtheta, dmix, found_B, found_C, dD,
            None if B_bias is None else of_B, None if C_bias is None else of_C, *of_states)


def _turn(
    B: Tensor, C: Tensor, B_bias: Tensor | None, C_bias: Tensor | None, dt: Tensor, theta: Tensor,
    mix: Tensor, each: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """B and C turned, of each head (B, L, H, N); SSD's steps and ``own`` (B, L, H); the angles of
    whole chunks (B, K, H, S) and, if wanted, those up to each step (B, L, H, S)."""
    (batch, length, heads), (_, _, groups, n), pairs = dt.shape, B.shape, theta.shape[2]
    B, C = aligned_rows(B), aligned_rows(C)
    B_bias, C_bias = (None if t is None else t.contiguous() for t in (B_bias, C_bias))
    turned_B, turned_C = (B.new_empty(batch, length, heads, n) for _ in range(2))
    step, own = torch.empty_like(dt), torch.empty_like(dt)
    chunks, kind = -(-length // CHUNK), Kind(n, True)
    angles = dt.new_empty(batch, chunks, heads, pairs, dtype=torch.int32)
    each_angle = angles.new_empty(batch, length, heads, pairs) if each else None
    blocks, per_group = batch * chunks * heads, heads // groups
    together = heads_of_a_block(per_group, blocks, TURN_BLOCKS)
    launch(B, kind.of("angle_turn"), kind, blocks // together, B, C, B_bias, C_bias, dt, theta,
           mix, turned_B, turned_C, step, own, angles, each_angle, *B.stride()[:3],
           *C.stride()[:3], length, heads, per_group, pairs, together)
    return turned_B, turned_C, step, own, angles, each_angle


def _entering(
    dt: Tensor, mix: Tensor, k_state: Tensor | None, v_state: Tensor | None,
    ssm_state: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The state before the first step, of ``dt`` and ``mix`` (B, H), with what this one writes of
    the step before; nothing where there is none."""
    if k_state is None or v_state is None:
        return () if ssm_state is None else (ssm_state,)
    share = ((1 - mix) * dt)[..., None, None]
    written = share * v_state[..., :, None] * k_state[..., None, :]
    return (written if ssm_state is None else ssm_state + written,)
