"""The log-cumsum trick, as published and corrected: subjects of study, not for training.

Write ``a_t = exp(delta_t A)``, ``cs_t = sum_{s<=t} delta_s A`` (so ``prod_{s=k+1..t} a_s =
exp(cs_t - cs_k)``), ``b_k = delta_k B_k u_k`` and ``cs_0 = 0``.

*Which recurrence the published formula computes.* The document writes::

    inner_k = b_k exp(log_decay_k - cs_k)           # = b_k exp(-cs_{k-1})
    h_t     = exp(cs_t) (sum_{k<=t} inner_k + h_0)

Since ``log_decay_k - cs_k = -cs_{k-1}``, the weight of input k at time t is::

    exp(cs_t - cs_{k-1}) = prod_{s=k..t} a_s = a_k prod_{s=k+1..t} a_s

one factor ``a_k`` too many: each input is decayed by its own step before it is ever read. That
is the recurrence ``h_t = a_t (h_{t-1} + b_t)``, not ``h_t = a_t h_{t-1} + b_t``, which the
document's own one-step function computes. The two differ by ``(a_k - 1) b_k`` to first order, at
every length and in every precision: a property of the formula, not rounding.

*The corrected formula* uses ``inner_k = b_k exp(-cs_k)``.

*What stays wrong.* In both the exponent ``-cs`` is positive and grows along the chunk: the claim
that both exponentials stay in [exp(-26), 1] has the sign reversed for the second. In float32
``exp`` overflows above 88.72 = ln(3.4e38), so a chunk fails once it cumulates a log-decay of that
size. Then ``exp(cs)`` has underflowed towards 0 and the product is 0 * inf = nan. The corrected
formula's exponent ``-cs_t`` runs one step further than the published ``-cs_{t-1}``, so it
overflows one step earlier.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_chunked_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """The chunked scan as the document writes it, slices in a loop included.

    Computes ``h_t = a_t (h_{t-1} + b_t)`` (see above). Shapes as in selective_scan.
    """
    b = (delta * u).unsqueeze(-1) * B.unsqueeze(2)  # (B, L, D, N)
    return _published_chunks(b, delta, A, C, state, chunk)


def document_as_coded_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """``document_chunked_scan`` with its inputs in the published script's order, (delta x B) u.

    The same numbers up to rounding. But autograd keeps delta x B, a full (B, L, D, N) tensor, for
    the gradient of u, where (delta u) x B keeps delta u, (B, L, D): six full tensors for five.
    """
    b = (delta.unsqueeze(-1) * B.unsqueeze(2)) * u.unsqueeze(-1)  # (B, L, D, N)
    return _published_chunks(b, delta, A, C, state, chunk)


def _published_chunks(
    b: Tensor, delta: Tensor, A: Tensor, C: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """(y, final state) of the published loop over chunks; ``b`` is (B, L, D, N)."""
    log_decay = delta.unsqueeze(-1) * A  # (B, L, D, N)
    ys = []
    for start in range(0, b.shape[1], chunk):
        end = start + chunk
        cs = torch.cumsum(log_decay[:, start:end], dim=1)
        inner = b[:, start:end] * torch.exp(log_decay[:, start:end] - cs)
        h = torch.exp(cs) * (torch.cumsum(inner, dim=1) + state.unsqueeze(1))
        ys.append((h * C[:, start:end].unsqueeze(2)).sum(-1))
        state = h[:, -1]
    return torch.cat(ys, dim=1), state


def document_cumsum_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """The log-cumsum trick over the whole sequence, as the document writes it: one chunk."""
    return document_chunked_scan(u, delta, A, B, C, state, u.shape[1])


def corrected_chunked_cumsum_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """The chunked trick with ``inner_k = b_k exp(-cs_k)``: the right recurrence, still fragile.

    Right as long as no chunk cumulates a log-decay near ln(float max); then inf and nan, as
    loudly as the published form. Shapes as in selective_scan.
    """
    log_decay = delta.unsqueeze(-1) * A  # (B, L, D, N)
    b = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
    ys = []
    for decay_k, b_k, C_k in zip(
        log_decay.split(chunk, 1), b.split(chunk, 1), C.split(chunk, 1), strict=True
    ):
        cs = torch.cumsum(decay_k, dim=1)
        h = torch.exp(cs) * (torch.cumsum(b_k * torch.exp(-cs), dim=1) + state.unsqueeze(1))
        ys.append((h * C_k.unsqueeze(2)).sum(-1))
        state = h[:, -1]
    return torch.cat(ys, dim=1), state
