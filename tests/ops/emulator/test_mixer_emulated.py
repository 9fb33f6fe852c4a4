"""The operator between the large projections against its parts joined by autograd, all of them on
emulated kernels, and both against float64."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace

import mixer_cases
import pytest
import torch
from emulate import TAPS, Emulator
from mixer_cases import NAMES, Inputs
from scan_cases import relative_rms
from torch import Tensor

from analysis.measure.allocations import saved_storages
from analysis.theory.kept_tensors import saved_terms
from mambabyte.config import ModelConfig
from mambabyte.model.families.mamba import MambaMixer
from mambabyte.ops.conv import cuda as cuda_conv
from mambabyte.ops.mamba import fused as mixer
from mambabyte.ops.scan import cuda as cuda_scan
from mambabyte.ops.scan import plan as cuda_plan

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("convolution"),
]
SHAPES = [  # batch, length, channels, rank, multiprocessors
    (2, 43, 40, 8, 8),  # a last chunk that is not whole
    (4, 24, 48, 8, 1),  # several sequences walked as one
    (1, 140, 40, 16, 8),  # segments
    (2, 1, 8, 8, 1),
    (1, 15, 16, 3, 1),  # too short for the tensor cores; rows that are not on 16 bytes
    (2, 20, 7, 1, 1),
    (2, 24, 24, None, 8),  # of full rank
    (1, 9, 7, None, 1),
]


class Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias)
        return cuda_conv.forward(x, weight, bias, None, True)

    @staticmethod
    def backward(ctx, dy, dlast):
        x, weight, bias = ctx.saved_tensors
        return cuda_conv.backward(dy, dlast, x, weight, bias, None, True)[:3]


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        y, state, saved = cuda_scan.forward(*inputs, None, True, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, saved)
        return y, state

    @staticmethod
    def backward(ctx, dy, dstate):
        *inputs, saved = ctx.saved_tensors
        dy = torch.zeros_like(inputs[0]) if dy is None else dy
        return cuda_scan.backward(dy, dstate, *inputs, None, saved, True)[:-1]


def composed(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor | None,
    dt_bias: Tensor, A: Tensor, D: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    x, z = xz.chunk(2, dim=-1)
    u, tail = Convolution.apply(x, conv_weight, conv_bias)
    products = mixer_cases.small_products(u, x_proj, dt_proj, A)
    y, state = Scan.apply(u, *products, D, z, dt_bias)
    return y, tail, state


def operator(inputs: Inputs, training: bool) -> dict[str, Tensor]:
    given = inputs.values()
    y, tail, state, *kept = mixer.forward(*given, None, True)
    dy, *others = mixer_cases.upstream(y, tail, state)
    others = [None if training else d for d in others]
    gradients = mixer.backward(dy, *others, *given, None, *kept)
    found = {"y": y, "tail": tail, "state": state}
    return found | {f"d{name}": g for name, g in zip(NAMES, gradients, strict=False)
                    if g is not None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "training"), [*((s, True) for s in SHAPES), (SHAPES[0], False), (SHAPES[3], False)],
    ids=str)
def test_parity(
    shape: tuple[int, ...], training: bool, dtype: torch.dtype, emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    *sizes, multiprocessors = shape
    monkeypatch.setattr(cuda_plan, "multiprocessors", lambda device: multiprocessors)
    inputs = mixer_cases.make_inputs(*sizes, TAPS, dtype=dtype, device="cpu")
    parts = mixer_cases.results(composed, inputs, training)
    found = operator(inputs, training)
    mixer_cases.assert_as_good(found, parts, mixer_cases.definition(inputs, training), dtype)
    # All but what the sum of both gradients of u goes into is the same to the bit.
    channels = sizes[2]
    for name in ("y", "tail", "state", "ddt_bias", "dA", "dD"):
        assert torch.equal(found[name], parts[name]), name
    assert torch.equal(found["dxz"][..., channels:], parts["dxz"][..., channels:])
    again = operator(inputs, training)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.fixture
def dispatched(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operator, with what PyTorch knows of it, for tensors on the CPU."""
    monkeypatch.setattr(mixer, "DEVICES", ("cpu",))
    monkeypatch.setattr(cuda_plan, "multiprocessors", lambda device: 8)
    with torch.library._scoped_library("mambabyte", "IMPL") as library:
        library.impl("mixer", mixer.forward, "CPU")
        library.impl("mixer_backward", mixer.backward, "CPU")
        yield


