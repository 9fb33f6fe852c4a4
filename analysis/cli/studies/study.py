"""Run one study with other parameters; the result is a run folder that the report picks up.

    mambabyte study memory
    mambabyte study overflow --set chunks=16,32,64 --set seed=1
    mambabyte study throughput --profile full
    mambabyte study overflow -f chunks.toml
    mambabyte study ablation --parameters
    mambabyte study gradients --profile full --record data/records/gradients/h200-gradients

With --record it runs here, without Jupyter, and what it finds is kept with the sources: the report
shows it beside the study, marked with this machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from analysis.cli.console import say
from analysis.cli.options import POSITIONAL, REPEATED, parse, print_result
from analysis.cli.studies.sweep import print_rows


@dataclass(frozen=True)
class Options:
    name: Annotated[str, POSITIONAL]
    """One of the studies, e.g. memory; an unknown name lists them."""
    profile: str = "quick"
    """quick (CPU, about a minute) or full (a GPU, longer)."""
    set: Annotated[tuple[str, ...], REPEATED] = ()
    """name=value of a parameter; repeat for more. A list is written 1,2,3."""
    file: Path | None = None
    """-f: parameters from a file, TOML, JSON or YAML by its name; --set overrides it."""
    parameters: bool = False
    """Show the study's parameters, their values and what they are, and stop."""
    force: bool = False
    """Run again what is done already."""
    root: Path = Path("reports/runs")
    """Where run folders are kept."""
    record: Path | None = None
    """Keep the result as a record: the folder, such as data/records/STUDY/NAME."""
    keep: Annotated[tuple[str, ...], REPEATED] = ()
    """A record of these values, tables and figures alone, e.g. 'pieces_*'; repeat for more."""
    title: str = ""
    """The record's heading; the study's own when not given."""
    about: str = ""
    """A line on what was run and why; the study's question when not given."""
    json: bool = False
    """Print the result as JSON."""


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "study", __doc__)

    from analysis.studies import get_study, read_file, split_pairs, validate
    from mambabyte.config.checks import texts

    overrides = {**read_file(options.file), **split_pairs("--set", options.set)}
    if options.parameters:
        values = validate(options.name, overrides, options.profile)
        said = texts(get_study(options.name).module().Parameters)
        print_result(values, options.json, [f"{k} = {v}" + (f"  # {said[k]}" if said[k] else "")
                                            for k, v in values.items()])
        return 0
    if options.record:
        from analysis.studies.session import record

        study = get_study(options.name)
        folder = record(study, validate(study, overrides, options.profile), options.record,
                        title=options.title, about=options.about, patterns=options.keep,
                        report=say)
        print_result({"record": str(folder)}, options.json, [str(folder)])
        return 0
    from analysis.sweep.run import run_sweep

    rows = run_sweep([options.name], profile=options.profile, overrides=overrides,
                     root=options.root, force=options.force)
    return print_rows(rows, options.json)
