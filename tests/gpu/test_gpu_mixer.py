"""The operator between a layer's large projections on the GPU: it is what the layer composes."""

from __future__ import annotations

import re
from dataclasses import replace

import mixer_cases
import pytest
import torch
from mixer_cases import composed
from scan_cases import poison, relative_rms
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from analysis.measure.allocations import autocast_to, saved_storages
from analysis.theory.kept_tensors import AUTOCASTS, Autocast, saved_terms
from mambabyte.config import ModelConfig
from mambabyte.errors import UserError
from mambabyte.model.families.mamba import MambaMixer
from mambabyte.ops.mamba.fused import fused_mixer

# What torch itself warns of depends on the machine.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

SHAPES = [  # batch, length, channels, rank, taps, states
    (16, 128, 384, 16, 4, 16),
    (2, 517, 384, 12, 4, 16),  # rows that are not on 16 bytes; an odd length
    (1, 4099, 64, 8, 4, 16),  # segments
    (40, 40, 1024, 32, 4, 16),  # several sequences walked as one
    (3, 1, 64, 8, 4, 16),
    (2, 7, 64, 8, 2, 16),  # shorter than a chunk
    (2, 30, 33, 3, 3, 5),
    (16, 128, 384, None, 4, 16),  # of full rank
    (2, 30, 33, None, 3, 5),
]
CONFIG = ModelConfig(d_model=96, n_layer=1, dt_rank=12)  # a rank that is padded


