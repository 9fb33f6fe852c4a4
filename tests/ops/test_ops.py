"""The definition against numbers worked by hand; every right form against the definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mambabyte.config import ModelConfig
from mambabyte.errors import UserError
from mambabyte.ops import FORMS, selective_scan, selective_scan_step
from mambabyte.ops.compare import relative_rms
from mambabyte.ops.conv.dispatch import causal_conv

# Right at gentle decay, subjects of study among them.
RIGHT = ["chunked", "fused", "corrected_cumsum", "centred", "pairwise", "segment_sum",
         "associative"]
STABLE = [name for name, form in FORMS.items() if not form.study]
NAMES = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"]


def make_inputs(batch, length, channels, states, *, low=-1.0, high=-1e-3, seed=0):
    """Random inputs whose per-step log-decay delta * A covers [low, high] on a log scale."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    magnitude = torch.empty(channels, states).uniform_(
        math.log(-high), math.log(-low), generator=g).exp()
    inputs = {
        "u": normal(batch, length, channels),
        "delta": torch.rand(batch, length, channels, generator=g) * 0.5 + 0.5,
        "A": -magnitude,
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "delta_bias": normal(channels) * 0.1,
        "initial_state": normal(batch, channels, states),
    }
    return inputs


def results_and_grads(inputs, dtype, form, chunk=None, softplus=True, need=NAMES):
    """y, final state and the gradient of a fixed random projection of both."""
    x = {k: v.to(dtype).requires_grad_(k in need) for k, v in inputs.items()}
    y, h = selective_scan(
        *(x[k] for k in ("u", "delta", "A", "B", "C", "D", "z")),
        delta_bias=x["delta_bias"], delta_softplus=softplus, initial_state=x["initial_state"],
        form=form, chunk_size=chunk)
    g = torch.Generator().manual_seed(1)
    wy, wh = torch.randn(y.shape, generator=g), torch.randn(h.shape, generator=g)
    loss = (y * wy.to(y.dtype)).sum() + (h * wh.to(h.dtype)).sum()
    return y, h, dict(zip(need, torch.autograd.grad(loss, [x[k] for k in need]), strict=True))


def test_the_definition_answers_to_its_old_name():
    inputs = [torch.rand(shape) for shape in ((1, 3, 2), (1, 3, 2), (2, 2), (1, 3, 2), (1, 3, 2))]
    torch.testing.assert_close(selective_scan(*inputs, form="sequential"),
                               selective_scan(*inputs, form="recurrent"))
    assert ModelConfig(scan_form="sequential") == ModelConfig(scan_form="recurrent")


def test_definition_against_hand_calculation():
    # One channel, one state, A = -ln 2 and delta = 1: the state halves at each step.
    u = torch.tensor([[[1.0], [0.0], [4.0]]], dtype=torch.float64)
    delta = torch.ones(1, 3, 1, dtype=torch.float64)
    A = torch.tensor([[-math.log(2.0)]], dtype=torch.float64)
    B = torch.tensor([[[1.0], [7.0], [0.5]]], dtype=torch.float64)
    C = torch.tensor([[[1.0], [3.0], [2.0]]], dtype=torch.float64)
    y, h = selective_scan(u, delta, A, B, C, form="recurrent")
    # h: 1; 0.5; 0.25 + 4 * 0.5 = 2.25.   y = C h: 1; 1.5; 4.5.
    assert y.flatten().tolist() == pytest.approx([1.0, 1.5, 4.5], abs=1e-15)
    assert h.item() == pytest.approx(2.25, abs=1e-15)


