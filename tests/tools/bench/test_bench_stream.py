"""The streaming bench: its rows, its values, and its command."""

from __future__ import annotations

import json

import pytest

from analysis.cli import main
from analysis.measure.bench import stream as bench_stream
from analysis.measure.bench import systems as bench_systems
from analysis.runs.records import load_record
from mambabyte.config import PRESETS
from mambabyte.model import ByteLM


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_stream, "SECONDS", 0.02)


def test_rows_and_values() -> None:
    lines: list[str] = []
    model = ByteLM(PRESETS["smoke"].model).eval()
    frame, values = bench_stream.run_bench(
        model, "a text, naïvely. ".encode() * 5, [1, 3], [5, 9], 30, lines.append)
    assert list(frame.columns) == list(bench_stream.COLUMNS)
    assert list(zip(frame["way"], frame["streams"], frame["seen"], strict=True)) == [
        (bench_stream.TORCH, 1, 1), (bench_stream.TORCH, 3, 1), (bench_stream.BYTE, 1, 5),
        (bench_stream.DRAW, 1, 5), (bench_stream.BYTE, 1, 9), (bench_stream.DRAW, 1, 9),
        (bench_stream.PLAIN, 1, 9), (bench_stream.GUESSED, 1, 9)]
    assert (frame["low"] <= frame["high"]).all()
    expected = frame["streams"] / frame["microseconds"] * 1e6
    assert frame["bytes_per_second"].to_list() == pytest.approx(expected.to_list())
    assert set(values) == set(bench_stream.VALUES)
    assert values["scoring_seconds"] > 0 < values["window_seconds"]
    assert values["different_hits"] == 0
    assert sum("us" in line.split()[-1] for line in lines) == len(frame)
    after = frame[frame["seen"] == 9].set_index("way")["bytes_per_second"]
    assert values["generation_bytes_per_second"] == after[bench_stream.DRAW]
    assert values["streaming_bytes_per_second"] == after[bench_stream.BYTE]
    assert values["plain_bytes_per_second"] == after[bench_stream.PLAIN]
    assert values["speculative_bytes_per_second"] == after[bench_stream.GUESSED]
    assert values["bytes_a_pass"] >= 1


def test_what_was_timed_before_an_interruption_is_kept(monkeypatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_stream, "_scoring", stop)
    lines: list[str] = []
    frame, values = bench_stream.run_bench(
        ByteLM(PRESETS["smoke"].model).eval(), b"a text. " * 5, [1], [5], 30, lines.append)
    assert lines[-1] == f"interrupted: the {len(frame)} rows of before are kept"
    assert set(values) == set(bench_stream.VALUES) - {
        "scoring_seconds", "window_seconds", "different_hits", "accuracy", "scored_characters"}
    monkeypatch.setattr(bench_stream, "_time", stop)
    with pytest.raises(KeyboardInterrupt):
        bench_stream.run_bench(ByteLM(PRESETS["smoke"].model).eval(), b"a text. ", [1], [5], 0)


def test_the_command_writes_a_record(tmp_path, capsys) -> None:
    record = tmp_path / "throughput" / "streaming"
    arguments = ["bench", "stream", "--preset", "smoke", "--streams", "1", "--seen", "4",
                 "--characters", "0", "--device", "cpu", "--record", str(record)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "streaming: one byte in, one distribution out: " in out
    assert out.count(": not asked for") == 5
    assert "nan" not in out
    assert main([*arguments[:-2], "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["stream"]) == 5
    assert len(load_record(record).tables["stream"].frame) == 5
    assert main(["bench", "stream", "--seconds", "9", "--device", "cpu"]) == 2
    assert "--seconds ends between two of --systems" in capsys.readouterr().err
    assert main(["bench", "stream", "--systems", "", "--device", "cpu"]) == 2
    assert "preset '' is unknown" in capsys.readouterr().err
    assert main(["bench", "stream", "--streams", "0", "--device", "cpu"]) == 2
    assert "--streams is [0]: expected a list (1 or more" in capsys.readouterr().err


def test_a_row_for_each_preset_and_system(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench_systems, "SECONDS", 0.02)
    monkeypatch.setattr(bench_systems, "COUNTED", 3000)
    monkeypatch.setattr(bench_systems, "SEEN", 20)
    record = tmp_path / "throughput" / "systems"
    names = ["smoke", "task:ours", "task:ngram"]
    arguments = ["bench", "stream", "--device", "cpu", "--record", str(record), "--systems"]
    assert main([*arguments, *names]) == 0
    out = capsys.readouterr().out
    assert out.count(" B/s  streaming ") == 3
    frame = load_record(record).tables["systems"].frame
    assert frame["system"].to_list() == names
    assert (frame.iloc[:, -3:] > 0).all(axis=None)
    assert main([*arguments, "task:none"]) == 2
    assert "system 'none' is unknown" in capsys.readouterr().err
    assert {"quick_start", "R", "task:ours"} <= set(bench_systems.every())


def test_a_bench_that_was_cut_goes_on_where_it_was(tmp_path, capsys, monkeypatch) -> None:
    measured: list[int] = []
    now = {"characters_per_second": 3.0, "engine": "e", "seen": 1, "parameters": 1,
           "generation_bytes_per_second": 1.0, "streaming_bytes_per_second": 2.0}
    monkeypatch.setattr(bench_systems, "_speeds",
                        lambda model, *_: measured.append(len(model.layers)) or now)
    clock = iter(range(100))
    monkeypatch.setattr(bench_systems.time, "perf_counter", lambda: next(clock))
    record = tmp_path / "throughput" / "systems"
    command = ["bench", "stream", "--device", "cpu", "--record", str(record), "--seconds", "2",
               "--systems", "smoke", "quick_start", "MA", "R"]
    for done, absent in ((2, "MA, R"), (4, "")):
        clock = iter(range(100))
        assert main(command) == 0
        out = capsys.readouterr().out
        assert len(measured) == done
        assert (f"not measured: {absent}: the same command goes on" in out) == bool(absent)
        assert len(load_record(record).tables["systems"].frame) == done
    assert main(command) == 0  # all was there: measured anew, as far as the time goes
    assert len(measured) == 6
