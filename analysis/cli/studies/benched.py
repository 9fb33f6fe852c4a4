"""What the benches of the command line share: a device, a record, a way to print."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.cli.options import pick_device, print_result
from mambabyte.config.checks import DeviceOrAuto

if TYPE_CHECKING:
    import pandas as pd

    from analysis.runs.folders import Run


@dataclass(frozen=True)
class Common:
    device: DeviceOrAuto = "auto"
    """auto, cpu, cuda or cuda:N; auto is a GPU where there is one."""
    record: Path | None = None
    """Also keep the table, with machine, date, versions, commit and command, as a record: the
    folder, such as data/records/throughput/NAME."""
    json: bool = False
    """Print the result as JSON."""


def checked(options: Common) -> str:
    """The device; UserError where the record cannot be kept, now and not after the measurement."""
    from analysis.runs.records import check_record_folder

    if options.record:
        check_record_folder(options.record)
    return pick_device(options.device)


def run_of(
    parameters: dict[str, Any], values: Mapping[str, tuple[Any, str, str]],
    tables: dict[str, tuple[str, pd.DataFrame]], title: str, about: str,
) -> Run:
    """What a record keeps."""
    from analysis.runs.folders import Run, Value, tables_of

    return Run("throughput", parameters, {name: Value(*value) for name, value in values.items()},
               tables_of(tables), title=title, about=about)


def keep(options: Common, run: Run) -> None:
    """The result as a record, where one was asked for."""
    from analysis.runs.records import write_record_folder

    if options.record:
        write_record_folder(run, options.record)


def printed(
    options: Common, found: dict[str, Any], lines: list[str], run: Run | None = None
) -> int:
    """The result on stdout, and ``run`` as a record."""
    from mambabyte.config.provenance import provenance

    print_result({**found, "provenance": provenance()}, options.json, lines,
                 lambda: None if run is None else keep(options, run))
    return 0
