"""Operators on the GPU: compile, CUDA graphs, autocast, checkpointing, streams, threads, and a card
that is not torch's current one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from scan_cases import SEQUENCES, make_inputs, relative_rms, results, scan
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.energy import EnergyMeter
from mambabyte.model import MIXERS, ByteLM
from mambabyte.ops import default_form, selective_scan
from mambabyte.ops.compat import selective_scan_fn
from mambabyte.ops.scan import operator as fused
from mambabyte.stream import ByteStream, generate
from mambabyte.train.captured import CapturedStep, Windows, prepare, window_starts
from mambabyte.train.optim import make_optimizer

# What torch itself warns of depends on the machine.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants two GPUs")


def leaves() -> list[Tensor]:
    inputs = make_inputs(2, 96, 64, dtype=torch.bfloat16)
    return [t.requires_grad_() for t in inputs.values()]


def call(u, delta, A, B, C, D, z, bias, state) -> tuple[Tensor, Tensor]:
    return selective_scan(
        u, delta, A, B, C, D, z, delta_bias=bias, delta_softplus=True, initial_state=state
    )


def gradients(function, tensors: list[Tensor]) -> list[Tensor]:
    y, state = function(*tensors)
    found = torch.autograd.grad(y.float().sum() + state.sum(), tensors)
    return [y.detach(), state.detach(), *found]  # keeps no graph alive


def test_auto_is_fused_here() -> None:
    assert default_form(torch.device("cuda"), torch.bfloat16) == "fused"
    assert fused.fused_available("cuda")[0]


def test_opcheck() -> None:
    tensors = leaves()
    torch.library.opcheck(torch.ops.mambabyte.selective_scan.default, (*tensors, None, True, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    tensors = leaves()

    def layer(*args: Tensor) -> tuple[Tensor, Tensor]:
        y, state = call(*args)
        return torch.tanh(y) * 2, state

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for one, two in zip(gradients(compiled, tensors), gradients(layer, tensors), strict=True):
        assert relative_rms(one, two) < 5e-3


def test_compiles_under_autocast() -> None:
    tensors = [t.float().detach().requires_grad_() for t in leaves()]
    compiled = torch.compile(call, fullgraph=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y, state = compiled(*tensors)
        wanted, _ = call(*tensors)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert relative_rms(y, wanted) < 1e-3


def test_a_cuda_graph_replays_forward_and_backward() -> None:
    tensors = leaves()
    eager = gradients(call, tensors)
    for _ in range(2):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            gradients(call, tensors)
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(call, tensors)
    with torch.no_grad():
        tensors[0].mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    doubled = [t.clone() for t in captured]
    with torch.no_grad():
        tensors[0].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for name, one, two in zip(range(99), captured, eager, strict=False):
        assert torch.equal(one, two), name
    assert not torch.equal(doubled[0], eager[0])


def test_a_kernel_may_be_loaded_during_capture() -> None:
    """The first call with a new number of states, under capture: loading must not break it."""
    tensors = make_inputs(1, 8, 32, states=11)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = scan(tensors)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, scan(tensors)[0])


def test_autocast_casts_sequences_and_keeps_states() -> None:
    tensors = [t.float().detach().requires_grad_() for t in leaves()]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y, state = call(*tensors)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    found = torch.autograd.grad((y.sum(), state.sum()), tensors)
    assert all(g.dtype == torch.float32 for g in found)


def test_checkpointing_gives_the_same_gradients() -> None:
    tensors = leaves()
    plain = gradients(call, tensors)
    saved = gradients(lambda *a: checkpoint(call, *a, use_reentrant=False), tensors)
    for one, two in zip(saved, plain, strict=True):
        assert torch.equal(one, two)


def test_without_gradients_nothing_is_saved() -> None:
    tensors = [t.detach() for t in make_inputs(4, 4096, 256, dtype=torch.bfloat16).values()]
    call(*tensors)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y, _ = call(*tensors)
    used = torch.cuda.max_memory_allocated() - before
    assert used < 3 * y.numel() * y.element_size()


@pytest.mark.parametrize("shape", [(16, 1024, 384), (1, 16_384, 384), (3, 1000, 40)])
def test_recomputing_needs_less_memory_for_the_same_gradients(shape: tuple[int, int, int]) -> None:
    inputs = make_inputs(*shape, dtype=torch.bfloat16)
    tensors = [t.requires_grad_() for t in inputs.values()]
    found, peaks = [], []
    for recompute in (False, True):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y, state = fused.fused_scan(*tensors, True, recompute)
        found.append([y.detach(), state.detach(), *torch.autograd.grad(y.float().sum(), tensors)])
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del y, state
    for one, two in zip(*found, strict=True):
        assert relative_rms(one, two) < 1e-3
    assert peaks[1] < peaks[0]


def test_only_what_is_needed_has_a_gradient() -> None:
    inputs = make_inputs(1, 16, 32)
    inputs["u"].requires_grad_()
    y, _ = scan(inputs)
    y.sum().backward()
    assert inputs["u"].grad is not None
    assert all(t.grad is None for n, t in inputs.items() if n != "u")


def test_second_order_is_that_of_the_chunked_form() -> None:
    found = []
    for form in ("fused", "chunked"):
        inputs = {n: t.requires_grad_() for n, t in make_inputs(2, 12, 16).items()}
        y, _ = scan(inputs, form)
        (first,) = torch.autograd.grad(y.square().sum(), inputs["u"], create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), list(inputs.values())))
    for one, two in zip(*found, strict=True):
        assert relative_rms(one, two) < 1e-5


def test_streams_and_threads() -> None:
    """Launches go to the current stream, of a thread that has not used CUDA before too."""
    inputs = make_inputs(2, 512, 128, dtype=torch.bfloat16)
    wanted, found = results(inputs), {}
    torch.cuda.synchronize()

    def work(key: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found[key] = results(inputs)
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(key,)) for key in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key in range(4):
        for name, tensor in wanted.items():
            assert torch.equal(found[key][name], tensor), name


@two_cards
def test_the_second_device() -> None:
    inputs = make_inputs(2, 64, 64)
    moved = {n: t.to("cuda:1") for n, t in inputs.items()}
    for name, tensor in results(moved).items():
        assert torch.equal(tensor.cpu(), results(inputs)[name].cpu()), name


def test_drop_in_layout() -> None:
    inputs = make_inputs(2, 64, 48, dtype=torch.bfloat16, without=("initial_state",))
    y, state = scan(inputs)
    u, delta, B, C, z = (inputs[n].transpose(1, 2).contiguous() for n in SEQUENCES)
    out, last = selective_scan_fn(
        u, delta, inputs["A"], B, C, inputs["D"], z, inputs["delta_bias"], True, True
    )
    assert torch.equal(out.transpose(1, 2), y)
    assert torch.equal(last, state)


def test_a_layer_trains() -> None:
    """Gradient descent through the operator under compile, autocast and AdamW."""
    torch.manual_seed(0)
    net = nn.Linear(32, 64, device="cuda")
    A = nn.Parameter(-torch.rand(64, 16, device="cuda") - 0.1)
    optimizer = torch.optim.AdamW([*net.parameters(), A], lr=1e-2)
    x, target = torch.randn(4, 50, 32, device="cuda"), torch.randn(4, 50, 64, device="cuda")

    @torch.compile(fullgraph=True)
    def loss() -> Tensor:
        u = net(x)
        y, _ = selective_scan(u, u, A, u[..., :16], u[..., 16:32], delta_softplus=True)
        return (y.float() - target).square().mean()

    losses = []
    for _ in range(20):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]


# ------------------------------------------------------- a card that is not torch's current one

@pytest.fixture
def other() -> Iterator[str]:
    """The second card; the first one is current, and nothing may be left on it."""
    torch.cuda.set_device(0)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(0)
    yield "cuda:1"
    assert torch.cuda.current_device() == 0
    assert torch.cuda.memory_allocated(0) == before


def built(letter: str, device: str) -> ByteLM:
    torch.manual_seed(0)
    return ByteLM(ModelConfig(d_model=128, n_layer=2, layer_pattern=letter, n_head=2, n_kv_head=1,
                              attention_window=80)).to(device)


@two_cards
@pytest.mark.parametrize("letter", MIXERS)
@pytest.mark.parametrize("documents", [False, True])
def test_layers_on_another_card(letter: str, documents: bool, other: str) -> None:
    tokens = torch.randint(0, 256, (2, 151))
    starts = torch.rand(tokens.shape) < 0.03 if documents else None

    def found(device: str) -> list[Tensor]:
        model = built(letter, device)
        loss = model.loss(tokens.to(device), None if starts is None else starts.to(device))
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    for one, two in zip(found(other), found("cpu"), strict=True):
        assert one.device == torch.device(other)
        assert relative_rms(one.cpu(), two) < 1e-4


@two_cards
@pytest.mark.parametrize("way", ["fused", "graph", "compile"])
def test_captured_steps_on_another_card(way: str, other: str) -> None:
    config = TrainConfig(context=100, batch_size=4, n_steps=6, step=way, lr=1e-3)
    text = torch.randint(0, 256, (5000,), dtype=torch.uint8)

    def losses(device: str) -> list[float]:
        torch._dynamo.reset()
        model = built("MSDA", device)
        prepare(model, config)
        step = CapturedStep(model, model.loss, make_optimizer(model, config, on_device=True),
                            Windows(text.to(device), config.context),
                            window_starts(len(text), config), config)
        each = []
        for _ in range(config.n_steps):
            step(1.0)
            each.append(step.read().loss)
        return each

    found = losses(other)
    assert found[-1] < found[0]
    assert found == pytest.approx(losses("cpu"), rel=1e-2)  # that in float32


@two_cards
@pytest.mark.parametrize("letters", ["M", "MSDA"])  # an engine each
def test_streams_on_another_card(letters: str, other: str) -> None:
    found = []
    for device in (other, "cpu"):
        stream = ByteStream(built(letters, device))
        stream.feed(b"a text")
        stream.feed(b"!")
        found.append(stream.log_probs)
    assert relative_rms(*found) < 1e-5
    drawn = ["".join(generate(built(letters, device), b"a", 20, temperature=0.0))
             for device in (other, "cpu")]
    assert drawn[0] == drawn[1]


@two_cards
def test_the_meter_reads_the_card_that_is_named(other: str) -> None:
    for device, index in ((other, 1), ("cuda", 0)):
        assert str(torch.cuda.get_device_properties(index).uuid) in EnergyMeter(device).identity
    with torch.cuda.device(1):
        assert EnergyMeter("cuda").identity == EnergyMeter(other).identity
