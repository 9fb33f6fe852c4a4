"""UTF-8: lead bytes, continuation ranges, incremental decoding."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mambabyte.corpus.utf8 import Utf8Stream, continuation_range, first_characters, utf8_length


@given(st.characters(exclude_categories=["Cs"]))
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


@given(st.text(max_size=50), st.integers(1, 5))
def test_stream_never_splits_a_character(text, size):
    data, stream = text.encode("utf-8", "ignore"), Utf8Stream()
    pieces = [stream.feed(data[i : i + size]) for i in range(0, len(data), size)]
    assert "".join(pieces) + stream.close() == data.decode("utf-8")
    assert not any("�" in p for p in pieces) or "�" in text


@given(st.text(max_size=40), st.integers(0, 50), st.integers(0, 3))
def test_first_characters(text, count, cut):
    text = text.encode("utf-8", "ignore").decode()
    data = text.encode("utf-8")
    assert first_characters(data, count) == text[:count]
    whole = data[: len(data) - cut].decode("utf-8", "ignore")
    assert first_characters(data[: len(data) - cut], len(text)) == whole


def test_incomplete_end_shows_a_replacement():
    stream = Utf8Stream()
    assert stream.feed("é".encode()[:1]) == ""
    assert stream.close() == "�"
