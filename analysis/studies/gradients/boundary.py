"""The gradient that crosses a chunk boundary, form by form, against that of the recurrence.

Let a boundary lie after step p. The gradient of a loss on the steps after p reaches everything
before it through one tensor, the state h_p: with g = dLoss/dh_p,

    dLoss/dh_0 = (prod_{s <= p} a_s) g          dLoss/db_k = (prod_{k < s <= p} a_s) g

so what a chunked form must get right is g, which its second chunk sends back through the carry,
and the products, which shrink with the distance p - k. *Truncation* (a detached carry) sets all of
this to zero: the earlier steps then learn from their own chunk alone.

The document's form hands its gradient across the boundary like any other; but it is the gradient
of its own formula, h_t = a_t (h_{t-1} + b_t), in which b_k is decayed once more: dLoss/db_k is
a_k times the true one. A check of the gradient against differences of the same form
(``gradcheck``) passes and cannot see this; a comparison with the recurrence does.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.measure.scans import Scan, scan_of
from analysis.studies.gradients import Scans
from analysis.theory.forms import INPUTS
from mambabyte.ops.compare import relative_rms
from mambabyte.ops.scan.recurrent import recurrent_scan


def make_inputs(
    length: int, channels: int, states: int, seed: int, batch: int = 2
) -> list[Tensor]:
    """float64 u, delta, A, B, C and initial state as at the document's initialisation.

    dt log-uniform in [0.001, 0.1] by channel, A = -(1..N).
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    uniform = torch.rand(channels, generator=g, dtype=torch.float64)
    base = 1e-3 * (0.1 / 1e-3) ** uniform  # (D,), as softplus(bias) is drawn
    delta = base * torch.exp(0.2 * normal(batch, length, channels))
    A = -torch.arange(1, states + 1, dtype=torch.float64).repeat(channels, 1)
    return [
        normal(batch, length, channels), delta, A, normal(batch, length, states),
        normal(batch, length, states), normal(batch, channels, states),
    ]


def later_loss_gradients(
    scan: Scan, tensors: list[Tensor], chunk: int, boundary: int, weight: Tensor,
    detach: bool = False,
) -> dict[str, Tensor]:
    """Gradients of a loss on the steps from ``boundary`` on, one name to each of ``tensors``: u,
    delta, A, B, C and the initial state, shapes as in mambabyte.ops.selective_scan. The loss is the
    sum of y times ``weight`` (B, L, D).

    "h" is the gradient of the state at the boundary. With ``detach`` the carry is cut there, as in
    truncated training. The scan runs in two calls that meet at the boundary, the first ending in
    the state that the second starts from.
    """
    u, delta, A, B, C, state = (t.clone().requires_grad_() for t in tensors)
    _, carry = scan(u[:, :boundary], delta[:, :boundary], A, B[:, :boundary], C[:, :boundary],
                    state, chunk)
    handed = carry.detach().requires_grad_() if detach else carry
    if not detach:
        handed.retain_grad()
    y, _ = scan(u[:, boundary:], delta[:, boundary:], A, B[:, boundary:], C[:, boundary:],
                handed, chunk)
    (y * weight[:, boundary:].to(y.dtype)).sum().backward()
    leaves = dict(zip(INPUTS, (u, delta, A, B, C, state), strict=True))
    found = {f"d {n}": torch.zeros_like(t) if t.grad is None else t.grad
             for n, t in leaves.items()}
    assert handed.grad is not None
    return found | {"d h": handed.grad}


