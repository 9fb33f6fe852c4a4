"""The stable chunked form: right for every input, in plain torch.

Cut the length into K chunks of T steps. Because the recurrence is linear in h, the state is the
sum of what starts inside the chunk and what enters it::

    h_{k,t} = local_{k,t} + exp(cs_{k,t}) carry_k        cs_{k,t} = sum_{s <= t} delta_{k,s} A
    local_{k,t} = exp(delta_{k,t} A) local_{k,t-1} + delta_{k,t} B_{k,t} u_{k,t}
    carry_{k+1} = exp(cs_{k,T}) carry_k + local_{k,T}

``local`` takes T steps, each over all K chunks at once, and ``carry`` K steps, so some
2 sqrt(L) torch operations run at the best T instead of L. With delta >= 0 and A <= 0 every
exponent is <= 0: nothing overflows, and what underflows is a contribution that is zero in the
definition too. There is no division by a decay and no difference of large exponents, which is
what sets it apart from the log-cumsum trick (see mambabyte.ops.scan.cumsum).

A document that starts at step t has the log-decay -inf there: exp of it and of every sum with it is
exactly 0, and so is its derivative.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def chunked_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Stable chunked scan. Shapes as in mambabyte.ops.selective_scan; ``chunk`` is T; ``starts``
    (B, L) bool, where documents begin."""
    length = u.shape[1]
    T = min(chunk, length)
    # Steps of delta 0 decay by exp(0) = 1 and add nothing: padding leaves the state as it is.
    pad = -length % T

    def fold(x: Tensor) -> Tensor:  # (B, L, *) -> (B, K, T, *)
        return F.pad(x, (0, 0, 0, pad)).unflatten(1, (-1, T))

    dt, B_, C_ = fold(delta), fold(B), fold(C)
    if starts is None:
        log_decay = dt.unsqueeze(-1) * A  # (B, K, T, D, N)
    else:
        reset = dt.new_zeros(starts.shape).masked_fill(starts, -math.inf)
        log_decay = torch.addcmul(
            fold(reset[..., None])[..., None], dt.unsqueeze(-1), A)  # one operation, as without
    inputs = fold(delta * u).unsqueeze(-1) * B_.unsqueeze(-2)  # (B, K, T, D, N)
    decay = torch.exp(log_decay)

    local = inputs[:, :, 0]
    locals_ = [local]
    for decay_t, input_t in zip(decay.unbind(2)[1:], inputs.unbind(2)[1:], strict=True):
        local = decay_t * local + input_t  # (B, K, D, N)
        locals_.append(local)

    cumulated = torch.exp(torch.cumsum(log_decay, dim=2))  # from the chunk's start, <= 1
    carries = []
    for total, end in zip(cumulated[:, :, -1].unbind(1), local.unbind(1), strict=True):
        carries.append(state)
        state = total * state + end  # (B, D, N)

    h = torch.stack(locals_, dim=2) + cumulated * torch.stack(carries, dim=1).unsqueeze(2)
    y = (h * C_.unsqueeze(-2)).sum(-1)  # (B, K, T, D)
    return y.flatten(1, 2)[:, :length], state
