"""The mixer on two stretches of a sequence, one after the other here, against the whole."""

from __future__ import annotations

import shutil
from typing import Any

import mixer_cases
import pytest
import torch
from emulate import TAPS, Emulator
from mixer_cases import NAMES
from scan_cases import relative_rms
from torch import Tensor

from mambabyte.model.sequence import _gradient_behind, _state_before
from mambabyte.ops.mamba import fused
from mambabyte.ops.mamba.split import split_mixer
from mambabyte.ops.scan import plan as cuda_plan

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("convolution"),
]


class Two:
    """What passes between two stretches: forwards the first goes first, backwards the second."""

    def __init__(self, rank: int, passed: dict[str, Any]) -> None:
        self.rank, self.passed = rank, passed

    def before(self, x: Tensor, rows: int, dim: int) -> Tensor:
        if self.rank == 0:
            self.passed["tail"] = x[:, -rows:]
        return x[:, :0] if self.rank == 0 else self.passed["tail"]

    def given_back(self, gradient: Tensor, rows: int, dim: int) -> Tensor:
        if self.rank == 1:
            self.passed["dtail"] = gradient
        return self.passed["dtail"] if self.rank == 0 else gradient[:, :0]

    def enter(self, decay: Tensor, end: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.passed[f"decay{self.rank}"], self.passed[f"end{self.rank}"] = decay, end
        ends = [self.passed[f"end{r}"] for r in range(self.rank + 1)]
        return _state_before(self.rank, [self.passed["decay0"]], ends, None, False), []

    def leave(self, gradient: Tensor, decays: list[Tensor]) -> Tensor:
        self.passed[f"dstate{self.rank}"] = gradient
        both = [self.passed.get("dstate0", gradient), self.passed["dstate1"]]
        decays = [self.passed["decay0"], self.passed["decay1"]]
        return _gradient_behind(self.rank, decays, both, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("length", "first", "multiprocessors", "rank"), [
    (280, 136, 8, 8),  # segments, and pieces whose pass over states serves both
    (140, 67, 8, 8),  # a stretch of no whole chunks
    (280, 136, 1, 8),  # one segment
    (40, 13, 8, 8),  # too short for the tensor cores
    (140, 67, 8, None),  # of full rank
])
def test_two_stretches_are_one_sequence(
    length: int, first: int, multiprocessors: int, rank: int | None, dtype: torch.dtype,
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_plan, "multiprocessors", lambda device: multiprocessors)
    inputs = mixer_cases.make_inputs(1, length, 40, rank, TAPS, dtype=dtype, device="cpu")
    xz, *weights = inputs.values()
    y, tail, state, *kept = fused.forward(xz, *weights, None, True)
    dy, *_ = mixer_cases.upstream(y, tail, state)
    wanted = dict(zip(NAMES, fused.backward(dy, None, None, xz, *weights, None, *kept),
                      strict=False))
    emulator.launched.clear()

    passed: dict[str, Any] = {}
    cuts = slice(0, first), slice(first, length)
    leaves = [[None if t is None else t.clone().requires_grad_() for t in (xz[:, cut], *weights)]
              for cut in cuts]
    found = [split_mixer(Two(r, passed), *leaf) for r, leaf in enumerate(leaves)]
    limit = 10 * mixer_cases.LIMIT[dtype]
    assert relative_rms(torch.cat([f[0] for f in found], 1), y) < limit
    assert relative_rms(found[1][2], state) < limit
    assert torch.equal(found[1][1], tail)
    for r in (1, 0):
        found[r][0].backward(dy[:, cuts[r]])
    assert relative_rms(torch.cat([leaf[0].grad for leaf in leaves], 1), wanted["xz"]) < limit
    for name, one, two in zip(NAMES[1:], leaves[0][1:], leaves[1][1:], strict=True):
        if one is None:
            continue
        assert relative_rms(one.grad + two.grad, wanted[name]) < limit, name
    names = [name for name, _ in emulator.launched]
    carries = sum("tile_carry" in name for name in names)
    if (length, multiprocessors, dtype) == (280, 8, torch.bfloat16):  # no scan goes twice
        assert carries == 4
        assert sum("tile_forward" in n for n in names) == 2
        assert sum("tile_backward" in n for n in names) == 2
