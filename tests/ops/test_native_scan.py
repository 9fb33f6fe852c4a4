"""The native CPU scan against the definition in float64, written out here step by step."""

from __future__ import annotations

import math
import os
import platform
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambabyte.ops.build import c as native_build
from mambabyte.ops.scan import cpu as native

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
STREAMS = ("u", "delta", "B", "C", "z")
Inputs = dict[str, Tensor | None]

needs_native = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])


def definition(x: Inputs, softplus: bool) -> tuple[Tensor, Tensor]:
    """One step after another, in the dtype of the inputs."""
    u, delta, A, B, C = (x[k] for k in NAMES[:5])
    dt = delta if x["delta_bias"] is None else delta + x["delta_bias"]
    dt = F.softplus(dt) if softplus else dt
    h = x["initial_state"]
    h = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype) if h is None else h
    ys = []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    y = torch.stack(ys, 1)
    y = y if x["D"] is None else y + x["D"] * u
    return (y if x["z"] is None else y * F.silu(x["z"])), h


def make_inputs(
    batch: int,
    length: int,
    channels: int,
    d_state: int,
    dtype: torch.dtype = torch.float32,
    absent: tuple[str, ...] = (),
    seed: int = 0,
) -> Inputs:
    """Random inputs; decays from 1 - 1e-5 to exp(-80) come out of the exponentials."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    params = torch.float64 if dtype == torch.float64 else torch.float32
    x: Inputs = {
        "u": normal(batch, length, channels).to(dtype),
        "delta": (2 * normal(batch, length, channels) - 3).to(dtype),
        "A": -torch.exp(1.5 * normal(channels, d_state)).to(params),
        "B": normal(batch, length, d_state).to(dtype),
        "C": normal(batch, length, d_state).to(dtype),
        "D": normal(channels).to(params),
        "z": normal(batch, length, channels).to(dtype),
        "delta_bias": normal(channels).to(params),
        "initial_state": normal(batch, channels, d_state).to(params),
    }
    return {k: None if k in absent else v for k, v in x.items()}


def run(x: Inputs, softplus: bool, dy: Tensor, dlast: Tensor | None) -> dict[str, Tensor | None]:
    """Outputs and every gradient of the native pair, by name."""
    args = [x[k] for k in NAMES]
    y, last, saved = native.forward(*args, softplus, True)
    grads = native.backward(dy, dlast, *args, saved, softplus)
    return {"y": y, "last": last, **dict(zip(NAMES, grads, strict=True))}


def oracle(x: Inputs, softplus: bool, dy: Tensor, dlast: Tensor | None) -> dict[str, Tensor]:
    """The same of the definition, through autograd in float64."""
    x64 = {k: None if v is None else v.double().requires_grad_() for k, v in x.items()}
    y, last = definition(x64, softplus)
    loss = (y * dy.double()).sum()
    if dlast is not None:
        loss = loss + (last * dlast.double()).sum()
    loss.backward()
    grads = {k: v.grad if v.grad is not None else torch.zeros_like(v)
             for k, v in x64.items() if v is not None}  # fmt: skip
    return {"y": y.detach(), "last": last.detach(), **grads}


def relative_rms(got: Tensor, want: Tensor) -> float:
    """Relative error; what lies below float32's smallest normal number counts as zero."""
    assert got.shape == want.shape
    error = float((got.double() - want).square().mean().sqrt())
    scale = float(want.square().mean().sqrt())
    flushed = 1e-37 if got.dtype == torch.float32 else 0.0
    return 0.0 if error <= flushed else error / scale if scale else math.inf


