"""Inputs for the part of a layer between its large projections, and its float64 definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from scan_cases import relative_rms
from torch import Tensor

from mambabyte.ops import selective_scan
from mambabyte.ops.conv.dispatch import causal_conv

NAMES = ("xz", "conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A", "D")
IN_DTYPE = ("xz", "x_proj", "dt_proj")  # the others are float32
# Of relative RMS: what one rounding less or more may come to.
LIMIT = {torch.float32: 1e-6, torch.float16: 1.5e-4, torch.bfloat16: 1e-3}

Inputs = dict[str, Tensor]  # dt_proj may be None
Mixer = Callable[..., tuple[Tensor, Tensor, Tensor]]


def make_inputs(
    batch: int, length: int, channels: int, rank: int | None, taps: int = 4, states: int = 16,
    dtype: torch.dtype = torch.float32, device: str = "cuda",
) -> Inputs:
    """Inputs as a layer has them: products that keep the scale, steps around 0.05; without a rank
    of full rank."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, device=device)

    full = rank is None
    rank = channels if full else rank
    rates = torch.arange(1, states + 1, device=device, dtype=torch.float32)
    inputs = {
        "xz": normal(batch, length, 2 * channels),
        "conv_weight": normal(channels, taps, scale=taps**-0.5),
        "conv_bias": normal(channels, scale=0.1),
        "x_proj": normal(rank + 2 * states, channels, scale=2 * channels**-0.5),
        "dt_proj": None if full else normal(channels, rank, scale=rank**-0.5),
        "dt_bias": normal(channels) - 3,
        "A": -rates * torch.exp(normal(channels, states, scale=0.3)),
        "D": normal(channels),
    }
    return {n: t.to(dtype) if n in IN_DTYPE and t is not None else t for n, t in inputs.items()}


def composed(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor | None,
    dt_bias: Tensor, A: Tensor, D: Tensor, form: str = "fused",
) -> tuple[Tensor, Tensor, Tensor]:
    """What MambaMixer composes, with any form of the scan."""
    x, z = xz.chunk(2, dim=-1)
    u, tail = causal_conv(x, conv_weight, conv_bias, silu=True)
    y, state = selective_scan(
        u, *small_products(u, x_proj, dt_proj, A), D, z, delta_bias=dt_bias, delta_softplus=True,
        form=form)
    return y, tail, state


def small_products(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor | None, A: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """delta, A, B, C of the scan."""
    low_rank, B, C = F.linear(u, x_proj).split(
        [len(x_proj) - 2 * A.shape[1], A.shape[1], A.shape[1]], dim=-1)
    return low_rank if dt_proj is None else F.linear(low_rank, dt_proj), A, B, C


def upstream(*outputs: Tensor) -> list[Tensor]:
    """Fixed random gradients of y, the tail and the state."""
    generator = torch.Generator(device=outputs[0].device).manual_seed(1)
    return [torch.randn(t.shape, generator=generator, device=t.device).to(t.dtype)
            for t in outputs]


def results(
    mixer: Mixer, inputs: Inputs, training: bool = False, rounding: torch.dtype | None = None
) -> Inputs:
    """y, tail, state and the gradient of every input, for the gradients of ``upstream``; in
    ``training`` for that of y alone."""
    leaves = {name: None if t is None else t.detach().requires_grad_()
              for name, t in inputs.items()}
    y, tail, state = mixer(*leaves.values())
    rounded = (y.to(rounding or y.dtype), tail.to(rounding or y.dtype), state.float())
    given = [g.to(t.dtype) for g, t in zip(upstream(*rounded), (y, tail, state), strict=True)]
    used = 1 if training else 3
    wanted = {name: t for name, t in leaves.items() if t is not None}
    gradients = torch.autograd.grad((y, tail, state)[:used], list(wanted.values()), given[:used])
    found = {"y": y.detach(), "tail": tail.detach(), "state": state.detach()}
    return found | {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}


def definition(inputs: Inputs, training: bool = False) -> Inputs:
    """The same in float64, step by step, on the same rounded inputs."""
    exact = {name: None if t is None else t.double() for name, t in inputs.items()}
    return results(
        lambda *given: composed(*given, form="recurrent"), exact, training, inputs["xz"].dtype)


def assert_as_good(found: Inputs, composition: Inputs, exact: Inputs, dtype: torch.dtype) -> None:
    """Every result of the composition's dtype and, up to ``LIMIT``, as close to the exact one;
    names all that are not. (Rounding between the parts takes both further away.)"""
    assert found.keys() == composition.keys() == exact.keys()
    wrong = []
    for name, wanted in exact.items():
        assert found[name].dtype == composition[name].dtype, name
        errors = [relative_rms(results[name], wanted) for results in (found, composition)]
        if not errors[0] <= errors[1] + LIMIT[dtype]:  # a NaN is wrong too
            wrong.append((name, *errors))
    assert not wrong, f"less exact than the composition by more than {LIMIT[dtype]}: {wrong}"
