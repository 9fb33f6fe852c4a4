"""Operators take any strides, and what does not fit never reaches native code."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops import selective_scan
from mambabyte.ops.conv.dispatch import causal_conv
from mambabyte.ops.mamba import step
from mambabyte.ops.scan import operator as fused

AVAILABLE, REASON = fused.fused_available("cpu")
native = pytest.mark.skipif(not AVAILABLE, reason=f"no native scan here: {REASON}")
B, L, D, N, K, R = 3, 21, 5, 4, 4, 2
OPS = torch.ops.mambabyte


def permuted(x: Tensor) -> Tensor:
    order = list(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def sliced(x: Tensor) -> Tensor:
    filler = float("nan") if x.is_floating_point() else 0
    wide = torch.full([2 * n for n in x.shape], filler, dtype=x.dtype)
    place = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    return place.copy_(x)


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


LAYOUTS = {"permuted": permuted, "sliced": sliced, "expanded": expanded}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def scan_inputs() -> list[Any]:
    return [normal(B, L, D), normal(B, L, D), -normal(D, N).exp(), normal(B, L, N),
            normal(B, L, N) + 1, normal(D), normal(B, L, D) - 1, normal(D), normal(B, D, N)]


def conv_inputs() -> list[Any]:
    return [normal(B, L, D), normal(D, K), normal(D), normal(B, K - 1, D)]


def cases() -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    ages = torch.randint(3, (B, L), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scan, conv = [*scan_inputs(), ages], [*conv_inputs(), ages]
    *_, saved = OPS.selective_scan(*scan, True, True)
    row = [normal(B, D), normal(B, D), -normal(D, N).exp(), normal(B, N), normal(B, N), normal(D),
           normal(B, D), normal(D), normal(B, D, N)]
    layer = [normal(B, D), normal(B, D), normal(B, K - 1, D), normal(B, D, N), normal(D, K),
             normal(D), normal(R + 2 * N, D), normal(D, R), normal(D), -normal(D, N).exp(),
             normal(D)]
    return {
        "selective_scan": (OPS.selective_scan, [*scan, True, True]),
        "selective_scan_backward": (
            OPS.selective_scan_backward, [normal(B, L, D), normal(B, D, N), *scan, saved, True]),
        "causal_conv": (OPS.causal_conv, [*conv, True]),
        "causal_conv_backward": (
            OPS.causal_conv_backward, [normal(B, L, D), normal(B, K - 1, D), *conv, True]),
        "scan_step": (OPS.scan_step, [*row, True]),
        "mamba_step": (OPS.mamba_step, layer),
    }


NAMES = ("selective_scan", "selective_scan_backward", "causal_conv", "causal_conv_backward",
         "scan_step", "mamba_step")


@native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_any_strides_of_any_argument(name: str, layout: str) -> None:
    operator, args = cases()[name]
    for place, value in enumerate(args):
        if not isinstance(value, Tensor):
            continue
        changed = LAYOUTS[layout](value)
        given, plain = list(args), list(args)
        given[place], plain[place] = changed, changed.contiguous()
        results = 2 if name == "selective_scan" else None  # what it keeps is padded by anything
        for one, two in zip(operator(*given)[:results], operator(*plain)[:results], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@native
@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused_or_taken(name: str) -> None:
    """Each argument in turn, and two at random: another shape, dtype, device, None or no tensor."""
    rng = random.Random(0)
    operator, args = cases()[name]
    places = [i for i, value in enumerate(args) if isinstance(value, Tensor)]
    wrong: list[Callable[[Tensor], Any]] = [
        lambda t: None, lambda t: t[..., :-1], lambda t: t[1:], lambda t: t[None],
        lambda t: t.long(), lambda t: t.to(torch.complex64), lambda t: t.double(),
        lambda t: t.flatten(), lambda t: t.new_empty(0), lambda t: t.bfloat16(),
        lambda t: 3.0, lambda t: "u", lambda t: t.sum()]
    trials = [{place: change} for place in places for change in [*wrong, lambda t: t.to("meta")]]
    trials += [{p: rng.choice(wrong) for p in rng.sample(places, 2)} for _ in range(40)]
    for trial in trials:
        given = [trial[i](v) if i in trial else v for i, v in enumerate(args)]
        # Ours, or torch's own of what is no tensor or has no data; or it is taken, as it may fit.
        with contextlib.suppress(UserError, RuntimeError, TypeError, NotImplementedError):
            operator(*given)


@native
def test_the_scan_that_ended_the_process() -> None:
    u, delta, A, b, c, *_ = scan_inputs()
    for form in ("auto", "fused", "chunked", "recurrent"):
        with pytest.raises(UserError, match="delta is None"):
            selective_scan(u, None, A, b, c, form=form)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"u is torch\.int64"):
            selective_scan(u.long(), delta, A, b, c, form=form)
    with pytest.raises(UserError, match="x is None"):
        causal_conv(None, u, None)  # type: ignore[arg-type]


@native
def test_an_empty_batch_is_empty() -> None:
    inputs = [t[:0] if t.ndim == 3 else t for t in scan_inputs()]
    leaves = [t.requires_grad_() for t in inputs]
    for form in ("fused", "chunked"):
        y, state = selective_scan(*leaves[:5], form=form)
        assert (y.shape, state.shape) == ((0, L, D), (0, D, N))
        found = torch.autograd.grad(y.sum() + state.sum(), leaves[:5])
        assert not found[2].any()
    y, last = causal_conv(leaves[0], normal(D, K), None)
    assert (y.shape, last.shape) == ((0, L, D), (0, K - 1, D))


@native
@pytest.mark.parametrize("wide", range(5))
def test_auto_takes_float64_beside_float32(wide: int) -> None:
    inputs = scan_inputs()[:5]
    wanted, _ = selective_scan(*(t.double() for t in inputs), form="recurrent")
    inputs[wide] = inputs[wide].double()
    y, state = selective_scan(*inputs)
    assert y.dtype == inputs[0].dtype
    assert state.dtype == torch.float64
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)


def scalar(form: str, rest: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def loss(u: Tensor) -> Tensor:
        y, state = selective_scan(causal_conv(u, rest[5], None, None, True)[0], *rest[1:5],
                                  form=form)
        return y.sin().sum() + state.cos().sum()

    return loss


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, u: torch.func.grad(f)(u),
    "jvp": lambda f, u: torch.func.jvp(f, (u,), (torch.ones_like(u),))[1],
    "jacfwd": lambda f, u: torch.func.jacfwd(f)(u),
    "jacrev": lambda f, u: torch.func.jacrev(f)(u),
    "hessian": lambda f, u: torch.func.hessian(f)(u),
    "vmap": lambda f, u: torch.func.vmap(f)(torch.stack([u, 2 * u])),
    "vmap over grad": lambda f, u: torch.func.vmap(torch.func.grad(f))(torch.stack([u, 2 * u])),
    "double backward": torch.autograd.functional.hessian,
}


@native
@pytest.mark.parametrize("form", ["auto", "fused", "chunked"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_those_of_the_definition(name: str, form: str) -> None:
    rest = [t.double()[..., :6, :] if t.ndim == 3 else t.double() for t in scan_inputs()[:5]]
    rest = [t[:1] if t.ndim == 3 else t for t in rest] + [normal(D, K).double()]
    transform = TRANSFORMS[name]
    torch.testing.assert_close(transform(scalar(form, rest), rest[0]),
                               transform(scalar("recurrent", rest), rest[0]))


def test_the_dtypes_of_a_step_are_those_of_the_kernels() -> None:
    assert set(step.DTYPES) < set(fused._DTYPES["cpu"])
