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
    "costs": "What a step and a byte of training cost every system, in turns in one process that "
             "has its device for itself: median and quartiles of milliseconds over rounds, gross "
             "joules.",
    "equal": "The best runs read at equal bytes, time, operations and joules; the last three are "
             "what the dearest system's training costs. Between two whole trainings of a seed, "
             "linear in the logarithm of the bytes, with 95 % intervals (Student's t); empty where "
             "a system is so cheap that it would have to be read past its longest.",
    "tasks": "Accuracy on unseen samples at each system's best rate, by size, over seeds, beside a "
             "guesser that knows which values a sample holds: from one size to the next, each when "
             "the model had been trained on it, for so many steps. A model that learned nothing of "
             "a size was not trained on larger ones, which is marked, as are those beyond all.",
    "law": "Bits per byte = E + A N^-alpha + B D^-beta, N in millions of parameters and D in "
           "megabytes of text, with 95 % intervals of the residual bootstrap.",
    "points": "What the laws are fitted to. The points of most operations were held back; low and "
              "high are the 95 % interval that the law predicts for a new point.",
    "crossings": "Where one system's law passes another's along the parameters, at each amount of "
                 "text; empty where they do not cross in the range that was measured. The last "
                 "column is the share of bootstrap draws that say the same.",
    "half_lives": "Bytes until what the state holds has decayed to half, by the mean log-decay "
                  "over validation text: quantiles over the channels of a layer.",
    "precision": "Bits per byte that a stream loses where the state is kept in fewer bits after "
                 "every byte, beside the same stream in float32. Feedback keeps what rounding "
                 "dropped in the same format: twice the bytes.",
    "state_errors": "Relative RMS error of the state at the end of the streams, by the half-life "
                    "of its numbers.",
    "units": "Bytes and 1,024 pieces, the same raw bytes seen, each at its own rate: bits per raw "
             "byte and share of raw bytes predicted right, on validation text without and with "
             "noise; pieces minus bytes by seeds in pairs. 95 % intervals (Student's t).",
    "clamp": "Mamba-1 with its step size free and bounded: the largest exponents while training, "
             "the step at which that of 32 steps passes what float32 holds (predicted by a line "
             "through the first half; empty: not by the end), and what the bound costs in bits.",
}
