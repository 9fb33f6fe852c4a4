"""Each public operator under torch.compile: every result and every gradient is that of a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.arguments.test_refusals import OPERATORS, has


def doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    return type(value)(*map(doubled, value)) if isinstance(value, tuple) else value


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", [
    name for name, (operator, _) in OPERATORS.items() if has(operator, "document_starts")])
def test_a_compiled_call_is_the_call(name: str, documents: bool) -> None:
    """By aot_eager, which runs operators as inductor does and generates no code."""
    operator, make = OPERATORS[name]
    given = {key: doubled(value) for key, value in make().items()}
    names = [key for key, value in given.items() if isinstance(value, Tensor)]
    if documents:
        given["document_starts"] = torch.zeros(2, 7, dtype=torch.bool).index_fill(
            1, torch.tensor([3]), True)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        y, state = operator(**given | dict(zip(names, tensors, strict=True)))
        return (y, *state) if isinstance(state, tuple) else (y, state)

    torch.compiler.reset()
    results = []
    for run in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaves = [given[key].clone().requires_grad_() for key in names]
        found = run(*leaves)
        total = sum((one.sin().sum() for one in found), torch.zeros(()))
        results.append([*found, *torch.autograd.grad(total, leaves)])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
