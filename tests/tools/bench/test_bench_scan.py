"""The bench: its rows, its floor, and what it does with a peer that cannot run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.cli import main
from analysis.measure.bench import peers
from analysis.measure.bench import scan as bench_scan
from analysis.measure.bench.peers import Peer
from analysis.measure.bench.scan import COLUMNS, PEERS, floor_seconds, peer_available, run_bench
from mambabyte.errors import UserError

MACHINE: dict[str, object] = {
    "device": "a test",
    "copy_bytes_per_second": 1e9,
    "exp2_per_second": 1e9,
    "fp32_fma_per_second": 1e9,
}


def test_the_floor_is_the_formula_worked_by_hand() -> None:
    shape = (2, 3, 5)  # 30 steps, and 2 * 3 rows of 16 states
    rates = MACHINE | {"exp2_per_second": 1e30, "fp32_fma_per_second": 1e30}
    traffic = 2 * (4 * 30 + 2 * 96)
    assert floor_seconds(shape, 16, 2, rates, "forward") == pytest.approx(traffic / 1e9)
    back = 2 * (7 * 30 + 4 * 96)
    both = floor_seconds(shape, 16, 2, rates, "forward+backward")
    assert both == pytest.approx((traffic + back) / 1e9)
    rates = MACHINE | {"copy_bytes_per_second": 1e30, "fp32_fma_per_second": 1e30}
    assert floor_seconds(shape, 16, 2, rates, "forward") == pytest.approx(30 * 20 / 1e9)
    rates = MACHINE | {"copy_bytes_per_second": 1e30, "exp2_per_second": 1e30}
    assert floor_seconds(shape, 16, 2, rates, "forward+backward") == pytest.approx(15 * 480 / 1e9)


def test_a_small_bench_has_its_columns_and_right_results() -> None:
    lines: list[str] = []
    peers = ("chunked", "sdpa", "mamba_ssm")
    frame = run_bench(
        [(1, 8, 4), (2, 5, 4)], peers=peers, device="cpu", repeats=3, progress=lines.append,
        states=2, machine=MACHINE,
    )  # fmt: skip
    assert list(frame.columns) == list(COLUMNS)
    assert len(frame) == 2 * len(peers) * 2
    assert frame.attrs["machine"] == MACHINE
    chunked = frame[frame["peer"] == "chunked"]
    assert (chunked["median_seconds"] > 0).all()
    assert (chunked["low_seconds"] <= chunked["high_seconds"]).all()
    assert (chunked["error_output"] < 1e-5).all()
    assert (chunked[chunked["direction"] == "forward+backward"]["error_gradient"] < 1e-5).all()
    assert (chunked["fraction_of_floor"] > 0).all()
    missing = frame[frame["peer"] == "mamba_ssm"]
    assert missing["median_seconds"].isna().all()
    assert (missing["note"] != "").all()
    assert any("sdpa" in line for line in lines)


def test_a_peer_that_breaks_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> torch.Tensor:
        raise RuntimeError("out of order\nsecond line")

    monkeypatch.setitem(PEERS, "broken", Peer("fails", fail))
    frame = run_bench([(1, 4, 4)], peers=("broken",), device="cpu", repeats=2, machine=MACHINE)
    assert set(frame["note"]) == {"RuntimeError: out of order"}


def test_peers_that_store_every_state_are_left_out_when_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_scan, "SLOW_ELEMENTS", 10)
    frame = run_bench([(1, 4, 4)], peers=("chunked",), device="cpu", repeats=2, machine=MACHINE)
    assert frame["note"].str.startswith("left out").all()
    assert frame["ratio_to_fused"].map(math.isnan).all()


def test_what_was_timed_before_an_interruption_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A direction of a shape, too: a slow peer takes a minute for each."""
    whole = peers._interleaved

    def interrupted(cases: object, direction: str, *more: Any) -> dict[str, Any]:
        if direction == stop:
            raise KeyboardInterrupt
        return whole(cases, direction, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(peers, "_interleaved", interrupted)
    lines: list[str] = []
    stop = "forward+backward"
    frame = run_bench([(1, 4, 4), (1, 5, 4)], peers=("chunked", "mamba_ssm"), device="cpu",
                      repeats=2, machine=MACHINE, progress=lines.append)
    assert frame[["length", "peer", "direction"]].to_numpy().tolist() == [[4, "chunked", "forward"]]
    assert (frame["floor_seconds"] > 0).all()
    assert lines[-1] == "interrupted: the 1 rows of before are kept"
    stop = "forward"
    with pytest.raises(KeyboardInterrupt):
        run_bench([(1, 4, 4)], peers=("chunked",), device="cpu", repeats=2, machine=MACHINE)


def test_what_was_not_measured_is_no_nan_on_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scan", "--device", "cpu", "--shapes", "1,8,4", "--repeats", "1",
                 "--peers", "chunked", "mamba_ssm"]) == 0
    assert "nan" not in capsys.readouterr().out


def test_a_long_round_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.measure.timing.SAY_SECONDS", 0.0)
    lines: list[str] = []
    run_bench([(1, 4, 4)], peers=("chunked",), device="cpu", repeats=3, machine=MACHINE,
              progress=lines.append)
    assert "(1, 4, 4) forward: trying chunked" in lines
    assert "(1, 4, 4) forward+backward: round 3 of 3" in lines


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="peer 'nobody' is unknown: choose from 'fused', 'fu"):
        run_bench(peers=("nobody",), device="cpu")
    with pytest.raises(UserError, match="dtype 'int8' is unknown"):
        run_bench(dtype="int8", device="cpu")
    assert peer_available("mamba_ssm", torch.device("cpu"))


def test_what_cannot_end_well_fails_before_it_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = ["bench", "scan", "--device", "cpu"]
    assert main([*scan, "--repeats", "0"]) == 2
    assert "--repeats is 0" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    assert main([*scan, "--record", str(tmp_path / "full")]) == 2
    assert "is there and is no record" in capsys.readouterr().err
