"""Inputs for the scan, its float64 definition, and how far from it a result may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambabyte.ops import selective_scan
from mambabyte.ops.compare import relative_rms

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
SEQUENCES = ("u", "delta", "B", "C", "z")
# Relative RMS against the definition on the same (rounded) inputs.
OUTPUT_LIMIT = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 3e-3}
GRADIENT_LIMIT = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 3e-3}
# States are float32 whatever the inputs are.
STATE_LIMIT = {torch.float32: 1e-6, torch.float16: 1e-5, torch.bfloat16: 1e-5}

Inputs = dict[str, Tensor | None]


def make_inputs(
    batch: int,
    length: int,
    channels: int,
    states: int = 16,
    dtype: torch.dtype = torch.float32,
    *,
    without: tuple[str, ...] = (),
    seed: int = 0,
    device: str = "cuda",
) -> Inputs:
    """Inputs as a trained layer has them: steps around 0.05, decay rates from -1/2 to -N."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    wide = torch.float32
    rates = torch.arange(1, states + 1, device=device, dtype=wide)
    inputs: Inputs = {
        "u": normal(batch, length, channels),
        "delta": normal(batch, length, channels),
        "A": -rates * torch.exp(0.3 * normal(channels, states, dtype=wide)),
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(channels, dtype=wide),
        "z": normal(batch, length, channels),
        "delta_bias": normal(channels, dtype=wide) - 3,
        "initial_state": normal(batch, channels, states, dtype=wide),
    }
    return {name: None if name in without else tensor for name, tensor in inputs.items()}


def scan(inputs: Inputs, form: str = "fused", softplus: bool = True) -> tuple[Tensor, Tensor]:
    return selective_scan(**inputs, delta_softplus=softplus, form=form)  # type: ignore[arg-type]


def results(
    inputs: Inputs,
    form: str = "fused",
    softplus: bool = True,
    rounding: torch.dtype | None = None,
    weights_seed: int = 1,
) -> dict[str, Tensor]:
    """y, final_state and the gradient of every input, for fixed random output gradients.

    ``rounding`` is the dtype that the gradient of y is rounded to, by default that of u.
    """
    leaves = {n: None if t is None else t.detach().requires_grad_() for n, t in inputs.items()}
    y, final_state = scan(leaves, form, softplus)
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    generator = torch.Generator(device=y.device).manual_seed(weights_seed)

    def weight(like: Tensor, dtype: torch.dtype) -> Tensor:
        values = torch.randn(like.shape, generator=generator, device=like.device)
        return values.to(dtype).to(like.dtype)

    weights = (weight(y, rounding or y.dtype), weight(final_state, torch.float32))
    gradients = torch.autograd.grad((y, final_state), list(given.values()), weights)
    found = {"y": y.detach(), "final_state": final_state.detach()}
    return found | {f"d{name}": g for name, g in zip(given, gradients, strict=True)}


def definition(
    inputs: Inputs, softplus: bool = True, form: str = "recurrent", weights_seed: int = 1
) -> dict[str, Tensor]:
    """The same in float64, step by step, on the same rounded inputs."""
    u = inputs["u"]
    assert u is not None
    exact = {name: None if t is None else t.double() for name, t in inputs.items()}
    return results(exact, form, softplus, rounding=u.dtype, weights_seed=weights_seed)


def size_without_luck(inputs: Inputs, name: str, draws: int = 4) -> float:
    """RMS of a result where its terms do not cancel.

    What is one sum over all steps can cancel to next to nothing, and its error, which goes by the
    terms of the sum, is then large beside it. Of a gradient the largest over ``draws`` of the
    output gradients: others do not cancel too. An output, or a state, that of inputs whose terms
    are all positive.
    """
    if name in ("y", "final_state"):
        signed = ("u", "B", "C", "D", "initial_state")  # the gate of z goes by its sign, as decays
        positive = {key: t.abs() if t is not None and key in signed else t
                    for key, t in inputs.items()}
        return float(definition(positive, form="chunked")[name].square().mean().sqrt())
    found = [definition(inputs, form="chunked", weights_seed=2 + k)[name] for k in range(draws)]
    return max(float(t.square().mean().sqrt()) for t in found)


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Every result within its limit; names all that are not."""
    assert got.keys() == wanted.keys()
    wrong: list[Any] = []
    for name, tensor in got.items():
        limit = OUTPUT_LIMIT[dtype] if name == "y" else GRADIENT_LIMIT[dtype]
        if name == "final_state":
            limit = STATE_LIMIT[dtype]
        error = relative_rms(tensor, wanted[name])
        if not error <= limit:  # a NaN is wrong too
            wrong.append((name, error, limit))
    assert not wrong, f"relative RMS above its limit: {wrong}"


def poison(mebibytes: int = 1024) -> None:
    """Fill the caching allocator's free memory with NaN, so that what is not written shows."""
    sizes = [512 << k for k in range(11)] * 8 + [(1 << 20) << k for k in range(9)] * 2
    blocks = [torch.full((size // 4,), float("nan"), device="cuda") for size in sizes]
    blocks.append(torch.full((mebibytes << 18,), float("nan"), device="cuda"))
    del blocks
