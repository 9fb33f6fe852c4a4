"""A small run of every kernel, for CUDA's memory and race checker (a minute a tool)::

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 --report-api-errors no \\
            python -m pytest -m gpu tests/gpu/test_gpu_sanitizer.py
    done

Without the caching allocator each tensor is an allocation of its own, so that memcheck sees the
first byte past it.
"""

from __future__ import annotations

import mixer_cases
import pytest
import torch
from scan_cases import make_inputs, results

from mambabyte.ops.conv.operator import fused_causal_conv
from mambabyte.ops.mamba.fused import fused_mixer
from mambabyte.ops.mamba.step import mamba_step, scan_step

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "states"),
    [((2, 20, 40), 16), ((1, 1, 8), 16), ((2, 9, 5), 3), ((1, 700, 8), 16), ((1, 130, 3), 64)],
)
def test_scan(shape: tuple[int, int, int], states: int, dtype: torch.dtype) -> None:
    for name, tensor in results(make_inputs(*shape, states, dtype)).items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 37, 24), (1, 2, 3)])
def test_convolution(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch, _, channels = shape
    x = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    tail = torch.randn(batch, 3, channels, device="cuda").to(dtype).requires_grad_()
    weight, bias = (torch.randn(channels, *k, device="cuda").requires_grad_() for k in ((4,), ()))
    y, last = fused_causal_conv(x, weight, bias, tail)
    for gradient in torch.autograd.grad(y.sum() + last.sum(), (x, weight, bias, tail)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 37, 40, 8), (1, 1, 8, 8), (2, 20, 7, 3)])
def test_mixer(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs = mixer_cases.make_inputs(*shape, dtype=dtype)
    for name, tensor in mixer_cases.results(fused_mixer, inputs).items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("channels", [40, 71])
def test_step(channels: int) -> None:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda")

    x, z = random(2, 3, channels)
    tail, state = random(3, 3, channels), random(3, channels, 16)
    weights = random(channels, 4), random(channels), random(35, channels), random(channels, 3)
    A = -random(channels, 16).abs()
    for tensor in mamba_step(x, z, tail, state, *weights, random(channels), A, random(channels)):
        assert tensor.isfinite().all()
    B, C = random(2, 3, 16)
    for tensor in scan_step(x, z, A, B, C, None, None, None, state, True):
        assert tensor.isfinite().all()
