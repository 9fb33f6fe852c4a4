"""The streaming step on the CPU: equal to the layer at length 1, and clear about what is wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops import selective_scan
from mambabyte.ops.conv.dispatch import causal_conv
from mambabyte.ops.mamba.step import mamba_step, scan_step
from mambabyte.ops.scan import operator as fused

AVAILABLE, REASON = fused.fused_available("cpu")
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=f"no native scan here: {REASON}")


def layer_inputs() -> list[Tensor]:
    batch, channels, rank, states = 3, 20, 4, 16
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, z = normal(batch, 2 * channels).chunk(2, dim=1)
    tail, state = normal(batch, 3, channels), normal(batch, channels, states)
    weights = [normal(channels, 4), normal(channels), normal(rank + 2 * states, channels)]
    weights += [normal(channels, rank), normal(channels), -torch.exp(normal(channels, states))]
    return [x, z, tail, state, *weights, normal(channels)]


def by_the_scan(x, z, tail, state, w, b, x_proj, dt_proj, dt_bias, A, D):  # type: ignore[no-untyped-def]
    u, tail = causal_conv(x[:, None], w, b, tail)
    u, (rank, states) = F.silu(u), (dt_proj.shape[1], A.shape[1])
    low, B, C = F.linear(u, x_proj).split([rank, states, states], dim=2)
    y, state = selective_scan(
        u, F.linear(low, dt_proj), A, B, C, D, z[:, None], delta_bias=dt_bias,
        delta_softplus=True, initial_state=state, form="recurrent",
    )  # fmt: skip
    return y[:, 0], tail, state


def test_a_step_is_the_layer_at_length_1() -> None:
    tensors = layer_inputs()
    kept = [t.clone() for t in tensors]
    for mine, theirs in zip(mamba_step(*tensors), by_the_scan(*tensors), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(one, two) for one, two in zip(tensors, kept, strict=True))


def test_steps_follow_the_whole_sequence() -> None:
    tensors = layer_inputs()
    xs = torch.randn(12, *tensors[0].shape, generator=torch.Generator().manual_seed(1))
    tail, state = tensors[2:4]
    exact_tail, exact_state = tensors[2].double(), tensors[3].double()
    exact = [t.double() for t in tensors]
    for x in xs:
        y, tail, state = mamba_step(x, tensors[1], tail, state, *tensors[4:])
        true_y, exact_tail, exact_state = by_the_scan(
            x.double(), exact[1], exact_tail, exact_state, *exact[4:]
        )
        torch.testing.assert_close(y.double(), true_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.double(), exact_state, rtol=1e-4, atol=1e-4)


def test_scan_step_is_the_scan_at_length_1() -> None:
    generator = torch.Generator().manual_seed(0)
    u, delta, z = torch.randn(3, 2, 9, generator=generator)
    B, C = torch.randn(2, 2, 5, generator=generator)
    A, D = -torch.rand(9, 5, generator=generator), torch.randn(9, generator=generator)
    state = torch.randn(2, 9, 5, generator=generator)
    y, new_state = scan_step(u, delta, A, B, C, D, z, D, state, True)
    wanted, wanted_state = selective_scan(
        u[:, None], delta[:, None], A, B[:, None], C[:, None], D, z[:, None], delta_bias=D,
        delta_softplus=True, initial_state=state, form="recurrent",
    )  # fmt: skip
    torch.testing.assert_close(y, wanted[:, 0])
    torch.testing.assert_close(new_state, wanted_state)


def test_a_step_compiles_without_a_graph_break() -> None:
    tensors = layer_inputs()
    torch.compiler.reset()
    compiled = torch.compile(mamba_step, fullgraph=True, backend="aot_eager")
    for one, two in zip(compiled(*tensors), mamba_step(*tensors), strict=True):
        torch.testing.assert_close(one, two)


def test_what_does_not_fit_is_named() -> None:
    tensors = layer_inputs()
    with pytest.raises(UserError, match=r"state has shape \(3, 19, 16\): expected \(3, 20, 16\)"):
        mamba_step(*tensors[:3], tensors[3][:, 1:], *tensors[4:])
    with pytest.raises(UserError, match="a step takes"):
        mamba_step(tensors[0][:, None], *tensors[1:])
    with pytest.raises(UserError, match="share a dtype"):
        mamba_step(*tensors[:6], tensors[6].bfloat16(), *tensors[7:])


def test_the_gradient_of_a_step_is_that_of_the_layer_at_length_1() -> None:
    tensors = [t.double().float().requires_grad_() for t in layer_inputs()]
    found, wanted = (
        torch.autograd.grad(sum(r.square().sum() for r in step(*tensors)), tensors)
        for step in (mamba_step, by_the_scan))
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
