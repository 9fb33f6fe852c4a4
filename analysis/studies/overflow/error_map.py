"""The error of value and gradients of every scan form, by chunk size, decay and precision.

A failure is *loud* when it leaves inf or nan, *silent* when the result is finite and off by more
than 1 %. The document's form is measured against the recurrence that its formula computes (see
mambabyte.ops.scan.cumsum); its distance from the definition is a column of its own.

The forms made of cumulated sums overflow where analysis.theory.bounds says. They have a quieter
fault in the gradient: the weight of an input at its own step, 1, is made of exp(cs_t) and
exp(-cs_t), so the gradient of cs_t gets two terms that should cancel and leave a rest of eps |g b|,
eps the rounding unit. The true gradient of the decay is of size exp(-x) |g b|: at x > ln(1 / eps) =
16 in float32 the rest is all there is, at x = 11 it is 1 %. segment_sum, associative and the stable
chunks form no such difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.measure.scans import Scan, scan_of
from analysis.measure.threads import threads
from analysis.studies.overflow import Grid, Kind, Precision
from analysis.studies.overflow.error_tables import WHOLE
from analysis.theory.bounds import SILENT, boundary
from analysis.theory.forms import INPUTS, PUBLISHED
from mambabyte.ops.scan.recurrent import recurrent_scan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# u, delta, B and C rounded to that type, all arithmetic in float32.
ROUNDED_INPUTS = {"bf16 inputs": torch.bfloat16, "fp16 inputs": torch.float16}


def inputs(
    decays: Sequence[float], length: int, channels: int, states: int, kind: str, seed: int,
) -> list[Tensor]:
    """float64 u, delta, A, B, C and initial state; row i of the batch decays by ``decays[i]``.

    The rows differ in nothing else, so a row is the same whatever others stand beside it.
    ``kind`` "constant" has delta = decays[i] at every step, "data-dependent" a log-normal factor
    of mean 1 and sigma 0.5 besides. A is -1 everywhere, so delta is the log-decay itself.
    """
    g = torch.Generator().manual_seed(seed)
    rows = len(decays)

    def normal(*shape: int) -> Tensor:
        one = torch.randn(1, *shape, generator=g, dtype=torch.float64)
        return one.repeat(rows, *(1 for _ in shape))

    delta = torch.tensor(decays, dtype=torch.float64)[:, None, None].expand(rows, length, channels)
    if kind == "data-dependent":
        delta = delta * torch.exp(0.5 * normal(length, channels) - 0.125)
    return [
        normal(length, channels), delta.contiguous(),
        -torch.ones(channels, states, dtype=torch.float64),
        normal(length, states), normal(length, states), normal(channels, states),
    ]


def published_recurrence(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """``h_t = a_t (h_{t-1} + b_t)``, step by step: what the document's formula amounts to."""
    ys = []
    for u_t, delta_t, B_t, C_t in zip(
        u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1), strict=True
    ):
        decay = torch.exp(delta_t.unsqueeze(-1) * A)
        state = decay * (state + (delta_t * u_t).unsqueeze(-1) * B_t.unsqueeze(1))
        ys.append((state * C_t.unsqueeze(1)).sum(-1))
    return torch.stack(ys, 1), state


def results_of(scan: Scan, tensors: list[Tensor], chunk: int, seed: int) -> dict[str, Tensor]:
    """y, final state, and the gradient of each input of a random projection of both, by row.

    The rows of the batch share A, so its gradient comes from a second run in which the rows are
    channels of one sequence, each with its own copy of A (they share B and C too).
    """
    found = _value_and_gradients(scan, tensors, chunk, seed)
    u, delta, A, B, C, state = tensors
    rows, length, channels = u.shape
    beside = [
        u.transpose(0, 1).reshape(1, length, rows * channels),
        delta.transpose(0, 1).reshape(1, length, rows * channels),
        A.repeat(rows, 1), B[:1], C[:1], state.reshape(1, rows * channels, -1),
    ]
    gradient = _value_and_gradients(scan, beside, chunk, seed, copies=rows)["d A"]
    return {**found, "d A": gradient.reshape(rows, channels, -1)}


