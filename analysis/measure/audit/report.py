"""What an audit found, as text and as a page of HTML that needs nothing beside it."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from analysis.measure.audit.run import Audit, Finding

MOST_LINES = 12  # of faults that are alike


def number(value: float) -> str:
    """An error in a table."""
    return "inf" if math.isinf(value) else "-" if math.isnan(value) else f"{value:.1e}"


def groups(audit: Audit) -> list[tuple[str, str, str, list[Finding]]]:
    """Findings by check, quantity and dtype, in the order in which they were made; gradients of
    all inputs through one output are one group."""
    found: dict[tuple[str, str, str], list[Finding]] = {}
    for f in audit.findings:
        quantity = f.quantity
        if quantity.startswith("gradient"):
            quantity = "gradients" + "".join(quantity.partition(", through")[1:])
        elif f.check not in ("definition", "handover"):
            quantity = "" if quantity in ("output", "state", "call") else quantity
            quantity = "" if quantity.startswith(("input ", "output ")) else quantity
        quantity = quantity.replace("gradients, through", "gradients through")
        found.setdefault((f.check, quantity, f.dtype), []).append(f)
    return [(*key, members) for key, members in found.items()]


def _row(members: Sequence[Finding]) -> tuple[str, str, str, str]:
    """Numbers in it, the largest error, its bound, and the verdict in words."""
    counted = [f for f in members if f.verdict != "refused"]
    worst = max((f.error for f in counted), default=math.nan)
    words = []
    for verdict, one, many in (("fault", "fault", "faults"), ("note", "note", "notes"),
                               ("refused", "refused", "refused")):
        count = sum(f.verdict == verdict for f in members)
        if count:
            words.append(f"{count} {one if count == 1 else many}")
    bound = max((f.bound for f in members), default=math.nan)
    return str(len(counted)), number(worst), number(bound), ", ".join(words) or "ok"


def summary(audit: Audit) -> str:
    """The result in a line."""
    faults, cases = audit.of("fault"), {(f.case, f.dtype) for f in audit.findings}
    words = f"{len(faults)} faults" if len(faults) != 1 else "1 fault"
    return (f"{audit.target}, {audit.kind} on {audit.device}: {words} in "
            f"{len(audit.findings)} numbers of {len(cases)} cases, {audit.seconds:.0f} s")


def limits(audit: Audit) -> list[str]:
    """What the numbers do not say, a line each."""
    out = []
    if audit.settings:
        out.append(f"{len(audit.settings)} kernels that tune themselves had one setting each, the "
                   "smallest that runs")
    if audit.unreached:
        out.append(f"not reached: {'; '.join(audit.unreached)}")
    return out


def lines(audit: Audit) -> list[str]:
    """The report for a terminal."""
    out = [summary(audit), ", ".join(f"{k} {v}" for k, v in audit.versions.items())]
    if audit.lacks:
        out.append(f"not offered, and not asked for: {', '.join(audit.lacks)}")
    out += limits(audit)
    out += ["", f"{'check':<18} {'of':<30} {'dtype':<9} {'numbers':>7} {'worst':>8} "
            f"{'bound':>8}  verdict"]
    for check, quantity, dtype, members in groups(audit):
        count, worst, bound, verdict = _row(members)
        out.append(f"{check:<18} {quantity:<30} {dtype:<9} {count:>7} {worst:>8} {bound:>8}  "
                   f"{verdict}")
    for verdict, title in (("fault", "faults"), ("refused", "refused by the target"),
                           ("note", "notes")):
        found = audit.of(verdict)  # type: ignore[arg-type]
        if found:
            out += ["", f"{title}:", *_listed(found)]
    return out


def _listed(findings: list[Finding]) -> list[str]:
    """Each finding in a line, those of one check together; of many alike the first ones."""
    out: list[str] = []
    by_check: dict[str, list[Finding]] = {}
    for f in findings:
        by_check.setdefault(f.check, []).append(f)
    for members in by_check.values():
        for f in members[:MOST_LINES]:
            note = f" ({f.note})" if f.note else ""
            size = "" if f.verdict == "refused" else f": {number(f.error)}, bound {number(f.bound)}"
            out.append(f"  {f.check}, {f.case}, {f.dtype}, {f.quantity}{size}{note}")
        if len(members) > MOST_LINES:
            out.append(f"  ... and {len(members) - MOST_LINES} more of {members[0].check}")
    files = list(dict.fromkeys(f.file for f in findings if f.file))
    return out + [f"  once more: mambabyte audit {path}" for path in files]


def page(audit: Audit) -> str:
    """The same as HTML."""
    def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        cells = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>"
                        for row in rows)
        top = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in head)
        return f"<table><thead><tr>{top}</tr></thead><tbody>{cells}</tbody></table>"

    name = html.escape(audit.target)
    rows = [(check, quantity, dtype, *_row(members))
            for check, quantity, dtype, members in groups(audit)]
    parts = [f"<p>{html.escape(summary(audit))}</p>",
             f"<p>{html.escape(', '.join(f'{k} {v}' for k, v in audit.versions.items()))}</p>",
             table(("check", "of", "dtype", "numbers", "worst", "bound", "verdict"), rows)]
    if audit.lacks:
        parts.insert(2, f"<p>Not offered: {html.escape(', '.join(audit.lacks))}.</p>")
    parts += [f"<p>{html.escape(line)}</p>" for line in limits(audit)]
    for verdict, title in (("fault", "Faults"), ("refused", "Refused"), ("note", "Notes")):
        found = audit.of(verdict)  # type: ignore[arg-type]
        if found:
            parts.append(f"<h2>{title}</h2>" + table(
                ("check", "case", "dtype", "of", "error", "bound", "note", "inputs"),
                [(f.check, f.case, f.dtype, f.quantity, number(f.error), number(f.bound), f.note,
                  str(f.file or "")) for f in found]))
    style = ("body{font:16px/1.5 sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
             "table{border-collapse:collapse;display:block;overflow-x:auto}"
             "td,th{border:1px solid #999;padding:.2rem .6rem;text-align:left}")
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Audit of {name}'
            f'</title><style>{style}</style></head><body><h1>Audit of {name}</h1>'
            f'{"".join(parts)}</body></html>\n')
