"""Signals that ask a training to end: it ends between two steps, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Ctrl-C; what a batch system or `kill` sends; a terminal that was closed (not on Windows).
ASKED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
              if hasattr(signal, name))


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether one of ASKED came. The second one ends the process.

    One that is ignored stays so: SIGHUP under nohup, SIGINT behind a script's &. Outside of the
    main thread, where Python takes no signals, the function always says no.
    """
    came = False

    def handler(number: int, frame: object) -> None:
        nonlocal came
        came = True
        for each in before:
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT
                          else signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    found = {each: signal.getsignal(each) for each in ASKED}
    before = {each: handler for each, handler in found.items() if handler != signal.SIG_IGN}
    try:
        for each in before:
            signal.signal(each, handler)
        yield lambda: came
    finally:
        for each, previous in before.items():
            signal.signal(each, signal.SIG_DFL if previous is None else previous)