def test_definition_with_every_option_by_hand():
    def number(x, *shape):
        return torch.tensor(x, dtype=torch.float64).reshape(shape)

    u, z, delta, bias = number(2, 1, 1, 1), number(1, 1, 1, 1), number(0.3, 1, 1, 1), number(0.2, 1)
    A, B, C = number(-1, 1, 1), number(3, 1, 1, 1), number(5, 1, 1, 1)
    D, h0 = number(0.5, 1), number(10, 1, 1, 1)
    y, h = selective_scan(u, delta, A, B, C, D, z, delta_bias=bias, delta_softplus=True,
                          initial_state=h0, form="recurrent")
    dt = math.log1p(math.exp(0.5))
    state = math.exp(-dt) * 10 + dt * 3 * 2
    silu = 1 / (1 + math.exp(-1))
    assert h.item() == pytest.approx(state, rel=1e-14)
    assert y.item() == pytest.approx((5 * state + 0.5 * 2) * silu, rel=1e-14)


def test_definition_gradients_against_finite_differences():
    inputs = {k: v.double().requires_grad_() for k, v in make_inputs(1, 4, 2, 2).items()}

    def f(*args):
        return selective_scan(*args[:7], delta_bias=args[7], delta_softplus=True,
                              initial_state=args[8], form="recurrent")

    assert torch.autograd.gradcheck(f, tuple(inputs.values()))


@pytest.mark.parametrize("form", RIGHT)
@pytest.mark.parametrize(
    ("shape", "chunk"),
    [((2, 37, 5, 3), 8), ((1, 1, 3, 2), 8), ((2, 5, 4, 16), 32), ((1, 64, 1, 1), 16),
     ((3, 33, 7, 4), 1), ((1, 100, 3, 5), 7)],
)
def test_right_forms_equal_the_definition(form, shape, chunk):
    inputs = make_inputs(*shape)
    y_ref, h_ref, g_ref = results_and_grads(inputs, torch.float64, "recurrent")
    y, h, grads = results_and_grads(inputs, torch.float32, form, chunk)
    # float32 rounding is 6e-8 a step; sums over a few hundred terms stay below these.
    assert relative_rms(y, y_ref) < 1e-6
    assert relative_rms(h, h_ref) < 1e-6
    for name, grad in grads.items():
        assert relative_rms(grad, g_ref[name]) < 1e-5, name


@pytest.mark.parametrize("form", STABLE)
@pytest.mark.parametrize("decay", [-1e-7, -1e-3, -1.0, -20.0, -80.0])
def test_stable_forms_survive_extreme_decay(form, decay):
    inputs = make_inputs(2, 70, 4, 3)
    inputs["A"] = torch.full((4, 3), decay)
    inputs["delta"] = torch.full((2, 70, 4), 0.541324854612918)  # softplus of it is 1
    inputs["delta_bias"] = torch.zeros(4)
    y_ref, h_ref, g_ref = results_and_grads(inputs, torch.float64, "recurrent")
    y, h, grads = results_and_grads(inputs, torch.float32, form, 32)
    assert relative_rms(y, y_ref) < 1e-6
    assert relative_rms(h, h_ref) < 1e-6
    for name, grad in grads.items():
        if g_ref[name].abs().max() > 1e-30:  # below, float32 underflows to 0 and may
            assert relative_rms(grad, g_ref[name]) < 1e-5, name
        assert torch.isfinite(grad).all(), name


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 50), st.integers(1, 6), st.integers(1, 9),
       st.integers(1, 60), st.integers(0, 2**20))
def test_chunked_any_shape(batch, length, channels, states, chunk, seed):
    inputs = make_inputs(batch, length, channels, states, seed=seed)
    y_ref, h_ref, g_ref = results_and_grads(inputs, torch.float64, "recurrent")
    y, h, grads = results_and_grads(inputs, torch.float64, "chunked", chunk)
    assert relative_rms(y, y_ref) < 1e-12
    assert relative_rms(h, h_ref) < 1e-12
    assert all(relative_rms(grads[k], g_ref[k]) < 1e-11 for k in grads)


