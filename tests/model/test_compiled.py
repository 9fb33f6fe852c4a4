"""torch.compile with inductor, its default, on the CPU: values and gradients are those of eager."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from mambabyte.config import ModelConfig
from mambabyte.model import ByteLM
from mambabyte.ops.compare import relative_rms
from mambabyte.ops.scan.operator import fused_available

AVAILABLE, REASON = fused_available("cpu")
pytestmark = [
    pytest.mark.long,  # `make test` has the operators with aot_eager, which generates no code
    pytest.mark.skipif(not AVAILABLE, reason=f"no native scan here: {REASON}"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
]


def test_the_scan_takes_what_it_kept_in_any_order_of_strides() -> None:
    scan = torch.ops.mambabyte.selective_scan.default
    back = torch.ops.mambabyte.selective_scan_backward.default
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 20, 4), (2, 20, 4), (4, 3), (2, 20, 3), (2, 20, 3)]
    u, delta, A, B, C = (torch.randn(*s, generator=generator) for s in sizes)
    inputs = (u, delta, -A.exp(), B, C, None, None, None, None, None)
    y, _, saved = scan(*inputs, True, True)
    permuted = saved.transpose(0, -1).contiguous().transpose(0, -1)

    def step(dy: Tensor, saved: Tensor) -> tuple[Tensor, ...]:
        return back(dy, None, *inputs, saved, True)[:5]

    torch.compiler.reset()
    found = torch.compile(step, fullgraph=True)(y, permuted)
    for one, two in zip(found, step(y, saved), strict=True):
        torch.testing.assert_close(one, two)


def test_a_model_and_its_gradients() -> None:
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(
        d_model=16, n_layer=2, layer_pattern="MA", d_state=4, n_head=2, n_kv_head=2))
    tokens = torch.randint(0, 256, (2, 33))

    def loss() -> Tensor:
        return model.loss(tokens)

    wanted, (logits, _) = loss(), model(tokens)
    gradients = torch.autograd.grad(wanted, list(model.parameters()))
    torch.compiler.reset()
    found = torch.compile(loss, fullgraph=True)()
    torch.testing.assert_close(found, wanted)
    for (name, _), one, two in zip(
        model.named_parameters(), torch.autograd.grad(found, list(model.parameters())), gradients,
        strict=True,
    ):
        assert relative_rms(one, two) < 1e-5, name
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(tokens)[0], logits,
                                   rtol=1e-5, atol=1e-5)
