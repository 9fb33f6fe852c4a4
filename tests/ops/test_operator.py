"""The fused operator without a GPU: its rules of shape, dtype and device, and the CPU path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mambabyte.errors import UserError
from mambabyte.ops import default_form, selective_scan
from mambabyte.ops.compare import relative_rms
from mambabyte.ops.library import define
from mambabyte.ops.scan import operator as fused
from mambabyte.ops.scan.operator import fused_scan

AVAILABLE, REASON = fused.fused_available("cpu")
native = pytest.mark.skipif(not AVAILABLE, reason=f"no native scan here: {REASON}")
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def make(
    dtype: torch.dtype = torch.float32, shape: tuple[int, int, int] = (2, 5, 4), states: int = 3
) -> list[Tensor]:
    batch, length, channels = shape
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*sizes: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(to)

    return [
        normal(batch, length, channels),
        normal(batch, length, channels),
        -torch.exp(normal(channels, states, to=wide)),
        normal(batch, length, states),
        normal(batch, length, states),
        normal(channels, to=wide),
        normal(batch, length, channels),
        normal(channels, to=wide),
        normal(batch, channels, states, to=wide),
    ]


def leaves(*args, **kwargs) -> list[Tensor]:  # type: ignore[no-untyped-def]
    return [t.requires_grad_() for t in make(*args, **kwargs)]


def call(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    return fused_scan(*tensors, delta_softplus=True)  # type: ignore[arg-type]


def recurrent(u, delta, A, B, C, D, z, bias, state):  # type: ignore[no-untyped-def]
    return selective_scan(
        u, delta, A, B, C, D, z, delta_bias=bias, delta_softplus=True, initial_state=state,
        form="recurrent",
    )  # fmt: skip


def gradients(function, tensors: list[Tensor]) -> list[Tensor]:  # type: ignore[no-untyped-def]
    y, state = function(*tensors)
    loss = (y.float().square().sum() + state.square().sum()).double()
    return [y.detach(), state.detach(), *torch.autograd.grad(loss, tensors)]


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("u", (2, 5)),
        ("u", (2, 0, 4)),
        ("delta", (2, 6, 4)),
        ("A", (4,)),
        ("A", (5, 3)),
        ("A", (4, 65)),
        ("B", (2, 5, 4)),
        ("C", (2, 3, 5)),
        ("D", (3,)),
        ("z", (1, 5, 4)),
        ("delta_bias", (4, 1)),
        ("initial_state", (2, 3, 4)),
    ],
)
def test_a_wrong_shape_is_named_with_what_was_expected(name: str, shape: tuple[int, ...]) -> None:
    tensors = make()
    tensors[NAMES.index(name)] = torch.zeros(shape)
    with pytest.raises(UserError, match=r"shape .*expected") as error:
        call(*tensors)
    assert str(error.value).startswith(f"{name} has shape {shape}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_dtype_is_named(name: str) -> None:
    tensors = make()
    index = NAMES.index(name)
    tensors[index] = tensors[index].double()
    with pytest.raises(UserError, match="float64"):
        call(*tensors)


def test_integers_and_complex_numbers_are_refused() -> None:
    tensors = make()
    with pytest.raises(UserError, match=r"u is torch\.int64"):
        call(tensors[0].long(), *tensors[1:])
    with pytest.raises(UserError, match="A is complex"):
        call(*tensors[:2], torch.complex(tensors[2], tensors[2]), *tensors[3:])
    with pytest.raises(UserError, match=r"D is torch\.int64"):
        call(*tensors[:5], tensors[5].long(), *tensors[6:])


def test_a_wrong_device_is_named_with_the_remedy() -> None:
    tensors = make()
    tensors[3] = tensors[3].to("meta")
    with pytest.raises(UserError, match=r"B is on meta and u on cpu: move it, B.to\('cpu'\)"):
        call(*tensors)


def test_other_devices_have_no_fused_scan() -> None:
    available, reason = fused.fused_available("xla")
    assert not available
    assert "xla" in reason
    assert default_form(torch.device("meta"), torch.float32) == "chunked"
    assert default_form(torch.device("cuda"), torch.float64) == "chunked"


def test_shapes_are_known_without_data() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = [torch.empty(t.shape, dtype=t.dtype) for t in make(shape=(3, 7, 8), states=16)]
        y, state = call(*[t.requires_grad_() for t in tensors])
        assert (y.shape, state.shape) == ((3, 7, 8), (3, 8, 16))
        found = torch.autograd.grad(y.sum() + state.sum(), tensors)
        assert [g.shape for g in found] == [t.shape for t in tensors]


# --------------------------------------------------------------------------------- the CPU path


@native
def test_gradcheck_of_everything() -> None:
    tensors = leaves(torch.float64)
    assert torch.autograd.gradcheck(call, tensors)
    u, delta, A, B, C, *_ = make(torch.float64)
    plain = [t.requires_grad_() for t in (u, delta.abs(), A, B, C)]
    assert torch.autograd.gradcheck(fused_scan, plain)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_equal_the_definition(dtype: torch.dtype) -> None:
    tensors = leaves(dtype, shape=(2, 37, 20), states=16)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    limit = 1e-5 if dtype == torch.float32 else 4e-3
    (y, state), (true_y, true_state) = call(*tensors), recurrent(*exact)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    weights = (torch.randn_like(y), torch.randn_like(state))
    found = torch.autograd.grad((y, state), tensors, weights)
    true = torch.autograd.grad((true_y, true_state), exact, [w.double() for w in weights])
    assert relative_rms(y, true_y) < limit
    for name, one, two in zip(NAMES, found, true, strict=True):
        assert relative_rms(one, two) < limit, name
        assert one.dtype == tensors[NAMES.index(name)].dtype, name


@native
@settings(max_examples=25)
@given(
    present=st.lists(st.booleans(), min_size=4, max_size=4),
    wanted=st.lists(st.booleans(), min_size=9, max_size=9),
)
def test_any_options_and_any_set_of_gradients(present: list[bool], wanted: list[bool]) -> None:
    optional = iter(present)
    tensors = [
        t if name in ("u", "delta", "A", "B", "C") or next(optional) else None
        for name, t in zip(NAMES, make(torch.float64), strict=True)
    ]
    mine, theirs = (
        [None if t is None else t.clone().requires_grad_(w) for t, w in pairs]
        for pairs in [list(zip(tensors, wanted, strict=True))] * 2
    )
    for function, args in ((call, mine), (recurrent, theirs)):
        y, state = function(*args)
        if y.requires_grad:
            (y.square().sum() + state.sum()).backward()
    for name, one, two in zip(NAMES, mine, theirs, strict=True):
        assert (one is None or one.grad is None) == (two is None or two.grad is None), name
        if one is not None and one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad)


@native
def test_gradients_through_the_state_alone() -> None:
    mine, theirs = leaves(torch.float64), leaves(torch.float64)
    for function, args in ((call, mine), (recurrent, theirs)):
        function(*args)[1].square().sum().backward()
    for name, one, two in zip(NAMES, mine, theirs, strict=True):
        expected = torch.zeros_like(two) if two.grad is None else two.grad
        torch.testing.assert_close(one.grad, expected, msg=name)


@native
def test_recomputing_gives_the_same_gradients() -> None:
    tensors = leaves(shape=(2, 40, 8))
    kept = gradients(call, tensors)
    again = gradients(lambda *a: fused_scan(*a, delta_softplus=True, recompute=True), tensors)
    assert all(torch.equal(one, two) for one, two in zip(kept, again, strict=True))


@native
def test_second_order_is_that_of_the_definition() -> None:
    def second(function) -> tuple[tuple[Tensor, ...], ...]:  # type: ignore[no-untyped-def]
        def scalar(*tensors: Tensor) -> Tensor:
            y, state = function(*tensors)
            return y.sin().sum() + state.cos().sum()

        tensors = tuple(leaves(torch.float64, shape=(1, 4, 2)))
        return torch.autograd.functional.hessian(scalar, tensors)

    torch.testing.assert_close(second(call), second(recurrent))


@native
@pytest.mark.long
def test_opcheck() -> None:
    scan = torch.ops.mambabyte.selective_scan.default
    torch.library.opcheck(scan, (*leaves(), None, True, True))
    ages = torch.tensor([[255, 0, 1, 0, 1]], dtype=torch.uint8).expand(2, 5)
    torch.library.opcheck(scan, (*leaves(), ages, True, True))
    torch.library.opcheck(scan, (*make(), None, False, False))
    u, delta, A, B, C, *_ = leaves()
    torch.library.opcheck(scan, (u, delta, A, B, C, None, None, None, None, None, True, True))


@native
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    def layer(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        y, state = selective_scan(
            *tensors[:7], delta_bias=tensors[7], delta_softplus=True, initial_state=tensors[8]
        )
        return torch.tanh(y), state

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 5, 4), (3, 9, 4)):
        tensors = leaves(shape=shape)
        pairs = zip(gradients(compiled, tensors), gradients(layer, tensors), strict=True)
        for one, two in pairs:
            torch.testing.assert_close(one, two)


@native
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_sequences_and_keeps_states(compiled: bool) -> None:
    torch.compiler.reset()
    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    tensors = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = function(*tensors)
        mixed, _ = call(tensors[0].bfloat16(), *tensors[1:])
    assert (y.dtype, state.dtype, mixed.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    found = torch.autograd.grad(y.float().sum() + state.sum(), tensors)
    assert all(g.dtype == torch.float32 for g in found)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(*make(torch.float64))[0].dtype == torch.float64


@native
def test_checkpointing_gives_the_same_gradients() -> None:
    tensors = leaves(shape=(2, 20, 8))
    plain = gradients(call, tensors)
    saved = gradients(lambda *a: checkpoint(call, *a, use_reentrant=False), tensors)
    assert all(torch.equal(one, two) for one, two in zip(plain, saved, strict=True))


@native
def test_lower_precision_parameters_are_widened() -> None:
    tensors = make(torch.bfloat16)
    low = [t.bfloat16() for t in tensors]
    y, state = call(*low)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@native
def test_views_are_taken_as_they_are() -> None:
    tensors = make(shape=(2, 6, 8), states=4)
    u, z = torch.cat([tensors[0], tensors[6]], dim=2).chunk(2, dim=2)
    views = [u, tensors[1].transpose(0, 1).contiguous().transpose(0, 1), *tensors[2:]]
    views[6] = z
    torch.testing.assert_close(call(*views), call(*tensors))


@native
def test_inputs_are_not_changed() -> None:
    tensors = make()
    copies = [t.clone() for t in tensors]
    call(*tensors)
    assert all(torch.equal(one, two) for one, two in zip(tensors, copies, strict=True))


def test_where_the_kernel_is_missing_auto_says_so_and_uses_torch(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(fused, "fused_available", lambda device: (False, "no C compiler (test)"))
    fused._say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="no C compiler"):
        form = fused.default_form(torch.device("cpu"), torch.float32)
    assert form == "chunked"
    assert fused.default_form(torch.device("cpu"), torch.float32) == "chunked"  # said only once
    monkeypatch.setattr(fused, "_READY", set())
    with pytest.raises(UserError, match="no fused scan on cpu: no C compiler"):
        call(*make())


def test_zeros_for_a_first_result_that_nobody_used_have_its_dtype() -> None:
    given: list[torch.dtype] = []

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x.float(), 3 * x.float()

    def backward(done: Tensor, dtwo: Tensor, x: Tensor) -> tuple[Tensor]:
        given.append(done.dtype)
        return ((2 * done + 3 * dtwo).to(x.dtype),)

    widen = define(
        "widen_for_a_test", "Tensor x", "one, two", forward={"cpu": forward},
        backward={"cpu": backward}, check=lambda x: None, in_torch=forward,
        shapes=lambda x: (x.new_empty(x.shape, dtype=torch.float32),) * 2)
    x = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    widen(x)[1].sum().backward()
    assert given == [torch.float32]
    assert x.grad is not None
    assert x.grad.tolist() == [3, 3, 3]
