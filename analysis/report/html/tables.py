"""DataFrames as HTML tables: headers with scope, numbers aligned, wide ones in their own box."""

from __future__ import annotations

import math
import re
from typing import Any

import pandas as pd
from markupsafe import Markup

from analysis.report.html.text import NOT_MEASURED, fixed, html, number, plain
from mambabyte.config.scan_forms import FORMS

WORDY = 26  # characters; a longer cell may break into lines, a shorter one does not
# Names of columns in code, and what they are called on a page.
WORDS = {
    "ms": "time, ms", "ms_lower_quartile": "lower quartile, ms", "low": "interval from",
    "ms_upper_quartile": "upper quartile, ms", "high": "to", "bits_per_byte": "bits per byte",
    "n_parameters": "parameters", "d_model": "width", "n_layer": "layers", "d_state": "states",
    "mlp_hidden": "width of the MLP", "train_flops_per_byte": "operations per byte, training",
    "bytes_per_second": "bytes per second", "flops_per_second": "operations per second",
    "joules_per_megabyte": "joules per megabyte", "joules_per_step": "joules per step",
    "train_flops": "operations, training", "char_accuracy": "accuracy of characters",
}
UNITS = {"ms": "ms", "us": "us", "seconds": "s", "bytes": "bytes", "percent": "%", "joules": "J",
         "bits": "bits", "gb": "GB", "mb": "MB", "watts": "W", "steps": "steps"}
_CODE = re.compile(r"[a-z0-9]+(_[a-z0-9]+)+")
MAX_ROWS = 400  # beyond that a page is no place for numbers; the file has them all


def table(frame: pd.DataFrame, label: str, *, kind: str = "", max_rows: int = MAX_ROWS) -> Markup:
    """A table in a box that scrolls by itself. ``label`` names the box for screen readers.

    ``kind`` "ledger" marks a table that the page's script may make sortable and filterable.
    """
    numeric = {c for c in frame.columns if _is_numeric(frame[c])}
    names = {c: html(_unit_kept(in_words(str(c)))) for c in frame.columns}
    head = "".join(f'<th scope="col"{_align(c in numeric)}>{names[c]}</th>'
                   for c in frame.columns)
    rows = []
    decimals = [_decimals(frame[c]) for c in frame.columns]
    for record in frame.head(max_rows).itertuples(index=False, name=None):
        cells = [_cell(value, decimals[i], first=i == 0) for i, value in enumerate(record)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = ""
    if len(frame) > max_rows:
        note = (f'<p class="note">The first {max_rows:,} of {len(frame):,} rows; the run folder '
                "has them all.</p>")
    return Markup(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html(label)}">'
        f'<table{_class(kind)}><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f"</table></div>{note}")


def pairs(rows: list[tuple[str, Any]], label: str) -> Markup:
    """A table of two columns: name, value. Markup passes as it is."""
    body = "".join(f'<tr><th scope="row">{html(name)}</th><td>{_words(value)}</td></tr>'
                   for name, value in rows)
    return Markup(f'<div class="scroll" role="region" tabindex="0" aria-label="{html(label)}">'
                  f'<table class="pairs"><tbody>{body}</tbody></table></div>')


def _words(value: Any) -> Markup:
    return value if isinstance(value, Markup) else html(plain(value))


def in_words(column: str) -> str:
    """The name of a column for people: "stream_state_bytes" -> "stream state, bytes". Names of scan
    forms, and what has a space already, stay."""
    if column in WORDS:
        return WORDS[column]
    if not _CODE.fullmatch(column) or column in FORMS:
        return column
    *words, last = column.split("_")
    return f"{' '.join(words)}, {UNITS[last]}" if last in UNITS else column.replace("_", " ")


def _unit_kept(name: str) -> str:
    """No line break between a column's name and its unit."""
    head, comma, unit = name.rpartition(", ")
    return f"{head},\u00a0{unit}" if comma and len(unit) <= 8 else name


def _cell(value: Any, decimals: int | None, first: bool) -> str:
    value = value.item() if hasattr(value, "item") else value
    if value is None or value is pd.NA:
        text, attributes = html(NOT_MEASURED), ' class="none"'
    elif isinstance(value, bool):
        text, attributes = html(plain(value)), ""
    elif isinstance(value, (int, float)):
        text = html(number(value) if decimals is None or not math.isfinite(value)
                    else fixed(value, decimals))
        attributes = ' class="n"'
        if isinstance(value, float) and text != repr(value):
            attributes += f' data-v="{value!r}"'  # full precision, for sorting and copying
    else:
        text, attributes = html(plain(value)), ' class="t"' if len(str(value)) > WORDY else ""
    return f'<th scope="row"{attributes}>{text}</th>' if first else f"<td{attributes}>{text}</td>"


def _decimals(column: pd.Series) -> int | None:
    """Decimals for a whole column, so that its points align; None where it spans too much."""
    if not all(v is None or isinstance(v, float) for v in column):
        return None
    floats = [v for v in column if v is not None and math.isfinite(v)]
    sizes = [abs(v) for v in floats if v != 0]
    if not sizes or all(v == int(v) for v in floats):
        return None
    if min(sizes) < 1e-3 or max(sizes) >= 1e6 or max(sizes) / min(sizes) > 300:
        return None
    return max(3 - math.floor(math.log10(max(sizes))), 0)


def _is_numeric(column: pd.Series) -> bool:
    if column.dtype == object:
        return any(isinstance(v, (int, float)) and not isinstance(v, bool) for v in column)
    return bool(pd.api.types.is_numeric_dtype(column)) and column.dtype != bool


def _align(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _class(kind: str) -> str:
    return f' class="{html(kind)}"' if kind else ""
