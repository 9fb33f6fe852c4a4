"""Run folders and reports beside a user's files, and run folders that are not as written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from analysis.runs.folders import RECORD, list_runs, load_run, seal
from analysis.runs.records import check_record_folder
from mambabyte.config.owners import only_one
from mambabyte.errors import UserError
from tests.helpers.report_world import World, write_record


def test_a_report_takes_no_file_of_the_users(world: World):
    folder = world.run()
    (folder / "notebook.ipynb").write_text('{"cells": []}')
    world.build()
    theirs = world.evidence
    (theirs / "figures").mkdir()
    (theirs / "a.tex").write_text("Proofs.")
    (theirs / "figures" / "one.pdf").write_text("a figure")
    (theirs / "link").symlink_to("a.tex")
    world.notebook("x = 2")
    folder.rename(world.runs / "tiny-2")
    (world.runs / "tiny-2" / "run.json").unlink()
    (world.run("tiny-2") / "notebook.ipynb").write_text('{"cells": []}')
    world.build()  # takes what it wrote itself the first time, and that alone
    assert {p.name for p in theirs.iterdir()} == {
        "a.tex", "figures", "link", "data", "machines.html", "notebook-tiny-2.html", "tiny.html",
        "manifest.json"}
    assert (theirs / "figures" / "one.pdf").read_text() == "a figure"
    assert os.readlink(theirs / "link") == "a.tex"


def test_a_record_written_again_takes_no_file_of_the_users(world: World):
    path = write_record(world, world.run(), "box")
    (path / "notes.txt").write_text("seen twice")
    write_record(world, world.runs / "tiny-1", "box")
    assert {p.name for p in path.iterdir()} == {"notes.txt", "run.json", "times.csv", "lengths.csv"}


@pytest.mark.parametrize("content", ["{}", '{"scripts": {"test": "jest"}}', "[1]", "run fast"])
def test_a_run_json_of_another_program_is_not_written_over(content, tmp_path: Path):
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / RECORD).write_text(content)
    with pytest.raises(UserError, match="is not a complete run folder"):
        check_record_folder(tmp_path / "box")


def test_a_flipped_bit_in_a_sealed_folder_is_told(world: World):
    folder = world.run()
    seal(folder, seconds=2.0)
    assert load_run(folder).seconds == 2.0
    rng = np.random.default_rng(0)
    for name in (RECORD, "times.csv", "lengths.csv"):
        data = (folder / name).read_bytes()
        for position in rng.integers(0, len(data), size=20):
            changed = bytearray(data)
            changed[position] ^= 1 << int(rng.integers(8))
            if changed.strip() == data.strip():
                continue
            (folder / name).write_bytes(changed)
            if name == RECORD and _same(changed, data):
                continue  # a blank that became another
            with pytest.raises(UserError, match=str(folder)):
                load_run(folder)
        (folder / name).write_bytes(data)
    load_run(folder)


def _same(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize("name", ["times.csv", RECORD])
@pytest.mark.parametrize("instead", ["folder", "pipe", "nothing"])
def test_what_is_in_place_of_a_file_is_told(name, instead, world: World):
    folder = world.run()
    (folder / name).unlink()
    {"folder": os.mkdir, "pipe": os.mkfifo, "nothing": lambda path: None}[instead](folder / name)
    if (name, instead) == (RECORD, "nothing"):
        assert list_runs(world.runs) == []  # a folder without it is not a run
        return
    with pytest.raises(UserError, match="tiny-1 is not a complete run folder"):
        list_runs(world.runs)


@pytest.mark.parametrize("kind", [errno.EIO, errno.EACCES])
def test_what_cannot_be_read_is_not_called_damaged(kind, world: World, monkeypatch):
    """Else a failing disk had one told to delete what is on it."""
    folder, read_text = world.run(), Path.read_text

    def fails(path: Path, *args, **more) -> str:
        if path.parent == folder:
            raise OSError(kind, os.strerror(kind), str(path))
        return read_text(path, *args, **more)

    monkeypatch.setattr(Path, "read_text", fails)
    with pytest.raises(UserError, match=r"tiny-1 cannot be read \(.*: see to its disk"):
        load_run(folder)


def test_an_unknown_status_is_told(world: World):
    world.run(status="paused")
    with pytest.raises(UserError, match="status is 'paused', expected done or failed"):
        world.build()


@pytest.mark.parametrize("path", ["typo.x", "tiny.typo", "typo"])
def test_to_ask_whether_a_typo_was_measured_is_told(path, world: World):
    world.run()
    world.section("summary", "{% if measured('" + path + "') %}yes{% else %}no{% endif %}")
    with pytest.raises(UserError, match="typo"):
        world.build()


def test_two_tasks_of_one_record_are_one_too_many(tmp_path: Path, capsys):
    from analysis.cli import main

    (tmp_path / "text.txt").write_text("she sells sea shells by the sea shore, " * 60)
    record = tmp_path / "records" / "box"
    args = ["task", "run", "ngram", "--corpus", str(tmp_path / "text.txt"), "--characters", "9",
            "--device", "cpu", "--record", str(record), "--title", "T", "--about", "A"]
    record.parent.mkdir()
    with only_one(record.with_name(".box.lock"), "makes the record box"):
        assert main(args) == 2
    assert "makes the record box in" in capsys.readouterr().err
    assert main(args) == 0
    assert [p.name for p in record.parent.iterdir()] == ["box"]
