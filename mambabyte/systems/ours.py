"""Submission to the public task: the system "ours" of mambabyte.task."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from wikitext import CharModel

if importlib.util.find_spec("mambabyte") is None:  # imported by path from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mambabyte.harness import submit


def train(train_text: str, valid_text: str | None = None) -> CharModel:
    """Train on ``train_text`` alone; the validation text is not looked at."""
    return submit("ours", train_text, CharModel)
