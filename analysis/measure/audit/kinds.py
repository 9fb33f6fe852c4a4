"""What is audited: kinds of operators, each with its inputs and its definition in float64.

Names and layouts are those of mambabyte.ops: B rows, L steps, time second. The definitions are the
recurrences (mambabyte.ops.*.recurrent), step by step, and sums as they are printed for attention
and convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mambabyte.ops import gated_delta_rule, selective_scan, ssd_scan

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, Tensor | None]  # y, and the state after the last step


@dataclass(frozen=True)
class Case:
    """One set of inputs: everything but the kind and the dtype that they follow from."""

    name: str
    length: int
    batch: int = 2
    # Decays: near 1 (slow), exactly 0 after one step (fast), or both in turn at random (mixed).
    gates: Literal["usual", "slow", "fast", "mixed"] = "usual"
    # transposed: time last in memory; "in nan": a part of a larger tensor, whose rest is nan;
    # expanded: one row for all, with stride 0.
    layout: Literal["contiguous", "transposed", "in nan", "expanded"] = "contiguous"
    # small; odd, which are multiples of little; or wide, as kernels of tensor cores want them
    widths: Literal["small", "odd", "wide"] = "small"
    documents: tuple[int, ...] = ()  # lengths of those that lie one behind another in a row
    seed: int = 0


@dataclass(frozen=True)
class Kind:
    """An operator: what it is given, and what it is."""

    name: str
    about: str
    streams: tuple[str, ...]  # inputs of shape (B, L, ...)
    wide: frozenset[str]  # inputs that stay in float32 beside streams in half precision
    draw: Callable[[Case, Generator], Inputs]  # in float64
    define: Callable[[Inputs], Outputs]
    has_state: bool = True


def _randn(g: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _steps(case: Case, g: Generator, *shape: int) -> Tensor:
    """Step sizes before softplus: of about 0.1, 1e-4, 40, or 40 and 0.002 at random."""
    noise = _randn(g, *shape)
    if case.gates == "mixed":
        often = torch.rand(shape, generator=g, dtype=torch.float64) < 0.3
        return torch.where(often, 40.0, -6.0) + noise
    return noise + {"usual": -2.0, "slow": -9.0, "fast": 40.0}[case.gates]


def _draw_scan(case: Case, g: Generator) -> Inputs:
    D, N = {"small": (32, 16), "odd": (7, 5), "wide": (256, 16)}[case.widths]
    stream = (case.batch, case.length)
    return {
        "u": _randn(g, *stream, D), "delta": _steps(case, g, *stream, D),
        "A": -torch.arange(1, N + 1) * torch.exp(0.3 * _randn(g, D, N)),
        "B": _randn(g, *stream, N), "C": _randn(g, *stream, N), "D": _randn(g, D),
        "z": _randn(g, *stream, D), "delta_bias": 0.5 * _randn(g, D),
        "initial_state": _randn(g, case.batch, D, N)}


def _define_scan(x: dict[str, Any]) -> Outputs:
    return selective_scan(**x, delta_softplus=True, form="recurrent")


def _draw_ssd(case: Case, g: Generator) -> Inputs:
    H, P, G, N = {"small": (4, 16, 2, 16), "odd": (3, 12, 1, 20), "wide": (4, 64, 2, 64)}[
        case.widths]
    stream = (case.batch, case.length)
    return {
        "x": _randn(g, *stream, H, P), "dt": _steps(case, g, *stream, H),
        "A": -torch.linspace(1, 16, H, dtype=torch.float64),
        "B": _randn(g, *stream, G, N), "C": _randn(g, *stream, G, N), "D": _randn(g, H),
        "dt_bias": 0.5 * _randn(g, H), "initial_state": _randn(g, case.batch, H, P, N)}


def _define_ssd(x: dict[str, Any]) -> Outputs:
    return ssd_scan(**x, dt_softplus=True, form="recurrent")


def _draw_delta(case: Case, g: Generator, channel_gates: bool = False) -> Inputs:
    H, K, V = {"small": (2, 16, 32), "odd": (3, 12, 20), "wide": (2, 64, 64)}[case.widths]
    stream = (case.batch, case.length)
    gates = (*stream, H, K) if channel_gates else (*stream, H)
    return {
        "q": F.normalize(_randn(g, *stream, H, K), dim=-1),
        "k": F.normalize(_randn(g, *stream, H, K), dim=-1), "v": _randn(g, *stream, H, V),
        "log_decay": -F.softplus(_steps(case, g, *gates)),
        "beta": torch.sigmoid(_randn(g, *stream, H)),
        "initial_state": _randn(g, case.batch, H, K, V)}


def _draw_kda(case: Case, g: Generator) -> Inputs:
    return _draw_delta(case, g, channel_gates=True)


def _define_delta(x: dict[str, Any]) -> Outputs:
    x = x if "log_decay" in x else {**x, "log_decay": torch.zeros_like(x["beta"])}
    return gated_delta_rule(**x, form="recurrent")


def _draw_attention(case: Case, g: Generator) -> Inputs:
    H, width = {"small": (4, 32), "odd": (3, 12), "wide": (4, 64)}[case.widths]
    shape = (case.batch, case.length, H, width)
    # Scores of about 1, or so large that their exponentials overflow in float32.
    scale = {"usual": 1.0, "slow": 0.01, "fast": 30.0}.get(case.gates, 1.0) * torch.ones(())
    if case.gates == "mixed":
        scale = torch.where(torch.rand(shape[:3], generator=g) < 0.3, 30.0, 0.01)[..., None]
    return {"q": _randn(g, *shape) * scale, "k": _randn(g, *shape), "v": _randn(g, *shape)}


def _define_attention(x: Inputs) -> Outputs:
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")  # (B, H, L, width)
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), None


def _draw_conv(case: Case, g: Generator) -> Inputs:
    D, K = {"small": (32, 4), "odd": (7, 3), "wide": (256, 4)}[case.widths]
    scale = {"fast": 100.0, "slow": 0.01}.get(case.gates, 1.0)
    return {"x": _randn(g, case.batch, case.length, D) * scale, "weight": _randn(g, D, K),
            "bias": _randn(g, D), "initial_state": _randn(g, case.batch, K - 1, D)}


def _define_conv(x: Inputs) -> Outputs:
    weight, length = x["weight"], x["x"].shape[1]
    taps = weight.shape[1]
    before = x.get("initial_state", x["x"].new_zeros(len(x["x"]), taps - 1, len(weight)))
    padded = torch.cat([before, x["x"]], 1)
    y = x["bias"] + sum(padded[:, i : i + length] * weight[:, i] for i in range(taps))
    return F.silu(y), padded[:, length:]


_DELTA = ("q", "k", "v", "log_decay", "beta")
KINDS = {kind.name: kind for kind in (
    Kind("scan", "selective scan of Mamba", ("u", "delta", "B", "C", "z"),
         frozenset({"A", "D", "delta_bias", "initial_state"}), _draw_scan, _define_scan),
    Kind("ssd", "SSD, the scan of Mamba-2", ("x", "dt", "B", "C"),
         frozenset({"A", "D", "dt_bias", "initial_state"}), _draw_ssd, _define_ssd),
    Kind("delta", "gated delta rule, one gate a head", _DELTA,
         frozenset({"log_decay", "initial_state"}), _draw_delta, _define_delta),
    Kind("kda", "gated delta rule, one gate a key channel", _DELTA,
         frozenset({"log_decay", "initial_state"}), _draw_kda, _define_delta),
    Kind("attention", "causal attention", ("q", "k", "v"), frozenset(), _draw_attention,
         _define_attention, has_state=False),
    Kind("conv", "causal depthwise convolution with SiLU", ("x",), frozenset(), _draw_conv,
         _define_conv),
)}


def draw(kind: Kind, case: Case, dtype: torch.dtype, device: str) -> Inputs:
    """The inputs of a case: streams in ``dtype``, what ``kind`` keeps wide in float32 or wider."""
    g = torch.Generator().manual_seed(case.seed)
    wide = torch.promote_types(dtype, torch.float32)
    x = {name: t.to(wide if name in kind.wide else dtype).to(device)
         for name, t in kind.draw(case, g).items()}
    if case.documents:  # each of which starts from nothing
        x.pop("initial_state", None)
    return x


def laid_out(kind: Kind, case: Case, x: Inputs) -> Inputs:
    """A copy of ``x`` with its streams in memory as ``case`` says: of the same values, but for
    "expanded", whose rows are all the first."""
    def place(t: Tensor) -> Tensor:
        if case.layout == "transposed":
            return t.movedim(1, -1).contiguous().movedim(-1, 1)
        if case.layout == "expanded":
            return t[:1].expand(t.shape)
        if case.layout == "in nan":
            around = t.new_full([n + 2 for n in t.shape], math.nan)
            inside = around[tuple(slice(1, -1) for _ in t.shape)]
            return inside.copy_(t)
        return t.contiguous()

    # Of copies: what a target writes to them is not what the next check reads.
    copies = {name: t.clone() for name, t in x.items()}
    return {name: place(t) if name in kind.streams else t for name, t in copies.items()}


def define(kind: Kind, x: Inputs, documents: tuple[int, ...] = ()) -> Outputs:
    """What ``kind`` is, of ``x``; of several documents in a row by a call for each, and the state
    is that of the last."""
    if not documents:
        return kind.define(x)
    ys, state, begin = [], None, 0
    for length in documents:
        part = {name: t[:, begin : begin + length] if name in kind.streams else t
                for name, t in x.items()}
        y, state = kind.define(part)
        ys.append(y)
        begin += length
    return torch.cat(ys, 1), state
