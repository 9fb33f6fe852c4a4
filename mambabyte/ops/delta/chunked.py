"""The gated delta rule in chunks, by matrix products and one triangular solve a chunk.

Write ``a_s`` for the decay of step s (of each key channel), ``u_i = beta_i (v_i - S^T k_i)`` for
what step i writes, and S for the state that a chunk is entered with. Then::

    (I + diag(beta) M) U = diag(beta) (V - K' S)      M_ij = sum_c k_i k_j prod_{j < s <= i} a_s
    O = Q' S + N U                                    N_ij = sum_c q_i k_j prod_{j < s <= i} a_s
    S = diag(prod_s a_s) S + K''^T U

with M strictly lower triangular, N lower triangular, K' and Q' decayed from the chunk's start and
K'' to its end. The solution is ``U = U_0 - W S``, for two right-hand sides that do not know S: the
WY representation of a product of Householder matrices (arXiv:2406.06484, section 3). So all chunks
are solved at once and only the states go from chunk to chunk. The triangular system is solved by
substitution: an explicit inverse grows with repeated keys.

The decays are products in [0, 1] (see mambabyte.ops.ssd.decay), with a gate a channel too: there
is no positive exponent, and a decay of 0 is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambabyte.ops.ssd.decay import chunk_length, decayed_products, fold, unfold

CHUNK = 32  # fastest, or next to it, on a CPU


def chunked_delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """The rule in chunks of ``chunk`` steps. Shapes as in
    mambabyte.ops.gated_delta_rule, with log_decay (B, L, H, 1 or K)."""
    length, values = q.shape[1], v.shape[-1]
    steps = chunk_length(chunk, length)
    # The zeros of fold: a step that does not decay (exp(0) = 1) and writes nothing (beta 0).
    q_, k_, v_ = fold(q, steps), fold(k, steps), fold(v, steps)  # (B, C, H, T, K or V)
    share = fold(beta.unsqueeze(-1), steps)  # (B, C, H, T, 1)
    (reads, overlaps), since_start, to_end = decayed_products(
        (q_, k_), k_, torch.exp(fold(log_decay, steps)))
    solved = torch.linalg.solve_triangular(
        share * overlaps, share * torch.cat([v_, since_start * k_], -1),
        upper=False, unitriangular=True)  # ones for the diagonal, whatever is there
    written, erased = solved.split([values, k.shape[-1]], -1)  # U_0 (.., T, V) and W (.., T, K)

    ends = (to_end * k_).mT  # (B, C, H, K, T)
    totals = since_start[..., -1:, :].mT  # (B, C, H, K or 1, 1)
    carries, writes = [], []
    for total, end, new, old in zip(*(t.unbind(1) for t in (totals, ends, written, erased)),
                                    strict=True):
        write = new - old @ state  # (B, H, T, V)
        carries.append(state)
        writes.append(write)
        state = total * state + end @ write  # (B, H, K, V)
    o = (since_start * q_) @ torch.stack(carries, 1) + reads @ torch.stack(writes, 1)
    return unfold(o, length), state
