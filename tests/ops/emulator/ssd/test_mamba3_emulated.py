"""Mamba-3's kernels, run on the CPU lane by lane, against the recurrence in float64."""

from __future__ import annotations

import shutil

import pytest
import torch

from mambabyte.ops.compare import relative_rms
from mambabyte.ops.ssd import cuda as cuda_ssd
from mambabyte.ops.ssd.decay import without_past
from mambabyte.ops.ssd.mamba3 import cuda as kernels
from mambabyte.ops.ssd.mamba3 import inputs as cuda_inputs
from mambabyte.ops.ssd.mamba3.dispatch import Mamba3State, mamba3_scan

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("ssd"),
]
LIMIT = 5e-3
NAMES = ("x", "dt", "log_decay", "theta", "mix", "B", "C", "D", "B_bias", "C_bias", "k_state",
         "v_state", "ssm_state")
SEQUENCES = NAMES[:7]


def prepared(batch, length, heads, groups, states, decay=0.1, pairs=None):
    """What the operator takes, by name; B and C are parts of one tensor, some turns a step."""
    torch.manual_seed(length)
    both = torch.randn(batch, length, 2 * groups * states).bfloat16()
    B, C = (t.unflatten(2, (groups, states)) for t in both.chunk(2, -1))
    gates = (batch, length, heads)
    made = (
        torch.randn(batch, length, heads, 64).bfloat16(), 0.5 + torch.rand(gates),
        -decay * torch.rand(gates), 10 * torch.randn(batch, length, pairs or states // 4),
        torch.rand(gates), B, C, torch.randn(heads), torch.randn(heads, states),
        torch.randn(heads, states), torch.randn(batch, heads, states),
        torch.randn(batch, heads, 64), torch.randn(batch, heads, 64, states))
    return dict(zip(NAMES, made, strict=True))


def exact(given, dy, dstate, ages=None):
    """y, the last state and the gradients of all that is given, in float64, by the definition."""
    leaves = {n: None if t is None else t.double().requires_grad_() for n, t in given.items()}
    *_, k, v, h = leaves.values()
    others = {n: t for n, t in leaves.items() if not n.endswith("state")}
    state = None if k is None else Mamba3State(k, v, h)
    y, last = mamba3_scan(**others, initial_state=state, ages=ages, form="recurrent")
    present = [t for t in leaves.values() if t is not None]
    found = torch.autograd.grad([y, last.ssm_state], present, [dy.double(), dstate.double()])
    return [y.detach(), last.ssm_state.detach(), *found]


def by_kernels(given, dy, dstate):
    y, last, carries = kernels.forward(*given.values(), True)
    found = kernels.backward(dy, dstate, *given.values(), carries)
    assert [t is None for t in found] == [t is None for t in given.values()]
    return [y, last, *(t for t in found if t is not None)]


def upstream(given):
    x, (*_, states) = given["x"], given["B"].shape
    batch, _, heads, channels = x.shape
    return torch.randn(x.shape).bfloat16(), torch.randn(batch, heads, channels, states)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "groups", "states", "decay", "pairs", "walks"), [
        (1, 70, 2, 1, 16, 0.1, None, False), (2, 1, 2, 1, 16, 0.1, None, False),
        (1, 65, 2, 2, 128, 0.1, None, True), (1, 70, 6, 2, 16, 0.1, 8, True),
        (1, 200, 1, 1, 64, 40.0, 1, True), (1, 640, 4, 1, 16, 0.01, None, False)])
def test_parity(
    monkeypatch, batch, length, heads, groups, states, decay, pairs, walks
) -> None:
    monkeypatch.setattr(cuda_ssd, "WALK_BLOCKS", 0 if walks else 1 << 30)
    given = prepared(batch, length, heads, groups, states, decay, pairs)
    dy, dstate = upstream(given)
    found, wanted = by_kernels(given, dy, dstate), exact(given, dy, dstate)
    errors = {n: relative_rms(a, b) for n, a, b in zip(
        ("y", "state", *NAMES), found, wanted, strict=True) if float(b.square().mean()) > 1e-30}
    assert max(errors.values()) < LIMIT, errors  # of angles too, at any length
    assert all(torch.equal(a, b) for a, b in zip(by_kernels(given, dy, dstate), found, strict=True))


