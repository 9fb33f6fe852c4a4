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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from analysis.cli.console import escaped
from analysis.cli.options import cell, parse, print_result
from mambabyte.errors import UserError

if TYPE_CHECKING:
    from analysis.runs.trainings import Training


@dataclass(frozen=True)
class Options:
    action: Annotated[Literal["list", "show", "compare", "plot", "events"],
                      tyro.conf.Positional] = "list"
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders; for list, folders that hold some, runs/ when none is given."""
    curve: str = "bits_per_byte"
    """For plot: what to draw in the terminal: bits_per_byte, bytes_per_second, lr, grad_norm,
    exponent or joules."""
    html: Path | None = None
    """For plot: also write one small page with every curve, settings and samples."""
    sample_bytes: int = 200
    """Bytes of text to sample from each run; 0 samples none."""
    json: bool = False
    """Print the result as JSON."""


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "runs", __doc__)

    from analysis.runs.trainings import find_trainings, read_training, summary

    if options.action == "list":
        roots = options.folders or (Path("runs"),)
        runs = [run for root in roots for run in find_trainings(root)]
        rows = [summary(run) for run in runs]
        print_result({"runs": rows}, options.json, table(rows) if rows else [
            f"no runs in {', '.join(map(str, roots))}: mambabyte train --out runs/first makes one"])
        return 0
    if not options.folders:
        raise UserError(f"which? give the run folders to {options.action} (mambabyte runs lists "
                        "them)")
    runs = [read_training(folder) for folder in options.folders]
    record, lines = {"show": _show, "compare": _compare, "plot": _plot, "events": _events}[
        options.action](runs, options)
    print_result(record, options.json, lines)
    return 0


def _show(runs: Sequence[Training], options: Options) -> tuple[dict[str, Any], list[str]]:
    from analysis.runs.trainings import summary

    record, lines = [], []
    for one in runs:
        found = {**summary(one), "sample": sample(one, options.sample_bytes)}
        record.append({**found, "model": one.model, "train": one.train})
        lines += [f"{name:20}{cell(value)}" for name, value in found.items() if name != "sample"]
        lines += _chart({str(one.folder): one}, "bits_per_byte")
        lines += ["", found["sample"], ""] if found["sample"] else [""]
    return {"runs": record}, lines


def _compare(runs: Sequence[Training], options: Options) -> tuple[dict[str, Any], list[str]]:
    from analysis.runs.trainings import differences, summary

    if len(runs) < 2:
        raise UserError("compare needs two run folders or more")
    rows, different = [summary(run) for run in runs], differences(runs)
    lines = [*table(rows), "", "set otherwise:" if different else "no setting differs"]
    lines += [f"  {name:24}{'   '.join(cell(value)[:24] for value in values)}"
              for name, values in different.items()]
    return {"runs": rows, "different": different}, lines


def _plot(runs: Sequence[Training], options: Options) -> tuple[dict[str, Any], list[str]]:
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


def _events(runs: Sequence[Training], options: Options) -> tuple[dict[str, Any], list[str]]:
    from analysis.runs.trainings import write_events

    written = [str(write_events(run, run.folder / "events")) for run in runs]
    return {"events": written}, [*written, f"tensorboard --logdir {written[0]}"]


def _chart(runs: Mapping[str, Training], column: str) -> list[str]:
    from analysis.plots.training import chart

    return chart({name: run.metrics for name, run in runs.items()}, column)


def sample(run: Training, count: int) -> str:
    """Text from the run's newest checkpoint, the same every time; "" where there is none."""
    if not count:
        return ""
    from mambabyte.checkpoint import load_model, saved
    from mambabyte.stream import generate

    if not saved(run.folder):
        return ""
    return escaped(
        "".join(generate(load_model(run.folder), b"", count, temperature=0.8, seed=0)))


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows with the same names as aligned columns under their names."""
    cells = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in cells]

