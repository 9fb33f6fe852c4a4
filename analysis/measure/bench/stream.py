"""Streaming a model: bytes a second against streams and bytes seen, scoring time, joules.

*Generation* is the engine drawing its own bytes; *streaming* is one byte in, one distribution out.
``run_bench`` takes every way there is on the device: one call of the model a byte through torch,
the stream that ``mambabyte generate`` and ``eval`` use, and on a GPU the one-launch kernel with
several streams at once. Bytes are drawn greedily and fed back, so every byte waits for the one
before, except in scoring, where they are given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch

from analysis.measure.bench.peers import kept_when_interrupted
from analysis.measure.timing import Said, in_turns, quartiles, seconds_of
from mambabyte.energy import EnergyMeter
from mambabyte.errors import UserError
from mambabyte.evaluate import score, score_streaming
from mambabyte.model import ByteLM
from mambabyte.stream import ByteStream, CharModel, stream_engine
from mambabyte.stream.engines.cuda import CudaEngine
from mambabyte.stream.generation import Repetitions, Speculation

TORCH, BYTE, DRAW, KERNEL, PLAIN, GUESSED = (
    "torch, a call a byte", "stream, a byte fed", "stream, bytes drawn", "kernel, bytes drawn",
    "short texts drawn", "short texts, guesses kept")
COLUMNS = {
    "way": "what was timed",
    "streams": "texts that go on at the same time",
    "seen": "bytes each had seen before",
    "microseconds": "a byte of every stream, median",
    "low": "first quartile",
    "high": "third quartile",
    "bytes_per_second": "of all streams together",
    "joules_per_megabyte": "gross, by the machine's own counter",
}
VALUES = {  # unit, and what it is
    "generation_bytes_per_second": ("bytes/s", "generation: the engine draws its own bytes"),
    "streaming_bytes_per_second": ("bytes/s", "streaming: one byte in, one distribution out"),
    "plain_bytes_per_second": (
        "bytes/s", "generation of texts of 256 bytes, each behind 300 more of the given text"),
    "speculative_bytes_per_second": (
        "bytes/s", "the same texts, where a pass checks guesses of how it goes on"),
    "bytes_a_pass": ("bytes", "that a pass of it draws; a text that repeats itself draws many"),
    "scoring_seconds": ("s", "scoring the text, byte after byte"),
    "window_seconds": ("s", "scoring the same text in parallel windows"),
    "different_hits": ("characters", "predicted right by one of the two ways only"),
    "accuracy": ("", "share of characters predicted right, streaming"),
    "scored_characters": ("characters", "that the text had, of those asked for"),
}
SECONDS = 0.6  # of each case, all its repeats together
PROMPTS, PROMPT, DRAWN = 4, 300, 256  # short texts that guesses are tried on, and bytes of each
REPEATS = 5


def run_bench(
    model: ByteLM, text: bytes, streams: Sequence[int] = (1, 8, 64, 512),
    seen: Sequence[int] = (100, 1000, 10_000, 100_000, 1_000_000), characters: int = 60_000,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Rows with COLUMNS, and VALUES: generation and streaming of one text after the most bytes of
    ``seen``, and scoring the first ``characters`` characters of ``text``, unless that is 0.

    What a machine does not count is nan. The speed of scoring depends on the model: each place
    where it thinks of a character of several bytes is asked about again. An interruption keeps
    what was timed before it; KeyboardInterrupt where that is nothing.
    """
    if not text:
        raise UserError("there is no text to stream: give a corpus with a validation split")
    device = str(model.device)
    rows: list[dict[str, Any]] = []

    def case(way: str, count: int, before: int, step: Callable[[int], object]) -> None:
        rows.append({"way": way, "streams": count, "seen": before, **_time(step, count, device)})
        say(f"{way}, {count} streams, {before} bytes seen: {rows[-1]['microseconds']:.1f} us")

    said, scored = Said(say), dict[str, float]()
    guessed: list[Speculation] = []
    with kept_when_interrupted(rows, say):
        for count in streams:
            case(TORCH, count, 1, functools.partial(_by_calls, model, count))
            engine = stream_engine(model)
            if isinstance(engine, CudaEngine):
                case(KERNEL, count, 1, functools.partial(_by_kernel, engine, count))
        stream = ByteStream(model)
        done = 1
        for before in sorted(seen):
            say(f"{BYTE}: reading on to {before:,} bytes")
            while done < before:
                piece = text[: min(len(text), 1 << 16, before - done)]
                stream.feed(piece)
                done += len(piece)
                said(f"{BYTE}: {done:,} of {before:,} bytes")
            case(BYTE, 1, before, functools.partial(_by_feeding, stream))
            case(DRAW, 1, before, functools.partial(_by_drawing, stream))
        if seen and (stream.guesses_itself or not stream.draws_itself):
            places = _places(stream, text, done)
            case(PLAIN, 1, max(seen), functools.partial(_by_drawing_short, places))
            case(GUESSED, 1, max(seen), functools.partial(_by_guessing, places, guessed))
        if characters:
            scored = _scoring(model, text, characters, say)
    return pd.DataFrame(rows, columns=list(COLUMNS)), _values(rows, guessed) | scored


