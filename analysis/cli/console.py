"""Progress for people: a live line on a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from mambabyte.train import Progress as TrainingProgress


def say(line: str) -> None:
    """One plain line of progress; lost, and the work goes on, where no one reads it any more."""
    write(line, sys.stderr)


def write(text: str, stream: TextIO) -> None:
    """Print to a stream whose reader may have gone, as with ``| tee`` and Ctrl-C.

    From the first failure on, what is written there goes nowhere: at the end of the process the
    interpreter would fail over it once more.
    """
    try:
        print(text, file=stream, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Bar:
    """A bar for work of known length: ``with Bar("scoring") as bar: bar(0.5, "note")``."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._tenth = 0
        self._live: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"),
                TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
            )
            self._task = self._live.add_task(title, total=1.0, note="")

    def __enter__(self) -> Bar:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def stage(self, title: str) -> None:
        """Go on to other work, shown from 0 under ``title``; nothing happens where it is shown."""
        if title != self.title:
            self.title, self._tenth = title, 0
            if self._live:
                self._live.update(self._task, description=title, completed=0.0, note="")

    def __call__(self, done: float, note: str = "", *, line: bool = False) -> None:
        """``done`` in [0, 1]; off a terminal a line is printed every tenth, or always if asked."""
        if self._live:
            self._live.update(self._task, completed=done, note=note)
        elif line or int(done * 10) > self._tenth:
            self._tenth = int(done * 10)
            say(f"{self.title} {done:4.0%} {note}".rstrip())


def training_note(p: TrainingProgress) -> str:
    """One line about a training step, in the units of the field."""
    parts = [f"step {p.step}/{p.n_steps}", f"loss {p.loss:.4f}", f"{p.bits_per_byte:.4f} bits/byte",
             f"{p.bytes_per_second / 1e3:.1f} kB/s", f"{p.seconds:.0f} s"]
    if p.exponent is not None:
        parts.append(f"exponent {p.exponent:.1f}")
    parts.append("energy not measured" if p.joules is None else f"{p.joules:.0f} J")
    return ", ".join(parts)
