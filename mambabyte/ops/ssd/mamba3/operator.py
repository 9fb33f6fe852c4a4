"""Mamba-3's scan as one PyTorch operator, ``torch.ops.mambabyte.mamba3``, on prepared inputs.

The definition is ``recurrent_mamba3`` (mambabyte.ops.ssd.recurrent). SSD has neither its complex
decays nor its second written term, and needs neither:

- Turns of a pair of states commute, so all up to step t are one, by the cumulated angle p_t. In
  states that turn with them, ``h~_t = exp(i p_t) h_t``, decays are real, and B and C turn instead.
- What step t writes of step t - 1 is ``(1 - mix_t) dt_t``, decayed as the state is: it may as well
  be written before that decay. ``g_t``, the state with this part of step t + 1, then has one term::

      g_{t-1} = a_{t-1} g_{t-2} + (mix_{t-1} dt_{t-1} + (1 - mix_t) dt_t) x_{t-1} B~_{t-1}^T
      y_t     = (a_t C~_t) g_{t-1} + mix_t dt_t (B_t . C_t) x_t

  The first line is SSD a step late, on x and B of step t - 1. What a step reads of itself is added,
  and so is what the last one writes: nothing is a difference of large numbers.

On a GPU it is SSD's kernels between some of its own (``angles.cu``), which add up the gradients of
angles so that bf16 sequences do them no harm. Everywhere else it is SSD's chunked form, which keeps
nothing and runs a second time in the backward pass; there bf16 sequences are widened.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.ops.arguments import FLOATS, check_tensors, without_autocast
from mambabyte.ops.library import Tensors, define, wants_gradient
from mambabyte.ops.ssd.chunked import CHUNK, chunked_ssd
from mambabyte.ops.ssd.mamba3 import cuda as kernels
from mambabyte.ops.ssd.operator import has_kernel as ssd_has_kernel
from mambabyte.ops.ssd.recompute import gradients_again
from mambabyte.ops.ssd.recurrent import Mamba3State, angles, less_than_a_turn


def fused_mamba3(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (B, L, H, P) in x's dtype and the last ssm_state; ``tensors`` are the operator's inputs."""
    y, state, *_ = _mamba3(*tensors, wants_gradient(*tensors))
    return y, state


def no_state(x: Tensor, k: Tensor) -> Mamba3State:
    """The state before the first step of x (B, L, H, P), where B is k (B, L, H, N)."""
    batch, _, *channels = x.shape
    return Mamba3State(torch.zeros_like(k[:, 0]), torch.zeros_like(x[:, 0]),
                       x.new_zeros(batch, *channels, k.shape[3]))


def composed(
    scan: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype,
    x: Tensor, dt: Tensor, log_decay: Tensor, theta: Tensor, mix: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, B_bias: Tensor | None, C_bias: Tensor | None, k_state: Tensor | None,
    v_state: Tensor | None, ssm_state: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, L, H, P) in x's dtype and the last ssm_state, by SSD in the form ``scan`` on sequences
    in ``dtype``; the rest in dt's dtype."""
    heads, pairs, wide = x.shape[2], B.shape[3] // 2, dt.dtype
    k, c = (per_head(t.to(wide), bias, heads) for t, bias in ((B, B_bias), (C, C_bias)))
    state = Mamba3State(*(zero if t is None else t for zero, t in zip(
        no_state(x[:, :1].to(wide), k), (k_state, v_state, ssm_state), strict=True)))
    angle = less_than_a_turn(summed(angles(theta, dt)), wide)
    angle = F.pad(angle, (0, pairs - theta.shape[2]))  # (B, L, H, N / 2)
    turn = torch.polar(torch.ones_like(angle), angle)
    decay, own = torch.exp(log_decay)[..., None], mix * dt

    def late(first: Tensor, sequence: Tensor) -> Tensor:
        return torch.cat([first.to(dtype)[:, None], sequence[:, :-1].to(dtype)], 1)

    # SSD's sequences: x and B from the state up to the step before the last, and what reads them.
    step = (1 - mix) * dt + F.pad(own[:, :-1], (0, 0, 1, 0))
    y, g = scan(
        late(state.v_state, x), step, F.pad(log_decay[:, :-1], (0, 0, 1, 0)),
        late(state.k_state, _times(k, turn)), _times(c, decay * turn).to(dtype), state.ssm_state)
    itself = own * (k * c).sum(-1)
    y = y + x * (itself if D is None else itself + D)[..., None]
    # (conj_physical: in an operator that torch.compile calls, conj() is let fall without a word.)
    h = _times(decay[:, -1, ..., None] * g, turn[:, -1, :, None].conj_physical())
    written = (own[:, -1, :, None] * x[:, -1])[..., None] * k[:, -1, :, None]
    return y.to(x.dtype), h + written