@pytest.mark.parametrize("dtype", list(mixer_cases.LIMIT))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_parity(training: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = mixer_cases.make_inputs(*shape, dtype=dtype)
    exact = mixer_cases.definition(inputs, training)
    composition = mixer_cases.results(composed, inputs, training)
    poison(64)
    found = mixer_cases.results(fused_mixer, inputs, training)
    mixer_cases.assert_as_good(found, composition, exact, dtype)
    poison(64)
    again = mixer_cases.results(fused_mixer, inputs, training)
    assert all(torch.equal(found[name], again[name]) for name in found)


def layer_results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y, state = layer(x, None)
    loss = y.float().square().sum() + state.conv_state.float().sum() + state.ssm_state.sum()
    return [y.detach(), *(s.detach() for s in state),
            *torch.autograd.grad(loss, [x, *layer.parameters()])]


def made(config: ModelConfig = CONFIG) -> tuple[MambaMixer, Tensor]:
    torch.manual_seed(0)
    return MambaMixer(config).cuda(), torch.randn(3, 100, config.d_model, device="cuda")


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_a_layer_does_what_it_composes(
    autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = made()
    with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
        one = layer_results(layer, x)
        monkeypatch.setattr(MambaMixer, "_is_one_operator", lambda *_: False)
        two = layer_results(layer, x)
    limit = 1e-5 if autocast is None else 1e-2
    for a, b in zip(one, two, strict=True):
        assert a.dtype == b.dtype
        assert relative_rms(a, b) < limit


def test_a_layer_in_lower_precision() -> None:
    layer, x = made()
    y, _ = layer(x, None)
    z, state = layer.bfloat16()(x.bfloat16(), None)
    assert (z.dtype, state.conv_state.dtype, state.ssm_state.dtype) == (
        torch.bfloat16, torch.bfloat16, torch.float32)
    assert relative_rms(z, y) < 2e-2


def test_a_sequence_goes_on_from_its_state() -> None:
    layer, x = made()
    whole, end = layer(x, None)
    first, state = layer(x[:, :41], None)
    second, last = layer(x[:, 41:], state)
    assert relative_rms(torch.cat([first, second], 1), whole) < 1e-5
    assert torch.equal(last.conv_state, end.conv_state)
    assert relative_rms(last.ssm_state, end.ssm_state) < 1e-5


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_layer_compiles_without_a_graph_break(dynamic: bool) -> None:
    layer, x = made()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for one, two in zip(layer_results(compiled, x), layer_results(layer, x), strict=True):
            assert relative_rms(one, two) < 1e-2


def test_the_compiled_backward_joins_nothing() -> None:
    """No kernel puts gradients side by side. (Weights of an uneven rank are, to pad them.)"""
    layer, x = made(replace(CONFIG, dt_rank=8))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        layer_results(compiled, x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            layer_results(compiled, x)
            torch.cuda.synchronize()
    names = [e.key for e in profiler.key_averages()]
    assert any("tile_backward" in name for name in names)
    assert not any(re.search("CatArray|_cat", name) for name in names), names


def test_a_cuda_graph_replays_forward_and_backward() -> None:
    layer, x = made()
    with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        eager = layer_results(layer, x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer_results(layer, x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer_results(layer, x)
    x.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(captured[0], eager[0])
    x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for one, two in zip(captured, eager, strict=True):
        assert relative_rms(one, two) < 1e-5


def test_opcheck() -> None:
    inputs = mixer_cases.make_inputs(2, 20, 64, 8, dtype=torch.bfloat16)
    tensors = [t.requires_grad_() for t in inputs.values()]
    torch.library.opcheck(torch.ops.mambabyte.mixer.default, (*tensors, None, True))


def test_checkpointing_gives_the_same_gradients() -> None:
    inputs = mixer_cases.make_inputs(2, 96, 64, 8, dtype=torch.bfloat16)
    plain = mixer_cases.results(fused_mixer, inputs)
    again = mixer_cases.results(
        lambda *given: checkpoint(fused_mixer, *given, use_reentrant=False), inputs)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_it_takes_no_more_memory_than_the_composition() -> None:
    inputs = mixer_cases.make_inputs(16, 1024, 384, 16, dtype=torch.bfloat16)
    tensors = [t.requires_grad_() for t in inputs.values()]
    kept, peaks = [], []
    for function in (composed, fused_mixer):
        torch.autograd.grad(function(*tensors)[0].float().sum(), tensors)  # cuBLAS' workspaces
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y, *_ = function(*tensors)
        kept.append(torch.cuda.memory_allocated() - before)
        dy = torch.ones_like(y)
        torch.autograd.grad(y, tensors, dy)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del y, dy, _
    assert kept[1] <= kept[0]
    assert peaks[1] <= 1.02 * peaks[0]


@pytest.mark.parametrize("autocast", AUTOCASTS)
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, dt_rank=8)])
def test_a_layer_keeps_what_the_closed_form_says(config: ModelConfig, autocast: Autocast) -> None:
    layer, x = made(config)
    x.requires_grad_()
    with autocast_to("cuda", autocast):
        kept = sum(size for _, size in saved_storages(lambda: layer(x, None)[0], layer))
    terms = [t for t in saved_terms(config, *x.shape[:2], autocast, "cuda") if t.layer == 0]
    outside = [t for t in terms if t.part == "norm" and t.tensor != "output"]
    assert kept == sum(t.bytes for t in terms) - sum(t.bytes for t in outside)


def test_without_gradients_nothing_is_kept() -> None:
    inputs = mixer_cases.make_inputs(4, 4096, 256, 16, dtype=torch.bfloat16)
    fused_mixer(*inputs.values())
    before = torch.cuda.memory_allocated()
    y, tail, state = fused_mixer(*inputs.values())
    outputs = sum(t.numel() * t.element_size() for t in (y, tail, state))
    assert torch.cuda.memory_allocated() - before < 1.1 * outputs


@pytest.mark.parametrize(("name", "change"), [
    ("xz", Tensor.cpu), ("xz", lambda t: t[..., :-1]), ("x_proj", lambda t: t[:-1]),
    ("A", lambda t: t.expand(2, -1, -1)), ("dt_proj", Tensor.double), ("conv_bias", Tensor.cpu),
    ("D", lambda t: t[:-1]),
])  # fmt: skip
def test_refuses_what_does_not_fit(name: str, change) -> None:
    inputs = mixer_cases.make_inputs(2, 20, 64, 8)
    with pytest.raises(UserError, match=name):
        fused_mixer(*(inputs | {name: change(inputs[name])}).values())
