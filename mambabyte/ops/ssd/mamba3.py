"""Mamba-3's scan (arXiv:2603.15569, one input and one output a head), as one call of SSD.

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

The gradient of an angle is a sum over all later steps, where the parts of pairs behind it cancel.
In float32 that is right to 1e-6; sequences in bf16 leave noise that grows as the root of the steps,
4 % at 1,000 (docs/log/mixers.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.arguments import (
    FLOATS,
    check_chunk_size,
    check_tensors,
    document_ages,
    without_autocast,
)
from mambabyte.ops.library import Tensors, define
from mambabyte.ops.ssd.chunked import CHUNK, chunked_ssd
from mambabyte.ops.ssd.decay import without_past
from mambabyte.ops.ssd.dispatch import check_heads, wide_dtype
from mambabyte.ops.ssd.operator import fused_ssd, has_kernel
from mambabyte.ops.ssd.recompute import gradients_again
from mambabyte.ops.ssd.recurrent import (
    Mamba3State,
    angles,
    less_than_a_turn,
    recurrent_mamba3,
)

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
    _check(x, dt, log_decay, B, C, theta, mix, D, B_bias, C_bias, initial_state, form, chunk_size)
    if form == "auto":
        form = "recurrent" if x.shape[1] == 1 else "fused"
    with without_autocast(x.device):
        wide = wide_dtype(x, dt, log_decay, B, C, theta, mix, *(initial_state or ()))
        ages = document_ages(document_starts, x) if ages is None else ages
        log_decay = without_past(log_decay.to(wide), ages)
        state = None if initial_state is None else Mamba3State(
            *(t.to(wide) for t in initial_state))
        D, B_bias, C_bias = (None if t is None else t.to(wide) for t in (D, B_bias, C_bias))
        gates = (dt.to(wide), log_decay, theta.to(wide), mix.to(wide))
        if form == "recurrent":
            u = x.to(wide)
            k, c = (per_head(t, bias, x.shape[2]).to(wide)
                    for t, bias in ((B, B_bias), (C, C_bias)))
            y, state = recurrent_mamba3(
                u, *gates[:2], k, c, *gates[2:], no_state(u, k) if state is None else state)
            return (y if D is None else y + D[:, None] * u).to(x.dtype), state
        given = (x, *gates, B, C, D, B_bias, C_bias, *(state or (None,) * 3))
        y, h = _mamba3(*given) if form == "fused" else _composed(
            functools.partial(chunked_ssd, chunk=chunk_size or CHUNK), wide, *given)
        k = per_head(B[:, -1:], B_bias, x.shape[2]).squeeze(1).to(wide)
        return y, Mamba3State(k, x[:, -1].to(wide), h)


def no_state(x: Tensor, k: Tensor) -> Mamba3State:
    """The state before the first step of x (B, L, H, P), where B is k (B, L, H, N)."""
    batch, _, *channels = x.shape
    return Mamba3State(torch.zeros_like(k[:, 0]), torch.zeros_like(x[:, 0]),
                       x.new_zeros(batch, *channels, k.shape[3]))


def _composed(
    scan: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype,
    x: Tensor, dt: Tensor, log_decay: Tensor, theta: Tensor, mix: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, B_bias: Tensor | None, C_bias: Tensor | None, k_state: Tensor | None,
    v_state: Tensor | None, ssm_state: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, L, H, P) in x's dtype and the last ssm_state, by SSD in the form ``scan`` on sequences
    in ``dtype``; the rest in dt's dtype."""
    heads, pairs, wide = x.shape[2], B.shape[3] // 2, dt.dtype
    k, c = (per_head(t, bias, heads).to(wide) for t, bias in ((B, B_bias), (C, C_bias)))
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
    h = _times(decay[:, -1, ..., None] * g, turn[:, -1, :, None].conj())
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
    return _composed(functools.partial(chunked_ssd, chunk=CHUNK), args[1].dtype, *args)


def _by_kernels(*args: Any) -> Tensors:
    """With SSD's kernels where they take these."""
    x, B, C = args[0], args[5], args[6]
    if not (has_kernel(x, B) and B.dtype == C.dtype == x.dtype):
        return _in_torch(*args)

    def scan(v: Tensor, step: Tensor, decay: Tensor, keys: Tensor, queries: Tensor, state: Tensor
             ) -> tuple[Tensor, Tensor]:
        return fused_ssd(v, step, decay, keys, queries, None, state)

    return _composed(scan, x.dtype, *args)


def _forward(*args: Any) -> Tensors:
    with without_autocast(args[0].device):
        return _by_kernels(*args)


def _backward(dy: Tensor, dstate: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
    return gradients_again(_by_kernels, (dy, dstate), args)


def _check_prepared(
    x: Tensor, dt: Tensor, log_decay: Tensor, theta: Tensor, mix: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, B_bias: Tensor | None, C_bias: Tensor | None, k_state: Tensor | None,
    v_state: Tensor | None, ssm_state: Tensor | None,
) -> None:  # fmt: skip
    state = (k_state, v_state, ssm_state)
    _check_shapes(x, dt, log_decay, B, C, theta, mix, D, B_bias, C_bias, state, dt.dtype)


def _shapes(x: Tensor, dt: Tensor, *args: Any) -> Tensors:
    batch, _, heads, channels = x.shape
    return (torch.empty_like(x, memory_format=torch.contiguous_format),
            dt.new_empty(batch, heads, channels, args[3].shape[3]))


# One operator: it keeps what it is given, and not each product of it.
_mamba3: Any = define(
    "mamba3",
    "Tensor x, Tensor dt, Tensor log_decay, Tensor theta, Tensor mix, Tensor B, Tensor C, "
    "Tensor? D, Tensor? B_bias, Tensor? C_bias, Tensor? k_state, Tensor? v_state, "
    "Tensor? ssm_state", "y, final_state",
    forward={"cpu": _forward, "cuda": _forward}, backward={"cpu": _backward, "cuda": _backward},
    check=_check_prepared, shapes=_shapes, in_torch=_in_torch)


def _check(
    x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, theta: Tensor, mix: Tensor,
    D: Tensor | None, B_bias: Tensor | None, C_bias: Tensor | None, state: Mamba3State | None,
    form: str, chunk_size: int | None,
) -> None:  # fmt: skip
    """Raise UserError for what :func:`mamba3_scan` does not take."""
    if form not in ("auto", *FORMS):
        raise UserError(f"Mamba-3 form {form!r} is unknown: choose auto, {', '.join(FORMS)}")
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
    _check_shapes(x, dt, log_decay, B, C, theta, mix, D, B_bias, C_bias,
                  state or (None, None, None))


def _check_shapes(
    x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, theta: Tensor, mix: Tensor,
    D: Tensor | None, B_bias: Tensor | None, C_bias: Tensor | None,
    state: tuple[Tensor | None, ...], wide: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Of what is no sequence ``wide`` is the dtype, None any."""
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
