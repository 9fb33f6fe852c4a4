"""Where a form of the scan overflows, by arithmetic: its bound on chunk and length.

With a per-step log-decay of -x (x = |delta A|) and chunks of T steps the cumulated log-decay ends
at -T x. Write F = ln(largest float): 88.72 in float32 and bfloat16, 11.09 in float16. Then, of the
forms that make the weight exp(cs_t - cs_k) out of cumulated sums:

==================  ========================  =====================================
form                fails once                because
==================  ========================  =====================================
document_chunked    (T - 1) x > F             exp(-cs_{T-1}) is inf
corrected_cumsum    T x > F                   exp(-cs_T) is inf
centred             floor(T / 2) x > F        measured from step floor((T-1)/2), the later half is
                                              the longer one at even T
late_mask           (T - 1) x > F, backward   0 * inf in the gradient of the masked part
clamped             T x > 80, silently        newest inputs weighted by exp(cs + 80)
epsilon             T x > 23, silently (1 %)  newest inputs weighted by 1/(1 + 1e-12 exp(-cs))
==================  ========================  =====================================
"""

from __future__ import annotations

import math

from mambabyte.config.scan_forms import CLAMP, EPSILON

# The largest number of each type, 2 - 2^-m with m bits of fraction, times its largest power of two.
LARGEST = {"float32": (2 - 2**-23) * 2.0**127, "bfloat16": (2 - 2**-7) * 2.0**127,
           "float16": (2 - 2**-10) * 2.0**15}
SILENT = 1e-2  # relative error above which a finite result counts as wrong


def log_max(dtype: str = "float32") -> float:
    """ln of the largest number of the type that a form accumulates in."""
    return math.log(LARGEST.get(dtype, LARGEST["float32"]))


def boundary(form: str, decay: float, dtype: str = "float32") -> float:
    """The chunk length, in steps, above which ``form`` fails at a per-step log-decay -decay.

    inf for a form without a bound. Of the centred form, which fails by pairs of lengths, this is
    the longer length of the last pair that works. See the module's table; document_cumsum is
    document_chunked with one chunk, the whole length.
    """
    limit = log_max(dtype)
    steps = {
        "document_chunked": limit / decay + 1,
        "document_cumsum": limit / decay + 1,
        "late_mask": limit / decay + 1,
        "corrected_cumsum": limit / decay,
        "centred": 2 * math.floor(limit / decay) + 1,
        "clamped": min(CLAMP, limit - 1) / decay,
        "epsilon": math.log(SILENT / EPSILON) / decay,
    }
    return steps.get(form, math.inf)


def first_overflow(decay: float) -> int:
    """First length at which the whole-sequence trick as published overflows at that decay."""
    return math.floor(boundary("document_cumsum", decay)) + 1


def share_past_bound(length: int) -> float:
    """Share of (channel, state) pairs whose whole-sequence exponent overflows at ``length``.

    At initialisation A = -n for n = 1..16 and dt is log-uniform in [0.001, 0.1]. Pair (d, n)
    overflows when (length - 1) n dt > F: the published exponent stops one step short. So the
    share is the mean over n of P(dt > F / (n (length - 1))), each a ratio of logarithms.
    """
    states, dt_min, dt_max, limit = 16, 1e-3, 1e-1, log_max()
    if length < 2:
        return 0.0
    spread = math.log(dt_max / dt_min)
    shares = [
        min(1.0, max(0.0, math.log(dt_max * n * (length - 1) / limit) / spread))
        for n in range(1, states + 1)
    ]
    return sum(shares) / states
