"""The exponents that a chunked log-cumsum scan would take, recorded while a model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mambabyte.model.mixer import Mixer


@contextmanager
def record_exponents(model: nn.Module, chunk: int = 32) -> Iterator[dict[int, float]]:
    """Record ``max |log-decay cumulated over a chunk|`` of each layer with decays while it runs.

    Yields a dict, layer index -> maximum so far over batch, chunks, channels and states. This is
    the exponent that a log-cumsum scan would take: in float32 it overflows above 88.7. A layer
    counts twice when the model calls it twice; nothing is changed in the computation.
    """
    seen: dict[int, float] = {}

    def hook(index: int, mixer: Mixer, args: tuple[Any, ...]) -> None:
        x, state = args[:2]
        value = mixer.exponent(x, state, chunk)
        if value is not None:
            seen[index] = max(value, seen.get(index, 0.0))

    handles = [
        layer.mixer.register_forward_pre_hook(
            lambda mixer, args, index=index: hook(index, mixer, args))
        for index, layer in enumerate(getattr(model, "layers", []))
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
