"""The README tells the truth: its paths, commands and examples exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from analysis.cli import COMMANDS
from analysis.studies import STUDIES, validate

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_paths_of_the_readme_exist():
    """Paths in code spans and in the tree of folders."""
    named = {word for word in re.findall(r"[\w.*/-]+", README)
             if word.split("/")[0] in ("mambabyte", "analysis", "tests", "notebooks", "data")
             and "/" in word}
    assert len(named) > 15
    for word in named:
        assert (ROOT / word).exists() or list(ROOT.glob(word)), word


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
    ROOT / "README.md", *sorted((ROOT / "analysis" / "cli").rglob("*.py")))
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