def whole_gradients(scan: Scan, tensors: list[Tensor], chunk: int, boundary: int,
                    weight: Tensor) -> dict[str, Tensor]:
    """The same loss with the scan in one call, its own chunks and carries inside. On the CPU."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    y, _ = scan(*leaves, chunk)
    loss = (y[:, boundary:] * weight[:, boundary:].to(y)).sum()
    return {f"d {n}": g.cpu()
            for n, g in zip(INPUTS, torch.autograd.grad(loss, leaves), strict=True)}


def boundary_frame(p: Scans) -> pd.DataFrame:
    """One row a (form, precision, boundary, gradient): relative error against the recurrence.

    The reference is the whole recurrence in float64. Of u, delta and B the gradient at the steps
    before the boundary is compared (that of C is zero there), of A and the initial state all of
    it. "truncated" cuts the carry at the boundary.
    """
    exact, weight = _inputs_and_weight(p)
    rows = []
    for boundary in range(p.chunk, p.length, p.chunk):
        reference = whole_gradients(recurrent_scan, exact, 0, boundary, weight)
        for form, precision in [(f, d) for f in p.forms for d in ("float64", "float32")]:
            if form == "fused" and precision == "float64" and p.device != "cpu":
                continue  # the kernels of a GPU are for training: float32 and below
            tensors = [t.to(p.device, getattr(torch, precision)) for t in exact]
            found = whole_gradients(scan_of(form), tensors, p.chunk, boundary, weight)
            rows += _boundary_rows(form, precision, boundary, found, reference)
        cut = later_loss_gradients(recurrent_scan, exact, 0, boundary, weight, detach=True)
        rows += _boundary_rows("truncated", "float64", boundary, cut, reference)
    return pd.DataFrame(rows)


def _inputs_and_weight(p: Scans) -> tuple[list[Tensor], Tensor]:
    """Inputs in float64, and the weights (B, L, D) of y in the loss."""
    exact = make_inputs(p.length, p.channels, p.states, p.seed)
    generator = torch.Generator().manual_seed(p.seed + 1)
    return exact, torch.randn(exact[0].shape, generator=generator, dtype=torch.float64)


def _boundary_rows(
    form: str, precision: str, boundary: int, found: dict[str, Tensor],
    reference: dict[str, Tensor],
) -> list[dict[str, object]]:
    rows = []
    for name in ("d u", "d delta", "d B", "d A", "d initial state"):
        value, exact = found[name], reference[name]
        if name in ("d u", "d delta", "d B"):
            value, exact = value[:, :boundary], exact[:, :boundary]
        rows.append({"form": form, "precision": precision, "boundary, step": boundary,
                     "gradient": name, "relative error": relative_rms(value, exact)})
    return rows


def shown_distances(boundary: int) -> list[int]:
    """Distances 1 to ``boundary``: all at first, then fewer and fewer, below a hundred of them."""
    return sorted({round(float(d)) for d in np.geomspace(1, boundary, 96)})


def distance_frame(p: Scans) -> pd.DataFrame:
    """Gradient of u at each distance before the last boundary: its size, and each form's error.

    The error at a distance is relative to the true gradient *there*, which shrinks with distance.
    """
    exact, weight = _inputs_and_weight(p)
    boundary = (p.length - 1) // p.chunk * p.chunk
    reference = whole_gradients(recurrent_scan, exact, 0, boundary, weight)["d u"]
    size = reference.square().mean((0, 2)).sqrt()
    found = {}
    for form in p.forms:
        tensors = [t.to(p.device, torch.float32) for t in exact]
        gradient = whole_gradients(scan_of(form), tensors, p.chunk, boundary, weight)["d u"]
        error = (gradient.double() - reference).square().mean((0, 2)).sqrt()
        found[form] = error[:boundary] / size[:boundary]
    rows = []
    for distance in shown_distances(boundary):
        at = boundary - distance
        row: dict[str, object] = {"distance, steps": distance,
                                  "size of the gradient of u": float(size[at])}
        row |= {f"error of {form}": float(error[at]) for form, error in found.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def gradcheck_frame(p: Scans) -> pd.DataFrame:
    """float64 gradcheck of each form over two boundaries, and the same form against the recurrence.

    The first says that a form's gradient is that of its own value, the second that the value and
    the gradient are those of the recurrence.
    """
    u, delta, A, B, C, state = make_inputs(7, 2, 2, p.seed, batch=1)
    delta = delta * 10  # decays strong enough to tell two recurrences apart
    inputs = tuple(t.clone().requires_grad_() for t in (u, delta, A, B, C, state))
    weight = torch.randn(u.shape, generator=torch.Generator().manual_seed(p.seed),
                         dtype=torch.float64)
    reference = whole_gradients(recurrent_scan, list(inputs), 0, 0, weight)
    y_exact, _ = recurrent_scan(u, delta, A, B, C, state)
    rows = []
    for form in p.forms:
        scan = scan_of(form)

        def call(*tensors: Tensor, scan: Scan = scan) -> tuple[Tensor, Tensor]:
            return scan(*tensors, 3)

        consistent = torch.autograd.gradcheck(call, inputs, raise_exception=False)
        found = whole_gradients(scan, list(inputs), 3, 0, weight)
        rows.append({
            "form": form, "gradcheck passes": bool(consistent),
            "value against the recurrence": relative_rms(call(*inputs)[0].detach(), y_exact),
            "gradients against the recurrence": max(
                relative_rms(found[name], reference[name]) for name in found)})
    return pd.DataFrame(rows)
