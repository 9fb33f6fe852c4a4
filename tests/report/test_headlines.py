"""No headline without both of its sides, and none without what it loses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.plots.comparisons import AHEAD, BEHIND, LEVEL
from analysis.report.headlines import FILE, Side, load_headlines
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


def test_ahead_and_behind_are_computed(records: dict[str, Run]) -> None:
    run = records["h200-step-1024"]
    slower = replace(run, values={**run.values, "ms_m": Value(99.0, "ms")})
    found = {h.id: h for h in load_headlines({**records, "h200-step-1024": slower})}
    assert "time, ms" in {s.what for s in found["step-1m"].sides_that_are(BEHIND)}


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
    assert f"{records['h200-arena-16mib'].values['at_1m_a'].value:.3f}" in found.behind
    path.write_text(text.replace("{h200-arena-16mib.at_1m_a:", "{h200-arena-16mib.at_1m_z:"))
    with pytest.raises(UserError, match="there is no 'at_1m_z' of a record 'h200-arena-16mib'"):
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


NUMBER = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?")
SCALES = (1.0, 2.0, 100.0, 1e3, 1e-3, 1e-6)  # of two cards, percent, and units


def numbers_of(run: Run) -> list[float]:
    """Every number that a record holds, those in its words too."""
    cells = [v.value for v in run.values.values()]
    cells += [c for t in run.tables.values() for column in t.frame for c in t.frame[column]]
    cells += list(run.parameters.values())
    found = [float(n.replace(",", "")) for c in cells if isinstance(c, str)
             for n in NUMBER.findall(c)]
    return found + [float(c) for c in cells if isinstance(c, (int, float)) and c == c]


def unfounded(cell: str, found: list[float]) -> list[str]:
    """The numbers of a cell that no number gives, rounded to as many decimals."""
    texts = NUMBER.findall(cell)
    return [text for text in texts if not any(
        round(scale * one, len(text.partition(".")[2])) == float(text.replace(",", ""))
        for one in found for scale in SCALES)]


def test_numbers_without_a_rival_are_those_of_their_records() -> None:
    every = load_records()
    page = (ROOT / "docs" / "records.md").read_text(encoding="utf-8")
    text = page.split("## Without a rival")[1]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 7
    checked = 0
    for _, measured, names in rows:
        found = [n for name in re.findall("`([^`]+)`", names) for n in numbers_of(every[name])]
        assert unfounded(measured, found) == [], measured
        checked += len(NUMBER.findall(measured))
    assert checked > 15
    assert unfounded("0.123 of 4,567", [0.124, 4568.0]) == ["0.123", "4,567"]


def test_the_page_of_kernels_has_the_numbers_of_its_record(records: dict[str, Run]) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    text = page.partition("| batch x length x heads |")[2].partition("\n\n")[0]
    rows = [line.split("|", 2)[2] for line in text.splitlines()[2:]]
    found = numbers_of(records["h200-mixers"])
    assert len(rows) == 4
    assert [number for row in rows for number in unfounded(row, found)] == []


def test_the_page_of_kernels_has_the_numbers_of_streams_and_starts(
    records: dict[str, Run]
) -> None:
    """Rows of the tables behind the two records' names; seconds are of 60,000 characters."""
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    for name, least in (("h200-stream-systems", 20), ("h200-start", 8)):
        text = page[page.index(f"`{name}`"):]
        lines = text.partition("\n## ")[0].splitlines()
        rows = [line for line, below in zip(lines, [*lines[1:], ""], strict=True)
                if line.startswith("|") and "---" not in line + below]
        found = numbers_of(records[name])
        found += [60_000 / number for number in found if number]
        cells = [cell for row in rows for cell in row.strip("| ").split("|")[1:]]
        assert len(rows) >= least, name
        assert [number for cell in cells for number in unfounded(cell, found)] == [], name


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
