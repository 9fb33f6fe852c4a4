"""Attention over a sliding window on the GPU: blocks against the dense mask, compiled too."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from scan_cases import relative_rms
from torch import Tensor

from mambabyte.config import ModelConfig
from mambabyte.model import AttentionMixer
from mambabyte.ops.arguments import document_ages, once
from mambabyte.ops.fused import attention
from mambabyte.ops.fused.attention import windowed_attention

# What torch itself warns of depends on the machine.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def dense(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The definition, in float64."""
    length, before = q.shape[2], k.shape[2] - q.shape[2]
    age = (torch.arange(before, before + length)[:, None] - torch.arange(before + length)).cuda()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill((age < 0) | (age >= window), -torch.inf).softmax(-1) @ v


def inputs(length: int, before: int) -> list[Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(0)
    return [torch.randn(2, heads, positions, 32, generator=generator, device="cuda")
            for heads, positions in ((4, length), (2, before + length), (2, before + length))]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("window", "length", "before"), [
    (64, 64, 0), (64, 65, 0), (64, 300, 0), (64, 1, 63), (64, 200, 40), (100, 333, 0)])
def test_blocks_equal_the_dense_mask(
    window: int, length: int, before: int, dtype: torch.dtype, compiled: bool
) -> None:
    torch._dynamo.reset()
    function = torch.compile(windowed_attention, dynamic=False) if compiled else windowed_attention
    mine = [x.to(dtype).requires_grad_() for x in inputs(length, before)]
    exact = [x.detach().double().requires_grad_() for x in mine]
    y, reference = function(*mine, window), dense(*exact, window)
    weight = torch.randn_like(reference)
    grads = torch.autograd.grad((y * weight.to(dtype)).sum(), mine)
    wanted = torch.autograd.grad((reference * weight.to(dtype).double()).sum(), exact)
    assert relative_rms(y, reference) < LIMIT[dtype]
    for found, expected in zip(grads, wanted, strict=True):
        assert relative_rms(found, expected) < LIMIT[dtype]


def test_memory_is_linear_in_the_length() -> None:
    def peak(length: int) -> int:
        q, k, v = (x.bfloat16().requires_grad_() for x in inputs(length, 0))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        windowed_attention(q, k, v, 128).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    peak(1024)  # the libraries' own
    assert peak(16384) < 2.2 * peak(8192)


@pytest.mark.parametrize(("window", "length"), [(64, 300), (100, 128), (256, 1000), (1024, 2049)])
def test_a_compiled_step_attends_as_an_eager_one(window: int, length: int) -> None:
    torch._dynamo.reset()
    config = ModelConfig(d_model=96, n_layer=1, layer_pattern="A", n_head=3, n_kv_head=1,
                         attention_window=window)
    mixer = AttentionMixer(config).cuda().bfloat16()
    x = torch.randn(2, length, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = [x, *mixer.parameters()]
    wanted = mixer(x, None)[0]
    expected = torch.autograd.grad(wanted.square().sum(), weights)
    mixer.prepare(length)
    compiled = torch.compile(lambda x: mixer(x, None)[0], dynamic=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        y = compiled(x)
        found = torch.autograd.grad(y.square().sum(), weights)
    assert any("flex" in event.key for event in profile.key_averages())
    assert relative_rms(y, wanted) < 2e-2
    for one, two in zip(found, expected, strict=True):
        assert relative_rms(one, two) < 2e-2


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(("window", "length", "width"), [
    (64, 300, 32), (400, 300, 64), (17, 99, 8)])
def test_documents_by_flash_attention(
    window: int, length: int, width: int, captured: bool
) -> None:
    """Values and gradients of each document are those of a call of its own; in a graph that is
    replayed for other documents too."""
    mine = [torch.randn(3, heads, length, width, device="cuda").bfloat16().requires_grad_()
            for heads in (4, 2, 2)]
    weight = torch.randn_like(mine[0])
    starts = torch.zeros(3, length, dtype=torch.bool, device="cuda")

    def call() -> list[Tensor]:
        ages = document_ages(starts, mine[0][:, 0])
        assert ages is not None
        once(ages, "most", lambda: 17)
        y = attention.flash_documents(*mine, window, ages)
        assert y is not None
        return [y.detach(), *torch.autograd.grad(y, mine, weight)]

    def others() -> None:
        starts.zero_()
        for row in starts:
            row[torch.randperm(length)[:4].cuda()] = True

    others()
    found = call()
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()
        others()
        graph.replay()
    exact = [x.detach().double().requires_grad_() for x in mine]
    y = attention.each_document(partial(dense, window=window), *exact, starts,
                           torch.zeros(3, dtype=torch.int64))
    wanted = [y, *torch.autograd.grad(y, exact, weight.double())]
    for one, two in zip(found, wanted, strict=True):
        assert relative_rms(one, two) < 1e-2


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("window", "length", "before"), [
    (64, 65, 0), (64, 300, 0), (100, 333, 0), (128, 1000, 0), (1, 40, 0), (64, 2, 63),
    (64, 200, 40), (17, 99, 300)])
def test_a_window_by_flash_attention(
    window: int, length: int, before: int, dtype: torch.dtype, captured: bool
) -> None:
    """Values and gradients are those of the dense mask, behind keys of a past and in a graph."""
    mine = [x.to(dtype).requires_grad_() for x in inputs(length, before)]
    weight = torch.randn_like(mine[0])

    def call() -> list[Tensor]:
        y = attention.flash_window(*mine, window)
        assert y is not None
        return [y.detach(), *torch.autograd.grad(y, mine, weight)]

    found = call()
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()
        graph.replay()
    exact = [x.detach().double().requires_grad_() for x in mine]
    y = dense(*exact, window)
    wanted = [y, *torch.autograd.grad(y, exact, weight.double())]
    for one, two in zip(found, wanted, strict=True):
        # (a window of one has the gradient 0 in queries and keys)
        assert (one.double() - two).norm() <= 1e-2 * two.norm() + 1e-3 * (window == 1)


def test_a_window_of_a_training_step_is_the_same_bits_every_time() -> None:
    """A query's gradient is a sum over the tiles of keys that it reaches, added as they come: two
    of them, of a window up to a tile."""
    mine = [x.bfloat16().requires_grad_() for x in inputs(2000, 0)]
    weight = torch.randn_like(mine[0])
    first, *others = (torch.autograd.grad(attention.flash_window(*mine, 128), mine, weight)
                      for _ in range(5))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_local_attention_is_flash_attention_eagerly_and_blocks_in_float32() -> None:
    mixer = AttentionMixer(ModelConfig(d_model=96, n_layer=1, layer_pattern="A", n_head=3,
                                       n_kv_head=1, attention_window=64)).cuda()
    x = torch.randn(2, 300, 96, device="cuda")

    def kernels(x: Tensor) -> str:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            y = mixer.to(x.dtype)(x, None)[0]
        found.append(y)
        return " ".join(event.key for event in profile.key_averages())

    found: list[Tensor] = []
    assert "flash_fwd" not in kernels(x)
    assert "flash_fwd" in kernels(x.bfloat16())
    assert relative_rms(found[1], found[0]) < 2e-2
