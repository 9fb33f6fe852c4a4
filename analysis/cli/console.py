"""Progress for people: a live line on a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

# Marks that turn the direction of what follows, past the end of the text that has them.
REORDERING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def say(line: str) -> None:
    """One plain line of progress; lost, and the work goes on, where no one reads it any more."""
    write(line, sys.stderr)


@contextmanager
def said_again(
    say: Callable[[str], None], first: float = 2.0, most: float = 30.0
) -> Iterator[Callable[[str], None]]:
    """``say`` for lines of progress that may be far apart: while no other comes, the last one is
    said again with the seconds since, after ``first`` of them, twice as many, and so on, the wait
    at most ``most``."""
    line, began, news, over = "", 0.0, threading.Event(), False

    def report(text: str) -> None:
        nonlocal line, began
        line, began = text, time.monotonic()
        say(text)
        news.set()

    def again() -> None:
        wait = first
        while not over:
            if news.wait(wait):
                news.clear()
                wait = first
            elif line:
                say(f"{line}: {time.monotonic() - began:.0f} s so far")
                wait = min(2 * wait, most)

    thread = threading.Thread(target=again, daemon=True)
    thread.start()
    try:
        yield report
    finally:
        over = True
        news.set()
        thread.join()


def write(text: str, stream: TextIO) -> OSError | None:
    """Print to a stream whose reader may have gone, as with ``| tee`` and Ctrl-C; gives back what
    went wrong, such as a full disk.

    From the first failure on, what is written there goes nowhere: at the end of the process the
    interpreter would fail over it once more.
    """
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return error
    return None


def escaped(text: str) -> str:
    """``text`` with its control characters as \\x1b: a terminal would obey them. Tabs and line
    ends stay; marks that reorder text do not, nor bytes of a file's name that are no UTF-8."""
    return "".join(
        c if c in "\n\t" or (unicodedata.category(c) not in ("Cc", "Cs") and c not in REORDERING)
        else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(text: str) -> str:
    """``text`` :func:`escaped`, its line ends too."""
    return escaped(text).replace("\n", "\\n")


class _Rows(Progress):
    """A bar and, in a row of its own, what is known now: whole on 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class _Place(TimeRemainingColumn):
    """Where the work stands in the caller's own words, else the time that remains."""

    max_refresh = None  # type: ignore[assignment]  # the caller's words are never old

    def render(self, task: Task) -> Text:
        return Text(task.fields["place"]) if task.fields["place"] else super().render(task)


class Bar:
    """A bar for work of known length: ``with Bar("scoring") as bar: bar(0.5, "note")``."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._tenth = 0
        self._live: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            self._live = _Rows(
                TextColumn("{task.description}"), BarColumn(bar_width=None),
                TextColumn("{task.percentage:.0f}%"), _Place(), console=console, expand=True)
            self._task = self._live.add_task(title, total=1.0, place="", note="")

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
                self._live.update(self._task, description=title, completed=0.0, place="", note="")

    def __call__(
        self, done: float, note: str = "", *, place: str = "", line: bool = False
    ) -> None:
        """``done`` in [0, 1]; ``place`` stands beside the bar, ``note`` in a row below it.

        Off a terminal a line is printed every tenth, or always if asked.
        """
        if self._live:
            self._live.update(self._task, completed=done, place=place, note=note)
        elif line or int(done * 10) > self._tenth:
            self._tenth = int(done * 10)
            words = ", ".join(part for part in (place, note) if part)
            say(f"{self.title} {done:4.0%} {words}".rstrip())
