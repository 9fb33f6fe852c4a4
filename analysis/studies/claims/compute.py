"""Study: which statements of the two documents hold, by the numbers of this project.

The rows are data (data/claims.toml). Each names a check; a check calculates, runs a small
experiment (analysis.studies.claims.experiments.scan, analysis.studies.claims.experiments.trainings)
or reads what the other studies have recorded, and returns a verdict with its number and its source.
Nothing here is remembered: other measurements give other verdicts. A statement whose run is missing
is "not decidable here" and says which study to run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

# Importing these registers their checks and experiments.
from analysis.studies.claims.checks import (
    arithmetic,
    behaviour,
    energy,
    gradient,
    hybrid,
    kernels,
    memory,
    numerical,
    published,
    quality,
    rivals,
    speed,
)
from analysis.studies.claims.checks.published import FirstRun, first_run
from analysis.studies.claims.evidence import Evidence, gather
from analysis.studies.claims.experiments import choices, streamed, trainings
from analysis.studies.claims.experiments import scan as experiments
from analysis.studies.claims.lab import Lab, Settings
from analysis.studies.claims.ledger import (
    CHECKS,
    DOCUMENTS,
    KINDS,
    OPEN,
    VERDICTS,
    Claim,
    Finding,
    load_ledger,
)
from mambabyte.errors import UserError

__all__ = ["PROFILES", "Claims", "Parameters", "headline", "judge", "run"]

CHECK_MODULES = (
    arithmetic, behaviour, energy, gradient, hybrid, kernels, memory, numerical, published, quality,
    rivals, speed)
EXPERIMENT_MODULES = (choices, experiments, streamed, trainings)
NAMES = dict(zip(VERDICTS, ("holds", "caveat", "fails", "inconsistent", "open"), strict=True))


@dataclass(frozen=True)
class Parameters:
    """Where the other studies' runs are, and how the ledger's own experiments are done."""

    # "" is the folder that this run goes to, or the project's own where it has none.
    runs_root: str = ""
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
        for name in ("initial_seeds", "fox_batch", "paired_seeds", "parts_steps",
                     "streamed_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not self.tied_steps or list(self.tied_steps) != sorted({0, *self.tied_steps} - {0}):
            raise UserError(f"tied_steps are {self.tied_steps}: give steps from 1 on in rising "
                            "order, each once")


PROFILES = {"quick": Parameters(),
            "full": Parameters(initial_seeds=16, fox_batch=8, tied_steps=(100, 300, 1000, 3000),
                               paired_seeds=3, parts_steps=1500, streamed_steps=600)}


@dataclass(frozen=True)
class Claims:
    """The ledger with its verdicts, and how many of each there are."""

    ledger: pd.DataFrame  # one row a claim
    counts: pd.DataFrame  # verdict by document and kind
    evidence: pd.DataFrame  # the runs and records that were read
    tied: pd.DataFrame  # a tied head against one of its own
    parts: pd.DataFrame  # the block without each of its parts against the whole
    streamed: pd.DataFrame  # trained by the published scan, streamed by the step
    first_run: FirstRun | None = None  # what the first document's authors published of theirs


def run(
    p: Parameters, report: Callable[[str], None] = lambda line: None, run_dir: str = ""
) -> Claims:
    """Judges every claim. ``run_dir`` is where this run will be written, beside the others."""
    root = p.runs_root or (str(Path(run_dir).parent) if run_dir else "")
    evidence = gather(root)
    ledger = load_ledger()
    settings = Settings(p.seed, p.initial_seeds, p.fox_batch, p.tied_steps, p.paired_seeds,
                        p.parts_steps, p.streamed_steps)
    lab = Lab(settings, evidence, ledger.facts, report=report)
    with _one_thread():
        frame = ledger_frame(ledger.claims, lab)
        tables = choices.tied_table(lab), choices.parts_table(lab), streamed.streamed_table(lab)
    return Claims(frame, count(frame), _evidence_frame(evidence), *tables, first_run(lab))


def ledger_frame(claims: Sequence[Claim], lab: Lab) -> pd.DataFrame:
    """The claims with their findings, one row each."""
    rows = [_row(claim, judge(claim, lab)) for claim in claims]
    return pd.DataFrame(rows, dtype=object)  # None stays None: it reads "not measured"


def judge(claim: Claim, lab: Lab) -> Finding:
    """The finding of one claim; UserError where its check is unknown."""
    if claim.check not in CHECKS:
        raise UserError(f"claim {claim.id!r} names the check {claim.check!r}, which does not exist")
    return CHECKS[claim.check](lab, claim)


def counted(ledger: pd.DataFrame) -> pd.DataFrame:
    """The rows whose verdict some measurement could have changed."""
    return ledger[ledger["cannot fail"] == ""]


def count(ledger: pd.DataFrame) -> pd.DataFrame:
    """Claims by document, kind and verdict; a row for every combination of the first two. Those
    that cannot fail are not among them."""
    ledger = counted(ledger)
    rows = []
    for document in DOCUMENTS:
        for kind in KINDS:
            mine = ledger[(ledger["document"] == document) & (ledger["kind"] == kind)]["verdict"]
            if len(mine):
                rows.append({"document": document, "kind": kind,
                             **{v: int((mine == v).sum()) for v in VERDICTS}, "all": len(mine)})
    return pd.DataFrame(rows)


def headline(found: Claims) -> dict[str, tuple[float | int | None, str, str]]:
    """The study's answer in named values: name -> (value, unit, about)."""
    ledger = counted(found.ledger)
    verdicts = ledger["verdict"]
    values: dict[str, tuple[float | int | None, str, str]] = {
        "n_claims": (len(verdicts), "claims", "checkable statements of both documents"),
        "n_not_counted": (len(found.ledger) - len(ledger), "claims",
                          "statements that no measurement could contradict, beside them"),
        "n_decided": (int((verdicts != OPEN).sum()), "claims", "with a verdict"),
        "n_waiting": (int(ledger["source"].str.startswith("study ").sum()), "claims",
                      "undecided for want of a run of another study"),
    }
    for verdict, name in NAMES.items():
        values[f"n_{name}"] = (int((verdicts == verdict).sum()), "claims", verdict)
        for document in DOCUMENTS:
            mine = verdicts[ledger["document"] == document]
            values[f"n_{name}_{document}"] = (int((mine == verdict).sum()), "claims",
                                              f"{verdict}, {document} document")
    for document in DOCUMENTS:
        values[f"n_claims_{document}"] = (int((ledger["document"] == document).sum()),
                                          "claims", f"statements of the {document} document")
    return values | _published(found.first_run)


