"""The complete operator around a form in torch: bias, softplus, initial state, skip and gate."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def complete_scan(
    scan: Scan,
    chunk: int,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """``mambabyte.ops.selective_scan`` by one form in torch; shapes and results as there.

    ``scan`` is called with (u, delta, A, B, C, state, chunk): delta positive, all in one dtype,
    float32 or the widest that is given.
    """
    # Autocast would take the sum over states to bf16; a scan accumulates in float32 or better.
    with torch.autocast(u.device.type, enabled=False):
        dtype = torch.float32
        for t in (u, delta, A, B, C, initial_state):
            if t is not None:
                dtype = torch.promote_types(dtype, t.dtype)
        x, dt = u.to(dtype), delta.to(dtype)
        if delta_bias is not None:
            dt = dt + delta_bias.to(dtype)
        if delta_softplus:
            dt = F.softplus(dt)
        if initial_state is None:
            state = x.new_zeros(x.shape[0], x.shape[2], A.shape[1])
        else:
            state = initial_state.to(dtype)
        y, final_state = scan(x, dt, A.to(dtype), B.to(dtype), C.to(dtype), state, chunk)
        if D is not None:
            y = y + D.to(dtype) * x
        if z is not None:
            y = y * F.silu(z.to(dtype))
        return y.to(u.dtype), final_state
