"""Records: a study's run kept from this machine, whole or in part, and read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.cli import main
from analysis.runs.folders import load_run
from analysis.runs.records import RECORDS, load_record, load_records
from analysis.studies import STUDIES, Study
from analysis.studies.drawing import drawings, figures
from analysis.studies.session import record
from mambabyte.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "tiny.ipynb").write_text('{"cells": []}')
    return Study("tiny", "Tiny", "Is it small?", tmp_path / "tiny.ipynb", "tests.helpers.tiny",
                 tmp_path)


def test_a_study_becomes_a_record_without_jupyter(study, tmp_path):
    lines: list[str] = []
    folder = record(study, {"n": 2}, tmp_path / "tiny" / "box", report=lines.append)
    found = load_record(folder)
    assert lines == ["2 lengths"]
    assert (found.study, found.run_id, found.title, found.about) == (
        "tiny", "box", "Tiny", "Is it small?")
    assert (found.parameters, found.values["twice"].value) == ({"n": 2}, 4)
    assert found.tables["counts"].caption == "Lengths, of which twice are 4."
    assert set(found.tables) == {"counts", "lengths"}  # an empty frame is no table
    assert found.figures == {"times": "lengths"}
    assert figures(found, {"tiny": study})["times"].title == "Time over length"
    assert found.sources == study.sources_digest()
    assert sorted(p.name for p in folder.iterdir()) == ["counts.csv", "lengths.csv", "run.json"]
    assert load_records(tmp_path)["box"].values == found.values


def test_a_record_may_keep_a_part_of_a_run(study, tmp_path):
    part = load_record(record(study, {"n": 2}, tmp_path / "part", patterns=("times",)))
    assert (set(part.tables), set(part.figures), part.values) == ({"lengths"}, {"times"}, {})
    part = load_record(record(study, {"n": 2}, tmp_path / "part", patterns=("counts", "tw*")))
    assert (set(part.tables), set(part.figures), set(part.values)) == ({"counts"}, set(), {"twice"})
    with pytest.raises(UserError, match=r"nothing called c\*x: it has counts, lengths, times, tw"):
        record(study, {"n": 2}, tmp_path / "none", patterns=("c*x",))
    assert set(load_run(tmp_path / "none.run").tables) == {"counts", "lengths"}  # it took hours


@pytest.mark.parametrize(("name", "match"), [("Box", "record name"), ("file", "is a file"),
                                             ("full", "is no record")])
def test_a_bad_folder_is_refused_before_anything_runs(study, tmp_path, name, match):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    lines: list[str] = []
    with pytest.raises(UserError, match=match):
        record(study, {"n": 2}, tmp_path / name, report=lines.append)
    assert lines == []


@pytest.mark.parametrize(("given", "answer"), [
    ("rouns=2", "did you mean rounds"), ("rounds", "expected name=value")])
def test_unknown_parameters_are_refused_before_anything_runs(tmp_path, capsys, given, answer):
    assert main(["study", "throughput", "--record", str(tmp_path / "x"), "--set", given]) == 2
    assert answer in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_every_record_of_the_project_can_be_drawn():
    """The numbers of each figure are there, and the words that need some of them."""
    for name, run in load_records().items():
        assert run.folder.parent.name == run.study, name
        known = figures(run)
        for figure in known.values():
            assert len(figure.data), (name, figure.name)
            assert figure.caption
            assert figure.alt
        assert list(known) == list(run.figures)


def test_records_hold_numbers_and_are_small():
    files = list(RECORDS.glob("*/*/*"))
    assert {p.suffix for p in files} == {".json", ".csv", ".parquet"}
    assert sum(p.stat().st_size for p in files) < 1_500_000


def test_names_of_figures_and_tables_are_the_studies_own():
    """And those of a record that a command made."""
    records = load_records().values()
    for study in STUDIES.values():
        fields = study.module().Results.__dataclass_fields__
        recorded = {table for run in records if run.study == study.name
                    for table in run.tables}
        assert set(study.module("tables").TABLES) <= set(fields)
        for drawing in drawings(study).values():
            assert drawing.of[0] in {*fields, *recorded}, (study.name, drawing.name)


def test_no_record_names_a_folder_of_the_machine_that_made_it() -> None:
    """Which says nothing to others; a command is one to be typed where the records lie."""
    for name, run in load_records().items():
        words = str(run.provenance.get("command", "")).replace("=", " ").split()
        assert not [word for word in words if word.startswith(("/", "~"))], name
