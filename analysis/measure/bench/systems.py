"""Streaming every preset and every system of the task: generation, streaming, characters.

*Generation* is the engine drawing its own bytes, *streaming* one byte in and one distribution out.
Characters go through the contract of the task: ``predict``, a distribution, and ``observe``. Speeds
do not depend on what weights have learned, so a preset has fresh ones; a system is built on the
front of a text with a step of training, so that its tables are real, if smaller than a whole one's.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from analysis.measure.bench.start import TASK
from analysis.measure.timing import in_turns, quartiles, seconds_of
from mambabyte.config import get_preset
from mambabyte.config.presets import PRESETS
from mambabyte.model import ByteLM
from mambabyte.stream import ByteModel, ByteStream, CharModel
from mambabyte.task import SYSTEMS, build, get_system

COLUMNS = {
    "system": "a preset, or task: and a system of the task",
    "parameters": "of its network",
    "seen": "bytes before",
    "generation_bytes_per_second": "the engine draws its own bytes, median",
    "streaming_bytes_per_second": "a byte in, a distribution out, median",
    "characters_per_second": "predict and observe, a distribution each, median",
}
COUNTED = 2_000_000  # bytes of text that a system is built on
SEEN = 2000
REPEATS = 5
SECONDS = 0.4  # of each of the three, all repeats together


def every() -> list[str]:
    """Names of all presets and systems."""
    return [*PRESETS, *(TASK + name for name in SYSTEMS)]


def check(names: Sequence[str]) -> None:
    """UserError for a preset or system that there is not."""
    for name in names:
        get_system(name.removeprefix(TASK)) if name.startswith(TASK) else get_preset(name)


def run_bench(
    names: Sequence[str], data: bytes, text: bytes, device: str,
    say: Callable[[str], None] = lambda line: None,
) -> pd.DataFrame:
    """Rows with COLUMNS: systems built on ``data`` that stream ``text``. UserError for an unknown
    name."""
    check(names)
    rows = []
    for name in names:
        say(f"{name}: building")
        model = _made(name, data, device)
        rows.append({"system": name, **_speeds(model, text, device)})
        say(f"{name}: " + ", ".join(f"{column.partition('_')[0]} {rows[-1][column]:,.0f} a second"
                                    for column in list(COLUMNS)[3:]))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _made(name: str, data: bytes, device: str) -> ByteModel:
    if not name.startswith(TASK):
        return ByteLM(get_preset(name).model).to(device).eval()
    system = get_system(name.removeprefix(TASK))
    one_step = replace(system.train, n_steps=1, batch_size=1, context=64, step="eager")
    return build(replace(system, train=one_step), data[:COUNTED], device).model.eval()


def _speeds(model: ByteModel, text: bytes, device: str) -> dict[str, Any]:
    stream = ByteStream(model)
    stream.feed(text[: SEEN - 1])
    stream.feed(text[SEEN - 1 : SEEN])  # alone: so that repeats start from the engine's state
    rest = text[SEEN:] or text
    characters = CharModel(model)
    characters.seek(stream)
    chars = rest.decode("utf-8", "ignore") or "a"

    def draw(count: int) -> None:
        for _ in stream.fork().draw(count, temperature=0):
            pass

    def feed(count: int) -> None:
        fork = stream.fork()
        for i in range(count):
            fork.feed(rest[i % len(rest) : i % len(rest) + 1])

    def ask(count: int) -> None:
        for i in range(count):
            characters.predict()
            characters.observe(chars[i % len(chars)])

    return {"parameters": sum(p.numel() for p in getattr(model, "parameters", list)()),
            "seen": SEEN, **{column: _a_second(step, device) for column, step in
                             zip(list(COLUMNS)[3:], (draw, feed, ask), strict=True)}}


def _a_second(step: Callable[[int], None], device: str) -> float:
    """How many of what ``step(n)`` does n of pass in a second: the median of repeats."""
    step(2)
    began = time.perf_counter()
    step(8)
    trial = (time.perf_counter() - began) / 8
    count = max(4, round(SECONDS / REPEATS / trial))
    run = functools.partial(seconds_of, functools.partial(step, count), device)
    return count / quartiles(in_turns({"": run}, REPEATS)[""])[1]
