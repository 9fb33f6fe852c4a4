"""A measurement record by one command, on a machine without Jupyter.

``python -m analysis.sweep.record throughput data/measurements/NAME.json --profile full`` runs the
code cells of a study's notebook in this process, with the profile's parameters, and writes what
they recorded as a record (machine, date, versions, commit, command, values, tables, figures). The
report shows it beside the study, marked with its machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.runs.folders import load_run
from analysis.runs.records import write_record_file
from analysis.studies import STUDIES, Study, get_study, profile_parameters, split_pairs, validate
from mambabyte.config.files import check_file
from mambabyte.errors import UserError


def run_notebook(study: Study, parameters: Mapping[str, Any], folder: Path) -> Path:
    """Run a notebook's code cells in order, ``parameters`` set after its parameters cell.

    Returns the run folder that the notebook recorded. What a cell raises is raised.
    """
    import pyarrow  # noqa: F401  (needed when the run is written: better missed now)

    cells = json.loads(study.notebook.read_text(encoding="utf-8"))["cells"]
    scope: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(c for c in cells if c["cell_type"] == "code"):
        source = "".join(cell["source"])
        exec(compile(source, f"{study.notebook.name} cell {number}", "exec"), scope)
        if "parameters" in cell["metadata"].get("tags", []):
            scope.update({**parameters, "run_dir": str(folder)})
    load_run(folder)  # a notebook that recorded nothing is an error
    return folder


def measure(study: Study, parameters: Mapping[str, Any], out: Path, *, title: str = "",
            about: str = "", keep: Sequence[str] = ()) -> Path:
    """Run a study and keep it as the record ``out`` (a path that ends in .json).

    ``keep`` are patterns of the values, tables and figures that it is to hold, all when empty.
    Raises UserError for an ``out`` that cannot be written, before anything runs, and for a pattern
    that nothing fits, after: the finished run is then left beside ``out``.
    """
    if out.suffix != ".json":
        raise UserError(f"{out}: a record is a .json file")
    check_file(out)  # fails now rather than after the run
    with tempfile.TemporaryDirectory() as temporary:
        folder = run_notebook(study, parameters, Path(temporary) / "run")
        try:
            return write_record_file(folder, out.stem, title=title or study.title,
                                     about=about or study.question, folder=out.parent,
                                     keep=keep)
        except UserError as error:  # such as a pattern that nothing fits: the run took hours
            kept = out.with_suffix(".run")
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            raise UserError(f"{error}; what was measured is kept in {kept}") from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.sweep.record", description=(__doc__ or "").partition("\n")[0],
        epilog="example: python -m analysis.sweep.record throughput "
               "data/measurements/gpu-throughput.json --set rounds=9")
    parser.add_argument("study", choices=tuple(STUDIES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--profile", default="full")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--keep", action="append", default=[], metavar="PATTERN",
                        help="keep the values, tables and figures of this name alone, e.g. "
                             "'pieces_*' (may be repeated)")
    parser.add_argument("--title", default="")
    parser.add_argument("--about", default="")
    given = parser.parse_args(arguments)
    try:
        study = get_study(given.study)
        overrides = split_pairs("--set", given.set)
        parameters = (validate(study, overrides, given.profile) if overrides
                      else profile_parameters(study, given.profile))
        print(measure(study, parameters, given.out, title=given.title, about=given.about,
                      keep=given.keep))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
