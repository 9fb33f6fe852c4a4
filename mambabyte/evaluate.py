"""Scoring: bits per byte and greedy next-character accuracy, in parallel or byte by byte.

What is scored is a text or a sequence of documents of any lengths, each from its first byte on as
if it were alone. They are read one behind another, without anything to fill up rows, where the
model is a ByteLM, and one by one where it is another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from mambabyte.config.checks import Some, fit
from mambabyte.corpus.files import bytes_of
from mambabyte.corpus.utf8 import START_BYTE, as_bytes, first_characters
from mambabyte.errors import NonFiniteError, UserError
from mambabyte.model import ByteLM
from mambabyte.stream import ByteModel, ByteStream, CharModel, PrefixCache
from mambabyte.stream.engines.base import place_of
from mambabyte.stream.generation import begin
from mambabyte.stream.greedy import Windows, greedy_codes

TASK_CHARACTERS = 60_000  # the public task scores these many characters of a split
BLOCK_CHARACTERS = 1000  # longer than what makes neighbouring predictions alike
_WINDOWS = {"cpu": 512, "cuda": 2048}  # bytes; a call costs as much as some 100, or some 10,000
_BLOCK = 1 << 16  # bytes whose log-probabilities are kept at once


@dataclass(frozen=True)
class Score:
    """Result of scoring a text: every byte of it once, whatever its encoding.

    ``hits`` has one entry a character: predicted right or not. A byte that belongs to no UTF-8
    character counts as a character that was not predicted.
    """

    bits_per_byte: float
    char_accuracy: float
    characters: int
    bytes: int
    bytes_not_utf8: int
    hits: np.ndarray

    @property
    def accuracy_error(self) -> float | None:
        """Standard error that a text of this length leaves in the accuracy, by blocks, as
        neighbours are alike; None for fewer than two blocks."""
        blocks = len(self.hits) // BLOCK_CHARACTERS
        if blocks < 2:
            return None
        means = self.hits[: blocks * BLOCK_CHARACTERS].reshape(blocks, -1).mean(1)
        return float(means.std(ddof=1) / blocks**0.5)

    def as_dict(self) -> dict[str, object]:
        record = asdict(self)
        del record["hits"]
        return record


Text = bytes | np.ndarray


def _documents(data: Text | Sequence[Text]) -> list[bytes]:
    """The documents that have bytes; UserError where none has, or for what is no bytes."""
    given = data if isinstance(data, list | tuple) else [data]
    found = [text for text in map(bytes_of, given) if text]
    if not found:
        raise UserError("there is nothing to score: the text is empty")
    return found


@torch.inference_mode()
def byte_log_probs(
    model: ByteModel, data: Text | Sequence[Text], window: int = 8192,
    report: Callable[[float], None] = lambda done: None,
) -> torch.Tensor:
    """Log-probabilities (L, V) of every byte given all before it, from START_BYTE on.

    Runs in windows of ``window`` bytes with the state carried from one to the next, so the
    result is what streaming gives, up to rounding. Of several documents, those of each in turn,
    given all before it in its own; L is their sum.
    """
    device, documents, window = place_of(model), _documents(data), fit(window, Some, "window")
    was_training = model.training
    model.eval()
    size, done, parts = sum(map(len, documents)), 0, []
    packs = isinstance(model, ByteLM)
    for group in [documents] if packs else [[one] for one in documents]:
        inputs = np.concatenate([
            np.frombuffer(bytes([START_BYTE]) + one[:-1], np.uint8) for one in group])
        begins = np.zeros(len(inputs), dtype=bool)
        begins[np.cumsum([len(one) for one in group[:-1]], dtype=np.int64)] = True
        state = None
        for start in range(0, len(inputs), window):
            here = slice(start, start + window)
            tokens = torch.from_numpy(inputs[here]).to(device).long()[None]
            starts = {}
            if begins[here].any():
                starts = {"document_starts": torch.from_numpy(begins[here]).to(device)[None]}
            logits, state = model(tokens, state, **starts)
            parts.append(torch.log_softmax(logits[0].float(), -1).cpu())
            done += tokens.shape[1]
            report(done / size)
    model.train(was_training)
    return torch.cat(parts)


def bits_per_byte(
    model: ByteModel, data: Text | Sequence[Text], window: int = 8192,
    report: Callable[[float], None] = lambda done: None,
) -> float:
    """Mean -log2 p over the bytes of ``data``, each given all before it in its document."""
    raw = b"".join(documents := _documents(data))
    log_probs = byte_log_probs(model, documents, window, report)
    return _bits(float(-_of_each(log_probs, raw).double().sum()), len(raw))


def _of_each(log_probs: torch.Tensor, raw: bytes) -> torch.Tensor:
    """Log p (L,) of the bytes of ``raw`` themselves, out of (L, V) on the CPU."""
    codes = torch.from_numpy(np.frombuffer(raw, np.uint8).astype(np.int64))
    return log_probs.gather(1, codes[:, None])[:, 0]


def _bits(nats: float, size: int) -> float:
    """Bits per byte; NonFiniteError where the nats are no number."""
    if not math.isfinite(nats):
        raise NonFiniteError(
            f"the score of the text is {nats}: the model gave a byte of it "
            + ("probability 0" if nats > 0 else "no probability: its weights or its state have "
               "gone nan; use an earlier checkpoint, or train with a lower lr"))
    return nats / size / math.log(2)


def _score(nats: float, hits: np.ndarray, text: str, size: int) -> Score:
    stray = sum("\udc80" <= char <= "\udcff" for char in text)
    return Score(_bits(nats, size), float(hits.mean()), len(text), size, stray, hits)


def _begins(text: str) -> np.ndarray:
    """Where each character of ``as_characters`` begins in the bytes."""
    code = np.array([ord(char) for char in text])
    lengths = 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000)
    lengths[(code >= 0xDC80) & (code <= 0xDCFF)] = 1  # a byte by itself
    return np.cumsum(lengths) - lengths


def _before(model: ByteModel, context: bytes, cache: PrefixCache | None) -> tuple[Any, int]:
    """The state before the last byte that comes before a text, and that byte."""
    context = as_bytes(context) if isinstance(context, str) else bytes_of(context)
    if not context:
        return None, START_BYTE
    stream, _ = begin(model, context[:-1], cache)
    return stream.kept.state, context[-1]


def _each(
    run: Callable[[bytes, int, Callable[[float], None]], Score], data: Text | Sequence[Text],
    characters: int, report: Callable[[float], None],
) -> Score:
    """The score of the first ``characters`` characters of all documents, by ``run(document,
    characters, report)`` of each."""
    documents, characters = _documents(data), fit(characters, Some, "characters")
    size, before, left = sum(map(len, documents)), 0, characters
    scores: list[Score] = []
    for document in documents:
        if left <= 0 and scores:
            break

        def told(done: float, before: int = before, own: int = len(document)) -> None:
            report((before + own * done) / size)

        scores.append(run(document, left, told))
        before, left = before + len(document), left - scores[-1].characters
    if len(scores) == 1:
        return scores[0]
    total = sum(s.bytes for s in scores)
    hits = np.concatenate([s.hits for s in scores])
    return Score(sum(s.bits_per_byte * s.bytes for s in scores) / total, float(hits.mean()),
                 len(hits), total, sum(s.bytes_not_utf8 for s in scores), hits)


def score(
    model: ByteModel, data: Text | Sequence[Text], characters: int = TASK_CHARACTERS,
    window: int | None = None, report: Callable[[float], None] = lambda done: None, *,
    context: bytes = b"", cache: PrefixCache | None = None,
) -> Score:
    """Score the first ``characters`` characters in parallel windows of ``window`` bytes; of several
    documents one by one.

    ``context`` comes before each and is not scored; what ``cache`` has of it is not read again.

    The result is what streaming gives, up to ties within rounding: see ``greedy`` for the places
    where a longer character is in question. Smaller windows mean more calls of the model, larger
    ones more bytes that such places run again; the default suits the device.
    """
    return _each(
        lambda one, count, told: _score_windows(model, one, count, window, told, context, cache),
        data, characters, report)


@torch.inference_mode()
def _score_windows(
    model: ByteModel, data: bytes, characters: int, window: int | None,
    report: Callable[[float], None], context: bytes, cache: PrefixCache | None,
) -> Score:
    text = first_characters(data, characters)
    raw = np.frombuffer(as_bytes(text), np.uint8)
    if not len(raw):
        raise UserError("there is nothing to score: the text is empty")
    device, window = place_of(model), fit(window, Some | None, "window")
    was_training = model.training
    model.eval()
    shared = getattr(model, "sequence_group", None)  # whose processes have a part of a window each
    window = window or _WINDOWS.get(device.type, _WINDOWS["cpu"]) * (shared.size if shared else 1)
    state, last = _before(model, context, cache)
    inputs = np.concatenate([np.array([last], np.uint8), raw[:-1]])
    tokens, target = (torch.from_numpy(x).to(device).long() for x in (inputs, raw.copy()))
    begins = _begins(text)
    wanted = np.array([ord(char) for char in text])

    nats, codes = torch.zeros((), dtype=torch.float64, device=device), []
    block = max(1, _BLOCK // window) * window
    for low in range(0, len(raw), block):
        starts = range(low, min(low + block, len(raw)), window)
        states: list[Any] = []  # before each
        parts = []
        for start in starts:
            states.append(state)
            logits, state = model(tokens[None, start : start + window], state)
            parts.append(torch.log_softmax(logits[0].float(), -1))
            report(min(1.0, (start + window) / len(raw)))
        log_probs = torch.cat(parts)
        here = target[low : low + len(log_probs)]
        nats -= log_probs.gather(1, here[:, None]).double().sum()
        places = begins[np.searchsorted(begins, low) : np.searchsorted(begins, low + block)]
        at = torch.from_numpy(places).to(device)
        windows = Windows(model, inputs, starts, states)
        codes.append(greedy_codes(windows, at, log_probs[at - low]))
    model.train(was_training)
    hits = torch.cat(codes).cpu().numpy() == wanted
    return _score(float(nats), hits, text, len(raw))


def score_streaming(
    model: CharModel, data: Text | Sequence[Text], characters: int = TASK_CHARACTERS,
    report: Callable[[float], None] = lambda done: None, *, context: bytes = b"",
    cache: PrefixCache | None = None,
) -> Score:
    """Score as the public task does: predict, take the argmax, observe, one character at a time.
    ``context`` and ``cache`` as in ``score``; the context ends between two characters.

    Bits per byte here come from the stream's own byte probabilities. Where the device takes many
    bytes a launch, each step after the other, predictions are read off the probabilities before
    each byte, and ``model`` is asked where a longer character is in question. Of several documents
    each is streamed by itself.
    """
    return _each(
        lambda one, count, told: _score_stream(model, one, count, told, context, cache),
        data, characters, report)


def _score_stream(
    model: CharModel, data: bytes, characters: int, report: Callable[[float], None],
    context: bytes, cache: PrefixCache | None,
) -> Score:
    text = first_characters(data, characters)
    if not text:
        raise UserError("there is nothing to score: the text is empty")
    stream, _ = begin(model.model, context, cache)
    model.seek(stream)
    raw = as_bytes(text)
    log_probs = stream.fork().read(raw)
    if log_probs is not None:
        return _score_read(model, stream, text, raw, log_probs)
    hits, nats = np.zeros(len(text), dtype=bool), 0.0
    for i, char in enumerate(text):
        hits[i] = model.greedy() == char
        nats -= model.log_prob(char)
        model.observe(char)
        if i % 200 == 0:
            report(i / len(text))
    return _score(nats, hits, text, len(raw))


def _score_read(
    model: CharModel, stream: ByteStream, text: str, raw: bytes, log_probs: torch.Tensor
) -> Score:
    """The streaming score from log-probabilities (bytes, V), each given all bytes before; those
    before the text, ``stream`` has."""
    nats = -_of_each(log_probs, raw).double().sum()
    begins = _begins(text)
    before = log_probs[torch.from_numpy(begins)]  # (characters, V)
    ascii_best, code = before[:, :0x80].max(-1)
    hits = (torch.tensor([ord(c) for c in text], device="cpu") == code).numpy()
    open_places = (before[:, 0xC2:0xF5].amax(-1) >= ascii_best).nonzero()[:, 0].tolist()
    done = 0
    for i in open_places:
        stream.feed(raw[done : begins[i]])
        done = begins[i]
        model.seek(stream)
        hits[i] = model.greedy() == text[i]
    return _score(float(nats), hits, text, len(raw))
