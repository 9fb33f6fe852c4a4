"""The delta rule's kernels, run on the CPU lane by lane, against the recurrence in float64."""

from __future__ import annotations

import shutil

import pytest
import torch

from mambabyte.ops.compare import relative_rms
from mambabyte.ops.delta import cuda as kernels
from mambabyte.ops.delta.recurrent import recurrent_delta
from tests.helpers.family_cases import make_inputs

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("delta"),
]
LIMIT = 5e-3  # bf16 inputs; many factors are bf16 too
RESULTS = ("o", "state", "q", "k", "v", "log_decay", "beta", "initial_state")


def prepared(family, length, heads=1, batch=1, **more):
    """q, k, v, log_decay, beta and the state as the kernels take them; q, k and v parts of one
    wider tensor."""
    made = make_inputs(
        family, batch, length, heads, keys=64, values=64, dtype=torch.bfloat16, **more)
    wide = torch.cat([made[n] for n in ("q", "k", "v")], -1)
    gate = made["log_decay"]
    return (*wide.split(64, -1), gate if gate.ndim == 4 else gate.unsqueeze(-1),
            made["beta"].float(), made["initial_state"])


def found_and_exact(inputs):
    """Results and gradients by name: of the kernels, and of the definition in float64."""
    batch, length, heads, _ = inputs[0].shape
    torch.manual_seed(1)
    do = torch.randn(batch, length, heads, 64).bfloat16()
    dstate = torch.randn(batch, heads, 64, 64)
    exact = [t.double().requires_grad_() for t in inputs]
    o, last = recurrent_delta(*exact)
    wanted = [o, last, *torch.autograd.grad([o, last], exact, [do.double(), dstate.double()])]
    o, last, *kept = kernels.forward(*inputs, True)
    found = [o, last, *kernels.backward(do, dstate, *inputs, *kept)]
    return dict(zip(RESULTS, found, strict=True)), dict(zip(RESULTS, wanted, strict=True))


def assert_right(inputs, faint=()):
    found, wanted = found_and_exact(inputs)
    assert all(t.isfinite().all() for t in found.values())
    errors = {n: relative_rms(found[n], wanted[n].detach()) for n in found if n not in faint}
    assert max(errors.values()) < LIMIT, errors
    return found


@pytest.mark.parametrize(("family", "length", "more"), [
    ("channel gates", 70, {}), ("gated delta", 1, {}), ("channel gates", 1, {}),
    ("channel gates", 130, {"heads": 2, "batch": 2}), ("gated delta", 64, {"heads": 2}),
    ("gated delta", 150, {"gates": "mixed"}), ("channel gates", 150, {"gates": "mixed"}),
    ("gated delta", 100, {"gates": "one"}), ("channel gates", 100, {"gates": "one"}),
    ("gated delta", 70, {})])
def test_parity(family, length, more) -> None:
    assert_right(prepared(family, length, **more))
