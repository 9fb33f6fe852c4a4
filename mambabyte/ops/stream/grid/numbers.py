"""States of layers as tensors of the model, and as ``hybrid.cu`` has them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.config import ModelConfig
from mambabyte.ops.stream.cuda import split


class _Part(NamedTuple):
    """Where numbers of a layer's state lie: tensors (B, ..., widths side by side), cut into blocks
    along ``dim``."""

    dim: int
    widths: tuple[int, ...]  # along dim, of the parts that are cut each for itself
    other: int  # size of the other axis


def _parts(c: ModelConfig, letter: str) -> list[_Part]:
    taps = c.d_conv - 1
    if letter == "M":
        return [_Part(1, (c.d_inner,), c.d_state), _Part(2, (c.d_inner,), taps)]
    if letter == "S":
        return [_Part(1, (c.d_inner,), c.ssd_d_state),
                _Part(2, (c.d_inner, 2 * c.ssd_groups * c.ssd_d_state), taps)]
    if letter == "R":
        return [*2 * [_Part(1, (c.d_inner,), c.ssd_d_state)], _Part(2, (c.d_inner,), 1)]
    if letter in "DK":
        values = c.d_model * c.delta_expand_v
        return [_Part(1, (values,), c.delta_head_dim),
                _Part(2, (c.d_model, c.d_model, values), taps)]
    return []


def to_numbers(c: ModelConfig, layers: list[list[Tensor]], blocks: int) -> Tensor:
    """States of layers, each tensors (B, channels, states) and (B, taps - 1, channels), or none, as
    the kernel has them: (B, blocks * floats)."""
    found = []
    for letter, tensors in zip(c.layers, layers, strict=True):
        for part, x in zip(_parts(c, letter), tensors, strict=True):
            shares = [split(piece.float(), part.dim, blocks)
                      for piece in x.split(part.widths, part.dim)]
            found.append(torch.cat(shares, part.dim + 1).flatten(2))
    if not found:
        return torch.zeros(1, 0, dtype=torch.float32, device="cpu")
    whole = torch.cat(found, 2)  # (blocks, B, floats)
    return F.pad(whole, (0, -whole.shape[2] % 4)).transpose(0, 1).flatten(1).contiguous()


def from_numbers(c: ModelConfig, numbers: Tensor, blocks: int) -> list[list[Tensor]]:
    """The inverse of ``to_numbers``."""
    whole, at, layers = numbers.unflatten(1, (blocks, -1)), 0, []
    for letter in c.layers:
        tensors = []
        for part in _parts(c, letter):
            each = [-(-w // blocks) for w in part.widths]
            size = sum(each) * part.other
            piece = whole[:, :, at : at + size]
            at += size
            shape = (sum(each), part.other) if part.dim == 1 else (part.other, sum(each))
            pieces = piece.unflatten(2, shape).split(each, part.dim + 1)
            tensors.append(torch.cat([
                p.movedim(1, part.dim).flatten(part.dim, part.dim + 1).narrow(part.dim, 0, w)
                for p, w in zip(pieces, part.widths, strict=True)], part.dim))
        layers.append(tensors)
    return layers
