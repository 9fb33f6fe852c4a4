"""The CPU's convolution in C against its definition in float64: values, gradients, odd shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.ops.compare import relative_rms
from mambabyte.ops.conv import dispatch as module
from mambabyte.ops.conv.cpu import available
from mambabyte.ops.conv.dispatch import causal_conv
from mambabyte.ops.scan.cpu import conv_step

pytestmark = pytest.mark.skipif(not available(torch.float32), reason="needs a C compiler")
SHAPES = [(1, 1, 1), (2, 2, 5), (1, 3, 16), (3, 7, 70), (2, 33, 130)]


def definition(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None,
               silu: bool) -> tuple[Tensor, Tensor]:
    """Tap by tap."""
    taps, length = weight.shape[1], x.shape[1]
    before = x.new_zeros(len(x), taps - 1, x.shape[2]) if tail is None else tail
    padded = torch.cat([before, x], 1)
    y = sum((padded[:, k : k + length] * weight[:, k] for k in range(taps)), torch.zeros_like(x))
    y = y if bias is None else y + bias
    return (F.silu(y) if silu else y), padded[:, length:]


def make(shape: tuple[int, int, int], taps: int, bias: bool, tail: bool, dtype: torch.dtype,
         ) -> list[Tensor | None]:
    batch, length, channels = shape
    g = torch.Generator().manual_seed(7)
    wide = torch.randn(batch, length, 2 * channels, generator=g, dtype=torch.float64)
    drawn = [
        wide[..., channels:],  # as in_proj leaves it: rows of another length
        torch.randn(channels, taps, generator=g, dtype=torch.float64),
        torch.randn(channels, generator=g, dtype=torch.float64) if bias else None,
        torch.randn(batch, taps - 1, channels, generator=g, dtype=torch.float64) if tail else None]
    return [None if t is None else t.to(dtype).requires_grad_() for t in drawn]


def results(function: object, inputs: list[Tensor | None], silu: bool) -> list[Tensor]:
    y, last = function(*inputs, silu)  # type: ignore[operator]
    g = torch.Generator().manual_seed(8)
    w = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)
    v = torch.randn(last.shape, generator=g, dtype=torch.float64).to(y.dtype)
    leaves = [t for t in inputs if t is not None]
    return [y, last, *torch.autograd.grad((y * w).sum() + (last * v).sum(), leaves)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("taps", [2, 4, 7])
def test_values_and_gradients_are_those_of_the_definition(
    shape: tuple[int, int, int], taps: int
) -> None:
    for bias, tail, silu in itertools.product((True, False), repeat=3):
        # rounding of one value in float32 is 6e-8; sums over batch and time may cancel
        for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
            inputs = make(shape, taps, bias, tail, dtype)
            exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
            assert module.fits(*inputs[:3])  # type: ignore[arg-type]
            for found, expected in zip(results(causal_conv, inputs, silu),
                                       results(definition, exact, silu), strict=True):
                scale = expected.norm() + 1e-2 * expected.numel() ** 0.5
                assert (found.double() - expected).norm() <= tolerance * scale


def test_defaults_of_torch_and_other_dtypes_change_nothing() -> None:
    inputs = make((1, 6, 5), 4, True, False, torch.float32)
    expected = results(causal_conv, inputs, True)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        x, weight, bias, _ = inputs
        y, _ = causal_conv(x, weight, bias, None, True)  # type: ignore[arg-type]
        dx, = torch.autograd.grad(y, x, torch.ones(y.shape, dtype=y.dtype, device="cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(y, expected[0])
    assert dx.device.type == "cpu"
    # By torch in the widest type, not bits read as numbers.
    y, _ = causal_conv(x, weight, bias.double(), None, True)  # type: ignore[union-attr]
    assert y.dtype == torch.float32
    assert torch.allclose(y, expected[0], rtol=1e-5, atol=1e-6)


def test_torch_func_differentiates_through_it() -> None:
    inputs = make((1, 6, 5), 4, True, False, torch.float64)
    x, weight, bias, _ = [None if t is None else t.detach() for t in inputs]
    grad = torch.func.grad(lambda t: causal_conv(t, weight, bias, None, True)[0].sum())(x)
    y, _ = causal_conv(inputs[0], weight, bias, None, True)  # type: ignore[arg-type]
    assert torch.allclose(grad, torch.autograd.grad(y.sum(), inputs[0])[0])  # type: ignore


def test_gradcheck() -> None:
    inputs = make((2, 5, 3), 4, True, True, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: causal_conv(*t, True), inputs)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit() -> None:
    inputs = make((3, 40, 300), 4, True, True, torch.float32)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(results(causal_conv, inputs, True))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_nothing_is_left_uninitialised() -> None:
    torch.use_deterministic_algorithms(True)  # fills new memory with nan
    try:
        inputs = make((2, 9, 21), 4, True, True, torch.float32)
        assert all(t.isfinite().all() for t in results(causal_conv, inputs, True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_not_a_number_and_infinity_go_where_the_definition_sends_them() -> None:
    inputs = make((1, 12, 4), 4, True, False, torch.float32)
    with torch.no_grad():
        inputs[0][0, 3, 1], inputs[0][0, 5, 2] = float("nan"), float("inf")  # type: ignore[index]
        y, _ = causal_conv(*inputs, False)  # type: ignore[arg-type]
        expected, _ = definition(*inputs, False)  # type: ignore[arg-type]
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


def test_two_parts_are_the_whole() -> None:
    inputs = make((2, 17, 33), 4, True, True, torch.float32)
    x, weight, bias, tail = inputs
    whole, end = causal_conv(x, weight, bias, tail, True)  # type: ignore[arg-type]
    for cut in (1, 2, 9, 16):
        first, between = causal_conv(x[:, :cut], weight, bias, tail, True)  # type: ignore
        second, last = causal_conv(x[:, cut:], weight, bias, between, True)  # type: ignore
        assert torch.equal(torch.cat([first, second], 1), whole)
        assert torch.equal(last, end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_conv_step(dtype: torch.dtype, taps: int) -> None:
    batch, length, channels = 3, 9, 37
    x = torch.randn(batch, length, channels).to(dtype)
    params = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = torch.randn(channels, 1, taps).to(params), torch.randn(channels).to(params)
    tail = torch.randn(batch, taps - 1, channels).to(dtype)
    padded = torch.cat([tail, x], 1)
    wide = padded.double().transpose(1, 2)
    want = F.silu(F.conv1d(wide, weight.double(), bias.double(), groups=channels)).transpose(1, 2)
    for t in range(length):
        y, tail = conv_step(x[:, t], weight, bias, tail)
        assert torch.equal(tail, padded[:, t + 1 : t + taps])
        limit = {torch.bfloat16: 3e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
        assert y.dtype == dtype
        assert relative_rms(y, want[:, t]) <= limit
