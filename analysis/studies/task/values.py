"""The task study's answer in named values, for the report's prose and the claims ledger."""

from __future__ import annotations

from analysis.runs.folders import Value
from analysis.studies.task import VALID, Parameters, Results


def values(found: Results, p: Parameters) -> dict[str, Value]:
    """The study's answer in named numbers."""
    systems = found.systems
    reach = systems[systems[VALID] >= p.target]
    afford = systems[systems["energy (J)"] <= p.cap].sort_values(VALID)
    pure = systems[(systems["kind"] == "SSM") & ~systems["with n-gram"].astype(bool)]
    return {
        "runs": Value(int((~found.points["trial"]).sum()), "runs", "whole runs that ended"),
        "trials": Value(int(found.points["trial"].sum()), "trials", "single trials that ended"),
        "crashed": Value(len(found.crashed), "runs", "that crashed and are not drawn"),
        "idle_watts": Value(found.idle_watts[0] if len(found.idle_watts) == 1 else None, "W",
                            "subtracted for the idle card"),
        "machines": Value(", ".join(found.machines), "", "that the runs and trials took place on"),
        "cheapest": Value(None if reach.empty else str(reach["system"].iloc[0]), "",
                          f"cheapest system with {p.target} on the validation split"),
        "cheapest_joules": Value(None if reach.empty else float(reach["energy (J)"].iloc[0]), "J",
                                 "what it takes"),
        "best_under_cap": Value(None if afford.empty else str(afford["system"].iloc[-1]), "",
                                f"most accurate system within {p.cap:,.0f} J"),
        "best_under_cap_accuracy": Value(
            None if afford.empty else float(afford[VALID].iloc[-1]), "",
            "its accuracy, mean over seeds"),
        "share_of_leaders": Value(
            None if found.leaders["share (%)"].isna().any() or found.leaders.empty
            else float(found.leaders["share (%)"].max()), "%",
            "joules of the cheapest of ours as accurate, of a public file's in the same job; the "
            "largest"),
        "pure_ssm_accuracy": Value(None if pure.empty else float(pure[VALID].max()), "",
                                   "best network of SSM layers alone without an n-gram"),
    }
