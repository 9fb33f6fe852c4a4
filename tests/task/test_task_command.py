"""The command of the task as people meet it: what a signal leaves, whose fault a failure is; and
what a record of its runs says."""

from __future__ import annotations

import json
import os
import signal

import pytest

import mambabyte.task
from analysis.cli import main
from analysis.studies.task.record import task_record
from mambabyte.harness import TINY_TEXT


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_task_keeps_the_seeds_that_ended_before_a_signal(name, tmp_path, monkeypatch, capsys):
    tiny = tmp_path / "tiny.txt"
    tiny.write_text(TINY_TEXT)
    real, number = mambabyte.task.run_task, getattr(signal, name)

    def second_is_interrupted(*args, seed, **kw):
        if seed:
            os.kill(os.getpid(), number)
        return real(*args, seed=seed, **kw)

    monkeypatch.setattr(mambabyte.task, "run_task", second_is_interrupted)
    args = ["task", "run", "ngram", "--corpus", str(tiny), "--characters", "9", "--seeds", "3"]
    before = signal.getsignal(number)
    assert main([*args, "--json"]) == 130
    assert signal.getsignal(number) == before
    out, err = capsys.readouterr()
    assert [row["seed"] for row in json.loads(out)["runs"]] == [0]
    assert "1 of 3 seeds" in err


@pytest.mark.parametrize(("code", "message"), [
    ("raise ValueError('boom')", "line 1: importing it failed with ValueError: boom"),
    ("def train(", "line 1: importing it failed with SyntaxError"),
    ("def train(text): return 3", "train returned int, which is no CharModel"),
    ("def train(): return 3", "failed with TypeError: train() takes 0 positional arguments"),
    ("def train(text, valid=None):\n    return 1 / 0", "line 2: calling train"),
])
def test_a_submission_that_fails_is_named_with_its_line(code, message, tmp_path, capsys):
    path = tmp_path / "submission.py"
    path.write_text(code)
    assert main(["task", "check", str(path)]) == 2
    assert message in capsys.readouterr().err


def _row(seed: int, **changed):
    return {"system": "ours", "seed": seed, "joules": 250.0, "total_joules": 400.0,
            "cpu_joules": 90.0, "cpu_source": "RAPL", "seconds": 10.0, "valid_accuracy": 0.6,
            "valid_accuracy_error": 0.01, "valid_bits_per_byte": 1.2, "valid_characters": 60_000,
            "test_accuracy": 0.5, "n_parameters": 1000, "steps": 7, "n_steps": 8, "bytes_seen": 512,
            "peak_memory_bytes": 3 * 2**20, "ngram_bytes": 5_000_000, "ms_per_step": 1.5,
            "scoring_seconds": 4.0, "overrides": {"n_steps": 8}, "failure": None,
            "parts": {"training": {"seconds": 9.0, "joules": 200.0}}, **changed}


def test_a_record_has_the_runs_in_the_units_of_its_columns():
    run = task_record([_row(0)], {}, idle_watts=50.0, characters=60_000)
    (line,) = run.tables["runs"].frame.to_dict("records")
    assert {name: cell for name, cell in line.items() if cell is not None} == {
        "system": "ours", "seed": 0, "energy (J, idle subtracted)": 250.0,
        "total energy (J)": 400.0, "CPU (J)": 90.0, "CPU, from": "RAPL", "time (s)": 10.0,
        "validation accuracy": 0.6, "its error over the text": 0.01,
        "validation (bits/byte)": 1.2, "validation characters": 60_000, "test accuracy": 0.5,
        "parameters": 1000, "steps": 7, "of": 8, "bytes seen": 512, "peak memory (MiB)": 3.0,
        "n-gram tables (MB)": 5.0, "step (ms)": 1.5, "scoring (s)": 4.0,
        "changed": '{"n_steps": 8}'}
    (part,) = run.tables["parts"].frame.to_dict("records")
    assert part == {"system": "ours", "seed": 0, "part": "training", "time (s)": 9.0,
                    "GPU (J, idle subtracted)": 200.0}


def test_a_systems_means_are_of_the_seeds_that_ended():
    rows = [_row(0), _row(1, valid_accuracy=0.8, seconds=20.0, joules=None),
            _row(2, failure="diverged", valid_accuracy=None), _row(3, system="other")]
    run = task_record(rows, {}, idle_watts=50.0, characters=60_000)
    ours, other = run.tables["systems"].frame.to_dict("records")
    assert (ours["runs"], other["runs"]) == (2, 1)
    assert (ours["validation accuracy"], ours["lowest"], ours["highest"]) == (
        pytest.approx(0.7), 0.6, 0.8)
    assert ours["time (s)"] == 15.0
    assert ours["energy (J, idle subtracted)"] is None  # of a seed without a counter no mean
    assert other["energy (J, idle subtracted)"] == 250.0
    assert run.seconds == 50.0
