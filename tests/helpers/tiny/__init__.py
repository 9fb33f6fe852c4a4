"""A study of two tables and one figure, for tests of what runs and reads studies."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

TITLE = "Tiny"
QUESTION = "Is it small?"
NOTEBOOK = "08_tiny.ipynb"


@dataclass(frozen=True)
class Parameters:
    n: int = 3
    """How many lengths."""


PROFILES = {"quick": Parameters()}


@dataclass(frozen=True)
class Results:
    lengths: pd.DataFrame
    counts: pd.DataFrame
    empty: pd.DataFrame
