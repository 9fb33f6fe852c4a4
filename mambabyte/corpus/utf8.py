"""Bytes and characters: UTF-8 without ever splitting a code point."""

from __future__ import annotations

import codecs

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


def first_characters(data: bytes, count: int) -> str:
    """The first ``count`` characters of UTF-8 ``data``, which may be cut inside its last one."""
    # A character has at most four bytes, so this prefix holds them all.
    text = data[: 4 * count + 3].decode("utf-8", errors="ignore")
    return text[:count]
