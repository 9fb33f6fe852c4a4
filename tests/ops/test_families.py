"""SSD, Mamba-3 and the gated delta rule: definitions by hand, other forms against these."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mambabyte.errors import UserError
from mambabyte.ops import selective_scan, selective_scan_fn
from mambabyte.ops.compare import relative_rms
from mambabyte.ops.delta.dispatch import gated_delta_rule
from mambabyte.ops.ssd.decay import decayed_products
from mambabyte.ops.ssd.dispatch import ssd_scan
from mambabyte.ops.ssd.mamba3.dispatch import mamba3_scan
from tests.helpers.family_cases import GATES, OPERATORS, in_dtype, make_inputs, results

FAMILIES = list(OPERATORS)
LENGTHS = [1, 2, 15, 16, 17, 37, 64]  # with chunks of 16: below, at and past an edge


FORMS = ["chunked", "fused"]


def assert_close(found, wanted, limit, floor=None):
    """Relative RMS of each result within ``limit``, or within four times that of ``floor``, the
    float32 recurrence. What is zero in the definition must be next to nothing."""
    for name, got in found.items():
        true = wanted[name]
        assert torch.isfinite(got).all(), name
        if true.abs().max() < 1e-30:  # below, float32 underflows and may
            assert got.abs().max() < 1e-30, name
            continue
        allowed = limit if floor is None else max(limit, 4 * relative_rms(floor[name], true))
        error = relative_rms(got, true)
        assert error < allowed, (name, error, allowed)


def test_ssd_by_hand():
    # One head, one channel, one state; A = -ln 2 and dt = 1: the state halves at each step.
    def number(*x):
        return torch.tensor(x, dtype=torch.float64)

    y, state = ssd_scan(
        number(1, 0, 4).view(1, 3, 1, 1), number(1, 1, 1).view(1, 3, 1), number(-math.log(2)),
        number(1, 7, 0.5).view(1, 3, 1, 1), number(1, 3, 2).view(1, 3, 1, 1), number(10),
        form="recurrent")
    # h: 1; 0.5; 0.25 + 4 * 0.5 = 2.25.   y = C h + 10 x: 11; 1.5; 4.5 + 40.
    assert y.flatten().tolist() == pytest.approx([11, 1.5, 44.5], abs=1e-14)
    assert state.item() == pytest.approx(2.25, abs=1e-15)


def test_ssd_is_the_selective_scan_with_a_decay_a_head():
    inputs = make_inputs("ssd", 2, 29, heads=3, keys=4, values=5)
    x, dt, A, B, C, D, h = inputs.values()
    y, state = ssd_scan(x, dt, A, B, C, D, dt_softplus=True, initial_state=h, form="recurrent")
    rates = A.repeat_interleave(5)[:, None].expand(-1, 4)  # (D, N)
    y1, state1 = selective_scan(
        x.flatten(2), dt.repeat_interleave(5, 2), rates, B[:, :, 0], C[:, :, 0],
        D.repeat_interleave(5), delta_softplus=True, initial_state=h.flatten(1, 2),
        form="recurrent")
    assert relative_rms(y.flatten(2), y1) < 1e-14
    assert relative_rms(state.flatten(1, 2), state1) < 1e-14


def test_mamba3_by_hand():
    """One head, one channel, one pair of states as a complex number, by Python's."""
    turn, x, B, C = 0.5, (3.0, -1.0, 2.0), (1 + 2j, 0.5 - 1j, 2j), (1 - 1j, 3 + 0j, 1 + 1j)
    dt, rate, mix = (0.5, 2.0, 1.0), (-1.0, -0.25, -0.1), (0.25, 1.0, 0.0)
    h, before, wanted = 0j, 0j, []
    for t in range(3):
        a = cmath.exp(dt[t] * (rate[t] - 1j * turn))
        written = x[t] * (B[t] + (1 + 1j))
        h = a * h + (1 - mix[t]) * dt[t] * a * before + mix[t] * dt[t] * written
        before = written
        wanted.append((h * C[t].conjugate()).real + 10 * x[t])

    def number(values, *shape):
        return torch.tensor(values, dtype=torch.float64).view(1, 3, *shape)

    def pairs(values):
        return number([[z.real, z.imag] for z in values], 1, 2)

    step, one = number(dt, 1), torch.ones(1, 2, dtype=torch.float64)
    y, state = mamba3_scan(
        number(x, 1, 1), step, step * number(rate, 1), pairs(B), pairs(C), number([turn] * 3, 1),
        number(mix, 1), torch.tensor([10.0], dtype=torch.float64), B_bias=one, form="recurrent")
    assert y.flatten().tolist() == pytest.approx(wanted, abs=1e-14)
    assert state.ssm_state.flatten().tolist() == pytest.approx([h.real, h.imag], abs=1e-14)
    assert state.k_state.flatten().tolist() == [1, 3]
    assert state.v_state.item() == 2


