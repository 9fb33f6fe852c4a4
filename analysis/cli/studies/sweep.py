"""Run the studies, or a grid of parameters over them. What is finished is skipped.

    mambabyte sweep
    mambabyte sweep overflow --grid seed=0,1,2 --executor local --workers 2
    mambabyte sweep overflow --grid "chunks=16,32;64,128"
    mambabyte sweep ablation throughput --profile full
    mambabyte sweep overflow -f grid.toml
    mambabyte sweep ablation throughput --profile full --executor dask --address tcp://head:8786
    mambabyte sweep ablation --profile full --executor slurm --address partition=gpu,gpus_per_node=1

Each run is a notebook executed in a fresh process. An interrupted sweep goes on where it was; a
failed run stays visible, is tried again by the next sweep, and makes the exit status 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from analysis.cli.options import POSITIONAL, REPEATED, parse, print_result
from mambabyte.config.checks import Workers, shown
from mambabyte.errors import UserError

if TYPE_CHECKING:
    from analysis.sweep.run import Row


@dataclass(frozen=True)
class Options:
    names: Annotated[tuple[str, ...], POSITIONAL] = ()
    """Studies to run; all when none is named."""
    profile: str = "quick"
    """quick (CPU, about a minute each) or full (a GPU, longer)."""
    set: Annotated[tuple[str, ...], REPEATED] = ()
    """name=value of a parameter; repeat for more. A list is written 1,2,3."""
    grid: Annotated[tuple[str, ...], REPEATED] = ()
    """name=v1,v2,v3: a run for each value, and for each combination when repeated. Values that are
    lists themselves are separated by semicolons: chunks=16,32;64,128."""
    file: Path | None = None
    """-f: parameters from a file, TOML, JSON or YAML by its name, and in a table [grid] the values
    of each that is varied; --set and --grid override it."""
    executor: Literal["serial", "local", "dask", "slurm"] = "serial"
    """Where runs execute; on this machine studies that are timed run alone, also with local."""
    workers: Workers = 1
    """How many runs at once, where the executor can."""
    address: str = ""
    """Scheduler of a dask cluster, tcp://host:8786; or a Slurm partition, or options of sbatch:
    partition=gpu,gpus_per_node=1,time=720 (minutes)."""
    force: bool = False
    """Run again what is done already."""
    root: Path = Path("reports/runs")
    """Where run folders are kept."""
    json: bool = False
    """Print the result as JSON."""


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "sweep", __doc__)

    from analysis.studies import read_file, split_pairs
    from analysis.sweep.run import run_sweep

    given = read_file(options.file)
    varied = given.pop("grid", {})
    if not isinstance(varied, dict) or not all(isinstance(v, list) for v in varied.values()):
        raise UserError(f"{options.file}: grid is {shown(varied)}: expected a table of lists, such "
                        "as seed = [0, 1, 2]")
    grid = {k: v.split(";" if ";" in v else ",")
            for k, v in split_pairs("--grid", options.grid).items()}
    rows = run_sweep(
        options.names, profile=options.profile,
        overrides={**given, **split_pairs("--set", options.set)}, grid={**varied, **grid},
        root=options.root, executor=options.executor, workers=options.workers,
        address=options.address, force=options.force,
    )
    return print_rows(rows, options.json)


def print_rows(rows: Sequence[Row], as_json: bool) -> int:
    """One line a run; returns the exit status, 1 if any failed."""
    lines = [f"{row.status:8} {row.run_id}  {row.error or row.folder}" for row in rows]
    print_result({"runs": [asdict(row) for row in rows]}, as_json, lines)
    return 1 if any(row.status == "failed" for row in rows) else 0
