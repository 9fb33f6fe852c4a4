"""The bench of the field's mixers: its rows, right results, and peers that are not there."""

from __future__ import annotations

import pytest

from analysis.cli import main
from analysis.measure.bench.mixers import COLUMNS, FAMILIES, run_bench
from mambabyte.errors import UserError


def test_a_small_bench_has_its_columns_and_right_results() -> None:
    frame = run_bench([(1, 40, 2)], device="cpu", repeats=3)
    assert list(frame.columns) == list(COLUMNS)
    assert len(frame) == 2 * sum(len(f.peers) for f in FAMILIES.values())
    ours = frame[frame["peer"] == "fused"]
    assert (ours["median_seconds"] > 0).all()
    assert (ours["error_output"] < 1e-5).all()
    assert (ours[ours["direction"] == "forward+backward"]["error_gradient"] < 1e-5).all()
    others = frame[frame["peer"].isin(["mamba_ssm", "fla"])]
    assert others["median_seconds"].isna().all()
    assert (others["note"] != "").all()


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--repeats", "3", "--shapes", "1,20,1", "--peers", "attention"]
    assert main(["bench", "mixers", *arguments]) == 0
    assert "forward+backward" in capsys.readouterr().out


def test_unknown_families_are_refused() -> None:
    with pytest.raises(UserError, match="family 'none' is unknown: choose from SSD"):
        run_bench(families=("none",), device="cpu")
