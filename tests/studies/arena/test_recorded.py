"""A sweep that goes on from a record: its trainings are taken, and nothing else passes for them."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest

from analysis.runs.records import RECORDS, load_record
from analysis.studies.arena import compute as arena
from analysis.studies.arena.trainings.plan import plan
from analysis.studies.arena.trainings.recorded import recorded
from mambabyte.errors import UserError

RECORD = RECORDS / "arena" / "h200-arena"
TAKEN = ("cells", "best", "paired", "tuning", "sensitivity", "equal")


def test_what_is_taken_over_gives_the_records_own_tables(tmp_path):
    p, rows = recorded(RECORD)
    arena.take_over(RECORD, tmp_path)
    found = arena.trainings(tmp_path)
    assert len(found) == len(rows)
    tables = arena.tables(replace(p, scaling=()), found)  # laws take ten seconds
    for name in TAKEN:
        frame = load_record(RECORD).tables[name].frame
        pd.testing.assert_frame_equal(getattr(tables, name)[list(frame)], frame, check_dtype=False)
    first = [cell for cell in plan(p, found) if cell.kind == "text" and not cell.seed
             and cell.budget == p.tuning_budget]
    names = {arena.name_of(row) for row in found}
    assert first
    assert all(cell.name in names for cell in first)  # no search begins anew


def test_a_row_of_the_folders_own_stays(tmp_path):
    arena.take_over(RECORD, tmp_path)
    path = next(tmp_path.glob("text-*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"valid_bits": 7.0}))
    arena.take_over(RECORD, tmp_path)
    assert json.loads(path.read_text())["valid_bits"] == 7.0


def test_another_text_of_the_same_name_is_refused(tmp_path, monkeypatch):
    """As a folder with a validation text, and the same training text as a file, once were."""
    p, rows = recorded(RECORD)
    rows = [row | {"text": "one-text"} for row in rows]
    monkeypatch.setattr(arena, "recorded", lambda folder: (p, rows))
    monkeypatch.setattr(arena, "text_id", lambda name: "another-text")
    with pytest.raises(UserError, match="trainings with text='one-text', and this run 'another"):
        arena.run(replace(p, work=str(tmp_path), continues=str(RECORD), seeds=4, max_seconds=60))


@pytest.mark.parametrize(("change", "words"), [
    ({"context": 512}, "trainings with context=1024"), ({"device": "cpu"}, "device='cuda'"),
    ({"corpus": "other"}, "corpus='arena-text'"),
    ({"systems": ("A",)}, "parameters of 1M="),
    ({"continues": str(RECORDS / "ablation" / "h200-ablation")}, "of the study ablation without"),
    ({"continues": "nowhere"}, "nowhere is not a complete run folder"),
])
def test_a_sweep_of_other_trainings_is_refused(tmp_path, change, words):
    p, _ = recorded(RECORD)
    mine = replace(p, **{"work": str(tmp_path / "work"), "continues": str(RECORD), **change})
    with pytest.raises(UserError, match=words):
        arena.run(mine)
