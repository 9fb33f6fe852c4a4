"""Study: which statements of the two documents hold, by the numbers of this project."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pandas as pd

from analysis.studies.claims.ledger import FirstRun
from mambabyte.config.checks import Checked, Count, Seed, Workers, entries

TITLE = "The claims ledger"
QUESTION = "Which statements of the two documents hold, by our numbers?"
NOTEBOOK = "06_claims.ipynb"
READS_RUNS = True


@dataclass(frozen=True)
class Parameters(Checked):
    """Where the other studies' runs are, and how the ledger's own experiments are done."""

    runs_root: str = ""
    """folder of the other studies' runs; empty is where this run goes"""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """where the paired trainings run: cpu, cuda or auto"""
    seed: Seed = 0
    """of the small experiments"""
    initial_seeds: Count = 4
    """draws of the untrained model"""
    fox_batch: Count = 1
    """sequences of the second document's example"""
    tied_steps: Annotated[tuple[Count, ...], entries(rising=True)] = (60, 180)
    """steps at which a tied head is compared with one of its own, rising"""
    paired_seeds: Count = 1
    """seeds of the paired trainings"""
    parts_steps: Count = 150
    """training steps with each part of the block and without"""
    streamed_steps: Count = 60
    """training steps by the published scan, to be streamed by the step"""
    workers: Workers = 2
    """processes that share the trainings"""


PROFILES = {"quick": Parameters(),
            "full": Parameters(device="auto", initial_seeds=16, fox_batch=8,
                               tied_steps=(100, 300, 1000, 3000), paired_seeds=3,
                               parts_steps=1500, streamed_steps=600)}


@dataclass(frozen=True)
class Results:
    """The ledger with its verdicts, and how many of each there are."""

    ledger: pd.DataFrame  # one row a claim
    counts: pd.DataFrame  # verdict by document and kind
    evidence: pd.DataFrame  # the runs and records that were read
    tied: pd.DataFrame  # a tied head against one of its own
    parts: pd.DataFrame  # the block without each of its parts against the whole
    streamed: pd.DataFrame  # trained by the published scan, streamed by the step
    first_run: FirstRun | None = None  # what the first document's authors published of theirs