def check(x: Inputs, softplus: bool, tolerance: float, grad_tolerance: float) -> None:
    u = x["u"]
    generator = torch.Generator().manual_seed(99)
    dy = torch.randn(u.shape, generator=generator).to(u.dtype)
    params = torch.float64 if u.dtype == torch.float64 else torch.float32
    dlast = torch.randn(u.shape[0], *x["A"].shape, generator=generator).to(params)
    got, want = run(x, softplus, dy, dlast), oracle(x, softplus, dy, dlast)
    for name, value in got.items():
        assert (value is None) == (name not in want), name
        if value is None:
            continue
        expected = {"y": u, "last": x["A"]}.get(name, x.get(name))
        assert value.dtype == expected.dtype, name
        limit = tolerance if name in ("y", "last") else grad_tolerance
        if value.numel() < 8:
            # Each value is a sum over states, steps or channels. One may cancel to a hundredth
            # of its terms and then has two digits fewer; the mean square of eight does not.
            limit *= 100
        assert relative_rms(value, want[name]) <= limit, name


# ------------------------------------------------------------------------------ correctness


@needs_native
def test_numbers_worked_by_hand() -> None:
    """Two steps, one channel, one state; exp(dt A) = 1/2 and 1/4."""
    row = torch.tensor([[[1.0], [2.0]]])  # delta = dt: 1, 2
    x: Inputs = dict.fromkeys(NAMES)
    x |= {"u": torch.tensor([[[3.0], [5.0]]]), "delta": row, "A": torch.tensor([[-math.log(2)]])}
    x |= {"B": torch.tensor([[[1.0], [1.0]]]), "C": torch.tensor([[[2.0], [1.0]]])}
    x |= {"D": torch.tensor([10.0]), "initial_state": torch.tensor([[[4.0]]])}
    y, last, _ = native.forward(*(x[k] for k in NAMES), False, False)
    # h: 4/2 + 1*3 = 5, then 5/4 + 2*5 = 11.25; y: 2*5 + 10*3, then 11.25 + 10*5
    torch.testing.assert_close(y, torch.tensor([[[40.0], [61.25]]]))
    torch.testing.assert_close(last, torch.tensor([[[11.25]]]))


SHAPES = [
    (1, 1, 1, 1),
    (2, 16, 32, 16),
    (3, 17, 33, 3),
    (2, 67, 200, 16),
    (1, 131, 129, 64),
    (1, 1025, 20, 16),
    (2, 33, 384, 7),
]


@needs_native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("softplus", [True, False])
def test_float32(shape: tuple[int, int, int, int], softplus: bool) -> None:
    x = make_inputs(*shape)
    if not softplus:
        x["delta"], x["delta_bias"] = F.softplus(x["delta"]), x["delta_bias"].abs()
    check(x, softplus, 1e-6, 1e-5)


@needs_native
@settings(max_examples=40)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 50),
    channels=st.integers(1, 150),
    d_state=st.integers(1, 64),
    absent=st.sets(st.sampled_from(["D", "z", "delta_bias", "initial_state"])),
    seed=st.integers(0, 9),
)
def test_float32_any_shape(
    batch: int, length: int, channels: int, d_state: int, absent: set[str], seed: int
) -> None:
    check(make_inputs(batch, length, channels, d_state, absent=tuple(absent), seed=seed),
          True, 1e-6, 1e-5)  # fmt: skip


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_same_rounded_inputs(dtype: torch.dtype) -> None:
    check(make_inputs(2, 70, 150, 16, dtype), True, 3e-3, 3e-3)


@needs_native
def test_float64() -> None:
    check(make_inputs(2, 40, 37, 5, torch.float64), True, 1e-14, 1e-14)


@needs_native
@pytest.mark.parametrize("log_decay", [-1e-7, -1e-5, -1e-2, -1.0, -20.0, -80.0])
@pytest.mark.long
def test_constant_decay_over_a_long_sequence(log_decay: float) -> None:
    """Rounding exp(dt A) to float32 first would be off by 2e-8 per step, in one direction."""
    x = make_inputs(1, 3000, 8, 2, absent=("D", "z", "delta_bias"))
    x["delta"] = torch.full_like(x["u"], 0.5)
    x["A"] = torch.full_like(x["A"], 2 * log_decay)
    check(x, False, 1e-6, 1e-5)


