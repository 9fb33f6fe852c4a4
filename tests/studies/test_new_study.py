"""The recipe of docs/contributing.md: a study is a folder and a notebook, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repository.test_layers import upward

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "helpers" / "tiny"
CELLS = (
    'n = 3\nrun_dir = ""',
    'from analysis.studies.session import measure, save, show\n\nrun = measure("tiny", globals())',
    'show(run, "times", "counts")',
    "save(run)",
)


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A copy of the project with one more study in it."""
    house = tmp_path_factory.mktemp("house")
    for part in ("analysis", "mambabyte"):
        shutil.copytree(ROOT / part, house / part, ignore=shutil.ignore_patterns("__pycache__"))
    folder = house / "analysis" / "studies" / "tiny"
    folder.mkdir()
    for path in TINY.glob("*.py"):
        (folder / path.name).write_text(path.read_text().replace(
            "tests.helpers.tiny", "analysis.studies.tiny"))
    cells = [{"cell_type": "code", "id": f"c{i}", "source": source, "outputs": [],
              "execution_count": None, "metadata": {"tags": ["parameters"]} if i == 0 else {}}
             for i, source in enumerate(CELLS)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (house / "notebooks").mkdir()
    (house / "notebooks" / "08_tiny.ipynb").write_text(json.dumps({
        "cells": cells, "nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}}))
    sections = house / "reports" / "sections"
    sections.mkdir(parents=True)
    (house / "reports" / "report.toml").write_text('title = "Report"\n')
    (sections / "tiny.md").write_text(
        "Here {{ value('tiny.twice') }}, there {{ record('box.twice') }}.\n\n"
        "{{ figure('tiny.times') }}\n\n{{ figure('box.times') }}\n")
    return house


def mambabyte(house: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "analysis.cli", *arguments], cwd=house, text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(house)}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_a_study_is_a_folder_and_a_notebook(house):
    assert mambabyte(house, "study", "tiny", "--parameters") == "n = 3  # How many lengths.\n"
    swept = json.loads(mambabyte(house, "sweep", "tiny", "--grid", "n=3,4", "--json"))["runs"]
    assert [row["status"] for row in swept] == ["done", "done"]
    mambabyte(house, "study", "tiny", "--set", "n=5", "--record", "data/records/tiny/box")
    article = Path(mambabyte(house, "report", "--draft").strip())
    evidence = article.parent / "report-evidence"
    page = (evidence / "tiny.html").read_text(encoding="utf-8")
    assert "Here 6, there 10." in page
    for name in ("tiny", "box"):  # the figure of the run and of the record
        figure = page[page.index(f'<figure id="{name}-figure-times"'):]
        assert "It grows." in figure[:figure.index("</figure>")]
        assert figure[:figure.index("</figure>")].count("<svg") == 2
    appendix = (evidence / f"notebook-{swept[0]['run_id']}.html").read_text()
    assert "Lengths, of which twice are 6." in appendix
    assert appendix.count("<svg") == 1
    for path in (house / "analysis" / "studies" / "tiny").glob("*.py"):
        assert not upward(path, house)
