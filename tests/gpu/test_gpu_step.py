"""The fused convolution and the streaming step on the GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scan_cases import make_inputs, poison, relative_rms, scan
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.conv.dispatch import causal_conv
from mambabyte.ops.conv.operator import fused_causal_conv
from mambabyte.ops.mamba.cuda import MOST_READS
from mambabyte.ops.mamba.step import mamba_step, scan_step

# What torch itself warns of depends on the machine.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

LIMIT = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 3e-3}
SHAPES = [(1, 1, 1, 4), (2, 2, 8, 4), (3, 3, 5, 3), (2, 50, 384, 4), (1, 999, 33, 4)]
SHAPES += [(4, 129, 64, 2), (2, 30, 16, 8)]


def conv_inputs(batch, length, channels, taps, dtype) -> list[Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    x, tail = normal(batch, length, channels).to(dtype), normal(batch, taps - 1, channels).to(dtype)
    return [x, normal(channels, taps), normal(channels), tail]


@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("silu", [True, False])
def test_convolution_parity(shape, dtype: torch.dtype, silu: bool) -> None:
    inputs = [t.requires_grad_() for t in conv_inputs(*shape, dtype)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y, last = causal_conv(*exact)
    wanted = (F.silu(y) if silu else y, last)
    weights = [torch.randn(t.shape, device="cuda", dtype=dtype) for t in wanted]
    poison(64)
    got = fused_causal_conv(*inputs, silu=silu)
    found = torch.autograd.grad(got, inputs, weights)
    true = torch.autograd.grad(wanted, exact, [w.double() for w in weights])
    assert torch.equal(got[1].double(), wanted[1])
    assert relative_rms(got[0].detach(), wanted[0].detach()) < LIMIT[dtype]
    for name, one, two in zip(("x", "weight", "bias", "tail"), found, true, strict=True):
        limit = 1e-5 if one.dtype == torch.float32 else LIMIT[dtype]
        assert relative_rms(one, two) < limit, name


def test_convolution_of_a_half_of_a_projection_without_options() -> None:
    both = torch.randn(2, 40, 64, device="cuda", requires_grad=True)
    weight = torch.randn(32, 4, device="cuda")
    y, _ = fused_causal_conv(both.chunk(2, dim=2)[0], weight)
    wanted, _ = causal_conv(both[..., :32], weight, None)
    assert relative_rms(y.detach(), F.silu(wanted).detach()) < 1e-6
    (found,) = torch.autograd.grad(y.sum(), both)
    (true,) = torch.autograd.grad(F.silu(wanted).sum(), both)
    assert relative_rms(found, true) < 1e-5


def test_convolution_repeats_bit_for_bit_and_splits() -> None:
    inputs = [t.requires_grad_() for t in conv_inputs(8, 700, 96, 4, torch.bfloat16)]
    y, last = fused_causal_conv(*inputs)
    weight = torch.randn_like(y)
    first = torch.autograd.grad(y, inputs, weight, retain_graph=True)
    for _ in range(3):
        poison(64)
        again = torch.autograd.grad(y, inputs, weight, retain_graph=True)
        assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    x, w, b, tail = inputs
    one, middle = fused_causal_conv(x[:, :333], w, b, tail)
    two, end = fused_causal_conv(x[:, 333:], w, b, middle)
    assert torch.equal(torch.cat([one, two], dim=1), y)
    assert torch.equal(end, last)


def test_convolution_compiles_and_autocasts() -> None:
    inputs = [t.requires_grad_() for t in conv_inputs(2, 64, 32, 4, torch.float32)]
    compiled = torch.compile(lambda *a: fused_causal_conv(*a)[0] * 2, fullgraph=True)
    eager = torch.autograd.grad((fused_causal_conv(*inputs)[0] * 2).sum(), inputs)
    traced = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    assert all(relative_rms(one, two) < 1e-6 for one, two in zip(traced, eager, strict=True))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y, _ = fused_causal_conv(*inputs)
    assert y.dtype == torch.bfloat16
    torch.library.opcheck(torch.ops.mambabyte.causal_conv.default, (*inputs, None, True))


def test_convolution_refuses_what_does_not_fit() -> None:
    x, w, b, tail = conv_inputs(2, 5, 8, 4, torch.float32)
    with pytest.raises(UserError, match="weight has shape"):
        fused_causal_conv(x, w[:4], b, tail)
    with pytest.raises(UserError, match="tail has shape"):
        fused_causal_conv(x, w, b, tail[:, :1])
    with pytest.raises(UserError, match="float64"):
        fused_causal_conv(x.double(), w, b)


@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize(("batch", "channels", "states"), [(1, 384, 16), (3, 33, 5), (130, 64, 64)])
def test_scan_step_is_the_scan_at_length_1(batch, channels, states, dtype) -> None:
    inputs = make_inputs(batch, 1, channels, states, dtype)
    exact_y, exact_state = scan({n: t.double() for n, t in inputs.items()}, "recurrent")
    row = {n: t[:, 0] if t.ndim == 3 and n != "initial_state" else t for n, t in inputs.items()}
    y, state = scan_step(
        row["u"], row["delta"], row["A"], row["B"], row["C"], row["D"], row["z"],
        row["delta_bias"], row["initial_state"], True,
    )  # fmt: skip
    assert relative_rms(y, exact_y[:, 0]) < LIMIT[dtype]
    assert relative_rms(state, exact_state) < 1e-6


def layer_inputs(batch, channels, rank, dtype, weight_dtype, states=16, taps=4) -> list[Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, device="cuda")

    x, z = normal(batch, 2 * channels).to(dtype).chunk(2, dim=1)
    return [
        x,
        z,
        normal(batch, taps - 1, channels).to(dtype),
        normal(batch, channels, states),
        normal(channels, taps).to(weight_dtype),
        normal(channels).to(weight_dtype),
        normal(rank + 2 * states, channels, scale=channels**-0.5).to(weight_dtype),
        normal(channels, rank, scale=rank**-0.5).to(weight_dtype),
        normal(channels) - 3,
        -torch.exp(normal(channels, states)),
        normal(channels),
    ]


def exact_step(tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    x, z, tail, state, w, b, x_proj, dt_proj, dt_bias, A, D = (t.double() for t in tensors)
    u, tail = causal_conv(x[:, None], w, b, tail)
    u, (rank, states) = F.silu(u), (dt_proj.shape[1], A.shape[1])
    low, B, C = F.linear(u, x_proj).split([rank, states, states], dim=2)
    inputs = {
        "u": u, "delta": F.linear(low, dt_proj), "A": A, "B": B, "C": C, "D": D,
        "z": z[:, None], "delta_bias": dt_bias, "initial_state": state,
    }  # fmt: skip
    y, state = scan(inputs, "recurrent")
    return y[:, 0], tail, state


@pytest.mark.parametrize("batch", [1, 5, 33])
@pytest.mark.parametrize(("channels", "rank"), [(384, 12), (33, 3), (1024, 32), (4096, 128)])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ],
)
def test_layer_step(batch, channels, rank, dtype, weight_dtype) -> None:
    tensors = layer_inputs(batch, channels, rank, dtype, weight_dtype)
    wanted = exact_step(tensors)
    poison(64)
    y, tail, state = mamba_step(*tensors)
    assert torch.equal(tail.double(), wanted[1])
    fused = batch * tensors[6].numel() <= MOST_READS
    exact = dtype == torch.float32
    # The path for many rows rounds u, B, C and delta to the activations' dtype in between.
    limit = 2e-6 if exact else LIMIT[dtype] if fused else 4 * LIMIT[dtype]
    assert relative_rms(y, wanted[0]) < limit
    assert relative_rms(state, wanted[2]) < (2e-6 if exact or fused else 4 * LIMIT[dtype])


def test_steps_in_a_cuda_graph() -> None:
    """A hundred replays, states carried by copies inside the graph, equal the eager steps."""
    tensors = layer_inputs(2, 96, 6, torch.float32, torch.float32)
    xs = torch.randn(20, 2, 96, device="cuda")
    tail, state, eager = tensors[2], tensors[3], []
    for x in xs:
        y, tail, state = mamba_step(x, tensors[1], tail, state, *tensors[4:])
        eager.append(y)
    x, tail, state = xs[0].clone(), tensors[2].clone(), tensors[3].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, new_tail, new_state = mamba_step(x, tensors[1], tail, state, *tensors[4:])
        tail.copy_(new_tail)
        state.copy_(new_state)
    tail.copy_(tensors[2])
    state.copy_(tensors[3])
    for step, wanted in zip(xs, eager, strict=True):
        x.copy_(step)
        graph.replay()
        assert torch.equal(y, wanted)


def test_a_step_checks_its_inputs_and_has_the_gradient_of_torch() -> None:
    tensors = layer_inputs(1, 32, 2, torch.float32, torch.float32)
    with pytest.raises(UserError, match="state has shape"):
        mamba_step(*tensors[:3], tensors[3][:, :-1], *tensors[4:])
    tensors[6].requires_grad_()
    y, *_ = mamba_step(*tensors)
    assert torch.autograd.grad(y.sum(), tensors[6])[0].isfinite().all()
    with torch.no_grad():
        compiled = torch.compile(mamba_step, fullgraph=True)
        for one, two in zip(compiled(*tensors), mamba_step(*tensors), strict=True):
            assert torch.equal(one, two)
