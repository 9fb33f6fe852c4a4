"""Text from a model: a prompt is read, bytes are drawn, whole characters come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mambabyte.corpus.utf8 import Utf8Stream, as_bytes
from mambabyte.stream.prefixes import PrefixCache
from mambabyte.stream.speculate import Guesser, Speculation
from mambabyte.stream.streams import ByteModel, ByteStream


def generate(
    model: ByteModel, prompt: str | bytes = "", max_bytes: int = 256, temperature: float = 1.0,
    top_k: int = 0, top_p: float = 1.0, seed: int = 0, *, cache: PrefixCache | None = None,
    guesser: Guesser | None = None,
) -> Iterator[str]:
    """Yield text as it comes, whole characters only. Temperature 0 is greedy.

    A prompt may be any bytes, UTF-8 or not: the model reads bytes. What ``cache`` has of it is not
    read again. ``guesser`` says what may come next (``speculate``), and changes no byte.

    The same seed gives the same text on the same kind of device.
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
    ``PrefixCache.read``."""
    data = as_bytes(prompt) if isinstance(prompt, str) else prompt
    model.eval()
    if cache is not None:
        return cache.read(model, data, report), data
    stream = ByteStream(model)
    stream.feed(data)
    return stream, data


def text_of(pieces: Iterator[bytes]) -> Iterator[str]:
    """Bytes as text, as they come, whole characters only."""
    decoder = Utf8Stream()
    for data in pieces:
        if text := decoder.feed(data):
            yield text
    if rest := decoder.close():
        yield rest