@pytest.mark.parametrize("form", [*STABLE, "corrected_cumsum"])
def test_split_equals_whole(form):
    x = make_inputs(2, 29, 4, 3)
    args = [x[k] for k in ("u", "delta", "A", "B", "C", "D", "z")]

    def scan(part, state):
        sliced = [a[:, part] if a.ndim == 3 else a for a in args]
        return selective_scan(*sliced, delta_softplus=True, initial_state=state, form=form)

    whole, h_whole = scan(slice(None), None)
    first, h = scan(slice(0, 11), None)
    second, h = scan(slice(11, None), h)
    assert relative_rms(torch.cat([first, second], 1), whole) < 1e-6
    assert relative_rms(h, h_whole) < 1e-6


@pytest.mark.parametrize("form", STABLE)
def test_non_contiguous_inputs(form):
    x = make_inputs(2, 21, 4, 3)
    args = [x[k] for k in ("u", "delta", "A", "B", "C", "D", "z")]
    strided = [a.transpose(0, -1).contiguous().transpose(0, -1) for a in args]
    assert not strided[0].is_contiguous()
    expected = selective_scan(*args, delta_softplus=True, form=form)
    got = selective_scan(*strided, delta_softplus=True, form=form)
    for a, b in zip(got, expected, strict=True):
        assert relative_rms(a, b) < 1e-6


@pytest.mark.parametrize("form", ["chunked", "fused"])
def test_place_in_the_batch_does_not_matter(form):
    x = make_inputs(3, 40, 5, 4)
    args = [x[k] for k in ("u", "delta", "A", "B", "C", "D", "z")]
    y, h = selective_scan(*args, delta_softplus=True, form=form)
    alone = [a[1:2] if a.ndim == 3 else a for a in args]
    y1, h1 = selective_scan(*alone, delta_softplus=True, form=form)
    assert torch.equal(y[1:2], y1)
    assert torch.equal(h[1:2], h1)


def test_step_is_the_scan_at_length_one():
    x = make_inputs(2, 1, 4, 3)
    dt = F.softplus(x["delta"])
    y, h = selective_scan(x["u"], dt, x["A"], x["B"], x["C"],
                          initial_state=x["initial_state"], form="recurrent")
    y1, h1 = selective_scan_step(x["u"][:, 0], dt[:, 0], x["A"], x["B"][:, 0], x["C"][:, 0],
                                 x["initial_state"])
    assert torch.equal(y[:, 0], y1)
    assert torch.equal(h, h1)