def on_the_cpu(test: Callable[..., None]) -> Callable[..., None]:
    once = pytest.mark.parametrize("emulator", ["hopper"], indirect=True)
    return pytest.mark.usefixtures("dispatched")(once(test))


def leaves(dtype: torch.dtype = torch.bfloat16, rank: int | None = 8) -> list[Tensor]:
    inputs = mixer_cases.make_inputs(2, 20, 16, rank, TAPS, dtype=dtype, device="cpu")
    return [None if t is None else t.requires_grad_() for t in inputs.values()]


@on_the_cpu
@pytest.mark.long  # compiled below, it is traced, differentiated and run in the daily suite
@pytest.mark.parametrize("rank", [None, 8])
def test_opcheck(rank: int | None) -> None:
    operator = torch.ops.mambabyte.mixer.default
    torch.library.opcheck(operator, (*leaves(rank=rank), None, True))
    torch.library.opcheck(
        operator, (*[None if t is None else t.detach() for t in leaves(rank=rank)], None, False))


@on_the_cpu
def test_compiles_without_a_graph_break() -> None:
    def layer(xz: Tensor, *others: Tensor) -> Tensor:
        return torch.tanh(mixer.fused_mixer(2 * xz, *others)[0])

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    tensors = leaves(torch.float32)
    for one, two in zip(
        *(torch.autograd.grad(f(*tensors).sum(), tensors) for f in (compiled, layer)), strict=True
    ):
        torch.testing.assert_close(one, two)


@on_the_cpu
def test_gradients_of_some_inputs_and_through_the_state_alone() -> None:
    tensors = [t.detach() for t in leaves(torch.float32)]
    wanted = [t.detach() for t in leaves(torch.float32)]
    for given, function in ((tensors, mixer.fused_mixer), (wanted, composed)):
        given[0].requires_grad_()
        given[3].requires_grad_()
        _, tail, state = function(*given)
        (tail.square().sum() + state.sum()).backward()
    for name, one, two in zip(NAMES, tensors, wanted, strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            assert relative_rms(one.grad, two.grad) < 1e-6, name


@on_the_cpu
def test_second_order_is_that_of_the_composition() -> None:
    found, tensors = [], leaves(torch.float32)
    for function in (mixer.fused_mixer, mixer._in_torch):
        y, *_ = function(*tensors)
        (first,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), tensors))
    for one, two in zip(*found, strict=True):
        assert relative_rms(one, two) < 1e-5


CONFIG = ModelConfig(d_model=16, n_layer=1, expand=1, dt_rank=8, d_conv=TAPS, scan_form="fused")


@on_the_cpu
@pytest.mark.parametrize("rank", ["full", 8])
@pytest.mark.parametrize("length", [20, 1])
def test_a_layer_does_what_it_composes(length: int, rank: int | str) -> None:
    layer = MambaMixer(replace(CONFIG, dt_rank=rank))
    x, found = torch.randn(2, length, CONFIG.d_model), []
    for function in (layer.from_start, lambda x: layer(x, None)):
        y, state = function(x.requires_grad_())
        outputs = y.square().sum() + state.conv_state.sum() + state.ssm_state.sum()
        gradients = torch.autograd.grad(outputs, [x, *layer.parameters()])
        found.append([y, *state, *gradients])
    for one, two in zip(*found, strict=True):
        assert relative_rms(one, two) < 2e-6


@on_the_cpu
@pytest.mark.parametrize("rank", ["full", 8])
def test_it_keeps_what_the_closed_form_says(rank: int | str) -> None:
    config = replace(CONFIG, dt_rank=rank)
    layer, x = MambaMixer(config), torch.randn(2, 20, config.d_model)
    kept = sum(size for _, size in saved_storages(lambda: layer.from_start(x)[0], layer))
    terms = [t for t in saved_terms(config, 2, 20, device="cuda") if t.layer == 0]
    outside = [t.bytes for t in terms if t.part == "norm" and t.tensor != "output"]
    assert kept == sum(t.bytes for t in terms) - sum(outside)
