"""Text from a model: a prompt is read, bytes are drawn, alone or by guessing several ahead.

Speculative generation: several bytes are guessed, one pass of the model says how many are right.

A guess costs the model nothing: it is what followed the last bytes where they occurred before
(prompt look-up), or what an n-gram model expects. Each byte is drawn from the model's own
distribution, with the random numbers that plain generation takes, and a guess counts where it is
that byte. So the text is plain generation's, whatever was guessed, at every temperature; for
guesses that are certain this is the acceptance rule of Leviathan et al. 2023 (arXiv:2211.17192,
section 2.3): a guessed byte is kept with the probability that the model gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from mambabyte.corpus.files import bytes_of
from mambabyte.corpus.utf8 import Utf8Stream, as_bytes
from mambabyte.stream.engines.base import ByteModel, place_of
from mambabyte.stream.prefixes import PrefixCache
from mambabyte.stream.streams import ByteStream, check_draws, sample_byte

READ_AT_ONCE = 1 << 15  # bytes of a prompt: two seconds of a CPU
MOST_GUESSED = 15  # bytes a pass, besides the one that is known
_MOST_LAG = 32  # bytes drawn that the state may lack
_FIRST_GUESSED = 4


class Guesser(Protocol):
    """Says what a text may go on with."""

    def read(self, data: bytes) -> None:
        """The text goes on with ``data``."""

    def guess(self, last: int, most: int) -> bytes:
        """Up to ``most`` bytes that may follow the text and the byte ``last``; empty for none."""


class Repetitions:
    """Guesses that a text goes on as it did where its last bytes occurred before, the last time
    ("prompt lookup decoding"; Yang et al. 2023, arXiv:2304.04487)."""

    def __init__(self, match: int = 6, memory: int = 1 << 17) -> None:
        self._match, self._memory = match, memory
        self._text = bytearray()
        self._after: dict[bytes, int] = {}  # where the text goes on after so many bytes

    def read(self, data: bytes) -> None:
        """Add to the text: where each ``match`` bytes of it end is known from then on."""
        text, match = self._text, self._match
        begin = len(text)
        text += data[-self._memory :]
        for end in range(max(begin, match), len(text)):
            # what ends at the end itself is noted once something follows
            self._after[bytes(text[end - match : end])] = end
        if len(text) > 2 * self._memory:  # begin anew with what is recent
            recent = bytes(text[-self._memory :])
            self._text, self._after = bytearray(), {}
            self.read(recent)

    @property
    def past(self) -> bytes:
        """The text so far, as far as it is kept."""
        return bytes(self._text)

    def guess(self, last: int, most: int) -> bytes:
        """``most`` bytes that may follow the text and ``last``; none where it was never met."""
        text = self._text
        tail = bytes(text[len(text) - self._match + 1 :]) + bytes([last])
        at = self._after.get(tail)
        if at is None:
            return b""
        found = bytes(text[at : at + most])
        if len(found) < most:  # as far as the text goes: it goes round in what was found
            found += bytes([last])
            found *= most // len(found) + 1
        return found[:most]


class FirstOf:
    """The guess of the first of several that has one."""

    def __init__(self, *guessers: Guesser) -> None:
        self._guessers = guessers

    def read(self, data: bytes) -> None:
        for guesser in self._guessers:
            guesser.read(data)

    @property
    def past(self) -> bytes:
        return next((g.past for g in self._guessers if hasattr(g, "past")), b"")

    def guess(self, last: int, most: int) -> bytes:
        return next((g for guesser in self._guessers if (g := guesser.guess(last, most))), b"")


class Speculation:
    """Draws with guesses; counts what that took."""

    def __init__(self, guesser: Guesser) -> None:
        self.guesser = guesser
        self.passes = self.drawn = self.guessed = self.right = 0  # passes; bytes

    def draw(
        self, stream: ByteStream, max_bytes: int, temperature: float = 1.0, top_k: int = 0,
        top_p: float = 1.0, seed: int = 0,
    ) -> Iterator[bytes]:
        """The bytes that ``stream.draw`` would draw, as they come; the stream stands behind them
        when the iterator ends or is closed.

        The guesser must have read the text so far. Where an engine keeps the state after each byte
        of a pass, a wrong guess costs nothing more; else the bytes before it are given again with
        the next pass, and the state rolls back to where the last pass began. An engine that
        draws where it computes guesses repetitions itself, and nothing else.
        """
        if stream.guesses_itself:
            yield from self._by_engine(stream, max_bytes, temperature, top_k, top_p, seed)
            return
        max_bytes, temperature, top_k, top_p, seed = check_draws(
            max_bytes, temperature, top_k, top_p, seed)
        generator = torch.Generator().manual_seed(seed)

        def choose(log_probs: Tensor) -> int:
            return sample_byte(log_probs, temperature, top_k, top_p, generator)

        lag, most, done = b"", _FIRST_GUESSED, 0
        try:
            byte = choose(stream.log_probs) if max_bytes else 0
            while done < max_bytes:
                room = min(most, max_bytes - done - 1) if len(lag) < _MOST_LAG else 0
                guess = self.guesser.guess(byte, room)[:room] if room > 0 else b""
                drawn, right = bytes([byte]), 0
                if guess or lag:
                    data, known = lag + drawn + guess, len(lag)
                    log_probs, after = stream.ahead(data)
                    while (byte := choose(log_probs[known + right])) in guess[right : right + 1]:
                        right += 1
                    end = known + 1 + right
                    drawn = data[known:end]
                    state = after(end)
                    lag = data[:end] if state is None else b""
                    if state is not None:
                        stream.move(state, log_probs[end - 1])
                    if guess:
                        most = min(2 * most, MOST_GUESSED) if right == len(guess) else right + 1
                else:
                    stream.feed(drawn)
                    byte = choose(stream.log_probs)
                done += len(drawn)
                self.passes += 1
                self.drawn, self.guessed = self.drawn + len(drawn), self.guessed + len(guess)
                self.right += right
                self.guesser.read(drawn)
                yield drawn
        finally:
            stream.feed(lag)

    def _by_engine(self, stream: ByteStream, max_bytes: int, *how: Any) -> Iterator[bytes]:
        past = getattr(self.guesser, "past", b"")
        for data, passes, guessed in stream.guess_and_draw(past, max_bytes, *how):
            self.passes, self.drawn = self.passes + passes, self.drawn + len(data)
            self.guessed, self.right = self.guessed + guessed, self.right + len(data) - passes
            self.guesser.read(data)
            yield data


def generate(
    model: ByteModel, prompt: str | bytes = "", max_bytes: int = 256, temperature: float = 1.0,
    top_k: int = 0, top_p: float = 1.0, seed: int = 0, *, cache: PrefixCache | None = None,
    guesser: Guesser | None = None,
) -> Iterator[str]:
    """Yield text as it comes, whole characters only. Temperature 0 is greedy.

    A prompt may be any bytes, UTF-8 or not: the model reads bytes. What ``cache`` has of it is not
    read again. ``guesser`` says what may come next, and changes no byte.

    The same seed gives the same text on the same kind of device. Raises UserError, when the first
    piece is asked for, for a model or a value that nothing can be drawn by.
    """
    stream, data = begin(model, prompt, cache)
    if guesser is None:
        yield from text_of(stream.draw(max_bytes, temperature, top_k, top_p, seed))
    else:
        guesser.read(data)
        yield from text_of(Speculation(guesser).draw(
            stream, max_bytes, temperature, top_k, top_p, seed))


def begin(
    model: ByteModel, prompt: str | bytes, cache: PrefixCache | None = None,
    report: Callable[[float], None] = lambda done: None,
) -> tuple[ByteStream, bytes]:
    """A stream of ``model`` behind ``prompt``, and the prompt's bytes; ``report`` as in
    ``PrefixCache.read``, for a long prompt also without a cache."""
    data = as_bytes(prompt) if isinstance(prompt, str) else bytes_of(prompt)
    place_of(model)
    model.eval()
    if cache is not None:
        return cache.read(model, data, report), data
    stream = ByteStream(model)
    read_on(stream, data, report)
    return stream, data


def read_on(
    stream: ByteStream, data: bytes, report: Callable[[float], None] = lambda done: None
) -> None:
    """Advance by ``data`` in pieces, with the share that is done after each but an only one: one
    call for all would not hear Ctrl-C, nor say anything, for minutes of a CPU."""
    for begins in range(0, len(data), READ_AT_ONCE):
        stream.feed(data[begins : begins + READ_AT_ONCE])
        if len(data) > READ_AT_ONCE:
            report(min(1.0, (begins + READ_AT_ONCE) / len(data)))


def text_of(pieces: Iterator[bytes]) -> Iterator[str]:
    """Bytes as text, as they come, whole characters only."""
    decoder = Utf8Stream()
    for data in pieces:
        if text := decoder.feed(data):
            yield text
    if rest := decoder.close():
        yield rest
