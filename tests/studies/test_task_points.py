"""Accuracy against energy: what is read from the records, and what is drawn."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest

from analysis.runs.folders import Run, tables_of
from analysis.runs.frames import csv_text
from analysis.runs.records import DATA, load_record, write_record_folder
from analysis.runs.staleness import source_files
from analysis.studies.task import compute as task
from analysis.studies.task import figures
from analysis.studies.task import values as answers
from mambabyte.errors import UserError

COLUMNS = ["system", "seed", task.ENERGY, "time (s)", task.VALID, task.HELD_OUT, "changed",
           "failure"]


def write_record(folder: Path, name: str, rows: list[list], trials: list[list] = (), idle=50.0,
                 columns: list[str] = COLUMNS):
    """A record of runs, with the table of means that the task's own records have."""
    tables = {
        "systems": ("means", pd.DataFrame([["ours", 3, 1.0]],
                                          columns=["system", "runs", task.ENERGY])),
        "runs": ("runs", pd.DataFrame(rows, columns=columns, dtype=object)),
        "trials": ("trials", pd.DataFrame(list(trials), dtype=object, columns=[
            "trial", task.ENERGY, task.VALID, task.HELD_OUT, "configuration"]))}
    write_record_folder(Run(
        "task", {"idle_watts": idle}, tables=tables_of(tables), title="t", about="a",
        provenance={"date": "2026-01-01", "commit": "c", "command": "x", "versions": {"a": "1"},
                    "machine": {"gpus": [{"name": "Card"}]}}), folder / "records" / "task" / name)


ROWS = [
    ["ours", 0, 3000.0, 10.0, 0.71, 0.72, None, None],
    ["ours", 1, 3200.0, 10.0, 0.73, 0.74, None, None],
    ["ours", 2, None, None, None, None, None, "crashed: no card"],
    ["nano_ssm_500", 0, 4000.0, 9.0, 0.64, 0.65, '{"train": {"n_steps": 500}}', None],
    ["modded_nanogpt", 0, 15000.0, 30.0, 0.70, 0.71, None, None],
]


def test_runs_are_means_over_seeds_and_crashes_are_counted(tmp_path):
    write_record(tmp_path, "h200-task", ROWS)
    found = task.run(task.Parameters(), folder=tmp_path)
    systems = found.systems.set_index("system")
    assert list(systems.index) == ["ours", "nano_ssm_500", "modded_nanogpt"]
    ours = systems.loc["ours"]
    assert (ours["seeds"], ours["energy (J)"]) == (2, 3100.0)
    assert ours[task.VALID] == pytest.approx(0.72)
    assert (ours["lowest accuracy"], ours["highest accuracy"]) == (0.71, 0.73)
    assert systems["on the front"].tolist() == [True, False, False]
    assert systems["kind"].tolist() == ["SSM and attention", "SSM", "attention"]
    assert systems["with n-gram"].tolist() == [True, False, False]
    assert found.crashed["failure"].tolist() == ["crashed: no card"]
    values = answers.values(found, task.Parameters())
    assert values["crashed"].value == 1
    assert values["cheapest"].value == "ours"
    assert values["pure_ssm_accuracy"].value == 0.64
    assert found.idle_watts == (50.0,)
    assert found.machines == ("Card",)


