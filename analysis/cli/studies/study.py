"""Run one study with other parameters; the result is a run folder that the report picks up.

    mambabyte study memory
    mambabyte study overflow --set chunks=16,32,64 --set seed=1
    mambabyte study throughput --profile full
    mambabyte study ablation --parameters
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from analysis.cli.options import parse, print_result
from analysis.cli.studies.sweep import print_rows
from analysis.studies import split_pairs


@dataclass(frozen=True)
class Options:
    name: Annotated[str, tyro.conf.Positional]
    """memory, overflow, gradients, ablation, throughput, task or claims."""
    profile: str = "quick"
    """quick (CPU, about a minute) or full (a GPU, longer)."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """name=value of a parameter; repeat for more. A list is written 1,2,3."""
    parameters: bool = False
    """Show the study's parameters and their values, and stop."""
    force: bool = False
    """Run again what is done already."""
    root: Path = Path("reports/runs")
    """Where run folders are kept."""
    json: bool = False
    """Print the result as JSON."""


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "study", __doc__)

    from analysis.studies import validate
    from analysis.sweep.run import run_sweep

    overrides = split_pairs("--set", options.set)
    if options.parameters:
        values = validate(options.name, overrides, options.profile)
        print_result(values, options.json, [f"{k} = {v}" for k, v in values.items()])
        return 0
    rows = run_sweep([options.name], profile=options.profile, overrides=overrides,
                     root=options.root, force=options.force)
    return print_rows(rows, options.json)
