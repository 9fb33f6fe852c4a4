"""The delta rule's kernels, run on the CPU lane by lane, against the recurrence in float64."""

from __future__ import annotations

import shutil

import pytest
import torch

from mambabyte.ops.arguments import document_ages
from mambabyte.ops.compare import relative_rms
from mambabyte.ops.delta import cuda as kernels
from mambabyte.ops.delta import operator
from mambabyte.ops.delta.recurrent import recurrent_delta
from mambabyte.ops.ssd.decay import without_past
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
            made["beta"].float(), made["initial_state"], None)


def found_and_exact(inputs):
    """Results and gradients by name: of the kernels, and of the definition in float64."""
    batch, length, heads, _ = inputs[0].shape
    torch.manual_seed(1)
    do = torch.randn(batch, length, heads, 64).bfloat16()
    dstate = torch.randn(batch, heads, 64, 64)
    *exact, ages = [None if t is None else t.double().requires_grad_() for t in inputs]
    q, k, v, log_decay, *others = exact
    o, last = recurrent_delta(q, k, v, without_past(log_decay, ages), *others)
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
    ("gated delta", 100, {"gates": "one"}), ("gated delta", 70, {}),
    pytest.param("channel gates", 100, {"gates": "one"}, marks=pytest.mark.long)])
def test_parity(family, length, more) -> None:
    assert_right(prepared(family, length, **more))


@pytest.mark.long
@pytest.mark.parametrize("family", ["gated delta", "channel gates"])
def test_documents(family) -> None:
    """Exactly nothing crosses where one starts, and no gradient comes to the log-decay there."""
    inputs = list(prepared(family, 70, heads=2))
    starts = torch.zeros(1, 70, dtype=torch.bool)
    starts[0, [1, 2, 20, 63, 64, 69]] = True
    inputs[6] = document_ages(starts, inputs[0])
    found, wanted = found_and_exact(inputs)
    errors = {n: relative_rms(found[n], wanted[n].detach()) for n in found
              if wanted[n].count_nonzero()}
    assert max(errors.values()) < LIMIT, errors
    assert not found["log_decay"][starts].any()
    inputs[2] = inputs[2].clone()
    inputs[2][0, :64] = 7
    other, _ = found_and_exact(inputs)
    assert torch.equal(other["state"], found["state"])
    for name in ("o", "q", "k", "v"):
        assert torch.equal(other[name][0, 64:], found[name][0, 64:]), name


@pytest.mark.long
@pytest.mark.parametrize("gates", ["gentle", "mixed"])
@pytest.mark.parametrize("family", ["gated delta", "channel gates"])
def test_one_key_written_over_and_over(family, gates) -> None:
    inputs = list(prepared(family, 100, gates=gates, repeated_keys=True))
    inputs[4] = inputs[4] - 1  # shares up to 1, as layers make them
    assert_right(inputs)


@pytest.mark.long
@pytest.mark.parametrize("family", ["gated delta", "channel gates"])
def test_the_same_bits_and_nothing_read_past_the_end(family) -> None:
    inputs = prepared(family, 33)
    torch.manual_seed(0)
    do, dstate = torch.randn(1, 33, 1, 64).bfloat16(), torch.randn(1, 1, 64, 64)
    longer = [torch.cat([t, torch.full_like(t, torch.nan)], 1)[:, :33] for t in inputs[:5]]
    found = []
    for some in (inputs, (*longer, *inputs[5:])):
        o, last, *kept = kernels.forward(*some, True)
        found.append([o, last, *kernels.backward(do, dstate, *some, *kept)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("family", ["gated delta", "channel gates"])
def test_without_states_and_without_a_backward_pass(family) -> None:
    *inputs, state, _ = prepared(family, 66)
    o, last, *kept = kernels.forward(*inputs, None, None, False)
    o1, last1, *kept1 = kernels.forward(*inputs, torch.zeros_like(state), None, True)
    assert torch.equal(o, o1)
    assert torch.equal(last, last1)
    assert all(t.numel() == 0 for t in kept)
    found = kernels.backward(o, None, *inputs, None, None, *kept1)
    assert found[5] is None
    again = kernels.backward(o, torch.zeros_like(state), *inputs, None, None, *kept1)
    assert all(torch.equal(a, b) for a, b in zip(found[:5], again[:5], strict=True))


@pytest.mark.long
@pytest.mark.parametrize("family", ["gated delta", "channel gates"])
def test_a_shut_gate_keeps_nothing_of_what_was_before(family) -> None:
    inputs = list(prepared(family, 70))
    inputs[3][0, 20] = -torch.inf
    o, last, *_ = kernels.forward(*inputs, False)
    inputs[2] = inputs[2].clone()
    inputs[2][0, :20] = 1
    inputs[5] = torch.zeros_like(inputs[5])
    o1, last1, *_ = kernels.forward(*inputs, False)
    assert relative_rms(o[0, 20:], o1[0, 20:]) < 1e-6
    assert relative_rms(last, last1) < 1e-6


@pytest.mark.parametrize("family", [
    "channel gates", pytest.param("gated delta", marks=pytest.mark.long)])
def test_all_that_is_kept_is_written_and_has_the_shapes_of_a_trace(family, monkeypatch) -> None:
    monkeypatch.setattr(operator, "has_kernel", lambda q, v: True)
    inputs = prepared(family, 1)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # new tensors are full of nan
    try:
        found = kernels.forward(*inputs, True)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, two in zip(found, operator._shapes(*inputs, True), strict=True):
        assert one.isfinite().all()
        assert (one.shape, one.dtype, one.stride()) == (two.shape, two.dtype, two.stride())
