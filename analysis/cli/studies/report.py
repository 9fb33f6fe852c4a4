"""Render the HTML report from the run folders: an article, and a folder of evidence behind it.

    mambabyte report
    mambabyte report --draft --out draft.html
    mambabyte report --readme README.md

A number of the prose that is missing, not measured or older than its sources stops the build with
the command that would mend it; --draft marks such places instead. --readme writes the tables and
the picture of the README, and the tables of docs/ beside it, from the records, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from analysis.cli.console import Bar
from analysis.cli.options import parse
from mambabyte.errors import UserError


@dataclass(frozen=True)
class Options:
    out: Path = Path("reports/report.html")
    """The article; what stands behind it goes into the folder NAME-evidence beside it."""
    runs: Path = Path("reports/runs")
    """Where run folders are kept."""
    draft: bool = False
    """Build although numbers are missing or stale, and mark them."""
    readme: Path | None = None
    """Write the tables of the records into this README, their picture into docs/headlines.svg
    beside it, and their numbers into the tables of its docs/; build no report."""


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "report", __doc__)

    if options.readme:
        from analysis.report.picture import write_readme

        for path in write_readme(options.readme):
            print(path.resolve())
        return 0

    if options.runs != Options.runs and not options.runs.is_dir():
        raise UserError(f"--runs {options.runs}: there is no such folder; mambabyte sweep makes "
                        "run folders, in reports/runs unless --root says another")

    from analysis.report import build_report

    with Bar("writing the report") as bar:
        path = build_report(options.runs, options.out, draft=options.draft, report=bar)
    print(path.resolve())
    return 0
