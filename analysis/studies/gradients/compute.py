"""Study: is the gradient that crosses a chunk boundary the gradient of the recurrence?

Four parts: the gradient of every form at every boundary (analysis.studies.gradients.boundary), that
of every mixer at one (analysis.studies.gradients.mixers), the model's scan against its own step
(analysis.studies.gradients.scan_against_step), and what training loses whose gradient stops at a
boundary (analysis.studies.gradients.truncation).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from analysis.measure.scans import runnable
from analysis.measure.threads import threads
from analysis.studies.gradients import Parameters, Results
from analysis.studies.gradients.boundary import boundary_frame, distance_frame, gradcheck_frame
from analysis.studies.gradients.mixers import mixer_frame
from analysis.studies.gradients.scan_against_step import scan_against_step
from analysis.studies.gradients.truncation import learning_frame, recall_frame


def run(p: Parameters, report: Callable[[str], None]) -> Results:
    """Boundaries, distances, gradcheck, scan against step, recall. Seeded throughout.

    The gradients at boundaries and by distance are those of ``p.device``; the rest is the CPU's.
    """
    p = replace(p, forms=runnable(p.forms))
    with threads(1):
        report("gradients at every boundary")
        boundaries, distances = boundary_frame(p), distance_frame(p)
        report("every mixer at a boundary")
        mixers = mixer_frame(p)
        report("gradcheck")
        checks = gradcheck_frame(p)
        report("scan against step in the untrained model")
        steps = scan_against_step(p.corpus, p.seed, p.draws)
        recall = recall_frame(
            range(p.seed + 1, p.seed + 1 + p.recall_seeds), p.segments, p.recall_length,
            p.recall_far, p.recall_steps, report)
    return Results(boundaries, distances, mixers, checks, steps, recall, learning_frame(recall))
