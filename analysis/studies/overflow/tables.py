"""Captions of the overflow study's tables."""

from __future__ import annotations

from analysis.studies.drawing import Words

TABLES: dict[str, Words] = {
    "verdicts": "How often each form fails over all cells, and its worst error where it is finite. "
                "Inputs of a precision: rounded to it, all arithmetic in float32.",
    "errors": "The map: largest relative error of the value and of the worst gradient against "
              "float64, a column for each decay in nats a step.",
    "first": "First chunk size at which the error of the value or of a gradient passes a threshold "
             "or becomes inf or nan, a column for each decay in nats a step, and the analytic "
             "bound. What happens at no decay has no row; a nan passes every threshold.",
    "mixers": "Every mixer with decays: the exponents that a cumulated sum would take, the longest "
              "chunk that float32 would leave it, and the largest relative error of the mixer's "
              "own operator against its definition in float64. Decays grow with the scale of the "
              "input; bf16 rounds what both are given.",
    "document": "The document's statements about overflow, in its numbers and in ours.",
    "endings": "How training with each form ended.",
    "extrapolated": "Largest exponent at the end of the document's 4000 steps, by a line over the "
                    "sum of learning rates. A guess beyond what was trained, so none from less "
                    "than half of it.",
    "crossing": "One step with one channel set below and above the bound.",
}
