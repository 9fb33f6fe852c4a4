"""How the kernel that streams Mamba layers has their weights: no GPU is needed to lay them out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from mambabyte.ops.stream import cuda as cuda_stream


def test_every_weight_is_packed_once() -> None:
    """Numbers 1 to n as weights: each is found once, in the slice of one block, beside zeros; the
    first layer's projection in the table of what it makes of a byte, here of one-hot rows."""
    shape, count = cuda_stream.Shape(2, 36, 72, 5, 3, 4, hidden=99, centered=False), 0

    def numbers(*size: int) -> torch.Tensor:
        nonlocal count
        first, count = count + 1, count + math.prod(size)
        return torch.arange(first, count + 1.0).view(size)

    d, inner, n, rank, hidden = 36, 72, 5, 3, 99
    shared = torch.ones(d), torch.zeros(d)  # norms are multiplied in
    layers = [
        cuda_stream.LayerWeights(
            shared, numbers(2 * inner, d), numbers(inner, 4), numbers(inner),
            numbers(rank + 2 * n, inner), numbers(inner, rank), numbers(inner),
            torch.zeros(inner, n), numbers(inner), numbers(d, inner), shared,
            numbers(hidden, d), numbers(d, hidden))
        for _ in range(2)
    ]  # fmt: skip
    blob = cuda_stream.pack(layers, shared, numbers(256, d), 16)
    plan = cuda_stream.plan(shape, 16, 1, 227 * 1024)
    assert plan is not None
    assert blob.shape == (16, plan.floats)
    first = layers[0].in_proj.numel()
    found = blob[blob != 0].sort().values
    assert torch.equal(found, torch.arange(first + 1.0, count + 1))
    hot = torch.eye(256, d)
    table = cuda_stream.pack_table(shape, hot, layers[0], 16)
    found = table[table != 0] / F.rms_norm(hot, (d,), eps=shape.eps).max()
    looked_up = torch.cat([torch.zeros(d), torch.arange(1.0, first + 1)])  # d ones are hot's own
    assert torch.equal(found.round().sort().values, looked_up)
