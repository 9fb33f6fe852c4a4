"""SSD in chunks, by matrix products (arXiv:2405.21060, section 6), right for every input.

With ``a_t = exp(dt_t A)``, the decays, in a chunk that is entered with state ``h``::

    y_i = C_i . sum_{j <= i} (prod_{j < s <= i} a_s) dt_j x_j B_j  +  (prod_{s <= i} a_s) h C_i
    h   = (prod_s a_s) h + sum_j (prod_{s > j} a_s) dt_j x_j B_j

The first sum is a masked T x T matrix for each chunk, as in attention. Only the states go from
chunk to chunk. The decays are products in [0, 1] (see mambabyte.ops.ssd.decay): nothing overflows,
and what underflows is zero in the definition too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambabyte.ops.ssd.decay import chunk_length, decayed_products, fold, unfold

CHUNK = 32  # fastest, or next to it, on a CPU


def chunked_ssd(
    x: Tensor, step: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """SSD in chunks of ``chunk`` steps, on prepared inputs as in ``recurrent_ssd``."""
    length, heads, groups = x.shape[1], x.shape[2], B.shape[2]
    steps = chunk_length(chunk, length)
    # The zeros of fold: steps that decay by exp(0) = 1 and add nothing.
    inputs = fold(step.unsqueeze(-1) * x, steps)  # (B, K, H, T, P)
    B_, C_ = fold(B, steps), fold(C, steps)  # (B, K, G, T, N)
    decay = torch.exp(fold(log_decay.unsqueeze(-1), steps))  # (B, K, H, T, 1)
    one = torch.ones_like(decay)
    (pairs,), since_start, to_end = decayed_products((one,), one, decay)

    def by_group(t: Tensor) -> Tensor:  # (B, K, H, *, *) -> (B, K, G, H / G, *, *)
        return t.unflatten(2, (groups, heads // groups))

    scores = (C_ @ B_.mT).unsqueeze(3) * by_group(pairs)  # (B, K, G, H / G, T, T)
    ends = by_group(to_end * inputs).mT @ B_.unsqueeze(3)  # (B, K, G, H / G, P, N)
    carries = []
    for total, end in zip(since_start[..., -1:, :].unbind(1), ends.flatten(2, 3).unbind(1),
                          strict=True):
        carries.append(state)
        state = total * state + end  # (B, H, P, N)
    carried = C_.unsqueeze(3) @ by_group(torch.stack(carries, 1)).mT  # (B, K, G, H / G, T, P)
    y = scores @ by_group(inputs) + by_group(since_start) * carried
    return unfold(y.flatten(2, 3), length), state
