"""UTF-8: lead bytes, continuation ranges, incremental decoding."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambabyte.corpus.utf8 import (
    Utf8Stream,
    as_bytes,
    as_characters,
    continuation_range,
    first_characters,
    next_begin,
    utf8_length,
)
from mambabyte.errors import UserError

# One to four bytes, each as often; hypothesis's own would read all of Unicode first, for seconds.
CHARACTERS = st.one_of(st.integers(0, 0x7F), st.integers(0x80, 0x7FF), st.integers(0x800, 0xD7FF),
                       st.integers(0xE000, 0xFFFF), st.integers(0x10000, 0x10FFFF)).map(chr)


@given(CHARACTERS)
def test_every_character_is_reachable(char):
    data = char.encode("utf-8")
    assert utf8_length(data[0]) == len(data)
    for i in range(1, len(data)):
        assert data[i] in continuation_range(data[:i])


def test_only_characters_are_reachable():
    for lead in range(0xC2, 0xF5):
        length = utf8_length(lead)
        for second in continuation_range(bytes([lead])):
            bytes([lead, second] + [0x80] * (length - 2)).decode("utf-8")
            bytes([lead, second] + [0xBF] * (length - 2)).decode("utf-8")
    assert [b for b in range(256) if utf8_length(b) == 0] == [
        *range(0x80, 0xC2), *range(0xF5, 0x100)]


@given(st.text(CHARACTERS, max_size=50), st.integers(1, 5))
def test_stream_never_splits_a_character(text, size):
    data, stream = text.encode("utf-8"), Utf8Stream()
    pieces = [stream.feed(data[i : i + size]) for i in range(0, len(data), size)]
    assert "".join(pieces) + stream.close() == data.decode("utf-8")
    assert not any("�" in p for p in pieces) or "�" in text


@given(st.text(CHARACTERS, max_size=40), st.integers(0, 50), st.integers(0, 3))
def test_first_characters(text, count, cut):
    data = text.encode("utf-8")
    assert first_characters(data, count) == text[:count]
    short = data[: len(data) - cut]  # every byte is in some character
    assert as_bytes(first_characters(short, len(short))) == short


@given(st.binary(max_size=30), st.integers(0, 30))
def test_any_bytes_are_characters_and_back(data, count):
    assert as_bytes(as_characters(data)) == data
    assert first_characters(data + b"abc" * 40, count) == as_characters(data + b"abc" * 40)[:count]


def test_half_a_character_is_one_clear_line():
    with pytest.raises(UserError, match=r"'\\ud83d' at 1 is half a character"):
        as_bytes("a\ud83d")


def test_the_next_place_where_a_character_can_begin():
    data = "a🙂b".encode()
    assert [next_begin(data, i) for i in range(len(data))] == [0, 1, 5, 5, 5, 5]
    assert next_begin(b"\x80" * 9, 3) == 3  # no UTF-8 at all
    assert next_begin(b"ab", 2) == 2


def test_incomplete_end_shows_a_replacement():
    stream = Utf8Stream()
    assert stream.feed("é".encode()[:1]) == ""
    assert stream.close() == "�"