def test_autocast_does_not_change_the_scan():
    x = make_inputs(2, 40, 4, 16)
    args = [x[k] for k in ("u", "delta", "A", "B", "C", "D", "z")]
    y, h = selective_scan(*args, delta_softplus=True, form="chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_cast, h_cast = selective_scan(*args, delta_softplus=True, form="chunked")
    assert torch.equal(y, y_cast)
    assert torch.equal(h, h_cast)


# --- the subjects of study: pinned as they fail -------------------------------------------------


def published_recurrence(u, delta, A, B, C, state):
    """h_t = a_t (h_{t-1} + b_t): what the published formula computes, one step at a time."""
    ys = []
    for t in range(u.shape[1]):
        a = torch.exp(delta[:, t, :, None] * A)
        b = (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        state = a * (state + b)
        ys.append((state * C[:, t, None, :]).sum(-1))
    return torch.stack(ys, 1), state


@pytest.mark.parametrize("form", ["document_chunked", "document_as_coded", "document_cumsum"])
def test_published_formula_computes_another_recurrence(form):
    x = {k: v.double() for k, v in make_inputs(2, 40, 4, 3, low=-0.5).items()}
    args = [x[k] for k in ("u", "delta", "A", "B", "C")]
    y, h = selective_scan(*args, initial_state=x["initial_state"], form=form)
    y_pub, h_pub = published_recurrence(*args, x["initial_state"])
    y_def, _ = selective_scan(*args, initial_state=x["initial_state"], form="recurrent")
    assert relative_rms(y, y_pub) < 1e-12  # exactly that recurrence, in float64 ...
    assert relative_rms(h, h_pub) < 1e-12
    assert relative_rms(y, y_def) > 1e-2  # ... and not the model's


@pytest.mark.parametrize(
    ("form", "last_good"),
    # The published exponent is -cs_{t-1}, the corrected one -cs_t; ln(float32 max) = 88.72.
    # With a log-decay of 1 a step, t - 1 <= 88 and t <= 88 are the last that fit.
    [("document_cumsum", 89), ("corrected_cumsum", 88)],
)
def test_cumsum_overflows_where_derived(form, last_good):
    def scan(length):
        ones = torch.ones(1, length, 1)
        return selective_scan(ones, ones, -torch.ones(1, 1), ones, ones, form=form,
                              chunk_size=length)[0]

    assert torch.isfinite(scan(last_good)).all()
    assert not torch.isfinite(scan(last_good + 1)).all()


def test_forms_say_what_they_are():
    assert STABLE == ["recurrent", "chunked", "fused", "segment_sum", "associative"]


@pytest.mark.parametrize(("form", "why"), [
    ("clamped", "value"), ("epsilon", "value"), ("centred", "value"), ("late_mask", "gradient"),
    ("pairwise", "gradient of A")])
def test_fragile_repairs_fail_where_the_stable_forms_do_not(form, why):
    """The reason for each mark ``study``: a decay of 12 a step, 32 steps."""
    assert FORMS[form].study
    inputs = make_inputs(2, 32, 4, 3)
    inputs |= {"A": torch.full((4, 3), -12.0), "delta": torch.ones(2, 32, 4),
               "delta_bias": torch.zeros(4)}
    y_ref, _, g_ref = results_and_grads(inputs, torch.float64, "recurrent", softplus=False)

    def errors(name):
        y, _, grads = results_and_grads(inputs, torch.float32, name, 32, softplus=False)
        return {"value": relative_rms(y, y_ref),
                "gradient": relative_rms(grads["delta"], g_ref["delta"]),
                "gradient of A": relative_rms(grads["A"], g_ref["A"])}

    assert all(error < 1e-5 for name in STABLE for error in errors(name).values())
    assert not errors(form)[why] < 1e-3  # nan is not less
    if why != "value":
        assert errors(form)["value"] < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": torch.zeros(2, 4, 3)}, "delta has shape (2, 4, 3): expected (2, 5, 3)"),
        ({"A": torch.zeros(4, 2)}, "A has shape (4, 2)"),
        ({"B": torch.zeros(2, 5, 9)}, "B has shape (2, 5, 9): expected (2, 5, 2)"),
        ({"u": torch.zeros(2, 3)}, "u has shape (2, 3)"),
        ({"form": "fast"}, "scan form 'fast' is unknown"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"initial_state": torch.zeros(2, 3, 4)}, "initial_state has shape"),
        ({"A": torch.zeros(3, 2, dtype=torch.complex64)}, "A is complex"),
    ],
)
def test_bad_arguments_give_one_clear_line(change, message):
    x = make_inputs(2, 5, 3, 2)
    args = {k: x[k] for k in ("u", "delta", "A", "B", "C")} | {"form": "chunked"} | change
    with pytest.raises(UserError) as error:
        selective_scan(**args)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 17])
def test_causal_conv_equals_the_sum_and_carries_its_tail(length):
    x, w, b = torch.randn(2, length, 5), torch.randn(5, 4), torch.randn(5)
    tail = torch.randn(2, 3, 5)
    y, new_tail = causal_conv(x, w, b, tail)
    padded = torch.cat([tail, x], 1)
    expected = sum(padded[:, k : k + length] * w[:, k] for k in range(4)) + b
    assert relative_rms(y, expected) < 1e-6
    assert torch.equal(new_tail, padded[:, -3:])
    zero, _ = causal_conv(x, w, b)
    zeros, _ = causal_conv(x, w, b, torch.zeros(2, 3, 5))
    assert torch.equal(zero, zeros)
