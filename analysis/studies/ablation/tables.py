"""The ablation study's tables: captions, and the paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from analysis.measure.statistics import paired_difference, paired_table
from analysis.runs.frames import not_measured
from analysis.studies.ablation import COMPARISONS
from analysis.studies.drawing import Words

TABLES: dict[str, Words] = {
    "systems": "Every system: size, training operations per byte, streaming state after one "
               "training context (closed form and counted), and held-out bits per byte at equal "
               "steps.",
    "flops": "Operations per byte by module: forward, backward, and the exponentials of the "
             "forward pass, which run on other units.",
    "flop_check": "Closed form beside torch's counter, for what that counts. It takes the gradient "
                  "of a depthwise convolution's taps for that of a full one: hence the small "
                  "ratios there.",
    "runs": "Every run: cost, held-out bits per byte in fresh windows and as a stream, and greedy "
            "character accuracy.",
    "paired": "Mean paired differences, bits per byte, with the points and the 95 % interval that "
              "they give.",
    "text": "The held-out text as a sample: its bytes, and the error that its windows leave in "
            "each mean over seeds, and in its difference to the reference on the same windows.",
    "accuracy": "Greedy character accuracy by position in one stream from the start of the split.",
    "variants": "Variants: bits per byte and the half-life of the slowest state.",
    "state_dtypes": "The dtype of the state in the second document's loop: allocated in bfloat16, "
                    "float32 after one step.",
    "documents": "Statements that arithmetic judges: theirs and ours.",
    "tokens": "Subword pieces: bits per raw byte, every byte counted once.",
    "few_steps": "The second document's few large steps at full learning rate: bits per raw byte.",
}


def differences_table(
    comparisons: pd.DataFrame, patterns: Sequence[str], reference: str
) -> pd.DataFrame:
    """Paired differences of each comparison; a comparison without numbers keeps a row saying so."""
    measured = comparisons.dropna(subset=["bits_per_byte"])
    table = paired_table(measured, "bits_per_byte", "pattern", reference, by=("comparison",))
    missing = [
        {"comparison": c, "pattern": pattern, "reference": reference, "mean": None, "low": None,
         "high": None, "pairs": 0, "method": "not measured: no energy counter", "points": ""}
        for c in COMPARISONS if c not in set(measured["comparison"])
        for pattern in patterns if pattern != reference
    ]
    if missing:
        table = pd.concat([table.astype(object), pd.DataFrame(missing, columns=table.columns)],
                          ignore_index=True)
    return not_measured(table)


INTERVAL = ["low", "high", "method"]


def without_intervals(paired: pd.DataFrame) -> pd.DataFrame:
    """The differences as they are kept: what their points say is worked out by who shows them."""
    return paired.drop(columns=INTERVAL)


def with_intervals(paired: pd.DataFrame) -> pd.DataFrame:
    """The differences with the interval that their points give today, whatever a record holds;
    "few seeds" where they are too few, and nothing where nothing was measured."""
    rows = []
    for points in paired["points"]:
        differences = [float(x) for x in str(points or "").split(",") if x.strip()]
        found = paired_difference(differences, [0.0] * len(differences)) if differences else None
        few = found is not None and math.isnan(found.low)
        rows.append((None, None, "not measured") if found is None else
                    ("few seeds", "few seeds", found.method) if few else
                    (f"{found.low:+.4f}", f"{found.high:+.4f}", found.method))
    kept = without_intervals(paired) if set(INTERVAL) <= set(paired) else paired
    shown = pd.DataFrame(rows, columns=INTERVAL, index=paired.index, dtype=object)
    at = list(kept).index("mean") + 1
    return pd.concat([kept.iloc[:, :at], shown, kept.iloc[:, at:]], axis=1)


WORDED = {"paired": without_intervals}
SHOWN = {"paired": with_intervals}
