"""Study: accuracy against energy under the public task's rules."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from mambabyte.errors import UserError

TITLE = "The task: accuracy under an energy cap"
QUESTION = "Which system reaches which accuracy for how many joules?"
NOTEBOOK = "07_task.ipynb"

ENERGY = "energy (J, idle subtracted)"
VALID, HELD_OUT = "validation accuracy", "held-out training text, accuracy"


@dataclass(frozen=True)
class Parameters:
    """``target`` is the accuracy whose price is asked for, ``cap`` the joules that may be spent."""

    target: float = 0.70
    cap: float = 5000.0

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise UserError(f"target is {self.target}: an accuracy lies between 0 and 1")
        if self.cap <= 0:
            raise UserError(f"cap is {self.cap}: give joules above 0")


PROFILES = {"quick": Parameters()}


@dataclass(frozen=True)
class Results:
    """What the records hold."""

    points: pd.DataFrame  # a row a run or trial that ended: what it is, energy, accuracies
    systems: pd.DataFrame  # a row a system and its changes: means and ranges over seeds, cheapest
    crashed: pd.DataFrame  # runs that crashed: system, record, failure
    idle_watts: tuple[float, ...]  # what was subtracted, each value once
    machines: tuple[str, ...]
