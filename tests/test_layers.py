"""The layer rule: imports point down only, and the core knows nothing of the studies."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from analysis.sources import source_files

ROOT = Path(__file__).resolve().parent.parent
ABOVE_CORE = {"analysis", "pandas", "matplotlib", "papermill", "scipy", "jinja2", "nbformat"}
# What computes may not plot or report; what plots takes DataFrames; the report reads files.
NOT_IN_STUDIES = {"matplotlib", "papermill", "jinja2", "analysis.plots", "analysis.report",
                  "analysis.sweep"}
NOT_IN_PLOTS = {"torch", "mambabyte.model", "mambabyte.train", "mambabyte.ops", "analysis.sweep",
                "analysis.report"}
NOT_IN_REPORT = {"torch", "mambabyte.model", "mambabyte.train", "mambabyte.ops",
                 "mambabyte.config", "mambabyte.provenance", "analysis.plots"}
STUDIES = ("memory", "overflow", "gradients", "ablation", "throughput", "flops", "task",
           "claims")


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in a file, with its parents' names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def offending(path: Path, forbidden: set[str]) -> set[str]:
    return {i for i in imports(path) for f in forbidden if i == f or i.startswith(f + ".")}


@pytest.mark.parametrize("path", sorted(ROOT.glob("mambabyte/**/*.py")), ids=lambda p: p.name)
def test_core_imports_nothing_above_it(path):
    assert not offending(path, ABOVE_CORE)


def test_operators_do_not_import_models():
    for path in ROOT.glob("mambabyte/ops/*.py"):
        assert not offending(path, {"mambabyte.model", "mambabyte.blocks", "mambabyte.train",
                                    "mambabyte.config"})


@pytest.mark.parametrize("name", STUDIES)
def test_studies_only_compute(name):
    """The study and every module of analysis behind it, but for the files of a run and what draws
    a figure into them: results imports that when it is called."""
    of_a_run = set(source_files(["analysis.results"], ROOT))
    paths = [path for path in source_files([f"analysis.{name}"], ROOT)
             if path.suffix == ".py" and path.is_relative_to(ROOT / "analysis")
             and path not in of_a_run]
    assert {ROOT / "analysis" / f"{name}.py", ROOT / "analysis" / name / "__init__.py"} & {*paths}
    for path in paths:
        assert not offending(path, NOT_IN_STUDIES), path


def test_plots_only_plot():
    for path in ROOT.glob("analysis/plots/*.py"):
        assert not offending(path, NOT_IN_PLOTS | {f"analysis.{s}" for s in STUDIES})


def test_report_only_reads():
    for path in ROOT.glob("analysis/report/**/*.py"):
        assert not offending(path, NOT_IN_REPORT | {f"analysis.{s}" for s in STUDIES})


def test_the_rule_can_fail(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from analysis import plots\n")
    assert offending(bad, ABOVE_CORE)
