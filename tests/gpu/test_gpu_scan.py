"""The CUDA scan against the float64 definition: every output, state and gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scan_cases import (
    GRADIENT_LIMIT,
    NAMES,
    OUTPUT_LIMIT,
    SEQUENCES,
    STATE_LIMIT,
    assert_close,
    definition,
    make_inputs,
    poison,
    relative_rms,
    results,
    scan,
    size_without_luck,
)

# What torch itself warns of depends on the machine.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 1),
    (2, 1, 384),
    (3, 7, 5),
    (2, 8, 32),
    (2, 9, 33),
    (1, 63, 31),
    (2, 257, 48),
    (5, 128, 100),
    (2, 384, 384),
    (1, 1025, 40),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = make_inputs(*shape, dtype=dtype)
    wanted = definition(inputs)
    poison()
    assert_close(results(inputs), wanted, dtype)


@pytest.mark.parametrize("states", [1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 48, 64])
def test_parity_for_each_number_of_states(states: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(2, 67, 48, states, dtype)
        wanted = definition(inputs)
        poison(256)
        assert_close(results(inputs), wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "without",
    [
        ("D",),
        ("z",),
        ("delta_bias",),
        ("initial_state",),
        ("D", "z"),
        ("D", "z", "delta_bias", "initial_state"),
    ],
)
@pytest.mark.parametrize("softplus", [True, False])
def test_parity_without_options(
    without: tuple[str, ...], dtype: torch.dtype, softplus: bool
) -> None:
    inputs = make_inputs(2, 100, 64, dtype=dtype, without=without)
    if not softplus:  # steps must be positive by themselves then
        inputs["delta"] = inputs["delta"].abs() * 0.1  # type: ignore[union-attr]
        if inputs["delta_bias"] is not None:
            inputs["delta_bias"] = inputs["delta_bias"].abs() * 0.01
    wanted = definition(inputs, softplus)
    poison(256)
    assert_close(results(inputs, softplus=softplus), wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_on_a_long_sequence(dtype: torch.dtype) -> None:
    inputs = make_inputs(1, 20_011, 64, dtype=dtype)
    wanted = definition(inputs, form="chunked")
    poison()
    assert_close(results(inputs), wanted, dtype)


def test_parity_where_batch_and_channels_fill_the_gpu() -> None:
    inputs = make_inputs(64, 130, 384, dtype=torch.bfloat16)
    wanted = definition(inputs, form="chunked")
    assert_close(results(inputs), wanted, torch.bfloat16)


def test_parity_of_views_of_one_projection() -> None:
    """u and z are halves of one tensor, B and C slices of another: rows with gaps."""
    inputs = make_inputs(2, 70, 64, dtype=torch.bfloat16)
    wanted = definition(inputs)
    both = torch.cat([inputs["u"], inputs["z"]], dim=2)
    inputs["u"], inputs["z"] = both.chunk(2, dim=2)
    low = torch.cat([inputs["u"][..., :5], inputs["B"], inputs["C"]], dim=2)
    _, inputs["B"], inputs["C"] = low.split([5, 16, 16], dim=2)
    assert_close(results(inputs), wanted, torch.bfloat16)


@pytest.mark.parametrize("log_decay", [-1e-7, -1e-4, -1e-2, -1.0, -20.0, -80.0])
def test_parity_at_extreme_decay(log_decay: float) -> None:
    """A times delta is the log of what is left of the state after a step."""
    inputs = make_inputs(2, 300, 48, without=("delta_bias",))
    inputs["delta"] = torch.full_like(inputs["delta"], 0.5)
    inputs["A"] = torch.full_like(inputs["A"], 2 * log_decay)
    wanted = definition(inputs, softplus=False)
    poison(256)
    got = results(inputs, softplus=False)
    if log_decay < -50:  # the start is forgotten beyond float32: its gradient is zero in effect
        assert relative_rms(got.pop("dinitial_state"), wanted.pop("dinitial_state")) < 1e-4
        # exp(-80) leaves the gradient of A among the smallest numbers of float32, where bits are
        # lost: its error is small beside 1e-30, not beside itself.
        error = got.pop("dA").double() - wanted.pop("dA").double()
        assert float(error.square().mean().sqrt()) < 1e-35
    assert_close(got, wanted, torch.float32)


def test_parity_with_all_decays_at_once() -> None:
    inputs = make_inputs(2, 300, 48, without=("delta_bias",))
    inputs["delta"] = torch.rand_like(inputs["delta"]) + 0.5
    inputs["A"] = -torch.logspace(-7, 1.9, 16, device="cuda").expand(48, 16).contiguous()
    assert_close(
        results(inputs, softplus=False), definition(inputs, softplus=False), torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [1, 8, 100, 255])
def test_two_scans_make_one(cut: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(2, 256, 64, dtype=dtype)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    whole_y, whole_state = scan(leaves)
    first = {n: t[:, :cut] if n in SEQUENCES else t for n, t in leaves.items()}
    first_y, state = scan(first)
    second = {n: t[:, cut:] if n in SEQUENCES else t for n, t in leaves.items()}
    second_y, last_state = scan(second | {"initial_state": state})
    y = torch.cat([first_y, second_y], dim=1)
    limit = 1e-6 if dtype == torch.float32 else 3e-3
    assert relative_rms(last_state, whole_state) < STATE_LIMIT[dtype]
    assert relative_rms(y, whole_y) < limit
    weights = (torch.randn_like(y), torch.randn_like(state))
    ones = torch.autograd.grad((whole_y, whole_state), list(leaves.values()), weights)
    twos = torch.autograd.grad((y, last_state), list(leaves.values()), weights)
    for name, one, two in zip(leaves, ones, twos, strict=True):
        assert relative_rms(two, one) < (1e-5 if dtype == torch.float32 else 4e-3), name


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@example(batch=1, length=40, channels=1, states=1, dtype=torch.float32, seed=0)  # dD cancels
@given(
    batch=st.integers(1, 5),
    length=st.integers(1, 140),
    channels=st.integers(1, 140),
    states=st.integers(1, 64),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_parity_on_any_shape(
    batch: int, length: int, channels: int, states: int, dtype: torch.dtype, seed: int
) -> None:
    inputs = make_inputs(batch, length, channels, states, dtype, seed=seed)
    wanted = definition(inputs, form="chunked")
    poison(64)
    got = results(inputs)
    # Few elements make a relative RMS wide: a single rounding may weigh more than on average.
    slack = 2 if dtype == torch.bfloat16 else 3
    for name in got:
        limits = OUTPUT_LIMIT if name == "y" else GRADIENT_LIMIT
        limit = (STATE_LIMIT if name == "final_state" else limits)[dtype]
        error = relative_rms(got[name], wanted[name])
        if error > slack * limit and name in ("y", "final_state", "dA", "dD", "ddelta_bias"):
            error *= float(wanted[name].square().mean().sqrt()) / size_without_luck(inputs, name)
        assert error <= slack * limit, name


@pytest.mark.parametrize("shape", [(16, 333, 384), (1, 4099, 384), (3, 77, 50)])
def test_repetition_is_bit_equal(shape: tuple[int, int, int]) -> None:
    inputs = make_inputs(*shape, dtype=torch.bfloat16)
    first = results(inputs)
    for _ in range(4):
        poison(128)
        again = results(inputs)
        for name, tensor in first.items():
            assert torch.equal(tensor, again[name]), name


def test_the_place_in_the_batch_does_not_matter() -> None:
    inputs = make_inputs(12, 200, 96, dtype=torch.bfloat16)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).cuda()
    per_row = (*SEQUENCES, "initial_state")
    moved = {n: t[order] if n in per_row else t for n, t in inputs.items()}
    # the output gradients of results() go by place, so only what does not depend on them
    (y, state), (moved_y, moved_state) = scan(inputs), scan(moved)
    assert torch.equal(y[order], moved_y)
    assert torch.equal(state[order], moved_state)
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    moved_leaves = {n: t.detach().requires_grad_() for n, t in moved.items()}
    weight = torch.randn_like(y)
    inputs_of = [leaves[n] for n in per_row]
    straight = torch.autograd.grad(scan(leaves)[0], inputs_of, weight)
    inputs_of = [moved_leaves[n] for n in per_row]
    mixed = torch.autograd.grad(scan(moved_leaves)[0], inputs_of, weight[order])
    for name, one, two in zip(per_row, straight, mixed, strict=True):
        assert torch.equal(one[order], two), name


def test_offsets_past_two_to_the_31() -> None:
    batch, length, channels = 41, 65_536, 808
    needed = 15 * 2 * batch * length * channels
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory")
    assert batch * length * channels > 2**31
    torch.cuda.empty_cache()
    row = make_inputs(1, length, channels, dtype=torch.bfloat16)
    per_row = (*SEQUENCES, "initial_state")
    inputs = {}
    for name, tensor in row.items():
        if name in per_row:
            wide = torch.zeros(batch, *tensor.shape[1:], dtype=tensor.dtype, device="cuda")
            wide[-1] = tensor[0]
            wide[0] = tensor[0]
            tensor = wide
        inputs[name] = tensor
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    y, state = scan(leaves)
    weight = torch.randn(1, length, channels, device="cuda", dtype=y.dtype).expand(y.shape)
    gradients = torch.autograd.grad(y, [leaves[n] for n in per_row], weight)
    one = {n: t.detach().requires_grad_() for n, t in row.items()}
    y_one, state_one = scan(one)
    wanted = torch.autograd.grad(y_one, [one[n] for n in per_row], weight[:1])
    for place in (0, batch - 1):
        assert relative_rms(y[place], y_one[0]) < 1e-3
        assert relative_rms(state[place], state_one[0]) < 1e-5
        for name, wide, narrow in zip(per_row, gradients, wanted, strict=True):
            assert relative_rms(wide[place], narrow[0]) < 3e-3, name
    del leaves, inputs, y, gradients
    torch.cuda.empty_cache()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["u", "delta", "B", "z"])
def test_nan_and_inf_spread_as_in_the_definition(where: str, value: float) -> None:
    inputs = make_inputs(2, 40, 16)
    inputs[where][1, 20, 3] = value
    y, state = scan(inputs)
    exact_y, exact_state = scan({n: t.double() for n, t in inputs.items()}, "recurrent")
    assert torch.equal(y.isfinite(), exact_y.isfinite())
    assert torch.equal(state.isfinite(), exact_state.isfinite())
    finite = exact_y.isfinite()
    assert relative_rms(y[finite], exact_y[finite]) < 1e-6


def test_nan_crosses_segments_that_forget() -> None:
    """Large steps forget the state at once, so what a segment hands on is summed over a few steps;
    a nan far from them must still arrive, in both directions and in its own channel alone."""
    inputs = make_inputs(1, 700, 32, dtype=torch.bfloat16)
    inputs["delta"] += 5
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    weight = torch.ones(1, 700, 32, dtype=torch.bfloat16, device="cuda")
    weight[0, 690, 3] = float("nan")
    du = torch.autograd.grad(scan(leaves)[0], leaves["u"], weight)[0][0]
    with torch.no_grad():
        inputs["u"][0, 4, 3] = float("nan")
        y, state = (x[0] for x in scan(inputs))
    assert not y[4:, 3].isfinite().any()
    assert not state[3].isfinite().any()
    assert not du[:691, 3].isfinite().any()
    for finite in (y[:, 4:], y[:, :3], du[:, 4:], du[:, :3]):
        assert finite.isfinite().all()


def test_names_of_inputs_are_complete() -> None:
    assert set(make_inputs(1, 1, 1)) == set(NAMES)
