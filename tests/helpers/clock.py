"""A clock that moves only when it is told to: what is timed with it takes the same everywhere."""

from __future__ import annotations


class Clock:
    """Stands for the module ``time`` in the module under test::

        clock = Clock()
        monkeypatch.setattr(timing, "time", clock)
    """

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = time = perf_counter

    def sleep(self, seconds: float) -> None:
        self.now += seconds