def _value_and_gradients(
    scan: Scan, tensors: list[Tensor], chunk: int, seed: int, copies: int = 1
) -> dict[str, Tensor]:
    """``copies``: how often the projection is repeated along the channels."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    y, state = scan(*leaves, chunk)
    g = torch.Generator().manual_seed(seed + 1)
    channels = y.shape[2] // copies
    w = torch.randn(1, y.shape[1], channels, generator=g, dtype=torch.float64)
    v = torch.randn(1, channels, state.shape[2], generator=g, dtype=torch.float64)
    w, v = w.repeat(1, 1, copies).to(y.dtype), v.repeat(1, copies, 1).to(y.dtype)
    gradients = torch.autograd.grad((y * w).sum() + (state * v).sum(), leaves)
    found = {"y": y.detach().double(), "final state": state.detach().double()}
    return found | {f"d {n}": t.double() for n, t in zip(INPUTS, gradients, strict=True)}


def relative_errors(value: Tensor, reference: Tensor) -> Tensor:
    """max |value - reference| / max |reference| of each row, (n,) of (n, ...); inf or nan where the
    value has one.
    """
    value, reference = value.flatten(1), reference.flatten(1)
    scale = reference.abs().amax(1).clamp_min(1e-300)
    error = (value - reference).abs().amax(1) / scale
    error = torch.where(value.isinf().any(1), math.inf, error)
    return torch.where(value.isnan().any(1), math.nan, error)


def error_map(p: Grid, report: Callable[[str], None]) -> pd.DataFrame:
    """One row a (kind, precision, form, chunk, decay): errors of value and gradients.

    Errors are relative to the largest value of the exact result; inf and nan stand for
    themselves.
    """
    parts = []
    for kind in p.kinds:
        exact = inputs(p.decays, p.length, p.channels, p.states, kind, p.seed)
        references = {
            "definition": results_of(recurrent_scan, exact, 0, p.seed),
            "published": results_of(published_recurrence, exact, 0, p.seed),
        }
        for precision in p.precisions:
            forms = p.forms if precision == "float32" else p.low_precision_forms
            report(f"error map: {kind} decay, {precision}, {len(forms)} forms")
            tensors = _rounded(exact, precision)
            for form in forms:
                for chunk in p.chunks if form not in WHOLE else (0,):
                    found = results_of(scan_of(form), tensors, chunk, p.seed)
                    parts.append(_map_rows(kind, precision, form, chunk or p.length, p.decays,
                                           found, references))
    return pd.concat(parts, ignore_index=True)


@dataclass(frozen=True)
class Cell:
    """One cell of the map in detail."""

    row: pd.Series  # of the error map
    exponent: float  # largest cumulated log-decay of a chunk, nats
    bound: float  # the chunk length above which the form fails, steps
    positions: pd.DataFrame  # error of y by position, relative to the largest exact value
    first_bad: int | None  # first position that is off by more than 1 %, inf or nan


def cell(
    p: Grid, form: str, decay: float, chunk: int, precision: Precision = "float32",
    kind: Kind = "constant",
) -> Cell:
    """The map's cell at any decay and chunk, on its grid or between, and where y goes wrong."""
    p = replace(p, forms=(form,), low_precision_forms=(form,), precisions=(precision,),
                kinds=(kind,), decays=(decay,), chunks=(chunk,))
    with threads(1):
        row = error_map(p, lambda line: None).iloc[0]
        exact = inputs(p.decays, p.length, p.channels, p.states, kind, p.seed)
        own: Scan = published_recurrence if form in PUBLISHED else recurrent_scan
        reference = own(*exact, 0)[0][0]  # (L, channels)
        y = scan_of(form)(*_rounded(exact, precision), chunk)[0][0].double()
    error = ((y - reference).abs() / reference.abs().max()).amax(-1)
    bad = (~(error <= SILENT)).nonzero()
    exponents = F.pad(exact[1][0], (0, 0, 0, -p.length % chunk)).unflatten(0, (-1, chunk)).sum(1)
    return Cell(
        row, float(exponents.max()), boundary(form, decay, precision),
        pd.DataFrame({"position": range(p.length), "error": error.tolist()}),
        int(bad[0]) if len(bad) else None)


def _rounded(exact: list[Tensor], precision: str) -> list[Tensor]:
    """The inputs in the precision's arithmetic; A and the state come in it whole."""
    if precision in DTYPES:
        return [t.to(DTYPES[precision]) for t in exact]
    u, delta, A, B, C, state = exact
    u, delta, B, C = (t.to(ROUNDED_INPUTS[precision]) for t in (u, delta, B, C))
    return [t.float() for t in (u, delta, A, B, C, state)]


def _map_rows(
    kind: str, precision: str, form: str, chunk: int, decays: Sequence[float],
    found: dict[str, Tensor], references: dict[str, dict[str, Tensor]],
) -> pd.DataFrame:
    own = references["published" if form in PUBLISHED else "definition"]
    errors = {name: relative_errors(found[name], own[name]) for name in found}
    value = _worst(errors["y"], errors["final state"])
    gradient = _worst(*(errors[f"d {n}"] for n in INPUTS))
    against = _worst(*(relative_errors(found[n], references["definition"][n])
                       for n in ("y", "final state")))
    columns: dict[str, object] = {
        "kind": kind, "precision": precision, "form": form, "chunk": chunk, "decay": list(decays),
        "value error": value.tolist(), "gradient error": gradient.tolist(),
        "value error against the definition": against.tolist(),
    }
    columns |= {f"error of {name}": e.tolist() for name, e in errors.items()}
    frame = pd.DataFrame(columns)
    frame["value"] = [outcome(e) for e in frame["value error"]]
    frame["gradient"] = [outcome(e) for e in frame["gradient error"]]
    return frame


def _worst(*errors: Tensor) -> Tensor:
    """Elementwise worst: nan before inf before the largest number."""
    stacked = torch.stack(errors)
    worst = stacked.nan_to_num(nan=-1.0, posinf=math.inf).amax(0)
    return torch.where(stacked.isnan().any(0), math.nan, worst)


def outcome(error: float) -> str:
    """What an error means: right, rough (above 1e-3), silent (above 1e-2), inf or nan."""
    if math.isnan(error):
        return "nan"
    if math.isinf(error):
        return "inf"
    return "silent" if error > SILENT else "rough" if error > 1e-3 else "right"
