"""Study: is the gradient that crosses a chunk boundary the gradient of the recurrence?

Three parts: the gradient of every form at every boundary (analysis.studies.gradients.boundary), the
model's scan against its own step (analysis.studies.gradients.scan_against_step), and what training
loses whose gradient stops at a boundary (analysis.studies.gradients.truncation).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd
import torch

from analysis.measure.scans import ANY_CHUNK, runnable
from analysis.measure.threads import threads
from analysis.studies.gradients.boundary import (
    Scans,
    boundary_frame,
    distance_frame,
    gradcheck_frame,
)
from analysis.studies.gradients.scan_against_step import DOCUMENT_DIFFERENCE, scan_against_step
from analysis.studies.gradients.truncation import recall_frame
from mambabyte.errors import UserError

# Forms that compute the recurrence and are within their bounds at these decays.
RIGHT = ("sequential", "chunked", "fused", "corrected_cumsum", "pairwise", "segment_sum",
         "associative")


@dataclass(frozen=True)
class Parameters(Scans):
    """The scans that are compared, and the sizes of the recall task. Lengths in steps."""

    corpus: str = "stdlib"
    # Draws of the untrained model's weights for the comparison of scan and step.
    draws: int = 3
    # How far the gradient reaches in training for recall; the last is the whole sequence.
    segments: tuple[int, ...] = (4, 8, 32)
    recall_length: int = 32
    recall_far: int = 8
    recall_steps: int = 200
    recall_seeds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError("no CUDA device is available: set device to cpu")
        if not self.segments:
            raise UserError("no segments are given: name at least one")
        if min(self.draws, self.recall_steps, self.recall_seeds, *self.segments) < 1:
            raise UserError("draws, recall_steps, recall_seeds and segments must be 1 or more")
        if not 1 <= self.recall_far < self.recall_length - 1:
            raise UserError(f"recall_far {self.recall_far} must lie inside recall_length "
                            f"{self.recall_length}")


PROFILES = {
    "quick": Parameters(),
    "full": Parameters(
        forms=ANY_CHUNK, length=512, channels=16, draws=20, segments=(2, 4, 8, 16, 48),
        recall_length=48, recall_far=16, recall_steps=600, recall_seeds=5),
}


@dataclass(frozen=True)
class Gradients:
    """What the study found."""

    boundaries: pd.DataFrame  # error of each gradient at every boundary
    distances: pd.DataFrame  # size and error of the gradient by distance
    checks: pd.DataFrame  # gradcheck, and the comparison that it cannot make
    steps: pd.DataFrame  # scan against step in the untrained model
    recall: pd.DataFrame  # accuracy by distance after truncated training


def run(p: Parameters, report: Callable[[str], None]) -> Gradients:
    """Boundaries, distances, gradcheck, scan against step, recall. Seeded throughout.

    The gradients at boundaries and by distance are those of ``p.device``; the rest is the CPU's.
    """
    p = replace(p, forms=runnable(p.forms))
    with threads(1):
        report("gradients at every boundary")
        boundaries, distances = boundary_frame(p), distance_frame(p)
        report("gradcheck")
        checks = gradcheck_frame(p)
        report("scan against step in the untrained model")
        steps = scan_against_step(p.corpus, p.seed, p.draws)
        recall = recall_frame(
            range(p.seed + 1, p.seed + 1 + p.recall_seeds), p.segments, p.recall_length,
            p.recall_far, p.recall_steps, report)
    return Gradients(boundaries, distances, checks, steps, recall)


def headline(found: Gradients) -> dict[str, tuple[float | bool | int | None, str, str]]:
    """The study's answer in named values: name -> (value, unit, about)."""
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
        "worst_right_form": (float(right["relative error"].max()), "",
                             "largest error of a right form in float32, any boundary"),
        "worst_epsilon": (
            float(single[single["form"] == "epsilon"]["relative error"].max())
            if "epsilon" in set(single["form"]) else None, "",
            "the same of the form with a small constant in the denominator"),
        "document_input_gradient": (100 * float(inputs.max()), "%",
                                    "error of the document's gradient of u, float64"),
        "document_state_gradient": (float(carried.max()), "",
                                    "error of its gradient of the initial state, float64"),
        "document_gradcheck": (bool(found.checks.set_index("form").loc[
            "document_chunked", "gradcheck passes"]), "", "its gradcheck passes")
        if "document_chunked" in set(found.checks["form"]) else (None, "", "not in this run"),
        "truncated_a": (100 * float(cut["relative error"].mean()), "%",
                        "error of the gradient of A when the carry is cut, mean of boundaries"),
        "difference_float32": (float(own.loc[["float32"], logits].mean()), "%",
                               "logits, document's scan against step, mean of draws"),
        "difference_float64": (float(own.loc[["float64"], logits].mean()), "%",
                               "the same in float64"),
        "difference_low": (float(own.loc[["float64"], logits].min()), "%", "lowest draw"),
        "difference_high": (float(own.loc[["float64"], logits].max()), "%", "highest draw"),
        "difference_scan_alone": (float(own.loc[["float64"], alone].mean()), "%",
                                  "output of the first layer's scan alone, float64"),
        "rounding_float32": (float(chunked.loc[["float32"], logits].mean()), "%",
                             "logits, a right chunked scan against step, float32"),
        "document_difference": (DOCUMENT_DIFFERENCE, "%", "as the document measured it"),
        "steps_to_learn_full": (reach(anywhere, longest, "steps to learn"), "steps",
                                "recall at any distance, nothing cut"),
        "steps_to_learn_cut": (reach(anywhere, shortest, "steps to learn"), "steps",
                               "the same, gradient cut at the shortest segment"),
        "shortest_segment": (int(shortest), "steps", "shortest reach of the gradient"),
        "far_full": (reach(far, longest, "accuracy"), "",
                     "accuracy, trained on far symbols only, nothing cut"),
        "far_cut": (reach(far, far["gradient reaches, steps"].min(), "accuracy"), "",
                    "the same, gradient cut short of the distance"),
    }
