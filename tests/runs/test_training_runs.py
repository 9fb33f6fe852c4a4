"""mambabyte runs: what run folders say, in a terminal, on a page and to TensorBoard."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from dataclasses import replace

import pandas as pd
import pytest

from analysis.cli import main
from analysis.plots.training import chart
from analysis.runs.trainings import CURVES, find_trainings, read_training, write_events
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus import load_corpus
from mambabyte.errors import UserError
from mambabyte.train import train

MODEL = ModelConfig(d_model=16, n_layer=1, n_head=2, n_kv_head=2, layer_pattern="A")
RECIPE = TrainConfig(context=16, batch_size=1, n_steps=3, log_every=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    (root / "text.txt").write_text("what a run says of itself. " * 40)
    corpus = load_corpus(str(root / "text.txt"))
    train(MODEL, RECIPE, corpus, root / "first", evaluate_bytes=50)
    train(MODEL, replace(RECIPE, lr=1e-3, n_steps=2), corpus, root / "<b>second", evaluate_bytes=50)
    (root / "other").mkdir()
    (root / "other" / "config.json").write_text('{"model": "another program\'s"}')
    return root


def told(capsys, *args):
    assert main(["runs", *map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_list_names_every_run_and_nothing_else(root, capsys):
    rows = told(capsys, "list", root)["runs"]
    assert [row["run"] for row in rows] == [str(root / "<b>second"), str(root / "first")]
    assert [(row["steps"], row["of"], row["ended by"]) for row in rows] == [
        (2, 2, "n_steps"), (3, 3, "n_steps")]
    result = json.loads((root / "first" / "result.json").read_text())
    assert rows[1]["held-out bits/byte"] == result["valid_bits_per_byte"]
    assert rows[1]["joules"] == result["joules"]
    assert rows[1]["seconds"] == result["seconds"]
    assert rows[1]["bytes/s"] == pytest.approx(3 * 16 / result["seconds"])
    assert main(["runs", "list", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("run ")
    assert main(["runs", "list", str(root / "other")]) == 0
    assert "mambabyte train --out runs/first makes one" in capsys.readouterr().out


def test_a_comparison_says_what_was_set_otherwise(root, capsys):
    found = told(capsys, "compare", root / "first", root / "<b>second")
    assert found["different"] == {"train.n_steps": [3, 2], "train.lr": [3e-4, 1e-3]}
    assert main(["runs", "compare", str(root / "first")]) == 2
    assert "FOLDERS is" in capsys.readouterr().err


def test_show_samples_the_run_and_never_obeys_it(root, capsys):
    (one,) = told(capsys, "show", root / "first", "--sample-bytes", "40")["runs"]
    assert one["sample"]
    assert not [c for c in one["sample"] if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    assert told(capsys, "show", root / "first", "--sample-bytes", "40")["runs"][0] == one
    assert main(["runs", "show", str(root / "first"), "--sample-bytes", "0"]) == 0
    assert f"{'ended by':20}n_steps" in capsys.readouterr().out


def test_the_page_is_small_and_alone(root, capsys, tmp_path):
    page = tmp_path / "curves.html"
    told(capsys, "plot", root / "first", root / "<b>second", "--html", page, "--sample-bytes", 20)
    text = page.read_text()
    assert len(text) < 200_000
    assert "<b>" not in text
    assert "&lt;b&gt;second" in text
    for outside in ("<script", "src=", "@import", "<link"):
        assert outside not in text
    assert "training loss, bits/byte" in text
    assert "energy, J" in text or pd.isna(read_training(root / "first").metrics["joules"]).all()


def test_names_of_any_characters_are_shown(root, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    names = ["$^$", "_under", "a\nb", "esc\x1b[31m", os.fsdecode(b"not utf-8 \xff")]
    for name in names:
        shutil.copytree(root / "first", tmp_path / name)
    page = tmp_path / "curves.html"
    assert main(["runs", "plot", *names, "--html", str(page), "--sample-bytes", "5"]) == 0
    out = capfd.readouterr().out
    text = page.read_text(encoding="utf-8")
    for name in ("$^$", "_under", r"a\nb", r"esc\x1b[31m", r"not utf-8 \udcff"):
        assert f" {name}\n" in out
        assert text.count(name) >= 3  # in a table, the legend and above the sample
    assert main(["runs", "show", "a\x1b[31m\nb"]) == 2
    line, *more = capfd.readouterr().err.splitlines()
    assert not more
    assert line.startswith(r"error: a\x1b[31m\nb holds no run")


def test_a_run_that_goes_on_or_is_damaged_is_still_shown(root, capsys, tmp_path):
    going = tmp_path / "going"
    going.mkdir()
    (going / "config.json").write_text((root / "first" / "config.json").read_text())
    assert told(capsys, "show", going)["runs"][0]["ended by"] == "not yet"
    assert main(["runs", "plot", str(going)]) == 0
    assert "not measured in these runs" in capsys.readouterr().out
    (going / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\n')
    (going / "result.json").write_text("[")
    assert len(find_trainings(tmp_path)) == 1
    assert told(capsys, "show", going)["runs"][0]["steps"] == 0
    assert main(["runs", "show", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["runs", "plot", str(going), "--curve", "los"]) == 2
    assert "choose one of bits_per_byte" in capsys.readouterr().err


def test_without_a_folder_of_runs_only_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("no runs in runs: ")
    assert err == ""


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_run_that_may_not_be_read_is_named_and_the_others_shown(root, forbid, capsys):
    names = [run.folder for run in find_trainings(root)]
    assert len(names) > 1
    forbid(names[0] / "metrics.jsonl")
    assert main(["runs", "list", str(root)]) == 0
    out, err = capsys.readouterr()
    assert f"{names[0] / 'metrics.jsonl'} is left out: Permission denied" in err
    assert str(names[0]) not in out
    assert str(names[1]) in out
    forbid(names[1] / "config.json")
    assert main(["runs", "show", str(names[1])]) == 2
    assert capsys.readouterr().err == (
        f"error: cannot use {names[1] / 'config.json'}: Permission denied\n")
    forbid(names[1])
    assert main(["runs", "list", str(root)]) == 0
    assert f"{names[1]} is left out" in capsys.readouterr().err


def test_a_chart_in_characters_has_its_ends_where_they_belong():
    frame = pd.DataFrame({"seconds": [0.0, 5.0, 10.0], "loss": [8.0, float("nan"), 2.0]})
    lines = chart({"a": frame, "b": frame + 1}, "loss", width=30, height=5)
    assert lines[0] == "        9| +"[:9] + "|" + lines[0][10:]
    assert lines[1].startswith(" " * 9 + "|o")
    assert lines[4].rstrip().endswith("o")
    assert lines[4].startswith("        2|")
    assert "11 s" in lines[6]
    assert lines[-2:] == ["  o a", "  + b"]
    assert chart({"a": frame[1:2]}, "loss") == []


def test_event_files_need_tensorboard_and_say_so(root, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'mambabyte\[tensorboard\]'"):
        write_events(read_training(root / "first"), tmp_path)


def test_event_files_hold_every_logged_step(root, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = read_training(root / "first")
    write_events(run, tmp_path / "events")
    read = events.EventAccumulator(str(tmp_path / "events"))
    read.Reload()
    found = [(e.step, e.value) for e in read.Scalars("bits_per_byte")]
    assert [step for step, _ in found] == [1, 2, 3]
    assert [value for _, value in found] == pytest.approx(run.metrics["bits_per_byte"].tolist())
    assert set(read.Tags()["scalars"]) <= {*CURVES, "held_out_bits_per_byte"}
