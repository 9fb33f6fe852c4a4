"""Several streams through one model at once: in one batch each byte, and beams of one text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch

from mambabyte.config.checks import Some, fit, shown
from mambabyte.corpus.files import bytes_of
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.stream.engines.base import ByteModel, place_of
from mambabyte.stream.states import kind, select, split, stack
from mambabyte.stream.streams import ByteStream, numbers


@torch.inference_mode()
def feed_together(streams: Sequence[ByteStream], data: Sequence[bytes]) -> None:
    """Advance each of ``streams``, all of one model, by its bytes of ``data``: as ``feed`` of each
    would, up to rounding, in one call of the model for all that are given equally many.

    A stream may join or leave between any two calls. A model that is no ByteLM, such as a mixture,
    batches those that have seen equally many bytes. UserError for streams of different models, or
    one that is there twice.
    """
    lists = isinstance(streams, list | tuple) and isinstance(data, list | tuple)
    if not lists or not all(isinstance(stream, ByteStream) for stream in streams):
        raise UserError(f"streams are {shown(streams)} and their texts {shown(data)}: expected a "
                        "list of streams and as long a list of bytes")
    if len(streams) != len(data):
        raise UserError(f"{len(streams)} streams and {len(data)} pieces of text: expected one each")
    if len({id(stream) for stream in streams}) != len(streams):
        raise UserError("a stream is given twice: fork it, and both go on from its place")
    if len({id(stream.model) for stream in streams}) > 1:
        raise UserError("the streams are of different models: feed those of one together")
    data = [bytes_of(piece) for piece in data]
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, (stream, piece) in enumerate(zip(streams, data, strict=True)):
        if piece:
            alike = isinstance(stream.model, ByteLM) or kind(stream.kept.state)
            groups[alike, len(piece)].append(i)
    for group in groups.values():
        if len(group) == 1:
            streams[group[0]].feed(data[group[0]])
            continue
        model = streams[group[0]].model
        states = [streams[i].kept.state for i in group]
        if isinstance(model, ByteLM):
            states = model.aligned(states)
        tokens = torch.tensor([list(data[i]) for i in group], device=model.device)
        logits, state = model(tokens, stack(states))
        after = numbers(torch.log_softmax(logits[:, -1].float(), -1).cpu())
        for i, log_probs, row in zip(group, after, split(state), strict=True):
            streams[i].move(row, log_probs)


class Beam(NamedTuple):
    """A continuation that beam search found."""

    data: bytes
    log_prob: float  # natural, of all its bytes


@torch.inference_mode()
def beam_search(
    model: ByteModel, prompt: bytes = b"", max_bytes: int = 64, beams: int = 4
) -> list[Beam]:
    """The most probable continuations of ``prompt`` by ``max_bytes`` bytes that keeping ``beams``
    at a time finds, best first; one beam is greedy generation.

    All are one batch whose states are reordered each byte. UserError for fewer than one beam.
    """
    max_bytes, beams = fit(max_bytes, Some, "max_bytes"), fit(beams, Some, "beams")
    place_of(model)
    stream = ByteStream(model.eval())
    stream.feed(prompt)
    state, log_probs = stream.kept
    total = torch.zeros(1, dtype=torch.float32, device="cpu")
    found = torch.empty(1, 0, dtype=torch.long, device="cpu")
    for done in range(max_bytes):
        each = total[:, None] + log_probs[:, :256]  # (beams, 256)
        total, best = each.flatten().topk(min(beams, each.numel()))
        row, byte = best // 256, best % 256
        found = torch.cat([found[row], byte[:, None]], 1)
        if done < max_bytes - 1:
            logits, state = model(byte[:, None].to(model.device), select(state, row))
            log_probs = numbers(torch.log_softmax(logits[:, -1].float(), -1).cpu())
    return [Beam(bytes(data), log_prob) for data, log_prob in zip(
        found.tolist(), total.tolist(), strict=True)]
