"""The notebooks: thin, clean, and with the parameters that their studies have."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from analysis.studies import STUDIES, parameters_cell, profiles

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BY_FILE = {study.notebook.name: study for study in STUDIES.values()}
MAX_CODE_CELLS = 6


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def problems(notebook: dict) -> list[str]:
    """What is wrong with a notebook, in words; empty for a good one."""
    found = []
    cells = code_cells(notebook)
    if len(cells) > MAX_CODE_CELLS:
        found.append(f"{len(cells)} code cells, at most {MAX_CODE_CELLS}")
    parameters = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    if len(parameters) != 1:
        found.append(f"{len(parameters)} parameters cells, exactly one")
    for i, cell in enumerate(cells):
        if cell["outputs"] or cell["execution_count"] is not None:
            found.append(f"code cell {i} has outputs: strip them")
        if set(cell["metadata"]) - {"tags"}:
            found.append(f"code cell {i} has metadata {sorted(cell['metadata'])}")
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
                found.append(f"code cell {i} defines something: it belongs in a study")
    for i, cell in enumerate(notebook["cells"]):
        text = source(cell)
        if re.search(r"""(?<![\w.:/])(/(home|root|tmp|usr|work|Users|mnt|opt)\b|[A-Z]:\\|~/)""",
                     text):
            found.append(f"cell {i} has an absolute path")
        if cell.get("attachments"):
            found.append(f"cell {i} has attachments")
    if set(notebook["metadata"]) - {"kernelspec", "language_info"}:
        found.append(f"metadata {sorted(notebook['metadata'])}")
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("kernelspec is not python3")
    if "version" in notebook["metadata"].get("language_info", {}):
        found.append("the version of somebody's Python is in the metadata")
    code = "".join(source(c) for c in cells)
    if "measure(" not in code or "save(run)" not in code:
        found.append("it does not keep its run")
    if "caption" in code:
        found.append("it has a caption: that belongs to the study's figures or tables")
    return found


def parameters_of(notebook: dict) -> dict:
    """The literals of the parameters cell; fails where one is not a plain literal."""
    cell = next(c for c in code_cells(notebook) if "parameters" in c["metadata"].get("tags", []))
    found = {}
    for node in ast.parse(source(cell)).body:
        assert isinstance(node, (ast.Assign, ast.AnnAssign)), ast.unparse(node)
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        found[target.id] = ast.literal_eval(node.value)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_keeps_the_rules(path):
    assert problems(load(path)) == []


def test_papermill_sees_types_and_help():
    inspect = pytest.importorskip("papermill").inspect_notebook
    for path in NOTEBOOKS:
        shown = inspect(path)
        assert list(shown) == list(parameters_of(load(path)))
        for name, parameter in shown.items():
            assert parameter["inferred_type_name"] != "None", name
            assert parameter["help"], name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_the_cell_of_parameters_is_the_studys(path):
    cell = next(c for c in code_cells(load(path)) if "parameters" in c["metadata"].get("tags", []))
    # Its text: print(parameters_cell(get_study(NAME)))
    assert source(cell) == parameters_cell(BY_FILE[path.name])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_parameters_are_the_studys_quick_ones(path):
    cell = parameters_of(load(path))
    assert cell.pop("run_dir") == ""
    assert not any(isinstance(v, tuple) for v in cell.values())  # papermill makes them strings
    quick = profiles(BY_FILE[path.name])["quick"]
    assert cell == quick
    assert {k: type(v) for k, v in cell.items()} == {k: type(v) for k, v in quick.items()}


def test_each_study_has_its_notebook():
    assert {p.name for p in NOTEBOOKS} == set(BY_FILE)


def good() -> dict:
    code = {"cell_type": "code", "outputs": [], "execution_count": None}
    return {
        "metadata": {"kernelspec": {"name": "python3"}},
        "cells": [
            {"cell_type": "markdown", "source": "# Title", "metadata": {}},
            {**code, "source": 'run_dir = ""', "metadata": {"tags": ["parameters"]}},
            {**code, "source": "run = measure(1)\nsave(run)", "metadata": {}},
        ],
    }


def test_good_notebook_passes():
    assert problems(good()) == []


@pytest.mark.parametrize(("break_it", "match"), [
    (lambda n: n["cells"].extend(n["cells"][2:] * 5), "7 code cells"),
    (lambda n: n["cells"][1]["metadata"].clear(), "0 parameters cells"),
    (lambda n: n["cells"][2].update(source="def f(): pass\nsave(run)"), "defines"),
    (lambda n: n["cells"][2].update(source="f = lambda: 1\nsave(run)"), "defines"),
    (lambda n: n["cells"][0].update(source="see /home/me/x"), "absolute path"),
    (lambda n: n["cells"][2].update(source="open('~/x'); save(run)"), "absolute path"),
    (lambda n: n["cells"][2].update(outputs=[{}]), "strip them"),
    (lambda n: n["cells"][2]["metadata"].update(papermill={}), "metadata"),
    (lambda n: n["metadata"].update(papermill={}), "metadata"),
    (lambda n: n["cells"][2].update(source="1"), "does not keep"),
    (lambda n: n["cells"][2].update(source="show(caption=1)"), "has a caption"),
])
def test_the_rules_can_fail(break_it, match):
    notebook = good()
    break_it(notebook)
    assert any(match in problem for problem in problems(notebook))
