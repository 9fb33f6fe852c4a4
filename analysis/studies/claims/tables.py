"""Captions of the ledger's tables."""

from __future__ import annotations

from analysis.studies.drawing import Words

TABLES: dict[str, Words] = {
    "evidence": "Runs and records that the checks have read.",
    "ledger": "Every checkable statement of the two documents: the claim, the verdict, their "
              "number and ours, the reason, and the run that our number comes from.",
    "tied": "A head tied to the embedding against one of its own, small models on one text: "
            "held-out bits per byte after so many steps.",
    "parts": "A block without selection, gate or convolution against the whole one, small models "
             "on one text: held-out bits per byte that the part was worth, by seed.",
    "streamed": "Models trained in parallel by the published scan, scored in parallel and streamed "
                "by the step: held-out bits per byte and accuracy, by seed.",
}
