"""Scan forms: time against length and batch, and what their backward passes allocate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.measure.allocations import AllocationCounter
from analysis.measure.growth import exponent_table
from analysis.measure.timing import MEASURED, Case, measure
from analysis.runs.frames import not_measured
from analysis.studies.throughput import INDEXED, PASSES, Parameters
from mambabyte.config import get_preset
from mambabyte.ops import selective_scan
from mambabyte.ops.scan.recurrent import scan_step


def indexed_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence with every step's inputs indexed in the loop, as the second document has it.

    The same values as form "recurrent", whose loop unbinds once; the difference is what autograd
    makes of ``u[:, t]``. delta is given before its softplus.
    """
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1], dtype=torch.float32)
    dt = F.softplus(delta.float())
    ys = []
    for t in range(u.shape[1]):
        y_t, h = scan_step(
            u[:, t].float(), dt[:, t], A, B[:, t].float(), C[:, t].float(), h)
        ys.append(y_t)
    y = (torch.stack(ys, 1) + D * u) * F.silu(z)
    return y.to(u.dtype), h


def _scan_inputs(p: Parameters, batch: int, length: int, grad: bool) -> list[Tensor]:
    """u, delta, A, B, C, D, z as a Mamba layer at initialisation makes them."""
    generator = torch.Generator(p.device).manual_seed(length)
    channels = p.d_model * get_preset(p.preset).model.expand
    bf16 = p.precision == "bf16" or (p.precision == "auto" and p.device.startswith("cuda"))

    def draw(*shape: int, stream: bool = True) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=p.device)
        return values.to(torch.bfloat16 if bf16 and stream else torch.float32)

    inputs = [
        draw(batch, length, channels), draw(batch, length, channels) - 4.6,  # dt about 0.01
        -torch.arange(1.0, p.d_state + 1, device=p.device).repeat(channels, 1),
        draw(batch, length, p.d_state), draw(batch, length, p.d_state),
        draw(channels, stream=False), draw(batch, length, channels)]
    return [t.requires_grad_(grad) for t in inputs]


def _call_scan(form: str, inputs: list[Tensor], backward: bool) -> None:
    if form == INDEXED:
        y, _ = indexed_scan(*inputs)
    else:
        u, delta, A, B, C, D, z = inputs
        y, _ = selective_scan(u, delta, A, B, C, D, z, delta_softplus=True, form=form)
    if backward:
        torch.autograd.grad(y, inputs, torch.ones_like(y))


def time_scans(
    p: Parameters, forms: tuple[str, ...], report: Callable[[str], None]
) -> pd.DataFrame:
    """Every form, forward and forward+backward, at every one of ``points``."""
    cases = []
    not_run = {form: why for form in forms if (why := _unavailable(p, form))}
    for form in forms:
        for direction in PASSES:
            for batch, length in points(p):
                series = (form, direction, batch if batch != p.batch_size else "lengths")
                case = Case(series, length, partial(_make_scan, p, form, direction, batch, length),
                            {"form": form, "pass": direction, "batch": batch})
                case.status = not_run.get(form, MEASURED)
                cases.append(case)
    timed = measure([c for c in cases if c.status == MEASURED], rounds=p.rounds,
                    guard_seconds=p.guard_seconds, device=p.device, report=report, capture=True,
                    energy_seconds=p.energy_seconds)
    absent = pd.DataFrame([
        {**c.labels, "length": c.length, "ms": None, "ms_lower_quartile": None,
         "ms_upper_quartile": None, "rounds": 0, "timed_as": None, "joules": None,
         "status": c.status}
        for c in cases if c.status != MEASURED and c.labels["form"] in not_run])
    return per_byte(pd.concat([timed, absent], ignore_index=True) if len(absent) else timed)


def points(p: Parameters) -> list[tuple[int, int]]:
    """(batch, length): all lengths at one batch, and all batches at one length."""
    along = [(p.batch_size, length) for length in p.lengths]
    return along + [(b, p.batch_length) for b in p.batches if (b, p.batch_length) not in along]


def per_byte(timed: pd.DataFrame) -> pd.DataFrame:
    """With bytes a second and gross joules per megabyte (1e6 bytes) in place of joules a call."""
    size = timed["batch"] * timed["length"]
    return not_measured(timed.drop(columns=["joules", "status"]).assign(
        bytes_per_second=size / timed["ms"].astype(float) * 1e3,
        joules_per_megabyte=timed["joules"].astype(float) / size * 1e6,
        status=timed["status"]))


def _make_scan(
    p: Parameters, form: str, direction: str, batch: int, length: int
) -> Callable[[], None]:
    backward = direction == PASSES[1]
    return partial(_call_scan, form, _scan_inputs(p, batch, length, backward), backward)


def _unavailable(p: Parameters, form: str) -> str:
    """Why a form does not run here, "" when it does: tried once, at the smallest size."""
    try:
        _call_scan(form, _scan_inputs(p, 1, 2, True), True)
    except Exception as error:  # each kernel fails in its own way; the row says how
        first = str(error).splitlines()[0] if str(error) else ""
        return f"does not run here: {type(error).__name__}: {first}"[:200]
    return ""


def count_allocations(p: Parameters, forms: tuple[str, ...]) -> pd.DataFrame:
    """Bytes of new tensors and operator calls of one backward pass, by form and length.

    Counted on the CPU at batch 1: it is a property of the graph. ``zero_fill_bytes`` are those of
    the full-length gradients of slices and indexed steps.
    """
    p = replace(p, device="cpu", precision="fp32")
    rows: list[dict[str, object]] = []
    for form in forms:
        if _unavailable(p, form):
            continue
        for length in p.allocation_lengths:
            inputs = _scan_inputs(p, 1, length, True)
            if form == INDEXED:
                y, _ = indexed_scan(*inputs)
            else:
                y, _ = selective_scan(*inputs, delta_softplus=True, form=form)
            with AllocationCounter() as counter:
                torch.autograd.grad(y, inputs, torch.ones_like(y))
            filled = [n for n in counter.bytes if "slice_backward" in n or "select_backward" in n]
            rows.append({
                "form": form, "length": length,
                "allocated_bytes": sum(counter.bytes.values()),
                "zero_fill_bytes": sum(counter.bytes[n] for n in filled),
                "operator_calls": sum(counter.calls.values()),
                "zero_fill_calls": sum(counter.calls[n] for n in filled),
            })
    return pd.DataFrame(rows)


def allocation_exponents(allocations: pd.DataFrame) -> pd.DataFrame:
    parts = []
    for what in ("allocated_bytes", "zero_fill_bytes"):
        some = allocations[allocations[what] > 0]
        if len(some):
            parts.append(exponent_table(some, ("form",), what).assign(what=what))
    return pd.concat(parts, ignore_index=True)
