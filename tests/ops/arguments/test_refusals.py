"""Each argument of each public operator, made wrong in turn: one line, or a result; never torch's
own error, and nothing let fall without a word."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mambabyte import ops
from mambabyte.errors import UserError
from mambabyte.ops.conv.dispatch import causal_conv

B, L, H, P, G, N, D = 2, 7, 4, 8, 2, 6, 16


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def share(*shape: int) -> Tensor:
    return normal(*shape).sigmoid()


def scan() -> dict[str, Any]:
    return {"u": normal(B, L, D), "delta": share(B, L, D), "A": -share(D, N), "B": normal(B, L, N),
            "C": normal(B, L, N), "D": normal(D), "z": normal(B, L, D), "delta_bias": normal(D),
            "delta_softplus": True, "initial_state": normal(B, D, N)}


def in_public_layout() -> dict[str, Any]:
    given = {name: t.mT if isinstance(t, Tensor) and t.ndim == 3 else t
             for name, t in scan().items() if name != "initial_state"}
    return {**given, "return_last_state": True}


def one_step() -> dict[str, Any]:
    rows = {name: scan()[name] for name in ("u", "delta", "A", "B", "C")}
    return {**{name: t[:, 0] if t.ndim == 3 else t for name, t in rows.items()},
            "state": normal(B, D, N)}


def ssd() -> dict[str, Any]:
    return {"x": normal(B, L, H, P), "dt": share(B, L, H), "A": -share(H), "B": normal(B, L, G, N),
            "C": normal(B, L, G, N), "D": normal(H), "dt_bias": normal(H), "dt_softplus": True,
            "initial_state": normal(B, H, P, N)}


def delta() -> dict[str, Any]:
    return {"q": normal(B, L, H, N), "k": share(B, L, H, N) / N, "v": normal(B, L, H, P),
            "log_decay": -share(B, L, H), "beta": share(B, L, H),
            "initial_state": normal(B, H, N, P)}


def gates() -> dict[str, Any]:
    return {**delta(), "log_decay": -share(B, L, H, N)}


def mamba3() -> dict[str, Any]:
    given = {name: t for name, t in ssd().items() if name not in ("A", "dt_bias", "dt_softplus")}
    state = ops.Mamba3State(normal(B, H, N), normal(B, H, P), normal(B, H, P, N))
    return {**given, "log_decay": -share(B, L, H), "theta": normal(B, L, 2), "mix": share(B, L, H),
            "B_bias": normal(H, N), "C_bias": normal(H, N), "initial_state": state}


def conv() -> dict[str, Any]:
    return {"x": normal(B, L, D), "weight": normal(D, 4), "bias": normal(D),
            "tail": normal(B, 3, D), "silu": True}


OPERATORS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "scan": (ops.selective_scan, scan), "scan, public": (ops.selective_scan_fn, in_public_layout),
    "step": (ops.selective_scan_step, one_step), "ssd": (ops.ssd_scan, ssd),
    "delta": (ops.gated_delta_rule, delta), "kda": (ops.gated_delta_rule, gates),
    "mamba3": (ops.mamba3_scan, mamba3), "conv": (causal_conv, conv),
}


def has(operator: Callable[..., Any], place: str) -> bool:
    return place in inspect.signature(operator).parameters


# What may be given besides: each of these is refused.
BESIDES: dict[str, list[Any]] = {
    "document_starts": ["abc", ["a"], [1.5], 3, True, {1}, [-1], [2**70], [None], [[0, 1], [0]],
                        [7, 3], torch.zeros(B, L), torch.zeros(B, L).bool().to_sparse()],
    "ages": ["abc", [1], 3, torch.zeros(B, L), torch.zeros(B, L).long(), torch.zeros(B, L).bool(),
             torch.zeros(B, L - 1, dtype=torch.uint8), torch.zeros(1, L, dtype=torch.uint8)],
    "seq_idx": ["abc", [1], torch.zeros(B, L), torch.zeros(B, L - 1).int()],
    "cu_seqlens": ["abc", [0, 3], 3.5],
    "chunk_size": [0, -1, 1.5, "8", True, float("nan")],
    "form": [None, 3, ["auto"], "Auto", "", {}],
}
FLAGS = ("yes", None, 1, 2.0, [], torch.tensor(True))


def wrong(value: Any) -> Iterator[Any]:
    """What none of the operators takes in the place of ``value``."""
    if isinstance(value, bool):
        yield from FLAGS
    elif isinstance(value, Tensor):
        with torch.no_grad():
            yield from (value.long(), value > 0, value.to(torch.complex64), value.tolist(), 1.5,
                        value.numpy(), "abc", value[None], value.flatten()[0], value.to("meta"),
                        value.to_sparse(), value.to(torch.float8_e4m3fn))
            yield torch.nested.nested_tensor([value, value])
    else:
        yield from (value[:2], value[0], (), "abc", (1, 2, 3), {"a": 1}, 0)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "form"), [
    (name, form) for name, (operator, _) in OPERATORS.items()
    for form in (("auto", "recurrent", "chunked", "fused") if has(operator, "form") else (None,))])
def test_what_does_not_fit_is_one_line(name: str, form: str | None) -> None:
    operator, given = OPERATORS[name]
    how = {"form": form} if form else {}
    operator(**given(), **how)
    cases = [(place, other) for place, value in given().items() for other in wrong(value)]
    cases += [(place, other) for place, others in BESIDES.items() if has(operator, place)
              for other in others]
    for place, other in cases:
        with pytest.raises(UserError) as caught:
            operator(**{**given(), **how, place: other})
        assert "\n" not in str(caught.value), place


@pytest.mark.parametrize("name", [
    name for name, (operator, _) in OPERATORS.items() if has(operator, "document_starts")])
def test_documents_are_said_once(name: str) -> None:
    operator, given = OPERATORS[name]
    ages = torch.zeros(B, L, dtype=torch.uint8)
    with pytest.raises(UserError, match="say the same: give one"):
        operator(**given(), ages=ages, document_starts=torch.ones(B, L, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("place", ["x", "weight", "bias", "tail"])
def test_a_convolution_of_several_dtypes(place: str, dtype: torch.dtype) -> None:
    given = {**conv(), place: conv()[place].to(dtype)}
    wanted, last = causal_conv(**{name: t.double() if isinstance(t, Tensor) else t
                                  for name, t in given.items()})
    for ages in (None, torch.full((B, L), 255, dtype=torch.uint8)):
        y, tail = causal_conv(**given, ages=ages)
        assert y.dtype == tail.dtype == given["x"].dtype
        tolerance = 5 * torch.finfo(y.dtype).eps
        torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(tail.double(), last, rtol=tolerance, atol=tolerance)
