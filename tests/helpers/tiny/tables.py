"""Captions."""

from __future__ import annotations

from analysis.studies.drawing import Words

TABLES: dict[str, Words] = {
    "counts": lambda run: f"Lengths, of which twice are {run.values['twice'].value}."}