def _published(run: FirstRun | None) -> dict[str, tuple[float | int | None, str, str]]:
    """The authors' own run of the first document's system, for the prose."""
    about = "of the authors' own run of the first document's system, as they published it"
    lost = run is not None and math.isfinite(run.first_lost_step)
    return {
        "first_run_ms": (run.ms_per_step if run else None, "ms", f"a step {about}"),
        "first_run_steps": (run.steps_done if run else None, "steps", f"until its end {about}"),
        "first_run_joules": (run.joules if run else None, "J", f"until its end {about}"),
        "first_run_finite": (run.last_finite_step if run else None, "step",
                             f"the last logged with a finite loss {about}"),
        "first_run_lost": (run.first_lost_step if run and lost else None, "step",
                           f"the first logged with loss nan {about}"),
    }


def _row(claim: Claim, finding: Finding) -> dict[str, str | None]:
    """In the order in which it is read: a page shows the first columns without scrolling."""
    return {
        "claim": claim.claim, "verdict": finding.verdict, "theirs": claim.theirs,
        "ours": finding.ours, "reason": finding.reason, "source": finding.source,
        "document": claim.document, "where": claim.where, "kind": claim.kind, "id": claim.id,
        "check": claim.check, "note": claim.note, "cannot fail": claim.cannot_fail,
        "insensitive": claim.insensitive,
    }


def _evidence_frame(evidence: Evidence) -> pd.DataFrame:
    rows = [{"study": r.study, "run or record": r.run_id or r.folder.name,
             "profile": r.profile or "own parameters", "date": str(r.provenance.get("date", ""))}
            for r in (*evidence.runs, *evidence.records)]
    rows += [{"study": name, "run or record": "out of date", "profile": "", "date": ""}
             for name in evidence.stale]
    return pd.DataFrame(rows, columns=["study", "run or record", "profile", "date"])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small operations run faster on one core than on two that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
