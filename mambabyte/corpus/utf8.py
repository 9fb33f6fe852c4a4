"""Bytes and characters: UTF-8 without ever splitting a code point."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import numpy as np

from mambabyte.errors import UserError

# What is fed before the first byte, so that there is a distribution over it. Documents of the
# corpora begin after a line end; byte 0 never occurs in them.
START_BYTE = 0x0A


def utf8_length(lead: int) -> int:
    """How many bytes a character with this first byte has; 0 if none starts so (RFC 3629)."""
    if lead < 0x80:
        return 1
    if 0xC2 <= lead <= 0xDF:
        return 2
    if 0xE0 <= lead <= 0xEF:
        return 3
    return 4 if 0xF0 <= lead <= 0xF4 else 0


def continuation_range(prefix: bytes) -> range:
    """The bytes that may follow the incomplete character ``prefix`` (RFC 3629, section 4).

    Overlong forms, surrogates and code points above U+10FFFF are excluded, so whatever is
    completed by following these ranges decodes.
    """
    if len(prefix) == 1:
        low, high = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF),
                     0xF4: (0x80, 0x8F)}.get(prefix[0], (0x80, 0xBF))
        return range(low, high + 1)
    return range(0x80, 0xC0)


class Utf8Stream:
    """Turns bytes into text as they come: an incomplete character waits, a bad byte is U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        return self._decoder.decode(data)

    def close(self) -> str:
        """What is left of an incomplete character at the end, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def as_characters(data: bytes) -> str:
    """Any bytes as characters, none left out: a byte that is part of no UTF-8 character is one by
    itself, a lone surrogate (Python's "surrogateescape"), which no model predicts."""
    return data.decode("utf-8", "surrogateescape")


def as_bytes(text: str) -> bytes:
    """The inverse of ``as_characters``; UserError for what is no string, and for a lone surrogate
    that stands for no byte."""
    if not isinstance(text, str):
        raise UserError(f"characters are of type {type(text).__name__}: expected a str")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise UserError(f"{text[error.start]!a} at {error.start} is half a character, a lone "
                        "surrogate: give whole characters, or bytes") from None


def next_begin(data: Sequence[int] | np.ndarray, at: int) -> int:
    """The first place from ``at`` on where a UTF-8 character can begin; ``at`` itself where the
    data is no UTF-8: a character has at most three bytes after its first."""
    for place in range(at, min(at + 4, len(data))):
        if data[place] & 0xC0 != 0x80:
            return place
    return at


def first_characters(data: bytes, count: int) -> str:
    """The first ``count`` characters of ``data``, as ``as_characters`` has them."""
    # A character has at most four bytes, so this prefix holds them all.
    return as_characters(data[: 4 * count + 3])[:count]
