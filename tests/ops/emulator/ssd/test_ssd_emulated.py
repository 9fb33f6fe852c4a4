"""SSD's kernels, run on the CPU lane by lane, against the recurrence in float64."""

from __future__ import annotations

import shutil

import pytest
import torch

from mambabyte.ops.compare import relative_rms
from mambabyte.ops.ssd import cuda as cuda_ssd
from mambabyte.ops.ssd import gates as cuda_gates
from mambabyte.ops.ssd.recurrent import recurrent_ssd

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("ssd"),
]
# bf16 inputs; states and decays of a chunk are factors in bf16 too.
LIMIT = 5e-3


def prepared(batch, length, heads, groups, states, decay=0.1):
    """x, step, log_decay, B, C, D, initial state as the kernels take them; the first and the last
    but one of the sequences are parts of wider tensors."""
    torch.manual_seed(length)
    x = torch.randn(batch, length, 2 * heads * 64).bfloat16()[..., heads * 64 :]
    both = torch.randn(batch, length, 2 * groups * states).bfloat16()
    B, C = (t.unflatten(2, (groups, states)) for t in both.chunk(2, -1))
    step = torch.rand(batch, length, heads)
    log_decay = -decay * torch.rand(batch, length, heads)
    return (x.unflatten(2, (heads, 64)), step, log_decay, B, C, torch.randn(heads),
            torch.randn(batch, heads, 64, states))


def exact_results(inputs, dy, dstate):
    x, step, log_decay, B, C, D, state = exact = [t.double().requires_grad_() for t in inputs]
    y, last = recurrent_ssd(x, step, log_decay, B, C, state)
    y = y + D[:, None] * x
    gradients = torch.autograd.grad([y, last], exact, [dy.double(), dstate.double()])
    return [y.detach(), last.detach(), *gradients]


@pytest.mark.parametrize(("batch", "length", "heads", "groups", "states", "decay"), [
    (1, 70, 3, 1, 32, 0.1), (2, 1, 2, 1, 16, 0.1), (1, 65, 2, 2, 128, 0.1), (1, 70, 12, 1, 32, 0.1),
    (1, 130, 2, 1, 64, 40.0)])
def test_parity(batch, length, heads, groups, states, decay) -> None:
    inputs = prepared(batch, length, heads, groups, states, decay)
    dy = torch.randn(batch, length, heads, 64).bfloat16()
    dstate = torch.randn(batch, heads, 64, states)
    wanted = exact_results(inputs, dy, dstate)
    y, last, carries = cuda_ssd.forward(*inputs, True)
    found = [y, last, *cuda_ssd.backward(dy, dstate, *inputs, carries)]
    names = ("y", "state", "x", "step", "log_decay", "B", "C", "D", "initial_state")
    errors = {n: relative_rms(a, b) for n, a, b in zip(names, found, wanted, strict=True)
              if float(b.square().mean()) > 1e-30}
    assert max(errors.values()) < LIMIT, errors
    again = cuda_ssd.backward(dy, dstate, *inputs, carries)
    assert all(torch.equal(a, b) for a, b in zip(found[2:], again, strict=True))


@pytest.mark.parametrize(("length", "heads", "groups", "states"), [
    (260, 2, 1, 16), (64, 1, 1, 16), (200, 2, 2, 64)])
def test_states_walk_as_they_are_passed_on(monkeypatch, length, heads, groups, states) -> None:
    """To the bit: a block through all chunks, or one a chunk and a pass over what they add."""
    inputs = prepared(1, length, heads, groups, states)
    dy, dstate = torch.randn(1, length, heads, 64).bfloat16(), torch.randn(1, heads, 64, states)

    def both(blocks):
        monkeypatch.setattr(cuda_ssd, "WALK_BLOCKS", blocks)
        y, last, carries = cuda_ssd.forward(*inputs, True)
        return y, last, carries, *cuda_ssd.backward(dy, dstate, *inputs, carries)

    for one, other in zip(both(0), both(1 << 30), strict=True):
        assert torch.equal(one, other)


def test_heads_of_a_block_are_not_seen(monkeypatch) -> None:
    """To the bit: one head in a block of the output, or all of a group."""
    inputs = prepared(1, 70, 6, 2, 16)
    found = []
    for at_once in (1, 1 << 30):
        monkeypatch.setattr(cuda_ssd, "_output_at_once", lambda *_, n=at_once: n)
        found.append(cuda_ssd.forward(*inputs, True))
    assert [cuda_ssd.output_heads(3, 12, lambda _, n=n: n) for n in (1, 1 << 30)] == [3, 1]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# Of one H200 with room for so many blocks a multiprocessor: what was fastest of all that divide.
@pytest.mark.parametrize(("room", "per_group", "blocks", "fastest"), [
    (2, 6, 1536, 6), (2, 24, 1536, 6), (2, 8, 2048, 8), (2, 12, 3072, 6), (2, 16, 4096, 8),
    (2, 24, 6144, 8), (2, 6, 12288, 6), (2, 24, 24576, 8), (3, 24, 1536, 4), (3, 12, 3072, 4),
    (3, 16, 4096, 4), (4, 6, 1536, 3), (4, 24, 1536, 3), (4, 8, 2048, 4), (4, 12, 3072, 6),
    (4, 16, 4096, 8), (4, 24, 6144, 6), (4, 32, 8192, 8), (4, 24, 24576, 8)])
