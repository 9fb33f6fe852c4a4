"""The README tells the truth: its file map has every module and says what the module says."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from analysis.cli import COMMANDS
from analysis.studies import STUDIES, validate

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def modules() -> list[Path]:
    """Every module with something in it but package markers and the submission files."""
    found = [p.relative_to(ROOT) for folder in ("mambabyte", "analysis")
             for p in sorted((ROOT / folder).rglob("*.py"))]
    return [p for p in found if p.parent.name != "systems"]


def first_line(path: Path) -> str:
    """First paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def entry(path: Path) -> str:
    return f"- `{path.as_posix()}`: {first_line(path)}"


@pytest.mark.parametrize("path", modules(), ids=str)
def test_every_module_is_in_the_file_map(path):
    assert entry(path) in README.splitlines()


def test_the_file_map_has_nothing_else():
    listed = [line.split("`")[1] for line in README.splitlines() if line.startswith("- `")]
    assert all((ROOT / name).exists() for name in listed)
    assert len(listed) == len(set(listed))


def test_commands_of_the_readme_exist():
    for line in README.splitlines():
        words = line.split()
        if words[:1] == ["mambabyte"]:
            assert words[1] in COMMANDS, line
    makefile = (ROOT / "Makefile").read_text()
    for target in ("report", "test", "lab"):
        assert f"make {target}" in README
        assert f"\n{target}:" in makefile


EXAMPLES = [line.split("#")[0].strip() for path in (
    ROOT / "README.md", *sorted((ROOT / "analysis" / "commands").glob("*.py")))
    for line in path.read_text(encoding="utf-8").splitlines()
    if re.match(r"(    )?mambabyte (study|sweep) \w", line)]


@pytest.mark.parametrize("example", EXAMPLES)
def test_parameters_of_examples_exist(example):
    words = shlex.split(example)
    names = [w for w in words[2:] if w in STUDIES]
    pairs = [words[i + 1].split("=", 1) for i, w in enumerate(words) if w in ("--set", "--grid")]
    for name in names:
        for key, value in pairs:
            first = value.split(";")[0] if ";" in value else value
            values = first if ";" in value or "--set" in words else first.split(",")[0]
            validate(name, {key: values})


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_pictures_of_the_readme_exist():
    for part in README.split("](")[1:]:
        target = part.split(")")[0]
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
