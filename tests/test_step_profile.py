"""The parts of a training step: named right, and adding up to the step."""

from __future__ import annotations

import json

import pytest

from analysis.cli import main
from analysis.step_profile import OTHER, part_of


@pytest.mark.parametrize(("operator", "part"), [
    ("mambabyte::selective_scan_backward", "scan"), ("_ConvBackward", "convolution"),
    ("aten::mkldnn_convolution", "convolution"), ("aten::mm", "matrix products"),
    ("aten::native_layer_norm_backward", "norms"), ("aten::_foreach_lerp_", "optimizer"),
    ("Optimizer.step#AdamW.step", "optimizer"), ("aten::silu_backward", "activations"),
    ("aten::_log_softmax", "loss"), ("aten::copy_", "copies"), ("aten::add", OTHER)])
def test_operators_belong_to_parts(operator: str, part: str) -> None:
    assert part_of(operator) == part


def test_the_parts_add_up_to_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--preset", "smoke", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    parts = {row["part"]: row["ms"] for row in found["step"]}
    assert {"scan", "matrix products", "optimizer", "norms"} <= set(parts)
    assert min(parts.values()) > 0
    assert sum(parts.values()) == pytest.approx(found["ms_per_step"])
    assert sum(row["share"] for row in found["step"]) == pytest.approx(1)
