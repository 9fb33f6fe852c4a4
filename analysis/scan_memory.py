"""What one scan keeps and allocates, counted beside its closed form: full tensors, and slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from analysis.allocations import allocated_bytes, saved_storages
from analysis.frames import not_measured
from analysis.scan_footprint import FLOAT32, PER_CHANNEL, scan_terms, scan_workspace
from mambabyte.ops import FORMS, selective_scan
from mambabyte.ops.cumsum import document_chunked_scan

CHANNELS, STATES, CHUNK = 16, 16, 32  # of the scans that are counted here


def full_tensors_frame(length: int = 256) -> pd.DataFrame:
    """Tensors of B L D N float32 elements that a scan of each form keeps, and needs besides."""
    size = (1, length, CHANNELS, STATES)
    full = math.prod(size) * FLOAT32
    rows = []
    for form in FORMS:
        terms = scan_terms(form, *size, CHUNK)
        kept = sum(n * itemsize for name, n, itemsize in terms if name not in PER_CHANNEL)
        forward, backward = scan_workspace(form, *size, CHUNK)
        counted = None
        if form != "fused":
            counted = _wide_bytes(partial(_scan_loss, form, _scan_inputs(length))) / full
        rows.append({
            "form": form, "kept, full tensors": kept / full if form != "fused" else 0.0,
            "counted, full tensors": counted,
            "forward workspace, full tensors": forward / full,
            "backward workspace, full tensors": backward / full})
    return not_measured(pd.DataFrame(rows), "counted, full tensors")


def kept_without_concatenation(length: int = 256) -> float:
    """Full tensors that the document's scan keeps when nothing is joined, relative to when it is.
    """
    inputs = _scan_inputs(length)
    joined = _wide_bytes(lambda: _scan_loss("document_chunked", inputs))
    return _wide_bytes(lambda: _loss_without_concatenation(inputs)) / joined


def slices_frame(lengths: Sequence[int]) -> pd.DataFrame:
    """Bytes that the backward pass of one scan allocates in all, slices against split."""
    rows = []
    for length in lengths:
        full = length * CHANNELS * STATES * FLOAT32
        for form, how in (("document_chunked", "slices in a loop"), ("corrected_cumsum", "split")):
            inputs = _scan_inputs(length)
            forward = partial(_scan_loss, form, inputs)
            both = partial(_gradients, forward, inputs)
            allocated = allocated_bytes(both) - allocated_bytes(forward)
            rows.append({
                "length, steps": length, "chunks": -(-length // CHUNK), "how": how,
                "allocated in backward, B": allocated,
                "in full tensors": allocated / full})
    return pd.DataFrame(rows)


def _scan_inputs(length: int) -> list[Tensor]:
    """u, delta, A, B, C of one sequence with gentle decay, each wanting a gradient."""
    generator = torch.Generator().manual_seed(0)
    stream, states = (1, length, CHANNELS), (1, length, STATES)
    u, delta, A, B, C = (torch.randn(shape, generator=generator) for shape in (
        stream, stream, (CHANNELS, STATES), states, states))
    return [t.requires_grad_() for t in (u, delta.sigmoid() * 0.01, -A.exp(), B, C)]


def _scan_loss(form: str, inputs: list[Tensor]) -> Tensor:
    u, delta, A, B, C = inputs
    return selective_scan(u, delta, A, B, C, form=form, chunk_size=CHUNK)[0].sum()


def _gradients(loss: Callable[[], Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(), inputs)


def _loss_without_concatenation(inputs: list[Tensor]) -> Tensor:
    """The document's chunked scan, each chunk's output summed at once: nothing is joined."""
    u, delta, A, B, C = inputs
    state = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    total = u.new_zeros(())
    pieces = zip(*(t.split(CHUNK, 1) for t in (u, delta, B, C)), strict=True)
    for u_k, delta_k, B_k, C_k in pieces:
        y, state = document_chunked_scan(u_k, delta_k, A, B_k, C_k, state, CHUNK)
        total = total + y.sum()
    return total


def _wide_bytes(loss: Callable[[], Tensor]) -> int:
    """Bytes of the saved tensors that end in (CHANNELS, STATES), with batch or time before."""
    return sum(size for shape, size in saved_storages(loss)
               if len(shape) > 2 and shape[-2:] == (CHANNELS, STATES))
