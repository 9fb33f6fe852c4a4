"""Running a study, in a notebook or without one: measure it, look at its results, keep them.

    panel("memory", globals())              # sliders, where somebody moves them
    run = measure("memory", globals())      # the notebook's parameters
    show(run, "saved", "budget")            # tables and figures by name
    save(run)                               # the run folder
"""

from __future__ import annotations

import ast
import dataclasses
import html
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.runs.folders import INTERACTIVE, RUNS, Run, Table, sweeps, tables_of, write_run
from analysis.runs.records import check_record_folder, keep, write_record_folder
from analysis.studies import (
    Study,
    check_device,
    check_names,
    command,
    get_study,
    make_parameters,
    plain,
    profile_of,
    profile_parameters,
    run_id,
)
from analysis.studies.drawing import drawings, figures, in_words, tables_shown
from mambabyte.errors import UserError

MISSING = "(pip install ipywidgets, and run this cell again, for a panel of sliders)"


def measure(
    study: Study | str, scope: Mapping[str, Any], report: Callable[[str], None] = print
) -> Run:
    """Runs a study; nothing is written. ``scope`` has its parameters by name, such as a notebook's
    globals(), and ``run_dir``, where the run will be kept.

    Without one, a notebook that nobody sits at (papermill's) keeps its run in a folder of its own
    under reports/runs, with identity, sources and command as ``mambabyte study`` does, and a
    notebook by hand in reports/runs/interactive. UserError for a parameter that the study does not
    have or that does not fit it, in the words of the command line.
    """
    if isinstance(study, str):
        study = get_study(study)
    check_names(study, _injected(scope) - {"run_dir"})
    given = make_parameters(study, {name: scope[name] for name in profile_parameters(study)})
    chosen = Path(scope.get("run_dir") or RUNS)
    known = _identity(study, plain(given)) if _unattended() and not sweeps(chosen) else {}
    began = time.perf_counter()
    compute = study.module("compute")
    settle = getattr(compute, "settle", None)  # fills in what was left to the machine
    p = settle(given) if settle else given
    folder = chosen if scope.get("run_dir") else RUNS / str(
        known.get("run_id", f"{INTERACTIVE}/{study.name}"))
    check_device(study, getattr(p, "device", "cpu"))
    if study.reads_runs and not p.runs_root and scope.get("run_dir"):  # the runs beside this one
        p = dataclasses.replace(p, runs_root=str(folder.parent))
    found = compute.run(p, report)
    tables = study.module("tables")
    captions, worded = tables.TABLES, getattr(tables, "WORDED", {})
    frames = {name: worded[name](frame) if name in worded else frame
              for name, frame in vars(found).items()
              if isinstance(frame, pd.DataFrame) and len(frame)}
    run = Run(study.name, vars(p), study.module("values").values(found, p),
              tables_of({name: ("", frame) for name, frame in frames.items()}), folder=folder)
    # In the order of the captions, which is the report's.
    ordered = {name: Table(name, in_words(captions.get(name, ""), run), run.tables[name].frame)
               for name in dict.fromkeys((*captions, *frames)) if name in frames}
    return dataclasses.replace(
        run, tables=ordered, seconds=round(time.perf_counter() - began, 3),
        figures={name: drawing.of[0] for name, drawing in drawings(study).items()
                 if drawing.is_in(run)}, **known)


def _identity(study: Study, parameters: dict[str, Any]) -> dict[str, Any]:
    """What makes a run count in the report: the entries that a sweep writes as well."""
    from mambabyte.config.provenance import provenance

    sources = study.sources_digest()
    return {"parameters": parameters, "run_id": run_id(study, parameters, sources),
            "sources": sources, "profile": profile_of(study, parameters),
            "provenance": {**provenance(), "command": command(study, parameters)}}