def test_mamba3_that_writes_at_the_end_of_a_step_and_does_not_turn_is_ssd():
    inputs = make_inputs("mamba3", 2, 29, heads=4, keys=4, values=5, groups=2)
    x, dt, _, B, C, theta, mix, D, *_ = inputs.values()
    A = -torch.rand(4, dtype=torch.float64)
    y, state = mamba3_scan(
        x, dt, dt * A, B, C, 0 * theta, torch.ones_like(mix), D, form="chunked", chunk_size=8)
    y1, h1 = ssd_scan(x, dt, A, B, C, D, form="recurrent")
    assert relative_rms(y, y1) < 1e-14
    assert relative_rms(state.ssm_state, h1) < 1e-14


def test_whole_turns_are_nothing():
    """However many there are in a step: only what is left over turns."""
    inputs = in_dtype(make_inputs("mamba3", 1, 200, keys=4, values=3), torch.float32)
    inputs["dt"] = torch.ones_like(inputs["dt"])
    theta = torch.rand(inputs["theta"].shape, dtype=torch.float64)
    found = OPERATORS["mamba3"](**inputs | {"theta": theta + 2 * math.pi * 100_000})[0]
    assert relative_rms(found, OPERATORS["mamba3"](**inputs | {"theta": theta})[0]) < 1e-7


def test_delta_rule_by_hand():
    # Two orthogonal keys. Each step halves the state, then writes; the second write replaces.
    k = torch.tensor([[1.0, 0], [0, 1], [1, 0]], dtype=torch.float64).view(1, 3, 1, 2)
    v = torch.tensor([8.0, 3, 5], dtype=torch.float64).view(1, 3, 1, 1)
    beta = torch.tensor([1.0, 1, 0.5], dtype=torch.float64).view(1, 3, 1)
    q = torch.ones_like(k)
    half = torch.full((1, 3, 1), -math.log(2), dtype=torch.float64)
    o, state = gated_delta_rule(q, k, v, half, beta, form="recurrent")
    # S: (8, 0); (4, 3); decayed (2, 1.5), half of the way from 2 to 5: (3.5, 1.5).
    assert o.flatten().tolist() == pytest.approx([8, 7, 5], abs=1e-14)
    assert state.flatten().tolist() == pytest.approx([3.5, 1.5], abs=1e-14)
    # The same with gates by channel, the second of them shut: its memory is gone at each step.
    shut = torch.stack([half, torch.full_like(half, -math.inf)], -1)
    o, state = gated_delta_rule(q, k, v, shut, beta, form="recurrent")
    assert o.flatten().tolist() == pytest.approx([8, 7, 3.5], abs=1e-14)
    assert state.flatten().tolist() == pytest.approx([3.5, 0], abs=1e-14)


@pytest.mark.parametrize("family", FAMILIES)
def test_definition_gradients_against_finite_differences(family):
    f, vector = of_one_vector(
        OPERATORS[family], make_inputs(family, 1, 4, heads=2, keys=3, values=2), form="recurrent")
    assert torch.autograd.gradcheck(f, vector, fast_mode=True)


def of_one_vector(function, inputs, **options):
    """``function`` as a map of one vector to another, and the vector of ``inputs``: what is checked
    by differences costs as little as one input."""
    shapes = [t.shape for t in inputs.values()]

    def f(vector):
        parts = vector.split([s.numel() for s in shapes])
        found = function(**{name: part.view(shape) for name, part, shape in zip(
            inputs, parts, shapes, strict=True)}, **options)
        return torch.cat([t.flatten() for t in found])

    return f, torch.cat([t.flatten() for t in inputs.values()]).requires_grad_()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", FORMS)
