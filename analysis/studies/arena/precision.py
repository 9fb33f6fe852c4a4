"""A state that is kept in fewer bits: what a stream loses by it, and where.

The state is rounded after every byte, as it would be where it is stored, to a format (bfloat16,
float16, int8 with a scale a row) and by a way: to nearest, stochastically (up or down with the
probability that makes the mean right), or to nearest with error feedback (what was dropped is kept
in the same format, and added before the next rounding: twice the bytes). Arithmetic is float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.studies.ablation.learning import LN2
from analysis.studies.arena.memory import log_decays
from mambabyte.model import ByteLM

FORMATS = ("bfloat16", "float16", "int8")
WAYS = ("nearest", "stochastic", "feedback")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
STREAMS = 64
QUARTERS = 4  # of a stream, whose losses are shown apart
LIFE_EDGES = (0.0, 10.0, 100.0, 1000.0, 1e12)  # half-lives, bytes
_DROPPED = {"bfloat16": 16, "float16": 13}  # of float32's mantissa bits


def rounded(x: Tensor, kept: str, stochastic: bool = False) -> Tensor:
    """``x``, float32, as it comes back from the format ``kept``; float16 saturates."""
    if kept == "float32":
        return x
    if kept == "int8":
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        units = x / scale
        return (torch.floor(units + torch.rand_like(units)) if stochastic
                else torch.round(units)).clamp(-127, 127) * scale
    if stochastic:
        span = 1 << _DROPPED[kept]
        noise = torch.randint_like(x, span, dtype=torch.int32)
        x = ((x.view(torch.int32) + noise) & -span).view(torch.float32)
    if kept == "bfloat16":
        return x.bfloat16().float()
    return x.clamp(-65504, 65504).half().float()


Keep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def keeper(kept: str, way: str = "nearest") -> Keep:
    """(new state, what was dropped before) -> (state as kept, what was dropped)."""
    def keep(new: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        if way != "feedback":
            return rounded(new, kept, way == "stochastic"), dropped
        total = new + dropped
        stored = rounded(total, kept)
        return stored, rounded(total - stored, kept)

    return keep


@torch.no_grad()
def stream(
    model: ByteLM, tokens: Tensor, keepers: Sequence[Keep], capture: bool
) -> tuple[Tensor, Tensor]:
    """Stream tokens (n, T + 1) byte after byte, once for each of ``keepers``, side by side.

    Returns bits per byte (keepers, QUARTERS) of each quarter, and of the last state what stands
    last in it, the memory: (layers, keepers, n, ...). For models of one mixer. A keeper is called
    on each tensor of the state, (layers, n, ...), after every byte. With ``capture``, on a GPU, a
    byte is one captured graph.
    """
    rows = tokens.repeat(len(keepers), 1)
    _, state = model(rows[:, :1].contiguous())
    kind = type(state[0])
    held = [torch.zeros_like(torch.stack(parts), dtype=torch.float32)
            for parts in zip(*state, strict=True)]
    dropped = [torch.zeros_like(t) for t in held]
    index = torch.zeros(1, dtype=torch.int64, device=tokens.device)
    nats = torch.zeros(len(rows), device=tokens.device)

    def byte() -> None:
        logits, after = model(rows.index_select(1, index),
                              [kind(*layer) for layer in zip(*held, strict=True)])
        nats.add_(F.cross_entropy(logits[:, 0].float(), rows.index_select(1, index + 1)[:, 0],
                                  reduction="none"))
        for old, gone, parts in zip(held, dropped, zip(*after, strict=True), strict=True):
            news = torch.stack(parts).float().chunk(len(keepers), 1)
            places = zip(old.chunk(len(keepers), 1), gone.chunk(len(keepers), 1), strict=True)
            for keep, new, (stored, lost) in zip(keepers, news, places, strict=True):
                for place, value in zip((stored, lost), keep(new, lost), strict=True):
                    place.copy_(value)
        index.add_(1)

    run = byte
    if capture:
        side = torch.cuda.Stream(tokens.device)
        side.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                byte()
        torch.cuda.current_stream(tokens.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            byte()
        for t in (*held, *dropped, nats, index):
            t.zero_()
        run = graph.replay
    length = tokens.shape[1] - 1
    bits, before = [], torch.zeros(len(keepers), dtype=torch.float64)
    for quarter in range(QUARTERS):
        steps = length * (quarter + 1) // QUARTERS - length * quarter // QUARTERS
        for _ in range(steps):
            run()
        now = nats.double().view(len(keepers), -1).mean(1).cpu()
        bits.append((now - before) / LN2 / max(1, steps))
        before = now
    return torch.stack(bits, 1), held[-1].unflatten(1, (len(keepers), -1))


def lost_bits(model: ByteLM, text: np.ndarray, device: str) -> dict[str, Any]:
    """Rows: bits lost by each format and way, and the state's error by half-life.

    ``text`` is read as STREAMS streams side by side. For models of one mixer whose state has decays
    and is tensors alone; no rows for others.
    """
    model.eval()
    streams = max(1, min(STREAMS, len(text) // 64))
    length = len(text) // streams - 1
    tokens = torch.from_numpy(
        text[: streams * (length + 1)].reshape(streams, length + 1).copy()).long().to(device)
    decays = log_decays(model, tokens[:4, : min(length, 1024)])
    if len(set(model.config.layers)) > 1 or any(decay is None for decay in decays):
        return {"precision": [], "state_errors": []}
    lives = torch.stack([LN2 / -decay for decay in decays if decay is not None])
    torch.manual_seed(0)
    ways = list(itertools.product(FORMATS, WAYS))
    (plain, *bits), states = stream(
        model, tokens, [keeper("float32"), *itertools.starmap(keeper, ways)],
        capture=device.startswith("cuda"))
    rows, errors = [], []
    for i, ((kept, way), mine) in enumerate(zip(ways, bits, strict=True), 1):
        lost = (mine - plain).tolist()
        rows.append({
            "kept": kept, "way": way, "state_bytes_a_number":
            BYTES[kept] * (2 if way == "feedback" else 1), "bits_per_byte": float(mine.mean()),
            "bits_lost": float(np.mean(lost)), "bits_lost_last_quarter": lost[-1],
            "streamed_bytes": streams * length})
        errors += [{"kept": kept, "way": way, **row}
                   for row in _errors(states[:, i], states[:, 0], lives)]
    return {"precision": rows, "state_errors": errors, "float32_bits": float(plain.mean())}


def _errors(found: Tensor, exact: Tensor, lives: Tensor) -> list[dict[str, Any]]:
    """Relative RMS error of states (layers, n, ...) by the half-life of their numbers, (layers,
    ...) without what all numbers of a channel share."""
    wide = lives[:, None]
    wide = wide.view(*wide.shape, *[1] * (exact.ndim - wide.ndim))
    rows = []
    for low, high in itertools.pairwise(LIFE_EDGES):
        inside = ((wide >= low) & (wide < high)).expand(exact.shape)
        right = float(exact[inside].double().square().sum())
        if right:
            wrong = float((found - exact)[inside].double().square().sum())
            rows.append({"half_life_from": low, "numbers": int(inside[:, 0].sum()),
                         "relative_error": (wrong / right) ** 0.5})
    return rows
