"""Seconds and joules from a process's start to its first training steps, each in a fresh process.

A child trains as ``mambabyte train`` does, or builds a system of the task, and says when it has
imported torch, made the device's context, imported this package, and done steps 1 and 50. Cold is
with caches of torch, Triton, the driver and this package in folders that are new and empty, warm is
again with the same folders. The clock starts before the child does. Joules are of the counter of
energy that the child's device has, from the same moment on.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mambabyte.config import Preset, get_preset
from mambabyte.config.files import to_json
from mambabyte.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from mambabyte.task import System

Way = Literal["auto", "eager", "graph", "fused", "compile"]
TASK = "task:"  # before the name of a system of the task, which some presets have too
IMPORTED, CONTEXT, PACKAGE, OPENED = (  # marks before the steps
    "torch imported", "device's context", "package imported", "text opened")
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton",
          "CUDA_CACHE_PATH": "cuda", "XDG_CACHE_HOME": "own"}
PROCESS_SECONDS = 300.0


def check(names: Sequence[str], ways: Sequence[str], device: str) -> None:
    """UserError for a preset or system that there is not, and for a way the device has not."""
    for name in names:
        _named(name)
    if not device.startswith("cuda") and {"fused", "compile"} & {*ways}:
        raise UserError(f"ways {' and '.join(ways)} on {device}: it has eager and graph")


def _named(name: str) -> Preset | System:
    from mambabyte.task.systems import get_system

    system: Preset | System = (get_system(name.removeprefix(TASK)) if name.startswith(TASK)
                               else get_preset(name))
    if system.model is None:
        raise UserError(f"{name} trains no network: choose another system")
    return system


def start_in(
    folder: Path, name: str, way: str, caches: str, device: str, data: bytes,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Rows (system, way, caches, mark, seconds, joules) of training ``name``, a preset or
    "task:SYSTEM", on the text ``data`` with the caches of ``folder``: "cold" where it is new and
    empty, "warm" with what an earlier call left in it. joules are nan where they were not measured.
    UserError where the child fails."""
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_bytes(data)
    say(f"{name}, {way}, {caches}: starting")
    marks = _child(name, way, device, folder)
    said = ", ".join(f"{mark['mark']} {mark['seconds']:.2f} s" for mark in marks)
    say(f"{name}, {way}, {caches}: {said}")
    return [{"system": name, "way": way, "caches": caches, **mark} for mark in marks]


def _places(folder: Path) -> dict[str, str]:
    return {variable: str(folder / cache) for variable, cache in CACHES.items()}


