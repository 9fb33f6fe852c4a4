"""The picture of the README: both sides of every headline, drawn from the records."""

from __future__ import annotations

import re
from pathlib import Path

from analysis.plots.svg import svg
from analysis.report.parts.comparisons import comparisons
from analysis.runs.records import RECORDS, load_records
from mambabyte.config.files import whole_file
from mambabyte.errors import UserError

NAME = "comparisons.sides"
_WORDS = re.compile(r"<text[^>]*>(.*?)</text>", re.S)


def draw_picture(out: Path, records_root: Path | str = RECORDS) -> Path:
    """Writes the SVG; UserError where a record of the headlines is missing."""
    text = picture(records_root)
    with whole_file(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return out


def picture(records_root: Path | str = RECORDS) -> str:
    """The SVG, on paper of its own: where it is shown may be dark."""
    found = comparisons(load_records(records_root))
    if NAME not in found:
        raise UserError("a record that data/headlines.toml names is missing: there is no picture")
    figure = found[NAME].draw()
    figure.set_facecolor("white")
    return svg(figure, NAME)


def words(text: str) -> list[str]:
    """What a picture says, its numbers among it, in its order."""
    return _WORDS.findall(text)
