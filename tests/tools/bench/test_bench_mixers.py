"""The bench of the field's mixers: its rows, right results, and peers that are not there."""

from __future__ import annotations

import gc
import math
import sys
from types import ModuleType
from typing import Any

import pytest

from analysis.cli import main
from analysis.measure.bench import mixers, peers
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


def test_what_was_timed_before_an_interruption_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mixers._bench_family

    def interrupted(name: str, *more: Any) -> list[dict[str, Any]]:
        if name == "KDA":
            raise KeyboardInterrupt
        return whole(name, *more)

    monkeypatch.setattr(mixers, "_bench_family", interrupted)
    lines: list[str] = []
    frame = run_bench([(1, 8, 1)], ("attention", "KDA"), "cpu", 3, lines.append)
    assert set(frame["family"]) == {"attention"}
    assert lines[-1] == "interrupted: the 2 rows of before are kept"
    with pytest.raises(KeyboardInterrupt):
        run_bench([(1, 8, 1)], ("KDA",), "cpu", 3)


def test_tuning_ends_in_time_and_is_carried_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Autotuner:
        def __init__(self) -> None:
            self.cache: dict[Any, Any] = {}

        def _bench(self, *args: Any, config: Any, **meta: Any) -> list[float]:
            return [config] * 3

    module = ModuleType("triton.runtime.autotuner")
    module.Autotuner = Autotuner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton.runtime.autotuner", module)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    tuner = Autotuner()
    with peers.bounded_tuning(math.inf) as cut:
        assert [tuner._bench(config=c) for c in (3.0, 2.0)] == [[3.0] * 3, [2.0] * 3]
        assert not cut()
    with peers.bounded_tuning(-1.0) as cut:  # over at once: one setting each
        assert [tuner._bench(config=c)[0] for c in (math.inf, 3.0, 2.0)] == [
            math.inf, 3.0, math.inf]  # the first does not run
        assert cut()
    assert tuner._bench(config=2.0) == [2.0] * 3

    tuner.cache = {(64, "bf16"): "a", (128, "bf16"): "b"}
    gc.collect()
    end = peers.carry_tuning()
    assert (256, "none") in tuner.cache
    assert tuner.cache[128, "bf16"] == "b"
    assert tuner.cache[128, "fp32"] == "b"
    end()
    assert (256, "none") not in tuner.cache
