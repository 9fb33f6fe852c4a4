"""Captions of the task study's tables."""

from __future__ import annotations

from analysis.studies.drawing import Words

TABLES: dict[str, Words] = {
    "systems": "Systems by energy: means and ranges over seeds, on the validation split.",
    "crashed": "Runs that crashed, and why.",
}
