"""One small page about training runs: no script, nothing beside it, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from analysis.cli.console import one_line
from analysis.cli.options import cell
from analysis.plots.svg import svg
from analysis.plots.training import curves
from analysis.runs.trainings import CURVES, Training, differences, summary

if TYPE_CHECKING:
    import pandas as pd

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { padding: .2rem .7rem .2rem 0; text-align: left; border-bottom: 1px solid #8886 }
pre { white-space: pre-wrap; background: #8882; padding: .7rem }
svg { max-width: 100%; height: auto; background: #fff }
"""


def page(runs: Sequence[Training], samples: Mapping[str, str]) -> str:
    """The runs' results, the settings in which they differ, their curves, and a sample of each."""
    frames: dict[str, pd.DataFrame] = {one_line(str(run.folder)): run.metrics for run in runs}
    logged = {name: words for name, words in CURVES.items()
              if any(frame[name].notna().any() for frame in frames.values())}
    rows, different = [summary(run) for run in runs], differences(runs)
    parts = ["<h1>Training runs</h1><p>- stands for what was not measured.</p>",
             _table(list(rows[0]), [list(row.values()) for row in rows])]
    if len(runs) > 1 and different:
        parts += ["<h2>Set otherwise</h2>", _table(
            ["setting", *frames], [[name, *values] for name, values in different.items()])]
    if logged:
        drawing = svg(curves(frames, logged), "runs").partition("<svg")[2]
        words = f"Curves by the seconds of training: {', '.join(logged.values())}"
        parts += ["<h2>Curves</h2>", f'<svg role="img" aria-label="{escape(words)}"{drawing}']
    told = {one_line(name): text for name, text in samples.items() if text}
    parts += ["<h2>Samples</h2>"] if told else []
    parts += [f"<h3>{escape(name)}</h3><pre>{escape(text)}</pre>" for name, text in told.items()]
    return ("<!doctype html>\n<html lang=en><meta charset=utf-8>"
            "<meta name=viewport content='width=device-width, initial-scale=1'>"
            f"<title>Training runs</title><style>{_STYLE}</style>\n<body>\n"
            + "\n".join(parts) + "\n</body></html>\n")


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell(c))}</{tag}>" for c in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"

