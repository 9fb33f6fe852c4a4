"""Captions of the task study's tables."""

from __future__ import annotations

from analysis.studies.drawing import Words

TABLES: dict[str, Words] = {
    "systems": "Systems by energy: means and ranges over seeds, on the validation split.",
    "job": "Systems and public files of one job: means and ranges over seeds, validation split.",
    "leaders": "Public files of that job, and the cheapest of ours, every seed of it as accurate.",
    "crashed": "Runs that crashed, and why.",
}
