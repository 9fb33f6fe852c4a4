"""The exceptions that mean "the user can fix this", and a hint at what was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# How torch says it on a CPU and on a GPU; its exceptions are RuntimeErrors.
_NO_MEMORY = re.compile(r"(can't|cannot) allocate memory|not enough memory|out of memory", re.I)


def means_no_memory(words: str) -> bool:
    """Whether an error's words are those of an allocation that failed."""
    return bool(_NO_MEMORY.search(words))


class UserError(Exception):
    """Bad input: one line that says what was got, what was expected and what to do.

    The command line prints the message alone and exits with status 2; everything else is a
    defect and keeps its traceback. Not a ValueError, which the option parser would catch and
    rephrase.
    """

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the line alone, as on the command line."""
        return [f"error: {self}"]


class NonFiniteError(UserError):
    """A loss, a gradient or a probability became inf or nan; the message says where.

    ``step`` counts from 0; -1 where it was not a training step. The first sentence of the message
    says what happened.
    """

    def __init__(self, message: str, step: int = -1) -> None:
        super().__init__(message)
        self.step = step


def nearest(name: object, known: Iterable[str], cutoff: float = 0.5) -> str:
    """A hint for a message about an unknown name, " (did you mean X?)"; "" where none is near, or
    where it is no word at all."""
    if not isinstance(name, str):
        return ""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {close[0]}?)" if close else ""