def _places(stream: ByteStream, text: bytes, done: int) -> list[tuple[ByteStream, bytes]]:
    """Streams behind PROMPTS short texts, each read on from the one before, and those texts;
    ``done`` bytes of ``text``, which goes round, were read already."""
    places = []
    for i in range(PROMPTS):
        begin = (done + i * PROMPT) % len(text)
        prompt = (text[begin:] + text)[:PROMPT]
        stream.feed(prompt)
        places.append((stream.fork(), prompt))
    return places


def _values(rows: Sequence[dict[str, Any]], guessed: Sequence[Speculation]) -> dict[str, float]:
    """Speeds after the most bytes, of the ways that were timed."""
    last = {row["way"]: float(row["bytes_per_second"]) for row in rows}
    values = {name: last[way] for name, way in (
        ("generation_bytes_per_second", DRAW), ("streaming_bytes_per_second", BYTE),
        ("plain_bytes_per_second", PLAIN), ("speculative_bytes_per_second", GUESSED))
        if way in last}
    if guessed:
        values["bytes_a_pass"] = sum(g.drawn for g in guessed) / sum(g.passes for g in guessed)
    return values


def _scoring(
    model: ByteLM, text: bytes, characters: int, say: Callable[[str], None]
) -> dict[str, float]:
    chars, device = CharModel(model), str(model.device)
    ways = {"scoring_seconds": functools.partial(score_streaming, chars),
            "window_seconds": functools.partial(score, model)}
    values, hits = {}, []
    for name, way in ways.items():
        say(f"{VALUES[name][1]}: {characters:,} characters")
        way(text, min(characters, 2000))  # compiles, fills caches
        values[name] = seconds_of(lambda way=way: hits.append(  # type: ignore[misc]
            way(text, characters).hits), device)
        say(f"{VALUES[name][1]}: {values[name]:.2f} s")
    values["different_hits"] = float((hits[0] != hits[1]).sum())
    values["accuracy"] = float(hits[0].mean())
    values["scored_characters"] = float(len(hits[0]))
    return values


def _time(step: Callable[[int], object], count: int, device: str) -> dict[str, float]:
    """``step(n)`` advances ``count`` streams by n bytes; repeats of a suitable n are timed."""

    def once(n: int) -> float:
        return seconds_of(functools.partial(step, n), device)

    once(2)
    trial = once(8) / 8
    n = max(4, round(SECONDS / REPEATS / trial))
    meter = EnergyMeter(device)
    samples = in_turns({count: lambda: once(n) / n}, REPEATS)[count]
    joules = meter.read().gross_joules
    low, median, high = quartiles(samples)
    return {
        "microseconds": 1e6 * median, "low": 1e6 * low, "high": 1e6 * high,
        "bytes_per_second": count / median,
        "joules_per_megabyte": float("nan") if joules is None
        else joules / (n * REPEATS * count) * 1e6,
    }


@torch.inference_mode()
def _by_calls(model: ByteLM, count: int, length: int) -> None:
    tokens = torch.zeros(count, 1, dtype=torch.long, device=model.device)
    state: Any = None
    for _ in range(length):
        logits, state = model(tokens, state)
        tokens = logits[:, -1:].argmax(-1)


@torch.inference_mode()
def _by_kernel(engine: CudaEngine, count: int, length: int) -> None:
    streamer = engine.streamer
    log_probs = torch.zeros(count, 256, device=streamer.device)
    streamer.draw(log_probs, streamer.new_state(count), length, temperature=0.0)


def _by_feeding(stream: ByteStream, length: int) -> None:
    stream = stream.fork()
    for _ in range(length):
        stream.feed(b"e")


def _by_drawing(stream: ByteStream, length: int) -> None:
    for _ in stream.fork().draw(length, temperature=0):
        pass


def _by_drawing_short(places: Sequence[tuple[ByteStream, bytes]], length: int) -> None:
    for i, start in enumerate(range(0, length, DRAWN)):
        _by_drawing(places[i % len(places)][0], min(DRAWN, length - start))


def _by_guessing(
    places: Sequence[tuple[ByteStream, bytes]], guessed: list[Speculation], length: int
) -> None:
    for i, start in enumerate(range(0, length, DRAWN)):
        stream, prompt = places[i % len(places)]
        guesser = Repetitions()
        guesser.read(prompt)
        guessed.append(Speculation(guesser))
        for _ in guessed[-1].draw(stream.fork(), min(DRAWN, length - start), temperature=0):
            pass
