"""Captions of the gradient study's tables."""

from __future__ import annotations

from analysis.studies.drawing import Words

TABLES: dict[str, Words] = {
    "mixers": "Every mixer at one boundary: relative error, in float32, of the gradient of a loss "
              "on the later half, against the mixer in float64 one byte at a time. A detached "
              "state loses what crosses.",
    "checks": "float64 gradcheck of each form over two boundaries, and what it cannot see: the "
              "distance of value and gradients from the recurrence.",
    "learning": "Steps until the loss of recall falls below 0.1, and accuracy over all distances.",
}