@needs_native
def test_exponential_alone() -> None:
    """u = 0, h = 1: the state is exp(dt A), up to the rounding of dt A log2(e)."""
    exponents = -torch.logspace(-7, math.log10(80), 4096)
    zero, one = torch.zeros(1, 1, 4096), torch.ones(1, 1, 4096)
    A, B = exponents[:, None], torch.ones(1, 1, 1)
    start = torch.ones(1, 4096, 1)
    last = native.forward(zero, one, A, B, B, None, None, None, start, False, False)[1].flatten()
    exact = exponents.double().exp()
    limit = 1e-7 + 1.3e-7 * exponents.abs().double()
    assert ((last - exact).abs() <= limit * exact).all()


@needs_native
def test_gradcheck() -> None:
    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):  # type: ignore[no-untyped-def]
            y, last, saved = native.forward(*args, True, True)
            ctx.save_for_backward(*args, saved)
            return y, last

        @staticmethod
        def backward(ctx, dy, dlast):  # type: ignore[no-untyped-def]
            return native.backward(dy, dlast, *ctx.saved_tensors, True)

    x = make_inputs(2, 19, 3, 2, torch.float64)
    x["delta"].clamp_(max=2)
    assert torch.autograd.gradcheck(Scan.apply, [x[k].requires_grad_() for k in NAMES])


@needs_native
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an x86 processor")
def test_code_for_processors_without_wide_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors of 16 bytes and no fused multiply-add: the path that aarch64 takes as well."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_build, "TUNING", (["-march=x86-64"],))
    library = native._load.__wrapped__(False)
    assert not isinstance(library, str), library
    monkeypatch.setattr(native, "_library", lambda double: library)
    check(make_inputs(2, 67, 200, 16), True, 1e-6, 1e-5)
    check(make_inputs(2, 33, 45, 5, torch.bfloat16), True, 3e-3, 3e-3)
    test_exponential_alone()


# ------------------------------------------------------------------------------- invariances


@needs_native
@settings(max_examples=20)
@given(length=st.integers(2, 60), cut=st.integers(1, 59))
def test_split(length: int, cut: int) -> None:
    cut = min(cut, length - 1)
    x = make_inputs(2, length, 40, 5)
    args = [x[k] for k in NAMES]
    y, last, _ = native.forward(*args, True, False)
    parts, state = [], x["initial_state"]
    for part in (slice(0, cut), slice(cut, None)):
        cutout = [v[:, part] if v is not None and k in STREAMS else v
                  for k, v in x.items()]  # fmt: skip
        cutout[-1] = state
        out, state, _ = native.forward(*cutout, True, False)
        parts.append(out)
    assert torch.equal(torch.cat(parts, 1), y)
    assert torch.equal(state, last)


@needs_native
def test_place_in_the_batch_repetition_and_threads_do_not_change_a_bit() -> None:
    x = make_inputs(5, 130, 300, 16)
    dy = torch.randn(x["u"].shape)
    dlast = torch.randn(x["initial_state"].shape)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run(x, True, dy, dlast)
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            again = run(x, True, dy, dlast)
            assert all(torch.equal(first[k], again[k]) for k in first)
    finally:
        torch.set_num_threads(before)
    for b in (0, 3):
        shared = ("A", "D", "delta_bias")
        row = {k: v if k in shared else v[b : b + 1] for k, v in x.items()}
        alone = run(row, True, dy[b : b + 1], dlast[b : b + 1])
        for k in set(alone) - set(shared):
            assert torch.equal(alone[k], first[k][b : b + 1]), k


def poisoned(allocate, *args, **kwargs):  # type: ignore[no-untyped-def]
    return allocate(*args, **kwargs).fill_(math.nan)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    x = make_inputs(2, 35, 45, 3, dtype)
    dy = torch.randn(x["u"].shape).to(dtype)
    clean = run(x, True, dy, None)
    for name in ("empty", "empty_like"):
        allocate = partial(poisoned, getattr(torch, name))
        monkeypatch.setattr(torch, name, allocate)
    dirty = run(x, True, dy, None)
    assert all(torch.equal(clean[k], dirty[k]) for k in clean)
    assert not any(v.isnan().any() for v in dirty.values())


