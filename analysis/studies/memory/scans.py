"""What one scan keeps and allocates, counted beside its closed form: full tensors, and slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from analysis.measure.allocations import allocated_bytes, peak_bytes, saved_storages
from analysis.measure.scans import runnable
from analysis.runs.frames import not_measured
from mambabyte.ops import FORMS, selective_scan
from mambabyte.ops.scan.dispatch import SCANS
from mambabyte.ops.scan.memory import FLOAT32, PER_CHANNEL, scan_terms, scan_workspace

# Of the scans that are counted here. The C code keeps its states padded to 32 channels.
CHANNELS, STATES, CHUNK = 32, 16, 32
LENGTH = 2048  # the document's original context


def full_tensors_frame(length: int = LENGTH) -> pd.DataFrame:
    """Tensors of B L D N float32 elements that a scan of each form keeps, and needs besides.

    Of the fused form it is the states that it leaves every few steps; they are counted where its
    C code can be compiled.
    """
    size = (1, length, CHANNELS, STATES)
    full = math.prod(size) * FLOAT32
    rows = []
    for form in FORMS:
        terms = scan_terms(form, *size, CHUNK)
        kept = sum(n * itemsize for name, n, itemsize in terms if name not in PER_CHANNEL)
        forward, backward = scan_workspace(form, *size, CHUNK)
        counted = None
        if form in runnable((form,)):
            counted = _wide_bytes(partial(_scan_loss, form, _scan_inputs(length))) / full
        rows.append({
            "form": form, "kept, full tensors": kept / full,
            "counted, full tensors": counted,
            "forward workspace, full tensors": forward / full,
            "backward workspace, full tensors": backward / full})
    return not_measured(pd.DataFrame(rows), "counted, full tensors")


def five_to_seven_frame() -> pd.DataFrame:
    """Full tensors of the document's scan alive at each moment: the way from 5 to 7 and above.

    With many channels and states the rest is small: y, and the gradients of the inputs.
    """
    length, channels, states = LENGTH, 32, 32
    full = length * channels * states * FLOAT32
    inputs = _scan_inputs(length, channels, states)
    forward, backward = (n / full for n in scan_workspace(
        "document_chunked", 1, length, channels, states, CHUNK))
    kept = sum(n * itemsize for name, n, itemsize in scan_terms(
        "document_chunked", 1, length, channels, states, CHUNK) if name not in PER_CHANNEL) / full
    loss = partial(_scan_loss, "document_chunked", inputs)
    counted = _wide_bytes(loss, (channels, states)) / full
    rows = [
        ("kept for the backward pass: b, exp(log_decay - cs), exp(cs), bracket, h", kept, counted),
        ("and log_decay, until the forward pass of the layer ends", kept + 1, None),
        ("peak of the forward pass: and of one chunk cs, inner and h C", kept + forward,
         peak_bytes(loss) / full),
        ("backward pass: kept, and the gradients of b and log_decay, each of full length",
         kept + 2, None),
        ("peak of the backward pass: and a third, of the slice at hand; less the last chunk",
         kept + backward, peak_bytes(partial(_gradients, loss, inputs)) / full),
    ]
    return not_measured(pd.DataFrame(rows, columns=[
        "moment", "closed form, full tensors", "measured, full tensors"]))


def kept_without_concatenation(form: str) -> float:
    """Full tensors that the document's scan keeps when nothing is joined, relative to when it is.
    """
    inputs = _scan_inputs(256)
    joined = _wide_bytes(lambda: _scan_loss(form, inputs))
    return _wide_bytes(lambda: _loss_without_concatenation(form, inputs)) / joined


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


def _scan_inputs(length: int, channels: int = CHANNELS, states: int = STATES) -> list[Tensor]:
    """u, delta, A, B, C of one sequence with gentle decay, each wanting a gradient."""
    generator = torch.Generator().manual_seed(0)
    stream, columns = (1, length, channels), (1, length, states)
    u, delta, A, B, C = (torch.randn(shape, generator=generator) for shape in (
        stream, stream, (channels, states), columns, columns))
    return [t.requires_grad_() for t in (u, delta.sigmoid() * 0.01, -A.exp(), B, C)]


def _scan_loss(form: str, inputs: list[Tensor]) -> Tensor:
    u, delta, A, B, C = inputs
    return selective_scan(u, delta, A, B, C, form=form, chunk_size=CHUNK)[0].sum()


def _gradients(loss: Callable[[], Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(), inputs)


def _loss_without_concatenation(form: str, inputs: list[Tensor]) -> Tensor:
    """The document's chunked scan, each chunk's output summed at once: nothing is joined."""
    u, delta, A, B, C = inputs
    state = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    total = u.new_zeros(())
    pieces = zip(*(t.split(CHUNK, 1) for t in (u, delta, B, C)), strict=True)
    for u_k, delta_k, B_k, C_k in pieces:
        y, state = SCANS[form](u_k, delta_k, A, B_k, C_k, state, CHUNK)
        total = total + y.sum()
    return total


def _wide_bytes(loss: Callable[[], Tensor], wide: tuple[int, int] = (CHANNELS, STATES)) -> int:
    """Bytes of the saved tensors that end in ``wide``, channels and states in either order.

    Batch or time come before; the fused form leaves its states as (B, L / TILE, N, D).
    """
    return sum(size for shape, size in saved_storages(loss)
               if len(shape) > 2 and shape[-2:] in (wide, wide[::-1]))
