"""The exponents that a chunked log-cumsum scan would take, recorded while a model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from mambabyte.model.block import MambaMixer


@contextmanager
def record_exponents(model: nn.Module, chunk: int = 32) -> Iterator[dict[int, float]]:
    """Record ``max |log-decay cumulated over a chunk|`` of each SSM layer while it runs.

    Yields a dict, layer index -> maximum so far over batch, chunks, channels and states. This is
    the exponent that a log-cumsum scan would take: in float32 it overflows above 88.7. A layer
    counts twice when the model calls it twice; nothing is changed in the computation.
    """
    seen: dict[int, float] = {}

    def hook(mixer: MambaMixer, args: tuple, index: int) -> None:
        with torch.no_grad():
            x, state = args
            _, delta, *_ = mixer.scan_inputs(x, None if state is None else state.tail)
            dt = F.softplus(delta.float() + mixer.dt_proj.bias)
            pad = -dt.shape[1] % min(chunk, dt.shape[1])
            dt = F.pad(dt, (0, 0, 0, pad)).unflatten(1, (-1, min(chunk, dt.shape[1])))
            fastest = mixer.A_log.float().exp().amax(-1)  # (D,)
            value = float((dt.sum(2) * fastest).max())
            seen[index] = max(value, seen.get(index, 0.0))

    handles = []
    for index, layer in enumerate(getattr(model, "layers", [])):
        if isinstance(layer.mixer, MambaMixer):
            handles.append(
                layer.mixer.register_forward_pre_hook(
                    lambda mixer, args, index=index: hook(mixer, args, index)
                )
            )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
