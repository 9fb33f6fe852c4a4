"""A tiny study that ends well, fails, dies or is slow; and a progress that remembers."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

PACKAGE = {
    "__init__": '''
from dataclasses import dataclass

import pandas as pd

TITLE, QUESTION, NOTEBOOK = "Tiny", "Is it?", "tiny.ipynb"

@dataclass(frozen=True)
class Parameters:
    n: int = 3
    sizes: tuple[int, ...] = (1, 2)
    mode: str = "ok"

PROFILES = {"quick": Parameters(), "full": Parameters(n=30)}

@dataclass(frozen=True)
class Results:
    counts: pd.DataFrame
''',
    "compute": '''
import os, time
import pandas as pd
from tiny_study import Results

def run(p, report):
    for i in range(p.n):
        report(f"step {i}")
    if p.mode == "pause":
        time.sleep(1)
    if p.mode == "slow":
        time.sleep(60)
    if p.mode == "fail":
        raise ValueError("<b>broken</b>\\nsecond line")
    if p.mode == "die":
        os.write(2, b"noise\\nno room for the tensor\\n")
        os._exit(9)
    return Results(pd.DataFrame({"n": [p.n], "total": [sum(p.sizes)]}))
''',
    "values": '''
from analysis.runs.folders import Value

def values(found, p):
    return {"total": Value(int(found.counts["total"].iloc[0]))}
''',
    "tables": 'TABLES = {"counts": "What was <counted>."}',
    "figures": '''
from analysis.plots import new_figure
from analysis.studies.drawing import Drawing

FIGURES = (Drawing("line", lambda counts: new_figure()[0], ("counts",), "A line",
                   caption="It is flat.", alt="Flat."),)
''',
}
CELLS = (
    'n = 3\nsizes = [1, 2]\nmode = "ok"\nrun_dir = ""',
    "from pathlib import Path\n"
    "from analysis.studies import Study\n"
    "from analysis.studies.session import measure, save\n"
    'study = Study("tiny", "Tiny", "Is it?", Path("tiny.ipynb"), "tiny_study")\n'
    "run = measure(study, globals())",
    "from analysis.studies import STUDIES\n"
    "from analysis.studies.session import show\n"
    "STUDIES[study.name] = study\n"
    'show(run, "line", "counts")',
    "save(run)",
)


def write_tiny(folder: Path) -> None:
    """The tiny study: its package and its notebook."""
    (folder / "tiny_study").mkdir()
    for name, source in PACKAGE.items():
        (folder / "tiny_study" / f"{name}.py").write_text(source)
    cells = [{"cell_type": "code", "id": f"c{i}", "source": source, "outputs": [],
              "execution_count": None, "metadata": {"tags": ["parameters"]} if i == 0 else {}}
             for i, source in enumerate(CELLS)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (folder / "tiny.ipynb").write_text(json.dumps({
        "cells": cells, "nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}}))


class Events:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, ...]] = []

    def started(self, run, position, total):
        self.seen.append(("started", run, f"{position}/{total}"))

    def line(self, run, text):
        self.seen.append(("line", run, text))

    def finished(self, run, status, note):
        self.seen.append(("finished", run, status, note))

    def close(self):
        self.seen.append(("closed",))


def killed_once(mark: Path, number: int) -> int:
    """Where ``mark`` is not there yet, dies as the machine it runs on would."""
    if number == 0 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def killed_always(mark: Path) -> None:
    with mark.open("a") as file:
        file.write("began\n")
    os.kill(os.getpid(), signal.SIGKILL)
