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
from mambabyte.errors import UserError, nearest

FIRST = ("claim", "verdict", "theirs", "ours")  # columns of the first row, the rest is below
ICONS = {"holds": "✓", "holds with a caveat": "≈", "does not hold": "✗",
         "inconsistent with another statement": "≠", "not decidable here": "?"}
FIRST_CLAIMS = "matters most"  # what the page says of the quoted claims
CHOICES = ("verdict", "kind", "document")  # what the page's script offers as drop-downs
_NUMERIC = ("claim", "theirs", "ours", "reason", "note")  # columns whose text has numbers
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def is_ledger(frame: pd.DataFrame) -> bool:
    """Whether the frame is the ledger itself, not a table that stands beside it."""
    return {"claim", "verdict"} <= set(frame.columns)


def ledger(
    frame: pd.DataFrame, links: Mapping[str, str], quotations: Mapping[str, str] | None = None,
) -> Markup:
    """``links``: name of a run or record -> anchor; such names in "source" lead there.

    ``quotations``: id of a claim -> the sentence that is judged; these claims matter most and come
    first, in that order. UserError for one that the ledger has not.
    """
    quotations = quotations or {}
    first = [c for c in FIRST if c in frame.columns]
    head = "".join(f'<th scope="col" class="{c}">{c}</th>' for c in first)
    seen: set[str] = set()
    rows: list[dict[Any, Any]] = frame.to_dict("records")
    ids = [plain(row.get("id")) for row in rows]
    unknown = [name for name in quotations if name not in ids]
    if unknown:
        raise UserError(f"report.toml quotes the claim {unknown[0]!r}, which the ledger has not"
                        f"{nearest(unknown[0], ids)}")
    order = {name: i for i, name in enumerate(quotations)}
    rows.sort(key=lambda row: order.get(plain(row.get("id")), len(order)))
    bodies = "".join(_claim(row, first, links, seen, quotations.get(plain(row.get("id")), ""))
                     for row in rows)
    return Markup(f'<table class="ledger claims"><thead><tr>{head}</tr></thead>{bodies}</table>')


def _claim(row: Mapping[Any, Any], first: list[str], links: Mapping[str, str],
           seen: set[str], quotation: str) -> str:
    choices = "".join(f' data-{c}="{html(plain(row[c]))}"' for c in CHOICES if c in row)
    choices += f' data-importance="{FIRST_CLAIMS}"' if quotation else ""
    anchor = f"claim-{slug(plain(row['id']))}" if "id" in row else ""
    anchor = "" if anchor in seen else anchor
    seen.add(anchor)
    own = f' id="{anchor}"' if anchor else ""
    cells = [f'<th scope="rowgroup">{_text("claim", row)}</th>']
    cells += [f'<td class="{c}" data-label="{c}">{_icon(c, row)}{_text(c, row)}</td>'
              for c in first[1:]]
    quoted = f"<p><q>{html(quotation)}</q></p>" if quotation else ""
    reason = f"<p>{_text('reason', row)}</p>" if row.get("reason") else ""
    facts = [f"<span><b>{html(str(c))}</b> {_fact(str(c), row, links, anchor)}</span>"
             for c in row if c not in (*first, "reason") and row[c] not in ("", None)]
    below = f'<p class="more">{" ".join(facts)}</p>' if facts else ""
    return (f'<tbody{own}{choices}><tr>{"".join(cells)}</tr><tr><td colspan="{len(first)}">'
            f"{quoted}{reason}{below}</td></tr></tbody>")


def _icon(column: str, row: Mapping[Any, Any]) -> str:
    icon = ICONS.get(plain(row[column])) if column == "verdict" else None
    return f'<span class="icon" aria-hidden="true">{icon}</span> ' if icon else ""


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
