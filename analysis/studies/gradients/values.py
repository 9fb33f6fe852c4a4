"""The gradient study's answer in named values, for the report's prose and the claims ledger."""

from __future__ import annotations

import pandas as pd

from analysis.runs.folders import Value
from analysis.studies.gradients import DOCUMENT_DIFFERENCE, Parameters, Results

# Forms that compute the recurrence and are within their bounds at these decays.
RIGHT = ("recurrent", "chunked", "fused", "corrected_cumsum", "pairwise", "segment_sum",
         "associative")


def values(found: Results, p: Parameters) -> dict[str, Value]:
    """The study's answer in named numbers."""
    errors = found.boundaries
    single = errors[errors["precision"] == "float32"]
    right = single[single["form"].isin(RIGHT)]
    document = errors[(errors["form"] == "document_chunked")
                      & (errors["precision"] == "float64")]
    carried = document[document["gradient"] == "d initial state"]["relative error"]
    inputs = document[document["gradient"] == "d u"]["relative error"]
    cut = errors[(errors["form"] == "truncated") & (errors["gradient"] == "d A")]
    own = found.steps[(found.steps["form"] == "document_chunked")
                      & (found.steps["dt"] == "log-uniform")].set_index("precision")
    chunked = found.steps[found.steps["form"] == "chunked"].set_index("precision")
    logits, alone = "logits, relative RMS, %", "scan alone, relative RMS, %"
    recall = found.recall
    longest = recall["gradient reaches, steps"].max()
    shortest = recall["gradient reaches, steps"].min()
    far = recall[recall["task"] == "far only"]
    anywhere = recall[recall["task"] == "any distance"]

    def reach(frame: pd.DataFrame, segment: float, column: str) -> float | None:
        """Mean over seeds and distances; None where nothing was trained so, or a seed never
        learned: a mean of those that did would flatter."""
        values = frame[frame["gradient reaches, steps"] == segment][column]
        return float(values.mean()) if len(values) and values.notna().all() else None

    return {
        "worst_right_form": Value(float(right["relative error"].max()), "",
                                  "largest error of a right form in float32, any boundary"),
        "worst_epsilon": Value(
            float(single[single["form"] == "epsilon"]["relative error"].max())
            if "epsilon" in set(single["form"]) else None, "",
            "the same of the form with a small constant in the denominator"),
        "document_input_gradient": Value(100 * float(inputs.max()), "%",
                                         "error of the document's gradient of u, float64"),
        "document_state_gradient": Value(float(carried.max()), "",
                                         "error of its gradient of the initial state, float64"),
        "document_gradcheck": Value(bool(found.checks.set_index("form").loc[
            "document_chunked", "gradcheck passes"]), "", "its gradcheck passes")
        if "document_chunked" in set(found.checks["form"]) else Value(None, "", "not in this run"),
        "truncated_a": Value(
            100 * float(cut["relative error"].mean()), "%",
            "error of the gradient of A when the carry is cut, mean of boundaries"),
        "difference_float32": Value(float(own.loc[["float32"], logits].mean()), "%",
                                    "logits, document's scan against step, mean of draws"),
        "difference_float64": Value(float(own.loc[["float64"], logits].mean()), "%",
                                    "the same in float64"),
        "difference_low": Value(float(own.loc[["float64"], logits].min()), "%", "lowest draw"),
        "difference_high": Value(float(own.loc[["float64"], logits].max()), "%", "highest draw"),
        "difference_scan_alone": Value(float(own.loc[["float64"], alone].mean()), "%",
                                       "output of the first layer's scan alone, float64"),
        "rounding_float32": Value(float(chunked.loc[["float32"], logits].mean()), "%",
                                  "logits, a right chunked scan against step, float32"),
        "document_difference": Value(DOCUMENT_DIFFERENCE, "%", "as the document measured it"),
        "steps_to_learn_full": Value(reach(anywhere, longest, "steps to learn"), "steps",
                                     "recall at any distance, nothing cut"),
        "steps_to_learn_cut": Value(reach(anywhere, shortest, "steps to learn"), "steps",
                                    "the same, gradient cut at the shortest segment"),
        "shortest_segment": Value(int(shortest), "steps", "shortest reach of the gradient"),
        "far_full": Value(reach(far, longest, "accuracy"), "",
                          "accuracy, trained on far symbols only, nothing cut"),
        "far_cut": Value(reach(far, far["gradient reaches, steps"].min(), "accuracy"), "",
                         "the same, gradient cut short of the distance"),
    }
