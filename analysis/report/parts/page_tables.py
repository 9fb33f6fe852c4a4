"""Tables in pages of docs/ whose numbers are a record's: made again by `mambabyte report --readme`.

A page says which rows it shows, by the first cell of each; the other cells are read from the record
that the page names. A table is found by the beginning of its heading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.runs.folders import Run
from mambabyte.config.files import whole_file
from mambabyte.errors import UserError

Records = Mapping[str, Run]
Cells = list[str]
FORWARD, BOTH = "forward", "forward+backward"
PEERS = {"SSD, 64 states": "mamba_ssm", "SSD, 128 states": "mamba_ssm",
         "Mamba-3, 64 states": "mamba_ssm", "Mamba-3, 128 states": "mamba_ssm",
         "KDA": "fla", "gated delta rule": "fla"}


def row_of(records: Records, record: str, table: str, **cells: object) -> dict[str, Any]:
    """The one row of a record's table that has these cells."""
    if record not in records:
        raise UserError(f"there is no record {record!r}, whose numbers a page of docs/ has")
    frame: pd.DataFrame = records[record].tables[table].frame
    for column, cell in cells.items():
        frame = frame[frame[column] == cell]
    if len(frame) != 1:
        raise UserError(f"{len(frame)} rows of {record} are {cells}, not one: a page of docs/ has "
                        "another name for it, or the record lacks it")
    return dict(frame.iloc[0])


def _name(cell: str) -> str:
    """ "`quick_start`" and "M, Mamba" -> the system's name in the record."""
    return cell.partition(",")[0].strip("`")


def scans(cells: Cells, records: Records) -> Cells:
    """Our scan in microseconds, forward with backward, and mamba-ssm's in times of it."""
    shape = cells[0].strip("()").replace(", ", " x ")
    ours, theirs = (row_of(records, "h200-scan", "bench", **{
        "batch x length x channels": shape, "of": of, "pass": BOTH})["median (us)"]
        for of in ("fused", "mamba_ssm"))
    return [*cells[:3], f"{ours:.0f}, {theirs / ours:.2f}x", cells[4]]


def mixers(cells: Cells, records: Records) -> Cells:
    """A family's microseconds, forward and with backward, and how many times as long its peer's."""
    def microseconds(family: str, of: str) -> list[Any]:
        return [row_of(records, "h200-mixers", "bench", **{
            "batch x length x heads": cells[0], "family": family, "of": of, "pass": way}
        )["median (us)"] for way in (FORWARD, BOTH)]

    found = [cells[0]]
    for family, peer in PEERS.items():
        ours, theirs = microseconds(family, "fused"), microseconds(family, peer)
        times = "; " + ", ".join(f"{b / a:.2f}" for a, b in zip(ours, theirs, strict=True)
                                 ) if pd.notna(theirs).all() else ""
        found.append(", ".join(f"{one:,.0f}" for one in ours) + times)
    return found


def streams(cells: Cells, records: Records) -> Cells:
    """A system's engine, size, speeds of generating and streaming, and of scoring the task."""
    row = row_of(records, "h200-stream-systems", "systems", system=_name(cells[0]))
    million = row["parameters"] / 1e6  # a gate's some thousands are not shown
    characters = row["predict and observe (characters/s)"]
    return [cells[0], row["engine"],
            "" if million < 0.1 else f"{million:.{1 if million > 10 else 2}f} M",
            f"{row['generation (bytes/s)']:,.0f}", f"{row['streaming (bytes/s)']:,.0f}",
            f"{characters:,.0f}", f"{60_000 / characters:.1f} s"]


def starts(cells: Cells, records: Records) -> Cells:
    """Seconds to the first step and joules to the fiftieth, with caches cold and warm."""
    found = [cells[0]]
    for caches in ("cold", "warm"):
        for way in ("fused", "compile"):
            row = row_of(records, "h200-start", "summary", system=_name(cells[0]), way=way,
                         caches=caches)
            seconds = row["text to step 1 (s)"]
            said = f"{seconds:.{2 if seconds < 5 else 1}f} s"
            found.append(f"{_bold(said, way)}, {row['process to step 50 (J)']:,.0f} J")
    return found


def paces(cells: Cells, records: Records) -> Cells:
    """Milliseconds a step, by our kernels and compiled by torch."""
    found = [cells[0]]
    for way in ("fused", "compile"):
        row = row_of(records, "h200-start", "pace", system=_name(cells[0]), way=way)
        digits = 3 if row["ms"] < 3 else 2
        ms, low, high = (f"{row[key]:.{digits}f}" for key in ("ms", "low", "high"))
        found.append(f"{_bold(ms, way)} [{low}, {high}]")
    return found


def _bold(words: str, way: str) -> str:
    return f"**{words}**" if way == "fused" else words


def task_systems(cells: Cells, records: Records) -> Cells:
    """Runs, energy, time and accuracy of a system; each run's where they are alike but for these.
    """
    system, joules = _name(cells[0]), "energy (J, idle subtracted)"
    row = row_of(records, "h200-task-mixed", "systems", system=system)
    frame = records["h200-task-mixed"].tables["runs"].frame
    mine = frame[frame["system"] == system]
    alike = len(mine) > 1 and mine["validation accuracy"].nunique() == 1
    each = ", ".join(f"{x:,.0f}" for x in mine[joules]) if alike else (
        f"{mine[joules].min():,.0f} to {mine[joules].max():,.0f}")
    total = ", ".join(f"{x:,.0f}" for x in mine["total energy (J)"])
    accuracy = f"{row['validation accuracy']:.4f}"
    if len(mine) > 1 and not alike:
        accuracy += f" ({row['lowest']:.4f} to {row['highest']:.4f})"
    bits = row["validation (bits/byte)"]
    return [cells[0], "twice the same" if alike and len(mine) == 2 else str(len(mine)),
            f"{row[joules]:,.0f}" + f" ({each})" * (len(mine) > 1),
            f"{row['total energy (J)']:,.0f}" + f" ({total})" * alike, f"{row['time (s)']:.1f}",
            accuracy, f"{bits:.3f}" if pd.notna(bits) else ""]


TABLES: dict[str, dict[str, Callable[[Cells, Records], Cells]]] = {
    "kernels.md": {
        "| (batch, length, channels) | first": scans, "| batch x length x heads |": mixers,
        "| system | engine | parameters |": streams, "| | fused, cold |": starts,
        "| | fused | torch.compile |": paces},
    "task.md": {"| system | runs | GPU J |": task_systems},
}


def rewritten(text: str, page: str, records: Records) -> str:
    """A page with the records' numbers in its tables; UserError where it lacks one of them."""
    for head, cells_of in TABLES[page].items():
        before, found, rest = text.partition(f"\n{head}")
        if not found:
            raise UserError(f"docs/{page} has no table headed {head}")
        heading, rule, *lines = rest.splitlines(keepends=True)
        rows = 0
        while rows < len(lines) and lines[rows].startswith("|"):
            cells = [cell.strip() for cell in lines[rows].strip().split("|")[1:-1]]
            new = " | ".join(cells_of(cells, records))
            lines[rows] = f"| {new} |\n".replace("|  |", "| |")
            rows += 1
        text = "".join((before, found, heading, rule, *lines))
    return text


def write_pages(folder: Path, records: Records) -> list[Path]:
    """The pages of TABLES that are in ``folder``, with the records' numbers."""
    written = []
    for page in TABLES:
        path = folder / page
        if path.is_file():
            text = rewritten(path.read_text(encoding="utf-8"), page, records)
            with whole_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
            written.append(path)
    return written
