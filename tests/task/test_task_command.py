"""The command of the task as people meet it: what a signal leaves, and whose fault a failure is."""

from __future__ import annotations

import json
import os
import signal

import pytest

import mambabyte.task
from analysis.cli import main
from mambabyte.harness import TINY_TEXT


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_task_keeps_the_seeds_that_ended_before_a_signal(name, tmp_path, monkeypatch, capsys):
    tiny = tmp_path / "tiny.txt"
    tiny.write_text(TINY_TEXT)
    real, number = mambabyte.task.run_task, getattr(signal, name)
    if name == "SIGINT":  # where tests run in the background of a script it is ignored
        monkeypatch.setattr(os, "kill", signal.default_int_handler)
    elif signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("ignored here, as under nohup")

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
