"""List, show, compare and plot the runs of mambabyte train.

    mambabyte runs
    mambabyte runs list path/to/runs --json
    mambabyte runs show runs/first
    mambabyte runs compare runs/first runs/second
    mambabyte runs plot runs/first runs/second --html curves.html
    mambabyte runs events runs/first

``show`` and --html also sample text from each run's newest checkpoint. ``events`` writes event
files of TensorBoard into the run folder (pip install 'mambabyte[tensorboard]').
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from analysis.cli.console import escaped, one_line, say
from analysis.cli.options import POSITIONAL, cell, print_result, subcommand
from analysis.cli.parser import Action
from mambabyte.config.checks import CountOrNone, entries
from mambabyte.errors import UserError

if TYPE_CHECKING:
    from analysis.runs.trainings import Training


Folders = Annotated[tuple[Path, ...], POSITIONAL, entries(1, once=False)]


@dataclass(frozen=True)
class List:
    folders: Annotated[tuple[Path, ...], POSITIONAL] = ()
    """Folders that hold runs; runs/ when none is given."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True)
class Show:
    folders: Folders
    """Run folders."""
    sample_bytes: CountOrNone = 200
    """Bytes of text to sample from each run; 0 samples none."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True)
class Compare:
    folders: Annotated[tuple[Path, ...], POSITIONAL, entries(2)]
    """Run folders, two or more."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True)
class Plot:
    folders: Folders
    """Run folders."""
    curve: str = "bits_per_byte"
    """What to draw in the terminal: bits_per_byte, bytes_per_second, lr, grad_norm, exponent or
    joules."""
    html: Path | None = None
    """Also write one small page with every curve, settings and samples."""
    sample_bytes: CountOrNone = 200
    """Bytes of text to sample from each run for the page; 0 samples none."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True)
class Events:
    folders: Folders
    """Run folders."""
    json: bool = False
    """Print the result as JSON."""


def run(argv: list[str]) -> int:
    return subcommand(ACTIONS, argv, "runs", __doc__, default="list")


def _list(options: List) -> int:
    from analysis.runs.trainings import find_trainings, summary

    for folder in options.folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: expected one with runs of mambabyte train")
        next(folder.iterdir(), None)  # one that cannot be read is not one without runs
    roots = options.folders or (Path("runs"),)
    rows = [summary(run) for root in roots for run in find_trainings(root)]
    print_result({"runs": rows}, options.json, table(rows) if rows else [
        f"no runs in {', '.join(map(str, roots))}: mambabyte train --out runs/first makes one"])
    return 0


def _of(work: Callable[[Sequence[Training], Any], tuple[dict[str, Any], list[str]]]
        ) -> Callable[[Any], int]:
    """An action on run folders: read them, work, print."""
    def act(options: Any) -> int:
        from analysis.runs.trainings import read_training

        record, lines = work([read_training(folder) for folder in options.folders], options)
        print_result(record, options.json, lines)
        return 0

    return act


def _show(runs: Sequence[Training], options: Show) -> tuple[dict[str, Any], list[str]]:
    from analysis.runs.trainings import summary

    record, lines = [], []
    for one in runs:
        found = {**summary(one), "sample": sample(one, options.sample_bytes)}
        record.append({**found, "model": one.model, "train": one.train})
        lines += [f"{name:20}{cell(value)}" for name, value in found.items() if name != "sample"]
        lines += _chart({str(one.folder): one}, "bits_per_byte")
        lines += ["", found["sample"], ""] if found["sample"] else [""]
    return {"runs": record}, lines


def _compare(runs: Sequence[Training], options: Compare) -> tuple[dict[str, Any], list[str]]:
    from analysis.runs.trainings import differences, summary

    rows, different = [summary(run) for run in runs], differences(runs)
    lines = [*table(rows), "", "set otherwise:" if different else "no setting differs"]
    lines += [f"  {name:24}{'   '.join(cell(value)[:24] for value in values)}"
              for name, values in different.items()]
    return {"runs": rows, "different": different}, lines


def _plot(runs: Sequence[Training], options: Plot) -> tuple[dict[str, Any], list[str]]:
    from analysis.runs.trainings import CURVES

    if options.curve not in CURVES:
        raise UserError(f"--curve is {options.curve!r}: choose one of {', '.join(CURVES)}")
    named = {str(run.folder): run for run in runs}
    lines = [CURVES[options.curve], *(_chart(named, options.curve)
                                      or ["not measured in these runs"])]
    if options.html:
        from analysis.cli.models.run_page import page
        from mambabyte.config.files import whole_file

        text = page(runs, {name: sample(run, options.sample_bytes) for name, run in named.items()})
        with whole_file(options.html) as part:
            part.write_text(text, encoding="utf-8")
        lines.append(str(options.html))
    return {"runs": {name: run.metrics[["step", "seconds", options.curve]].to_dict("list")
                     for name, run in named.items()}, "html": options.html}, lines


def _events(runs: Sequence[Training], options: Events) -> tuple[dict[str, Any], list[str]]:
    from analysis.runs.trainings import write_events

    written = [str(write_events(run, run.folder / "events")) for run in runs]
    return {"events": written}, [*written, f"tensorboard --logdir {written[0]}"]


def _chart(runs: Mapping[str, Training], column: str) -> list[str]:
    from analysis.plots.training import chart

    return chart({one_line(name): run.metrics for name, run in runs.items()}, column)


def sample(run: Training, count: int) -> str:
    """Text from the run's newest checkpoint, the same every time; "" where there is none."""
    if not count:
        return ""
    from mambabyte.checkpoint import load_model, saved
    from mambabyte.stream import generate

    if not saved(run.folder):
        return ""
    say(f"drawing {count:,} bytes from {run.folder}")
    return escaped(
        "".join(generate(load_model(run.folder), b"", count, temperature=0.8, seed=0)))


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows with the same names as aligned columns under their names."""
    cells = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in cells]


ACTIONS = {
    "list": Action(List, _list, "The runs in a folder, a line each"),
    "show": Action(Show, _of(_show), "All of a run: settings, curve, a sample"),
    "compare": Action(Compare, _of(_compare), "Runs beside each other, and what is set otherwise"),
    "plot": Action(Plot, _of(_plot), "A curve of runs, in the terminal or on a page"),
    "events": Action(Events, _of(_events), "Event files of TensorBoard in the run folders"),
}
