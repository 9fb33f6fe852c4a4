"""Figures as SVG whose bytes depend on the figure alone, wide and for a phone."""

from __future__ import annotations

import io
import re

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from analysis.plots.phone import phone_layout

_PATH = re.compile(r'\bd="M[^"]*"')
_DIGITS = re.compile(r"(\.\d\d)\d+")


def wide_and_narrow(figure: Figure, salt: str) -> tuple[str, str]:
    """A figure's SVG, and that of its layout for a phone; ``salt`` names it, for its ids."""
    return svg(figure, salt), svg(phone_layout(figure), f"{salt}.narrow")


def svg(figure: Figure, salt: str) -> str:
    """No date, and ids salted by the figure's name."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        # savefig draws twice, the first time for its layout alone, which a drawing begins with.
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    # A hundredth of a point is finer than a screen; a map of many cells is half as large.
    return _PATH.sub(lambda path: _DIGITS.sub(r"\1", path[0]), buffer.getvalue())
