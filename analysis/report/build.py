"""Puts the report together: runs, records and prose in; the article and its evidence out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pandas as pd

from analysis.report.html.check import check_page
from analysis.report.html.text import clean
from analysis.report.links import resolve
from analysis.report.pages import Config, Pages
from analysis.report.parts.blocks import DATA, data_path
from analysis.report.select import advice, select
from analysis.runs.folders import RUNS, Run, list_runs
from analysis.runs.frames import csv_text
from analysis.runs.records import RECORDS, load_records
from analysis.studies import STUDIES, Study
from mambabyte.config.files import (
    MANIFEST,
    check_file,
    made,
    read_toml,
    whole_dir,
    whole_file,
    write_manifest,
)
from mambabyte.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent


def build_report(
    runs_root: Path | str = RUNS,
    out: Path | str = ROOT / "reports" / "report.html",
    *,
    prose: Path | str = ROOT / "reports",
    records_root: Path | str = RECORDS,
    draft: bool = False,
    registry: Mapping[str, Study] = STUDIES,
    report: Callable[[float], None] = lambda done: None,
) -> Path:
    """Writes the article ``out`` and the folder OUT-evidence beside it, which it links to; returns
    the article's path. The same input gives the same bytes.

    ``prose`` holds report.toml and sections/*.md, ``records_root`` the records. UserError, and
    nothing written, where a number of the prose is missing, unmeasured or stale, or where the
    folder is there and is not ours; with ``draft`` missing numbers are marked in the text and stale
    ones are used, with a warning on the page. ``report`` is called with the share that is done.
    """
    out, prose = Path(out), Path(prose)
    config = _load_config(prose / "report.toml")
    check_file(out)  # the evidence is written first: not for an article that cannot be
    folder = _evidence_folder(out)
    runs = list_runs(runs_root)
    ran = {run.study for run in runs}
    current = {name: study.sources_digest(Path(runs_root), Path(records_root))
               if name in ran else "" for name, study in registry.items()}
    selection = select(runs, current, config.profiles, draft)
    missing = [advice(n, why) for n, why in selection.problems.items() if n in registry]
    if missing and not draft:
        raise UserError(missing[0])
    records = load_records(records_root)
    site = Pages(config, selection, records, prose / "sections", registry, draft, out.name,
                 folder.name)
    pages = resolve(site.render(report))
    data = {f"{folder.name}/{path}": text
            for path, text in [*_data([*site.shown, *records.values()]), *site.data()]}
    for name, page in pages.items():
        check_page(page, name, [*pages, *data], draft=draft)
    with whole_dir(folder, ours=made(folder) | {DATA}) as temporary:
        for name, text in {**pages, **data}.items():
            if name != out.name:
                path = temporary / Path(name).relative_to(folder.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8", newline="")
        write_manifest(temporary, command="mambabyte report")
    with whole_file(out) as temporary:
        temporary.write_text(pages[out.name], encoding="utf-8")
    report(1.0)
    return out


def _evidence_folder(out: Path) -> Path:
    """The folder beside the article; UserError where it holds something that is not ours."""
    folder = out.with_name(f"{out.stem}-evidence")
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is there and was not made by this command: move it away, or "
                        "choose another --out")
    return folder


def _data(runs: Iterable[Run]) -> Iterable[tuple[str, str]]:
    """Every table of every run that is shown, and its values, as CSV by path."""
    for run in runs:
        for table in run.tables.values():
            yield data_path(run, table.name), csv_text(table.name, table.frame)
        if run.values:
            rows = [(n, "" if v.value is None else clean(str(v.value)), clean(v.unit),
                     clean(v.about)) for n, v in run.values.items()]
            frame = pd.DataFrame(rows, columns=["name", "value", "unit", "about"], dtype=object)
            yield data_path(run, "values"), csv_text("values", frame)


def _load_config(path: Path) -> Config:
    if not path.is_file():
        raise UserError(f"there is no {path}: the report needs its title and sections")
    try:
        return Config(**read_toml(path))
    except TypeError as error:
        raise UserError(f"{path}: {error}") from None