def test_forms_equal_the_definition(family, length, form):
    inputs = make_inputs(family, 2, length, heads=4, groups=2)
    wanted = results(family, inputs, "recurrent")
    assert_close(results(family, inputs, form, 16), wanted, 1e-12)
    single = in_dtype(inputs, torch.float32)
    wanted = results(family, in_dtype(single, torch.float64), "recurrent")
    assert_close(results(family, single, form, 16), wanted, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gates", list(GATES))
@pytest.mark.parametrize("repeated_keys", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms_survive_every_gate(family, gates, repeated_keys, form):
    if family in ("ssd", "mamba3") and repeated_keys:
        return  # nothing in these depends on how keys lie
    inputs = make_inputs(family, 2, 53, gates=gates, repeated_keys=repeated_keys)
    wanted = results(family, inputs, "recurrent")
    assert_close(results(family, inputs, form, 16), wanted, 1e-12)
    single = in_dtype(inputs, torch.float32)
    wanted = results(family, in_dtype(single, torch.float64), "recurrent")
    # Keys of beta up to 2 turn the state over at every step: the recurrence itself rounds more.
    floor = results(family, single, "recurrent") if repeated_keys else None
    assert_close(results(family, single, form, 16), wanted, 1e-5, floor)


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_a_shut_gate_is_exact(family):
    inputs = make_inputs(family, 1, 21)
    inputs["log_decay"][:, ::3] = -math.inf
    wanted = results(family, inputs, "recurrent")
    assert_close(results(family, inputs, "chunked", 8), wanted, 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["recurrent", *FORMS])
def test_half_precision_inputs(family, form):
    """bf16 sequences: computed in float32, so only the results are rounded."""
    inputs = make_inputs(family, 2, 45, dtype=torch.bfloat16)
    wanted = results(family, in_dtype(inputs, torch.float64), "recurrent")
    found = results(family, inputs, form)
    assert found["y"].dtype == torch.bfloat16
    assert found["final_state"].dtype == torch.float32
    assert_close(found, wanted, 5e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_split_equals_whole(family):
    inputs = make_inputs(family, 2, 45)
    whole = OPERATORS[family](**inputs, form="chunked", chunk_size=8)
    sequences = {n for n, t in inputs.items() if t.ndim >= 3 and t.shape[1] == 45}
    ys, state = [], inputs["initial_state"]
    for start, end in ((0, 1), (1, 19), (19, 45)):
        part = {n: t[:, start:end] if n in sequences else t for n, t in inputs.items()}
        y, state = OPERATORS[family](**part | {"initial_state": state}, chunk_size=8)
        ys.append(y)
    assert relative_rms(torch.cat(ys, 1), whole[0]) < 1e-14
    assert relative_rms(state, whole[1]) < 1e-14


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_any_strides_and_nothing_beside_the_inputs_is_read(family, form):
    inputs = make_inputs(family, 2, 21)
    # Every second element of a transposed tensor; what lies between is nan.
    strided = {}
    for name, t in inputs.items():
        room = t.new_full((*reversed(t.shape), 2), math.nan)
        strided[name] = room[..., 0].permute(*reversed(range(t.ndim)))
        strided[name].copy_(t)
        assert not strided[name].is_contiguous() or t.numel() < 2 or t.ndim < 2
    wanted = results(family, inputs, form, 8)
    assert_close(results(family, strided, form, 8), wanted, 1e-14)
    # One sequence for a whole batch, of stride 0.
    expanded = {n: t[:1].expand(t.shape) if t.ndim > 1 else t for n, t in inputs.items()}
    wanted = results(family, {n: t.contiguous() for n, t in expanded.items()}, form, 8)
    assert_close(results(family, expanded, form, 8), wanted, 1e-14)


@settings(max_examples=15)
@given(st.sampled_from(FAMILIES), st.integers(1, 60), st.integers(1, 70), st.integers(0, 2**20))
def test_any_length_and_chunk(family, length, chunk, seed):
    inputs = make_inputs(family, 1, length, heads=2, keys=3, values=2, seed=seed)
    wanted = results(family, inputs, "recurrent")
    assert_close(results(family, inputs, "chunked", chunk), wanted, 1e-12)


def test_products_of_decays_between_all_pairs():
    torch.manual_seed(0)
    rows, keys = torch.randn(2, 3, 8, 5, dtype=torch.float64)
    decay = torch.rand(3, 8, 5, dtype=torch.float64)
    (found,), since_start, to_end = decayed_products((rows,), keys, decay)
    for i in range(8):
        assert torch.allclose(since_start[:, i], decay[:, : i + 1].prod(1))
        assert torch.allclose(to_end[:, i], decay[:, i + 1 :].prod(1))
        for j in range(8):
            between = decay[:, j + 1 : i + 1].prod(1)
            wanted = (rows[:, i] * keys[:, j] * between).sum(-1) if j <= i else torch.zeros(3)
            assert torch.allclose(found[:, i, j].double(), wanted.double())


def test_softplus_and_bias_of_the_step():
    inputs = make_inputs("ssd", 1, 9)
    bias = torch.randn(3, dtype=torch.float64)
    found = ssd_scan(**inputs, dt_bias=bias, dt_softplus=True)[0]
    inputs["dt"] = F.softplus(inputs["dt"] + bias)
    assert relative_rms(found, ssd_scan(**inputs)[0]) < 1e-14


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_changes_nothing(family):
    inputs = in_dtype(make_inputs(family, 1, 20), torch.float32)
    plain = OPERATORS[family](**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = OPERATORS[family](**inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_operator_keeps_its_inputs_alone(family):
    """Gates, sequences and what they were made of: nothing of a chunk's size, no states."""
    inputs = in_dtype(make_inputs(family, 2, 40), torch.float32)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    kept = set()

    def pack(t):
        kept.add((t.untyped_storage()._cdata, t.untyped_storage().nbytes()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = OPERATORS[family](**leaves)
    y.sum().backward()
    given = sum(t.untyped_storage().nbytes() for t in inputs.values())
    gates = 4 * 2 * 40 * 3  # log_decay = dt A of SSD is new
    assert sum(size for _, size in kept) <= given + (gates if family == "ssd" else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_operator_has_second_derivatives_and_shapes_without_data(family):
    inputs = make_inputs(family, 1, 4, heads=1, keys=2, values=2)
    f, vector = of_one_vector(OPERATORS[family], inputs, form="fused")
    assert torch.autograd.gradgradcheck(f, vector, fast_mode=True)
    real = OPERATORS[family](**inputs, form="fused")
    with torch._subclasses.FakeTensorMode() as mode:
        fake = OPERATORS[family](
            **{name: mode.from_tensor(t) for name, t in inputs.items()}, form="fused")
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]


@pytest.mark.parametrize(("family", "change", "message"), [
    ("ssd", {"x": torch.zeros(2, 5, 3)}, "x has shape"),
    ("ssd", {"dt": torch.zeros(2, 5, 4)}, r"dt has shape \(2, 5, 4\): expected \(2, 5, 3\)"),
    ("ssd", {"B": torch.zeros(2, 5, 2, 8)}, "groups a divisor of 3 heads"),
    ("ssd", {"C": torch.zeros(2, 5, 1, 9)}, "C has shape"),
    ("ssd", {"initial_state": torch.zeros(2, 3, 8, 6)}, "initial_state has shape"),
    ("ssd", {"form": "fast"}, "SSD form 'fast' is unknown"),
    ("mamba3", {"x": torch.zeros(2, 5, 6)}, "x has shape"),
    ("mamba3", {"B": torch.zeros(2, 5, 2, 8)}, "groups a divisor of 3 heads"),
    ("mamba3", {"B": torch.zeros(2, 5, 1, 7), "initial_state": None}, "an even number of them"),
    ("mamba3", {"theta": torch.zeros(2, 5, 5)}, "at most 4 pairs of the 8 states"),
    ("mamba3", {"mix": torch.zeros(2, 5)}, r"mix has shape \(2, 5\): expected \(2, 5, 3\)"),
    ("mamba3", {"C_bias": torch.zeros(8)}, "C_bias has shape"),
    ("mamba3", {"form": "fast"}, "Mamba-3 form 'fast' is unknown"),
    ("mamba3", {"chunk_size": 0}, "chunk_size is 0"),
    ("gated delta", {"k": torch.zeros(2, 0, 3, 8)}, "k has shape"),
    ("gated delta", {"q": torch.zeros(2, 5, 3, 9)}, "q has shape"),
    ("gated delta", {"v": torch.zeros(2, 5, 6)}, "v has shape"),
    ("gated delta", {"log_decay": torch.zeros(2, 5, 3, 1)}, "log_decay has shape"),
    ("channel gates", {"beta": torch.zeros(2, 5)}, "beta has shape"),
    ("channel gates", {"chunk_size": 0}, "chunk_size is 0"),
    ("channel gates", {"form": "fast"}, "delta rule form 'fast' is unknown"),
])
def test_errors_are_one_line(family, change, message):
    with pytest.raises(UserError, match=message) as error:
        OPERATORS[family](**make_inputs(family, 2, 5) | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_is_no_real_floating_number_is_refused_by_every_form(dtype: torch.dtype) -> None:
    """Their results are in the dtype of their inputs: integers would be cut without a word."""
    x = torch.ones(1, 5, 2, 4)
    flat, states = torch.ones(1, 5, 2), torch.ones(1, 5, 1, 3)
    for form in ("auto", "chunked", "recurrent", "fused"):
        with pytest.raises(UserError, match=f"x is {dtype}"):
            ssd_scan(x.to(dtype), flat, -flat[0, 0], states, states, form=form)
        with pytest.raises(UserError, match=f"C is {dtype}"):
            ssd_scan(x, flat, -flat[0, 0], states, states.to(dtype), form=form)
        with pytest.raises(UserError, match=f"v is {dtype}"):
            gated_delta_rule(x, x, x.to(dtype), -flat, flat, form=form)
    with pytest.raises(UserError, match=f"u is {dtype}"):
        selective_scan_fn(flat.to(dtype), flat, -torch.ones(5, 3), torch.ones(1, 3, 2),
                          torch.ones(1, 3, 2))
