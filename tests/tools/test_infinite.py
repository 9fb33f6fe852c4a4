"""Infinite inputs: gradients are nan where those of the definition are, but for what is stated."""

from __future__ import annotations

import math

import pytest
import torch

from mambabyte.ops import selective_scan
from mambabyte.ops.scan import operator as fused

# docs/robustness.md states these: of a decay that is exactly 0 the fused form takes the limit.
STATED = {("fused", "A", "delta"), ("fused", "A", "delta_bias"), ("fused", "delta", "A"),
          ("fused", "delta_bias", "A")}
SHAPES = {"u": (1, 5, 2), "delta": (1, 5, 2), "A": (2, 3), "B": (1, 5, 3), "C": (1, 5, 3),
          "D": (2,), "z": (1, 5, 2), "delta_bias": (2,), "initial_state": (1, 2, 3)}


def gradients(form: str, values: dict[str, torch.Tensor], softplus: bool) -> dict:
    x = {name: v.clone().requires_grad_() for name, v in values.items()}
    y, state = selective_scan(**x, delta_softplus=softplus, form=form)
    return dict(zip(x, torch.autograd.grad(y.sum() + state.sum(), list(x.values())), strict=True))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("softplus", [False, True])
def test_gradients_are_nan_where_the_definition_s_are(value, softplus):
    forms = ["chunked"] + ["fused"] * fused.fused_available("cpu")[0]
    finite = set()
    for name in SHAPES:
        for place in (0, -1):
            values = {n: torch.randn(shape) for n, shape in SHAPES.items()}
            values["A"] = -values["A"].exp()
            values[name].view(-1)[place] = value
            wanted = gradients("recurrent", {n: v.double() for n, v in values.items()}, softplus)
            for form in forms:
                got = gradients(form, values, softplus)
                finite |= {(form, name, of) for of, d in wanted.items()
                           if (d.isnan() & got[of].isfinite()).any()}
    assert finite <= STATED
