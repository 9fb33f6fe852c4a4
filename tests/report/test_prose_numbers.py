"""Every number of the report's prose is read from a run or record, or is what somebody stated."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.runs.folders import ROOT, Run
from analysis.runs.records import load_records
from analysis.studies.claims.ledger import CLAIMS
from analysis.studies.drawing import figure_of
from mambabyte.config import PRESETS
from mambabyte.evaluate import TASK_CHARACTERS

SECTIONS = sorted((ROOT / "reports" / "sections").glob("*.md"))
NUMBER = re.compile(r"(?<![\w.\-])\d[\d,]*(?:\.\d+)?")
READ = re.compile(r"(record|parameter|measured)\('([\w-]+)\.([\w-]+)'")
# What neither document states and no parameter is, and whose word it is.
OTHERS = {
    "0.001": "the Mamba paper's smallest step size", "1200": "the script's warm-down, in steps",
    "0.01": "a step size of the worked example", "10.8": "the baseline's parameters in millions",
    "1197": "the number of the pull request", "0.035": "the baseline's published rate for Muon",
    "0.025": "its weight decay", "0.4": "its old cooldown in our preset", "0.7": "its cooldown",
    "0.3": "its embedding's rate", "800": "steps of `ours` before", "950": "and after",
    "2.03": "2.0295, rounded", "88.7": "the logarithm of float32's largest number",
}


@pytest.fixture(scope="module")
def records() -> dict[str, Run]:
    return load_records()


@pytest.fixture(scope="module")
def stated(records: dict[str, Run]) -> set[float]:
    """Numbers that a document states, or that say how something was run and not what came of it."""
    ledger = tomllib.loads((ROOT / "data" / CLAIMS).read_text(encoding="utf-8"))
    text = " ".join(f"{c['claim']} {c.get('theirs', '')} {c.get('note', '')}"
                    for c in ledger["claim"])
    given = [ledger["facts"], [vars(p.train) | vars(p.model) for p in PRESETS.values()],
             [run.parameters for run in records.values()]]
    return {_value(n) for n in NUMBER.findall(f"{text} {given}")} | {float(TASK_CHARACTERS)}


def _value(number: str) -> float:
    return float(number.replace(",", "").rstrip("."))


def literals(prose: str) -> Iterator[tuple[str, str]]:
    """Sentences of a section with each number that is written in them, and not read; whole numbers
    of one or two digits count things."""
    prose = re.sub(r"\{%.*?%\}|\{\{.*?\}\}|\{#.*?#\}|`[^`]*`|\$\$?.*?\$\$?", " ", prose, flags=re.S)
    for sentence in re.split(r"(?<=[.!?:|])\s", prose):
        for number in NUMBER.findall(sentence):
            if "." in number or len(number.replace(",", "")) > 2:
                yield number, " ".join(sentence.split())


@pytest.mark.parametrize("section", SECTIONS, ids=lambda path: path.stem)
def test_no_result_is_written_out(section: Path, stated: set[float]) -> None:
    for number, sentence in literals(section.read_text(encoding="utf-8")):
        assert number in OTHERS or _value(number) in stated, sentence


def test_a_result_that_is_written_out_is_found(stated: set[float]) -> None:
    prose = "The SSM ends at {{ record('x.y') }}, in **0.6781** of cases; a step takes 17.61 ms."
    assert [number for number, _ in literals(prose)] == ["0.6781", "17.61"]
    assert not {0.6781, 17.61} & stated


@pytest.mark.parametrize("section", SECTIONS, ids=lambda path: path.stem)
def test_what_is_read_is_in_its_record(section: Path, records: dict[str, Run]) -> None:
    # What an older record may lack, and is asked for first.
    asked = re.compile(r"\{%-? if measured\(.*?\{%-? (?:else|endif)", re.S)
    prose = asked.sub(" ", section.read_text(encoding="utf-8"))
    for how, name, key in READ.findall(prose):
        if name not in records:
            assert how != "record", f"there is no record {name}"
        elif how == "parameter":
            assert key in records[name].parameters, f"{name}.{key}"
        elif how == "record" and f"{name}.{key}', missing" not in prose:
            found = records[name].values.get(key)
            assert found is not None, f"{name}.{key}"
            assert found.value is not None, f"{name}.{key}"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda path: path.stem)
def test_what_is_placed_is_in_its_record(section: Path, records: dict[str, Run]) -> None:
    prose = section.read_text(encoding="utf-8")
    for kind, name, key in re.findall(r"(table|figure)\('([\w-]+)\.([\w-]+)'", prose):
        if name in records:
            run = records[name]
            there = figure_of(run, key) if kind == "figure" else (
                key in run.tables and run.tables[key].caption)
            assert there, f"{kind} {name}.{key}"


def test_every_other_number_is_needed() -> None:
    written = {number for path in SECTIONS
               for number, _ in literals(path.read_text(encoding="utf-8"))}
    assert OTHERS.keys() <= written