def test_a_public_file_is_a_kind_of_its_own(tmp_path):
    write_record(tmp_path, "h200-task-b", ROWS)  # another job
    assert task.run(task.Parameters(), folder=tmp_path).job.empty
    (tmp_path / "records" / "task" / "h200-task-b").rename(tmp_path / "b")
    write_record(tmp_path, "h200-task-a", [
        [*ROWS[0], None], ["counts", 0, 180.0, 1.3, 0.704, None, None, None, None],
        ["ours", 0, 700.0, 10.0, 0.65, None, None, None, "0ab1"]],
        columns=[*COLUMNS, "public file (SHA-256)"])
    found = task.run(task.Parameters(), folder=tmp_path)
    assert found.points["kind"].tolist() == ["SSM and attention", "n-gram alone", "public file"]
    assert set(found.job["system"]) == {"ours", "counts"}
    (leader,) = found.leaders.to_dict("records")  # the other is more accurate, and dearer
    assert leader["ours, as accurate"] == "counts"
    assert leader["share (%)"] == pytest.approx(100 * 180 / 700)
    values = answers.values(found, task.Parameters())
    assert values["share_of_leaders"].value == leader["share (%)"]
    (axes,) = figures.one_job(found.job, 0.7).axes
    assert {text.get_text() for text in axes.texts} >= {"ours", "counts"}
    for field in fields(found):  # what is kept of it can be written
        if isinstance(frame := getattr(found, field.name), pd.DataFrame):
            assert csv_text(field.name, frame)


def test_of_a_public_file_that_none_of_ours_equals_no_share_is_said(tmp_path):
    columns = [*COLUMNS, "public file (SHA-256)"]
    write_record(tmp_path, "h200-task-a", [
        [*ROWS[0], None], [*ROWS[1], None],  # one seed at 0.71, one at 0.73
        ["best", 0, 700.0, 10.0, 0.72, None, None, None, "0ab1"],
        ["other", 0, 800.0, 10.0, 0.71, None, None, None, "0ab2"]], columns=columns)
    found = task.run(task.Parameters(), folder=tmp_path)
    lines = found.leaders.set_index("public file")
    assert lines.loc["best", "ours, as accurate"] is None
    assert lines.loc["other", "its highest energy (J)"] == 3200.0
    assert lines.loc["other", "share (%)"] == 400.0
    assert answers.values(found, task.Parameters())["share_of_leaders"].value is None


def test_a_new_record_appears_by_its_name(tmp_path):
    write_record(tmp_path, "h200-task", ROWS)
    before = len(task.run(task.Parameters(), folder=tmp_path).points)
    write_record(tmp_path, "h200-task-more", [["ngram", 0, 90.0, 2.0, 0.6, None, None, None],
                                              ["later", 0, 95.0, 2.0, 0.5, None, None, None]])
    write_record(tmp_path, "elsewhere", ROWS)
    points = task.run(task.Parameters(), folder=tmp_path).points.set_index("system")
    assert len(points) == before + 2
    assert points.loc["ngram", "kind"] == "n-gram alone"
    assert points.loc["later", "kind"] == "not known"


def test_trials_say_their_own_mixers(tmp_path):
    config = {"model": {"layer_pattern": "MAM"}, "ngram": None}
    write_record(tmp_path, "h200-task", ROWS, [["a trial", 2000.0, None, 0.69, json.dumps(config)]])
    found = task.run(task.Parameters(), folder=tmp_path)
    trial = found.points[found.points["trial"]].iloc[0]
    assert (trial["kind"], trial["with n-gram"]) == ("SSM and attention", False)
    assert trial[task.VALID] is None
    assert "a trial" not in set(found.systems["system"])


def test_one_system_run_in_several_ways_is_several_systems(tmp_path):
    changed = ["ours", 3, 2000.0, 5.0, 0.6, 0.6, '{"model": {"layer_pattern": "A"}}', None]
    write_record(tmp_path, "h200-task", [*ROWS, changed])
    systems = task.run(task.Parameters(), folder=tmp_path).systems.set_index("system")
    assert systems.loc["ours", "seeds"] == 2
    assert systems.loc["ours, layer_pattern A", "kind"] == "attention"


def test_runs_of_other_lengths_are_not_seeds_of_one_another(tmp_path):
    names = [*COLUMNS, "steps"]
    rows = [[*row, 800] for row in ROWS[:2]] + [[*ROWS[0], 950], [*ROWS[4], 2150]]
    write_record(tmp_path, "h200-task", rows, columns=names)
    systems = task.run(task.Parameters(), folder=tmp_path).systems.set_index("system")
    assert systems["seeds"].to_dict() == {
        "ours, 950 steps": 1, "ours, 800 steps": 2, "modded_nanogpt": 1}
    write_record(tmp_path, "h200-task-old", ROWS[1:2])  # does not say how many
    names = task.run(task.Parameters(), folder=tmp_path).systems["system"]
    assert set(names) == {"ours", "ours, 950 steps", "ours, 800 steps", "modded_nanogpt"}


