"""Inputs of SSD, of Mamba-3's scan and of the gated delta rule, hard ones too, and their results
with gradients; the gradients of a stand-in for FlashAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambabyte.ops.delta.dispatch import gated_delta_rule
from mambabyte.ops.ssd.dispatch import ssd_scan
from mambabyte.ops.ssd.mamba3.dispatch import Mamba3State, mamba3_scan

Inputs = dict[str, Tensor]


def mamba3(
    x: Tensor, *, initial_state: Tensor | None = None, **others: Any
) -> tuple[Tensor, Tensor]:
    """``mamba3_scan`` with the three tensors of its state as one, (B, H, N + P + P N)."""
    channels, states = x.shape[-1], others["B"].shape[-1]
    state = None
    if initial_state is not None:
        k, v, h = initial_state.split([states, channels, channels * states], 2)
        state = Mamba3State(k, v, h.unflatten(2, (channels, states)))
    y, state = mamba3_scan(x, initial_state=state, **others)
    return y, torch.cat([state.k_state, state.v_state, state.ssm_state.flatten(2)], 2)


OPERATORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "ssd": ssd_scan, "mamba3": mamba3, "gated delta": gated_delta_rule,
    "channel gates": gated_delta_rule}
# Gates: log-decays a step, drawn evenly from between the two; "mixed" jumps between both ends.
GATES = {"gentle": (-0.5, -1e-3), "one": (0.0, 0.0), "strong": (-90.0, -20.0), "zero": (-1e6, -1e6),
         "mixed": (-1e6, -1e-6)}


def make_inputs(
    family: str, batch: int, length: int, heads: int = 3, keys: int = 8, values: int = 6,
    groups: int = 1, gates: str = "gentle", repeated_keys: bool = False,
    dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0,
) -> Inputs:  # fmt: skip
    """Keyword arguments of the operator: sequences in ``dtype``, the rest float32 or wider."""
    g = torch.Generator(device=device).manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=g, device=device, dtype=torch.float64).to(dtype)

    def even(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, device=device, dtype=torch.float64)

    keys += keys % 2 if family == "mamba3" else 0  # pairs
    low, high = GATES[gates]
    share = even(batch, length, heads, *([keys] if family == "channel gates" else []))
    log_decay = low + (high - low) * (share.round() if gates == "mixed" else share)
    state = normal(batch, heads, keys, values, dtype=wide)
    if family == "ssd":
        # The step size also scales what is written: kept near 1, and the rate takes the decay.
        A = torch.linspace(min(low, -1e-6), min(high, -1e-6), heads, device=device)
        dt = torch.zeros_like(share) if gates == "one" else 0.5 + share
        return {
            "x": normal(batch, length, heads, values), "dt": dt.to(dtype), "A": A.to(wide),
            "B": normal(batch, length, groups, keys), "C": normal(batch, length, groups, keys),
            "D": normal(heads, dtype=wide), "initial_state": state.mT.contiguous(),
        }
    if family == "mamba3":
        bias = normal(2, heads, keys, dtype=wide)
        last = normal(batch, heads, keys + values, dtype=wide)
        return {
            "x": normal(batch, length, heads, values), "dt": (0.5 + share).to(wide),
            "log_decay": log_decay.to(wide),
            "B": normal(batch, length, groups, keys), "C": normal(batch, length, groups, keys),
            # Some turns a step, to and fro; mixes from one end of a step to the other.
            "theta": 10 * normal(batch, length, max(1, keys // 4), dtype=wide),
            "mix": (1.2 * even(batch, length, heads) - 0.1).clamp(0, 1).to(wide),
            "D": normal(heads, dtype=wide), "B_bias": bias[0], "C_bias": bias[1],
            "initial_state": torch.cat([last, state.flatten(2)], 2),
        }
    q, k = (t / t.norm(dim=-1, keepdim=True) for t in (
        normal(batch, length, heads, keys, dtype=torch.float64) for _ in range(2)))
    beta = even(batch, length, heads)
    if repeated_keys:  # one key, written over and over, at times beyond its mark
        k, beta = k[:, :1].expand(k.shape), 1 + beta
    return {"q": q.to(dtype), "k": k.to(dtype), "v": normal(batch, length, heads, values),
            "log_decay": log_decay.to(wide), "beta": beta.to(dtype), "initial_state": state}


def results(
    family: str, inputs: Inputs, form: str, chunk_size: int | None = None, weights_seed: int = 1
) -> dict[str, Tensor]:
    """y, final_state and the gradient of every input, for fixed random output gradients."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y, state = OPERATORS[family](**leaves, form=form, chunk_size=chunk_size)
    g = torch.Generator(device=y.device).manual_seed(weights_seed)
    weights = [torch.randn(t.shape, generator=g, device=y.device).bfloat16().to(t.dtype)
               for t in (y, state)]
    gradients = torch.autograd.grad((y, state), list(leaves.values()), weights)
    found = {"y": y.detach(), "final_state": state.detach()}
    return found | {f"d{n}": grad for n, grad in zip(leaves, gradients, strict=True)}


def size_without_luck(family: str, inputs: Inputs, name: str, draws: int = 4) -> float:
    """Largest RMS of a result, in float64, over ``draws`` of the output gradients.

    The gradient of a head's rate A is one sum over batch and steps, whose value is mostly that of
    the slowest head. It can cancel to a fraction of its usual size while its error, which goes by
    the terms of the sum, stays what it is: over nine seeds of (2, 150, 4 x 64) the kernels' is at
    most 2e-3 of this size, and up to 5e-3 of the value. Other weights do not cancel too.
    """
    exact = in_dtype(inputs, torch.float64)
    found = [results(family, exact, "chunked", weights_seed=2 + k)[name] for k in range(draws)]
    return max(float(t.square().mean().sqrt()) for t in found)


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: t.to(dtype) for name, t in inputs.items()}


def backward_of(forward: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """The backward pass of ``forward``, which stands in for FlashAttention on a CPU: both take what
    torch's operators take, and y is the first result."""
    def backward(
        dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, *rest: Any,
        **window: int,
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(forward(*leaves, *rest[:6], **window)[0], leaves, dy)

    return backward