def test_heads_of_a_block(room, per_group, blocks, fastest) -> None:
    assert cuda_ssd.output_heads(per_group, blocks, lambda heads: 132 * room) == fastest
    assert cuda_ssd.output_heads(per_group, per_group, lambda heads: 132 * room) == 1
    assert cuda_ssd.output_heads(1, blocks, lambda heads: 132 * room) == 1


def test_a_shut_gate_keeps_nothing_of_what_was_before() -> None:
    inputs = list(prepared(1, 70, 1, 1, 16))
    inputs[2][0, 20] = -1e6
    y, last, _ = cuda_ssd.forward(*inputs, False)
    inputs[0] = inputs[0].clone()
    inputs[0][0, :20] = 0
    inputs[6] = torch.zeros_like(inputs[6])
    y1, last1, _ = cuda_ssd.forward(*inputs, False)
    assert relative_rms(y[0, 20:], y1[0, 20:]) < 1e-6
    assert relative_rms(last, last1) < 1e-6


def test_documents() -> None:
    """Where one starts the log-decay is -inf: exactly nothing crosses."""
    inputs = list(prepared(1, 140, 2, 1, 16))
    inputs[2][0, [1, 2, 20, 63, 64, 139]] = -torch.inf
    dy, dstate = torch.randn(1, 140, 2, 64).bfloat16(), torch.randn(1, 2, 64, 16)
    wanted = exact_results(inputs, dy, dstate)
    y, last, carries = cuda_ssd.forward(*inputs, True)
    found = [y, last, *cuda_ssd.backward(dy, dstate, *inputs, carries)]
    found[4] = found[4].masked_fill(inputs[2].isinf(), 0)  # as without_past does
    errors = [relative_rms(a, b) for a, b in zip(found[:-1], wanted[:-1], strict=True)
              if b.count_nonzero()]
    assert max(errors) < LIMIT, errors
    inputs[0] = inputs[0].clone()
    inputs[0][0, :64] = 7
    other, last, carries = cuda_ssd.forward(*inputs, True)
    assert torch.equal(other[0, 64:], y[0, 64:])
    assert torch.equal(last, found[1])
    dx, *_ = cuda_ssd.backward(dy, dstate, *inputs, carries)
    assert torch.equal(dx[0, 64:], found[2][0, 64:])


def test_nothing_is_read_past_the_end() -> None:
    inputs = prepared(1, 33, 1, 1, 16)
    longer = [torch.cat([t, torch.full_like(t, torch.nan)], 1)[:, :33] if t.ndim > 2 else t
              for t in inputs[:6]] + [inputs[6]]
    for a, b in zip(cuda_ssd.forward(*inputs, True), cuda_ssd.forward(*longer, True), strict=True):
        assert torch.equal(a, b)
    assert all(t.isfinite().all() for t in cuda_ssd.forward(*longer, True))


@pytest.mark.parametrize(("dtype", "softplus", "bias", "documents"), [
    (torch.bfloat16, True, True, True), (torch.float32, False, False, False)])
@pytest.mark.usefixtures("gates")
@pytest.mark.long
def test_gates(dtype: torch.dtype, softplus: bool, bias: bool, documents: bool) -> None:
    torch.manual_seed(0)
    dt = (3 * torch.randn(2, 700, 9)).to(dtype)[..., 4:7]
    dt[0, :3, 0] = torch.tensor([30.0, -30.0, -90.0])
    A, dt_bias = -torch.rand(3), torch.randn(3) if bias else None
    ages = (torch.arange(1400).view(2, 700) % 90).to(torch.uint8) if documents else None
    dstep, dlog_decay = torch.randn(2, 2, 700, 3)
    if ages is not None:
        dlog_decay[ages == 0] = torch.nan  # of what is not handed on nobody asks the gradient
    found = [*cuda_gates._forward(dt, A, dt_bias, ages, softplus),
             *cuda_gates._backward(dstep, dlog_decay, dt, A, dt_bias, ages, softplus)]
    exact = [None if t is None else t.double().requires_grad_() for t in (dt, A, dt_bias)]
    wanted = cuda_gates._in_torch(*exact, ages, softplus)
    leaves = [t for t in exact if t is not None]
    gradients = torch.autograd.grad(wanted, leaves, [dstep.double(), dlog_decay.double()])
    # relative_rms knows no difference of infinities.
    found[1], log_decay = (it.masked_fill(it == -torch.inf, 9) for it in (found[1], wanted[1]))
    wanted = wanted[0], log_decay
    for a, b in zip([t for t in found if t is not None], (*wanted, *gradients), strict=True):
        # Rounded once to the dtype of dt, or sums in float32.
        assert relative_rms(a, b.detach()) < (3e-3 if a.dtype == torch.bfloat16 else 1e-6)
    alone = cuda_gates._backward(None, dlog_decay, dt, A, dt_bias, ages, softplus)[0]
    zeros = torch.zeros_like(dstep)
    assert torch.equal(alone, cuda_gates._backward(
        zeros, dlog_decay, dt, A, dt_bias, ages, softplus)[0])