def test_documents() -> None:
    """Where one starts the log-decay is -inf: exactly nothing crosses, nor of the state before."""
    given = prepared(1, 140, 1, 1, 16)
    ages = torch.ones(1, 140, dtype=torch.uint8)
    ages[0, [0, 1, 20, 64, 139]] = 0
    dy, dstate = upstream(given)
    wanted = exact(given, dy, dstate, ages)
    given["log_decay"] = without_past(given["log_decay"], ages)
    found = by_kernels(given, dy, dstate)
    found[4] = found[4].masked_fill((ages == 0)[..., None], 0)  # as without_past does
    errors = [relative_rms(a, b) for a, b in zip(found, wanted, strict=True) if b.count_nonzero()]
    assert max(errors) < LIMIT, errors
    other = {n: t.clone() for n, t in given.items()}
    for name in ("x", "B", "C"):
        other[name][0, :64] = 7
    again = by_kernels(other, dy, dstate)
    assert torch.equal(again[0][0, 64:], found[0][0, 64:])
    assert torch.equal(again[1], found[1])
    for a, b in zip(again[2:9], found[2:9], strict=True):  # the step before writes with dt, mix
        assert torch.equal(a[0, 65:], b[0, 65:])


def test_without_biases_or_state_and_by_angles_of_many_turns() -> None:
    given = prepared(1, 33, 2, 1, 16)
    given |= dict.fromkeys(("D", "B_bias", "C_bias", "k_state", "v_state", "ssm_state"))
    dy, dstate = upstream(given)
    given["theta"] = 1e5 * given["theta"]
    wanted, found = exact(given, dy, dstate), by_kernels(given, dy, dstate)
    assert max(relative_rms(a, b) for a, b in zip(found, wanted, strict=True)) < LIMIT


def test_nothing_is_read_past_the_end_and_no_nan_of_an_angle_is_lost() -> None:
    given = prepared(1, 33, 1, 1, 16)
    longer = {n: torch.cat([t, torch.full_like(t, torch.nan)], 1)[:, :33] if n in SEQUENCES else t
              for n, t in given.items()}
    dy, dstate = upstream(given)
    found = by_kernels(given, dy, dstate)
    again = by_kernels(longer, dy, dstate)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    assert all(t.isfinite().all() for t in found)
    for bad in (torch.nan, torch.inf):
        given["theta"][0, 20, 3] = bad
        y, last, *_ = kernels.forward(*given.values(), False)
        assert y[0, :20].isfinite().all()
        assert y[0, 20:].isnan().all()
        assert last[..., 6:8].isnan().all()


@pytest.mark.parametrize(("groups", "dtype"), [(1, torch.bfloat16), (2, torch.float32)])
@pytest.mark.usefixtures("inputs")
def test_inputs(groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    states, heads, pairs = 20, 3, 5
    width = 2 * groups * states + 3 * heads + pairs
    tail = (2 * torch.randn(2, 70, width + 7)).to(dtype)[..., 3:-4]  # part of a wider tensor
    tail[0, 0, -pairs - 3 * heads :] = torch.tensor([30.0, -30.0] * 7)  # both ends of the gates
    given = tail, torch.randn(heads), torch.randn(states), torch.randn(states)
    found = cuda_inputs._forward(*given, groups)
    upstream = [torch.randn(t.shape).to(t.dtype) for t in found]
    exact = [t.double().requires_grad_() for t in given]
    wanted = cuda_inputs._in_torch(*exact, groups)
    gradients = torch.autograd.grad(wanted, exact, [t.double() for t in upstream])
    back = cuda_inputs._backward(*upstream, *given, groups)
    for a, b in zip((*found, *back), (*wanted, *gradients), strict=True):
        assert relative_rms(a, b.detach()) < (3e-3 if a.dtype == torch.bfloat16 else 1e-6)
    # What has no gradient counts as zeros.
    alone = cuda_inputs._backward(upstream[0], *(None,) * 5, *given, groups)
    zeros = [torch.zeros_like(t) for t in upstream[1:]]
    for a, b in zip(alone, cuda_inputs._backward(upstream[0], *zeros, *given, groups), strict=True):
        assert torch.equal(a, b)
