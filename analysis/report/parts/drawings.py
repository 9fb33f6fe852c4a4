"""Drawings of a report, kept in the cache: one is made again only where its numbers, the study's
``figures`` or matplotlib have changed."""

from __future__ import annotations

import hashlib
from functools import cache

import matplotlib as mpl

from analysis.plots.svg import wide_and_narrow
from analysis.runs import staleness
from analysis.runs.kept import kept
from analysis.studies import Study
from analysis.studies.drawing import Figure


def drawn(figure: Figure, study: Study | None, anchor: str) -> tuple[str, str]:
    """SVG of a figure, wide and for a phone; ``anchor`` tells its ids from those of others, and
    ``study`` is whose drawing it is, None for one of this package."""
    key = hashlib.sha256(repr((mpl.__version__, _code(study), anchor, figure.key())).encode())
    wide, narrow = kept("drawings", key.hexdigest(),
                        lambda: wide_and_narrow(figure.draw(), anchor))
    return wide, narrow


@cache
def _code(study: Study | None) -> str:
    drawing = f"{study.package}.figures" if study else "analysis.plots.comparisons"
    root = study.root if study else staleness.ROOT
    files = staleness.source_files([drawing, "analysis.plots.svg"], root)
    total = hashlib.sha256()
    for path in files:
        total.update(path.read_bytes())
    return total.hexdigest()