def test_a_run_that_the_clock_ended_is_a_seed_like_the_others(tmp_path):
    rows = [[*ROWS[0], 800, 800], [*ROWS[1], 791, 800]]
    write_record(tmp_path, "h200-task", rows, columns=[*COLUMNS, "steps", "of"])
    systems = task.run(task.Parameters(), folder=tmp_path).systems.set_index("system")
    assert systems["seeds"].to_dict() == {"ours": 2}


def test_the_figure_shows_every_point_and_names_every_system(tmp_path):
    rows = [*ROWS, ["mamba_byte", 0, 5000.0, 9.0, 0.25, 0.24, None, None]]
    write_record(tmp_path, "h200-task", rows)
    found = task.run(task.Parameters(), folder=tmp_path)
    figure = figures.pareto(found.points, found.systems, 0.7)
    left, right = figure.axes
    names = {" ".join(text.get_text().split()) for text in left.texts}
    assert {"ours", "nano_ssm_500", "modded_nanogpt", "mamba_byte: 0.25 (below)"} <= names
    drawn = sum(line.get_marker() in {"o", "s", "D"} for line in right.lines)
    assert drawn == found.points[task.HELD_OUT].notna().sum() == 5


def test_the_record_of_one_job_reaches_what_was_asked_for():
    """Joules of the GPU, the public rule's total, and validation accuracy of every seed."""
    runs = load_record(DATA / "records" / "task" / "h200-task-mixed").tables["runs"].frame
    seeds = runs.groupby("system")["seed"].nunique()
    assert (seeds["counts_hybrid"], seeds["counts_ssm"]) == (3, 3)
    assert [*runs["system"].iloc[[0, -1]]] == ["counts", "counts"]  # the control
    assert runs["validation characters"].eq(60_000).all()
    by = runs.groupby("system").agg(
        {task.ENERGY: "max", "total energy (J)": "max", task.VALID: "min"}).T.to_dict("list")
    for name, joules, total, accuracy in (
            ("counts", 400, 600, 0.70), ("counts_ssm", 700, 1500, 0.70),
            ("counts_hybrid", 4000, 4300, 0.735)):
        assert by[name][0] <= joules
        assert by[name][1] <= total
        assert by[name][2] >= accuracy
    public = runs[runs["public file (SHA-256)"].notna()]
    assert {*public["system"]} == {"subset_70_mkn", "gpu_ngram_w31_k11", "paq8_gpu"}
    for name in ("counts", "counts_ssm"):  # at more than the accuracy of each
        assert by[name][2] > public[task.VALID].max()
    for column, mine in ((task.ENERGY, 0), ("total energy (J)", 1)):  # at most a third
        assert 3 * by["counts"][mine] <= public[column].min()
    found = task.run(task.Parameters()).leaders
    assert {*found["ours, as accurate"]} == {"counts"}
    assert found["share (%)"].max() <= 100 / 3


def test_no_record_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no record of a run"):
        task.run(task.Parameters(), folder=tmp_path)
    for bad in ({"target": 1.5}, {"cap": 0.0}):
        with pytest.raises(UserError):
            task.Parameters(**bad)


def test_the_records_are_among_the_sources():
    names = {path.relative_to(DATA.parent).as_posix()
             for path in source_files(["analysis.studies.task.compute"])}
    for record in ("h200-task", "h200-task-ssm"):
        assert f"data/records/task/{record}/run.json" in names
        assert f"data/records/task/{record}/runs.csv" in names
    assert "data/records/task/h200-task-trials/trials.csv" in names
