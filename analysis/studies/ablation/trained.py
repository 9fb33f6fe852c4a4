"""Trained runs in tables: what each cost and reached, its curve, its quality along a stream."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from torch import Tensor

from analysis.measure.statistics import text_error
from analysis.runs.frames import not_measured
from analysis.studies.ablation.budgets import Runs, step_costs
from analysis.studies.ablation.learning import position_bits, window_bits
from mambabyte.config.mixers import uses_window
from mambabyte.evaluate import Score
from mambabyte.model import ByteLM
from mambabyte.stream import ByteStream


def with_quality(
    systems: pd.DataFrame, comparisons: pd.DataFrame,
    models: Mapping[tuple[str, int], ByteLM], context: int,
) -> pd.DataFrame:
    """The systems with their mean bits per byte at equal steps and the state that was counted.

    ``models`` are by pattern and seed; the state is that of a stream after one ``context``.
    """
    equal = comparisons[comparisons["comparison"] == "steps"]
    bits = equal.groupby("pattern")["bits_per_byte"].mean()
    counted = {}
    for (pattern, _), model in models.items():
        if pattern not in counted:  # every seed has the same state
            stream = ByteStream(model)
            stream.feed(bytes(context - 1))  # with the start byte: one context
            counted[pattern] = stream.state_bytes()
    return systems.assign(
        state_bytes_counted=systems["pattern"].map(counted),
        bits_per_byte=systems["pattern"].map(bits),
    )


def runs_table(
    learned: Runs, flops: Mapping[str, float], bytes_per_step: int,
    scores: Mapping[tuple[str, int, int], Score],
) -> pd.DataFrame:
    """One row a run: its cost, and its quality on held-out windows and, if scored, in a stream.

    ``flops`` are those of training, a byte, by pattern.
    """
    rows = []
    for (pattern, seed, asked), done in learned.items():
        scored = scores.get((pattern, seed, asked))
        data = done.steps * bytes_per_step
        rows.append({
            "pattern": pattern, "seed": seed, "steps": done.steps, "trained_bytes": data,
            "ms_per_step": 1e3 * done.step_seconds,
            "bytes_per_second": bytes_per_step / done.step_seconds,
            "train_flops": flops[pattern] * data,
            "joules": done.joules, "heldout_bits_per_byte": done.curve[-1][1],
            "stream_bits_per_byte": scored.bits_per_byte if scored else None,
            "char_accuracy": scored.char_accuracy if scored else None,
            "characters": scored.characters if scored else None,
            "ended": "time limit" if done.stopped_early else "all steps",
        })
    return not_measured(pd.DataFrame(rows))


def curves_table(
    learned: Runs, flops: Mapping[str, float], bytes_per_step: int, steps: int
) -> pd.DataFrame:
    """Held-out bits per byte along every run of ``steps`` steps, against each measure of cost."""
    costs = step_costs(learned, flops, bytes_per_step)
    return pd.DataFrame(
        {"pattern": pattern, "seed": seed, "step": step,
         "seconds": step * costs.loc[pattern, "wall-clock"],
         "train_flops": step * flops[pattern] * bytes_per_step, "bits_per_byte": bits}
        for (pattern, seed, asked), done in learned.items() if asked == steps
        for step, bits in done.curve
    )


def positions_table(
    models: Mapping[tuple[str, int], ByteLM], streams: Tensor, context: int
) -> pd.DataFrame:
    """Bits per byte by position in ``streams`` (n, length + 1) of models by pattern and seed.

    The first seed of a pattern with attention is shown with a cache of all keys too.
    """
    frames = []
    shown: set[str] = set()
    for (pattern, seed), model in models.items():
        caches = [("window" if uses_window(pattern) else "state", False)]
        # A cache that keeps every key costs length^2: a few contexts show what it does.
        if uses_window(pattern) and pattern not in shown:
            caches.append(("all keys", True))
        shown.add(pattern)
        for cache, unbounded in caches:
            part = streams[:, : 16 * context + 1] if unbounded else streams
            frame = position_bits(model, part, context, unbounded=unbounded)
            frames.append(frame.assign(pattern=pattern, seed=seed, cache=cache))
    joined = pd.concat(frames, ignore_index=True)
    return joined[["pattern", "cache", "seed", "first_position", "last_position",
                   "bits_per_byte", "drift_bits"]].pipe(not_measured)


def accuracy_by_position(
    scores: Mapping[tuple[str, int, int], Score], context: int
) -> pd.DataFrame:
    """Share of characters predicted right by position in one stream, a column a pattern, the mean
    over seeds; bins double from ``context`` on."""
    rows = []
    for (pattern, _, _), scored in scores.items():
        low, high = 0, context
        while low < len(scored.hits):
            part = scored.hits[low:high]
            rows.append({"pattern": pattern, "first character": low,
                         "last character": low + len(part) - 1, "accuracy": float(part.mean())})
            low, high = high, 2 * high
    if not rows:
        return pd.DataFrame()
    return pd.DataFrame(rows).pivot_table(
        index=["first character", "last character"], columns="pattern", values="accuracy",
        sort=False).rename_axis(columns=None).reset_index()


def text_table(
    models: Mapping[tuple[str, int], ByteLM], windows: Tensor, reference: str
) -> pd.DataFrame:
    """What held-out ``windows`` (n, context + 1) leave open, a row a pattern: another text of that
    length would give other means. Windows lie apart, so each counts as one draw."""
    bits: dict[str, list[np.ndarray]] = {}
    for (pattern, _), model in models.items():
        bits.setdefault(pattern, []).append(window_bits(model, windows))
    means = {pattern: np.mean(rows, 0) for pattern, rows in bits.items()}

    def row(pattern: str, each: np.ndarray) -> dict[str, object]:
        apart = each - means[reference]
        own = pattern == reference
        return {"pattern": pattern, "held-out bytes": windows[:, 1:].numel(),
                "bits per byte": float(each.mean()), "error over the text": text_error(each, 1),
                f"minus {reference}": None if own else float(apart.mean()),
                "its error": None if own else text_error(apart, 1)}

    return pd.DataFrame([row(*item) for item in means.items()])


def unigram_bits(train: np.ndarray, windows: Tensor) -> float:
    """Bits per byte of the held-out targets under the byte frequencies of the training split.

    What a model reaches that knows which bytes are common and nothing of their order; every byte
    value is counted once more than it occurs.
    """
    counts = np.bincount(np.asarray(train), minlength=256) + 1.0
    return float(-np.log2(counts / counts.sum())[windows[:, 1:].numpy()].mean())
