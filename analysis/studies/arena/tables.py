"""The arena's tables: captions."""

from __future__ import annotations

from analysis.studies.drawing import Words

TABLES: dict[str, Words] = {
    "best": "Every system at its best rate: bits per byte of validation text, mean over seeds and "
            "95 % interval (Student's t; none below three seeds). Rates were chosen on held-out "
            "training text.",
    "paired": "Each system's best minus the reference's on the same seeds, bits per byte.",
    "tuning": "What the search for each system's rate cost, and beside what it gave what one rate "
              "of AdamW for all gives (one seed). At the end of the range: the best rate may lie "
              "beyond what was tried.",
    "costs": "A training step of every system, interleaved rounds of one job.",
    "equal": "The best runs read at equal bytes, time, operations and joules; the last three are "
             "what the dearest system's training costs. Between two whole trainings, linear in the "
             "logarithm of the bytes; empty where a system is so cheap that it would have to be "
             "read past its longest.",
    "tasks": "Accuracy on unseen samples at each system's best rate, by size, over seeds, beside a "
             "guesser that knows which values a sample holds. Sizes that were not trained on are "
             "marked.",
}
