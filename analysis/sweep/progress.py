"""What a sweep shows while it works: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

COLOURS = {"done": "green", "skipped": "dim", "failed": "bold red"}


class Progress(Protocol):
    """Told by the sweep what happens; ``run`` is a run id."""

    def started(self, run: str, position: int, total: int) -> None: ...
    def line(self, run: str, text: str) -> None: ...
    def finished(self, run: str, status: str, note: str) -> None: ...
    def close(self) -> None: ...


class PlainProgress:
    """One line an event on standard error: for logs, pipes and CI."""

    def started(self, run: str, position: int, total: int) -> None:
        self._say(f"[{position}/{total}] {run} started")

    def line(self, run: str, text: str) -> None:
        self._say(f"      {run} | {text}")

    def finished(self, run: str, status: str, note: str) -> None:
        self._say(f"      {run} {status}: {note}" if note else f"      {run} {status}")

    def close(self) -> None:
        pass

    def _say(self, text: str) -> None:
        print(printable(text), file=sys.stderr, flush=True)


class LiveProgress:
    """A line for each run at work, with its clock and its last words; ended runs above them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._running: dict[str, tuple[str, float, str]] = {}  # position, began, last words
        self._spinner = Spinner("dots")
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=8)
        self._live.start()

    def started(self, run: str, position: int, total: int) -> None:
        self._running[run] = (f"{position}/{total}", time.monotonic(), "starting the notebook")

    def line(self, run: str, text: str) -> None:
        if run in self._running:
            position, began, _ = self._running[run]
            self._running[run] = (position, began, printable(text))

    def finished(self, run: str, status: str, note: str) -> None:
        self._running.pop(run, None)
        colour = COLOURS.get(status, "yellow")
        self._console.print(
            f"[{colour}]{status:>8}[/] {escape(run)} [dim]{escape(printable(note))}[/]",
            highlight=False)

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for run, (position, began, words) in self._running.items():
            clock = f"{time.monotonic() - began:.0f} s"
            table.add_row(self._spinner, position, run, clock,
                          Text(words, style="dim", no_wrap=True, overflow="ellipsis"))
        return table


def make_progress() -> Progress:
    """Live on a terminal, plain lines otherwise."""
    console = Console(stderr=True)
    return LiveProgress(console) if console.is_terminal else PlainProgress()


def printable(text: str) -> str:
    """One line without control characters: what a study prints cannot drive the terminal."""
    return "".join(c if c.isprintable() else " " for c in text).rstrip()
