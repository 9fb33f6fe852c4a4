"""What the README shows of the records: both sides of every headline, drawn and as a table, and
the table of decisions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from analysis.plots.svg import svg
from analysis.report import decisions, headlines
from analysis.report.parts import page_tables
from analysis.report.parts.comparisons import comparisons
from analysis.runs.folders import Run
from analysis.runs.records import RECORDS, load_records
from mambabyte.config.files import whole_file
from mambabyte.errors import UserError

NAME = "comparisons.sides"
_WORDS = re.compile(r"<text[^>]*>(.*?)</text>", re.S)


def write_readme(readme: Path) -> list[Path]:
    """Puts the records' tables into a README in place of those it has, the picture into its
    docs/headlines.svg, and the records' numbers into the tables of docs/. UserError where a record
    is missing, or a page has no such table."""
    records = load_records(RECORDS)
    text = readme.read_text(encoding="utf-8")
    for new in (headlines.table(headlines.load_headlines(records)),
                decisions.table(decisions.load_decisions(records))):
        head = new.splitlines()[0]
        before, found, rest = text.partition(f"{head}\n")
        if not found:
            raise UserError(f"{readme} has no table headed {head}: put that line where it belongs")
        text = f"{before}{new}\n" + re.sub(r"\A(\|.*\n)*", "", rest)
    drawn = readme.parent / "docs" / "headlines.svg"
    for path, content in ((drawn, picture(records)), (readme, text)):
        with whole_file(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return [readme, drawn, *page_tables.write_pages(drawn.parent, records)]


def picture(records: Mapping[str, Run]) -> str:
    """The SVG, on paper of its own: where it is shown may be dark."""
    figure = comparisons(records)[NAME].draw()
    figure.set_facecolor("white")
    return svg(figure, NAME)


def words(text: str) -> list[str]:
    """What a picture says, its numbers among it, in its order."""
    return _WORDS.findall(text)
