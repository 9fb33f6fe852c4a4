"""The forms of the selective scan by name, and what may be expected of each.

``mambabyte.ops.scan`` computes them. What is marked ``study`` is there to be measured, not to
train with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mambabyte.config.checks import one_of


@dataclass(frozen=True)
class Form:
    """One way to compute the scan, and what may be expected of it."""

    about: str
    chunk: int = 0  # the chunk used when none is given; 0 where the form has none
    study: bool = False  # wrong or fragile: a subject of study, refused for training
    decays_input: bool = False  # h_t = a_t (h_{t-1} + b_t): another recurrence than the definition


FORMS: dict[str, Form] = {
    "recurrent": Form("the definition, one step after another"),
    "chunked": Form("stable chunks, no exponent is ever positive", chunk=32),
    "fused": Form("one native kernel forward, one backward (CPU or CUDA)"),
    "corrected_cumsum": Form(
        "chunked log-cumsum with the input's own decay removed; overflows on strong decay",
        chunk=32, study=True,
    ),
    "document_chunked": Form(
        "chunked log-cumsum as published: decays each input by its own step; overflows too",
        chunk=32, study=True, decays_input=True,
    ),
    "document_as_coded": Form(
        "the same in the order of the published script, (delta x B) u: keeps one tensor more",
        chunk=32, study=True, decays_input=True,
    ),
    "document_cumsum": Form(
        "log-cumsum over the whole sequence as published: overflows after some 50 bytes",
        study=True, decays_input=True,
    ),
    "clamped": Form(
        "log-cumsum with a clamped exponent: strong decay loses inputs and says nothing",
        chunk=32, study=True,
    ),
    "epsilon": Form(
        "log-cumsum with a small number in the denominator: loses inputs and says nothing",
        chunk=32, study=True,
    ),
    "centred": Form(
        "log-cumsum measured from the middle of the chunk: overflows at twice the decay",
        chunk=32, study=True,
    ),
    "pairwise": Form(
        "differences of cumulated sums for all pairs: strong decay loses the gradient of A",
        chunk=32, study=True,
    ),
    "late_mask": Form(
        "all pairs, masked after the exponential: right value, nan in the gradient",
        chunk=32, study=True,
    ),
    "segment_sum": Form("all pairs of a chunk, each exponent summed by itself", chunk=32),
    "associative": Form("pairs (decay, state) joined by doubling, no exponent", chunk=32),
}

# Names of earlier versions, read wherever a form is given.
OLD_NAMES = {"sequential": "recurrent"}

ScanForm = Annotated[str, one_of(lambda: FORMS, OLD_NAMES)]
FormOrAuto = Annotated[str, one_of(lambda: ["auto", *FORMS], OLD_NAMES)]

# What "auto" means.
AUTO_ABOUT = "fused where its kernels run, else the stable chunks"


def decays_input(name: str) -> bool:
    """Whether the form ``name``, or "auto", is of the recurrence that the document writes."""
    return name in FORMS and FORMS[name].decays_input


# What two repairs of the trick add to it: the largest exponent, and a number in the denominator.
CLAMP = 80.0
EPSILON = 1e-12
