"""Study: which statements of the two documents hold, by the numbers of this project."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from analysis.studies.claims.ledger import FirstRun
from mambabyte.errors import UserError

TITLE = "The claims ledger"
QUESTION = "Which statements of the two documents hold, by our numbers?"
NOTEBOOK = "06_claims.ipynb"
READS_RUNS = True


@dataclass(frozen=True)
class Parameters:
    """Where the other studies' runs are, and how the ledger's own experiments are done."""

    # "" is the folder that this run goes to, or the project's own by hand.
    runs_root: str = ""
    # Of the paired trainings below; "auto" is a GPU where there is one, with captured steps.
    device: str = "cpu"
    seed: int = 0
    initial_seeds: int = 4
    fox_batch: int = 1
    # Steps at which a tied head is compared with one of its own; a record has more of them.
    tied_steps: tuple[int, ...] = (60, 180)
    # Seeds and steps of two more comparisons: with each part of the block and without, and trained
    # in parallel by the published scan but streamed by the step.
    paired_seeds: int = 1
    parts_steps: int = 150
    streamed_steps: int = 60

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"device {self.device!r}: choose auto, cpu or cuda")
        for name in ("initial_seeds", "fox_batch", "paired_seeds", "parts_steps",
                     "streamed_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not self.tied_steps or list(self.tied_steps) != sorted({0, *self.tied_steps} - {0}):
            raise UserError(f"tied_steps are {self.tied_steps}: give steps from 1 on in rising "
                            "order, each once")


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
