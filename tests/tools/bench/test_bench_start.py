"""`bench start`: what a fresh process reaches when, and what is refused before it starts."""

from __future__ import annotations

import json
import subprocess

import pandas as pd
import pytest

from analysis.cli import main
from analysis.measure.bench import start
from mambabyte.errors import UserError

MARKS = [{"mark": mark, "seconds": seconds, "joules": float("nan")} for mark, seconds in (
    (start.IMPORTED, 3.0), (start.CONTEXT, 3.25), (start.PACKAGE, 3.5), (start.OPENED, 4.0),
    ("step 1", 5.0), ("step 50", 7.5))]


def test_a_start_is_a_line() -> None:
    frame = pd.DataFrame([{"system": "smoke", "way": way, "caches": "cold", **mark}
                          for way in ("fused", "compile") for mark in MARKS])
    lines = start.summary(frame).to_dict("records")
    assert [line["way"] for line in lines] == ["fused", "compile"]
    assert [lines[0][part] for part in (
        "import torch (s)", "context (s)", "package (s)", "text to step 1 (s)",
        "text to step 50 (s)", "process to step 1 (s)")] == [3.0, 0.25, 0.25, 1.0, 3.5, 5.0]


@pytest.mark.parametrize("name", ["smoke", "task:mamba_byte"])
def test_a_child_says_when_it_was_where(name, tmp_path, capsys, monkeypatch) -> None:
    if name.startswith("task:"):  # on so small a text the task trains its smoke configuration
        from mambabyte.train import smoke

        preset = smoke.PRESETS["smoke"]
        recipe = start.replace(preset.train, n_steps=60)
        monkeypatch.setitem(smoke.PRESETS, "smoke", start.replace(preset, train=recipe))
    text = tmp_path / "text.txt"
    text.write_bytes(b"she sells sea shells by the sea shore, " * 60)
    start._main(json.dumps([name, "graph", "cpu", str(text), str(tmp_path)]), start.time.time())
    marks = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [mark["mark"] for mark in marks] == [mark["mark"] for mark in MARKS]
    seconds = [mark["seconds"] for mark in marks]
    assert seconds == sorted(seconds)
    assert all(mark["joules"] is None for mark in marks)  # no counter that processes share
    frame = pd.DataFrame([{"system": name, "way": "graph", "caches": "cold", **mark}
                          for mark in marks]).astype({"joules": float})
    values = start.start_values(frame, pd.DataFrame())
    assert len(values) == 2
    assert values[f"seconds_step_50_{name.replace(':', '_')}_graph_cold"][0] == seconds[-1]


def test_what_cannot_be_started_is_refused() -> None:
    with pytest.raises(UserError, match="preset 'nano' is unknown"):
        start.check(["nano"], ["eager"], "cpu")
    with pytest.raises(UserError, match="task:ngram trains no network"):
        start.check(["task:ngram"], ["eager"], "cpu")
    with pytest.raises(UserError, match="ways compile on cpu: it has eager and graph"):
        start.check(["smoke"], ["compile"], "cpu")


def test_cold_starts_come_first_and_warm_ones_find_what_they_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    seen = []

    def child(name, way, device, folder):
        left = folder / "own"
        seen.append((name, left.is_dir()))
        left.mkdir(exist_ok=True)
        return MARKS

    monkeypatch.setattr(start, "_child", child)
    command = ["bench", "start", "--device", "cpu", "--corpus", __file__, "--json", "--systems"]
    assert main([*command, "smoke", "mamba_byte"]) == 0
    assert seen == [("smoke", False), ("mamba_byte", False), ("smoke", True), ("mamba_byte", True)]
    out, err = capsys.readouterr()
    rows = json.loads(out)["starts"]
    assert "smoke, eager, cold: starting" in err  # a start takes a while
    assert [row["caches"] for row in rows[:: len(MARKS)]] == ["cold", "cold", "warm", "warm"]
    assert main([*command, "smoke", "--caches", "warm"]) == 0
    assert {row["caches"] for row in json.loads(capsys.readouterr().out)["starts"]} == {"warm"}


def test_a_child_that_fails_is_one_line(tmp_path, monkeypatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nUserError: no text\n")
    monkeypatch.setattr(start.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="smoke by eager ended with 1: UserError: no text"):
        start._child("smoke", "eager", "cpu", tmp_path)


def test_what_was_started_before_an_interruption_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start_in(_: object, name: str, *__: object) -> list[dict[str, object]]:
        if name != "smoke":
            raise KeyboardInterrupt
        return [{"system": name, "way": "eager", "caches": "cold", **mark} for mark in MARKS]

    monkeypatch.setattr(start, "start_in", start_in)
    command = ["bench", "start", "--device", "cpu", "--corpus", __file__, "--json", "--systems"]
    assert main([*command, "smoke", "mamba_byte"]) == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)["starts"]) == len(MARKS)
    assert f"interrupted: the {len(MARKS)} rows of before are kept" in said.err
    assert main([*command, "mamba_byte"]) == 130


@pytest.mark.long
def test_a_pace_is_of_a_process_with_the_caches_of_the_start(tmp_path) -> None:
    said = []
    (row,) = start.paces({"smoke": tmp_path}, ["eager"], "cpu", said.append)
    assert (row["system"], row["way"]) == ("smoke", "eager")
    assert 0 < row["low"] <= row["ms"] <= row["high"]
    assert len(said) == 1
    assert start.os.environ.get("TRITON_CACHE_DIR") != str(tmp_path / "triton")
    assert list(start.paces({}, ["eager"], "cpu")) == []