def _unattended() -> bool:
    """Whether this is a notebook that nobody sits at: papermill and its like allow no input."""
    shell = sys.modules.get("IPython")
    kernel = getattr(shell.get_ipython(), "kernel", None) if shell else None
    return kernel is not None and not getattr(kernel, "_allow_stdin", True)


def _injected(scope: Mapping[str, Any]) -> set[str]:
    """The names that papermill was given: what it assigns in the cell that it puts in."""
    cell = next((cell for cell in scope.get("In", ()) if cell.startswith("# Parameters\n")), "")
    return {target.id for node in ast.parse(cell).body if isinstance(node, ast.Assign)
            for target in node.targets if isinstance(target, ast.Name)}


def show(run: Run, *names: str) -> None:
    """Tables and figures of a run by name, in a notebook's cell; a figure goes before a table of
    its name, and a name that this run has not is passed over."""
    from analysis.plots.svg import svg

    drawn, tables = figures(run), tables_shown(run)
    for name in names:
        if name in drawn:
            figure = drawn[name]
            _show_words(figure.title, figure.caption)
            _show({"image/svg+xml": svg(figure.draw(), f"{run.study}.{name}"),
                   "text/plain": figure.alt})
        if name in tables and tables[name].caption:
            _show_words("", tables[name].caption)
            frame = tables[name].frame
            _show({"text/html": frame.to_html(index=False, max_rows=60, na_rep=""),
                   "text/plain": frame.to_string(index=False, max_rows=60)})


def panel(study: Study | str, scope: Mapping[str, Any]) -> None:
    """The study's panel of sliders, which needs no run; nothing in a batch run, a line where
    ipywidgets or what it reads is missing. ``scope`` is as for ``measure``."""
    if scope.get("run_dir"):
        return
    try:
        import ipywidgets  # noqa: F401
    except ImportError:
        print(MISSING)
        return
    from IPython.display import display

    study = get_study(study) if isinstance(study, str) else study
    p = make_parameters(study, {name: scope[name] for name in profile_parameters(study)})
    settle = getattr(study.module("compute"), "settle", None)
    try:
        shown = study.module("panel").panel(settle(p) if settle else p)
    except UserError as error:  # a record or run that it would read; the study goes on
        print(f"no panel: {error}")
        return
    display(shown)


def save(run: Run) -> Path:
    """Writes the run where it was measured for; returns the folder."""
    return write_run(run, run.folder)


def record(
    study: Study, parameters: Mapping[str, Any], folder: Path, *, title: str = "",
    about: str = "", patterns: Sequence[str] = (), report: Callable[[str], None] = print,
) -> Path:
    """Runs a study here and keeps it as a record, without Jupyter.

    ``patterns`` choose the values, tables and figures that it is to hold, as ``keep`` does. Raises
    UserError for a folder that cannot become a record, before anything runs, and for a pattern
    that nothing fits, after: the whole run is then left beside ``folder``.
    """
    check_record_folder(folder)
    began = time.perf_counter()
    run = measure(study, parameters, report)
    run = dataclasses.replace(run, title=title or study.title, about=about or study.question,
                              sources=study.sources_digest(),
                              seconds=round(time.perf_counter() - began, 3))
    try:
        return write_record_folder(keep(run, patterns), folder)
    except UserError as error:  # the run took hours
        kept = write_run(run, folder.with_name(f"{folder.name}.run"))
        raise UserError(f"{error}; what was measured is kept in {kept}") from None


def _show(bundle: dict[str, str]) -> None:
    """Display output of several types in a notebook's cell; elsewhere nothing happens."""
    shell = sys.modules.get("IPython")
    if shell is not None and hasattr(shell.get_ipython(), "kernel"):
        shell.display.display(bundle, raw=True)


def _show_words(title: str, caption: str) -> None:
    bold = f"<b>{html.escape(title)}.</b> " if title else ""
    _show({"text/html": f"<p>{bold}{html.escape(caption)}</p>",
           "text/plain": f"{title}. {caption}" if title else caption})
