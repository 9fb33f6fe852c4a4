"""The kernels that join what torch.compile would, run on the CPU lane by lane, against their forms
in torch in float64: results and every gradient, and the same bits again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.compare import relative_rms
from mambabyte.ops.fused import cuda
from mambabyte.ops.fused.activation import activate, activate_in_torch
from mambabyte.ops.fused.linear import linear
from mambabyte.ops.fused.loss import cross_entropy, cross_entropy_in_torch
from mambabyte.ops.fused.norm import Norm, Streams, mix_norm, mix_norm_in_torch
from mambabyte.ops.fused.rotary import rotate_qkv, rotate_qkv_in_torch

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("fused"),
]
FLOAT, BF16 = torch.float32, torch.bfloat16
LIMIT = {FLOAT: 2e-6, BF16: 4e-3}


def compared(
    found: Callable[..., Any], wanted: Callable[..., Any], tensors: list[Tensor | None],
    dtype: torch.dtype,
) -> None:
    """Both functions of the tensors, the second in float64: equal to ``dtype``'s rounding, in value
    and in the gradient of a random projection; the first twice, with the same bits."""

    def run(function: Callable[..., Any], given: list[Tensor | None]) -> list[Tensor]:
        leaves = [t for t in given if t is not None and t.requires_grad]
        results = function(*given)
        results = [results] if isinstance(results, Tensor) else [
            r for r in results if r is not None and r.numel()]
        torch.manual_seed(5)
        weights = [torch.randn(r.shape).bfloat16() for r in results]  # in any dtype the same
        grads = torch.autograd.grad(results, leaves, [
            w.to(r.dtype) for r, w in zip(results, weights, strict=True)])
        return [*results, *grads]

    mine = [t if t is None or not t.is_floating_point() else t.clone().requires_grad_()
            for t in tensors]
    exact = [t if t is None or not t.is_floating_point() else
             t.detach().double().requires_grad_() for t in mine]
    one, again, true = run(found, mine), run(found, mine), run(wanted, exact)
    for number, (a, b, c) in enumerate(zip(one, again, true, strict=True)):
        assert torch.equal(a, b)
        assert relative_rms(a.detach(), c.detach()) < LIMIT[dtype], number


@pytest.mark.parametrize(("kind", "channels", "wide", "given"), [
    ("layer", 40, FLOAT, "y weight bias"), ("rms", 24, FLOAT, ""),
    ("rms", 5, BF16, "y z e weight x_gain y_gain e_gain"), ("none", 24, FLOAT, "y y_gain"),
    ("rms", 136, FLOAT, "y z e x_gain y_gain z_gain e_gain")])
def test_norm(kind: str, channels: int, wide: torch.dtype, given: str) -> None:
    torch.manual_seed(channels)
    names = given.split()
    streams = {n: torch.randn(2, 9, channels).to(BF16 if n == "y" else wide)
               for n in ("x", *(n for n in names if len(n) == 1))}
    gains = {n: torch.randn(channels) for n in names if len(n) > 1}
    all_names = [*streams, *gains]

    def call(function: Any, dtype: torch.dtype) -> Callable[..., Any]:
        def run(*tensors: Tensor) -> Any:
            values = dict(zip(all_names, tensors, strict=True))
            norm = Norm(kind, 1e-3, values.pop("weight", None), values.pop("bias", None))
            return function(Streams(**values), norm, dtype, first=channels != 5)

        return run

    compared(call(mix_norm, BF16), call(mix_norm_in_torch, torch.float64),
             [*streams.values(), *gains.values()], BF16)


def test_rows_with_more_channels_than_registers_go_through_torch(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*_: object) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(cuda, "launch", launch)
    norm = Norm("rms", 1e-3)
    wide = Streams(torch.randn(1, 2052), torch.randn(1, 2052).bfloat16())
    plain = mix_norm_in_torch(wide, norm, BF16)
    assert torch.equal(mix_norm(wide, norm, BF16).normed, plain.normed)
    with pytest.raises(AssertionError, match="launched"):
        mix_norm(Streams(torch.randn(1, 2048)), norm, BF16)


@pytest.mark.parametrize(("width", "norm", "gain", "dtype"), [
    (64, True, True, BF16), (24, False, False, FLOAT), (6, True, False, FLOAT)])
@pytest.mark.long
def test_rotary(width: int, norm: bool, gain: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    qkv = torch.randn(2, 7, 7 * width).to(dtype)  # three heads of queries, two of keys
    angle = torch.rand(7, width // 2)
    gains = torch.randn(3) if gain else None

    def call(function: Any) -> Callable[..., Any]:
        def run(qkv: Tensor, gain: Tensor | None) -> Any:
            return function(qkv, (3, 2), (angle.cos(), angle.sin()), gain, norm)

        return run

    compared(call(rotate_qkv), call(rotate_qkv_in_torch), [qkv, gains], dtype)


@pytest.mark.long
def test_bias() -> None:
    torch.manual_seed(0)
    compared(linear, torch.nn.functional.linear,
             [torch.randn(3, 37, 8), torch.randn(12, 8), torch.randn(12)], FLOAT)


@pytest.mark.parametrize(("kind", "shape", "dtype"), [
    ("relu2", (3, 40), BF16), ("silu", (5, 7), FLOAT), ("gelu", (3, 40), FLOAT)])
@pytest.mark.long
def test_activation(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    compared(lambda x: activate(x, kind), lambda x: activate_in_torch(x, kind),
             [torch.randn(shape).to(dtype)], dtype)


@pytest.mark.parametrize(("symbols", "cap", "guided", "dtype"), [
    (256, 15.0, True, BF16), (75, 0.0, False, FLOAT), (300, 2.0, False, FLOAT)])
@pytest.mark.long
def test_loss(symbols: int, cap: float, guided: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(symbols)
    logits, targets = 3 * torch.randn(11, symbols), torch.randint(symbols, (11,))
    offset = torch.randn(11, symbols).half() if guided else None

    def call(function: Any) -> Callable[..., Any]:
        def run(logits: Tensor, gate: Tensor | None) -> Tensor:
            return function(logits, targets, cap, gate, offset)

        return run

    gate = torch.randn(11, 1).to(dtype) if guided else None
    compared(call(cross_entropy), call(cross_entropy_in_torch), [logits.to(dtype), gate], dtype)


def test_what_is_no_symbol_or_no_number_shows() -> None:
    logits = torch.zeros(2, 8)
    assert cross_entropy(logits, torch.tensor([3, 8])).isnan()
    logits[1, 2] = torch.nan
    assert cross_entropy(logits, torch.tensor([3, 3])).isnan()
    x = torch.tensor([1.0, torch.nan, -torch.inf])
    assert activate(x, "relu2").isnan().tolist() == [False, True, True]


def test_the_gradient_of_a_gradient_is_right_or_refused() -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).requires_grad_() for shape in ((5, 8), (12, 8), (12,)))
    found = []
    for function in (linear, torch.nn.functional.linear):
        y = function(x, weight, bias).square().sum()
        (first,) = torch.autograd.grad(y, bias, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, weight, bias]))
    assert all(torch.allclose(a, b) for a, b in zip(*found, strict=True))
    y = activate(x, "relu2").sum()
    with pytest.raises(UserError, match="no gradient of a gradient"):
        torch.autograd.grad(y, x, create_graph=True)
