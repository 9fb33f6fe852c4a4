"""The layer rule: the folder says the layer, imports point down only, in functions too; and what
a folder and a file may hold."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from collections.abc import Collection
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From the ground up; a file may import its own layer and those before it.
CORE = ("errors", "config", "corpus", "energy", "ops", "model", "stream", "evaluate", "checkpoint",
        "train", "task", "harness")
TOOLS = ("plots", "runs", "theory", "measure", "studies", "sweep", "report", "cli")
LAYERS = tuple(f"mambabyte.{n}" for n in CORE) + tuple(f"analysis.{n}" for n in TOOLS)

# No module does two of these: compute (DataFrames out), plot (DataFrames in), report (files in).
NOT_IN_CORE = {"analysis", "pandas", "matplotlib", "papermill", "scipy", "jinja2", "nbformat"}
NOT_IN_FIGURES = {"torch", "mambabyte.model", "mambabyte.train", "mambabyte.ops", "analysis.sweep",
                  "analysis.report"}
NOT_IN_REPORT = {"torch", "mambabyte.model", "mambabyte.train", "mambabyte.ops"}
NOT_IN_COMPUTING = {"matplotlib", "papermill", "jinja2", "analysis.plots"}
# What a study takes of another one: the claims are about all of them.
BETWEEN_STUDIES = {"arena": {"ablation"}, "claims": {"ablation", "task"}}
MAX_ENTRIES = 12
MAX_LINES = 400  # of Python; a kernel's source is one program
FILES = sorted([*ROOT.glob("mambabyte/**/*.py"), *ROOT.glob("analysis/**/*.py")])


def module_of(path: Path, root: Path = ROOT) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


@cache
def imported(path: Path, root: Path = ROOT) -> list[tuple[str, list[str]]]:
    """Every import anywhere in a file, those in functions too: a module, and names taken of it."""
    package = module_of(path, root).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found: list[tuple[str, list[str]]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found.append((base, [alias.name for alias in node.names]))
    return found


def imports(path: Path, root: Path = ROOT) -> set[str]:
    """Every module that a file imports, and each name taken of one, as if that were a module."""
    return {name for base, names in imported(path, root)
            for name in (base, *(f"{base}.{n}" for n in names))}


def offending(path: Path, forbidden: set[str]) -> set[str]:
    return {i for i in imports(path) for f in forbidden if i == f or i.startswith(f + ".")}


def layer_of(module: str) -> int | None:
    name = ".".join(module.split(".")[:2])
    return LAYERS.index(name) if name in LAYERS else None


def upward(path: Path, root: Path = ROOT) -> set[str]:
    own = layer_of(module_of(path, root))
    return {i for i in imports(path, root)
            if own is not None and (rank := layer_of(i)) is not None and rank > own}


def test_imports_point_down():
    wrong = {module_of(path): upward(path) for path in FILES}
    assert not {module: found for module, found in wrong.items() if found}


def needs(path: Path, files: Collection[str], root: Path = ROOT) -> set[str]:
    """Which of ``files`` a file reads; ``from package import submodule`` reads the submodule."""
    found: set[str] = set()
    for base, names in imported(path, root):
        for name in names or [""]:
            found |= {f"{base}.{name}"} & set(files) or {base} & set(files)
    return found - {module_of(path, root)}


def test_no_files_import_each_other_in_a_circle():
    """In functions and for types too: what stands in a circle cannot be read or moved alone."""
    files = {module_of(path): path for path in FILES}
    graph = {name: needs(path, files) for name, path in files.items()}
    TopologicalSorter(graph).prepare()  # CycleError names the files


def test_a_circle_is_seen(tmp_path):
    package = tmp_path / "p"
    package.mkdir()
    files = {"p": package / "__init__.py", "p.a": package / "a.py", "p.b": package / "b.py"}
    files["p"].write_text("from p.a import f\n")
    files["p.a"].write_text("from p import b\n")
    files["p.b"].write_text("def g():\n    import p.a\n    from . import f\n")
    assert {name: needs(path, files, tmp_path) for name, path in files.items()} == {
        "p": {"p.a"}, "p.a": {"p.b"}, "p.b": {"p.a", "p"}}


def test_every_folder_is_a_layer():
    for package in ("mambabyte", "analysis"):
        found = {f"{package}.{p.stem}" for p in (ROOT / package).iterdir()
                 if p.name not in ("__init__.py", "__main__.py", "__pycache__")}
        assert found == {name for name in LAYERS if name.startswith(package)}


def test_no_folder_is_crowded():
    for top in ("mambabyte", "analysis", "tests"):
        for folder in [ROOT / top, *(p for p in (ROOT / top).rglob("*") if p.is_dir())]:
            if "__pycache__" in folder.parts:
                continue
            entries = [p.name for p in folder.iterdir() if p.name not in (
                "__init__.py", "__main__.py", "conftest.py", "__pycache__")]
            assert len(entries) <= MAX_ENTRIES, (folder, sorted(entries))


def test_no_file_is_long():
    for top in ("mambabyte", "analysis", "tests"):
        lengths = {path: len(path.read_text(encoding="utf-8").splitlines())
                   for path in (ROOT / top).rglob("*.py")}
        assert not {path: n for path, n in lengths.items() if n > MAX_LINES}


@pytest.mark.parametrize("package", ["mambabyte", "analysis"])
def test_what_is_no_python_is_in_a_wheel(package):
    """Sources of kernels, templates and tables are found beside the code that reads them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folder = ROOT / package
    taken = {path for pattern in project["package-data"][package] for path in folder.glob(pattern)}
    there = {path for path in folder.rglob("*")
             if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert there
    assert there == taken


def test_files_of_tests_have_names_of_their_own():
    """Two of one name are one module to pytest, which then runs neither."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, times in names.items() if times > 1] == []


def test_core_imports_nothing_above_it():
    for path in ROOT.glob("mambabyte/**/*.py"):
        assert not offending(path, NOT_IN_CORE), path


def test_configurations_need_no_torch():
    """What a command knows before it loads torch, and a form without a model."""
    paths = [*ROOT.glob("mambabyte/config/*.py"), ROOT / "mambabyte" / "errors.py",
             *ROOT.glob("analysis/studies/*/__init__.py")]
    assert len(paths) > 15
    for path in paths:
        assert not offending(path, {"torch", "matplotlib"}), path


def test_studies_stand_alone():
    studies = [path.parent for path in ROOT.glob("analysis/studies/*/__init__.py")]
    assert len(studies) >= 8
    for folder in studies:
        others = {f"analysis.studies.{other.name}" for other in studies
                  if other != folder and other.name not in BETWEEN_STUDIES.get(folder.name, ())}
        for path in folder.rglob("*.py"):
            assert not offending(path, others), path


def test_figures_only_plot():
    for path in [*ROOT.glob("analysis/plots/*.py"), *ROOT.glob("analysis/studies/*/figures.py")]:
        assert not offending(path, NOT_IN_FIGURES), path


def test_report_only_reads():
    for path in ROOT.glob("analysis/report/**/*.py"):
        assert not offending(path, NOT_IN_REPORT), path


def test_computing_neither_plots_nor_reports():
    for folder in ("theory", "measure", "studies"):
        for path in (ROOT / "analysis" / folder).rglob("*.py"):
            # session shows a run in a notebook, figures and panels with it
            if path.name not in ("figures.py", "panel.py", "session.py"):
                assert not offending(path, NOT_IN_COMPUTING), path


def test_the_rule_can_fail(tmp_path):
    bad = tmp_path / "mambabyte" / "ops" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("def f():\n    from ..model import lm\n    import analysis.plots\n")
    assert upward(bad, tmp_path) >= {"mambabyte.model", "mambabyte.model.lm", "analysis.plots"}
    assert imports(bad, tmp_path) >= {"analysis.plots"}