@needs_native
def test_strides() -> None:
    """Slices of a wider projection, transposed batch and time, and a strided last axis."""
    x = make_inputs(3, 20, 40, 4)
    dy = torch.randn(x["u"].shape)
    want = run(x, True, dy, None)
    wide = torch.cat([x["delta"], x["B"], x["C"]], -1)
    delta, B, C = wide.split([40, 4, 4], -1)
    u = x["u"].transpose(0, 1).contiguous().transpose(0, 1)
    z = x["z"].transpose(1, 2).contiguous().transpose(1, 2)
    got = run({**x, "u": u, "delta": delta, "B": B, "C": C, "z": z}, True, dy.expand_as(dy), None)
    assert all(torch.equal(got[k], want[k]) for k in want)
    flat = torch.ones(()).expand(x["u"].shape)  # what .sum().backward() hands over
    got, want = run(x, True, flat, None), run(x, True, flat.contiguous(), None)
    assert all(torch.equal(got[k], want[k]) for k in want)


@needs_native
@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_propagate(name: str, value: float) -> None:
    x = make_inputs(2, 40, 20, 3)
    x["initial_state"].zero_()
    x[name][1, 23, 1] = value
    y, last, _ = native.forward(*(x[k] for k in NAMES), True, False)
    want_y, want_last = definition({k: v.double() for k, v in x.items()}, True)
    assert torch.equal(y.isfinite(), want_y.isfinite())
    assert torch.equal(last.isfinite(), want_last.isfinite())
    assert y[0].isfinite().all()
    assert not y[1].isfinite().all()
    if math.isnan(value):
        assert torch.equal(y.isnan(), want_y.isnan())
    else:  # an infinite state is nan from the next step on: x + q x is inf - inf for q < 0
        assert torch.equal(y[:, :24].isnan(), want_y[:, :24].isnan())


@needs_native
def test_empty_and_shapes() -> None:
    assert native.saved_shape(2, 33, 40, 5) == (2, 3, 5, 64)
    x = make_inputs(2, 33, 40, 5)
    saved = native.forward(*(x[k] for k in NAMES), True, True)[2]
    assert saved.shape == native.saved_shape(2, 33, 40, 5)
    assert native.forward(*(x[k] for k in NAMES), True, False)[2].numel() == 0
    cut = {k: v[:, :0] if k in STREAMS else v for k, v in x.items()}
    out = run(cut, True, cut["u"], torch.ones_like(x["initial_state"]))
    assert out["y"].shape == (2, 0, 40)
    assert torch.equal(out["last"], x["initial_state"])
    assert torch.equal(out["initial_state"], torch.ones_like(x["initial_state"]))
    assert not out["A"].any()


# ------------------------------------------------------------------------------ single steps


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 384, 16), (3, 37, 5)], ids=str)
def test_scan_step_is_the_scan_at_length_one(
    dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    batch, channels, d_state = shape
    x = make_inputs(batch, 20, channels, d_state, dtype)
    y, last, _ = native.forward(*(x[k] for k in NAMES), True, False)
    state, outs = x["initial_state"], []
    for t in range(20):
        now = [v[:, t] if k in STREAMS else v for k, v in x.items()]
        out, state = native.scan_step(*now[:-1], state, True)
        outs.append(out)
    assert torch.equal(torch.stack(outs, 1), y)
    assert torch.equal(state, last)
    out, _ = native.scan_step(*now[:5], None, None, None, None, False)
    assert (out.shape, out.dtype) == ((batch, channels), dtype)


# ------------------------------------------------------------------------------ the machinery


@needs_native
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_survives_fork() -> None:
    x = make_inputs(4, 300, 256, 16)
    y, _, _ = native.forward(*(x[k] for k in NAMES), True, False)
    child = os.fork()
    if child == 0:  # no pytest in the child: leave at once, with the verdict as exit status
        same = torch.equal(native.forward(*(x[k] for k in NAMES), True, False)[0], y)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
