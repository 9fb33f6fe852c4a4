"""Streaming every preset and every system of the task: generation, streaming, characters.

*Generation* is the engine drawing its own bytes, *streaming* one byte in and one distribution out.
Characters go through the contract of the task: ``predict``, a distribution, and ``observe``. Speeds
do not depend on what weights have learned, so a preset has fresh ones, as has a pattern of layers,
of mamba_byte's width and depth. A system is built on the front of a text, with a step of training
and a gate of little text, so that its tables are real, if smaller than a whole one's.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from analysis.measure.bench.start import TASK
from analysis.measure.timing import in_turns, quartiles, seconds_of
from mambabyte.config import SPECS, get_preset
from mambabyte.config.presets import PRESETS
from mambabyte.model import ByteLM
from mambabyte.stream import ByteModel, ByteStream, CharModel
from mambabyte.task import SYSTEMS, build, get_system

COLUMNS = {
    "system": "a preset, a pattern of layers, or task: and a system of the task",
    "engine": "what computes its network's bytes",
    "parameters": "of its network",
    "seen": "bytes before",
    "generation_bytes_per_second": "the engine draws its own bytes, median",
    "streaming_bytes_per_second": "a byte in, a distribution out, median",
    "characters_per_second": "predict and observe, a distribution each, median",
}
COUNTED = 2_000_000  # bytes of text that a system is built on
SEEN = 2000
REPEATS = 5
SECONDS = 0.25  # of each of the three, all repeats together
_FITTED, _GUIDING = 8192, 0.95  # bytes that a gate is fitted on; share of the text that guides


def every() -> list[str]:
    """Names of all presets, of models of one letter each, and of all systems."""
    return [*PRESETS, *SPECS, *(TASK + name for name in SYSTEMS)]


def _is_pattern(name: str) -> bool:
    return bool(name) and name not in PRESETS and SPECS.keys() >= set(name)


def check(names: Sequence[str]) -> None:
    """UserError for a preset or system that there is not."""
    for name in names:
        if name.startswith(TASK):
            get_system(name.removeprefix(TASK))
        elif not _is_pattern(name):
            get_preset(name)


def run_bench(
    names: Sequence[str], data: bytes, text: bytes, device: str,
    say: Callable[[str], None] = lambda line: None, *, seconds: float = math.inf,
    known: pd.DataFrame | None = None, after: Callable[[pd.DataFrame], None] = lambda frame: None,
) -> pd.DataFrame:
    """Rows with COLUMNS: systems built on ``data`` that stream ``text``. UserError for an unknown
    name.

    Rows that are ``known`` are taken as they are. No system is begun after ``seconds``, or after
    Ctrl-C: then the rows are fewer than the names. ``after`` is given all rows after each new one.
    """
    check(names)
    found = {} if known is None else {row["system"]: row for row in known.to_dict("records")}
    began = time.perf_counter()

    def frame() -> pd.DataFrame:
        return pd.DataFrame([found[n] for n in names if n in found], columns=list(COLUMNS))

    try:
        for name in names:
            if name in found or time.perf_counter() - began > seconds:
                continue
            say(f"{name}: building")
            row = found[name] = {"system": name, **_speeds(_made(name, data, device), text, device)}
            say(f"{name}: " + ", ".join(f"{column.partition('_')[0]} {row[column]:,.0f} a second"
                                        for column in list(COLUMNS)[-3:]) + f"; {row['engine']}")
            after(frame())
    except KeyboardInterrupt:
        if not found:
            raise
    return frame()


def _made(name: str, data: bytes, device: str) -> ByteModel:
    if not name.startswith(TASK):
        preset = get_preset("mamba_byte" if _is_pattern(name) else name).model
        config = replace(preset, layer_pattern=name) if _is_pattern(name) else preset
        return ByteLM(config).to(device).eval()
    system = get_system(name.removeprefix(TASK))
    ngram, mixing = system.ngram, system.mixing
    if ngram is not None:  # nothing is chosen, and few hints are tabulated
        ngram = replace(ngram, weight=ngram.weight or 0.5,
                        guide_share=_GUIDING if ngram.guide_share else 0.0)
    if mixing is not None:
        mixing = replace(mixing, fit_bytes=_FITTED, steps=1)
    one_step = replace(system.train, n_steps=1, batch_size=1, context=64, step="eager")
    return build(replace(system, train=one_step, ngram=ngram, mixing=mixing), data[:COUNTED],
                 device).model.eval()


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

    return {"engine": stream.engine,
            "parameters": sum(p.numel() for p in getattr(model, "parameters", list)()),
            "seen": SEEN, **{column: _a_second(step, device) for column, step in
                             zip(list(COLUMNS)[-3:], (draw, feed, ask), strict=True)}}


def _a_second(step: Callable[[int], None], device: str) -> float:
    """How many of what ``step(n)`` does n of pass in a second: the median of repeats."""
    step(2)
    began = time.perf_counter()
    step(8)
    trial = (time.perf_counter() - began) / 8
    count = max(4, round(SECONDS / REPEATS / trial))
    run = functools.partial(seconds_of, functools.partial(step, count), device)
    return count / quartiles(in_turns({"": run}, REPEATS)[""])[1]
