"""Run the studies, or a grid of parameters over them. What is finished is skipped.

    mambabyte sweep
    mambabyte sweep overflow --grid seed=0,1,2 --executor local --workers 2
    mambabyte sweep overflow --grid "chunks=16,32;64,128"
    mambabyte sweep ablation throughput --profile full

Each run is a notebook executed in a fresh process. An interrupted sweep goes on where it was; a
failed run stays visible, is tried again by the next sweep, and makes the exit status 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from analysis.cli.options import parse, print_result
from analysis.studies import split_pairs

if TYPE_CHECKING:
    from analysis.sweep.run import Row


@dataclass(frozen=True)
class Options:
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Studies to run; all when none is named."""
    profile: str = "quick"
    """quick (CPU, about a minute each) or full (a GPU, longer)."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """name=value of a parameter; repeat for more. A list is written 1,2,3."""
    grid: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """name=v1,v2,v3: a run for each value, and for each combination when repeated. Values that are
    lists themselves are separated by semicolons: chunks=16,32;64,128."""
    executor: Literal["serial", "local", "dask", "slurm"] = "serial"
    """Where runs execute; serial keeps timings undisturbed."""
    workers: int = 1
    """How many runs at once, where the executor can."""
    address: str = ""
    """Scheduler of a dask cluster, or a Slurm partition."""
    force: bool = False
    """Run again what is done already."""
    root: Path = Path("reports/runs")
    """Where run folders are kept."""
    json: bool = False
    """Print the result as JSON."""


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "sweep", __doc__)

    from analysis.sweep.run import run_sweep

    rows = run_sweep(
        options.names, profile=options.profile, overrides=split_pairs("--set", options.set),
        grid={k: v.split(";" if ";" in v else ",")
              for k, v in split_pairs("--grid", options.grid).items()},
        root=options.root, executor=options.executor, workers=options.workers,
        address=options.address, force=options.force,
    )
    return print_rows(rows, options.json)


def print_rows(rows: Sequence[Row], as_json: bool) -> int:
    """One line a run; returns the exit status, 1 if any failed."""
    lines = [f"{row.status:8} {row.run_id}  {row.error or row.folder}" for row in rows]
    print_result({"runs": [asdict(row) for row in rows]}, as_json, lines)
    return 1 if any(row.status == "failed" for row in rows) else 0