def summed(x: Tensor) -> Tensor:
    """x (B, L, H, S) summed up to and with each step: in parts of some root of L steps, and over
    these, as a card has one thread walk along a sum."""
    length = x.shape[1]
    steps = 1 << (length.bit_length() + 1) // 2
    x = F.pad(x, (0, 0, 0, 0, 0, -length % steps)).unflatten(1, (-1, steps)).cumsum(2)
    before = F.pad(x[:, :-1, -1:].cumsum(1), (0, 0, 0, 0, 0, 0, 1, 0))
    return (x + before).flatten(1, 2)[:, :length]


def _times(x: Tensor, turn: Tensor) -> Tensor:
    """x (..., N), its pairs of neighbours as complex numbers, times ``turn`` (..., N / 2)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def per_head(x: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """B or C of each head: x (B, L, G, N) and bias (H, N) -> (B, L, H, N)."""
    groups = x.shape[2]
    x = x[:, :, :, None].expand(-1, -1, -1, heads // groups, -1)
    return (x if bias is None else x + bias.unflatten(0, (groups, -1))).flatten(2, 3)


def _in_torch(*args: Any) -> Tensors:
    return composed(functools.partial(chunked_ssd, chunk=CHUNK), args[1].dtype, *args)


def _forward(*args: Any) -> Tensors:
    with without_autocast(args[0].device):
        return (*_in_torch(*args[:-1]), args[0].new_empty(0))


def _forward_cuda(*args: Any) -> Tensors:
    return kernels.forward(*args) if has_kernel(*args) else _forward(*args)


def _backward(dy: Tensor, dstate: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
    return gradients_again(_in_torch, (dy, dstate), args[:-1])


def _backward_cuda(dy: Tensor, dstate: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
    if not has_kernel(*args):
        return _backward(dy, dstate, *args)
    if not args[-1].numel():  # nothing was kept
        again = (*args[:-1], True)
        args = (*args[:-1], kernels.forward(*again)[2])
    return kernels.backward(dy, dstate, *args)


def has_kernel(x: Tensor, dt: Tensor, *args: Any) -> bool:
    """Whether the GPU's kernels take these inputs of the operator: SSD's do, and B and C are of x's
    dtype, the rest in float32."""
    B, C = args[3], args[4]
    return (ssd_has_kernel(x, B) and B.dtype == C.dtype == x.dtype and dt.dtype == torch.float32
            and args[1].shape[2] > 0)


def _check_prepared(
    x: Tensor, dt: Tensor, log_decay: Tensor, theta: Tensor, mix: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, B_bias: Tensor | None, C_bias: Tensor | None, k_state: Tensor | None,
    v_state: Tensor | None, ssm_state: Tensor | None,
) -> None:  # fmt: skip
    state = (k_state, v_state, ssm_state)
    check_shapes(x, dt, log_decay, B, C, theta, mix, D, B_bias, C_bias, state, dt.dtype)


def _shapes(x: Tensor, dt: Tensor, *args: Any) -> Tensors:
    (batch, length, heads, channels), states = x.shape, args[3].shape[3]
    found = (torch.empty_like(x, memory_format=torch.contiguous_format),
             dt.new_empty(batch, heads, channels, states))
    if not (args[-1] and has_kernel(x, dt, *args)):
        return *found, x.new_empty(0)
    chunks = -(-length // kernels.CHUNK)
    return *found, x.new_empty(batch, chunks, heads, channels, states)


_mamba3: Any = define(
    "mamba3",
    "Tensor x, Tensor dt, Tensor log_decay, Tensor theta, Tensor mix, Tensor B, Tensor C, "
    "Tensor? D, Tensor? B_bias, Tensor? C_bias, Tensor? k_state, Tensor? v_state, "
    "Tensor? ssm_state", "y, final_state", kept="carries",
    forward={"cpu": _forward, "cuda": _forward_cuda},
    backward={"cpu": _backward, "cuda": _backward_cuda},
    check=_check_prepared, shapes=_shapes, in_torch=_in_torch)


def check_shapes(
    x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, theta: Tensor, mix: Tensor,
    D: Tensor | None, B_bias: Tensor | None, C_bias: Tensor | None,
    state: tuple[Tensor | None, ...], wide: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Raise UserError for shapes that do not agree. Of what is no sequence ``wide`` is the dtype,
    None any."""
    batch, length, heads, channels = x.shape
    states = B.shape[3]
    gates, bias, (k_state, v_state, ssm_state) = (batch, length, heads), (heads, states), state
    check_tensors("x", x, None, FLOATS, (
        ("dt", dt, gates, wide), ("log_decay", log_decay, gates, wide), ("mix", mix, gates, wide),
        ("B", B, (batch, length, *B.shape[2:]), None), ("C", C, tuple(B.shape), None),
        ("theta", theta, (batch, length, theta.shape[2]), wide), ("D?", D, (heads,), wide),
        ("B_bias?", B_bias, bias, wide), ("C_bias?", C_bias, bias, wide),
        ("k_state?", k_state, (batch, *bias), wide),
        ("v_state?", v_state, (batch, heads, channels), wide),
        ("ssm_state?", ssm_state, (batch, heads, channels, states), wide)))
