"""The selective scan under mamba-ssm's name and in its layout: swap one import line.

::

    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn   # before
    from mambabyte.ops import selective_scan_fn                            # after

Meaning and argument order are those documented by ``selective_scan_ref`` of state-spaces/mamba
(mamba_ssm/ops/selective_scan_interface.py); complex A is not supported. Three things go beyond it:
it runs on the CPU too, gradients flow through the last state, and it takes packed sequences by
``seq_idx`` or ``cu_seqlens``, as mamba-ssm's Mamba2 module does.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.arguments import FLOATS, check_flag, check_tensors, document_ages


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    return_last_state: bool = False, *, seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan in mamba-ssm's layout: time is the last dimension.

    Shapes: u, delta, z (B, D, L); A (D, N), real; B and C, each on its own, (D, N) constant in
    time, (B, N, L), or (B, G, N, L) where each of G groups serves D / G neighbouring channels;
    D, delta_bias (D,). Returns out (B, D, L) in u's dtype, or (out, last_state) with the state
    (B, D, N) in float32 (float64 for float64 inputs).

    ``seq_idx`` (B, L) int says which sequence each step is of: where it changes, the state begins
    anew. ``cu_seqlens`` (n + 1,) int says it for a batch of one, in cumulative lengths. The last
    state is that of the last sequence.

    B or C that is constant in time takes N scans of one state each, G groups take G scans.

    Raises UserError for a complex A and for shapes that do not agree.
    """
    check_flag("delta_softplus", delta_softplus)
    check_flag("return_last_state", return_last_state)
    _check(u, delta, A, B, C, D, z, delta_bias)
    B, C = _grouped("B", B, u, A), _grouped("C", C, u, A)
    ages = _ages(u, seq_idx, cu_seqlens)
    # As in the reference, whatever is not in one dtype is computed in the widest.
    common = u.dtype
    for tensor in (delta, B, C, z):
        if tensor is not None and tensor.ndim > 2:
            common = torch.promote_types(common, tensor.dtype)
    wide = torch.float64 if common == torch.float64 else torch.float32

    def rows(tensor: Tensor) -> Tensor:  # (B, D, L) -> (B, L, D)
        return tensor.to(common).transpose(1, 2).contiguous()

    def parameter(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(wide)

    inputs = (rows(u), rows(delta), A.to(wide), B, C)
    gate, skip = None if z is None else rows(z), parameter(D)
    bias = parameter(delta_bias)
    if B.ndim == 2 or C.ndim == 2:
        out, last_state = _scan_by_state(*inputs, bias, delta_softplus, ages)
        if skip is not None:
            out = out + skip * inputs[0]
        if gate is not None:
            out = out * F.silu(gate.to(wide))
    else:
        out, last_state = _scan_by_group(*inputs, skip, gate, bias, delta_softplus, ages)
    out = out.to(u.dtype).transpose(1, 2)
    return (out, last_state) if return_last_state else out


def _check(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Raise UserError for what is no real tensor, and for shapes that do not agree but those of B
    and C."""
    if any(isinstance(t, Tensor) and t.is_complex() for t in (A, B, C)):
        raise UserError("A, B and C must be real: the complex (S4D-Lin) form is not supported")
    optional = {name: t for name, t in (("z", z), ("D", D), ("delta_bias", delta_bias))
                if t is not None}
    for name, t in {"u": u, "delta": delta, "A": A, "B": B, "C": C, **optional}.items():
        check_tensors(name, t, None, FLOATS)
    if u.ndim != 3 or A.ndim != 2 or A.shape[0] != u.shape[1]:
        raise UserError(
            f"u has shape {tuple(u.shape)} and A {tuple(A.shape)}: expected (batch, channels, "
            "length) and (channels, states)"
        )
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None and tensor.shape != u.shape:
            raise UserError(f"{name} has shape {tuple(tensor.shape)}: expected {tuple(u.shape)}")
    check_tensors("u", u, None, FLOATS, (
        ("D?", D, A.shape[:1], None), ("delta_bias?", delta_bias, A.shape[:1], None)))


def _ages(u: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """What ``document_ages`` makes of either way to say where sequences begin."""
    batch, _, length = u.shape
    if seq_idx is None:
        return document_ages(cu_seqlens, u.transpose(1, 2))
    if cu_seqlens is not None:
        raise UserError("seq_idx and cu_seqlens say the same: give one of them")
    check_tensors("seq_idx", seq_idx, (batch, length), (torch.int32, torch.int64))
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx.diff(dim=1) != 0
    return document_ages(starts, u.transpose(1, 2))


def _grouped(name: str, tensor: Tensor, u: Tensor, A: Tensor) -> Tensor:
    """(D, N) as it is, the others as (B, G, N, L). Raises UserError where it fits neither."""
    (batch, channels, length), states = u.shape, A.shape[1]
    if tensor.shape == (channels, states):
        return tensor
    grouped = tensor.unsqueeze(1) if tensor.ndim == 3 else tensor
    fits = grouped.ndim == 4 and grouped.shape == (batch, grouped.shape[1], states, length)
    if not fits or not grouped.shape[1] or channels % grouped.shape[1]:
        raise UserError(
            f"{name} has shape {tuple(tensor.shape)}: expected {(channels, states)}, "
            f"{(batch, states, length)} or {(batch, 'G', states, length)} with G a divisor of "
            f"{channels}"
        )
    return grouped


def _scan_by_group(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, ages: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One scan for the channels of each group. u, delta, z (B, L, D); B, C (B, G, N, L)."""
    from mambabyte.ops.scan.dispatch import selective_scan

    groups = math.lcm(B.shape[1], C.shape[1])
    B, C = (t.to(u.dtype).transpose(2, 3) for t in (B, C))  # (B, G, L, N)
    width = u.shape[2] // groups
    outs, states = [], []
    for group in range(groups):
        mine = slice(group * width, (group + 1) * width)
        out, state = selective_scan(
            u[..., mine].contiguous(),
            delta[..., mine].contiguous(),
            A[mine],
            B[:, group * B.shape[1] // groups].contiguous(),
            C[:, group * C.shape[1] // groups].contiguous(),
            None if D is None else D[mine],
            None if z is None else z[..., mine].contiguous(),
            delta_bias=None if delta_bias is None else delta_bias[mine],
            delta_softplus=delta_softplus,
            ages=ages,
        )
        outs.append(out)
        states.append(state)
    if groups == 1:
        return outs[0], states[0]
    return torch.cat(outs, dim=2), torch.cat(states, dim=1)


def _scan_by_state(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_bias: Tensor | None,
    delta_softplus: bool, ages: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """B or C (or both) of shape (D, N): each state is a scan of its own, weighted by channel.

    The states do not mix, so with B constant ``h_n = B_n h'_n``, where h' is driven by u alone,
    and with C constant ``y = sum_n C_n h_n``. In float32, since the sum over n is taken here.
    """
    wide = A.dtype
    u, delta = u.to(wide), delta.to(wide)
    ones = u.new_ones(u.shape[0], 1, 1, u.shape[1])  # (B, G, N, L) with one group and one state
    total: Tensor | None = None
    states = []
    for n in range(A.shape[1]):
        y, state = _scan_by_group(
            u, delta, A[:, n : n + 1], ones if B.ndim == 2 else B[:, :, n : n + 1],
            ones if C.ndim == 2 else C[:, :, n : n + 1], None, None, delta_bias, delta_softplus,
            ages,
        )
        if B.ndim == 2:
            y, state = y * B[:, n].to(wide), state * B[:, n : n + 1].to(wide)
        if C.ndim == 2:
            y = y * C[:, n].to(wide)
        total = y if total is None else total + y
        states.append(state)
    assert total is not None
    return total, torch.cat(states, dim=2)
