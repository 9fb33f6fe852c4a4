"""Render the HTML report from the run folders: an article, and a folder of evidence behind it.

    mambabyte report
    mambabyte report --draft --out draft.html

A number of the prose that is missing, not measured or older than its sources stops the build with
the command that would mend it; --draft marks such places instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from analysis.cli.options import parse


@dataclass(frozen=True)
class Options:
    out: Path = Path("reports/report.html")
    """The article; what stands behind it goes into the folder NAME-evidence beside it."""
    runs: Path = Path("reports/runs")
    """Where run folders are kept."""
    draft: bool = False
    """Build although numbers are missing or stale, and mark them."""


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "report", __doc__)

    from analysis.report import build_report

    path = build_report(options.runs, options.out, draft=options.draft)
    print(path.resolve())
    return 0
