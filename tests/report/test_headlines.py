"""No headline without both of its sides, and none without what it loses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.plots.comparisons import AHEAD, BEHIND, LEVEL
from analysis.report.headlines import FILE, Headline, Side, load_headlines
from analysis.report.picture import words, write_readme
from analysis.runs.folders import ROOT, Run, Table, Value
from analysis.runs.records import load_records
from mambabyte.errors import UserError


@pytest.fixture(scope="module")
def records() -> dict[str, Run]:
    return load_records()


def test_every_headline_has_both_sides_and_its_losses(records: dict[str, Run]) -> None:
    found = {headline.id: headline for headline in load_headlines(records)}
    assert all(h.sides and h.n and h.theirs for h in found.values())
    assert max(len(h.short) for h in found.values()) <= 52  # what a phone is wide
    # What the same records say against us.
    assert found["step-27m"].sides_that_are(AHEAD) == ()
    assert {s.what for s in found["scan"].sides_that_are(BEHIND)} == {"peak, MiB"}
    assert "peak, MiB" in found["scan"].behind


def test_a_losing_side_cannot_be_left_out(records: dict[str, Run], tmp_path: Path) -> None:
    text = FILE.read_text(encoding="utf-8")
    shorter = tmp_path / "headlines.toml"
    for line in ('    { what = "peak, MiB", ours = "peak (MiB)" },\n',
                 '    { what = "at equal joules", ours = "ssm_joules" },\n',
                 '    { what = "peak, MiB", ours = "peak_m", theirs = "peak_m_by_mamba-ssm" },\n',
                 '    { what = "joules a megabyte", ours = "joules_m", theirs = "joules_a" },\n',
                 '    { what = "joules a megabyte against both", ours = "joules_m", '
                 'theirs = "joules_a_half_the_layers_window_1024" },\n'):
        assert line in text
        shorter.write_text(text.replace(line, ""), encoding="utf-8")
        with pytest.raises(UserError, match="leaves out"):
            load_headlines(records, shorter)


def test_a_cost_that_the_rival_alone_has_is_no_side(records: dict[str, Run]) -> None:
    run = records["h200-step-8192-fused"]
    for ours, found in (({}, True), ({"seconds_m": Value(1.0, "s")}, False)):
        values = {**run.values, "seconds_a": Value(2.0, "s"), **ours}
        changed = {**records, "h200-step-8192-fused": replace(run, values=values)}
        with nullcontext() if found else pytest.raises(UserError, match=r"leaves out.*seconds_a"):
            _of("step-1m-long", changed)


def _of(name: str, records: Mapping[str, Run]) -> Headline:
    return {h.id: h for h in load_headlines(records)}[name]


def test_ahead_and_behind_are_computed(records: dict[str, Run]) -> None:
    run = records["h200-step-8192-fused"]
    slower = replace(run, values={**run.values, "ms_m": Value(99.0, "ms")})
    assert "time, ms" in {s.what for s in _of("step-1m-long", records).sides_that_are(AHEAD)}
    assert "time, ms" in {s.what for s in _of("step-1m-long", {
        **records, "h200-step-8192-fused": slower}).sides_that_are(BEHIND)}


def test_numbers_of_steps_are_those_of_their_table(records: dict[str, Run]) -> None:
    """Time, joules and peak of every system: a peak that is a cell alone would be no side."""
    columns = {"ms": "step, median (ms)", "joules": "gross (J/MB)", "peak": "peak (MiB)"}
    checked = 0
    for name, run in records.items():
        if name.startswith("h200-step-"):
            for row in run.tables["steps"].frame.to_dict("records"):
                system = re.sub("[ ,]+", "_", row["layers"].lower())
                for cost, column in columns.items():
                    value = run.values[f"{cost}_{system}"].value
                    assert value == pytest.approx(row[column], abs=0.06), (name, system, cost)
                    checked += 1
    assert checked > 60


def test_a_number_of_another_record_is_read_from_it(
    records: dict[str, Run], tmp_path: Path
) -> None:
    text, path = FILE.read_text(encoding="utf-8"), tmp_path / "headlines.toml"
    found = {h.id: h for h in load_headlines(records)}["quality-1m"]
    assert f"{records['h200-arena'].values['at_1m_a'].value:.3f}" in found.behind
    path.write_text(text.replace("{h200-arena.at_1m_a:", "{h200-arena.at_1m_z:"))
    with pytest.raises(UserError, match="there is no 'at_1m_z' of a record 'h200-arena'"):
        load_headlines(records, path)


@pytest.mark.parametrize(("ours", "theirs", "outcome"), [
    (1.918, 1.925, LEVEL), (1.98, 2.0, LEVEL), (1.9, 2.0, AHEAD), (2.1, 2.0, BEHIND),
    (-0.1, None, AHEAD), (0.1, None, BEHIND)])
def test_what_prints_as_a_tie_is_no_lead(ours: float, theirs: float | None, outcome: str) -> None:
    assert Side("time, ms", ours, theirs).outcome == outcome


def test_the_rows_beside_a_headline_are_counted(records: dict[str, Run]) -> None:
    """A forward pass or a shape in which the rival leads is not passed over."""
    run = records["h200-mixers"]
    frame = run.tables["bench"].frame
    rows = (frame["of"] == "mamba_ssm") & (frame["pass"] == "forward")
    slow = frame.assign(**{"median (us)": frame["median (us)"].where(~rows, 1.0)})
    beaten = replace(run, tables={**run.tables, "bench": Table("bench", "", slow)})
    found = {h.id: h for h in load_headlines({**records, "h200-mixers": beaten})}
    theirs = frame["of"] == "mamba_ssm"
    lost = rows | (theirs & (frame["times this project's"] < 1))
    assert f"record's {theirs.sum() - 1} other pairs of the two: time in {lost.sum()}" in found[
        "ssd"].behind
    assert "time in" not in found["scan"].behind  # ahead in all: nothing to say


def test_the_readme_has_what_the_records_say(
    records: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables and picture, as `mambabyte report --readme README.md` writes them over older ones;
    what stands around the tables stays."""
    monkeypatch.setattr("analysis.report.picture.load_records", lambda root: records)
    kept = (ROOT / "README.md").read_text(encoding="utf-8")
    path = tmp_path / "README.md"
    path.write_text(re.sub(r"^\|.* \| `h200-\w+` \|\n", "", kept, flags=re.M), encoding="utf-8")
    assert len(path.read_text(encoding="utf-8")) < len(kept)
    write_readme(path)
    assert path.read_text(encoding="utf-8") == kept
    drawn = words((tmp_path / "docs" / "headlines.svg").read_text(encoding="utf-8"))
    assert drawn == words((ROOT / "docs" / "headlines.svg").read_text(encoding="utf-8"))
    assert any("1,124 / 4,316" in word for word in drawn)
    path.write_text("# Another\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"has no table headed \| what"):
        write_readme(path)
    assert path.read_text() == "# Another\n"
