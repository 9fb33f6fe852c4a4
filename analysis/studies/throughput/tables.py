"""Captions of the throughput study's tables."""

from __future__ import annotations

import pandas as pd

from analysis.runs.frames import in_words
from analysis.studies.drawing import Words


def crossovers_in_words(crossovers: pd.DataFrame) -> pd.DataFrame:
    """The same with "not by N" where attention is still the faster one at the longest length N, and
    "never" where a mixer takes as many operations at any length."""
    longest = "not by " + crossovers["longest_length"].map("{:,}".format)
    return in_words(in_words(crossovers, "crossover_length", longest),
                    "crossover_in_operations", "never")


WORDED = {"crossovers": crossovers_in_words}
TABLES: dict[str, Words] = {
    "exponents": "Fitted exponents of time against length over the four longest lengths, with 95 % "
                 "intervals, and what each says: slower than linear means that fixed costs are "
                 "still in it, undecided that the interval is wider than 1.",
    "allocation_exponents": "Exponents of bytes against length: all that is allocated, and the "
                            "zero-filled gradients of slices.",
    "crossovers": "The length from which each mixer stays faster than attention, and that of equal "
                  "operations.",
    "training": "Training steps: time, throughput and energy.",
}
