"""Study: which statements of the two documents hold, by the numbers of this project.

The rows are data (data/claims.toml). Each names a check; a check calculates, runs a small
experiment (analysis.studies.claims.experiments.scan, analysis.studies.claims.experiments.trainings)
or reads what the other studies have recorded, and returns a verdict with its number and its source.
Nothing here is remembered: other measurements give other verdicts. A statement whose run is missing
is "not decidable here" and says which study to run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pandas as pd
import torch

from analysis.measure.parallel import run_jobs
from analysis.measure.threads import threads
from analysis.studies.claims import Parameters, Results

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
from analysis.studies.claims.checks.published import first_run
from analysis.studies.claims.evidence import Evidence, gather
from analysis.studies.claims.experiments import choices, streamed, trainings
from analysis.studies.claims.experiments import scan as experiments
from analysis.studies.claims.lab import EXPERIMENTS, Lab, Settings
from analysis.studies.claims.ledger import (
    CHECKS,
    DOCUMENTS,
    KINDS,
    VERDICTS,
    Claim,
    Finding,
    counted,
    load_ledger,
)
from mambabyte.errors import UserError

CHECK_MODULES = (
    arithmetic, behaviour, energy, gradient, hybrid, kernels, memory, numerical, published, quality,
    rivals, speed)
EXPERIMENT_MODULES = (choices, experiments, streamed, trainings)
# The experiments that take the longest, so ordered that a half of them takes half of the time.
TRAININGS = ("gating", "streamed", "fox_published", "second_steps", "artefact", "fox_no_scan",
             "tying", "fox", "fox_fast")


def settle(p: Parameters) -> Parameters:
    """The parameters with what was left to the machine filled in."""
    if p.device == "auto":
        return replace(p, device="cuda" if torch.cuda.is_available() else "cpu")
    return p


def run(
    p: Parameters, report: Callable[[str], None] = lambda line: None
) -> Results:
    """Judges every claim by the runs under ``p.runs_root``."""
    p = settle(p)
    evidence = gather(p.runs_root)
    ledger = load_ledger()
    settings = Settings(p.seed, p.device, p.initial_seeds, p.fox_batch, p.tied_steps,
                        p.paired_seeds, p.parts_steps, p.streamed_steps)
    given = trained_ahead(settings, p.workers, report) if p.workers > 1 else {}
    lab = Lab(settings, evidence, ledger.facts, given, report)
    with threads(1):  # small operations run faster on one core than on two
        frame = ledger_frame(ledger.claims, lab)
        tables = choices.tied_table(lab), choices.parts_table(lab), streamed.streamed_table(lab)
    return Results(frame, count(frame), _evidence_frame(evidence), *tables, first_run(lab))


def trained_ahead(
    settings: Settings, workers: int, report: Callable[[str], None] = lambda line: None
) -> dict[str, float]:
    """The quantities of TRAININGS by name, as a Lab is given them; ``workers`` processes do an
    experiment at a time. They have seeds of their own, so the numbers are the same."""
    report(f"experiments {', '.join(TRAININGS)}, in {min(workers, len(TRAININGS))} processes")
    found: dict[str, float] = {}
    for quantities in run_jobs(
            _measured, [((name,), settings) for name in TRAININGS], workers,
            lambda done, of: report(f"experiments: {done} of {of} done")):
        found |= quantities
    return found


def _measured(names: Sequence[str], settings: Settings) -> dict[str, float]:
    with threads(1):
        return {f"{name}.{quantity}": value for name in names
                for quantity, value in EXPERIMENTS[name](settings).items()}


def ledger_frame(claims: Sequence[Claim], lab: Lab) -> pd.DataFrame:
    """The claims with their findings, one row each."""
    rows = [_row(claim, judge(claim, lab)) for claim in claims]
    return pd.DataFrame(rows, dtype=object)  # None stays None: it reads "not measured"


def judge(claim: Claim, lab: Lab) -> Finding:
    """The finding of one claim; UserError where its check is unknown."""
    if claim.check not in CHECKS:
        raise UserError(f"claim {claim.id!r} names the check {claim.check!r}, which does not exist")
    return CHECKS[claim.check](lab, claim)


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
