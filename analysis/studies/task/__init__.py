"""Study: accuracy against energy under the public task's rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pandas as pd

from mambabyte.config.checks import Checked, Positive, above

TITLE = "The task: accuracy under an energy cap"
QUESTION = "Which system reaches which accuracy for how many joules?"
NOTEBOOK = "07_task.ipynb"

ENERGY = "energy (J, idle subtracted)"
VALID, HELD_OUT = "validation accuracy", "held-out training text, accuracy"


@dataclass(frozen=True)
class Parameters(Checked):
    """What is asked of the recorded runs."""

    target: Annotated[float, above(0, 1)] = 0.70
    """accuracy whose price is asked for, above 0 and at most 1"""
    cap: Positive = 5000.0
    """joules that may be spent"""


PROFILES = {"quick": Parameters()}


@dataclass(frozen=True)
class Results:
    """What the records hold."""

    points: pd.DataFrame  # a row a run or trial that ended: what it is, energy, accuracies
    systems: pd.DataFrame  # a row a system and its changes: means and ranges over seeds, cheapest
    job: pd.DataFrame  # of the record with the most public files: systems and files of one job
    leaders: pd.DataFrame  # each public file of that job, and the cheapest of ours as accurate
    crashed: pd.DataFrame  # runs that crashed: system, record, failure
    idle_watts: tuple[float, ...]  # what was subtracted, each value once
    machines: tuple[str, ...]
