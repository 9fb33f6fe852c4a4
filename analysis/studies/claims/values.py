"""The ledger's answer in named values, for the report's prose."""

from __future__ import annotations

import math

from analysis.runs.folders import Value
from analysis.studies.claims import Parameters, Results
from analysis.studies.claims.ledger import DOCUMENTS, OPEN, VERDICTS, FirstRun, counted

NAMES = dict(zip(VERDICTS, ("holds", "caveat", "fails", "inconsistent", "open"), strict=True))


def values(found: Results, p: Parameters) -> dict[str, Value]:
    """The study's answer in named numbers."""
    ledger = counted(found.ledger)
    verdicts = ledger["verdict"]
    named: dict[str, Value] = {
        "n_claims": Value(len(verdicts), "claims", "checkable statements of both documents"),
        "n_not_counted": Value(len(found.ledger) - len(ledger), "claims",
                               "statements that no measurement could contradict, beside them"),
        "n_decided": Value(int((verdicts != OPEN).sum()), "claims", "with a verdict"),
        "n_waiting": Value(int(ledger["source"].str.startswith("study ").sum()), "claims",
                           "undecided for want of a run of another study"),
    }
    for verdict, name in NAMES.items():
        named[f"n_{name}"] = Value(int((verdicts == verdict).sum()), "claims", verdict)
        for document in DOCUMENTS:
            mine = verdicts[ledger["document"] == document]
            named[f"n_{name}_{document}"] = Value(int((mine == verdict).sum()), "claims",
                                                  f"{verdict}, {document} document")
    for document in DOCUMENTS:
        named[f"n_claims_{document}"] = Value(
            int((ledger["document"] == document).sum()), "claims",
            f"statements of the {document} document")
    return named | _published(found.first_run)


def _published(run: FirstRun | None) -> dict[str, Value]:
    """The authors' own run of the first document's system, for the prose."""
    about = "of the authors' own run of the first document's system, as they published it"
    lost = run is not None and math.isfinite(run.first_lost_step)
    return {
        "first_run_ms": Value(run.ms_per_step if run else None, "ms", f"a step {about}"),
        "first_run_steps": Value(
            run.steps_done if run else None, "steps", f"until its end {about}"),
        "first_run_joules": Value(run.joules if run else None, "J", f"until its end {about}"),
        "first_run_finite": Value(run.last_finite_step if run else None, "step",
                                  f"the last logged with a finite loss {about}"),
        "first_run_lost": Value(run.first_lost_step if run and lost else None, "step",
                                f"the first logged with loss nan {about}"),
    }
