"""The convolution's kernels, run on the CPU lane by lane, against the plain form in float64."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from emulate import TAPS
from torch import Tensor

from mambabyte.ops.arguments import document_ages
from mambabyte.ops.compare import relative_rms
from mambabyte.ops.conv import cuda as cuda_conv
from mambabyte.ops.conv.dispatch import causal_conv
from mambabyte.ops.conv.operator import torch_causal_conv

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("convolution"),
]
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 3e-3}


def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("batch", "length", "channels"), [
    (2, 1, 8), (1, 3, 7), (2, 33, 8), (1, 150, 12), (3, 64, 4)])
@pytest.mark.parametrize("carried", [True, False])
def test_parity(batch, length, channels, silu, dtype, carried) -> None:
    torch.manual_seed(length)
    both = made(batch, length, 2 * channels, dtype=dtype)
    x = both[..., :channels]  # as a half of a projection: rows are not next to each other
    weight, bias = made(channels, TAPS), made(channels)
    tail = made(batch, TAPS - 1, channels, dtype=dtype) if carried else None
    dy = made(batch, length, channels, dtype=dtype)
    dlast = made(batch, TAPS - 1, channels, dtype=dtype) if carried else None
    inputs = [x, weight, bias, *([tail] if carried else [])]
    exact = [t.double().requires_grad_() for t in inputs]
    y, last = causal_conv(*exact)
    y = F.silu(y) if silu else y
    found_y, found_last = cuda_conv.forward(x, weight, bias, tail, silu)
    assert relative_rms(found_y, y.detach()) < LIMIT[dtype]
    assert torch.equal(found_last.double(), last.detach())
    upstream = ([y, last], [dy.double(), dlast.double()]) if carried else ([y], [dy.double()])
    true = torch.autograd.grad(upstream[0], exact, upstream[1])
    found = cuda_conv.backward(dy, dlast, x, weight, bias, tail, silu)
    for name, one, two in zip(("x", "weight", "bias", "tail"), found, true, strict=False):
        assert relative_rms(one, two) < (1e-5 if one.dtype == torch.float32 else 3e-3), name
    again = cuda_conv.backward(dy, dlast, x, weight, bias, tail, silu)
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))


def document_starts(length: int) -> Tensor:
    """Of two rows: at 0, one after another, at the last step; and within, none at 0."""
    starts = torch.zeros(2, length, dtype=torch.bool)
    starts[0, [0, 1, 3, 16, length - 1]] = True
    starts[1, [15, 17, 32, 33, 34]] = True
    return starts


@pytest.mark.parametrize("silu", [True, False])
def test_documents(silu: bool) -> None:
    torch.manual_seed(1)
    x, weight, bias = made(2, 70, 8), made(8, TAPS), made(8)
    tail, dy, dlast = made(2, TAPS - 1, 8), made(2, 70, 8), made(2, TAPS - 1, 8)
    ages = document_ages(document_starts(70), x)
    found = [*cuda_conv.forward(x, weight, bias, tail, silu, ages),
             *cuda_conv.backward(dy, dlast, x, weight, bias, tail, silu, ages=ages)]
    exact = [t.double().requires_grad_() for t in (x, weight, bias, tail)]
    true = torch_causal_conv(*exact, silu, ages)
    true = [*true, *torch.autograd.grad(true, exact, [dy.double(), dlast.double()])]
    for one, two in zip(found, true, strict=True):
        assert relative_rms(one, two.detach()) < 1e-6
    assert not found[5][0].any()  # the first row starts anew


def test_what_is_not_a_number_stays_where_it_is() -> None:
    """Beyond the end nothing is read, and a nan reaches its own K positions alone."""
    x, dy = made(1, 21, 4), made(1, 21, 4)
    weight = made(4, TAPS)
    x[0, 9, 2] = float("nan")
    y, _ = cuda_conv.forward(x, weight, None, None, True)
    assert y[0, :, 2].isnan().nonzero()[:, 0].tolist() == [9, 10, 11, 12]
    assert y[0, :, [0, 1, 3]].isfinite().all()
    dx, *_ = cuda_conv.backward(dy, None, x, weight, None, None, True)
    assert dx[0, :, 2].isnan().nonzero()[:, 0].tolist() == list(range(6, 13))
    assert dx[0, :, [0, 1, 3]].isfinite().all()
