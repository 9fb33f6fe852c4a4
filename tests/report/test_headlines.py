"""No headline without both of its sides, and none without what it loses."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.report.headlines import FILE, load_headlines, table
from analysis.runs.folders import ROOT, Run, Value
from analysis.runs.records import load_records
from mambabyte.errors import UserError


@pytest.fixture(scope="module")
def records() -> dict[str, Run]:
    rows = tomllib.loads(FILE.read_text(encoding="utf-8"))["headline"]
    found = load_records()
    return {name: found[name] for name in {row["record"] for row in rows}}


def test_every_headline_has_both_sides_and_its_losses(records: dict[str, Run]) -> None:
    found = {headline.id: headline for headline in load_headlines(records)}
    assert all(h.sides and h.n and h.theirs for h in found.values())
    # What the same records say against us.
    assert [s.what for s in found["step-27m"].wins] == []
    assert {s.what for s in found["scan"].losses} == {"peak, MiB"}
    assert "behind" in found["scan"].measured


def test_a_losing_side_cannot_be_left_out(records: dict[str, Run], tmp_path: Path) -> None:
    text = FILE.read_text(encoding="utf-8")
    shorter = tmp_path / "headlines.toml"
    for line in ('    { what = "peak, MiB", ours = "peak (MiB)" },\n',
                 '    { what = "at equal joules", ours = "ssm_joules" },\n',
                 '    { what = "joules a megabyte", ours = "joules_m", theirs = "joules_a" },\n',
                 '    { what = "joules a megabyte against both", ours = "joules_m", '
                 'theirs = "joules_a_half_the_layers_window_1024" },\n'):
        assert line in text
        shorter.write_text(text.replace(line, ""), encoding="utf-8")
        with pytest.raises(UserError, match="leaves out"):
            load_headlines(records, shorter)


def test_ahead_and_behind_are_computed(records: dict[str, Run]) -> None:
    run = records["h200-step-1024"]
    slower = replace(run, values={**run.values, "ms_m": Value(99.0, "ms")})
    found = {h.id: h for h in load_headlines({**records, "h200-step-1024": slower})}
    assert "time, ms" in {s.what for s in found["step-1m"].losses}


def test_the_readme_prints_the_headlines(records: dict[str, Run]) -> None:
    assert table(load_headlines(records)) in (ROOT / "README.md").read_text(encoding="utf-8")
