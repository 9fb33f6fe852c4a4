"""Repairs of the log-cumsum trick that people use: two of them are right, the others fail.

All compute ``h_t = a_t h_{t-1} + b_t`` in chunks of T steps, with ``cs_t`` the log-decay cumulated
from the chunk's start to t (all <= 0) and ``b_k = delta_k B_k u_k``. In exact arithmetic each is::

    h_t = exp(cs_t) h_0 + sum_{k <= t} w_{t,k} b_k        w_{t,k} = exp(cs_t - cs_k) <= 1

They differ in how ``w`` is made, and only that matters:

clamped        exp(cs_t) * exp(min(-cs_k, 80)). Never inf. Where -cs_k > 80 the weight of even the
               newest input, w_{t,t} = 1, becomes exp(cs_t + 80): the input is silently lost, and
               so is its gradient.
epsilon        exp(cs_t) * b_k / (exp(cs_k) + 1e-12). The weight of the newest input is
               1 / (1 + 1e-12 exp(-cs_t)): half of it is gone at -cs = 27.6. Silent.
centred        exp(cs_t - m) * exp(m - cs_k) with m = cs in the middle of the chunk. Exact, and
               good for twice the cumulated decay; then inf as before.
pairwise       exp(cs_t - cs_k) for all pairs, -inf put where k > t *before* the exponential: no
               exponent is positive. T^2 weights. The difference of two large sums cancels: the
               exponent is off by some |cs| times the rounding unit.
late_mask      the same with the mask *after* the exponential. The value is the same; but where
               k > t the exponential may be inf, and its gradient 0 * inf is nan.
segment_sum    the exponent as the sum over k+1..t itself, so nothing cancels (as Mamba-2 does,
               arXiv:2405.21060). T^2 weights.
associative    pairs (a, b) under (a', b') after (a, b) = (a' a, a' b + b'), by doubling: step j
               combines neighbours 2^j apart (Hillis and Steele 1986). Products of decays only: no
               exponent at all.

Shapes of every form are those of mambabyte.ops.selective_scan; ``chunk`` 0 is the whole length.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.config.scan_forms import CLAMP, EPSILON

# (log_decay, b, state) of one chunk -> h, (B, T, D, N) each but the state (B, D, N)
Inner = Callable[[Tensor, Tensor, Tensor], Tensor]


def _in_chunks(inner: Inner) -> Callable[..., tuple[Tensor, Tensor]]:
    """The scan (u, delta, A, B, C, state, chunk) -> (y, final state) whose chunks ``inner`` does.
    """

    @functools.wraps(inner)
    def scan(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        chunk = chunk or u.shape[1]
        log_decay = delta.unsqueeze(-1) * A  # (B, L, D, N)
        b = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
        ys = []
        for decay_k, b_k, C_k in zip(
            log_decay.split(chunk, 1), b.split(chunk, 1), C.split(chunk, 1), strict=True
        ):
            h = inner(decay_k, b_k, state)
            ys.append((h * C_k.unsqueeze(2)).sum(-1))
            state = h[:, -1]
        return torch.cat(ys, dim=1), state

    return scan


@_in_chunks
def clamped_cumsum_scan(log_decay: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """The corrected trick with the growing exponent clamped at 80."""
    cs = torch.cumsum(log_decay, dim=1)
    # fp16 ends at exp(11.09): the clamp has to be below the type's own limit.
    limit = min(CLAMP, math.log(torch.finfo(cs.dtype).max) - 1)
    total = torch.cumsum(b * torch.exp((-cs).clamp(max=limit)), dim=1)
    return torch.exp(cs) * (total + h0.unsqueeze(1))


@_in_chunks
def epsilon_cumsum_scan(log_decay: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """The corrected trick with a division by ``exp(cs) + 1e-12``."""
    decay = torch.exp(torch.cumsum(log_decay, dim=1))
    return decay * (torch.cumsum(b / (decay + EPSILON), dim=1) + h0.unsqueeze(1))


@_in_chunks
def centred_cumsum_scan(log_decay: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """The corrected trick with exponents measured from the middle of the chunk."""
    cs = torch.cumsum(log_decay, dim=1)
    centred = cs - cs[:, (cs.shape[1] - 1) // 2].unsqueeze(1)
    local = torch.exp(centred) * torch.cumsum(b * torch.exp(-centred), dim=1)
    return local + torch.exp(cs) * h0.unsqueeze(1)


def _apply_weights(weights: Tensor, cs: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """weights (B, T, T, D, N), of input k (axis 2) at time t (axis 1)."""
    return (weights * b.unsqueeze(1)).sum(2) + torch.exp(cs) * h0.unsqueeze(1)


def _future(steps: int, like: Tensor) -> Tensor:
    """(T, T, 1, 1), true where input k comes after time t."""
    index = torch.arange(steps, device=like.device)
    return (index[None, :] > index[:, None])[..., None, None]


@_in_chunks
def pairwise_scan(log_decay: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """Weights ``exp(cs_t - cs_k)``, masked before the exponential."""
    cs = torch.cumsum(log_decay, dim=1)
    exponent = cs.unsqueeze(2) - cs.unsqueeze(1)
    exponent = exponent.masked_fill(_future(cs.shape[1], cs), -math.inf)
    return _apply_weights(torch.exp(exponent), cs, b, h0)


@_in_chunks
def late_mask_scan(log_decay: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """Weights ``exp(cs_t - cs_k)``, masked after the exponential: right value, nan gradient."""
    cs = torch.cumsum(log_decay, dim=1)
    weights = torch.exp(cs.unsqueeze(2) - cs.unsqueeze(1))
    weights = weights.masked_fill(_future(cs.shape[1], cs), 0.0)
    return _apply_weights(weights, cs, b, h0)


@_in_chunks
def segment_sum_scan(log_decay: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """Weights from sums over k+1..t, each added up by itself."""
    steps = log_decay.shape[1]
    future = _future(steps, b)
    # Column k holds the log-decays of the steps after k alone, so their sum along t starts at 0
    # there.
    after = future.transpose(0, 1)  # time t beyond input k
    column = log_decay.unsqueeze(2).expand(-1, -1, steps, -1, -1)
    exponent = torch.cumsum(column.masked_fill(~after, 0.0), dim=1)
    exponent = exponent.masked_fill(future, -math.inf)
    return _apply_weights(torch.exp(exponent), torch.cumsum(log_decay, dim=1), b, h0)


@_in_chunks
def associative_scan(log_decay: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """Pairs (decay, state) combined by doubling: log2(T) steps over the whole chunk."""
    a, h = torch.exp(log_decay), b
    steps, distance = b.shape[1], 1
    while distance < steps:
        # Before the start there is the identity, the pair (1, 0).
        before = (0, 0, 0, 0, distance, 0)
        h = h + a * F.pad(h[:, :-distance], before)
        a = a * F.pad(a[:, :-distance], before, value=1.0)
        distance *= 2
    return h + a * h0.unsqueeze(1)
