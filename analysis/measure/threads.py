"""Torch on a given number of threads, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch on ``count`` threads; 0 leaves it as it is.

    One is the steadier measure on a machine with other work, as two wait for whichever was
    interrupted; and for small tensors a second one costs more than it brings.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
