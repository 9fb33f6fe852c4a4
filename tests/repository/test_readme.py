"""README and docs tell the truth: their paths, links, records, commands and examples exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from analysis.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
TOPS = ("mambabyte", "analysis", "tests", "notebooks", "data", "docs", "reports")
# `make report` makes them
NOT_YET = {"reports/report.html", "reports/report-evidence/", "reports/runs/"}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130, "move something to docs/"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths_exist(page):
    """Paths in the text and in code spans. The log names those of its day, so only its code is
    looked for."""
    text = page.read_text(encoding="utf-8")
    tops = TOPS[:3] if page.parent.name == "log" else TOPS
    named = {word.rstrip(".") for word in re.findall(r"(?<![\w./-])[\w.*/-]+", text)
             if word.split("/")[0] in tops and "/" in word}
    named = {word for word in named if "NAME" not in word and word not in NOT_YET}
    for word in named:
        assert (ROOT / word).exists() or list(ROOT.glob(word)), word
    assert page.name != "README.md" or len(named) > 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_modules_that_are_named_exist():
    """In words, comments and strings of pages, data and sources; the log's are of its day."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*.*"),
             *ROOT.glob("reports/**/*.md"), *ROOT.glob("analysis/**/*.py"),
             *ROOT.glob("mambabyte/**/*.py")]
    for page in pages:
        for name in re.findall(r"\banalysis(?:\.\w+)+", page.read_text(encoding="utf-8")):
            path, last = ROOT / name.replace(".", "/"), name.rpartition(".")[2]
            inside = [path.parent.with_suffix(".py"), path.parent / "__init__.py"]  # a name in one
            assert path.is_dir() or path.with_suffix(".py").is_file() or any(
                re.search(rf"\b{last}\b", p.read_text(encoding="utf-8"))
                for p in inside if p.is_file()), (page, name)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_every_table_has_a_head(page):
    """Rows behind an empty line are no table, but words with bars in them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert re.match(r"\|.*\n\|[ :|-]+\|\n", block), block.splitlines()[0]


def test_every_page_is_listed():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name == "index.md" or f"({name})" in index, name


def test_records_of_the_readme_exist():
    results = README.split("## What it reaches")[1].split("## ")[0]
    cells = [line.split("|")[-2] for line in results.splitlines() if line.startswith("| ")][1:]
    assert len(cells) > 10
    for name in re.findall(r"`([\w-]+)`", "".join(cells)):
        assert [*(ROOT / "data").glob(f"**/{name}"), *(ROOT / "data").glob(f"**/{name}.*")], name


def test_the_log_is_newest_first():
    for page in (ROOT / "docs" / "log").glob("*.md"):
        dates = re.findall(r"^## (\d{4}-\d\d-\d\d) \S", page.read_text(encoding="utf-8"), re.M)
        assert dates, page
        assert dates == sorted(dates, reverse=True), page


def test_commands_of_the_readme_exist():
    for line in README.splitlines():
        words = line.split()
        if words[:1] == ["mambabyte"]:
            assert words[1] in COMMANDS, line
    makefile = (ROOT / "Makefile").read_text()
    for target in ("report", "test", "lab"):
        assert f"make {target}" in README
        assert f"\n{target}:" in makefile


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
