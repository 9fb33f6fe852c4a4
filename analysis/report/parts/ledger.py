"""The claims ledger as a table: a claim with its verdict and numbers, the reasons below.

Each claim is a table body of two rows with an anchor of its own, so that it can be linked, sorted
and filtered as one, and read as a card on a phone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd
from markupsafe import Markup

from analysis.report.html.text import html, plain, powers, slug

FIRST = ("claim", "verdict", "theirs", "ours")  # columns of the first row, the rest is below
CHOICES = ("verdict", "kind", "document")  # what the page's script offers as drop-downs
_NUMERIC = ("claim", "theirs", "ours", "reason", "note")  # columns whose text has numbers
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def is_ledger(frame: pd.DataFrame) -> bool:
    """Whether the frame is the ledger itself, not a table that stands beside it."""
    return {"claim", "verdict"} <= set(frame.columns)


def ledger(frame: pd.DataFrame, links: Mapping[str, str]) -> Markup:
    """``links``: name of a run or record -> anchor; such names in "source" lead there."""
    first = [c for c in FIRST if c in frame.columns]
    head = "".join(f'<th scope="col" class="{c}">{c}</th>' for c in first)
    seen: set[str] = set()
    bodies = "".join(_claim(row, first, links, seen) for row in frame.to_dict("records"))
    return Markup(f'<table class="ledger claims"><thead><tr>{head}</tr></thead>{bodies}</table>')


def _claim(row: Mapping[Any, Any], first: list[str], links: Mapping[str, str],
           seen: set[str]) -> str:
    choices = "".join(f' data-{c}="{html(plain(row[c]))}"' for c in CHOICES if c in row)
    anchor = f"claim-{slug(plain(row['id']))}" if "id" in row else ""
    anchor = "" if anchor in seen else anchor
    seen.add(anchor)
    own = f' id="{anchor}"' if anchor else ""
    cells = [f'<th scope="rowgroup">{_text("claim", row)}</th>']
    cells += [f'<td class="{c}" data-label="{c}">{_text(c, row)}</td>' for c in first[1:]]
    reason = f"<p>{_text('reason', row)}</p>" if row.get("reason") else ""
    facts = [f"<span><b>{html(str(c))}</b> {_fact(str(c), row, links, anchor)}</span>"
             for c in row if c not in (*first, "reason") and row[c] not in ("", None)]
    below = f'<p class="more">{" ".join(facts)}</p>' if facts else ""
    return (f'<tbody{own}{choices}><tr>{"".join(cells)}</tr><tr><td colspan="{len(first)}">'
            f"{reason}{below}</td></tr></tbody>")


def _text(column: str, row: Mapping[Any, Any]) -> Markup:
    words = plain(row.get(column))
    return html(powers(words) if column in _NUMERIC else words)


def _fact(column: str, row: Mapping[Any, Any], links: Mapping[str, str], anchor: str) -> str:
    words = plain(row[column])
    if column == "id" and anchor:
        return f'<a href="#{anchor}">{html(words)}</a>'
    if column != "source":
        return _text(column, row)
    parts, end = [], 0
    for match in _NAME.finditer(words):
        place = links.get(match[0])
        if place:
            parts += [html(words[end:match.start()]), f'<a href="#{html(place)}">{match[0]}</a>']
            end = match.end()
    return "".join([*parts, html(words[end:])])