def paces(
    folders: Mapping[str, Path], ways: Sequence[str], device: str,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """The rows of :func:`step_ms` of each system, with the caches in its folder, so that what a
    start compiled is found. In a process of their own: a card that has a context draws more, and
    the next start's joules would have that in them."""
    if not folders:
        return
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for name, folder in folders.items():
            rows = pool.submit(_pace, _places(folder), name, ways, device).result()
            say("; ".join(f"{name}, {row['way']}: {row['ms']:.3f} ms a step" for row in rows))
            yield from rows


def _pace(places: dict[str, str], *what: Any) -> list[dict[str, Any]]:
    os.environ.update(places)
    return step_ms(*what)


def step_ms(
    name: str, ways: Sequence[str], device: str, rounds: int = 5, seconds: float = 0.3
) -> list[dict[str, Any]]:
    """Rows (system, way, ms, low, high): a step of a preset, or of the network of a task's system
    without a guide, median and quartiles of interleaved rounds of as many seconds each."""
    from analysis.measure.bench.steps import training_step
    from analysis.measure.timing import in_turns, quartiles, seconds_of

    system = _named(name)
    assert system.model is not None
    steps = {way: training_step(system.model, system.train, device, way)[0]  # type: ignore[arg-type]
             for way in ways}
    counts = {way: max(1, round(seconds / seconds_of(step, device, 2)))
              for way, step in steps.items()}
    took = in_turns({way: partial(seconds_of, step, device, counts[way])
                     for way, step in steps.items()}, rounds)
    rows = []
    for way, each in took.items():
        low, median, high = (1e3 * s for s in quartiles(each))
        rows.append({"system": name, "way": way, "ms": median, "low": low, "high": high})
    return rows


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Of :func:`start_in`'s rows a line a start: seconds that torch's import, the device's context
    and the package's import took; those from the open text to each step; and all from the process's
    start, with joules."""
    import pandas as pd

    lines = []
    for (system, way, caches), marks in frame.groupby(["system", "way", "caches"], sort=False):
        at, joules = marks.set_index("mark")["seconds"], marks.set_index("mark")["joules"]
        line = {"system": system, "way": way, "caches": caches, "import torch (s)": at[IMPORTED],
                "context (s)": at[CONTEXT] - at[IMPORTED], "package (s)": at[PACKAGE] - at[CONTEXT]}
        for step in (mark for mark in at.index if mark.startswith("step")):
            line |= {f"text to {step} (s)": at[step] - at[OPENED],
                     f"process to {step} (s)": at[step], f"process to {step} (J)": joules[step]}
        lines.append(line)
    return pd.DataFrame(lines)


def start_values(frame: pd.DataFrame, pace: pd.DataFrame) -> dict[str, tuple[float, str, str]]:
    """Seconds and joules to each step that is marked and milliseconds of one: name -> (value, unit,
    about)."""
    found: dict[str, tuple[float, str, str]] = {}
    for row in frame.to_dict("records"):
        if row["mark"].startswith("step"):
            to = f"{row['mark']}_{row['system']}_{row['way']}_{row['caches']}"
            about = f"{row['system']} by {row['way']}, {row['caches']}, to {row['mark']}"
            found[f"seconds_{to}"] = row["seconds"], "s", about
            if row["joules"] == row["joules"]:  # not nan
                found[f"joules_{to}"] = row["joules"], "J", f"{about}, gross"
    for row in pace.to_dict("records"):
        found[f"ms_{row['system']}_{row['way']}"] = (
            row["ms"], "ms", f"a step of {row['system']} by {row['way']}, median")
    return {re.sub(r"\W", "_", name): value for name, value in found.items()}


def _child(name: str, way: str, device: str, folder: Path) -> list[dict[str, Any]]:
    given = to_json([name, way, device, str(folder / "text.txt"), str(folder)])
    before, began = _joules(device), time.time()
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "analysis.measure.bench.start", given, str(began)],
            env={**os.environ, **_places(folder)}, capture_output=True, text=True,
            timeout=PROCESS_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"{name} by {way} did not come to step 50 within {PROCESS_SECONDS:g} s: "
                        "choose a smaller preset") from None
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{name} by {way} ended with {ran.returncode}: {last}")
    marks: list[dict[str, Any]] = json.loads(ran.stdout.splitlines()[-1])
    for mark in marks:
        known = before is not None and mark["joules"] is not None
        mark["joules"] = mark["joules"] - before if known else float("nan")
    return marks


def _joules(device: str) -> float | None:
    """What a GPU's counter of energy says; None where there is none that processes share."""
    if not device.startswith("cuda"):
        return None
    from mambabyte.energy import NvmlCounter

    try:
        return NvmlCounter(int(device.partition(":")[2] or 0)).joules()
    except Exception:  # whatever a driver lacks: then it is not measured
        return None


class _Enough(Exception):
    """Step 50 is done."""


def _main(given: str, began: float) -> None:
    name, way, device, text, folder = json.loads(given)
    marks: list[dict[str, Any]] = []

    def mark(what: str) -> None:
        seconds = time.time() - began
        # Which counter is the device's is known once there is a context.
        joules = None if what == IMPORTED else _joules(device)
        marks.append({"mark": what, "seconds": seconds, "joules": joules})
        if what == "step 50":
            raise _Enough

    import torch
    mark(IMPORTED)
    torch.zeros(1, device=device)
    mark(CONTEXT)
    with contextlib.suppress(_Enough):
        (_build if name.startswith(TASK) else _train)(
            name.removeprefix(TASK), way, device, text, folder, mark)
    print(to_json(marks))


def _train(
    name: str, way: Way, device: str, text: str, folder: str, mark: Callable[[str], None]
) -> None:
    from mambabyte.corpus import load_corpus
    from mambabyte.train import Progress, train

    def report(progress: Progress) -> None:
        if progress.step in (1, 50):
            mark(f"step {progress.step}")

    mark(PACKAGE)
    corpus, preset = load_corpus(text), get_preset(name)
    mark(OPENED)
    recipe = replace(preset.train, step=way, log_every=50, n_steps=max(50, preset.train.n_steps))
    run = tempfile.mkdtemp(dir=folder)
    train(preset.model, recipe, corpus, Path(run) / "run", device=device, report=report)


def _build(
    name: str, way: Way, device: str, text: str, folder: str, mark: Callable[[str], None]
) -> None:
    from mambabyte.corpus import load_corpus
    from mambabyte.task import build, get_system

    def report(line: str) -> None:
        for step in (1, 50):
            if line.startswith(f"step {step}: "):
                mark(f"step {step}")

    mark(PACKAGE)
    data, system = load_corpus(text).train, get_system(name)
    mark(OPENED)
    build(replace(system, train=replace(system.train, step=way)), data, device, report=report)


if __name__ == "__main__":
    _main(sys.argv[1], float(sys.argv[2]))
