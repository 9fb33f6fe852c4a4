"""The ablation study's tables: captions, and the paired differences."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analysis.measure.statistics import paired_table
from analysis.runs.frames import in_words, not_measured
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
    "paired": "Mean paired differences, bits per byte, with the points.",
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


def paired_in_words(paired: pd.DataFrame) -> pd.DataFrame:
    """The table of differences with "few seeds" in place of an interval that was not made of them;
    a difference that was not measured stays so."""
    why = pd.Series("few seeds", index=paired.index, dtype=object).where(
        paired["mean"].notna(), None)
    for column in ("low", "high"):
        paired = in_words(paired, column, why, "{:.4f}")
    return paired


WORDED = {"paired": paired_in_words}
